import pickle

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataset
from basicsr.utils.matlab_functions import imresize as basicsr_imresize
from torch.utils.data import DataLoader

from tests.helpers import refused
from tlw_basicsr import UserError, imresize
from tlw_basicsr.data.bicubic_sr_dataset import lq_of_crop
from tlw_basicsr.tools.prepare import prepare


def options(folder, phase="train", **more):
    opt = {"name": "set", "type": "BicubicSRDataset", "dataroot_gt": str(folder), "io_backend": {"type": "disk"}}
    return {**opt, "scale": 2, "phase": phase, **more}


@pytest.mark.parametrize("scale", [2, 3, 4])
@pytest.mark.parametrize("quantize", [True, False])
def test_lq_of_a_crop_is_the_crop_of_the_whole_lq(scale, quantize):
    gt = np.random.randint(0, 256, (scale * 20, scale * 24, 3), np.uint8)
    whole = imresize(gt, 1 / scale) / 255 if quantize else basicsr_imresize(gt.astype(np.float32) / 255, 1 / scale)
    for top, left, h, w in [(0, 0, 20, 24), (0, 0, 5, 5), (15, 19, 5, 5), (7, 9, 6, 8), (1, 3, 4, 4)]:
        ours = lq_of_crop(gt, top, left, h, w, scale, quantize)
        np.testing.assert_allclose(ours, whole[top : top + h, left : left + w], atol=1e-6)


def test_validation_pairs_are_the_whole_images(photographs):
    dataset = build_dataset(options(photographs, "val"))
    assert len(dataset) == 6
    for item in dataset:
        image = cv2.imread(item["gt_path"])[..., ::-1]
        gt = (item["gt"] * 255).round().permute(1, 2, 0).numpy().astype(np.uint8)
        assert np.array_equal(gt, image[: gt.shape[0], : gt.shape[1]])
        expected = imresize(gt, 1 / 2) / 255
        np.testing.assert_allclose(item["lq"].permute(1, 2, 0).numpy(), expected, atol=1e-6)
        assert item["lq_path"] == item["gt_path"]


def test_the_papers_protocol_crops_to_28_and_does_not_quantize(photographs):
    item = build_dataset(options(photographs, "val", mod_crop=28, quantize_lq=False))[0]
    assert item["gt"].shape == (3, 28, 56)
    levels = item["lq"] * 255
    assert (levels - levels.round()).abs().max() > 0.1


def test_training_crops_are_random_aligned_and_of_the_size(photographs):
    dataset = build_dataset(options(photographs, gt_size=16, use_hflip=True, use_rot=True))
    items = [dataset[0] for _ in range(8)]
    assert all(i["gt"].shape == (3, 16, 16) and i["lq"].shape == (3, 8, 8) for i in items)
    assert any(not torch.equal(items[0]["gt"], i["gt"]) for i in items[1:])
    for item in items:  # lq belongs to gt: away from the borders it is gt's own bicubic
        lq = basicsr_imresize(item["gt"].permute(1, 2, 0).numpy(), 1 / 2)
        np.testing.assert_allclose(item["lq"].permute(1, 2, 0).numpy()[2:-2, 2:-2], lq[2:-2, 2:-2], atol=1.5 / 255)


def test_without_gt_size_the_image_is_one_tile_and_turns_only_when_asked(photographs):
    still = build_dataset(options(photographs, gt_size=None))
    assert still[1]["gt"].shape == (3, 52, 64)
    moving = build_dataset(options(photographs, gt_size=None, use_hflip=True, use_rot=True))
    for dataset, kinds in ((still, 1), (moving, 8)):
        assert len({dataset[2]["gt"].numpy().tobytes() for _ in range(100)}) == kinds


def test_lmdb_and_meta_info_give_the_same_pairs(photographs, tmp_path):
    prepare(photographs, tmp_path / "out", lmdb=True, multiple=2)
    from_disk = build_dataset(options(photographs, "val"))
    from_lmdb = build_dataset(options(tmp_path / "out/HR.lmdb", "val", io_backend={"type": "lmdb"}))
    meta = tmp_path / "some.txt"
    meta.write_text("photo3.png (60,64,3)\nphoto1.png\n")
    some = build_dataset(options(photographs, "val", meta_info_file=str(meta)))
    assert [i["gt_path"][-10:] for i in some] == ["photo3.png", "photo1.png"]
    for one, other in zip(from_disk, from_lmdb, strict=True):
        assert torch.equal(one["gt"], other["gt"]) and torch.equal(one["lq"], other["lq"])
    loader = DataLoader(from_lmdb, num_workers=2)
    assert len(list(loader)) == 6
    pickle.dumps(build_dataset(options(photographs, "val")))


WRONG = [
    ({"gt_size": 15}, "gt_size: 15 is not a multiple of the scale 2"),
    ({"gt_size": 64}, "photo0.png is 48×64 pixels"),
    ({"phase": "val", "mod_crop": 7}, "mod_crop: 7 is not a multiple"),
    ({"dataroot_gt": "nowhere"}, "dataroot_gt: nowhere is not a folder"),
    ({"meta_info_file": "nowhere.txt"}, "meta_info_file: nowhere.txt does not exist"),
    ({"io_backend": {"type": "lmdb"}}, "is not an LMDB"),
    ({"dataroot_gt": "~no-such-user/x"}, "dataroot_gt: ~no-such-user/x: there is no such home folder"),
    ({"meta_info_file": "/dev/zero"}, "meta_info_file: /dev/zero is not a regular file"),
    ({"dataroot_gt": "{empty}"}, "has no image"),
    ({"dataroot_gt": "{text}"}, r"text\.png is not an image"),
]


def test_wrong_options_are_reported_in_one_line(photographs, tmp_path):
    for folder in ("empty", "text"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text/text.png").write_text("no image")
    for change, message in WRONG:
        opt = options(photographs, **{"gt_size": 16, **change})
        opt["dataroot_gt"] = opt["dataroot_gt"].format(empty=tmp_path / "empty", text=tmp_path / "text")
        refused(message, build_dataset, opt)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_is_named_even_by_a_worker(tmp_path, photographs, workers):
    content = (photographs / "photo0.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    dataset = build_dataset(options(tmp_path, "val"))
    with pytest.raises(UserError) as error:
        list(DataLoader(dataset, num_workers=workers))
    assert str(error.value) == f"{tmp_path / 'cut.png'}: not an image that can be read"
