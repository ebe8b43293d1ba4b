"""Which images there are, which belong together, and what they are called."""

import time
from pathlib import Path

import pytest
from basicsr.data import build_dataset, data_util
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import refused, single, write, write_lmdb
from tlw_basicsr import UserError
from tlw_basicsr.commands.infer import find_images
from tlw_basicsr.data.listing import count_below, list_images, name_images, pair_names, read_names
from tlw_basicsr.data.resumable import CheckedDataset
from tlw_basicsr.engine.preflight import check_images


def paired(gt, lq, **options):
    return {
        "name": "pairs", "type": "PairedImageDataset", "dataroot_gt": str(gt), "dataroot_lq": str(lq), "phase": "val",
        "scale": 2, "io_backend": {"type": "disk"}, **options,
    }  # fmt: skip


def test_junk_in_folders_is_no_image_for_any_data_set(tmp_path):
    for name in ("a.png", "b.PNG"):
        write(tmp_path / "gt" / name)
        write(tmp_path / "lq" / name, 16)
    for number, name in enumerate(["Thumbs.db", "desktop.ini", ".DS_Store", "._a.png", "README.txt"]):
        (tmp_path / ("gt", "lq")[number % 2] / name).write_bytes(b"junk")
    opt = paired(tmp_path / "gt", tmp_path / "lq")
    check_images(opt, "datasets.val", {})
    assert len(build_dataset(opt)) == 2
    dataset = build_dataset(single(tmp_path / "gt", phase="val"))
    assert [dataset[i]["lq"].shape for i in range(len(dataset))] == [(3, 32, 32)] * 2
    (tmp_path / "other").mkdir()
    (tmp_path / "other/a.npy").touch()  # files of another kind alone are left to the data set
    assert list(data_util.scandir(str(tmp_path / "other"))) == ["a.npy"]
    (tmp_path / "gt/.hidden.png").write_bytes(b"junk")
    (tmp_path / "lq/.DS_Store").write_bytes(b"junk")
    below = sorted(data_util.scandir(str(tmp_path), recursive=True))
    assert below == ["gt/a.png", "gt/b.PNG", "lq/a.png", "lq/b.PNG"] and count_below(tmp_path / "gt") == 0
    assert [path.name for path in find_images(str(tmp_path / "gt"))] == ["a.png", "b.PNG"]


def test_pairs_of_other_suffixes_and_case(tmp_path):
    """Those of the same suffix first; else the only one of the stem."""
    expected = {"a.png": "a.png", "a.jpg": "a.jpg", "b.png": "b.jpg", "C.png": "c.PNG", "d.e.png": "d.e.bmp"}
    for gt, lq in expected.items():
        write(tmp_path / "gt" / gt)
        write(tmp_path / "lq" / lq, 16)
    opt = paired(tmp_path / "gt", tmp_path / "lq")
    check_images(opt, "datasets.val", {})
    dataset = build_dataset(opt)
    assert {Path(pair["gt_path"]).name: Path(pair["lq_path"]).name for pair in dataset.paths} == expected
    assert dataset[0]["lq"].shape == (3, 16, 16)


def test_pairs_that_are_not_sure_are_refused():
    for gt, lq, message in (
        (["a.png", "b.png"], ["a.png"], "no LR image for b.png; expected is the name b or bx2"),
        (["a.png"], ["a.jpg", "a.bmp"], "a.png has several LR images, a.jpg and a.bmp"),
        (["a.png", "a.jpg"], ["a.bmp"], "a.bmp is the LR image of both a.png and a.jpg"),
        (["a.png", "a.jpg"], ["a.jpg"], "a.jpg is the LR image of both a.png and a.jpg"),
    ):
        refused(f"x: {message}", pair_names, gt, lq, ["{}", "{}x2"], "x")
    pairs = pair_names(["a.png", "b.png"], ["ax2.jpg", "a.txt.png", "b.png", "bx2.png"], ["{}x2"], "x")
    assert pairs == {"a.png": "ax2.jpg", "b.png": "bx2.png"}  # the template counts before the suffix


def test_dotted_keys_of_an_lmdb(tmp_path):
    keys = [f"DSC.{number}" for number in range(4)]
    gt, lq = write_lmdb(tmp_path / "gt.lmdb", keys), write_lmdb(tmp_path / "lq.lmdb", keys, 16)
    opt = paired(gt, lq, io_backend={"type": "lmdb"})
    check_images(opt, "datasets.val", {})
    dataset = build_dataset(opt)
    assert [pair["gt_path"] for pair in dataset.paths] == keys and dataset[3]["gt"].shape == (3, 32, 32)
    del dataset  # an LMDB is open once in a process
    write_lmdb(tmp_path / "other.lmdb", [*keys[:3], "x"], 16)
    with pytest.raises(UserError, match=r"no LR image of the key DSC\.3"):
        check_images(paired(gt, tmp_path / "other.lmdb", io_backend={"type": "lmdb"}), "datasets.val", {})


def test_names_in_lists(tmp_path):
    file = tmp_path / "meta_info.txt"
    lines = ["my photo.png (32,32,3)", "a.png (32, 32, 3) 1", "b.PNG 0.7 x", "c.png", "d.png\t32", "", "e.jpg, f.jpg"]
    lines += ["key 3", "x (1).png (32,32,3)", "y (1, a.png"]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    names = ["my photo.png", "a.png", "b.PNG", "c.png", "d.png", "e.jpg", "key", "x (1).png", "y (1, a.png"]
    assert read_names(file, "x") == names
    for name in ("my photo.png", "a.png", "unlisted.png"):
        write(tmp_path / "gt" / name)
        write(tmp_path / "lq" / name, 16)
    file.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines[:2]).encode())
    opt = paired(tmp_path / "gt", tmp_path / "lq", meta_info_file=str(file))
    check_images(opt, "datasets.val", {})
    dataset = build_dataset(opt)
    assert len(dataset) == len(list_images(opt)) == 2
    assert dataset[0]["gt_path"].endswith("my photo.png") and dataset[0]["lq"].shape == (3, 16, 16)


def test_a_list_of_strangers_takes_no_more_than_its_length(tmp_path):
    file = tmp_path / "names.txt"
    file.write_text("\n".join(["a" + " " * 50_000 + "b", "a" * 50_000, "(1," * 20_000, "(" + "1" * 50_000]))
    start = time.process_time()
    assert len(read_names(file, "x")) == 4
    assert time.process_time() - start < 1


def test_names():
    for paths, names in (
        ("d/a.png d/b.png", "a b"),
        ("d/a.png d/a.jpg d/b.png", "a_png a_jpg b"),
        ("x/a.png y/a.png", "x_a y_a"),
        ("000/x 001/x", "000_x 001_x"),
        ("DSC.0 DSC.1", "DSC.0 DSC.1"),
        ("a.png a.png", "a a"),
    ):
        assert name_images(paths.split()) == names.split()


part = st.text("aA._1", min_size=1, max_size=3).filter(lambda text: set(text) != {"."})


@given(st.lists(st.lists(part, min_size=1, max_size=3).map("/".join), unique=True, max_size=8))
def test_names_are_different_for_different_images(paths):
    names = name_images([f"{path}{'.png' if number % 2 else ''}" for number, path in enumerate(paths)])
    assert len({name.casefold() for name in names}) == len(paths)
    assert not any("/" in name or not name for name in names)


def test_a_data_set_that_reads_its_list_itself(tmp_path):
    """SingleImageDataset takes a name up to its first space, and a byte order mark for a part of it."""
    for name in ("my photo.png", "b.png"):
        write(tmp_path / "lq" / name)
    file = tmp_path / "names.txt"
    file.write_bytes("\ufeffmy photo.png (32,32,3)\n\nb.png (32,32,3) 1\n".encode())
    opt = single(tmp_path / "lq", meta_info_file=str(file), phase="val")
    dataset = CheckedDataset(opt, "datasets.val")
    assert [Path(dataset[i]["lq_path"]).name for i in range(len(dataset))] == ["my photo.png", "b.png"]
