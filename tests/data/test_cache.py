"""Images of a cache are those of today's files, bit for bit, whatever happens to either."""

import errno
import multiprocessing
import os
import random
import shutil
import signal
from collections import namedtuple
from contextlib import contextmanager
from itertools import product

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.utils.registry import DATASET_REGISTRY
from PIL import Image
from torch.utils.data import DataLoader

from tests.conftest import photograph, plain_options
from tests.helpers import log_text, refused
from tlw_basicsr import BicubicSRDataset, UserError
from tlw_basicsr.data import cache as module
from tlw_basicsr.data.cache import use_cache
from tlw_basicsr.tools.prepare import prepare

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """HR and LR folders and LMDBs of images of several kinds, and the folder of those."""
    gt, out = tmp_path_factory.mktemp("gt"), tmp_path_factory.mktemp("out")
    rgb = photograph("coffee", 100, 150, 48, 64)
    cv2.imwrite(str(gt / "deep.png"), rgb.astype(np.uint16) * 257)
    Image.fromarray(rgb[..., 0]).save(gt / "grey.png")
    Image.fromarray(np.dstack([rgb, rgb[..., :1]])).save(gt / "alpha.png")
    exif = Image.Exif()
    exif[0x112] = 6
    Image.fromarray(rgb[::-1]).save(gt / "turned.jpg", exif=exif)
    Image.fromarray(rgb[:40]).save(gt / "twice.bmp")
    Image.fromarray(rgb[:40]).save(gt / "twice_more.bmp")
    prepare(gt, out, scales=[2], lmdb=True)
    return gt, out


def options(gt, cache=None, **more):
    opt = {"name": "set", "type": "BicubicSRDataset", "dataroot_gt": str(gt), "io_backend": {"type": "disk"}}
    opt |= {"scale": 2, "phase": "train", "gt_size": 16, "use_hflip": True, "use_rot": True, **more}
    return opt if cache is None else {**opt, "cache": str(cache)}


def pairs(out, suffix="", cache=None, **more):
    more = {"type": "PairedImageDataset", "dataroot_lq": str(out / f"LRbicx2{suffix}"), **more}
    return options(out / f"HR{suffix}", cache, io_backend={"type": "lmdb" if suffix else "disk"}, **more)


def cached(opt):
    dataset = build_dataset(opt)
    use_cache(dataset, opt, "datasets.train")
    return dataset


def items(dataset, times=3):
    """Every image several times, by the same random numbers."""
    random.seed(1)
    return [dataset[index] for index in range(len(dataset)) for _ in range(times)]


def files(folder):
    return {path.name for path in folder.iterdir()} - {".lock"}


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a["gt"], b["gt"]) and torch.equal(a["lq"], b["lq"])
        assert (a["gt_path"], a["lq_path"]) == (b["gt_path"], b["lq_path"])


def test_samples_are_bit_for_bit_those_without_a_cache(prepared, tmp_path):
    gt, out = prepared
    bicubic = product([(gt, "disk"), (out / "HR.lmdb", "lmdb")], [True, False], [16, None])
    cases = [options(root, io_backend={"type": kind}, quantize_lq=q, gt_size=size) for (root, kind), q, size in bicubic]
    cases += [pairs(out), pairs(out, ".lmdb"), pairs(out, color="y", mean=[0.5], std=[0.5], use_rot=False)]
    for opt in cases:
        with_cache = cached({**opt, "io_backend": dict(opt["io_backend"]), "cache": str(tmp_path / "cache")})
        assert_same(items(with_cache), items(build_dataset(opt)))
    # 5 images of gt, of which two are the same; those of HR and LR, of the LMDBs too
    assert len(files(tmp_path / "cache")) == 5 + 2 * 5
    again = cached(pairs(out, ".lmdb", tmp_path / "cache"))
    random.seed(1)
    first = [next(iter(DataLoader(again, num_workers=1))) for _ in range(2)]
    assert first[0]["gt"].shape == (1, 3, 16, 16)


def write_levels(folder, level, count=3):
    folder.mkdir(exist_ok=True)
    for number in range(count):
        image = Image.new("RGB", (24, 24), (0, 0, number))
        image.paste((level, level, number), (4, 12, 20, 13))
        image.save(folder / f"{number}.bmp")
        os.utime(folder / f"{number}.bmp", (1, 1))
    return folder


def read_level(opt):
    return [round(float(item["gt"][0].max() * 255)) for item in items(cached(opt), 1)]


def test_a_replaced_image_is_not_read_stale(tmp_path, monkeypatch):
    """Of the same size and time; and the images before are found again."""
    gt = tmp_path / "gt"
    for level in (10, 200, 10):
        opt = options(write_levels(gt, level), tmp_path / "cache")
        assert read_level(opt) == [level] * 3
    assert len(files(tmp_path / "cache")) == 6
    monkeypatch.setattr(cv2, "__version__", "another, which may decode other levels")
    assert read_level(opt) == [10] * 3 and len(files(tmp_path / "cache")) == 9


def test_an_image_that_changes_while_the_cache_is_filled_gets_its_own_name(tmp_path, monkeypatch):
    opt = options(write_levels(tmp_path / "gt", 10), tmp_path / "cache")

    def count_and_replace(*arguments, count=module._count):
        write_levels(tmp_path / "gt", 90)
        return count(*arguments)

    monkeypatch.setattr(module, "_count", count_and_replace)
    assert read_level(opt) == [90] * 3
    monkeypatch.undo()
    write_levels(tmp_path / "gt", 10)
    assert read_level(opt) == [10] * 3


def test_damaged_files_are_made_again(tmp_path):
    opt = options(write_levels(tmp_path / "gt", 10), tmp_path / "cache")
    read_level(opt)
    for change in (
        lambda content: content[:-1],
        lambda content: content + b"x",
        lambda _: b"",
        lambda content: content[:20],
        lambda content: b"x" + content,
    ):
        for name in files(tmp_path / "cache"):
            path = tmp_path / "cache" / name
            path.write_bytes(change(path.read_bytes()))
        assert read_level(opt) == [10] * 3


def in_processes(count, work, *arguments):
    """Exit codes of some processes that do the same; negative ones are signals."""
    processes = [FORK.Process(target=work, args=(number, *arguments)) for number in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def fill_and_die(_, opt, folder):
    def decode(*arguments, decode=module.decode_levels):
        with module.whole_file(folder / "half.npy") as file:
            file.write(b"half")
            file.flush()
            if len(files(folder)) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        (folder / "half.npy").unlink(missing_ok=True)
        return decode(*arguments)

    module.decode_levels, os.cpu_count = decode, lambda: 1
    cached(opt)


def test_a_killed_run_leaves_what_the_next_one_takes(tmp_path):
    opt = options(write_levels(tmp_path / "gt", 10, 6), tmp_path / "cache")
    assert in_processes(1, fill_and_die, opt, tmp_path / "cache") == [-signal.SIGKILL]
    left = files(tmp_path / "cache")
    assert any(name.endswith(".tmp") for name in left)
    kept = {name for name in left if name.endswith(".npy")}
    times = {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in kept}
    assert read_level(opt) == [10] * 6 and 0 < len(kept) < 6
    assert len(files(tmp_path / "cache")) == 6 and not any(n.endswith(".tmp") for n in files(tmp_path / "cache"))
    assert times == {name: (tmp_path / "cache" / name).stat().st_mtime_ns for name in kept}


def fill_and_count(_, opt, log):
    def decode(*arguments, decode=module.decode_levels):
        with open(log, "a") as file:
            file.write("x")
        return decode(*arguments)

    module.decode_levels = decode
    os._exit(read_level(opt) != [10] * 20)


def test_runs_that_fill_a_cache_together_decode_each_image_once(tmp_path):
    opt = options(write_levels(tmp_path / "gt", 10, 20), tmp_path / "cache")
    assert in_processes(3, fill_and_count, opt, tmp_path / "log") == [0, 0, 0]
    assert (tmp_path / "log").read_text() == 20 * "x"
    assert len(files(tmp_path / "cache")) == 20


def test_a_disk_without_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    opt = options(write_levels(tmp_path / "gt", 10), tmp_path / "cache")
    usage = namedtuple("usage", "total used free")
    need = 3 * (24 * 24 * 3 + 2**12)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need - 1))
    refused(r"^datasets.train.cache: .* needs 0 MB more, and its disk has 0 MB free", cached, opt)
    assert not files(tmp_path / "cache")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, need))
    assert read_level(opt) == [10] * 3


def test_what_was_added_goes_again_when_the_disk_fills_up(tmp_path, monkeypatch):
    old = read_level(options(write_levels(tmp_path / "old", 50), tmp_path / "cache"))
    before = files(tmp_path / "cache")
    written = []

    @contextmanager
    def fill_up(path, whole_file=module.whole_file):
        with whole_file(path) as file:
            yield file
            if len(written) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")
            written.append(path)

    monkeypatch.setattr(module, "whole_file", fill_up)
    opt = options(write_levels(tmp_path / "gt", 10, 6), tmp_path / "cache")
    refused(r"can't be written .No space left on device", cached, opt)
    assert files(tmp_path / "cache") == before and len(written) == 2
    assert read_level(options(tmp_path / "old", tmp_path / "cache")) == old


def test_an_image_that_cant_be_read_is_named_and_the_others_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    gt = write_levels(tmp_path / "gt", 10)
    content = cv2.imencode(".png", photograph())[1].tobytes()
    (gt / "3.png").write_bytes(content[: len(content) // 2])
    refused(r"3\.png: not an image that can be read$", cached, options(gt, tmp_path / "cache"))
    assert len(files(tmp_path / "cache")) == 3


def test_what_cant_have_a_cache_is_reported_in_one_line(photographs, prepared, tmp_path, train):
    (tmp_path / "file").touch()
    lq_alone = {"type": "SingleImageDataset", "dataroot_lq": str(photographs)}
    for change, message in (
        ({"cache": str(tmp_path / "file")}, "datasets.train.cache: .*file can't be used .File exists"),
        ({"cache": "~no-such-user/x"}, "datasets.train.cache: ~no-such-user/x: there is no such home folder"),
        ({"cache": 5}, "datasets.train.cache: expected text"),
        (
            {"cache": str(tmp_path / "c"), **lq_alone},
            "datasets.train.cache: SingleImageDataset does not read from a cache",
        ),
    ):
        opt = plain_options(photographs, **{f"datasets__train__{key}": value for key, value in change.items()})
        if "type" in change:
            refused(message, cached, {**opt["datasets"]["train"], "phase": "train", "scale": 2})
        else:
            refused(message, train, opt)
    assert not (tmp_path / "experiments").exists()


def test_a_data_set_that_takes_no_pixels_is_found_before_the_training(photographs, tmp_path, train, monkeypatch):
    """As a fork's may that decodes by itself; a plugin's reads its files, and the log says so."""
    plain = BicubicSRDataset.__getitem__

    def decode(self, index):
        assert not isinstance(self.file_client, module.CacheClient), "expected bytes"
        return plain(self, index)

    monkeypatch.setattr(BicubicSRDataset, "__getitem__", decode)
    opt = plain_options(photographs, train__total_iter=1, val=..., datasets__train__cache=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"datasets.train: .*can't be read \(AssertionError: expected bytes\)"):
        train(opt)
    assert not (tmp_path / "experiments").exists()
    own = type("OwnDataset", (BicubicSRDataset,), {"__module__": "theirs"})
    monkeypatch.setitem(DATASET_REGISTRY._obj_map, "OwnDataset", own)
    opt["datasets"]["train"]["type"] = "OwnDataset"
    assert "datasets.train.cache: nothing in OwnDataset reads this option" in log_text(train(opt))


def test_a_training_from_a_cache_is_that_from_files(photographs, tmp_path, train):
    logs, networks = [], []
    for name, changes in ("files", {}), ("cache", {"datasets__train__cache": "../pixels"}):
        opt = plain_options(photographs, train__total_iter=3, datasets__train__num_worker_per_gpu=1, val=..., **changes)
        folder = train(opt, root=tmp_path / name)
        logs.append(next(folder.glob("*.log")).read_text())
        networks.append(torch.load(folder / "models/net_g_latest.pth", weights_only=True)["params"])
    assert all(torch.equal(value, networks[1][key]) for key, value in networks[0].items())
    assert "Cache ../pixels: 6 images, 0 MB of pixels; 6 were decoded, in " in logs[1] and "Cache" not in logs[0]
