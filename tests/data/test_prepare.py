import json
import os
import signal
from functools import partial
from itertools import pairwise
from shutil import copytree
from unittest.mock import Mock

import cv2
import lmdb
import numpy as np
import pytest
from basicsr.data import build_dataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import photograph
from tests.helpers import refused
from tlw_basicsr import UserError, imresize
from tlw_basicsr.data.images import write_image
from tlw_basicsr.data.listing import list_images
from tlw_basicsr.data.tiles import even_tiles, tile_starts
from tlw_basicsr.tools import prepare as module
from tlw_basicsr.tools.prepare import check_folder, prepare
from tlw_basicsr.util.files import hold_lock


@given(st.integers(1, 500), st.integers(1, 100), st.integers(0, 100))
def test_tiles_do_not_overlap_and_stay_inside(length, crop, threshold):
    starts = tile_starts(length, crop, crop, None)
    assert all(b - a == crop for a, b in pairwise(starts))
    assert length <= crop or starts[-1] + crop <= length
    assert length <= crop or length - (starts[-1] + crop) < crop
    more = tile_starts(length, crop, crop, threshold)
    assert length <= crop or length - (more[-1] + crop) <= threshold


@given(st.integers(1, 300), st.integers(1, 40), st.integers(0, 20), st.sampled_from([1, 4, 8]), st.booleans())
def test_even_tiles_cover_a_side_and_are_as_short_as_the_overlap_allows(length, largest, overlap, multiple, fixed):
    length, largest = length * multiple, largest * multiple
    overlap = min(overlap, largest // 2)
    starts, tile = even_tiles(length, largest, overlap, multiple, largest if fixed else 0)
    assert starts[0] == 0 and starts[-1] + tile == length and tile <= largest
    assert all(value % multiple == 0 for value in (*starts, tile))
    if length <= largest:
        return
    assert tile == largest or not fixed
    needed = min(-(-overlap // multiple), largest // multiple - 1) * multiple
    overlaps = [before + tile - after for before, after in pairwise(starts)]
    assert min(overlaps) >= needed
    assert (len(starts) - 1) * largest - (len(starts) - 2) * needed < length  # one tile less would not do
    assert fixed or sum(overlaps) < (len(starts) - 1) * needed + len(starts) * multiple  # nor would a shorter one


def test_pixels_of_images_of_any_size_are_computed_hardly_more_than_once():
    """At the tiles of tlw infer; 1.53 times with tiles of one size, of which the last is moved back."""
    random = np.random.default_rng(0)
    shares = []
    for sides in random.integers(16, 2400, (200, 2)):
        tiles = [even_tiles(int(side), 512, 32, 1) for side in sides]
        shares.append(np.prod([len(starts) * tile for starts, tile in tiles]) / np.prod(sides))
    assert 1 < np.mean(shares) <= 1.12


def listing(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix not in (".mdb", ".lock")]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def names(folder):
    return {path.name for path in folder.iterdir() if path.name != ".prepare.lock"}


def test_tiles_lr_folders_lmdb_and_meta_info(photographs, tmp_path):
    out = tmp_path / "out"
    made = prepare(photographs, out, crop_size=24, scales=[2, 3], lmdb=True, workers=2)
    tiles = sum((side // 24) * 2 for side in range(48, 72, 4))  # of heights 48 to 68 and width 64
    assert len(list((out / "HR").iterdir())) == tiles
    assert made == {"images": 6, "tiles": tiles, "images_lq": 2 * tiles, "deleted": 0, "left_out": 0}
    folders = {"HR", "LRbicx2", "LRbicx3"}
    assert names(out) == {*folders, *(f"{f}.lmdb" for f in folders), "meta_info.txt", "prepare_data.json"}
    files = photographs / "photo0.png", out / "HR/photo0_s004.png", out / "LRbicx3/photo0_s004.png"
    image, tile, lq = (cv2.imread(str(path)) for path in files)
    assert np.array_equal(tile, image[24:48, 24:48]) and np.array_equal(lq, imresize(tile, 1 / 3))
    assert (out / "meta_info.txt").read_text().splitlines()[0] == "photo0_s001.png (24,24,3)"

    item = build_dataset(lmdb_pairs(out))[3]
    assert item["lq"].shape == (3, 12, 12) and item["gt"].shape == (3, 24, 24)


def lmdb_pairs(out):
    roots = {"dataroot_gt": str(out / "HR.lmdb"), "dataroot_lq": str(out / "LRbicx2.lmdb")}
    options = {"type": "PairedImageDataset", "io_backend": {"type": "lmdb"}, "scale": 2, "phase": "val"}
    return {"name": "pairs", **roots, **options}


def test_a_stopped_run_is_continued(photographs, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    prepare(photographs, whole, crop_size=24, scales=[2])
    written = []

    def stop_after_seven(image, path, params, write=module.write_image):
        if len(written) == 7:
            raise KeyboardInterrupt
        written.append(path)
        write(image, path, params)

    monkeypatch.setattr(module, "write_image", stop_after_seven)
    monkeypatch.setattr(module, "in_parallel", lambda work, paths, *_: [work(p) for p in paths])
    with pytest.raises(KeyboardInterrupt):
        prepare(photographs, stopped, crop_size=24, scales=[2])
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in written}
    prepare(photographs, stopped, crop_size=24, scales=[2])
    assert listing(stopped) == listing(whole)
    assert sum(path.stat().st_mtime_ns == t for path, t in before.items()) >= 4  # only a torn image is cut again


def test_the_program(photographs, tmp_path, script):
    folder = copytree(photographs, tmp_path / "gt")
    copytree(photographs, folder / "more/still_more")
    arguments = ("--gt", folder, "--out", "tiles", "--scales", 4, "--crop-size")
    out = script("prepare_data.py", *arguments, 32)
    assert "HR tiles of 6 images" in out
    assert f"Left out: 6 images in subfolders of {folder}" in out
    out = script("prepare_data.py", *arguments, 33, code=2)
    assert out == "error: --crop-size: 33 is not a multiple of 4, the least common one of the scales\n"
    out = script("prepare_data.py", "--gt", folder / "more", "--out", "none", code=2)
    assert "more has no image, but its subfolders have 6, which are not read; read are .png" in out


def write_photos(folder, **tops):
    folder.mkdir(exist_ok=True)
    for name, top in tops.items():
        cv2.imwrite(str(folder / f"{name}.png"), photograph("coffee", top, 100, 48, 64)[..., ::-1])
    return folder


def test_a_second_run_follows_the_images(tmp_path):
    """Of images added, removed and replaced: as if the folder were made of today's; what stays is not cut again."""
    gt, out = write_photos(tmp_path / "gt", a=0, b=50, c=100, d=150), tmp_path / "out"
    options = {"crop_size": 24, "scales": [2], "lmdb": True}
    prepare(gt, out, **options)
    kept = (out / "HR/a_s001.png").stat().st_mtime_ns
    (gt / "b.png").unlink()
    write_photos(gt, c=200, e=60)
    os.utime(gt / "d.png")  # touched only
    made = prepare(gt, out, **options)
    assert made == {"images": 4, "tiles": 16, "images_lq": 16, "deleted": 2, "left_out": 0}
    prepare(gt, tmp_path / "fresh", **options)
    assert listing(out) == listing(tmp_path / "fresh")
    assert (out / "HR/a_s001.png").stat().st_mtime_ns == kept
    for folder in ("HR", "LRbicx2"):
        entries = list_images({"d": str(out / f"{folder}.lmdb"), "io_backend": {"type": "lmdb"}}, "d")
        assert {entry.path for entry in entries} == {path.stem for path in (out / folder).iterdir()}
    assert prepare(gt, out, **options)["deleted"] == 0
    (out / "own.lmdb").mkdir()  # only what this program makes is deleted
    record = json.loads((out / "prepare_data.json").read_text())
    for entry in record["images"].values():  # as before version 0.2
        entry["mark"] = [1, 2, entry.pop("sha256")]
    (out / "prepare_data.json").write_text(json.dumps(record))
    assert prepare(gt, out, **options)["deleted"] == 0 and (out / "own.lmdb").exists()


def test_an_image_of_the_same_size_and_time_is_known_by_its_content(tmp_path):
    gt, out = tmp_path / "gt", tmp_path / "out"
    gt.mkdir()
    for level in (10, 200):
        Image.new("L", (16, 16), level).save(gt / "a.bmp")
        os.utime(gt / "a.bmp", (1, 1))
        made = prepare(gt, out)
        assert cv2.imread(str(out / "HR/a.png")).max() == level
    assert made["deleted"] == 1


def test_a_folder_is_locked_by_every_name(tmp_path):
    """Beside a mounted folder nothing may be written, and a link is another name of the same folder."""
    gt, out = write_photos(tmp_path / "gt", a=0), tmp_path / "mounted/out"
    prepare(gt, out)
    (tmp_path / "link").symlink_to(out)
    assert names(out.parent) == {"out"}
    lock = next(out.glob(".*.lock"))
    with hold_lock(lock, "it", pytest.fail), pytest.raises(UserError, match=r"--out: .*link is in use by process"):
        prepare(gt, tmp_path / "link")


def test_a_folder_of_other_images_is_refused_and_a_moved_one_is_not(tmp_path):
    gt, out = write_photos(tmp_path / "gt", a=0, b=50), tmp_path / "out"
    prepare(gt, out)
    other = write_photos(tmp_path / "other", a=0, c=100)
    before = listing(out)
    refused(f"made from other images, those of {gt}; choose another folder", prepare, other, out)
    refused("made with other settings", prepare, gt, out, crop_size=32)
    assert listing(out) == before
    gt.rename(tmp_path / "moved")
    assert prepare(tmp_path / "moved", out)["deleted"] == 0
    (out / "HR/z.png").write_bytes((out / "HR/a.png").read_bytes())
    refused(r"z\.png is not in the record of earlier runs", prepare, tmp_path / "moved", out)
    (out / "prepare_data.json").unlink()
    refused(r"a\.png is not in the record of earlier runs", prepare, tmp_path / "moved", out)


def test_names_that_basicsr_can_read(tmp_path):
    """Spaces and dots end BasicSR's names, and two images of one stem would be one tile. LMDBs' keys are ASCII."""
    gt = write_photos(tmp_path / "gt", **{"my photo.1": 0, "my photo.2": 50, "b": 100, "café": 0, "caf_xe9": 60})
    cv2.imwrite(str(gt / "b.bmp"), photograph("coffee", 200, 0, 48, 48))
    prepare(gt, tmp_path / "out", scales=[2], lmdb=True)
    expected = {"my_photo_1", "my_photo_2", "b_png", "b_bmp", "café", "caf_xe9"}
    assert {path.stem for path in (tmp_path / "out/HR").iterdir()} == expected
    lines = (tmp_path / "out/meta_info.txt").read_text("utf-8").splitlines()
    assert {line.split(" ")[0] for line in lines} == {f"{name}.png" for name in expected}
    pairs = build_dataset(lmdb_pairs(tmp_path / "out"))
    keys = [pair["gt_path"] for pair in pairs.paths]
    assert len(set(keys)) == 6 and expected - {"café", "caf_xe9"} < set(keys) and all(key.isascii() for key in keys)
    assert [item["gt"].shape[1] for item in pairs] == [48] * 6


def test_every_image_is_read_by_a_check(tmp_path, script):
    folder = write_photos(tmp_path / "gt", a=0, b=50, c=100, e=100)
    whole = (folder / "b.png").read_bytes()
    (folder / "b.png").write_bytes(whole[: len(whole) // 2])
    jpeg = cv2.imencode(".jpg", photograph("coffee", 0, 0, 200, 200))[1].tobytes()
    (folder / "cut.jpg").write_bytes(jpeg[: len(jpeg) // 2])  # OpenCV makes a grey half of it
    (folder / "empty.png").touch()
    (folder / "Thumbs.db").write_bytes(b"x")
    broken = ["b.png", "cut.jpg", "empty.png"]
    images, faults = check_folder(folder, 2)
    assert images == 6 and [fault.split(": ")[0].rsplit("/")[-1] for fault in faults] == broken
    out = script("prepare_data.py", "--check", folder, "--workers", 1, code=1)
    assert "6 images, 3 can't be read" in out
    assert sum(f"{folder}/" in line for line in out.splitlines()) == 3
    for name in broken:
        (folder / name).unlink()
    prepare(folder, tmp_path / "out", lmdb=True)
    assert check_folder(tmp_path / "out/HR.lmdb") == (3, [])
    line = script("prepare_data.py", "--gt", folder, code=2)
    assert line == "error: --out: missing; needed are --gt and --out, or --check\n"


def write_record(out, changes):
    """A record of an earlier run that is malformed."""
    entry = {"sha256": "x", "tiles": ["a.png"], **changes.pop("entry", {})}
    content = {"settings": {}, "gt": "x", "images": {"a.png": entry}, **changes}
    (out / "prepare_data.json").write_text(json.dumps(content))


RECORDS = [{"images": []}, {"settings": None}, {"gt": 5}, {"images": {"a.png": "x"}}]
ENTRIES = [{"sha256": 5}, {"tiles": "a.png"}, {"tiles": [5]}, {"tiles": ["../../a.png"]}]  # which would be deleted
NO_RECORD = "does not say from which images the tiles are made"
UNREADABLE = "prepare_data.json can't be read"
IN_THE_WAY = [
    *((partial(write_record, changes=changes), {}, NO_RECORD) for changes in RECORDS),
    *((partial(write_record, changes={"entry": entry}), {}, NO_RECORD) for entry in ENTRIES),
    (lambda out: (out / "prepare_data.json").write_text("5"), {}, NO_RECORD),
    (lambda out: (out / "prepare_data.json").write_text('{"crop_size": 2'), {}, UNREADABLE),
    (lambda out: (out / "prepare_data.json").write_text("[" * 10**5), {}, UNREADABLE),
    (lambda out: (out / "prepare_data.json").mkdir(), {}, UNREADABLE),
    (lambda out: (out / "HR").write_text("x"), {}, "HR is not a folder"),
    (lambda out: (out / "LRbicx2").write_text("x"), {"scales": [2]}, "LRbicx2 is not a folder"),
    (lambda out: (out / "meta_info.txt").mkdir(), {}, "meta_info.txt is a folder"),
    (lambda out: None, {"scales": [40]}, "photo0.png, 48×64 pixels, have a side of 40 as a multiple of 40; needed"),
    (lambda out: None, {"multiple": 50}, "have a side of 0 as a multiple of 50"),
]


def test_what_is_in_the_way_is_one_line_before_anything_is_made(photographs, tmp_path):
    for number, (put_there, options, message) in enumerate(IN_THE_WAY):
        out = tmp_path / str(number)
        out.mkdir()
        put_there(out)
        before = names(out)
        refused(message, prepare, photographs, out, **options)
        assert names(out) == before


def test_a_full_disk_leaves_no_part_of_an_lmdb(photographs, tmp_path, monkeypatch):
    full = Mock(side_effect=lmdb.DiskError("mdb_txn_commit: No space left on device"))
    monkeypatch.setattr(module.lmdb, "open", full)
    with pytest.raises(UserError, match=r"HR\.lmdb can't be written \(DiskError: mdb_txn_commit: No space"):
        prepare(photographs, tmp_path / "out", lmdb=True)
    assert names(tmp_path / "out") == {"HR", "meta_info.txt", "prepare_data.json"}
    with pytest.raises(UserError, match="can't be written"):  # so is a name that is too long
        write_image(np.zeros((4, 4, 3), np.uint8), tmp_path / f"{'x' * 300}.png")


def test_workers_are_bounded_and_a_killed_one_is_one_line(tmp_path, monkeypatch):
    started = []
    pool = module.ProcessPoolExecutor
    monkeypatch.setattr(module, "ProcessPoolExecutor", lambda workers, **_: started.append(workers) or pool(2))
    refused("--workers: a process was killed", module.in_parallel, end_of_the_process, [tmp_path], 100_000, "x")
    assert started == [4 * os.cpu_count()]


def end_of_the_process(_):
    os.kill(os.getpid(), signal.SIGKILL)
