"""What a validation needs is told before training; what fails in it loses nothing; every image has a file of its own."""

import cv2
import pytest
import torch
from basicsr.archs import build_network
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from torch import nn

from tests.conftest import photograph, plain_options, tiny_options, write_yaml
from tests.helpers import log_text, refused, same, single, write, write_lmdb, write_pairs
from tlw_basicsr import TLW
from tlw_basicsr.engine.pipeline import test_pipeline as run_test
from tlw_basicsr.util.files import load_file

SSIM = {"type": "calculate_ssim", "crop_border": 4, "test_y_channel": True}


@pytest.fixture
def lq(tmp_path):
    """A folder of two LR images without HR images."""
    for name in ("a.png", "b.png"):
        write(tmp_path / "lq" / name, 24)
    return tmp_path / "lq"


def test_the_best_networks_need_hr_images_in_the_first_set(photographs, train, lq):
    opt = plain_options(photographs, val__save_best="psnr")
    opt["datasets"] = {"train": opt["datasets"]["train"], "val": single(lq), "val_2": opt["datasets"]["val"]}
    refused(r"datasets.val has none; .* or take a data set of pairs as the first", train, opt)
    del opt["val"]["save_best"]
    assert "# psnr: " in log_text(train(opt))


@pytest.mark.parametrize("model", [plain_options, tiny_options])
def test_images_without_hr_are_saved_and_not_measured(photographs, train, lq, model):
    opt = model(photographs, datasets__val=single(lq), val__metrics=..., val__save_img=True)
    folder = train(opt)
    assert sorted(p.name for p in folder.glob("visualization/*/*")) == ["a_4.png", "a_8.png", "b_4.png", "b_8.png"]


def test_a_second_set_without_hr_images_has_no_metrics(photographs, train, lq):
    """BasicSR takes the last training batch's HR image for it."""
    folder = train(plain_options(photographs, datasets__val_2=single(lq), val__save_img=True))
    log = log_text(folder)
    assert "Validation of params_ema, a young average: " in log
    assert "Validation photos_val" in log and "Validation alone" not in log and "fails" not in log
    assert (folder / "visualization/a/a_8.png").is_file()


SWIN = {
    "type": "SwinIR", "upscale": 2, "img_size": 8, "window_size": 8, "depths": [1], "embed_dim": 6, "num_heads": [1],
    "mlp_ratio": 1, "upsampler": "pixelshuffledirect", "img_range": 1.0,
}  # fmt: skip
VGG_OF_Y = {"type": "SRVGGNetCompact", "num_in_ch": 1, "num_out_ch": 1, "num_feat": 4, "num_conv": 1, "upscale": 2}
# the message, the changes; folders hold images of different sizes
LACKS = {
    "val.metrics.psnr: calculate_psnr compares with HR images, and datasets.val has none": (
        lambda folder: {"datasets__val": single(folder / "lq")}
    ),
    # an image smaller than the border
    r"val.metrics.s: calculate_ssim fails in the validation on photos_val .*gt \(1, 3, 48, 64\)": (
        lambda folder: {"val__metrics": {"s": {**SSIM, "crop_border": 30}}}
    ),
    # 18×200 with a border of 4 leaves 10 pixels of 11: BasicSR's mean of the set would be NaN
    "val.metrics.ssim: calculate_ssim gives no number for an image of 18×200 pixels": (
        lambda folder: {"datasets__val__dataroot_gt": str(folder / "low"), "val__metrics": {"ssim": SSIM}}
    ),
    "val.metrics.n: calculate_niqe": lambda folder: {
        "val__metrics": {"n": {"type": "calculate_niqe", "crop_border": 0}}, "datasets__val__mod_crop": 16
    },
    "datasets.val_2.name: photos_val is also that of datasets.val; name another": (
        lambda folder: {"datasets__val_2": single(folder / "lq", "photos_val")}
    ),
    "datasets.val_2.io_backend: missing; it is read in the validation on x": (
        lambda folder: {"datasets__val_2": {"name": "x", "type": "SingleImageDataset", "dataroot_lq": "."}}
    ),
    "datasets.val_2: alone has no image": lambda folder: {"datasets__val_2": single(folder / "empty")},
    # windows at another size
    r"network_g: SwinIR fails in the validation on .*lq \(1, 3, 18, 18\).*SwinIRModel": (
        lambda folder: {"datasets__val__dataroot_gt": str(folder / "odd"), "network_g": SWIN}
    ),
    # a metric of three channels on one
    r"val.metrics.p: tlw_psnr_y fails in the validation on .*gt \(1, 1, 32, 32\)": lambda folder: {
        "network_g": VGG_OF_Y,
        "datasets__train": plain_options("")["datasets"]["train"] | write_pairs(folder / "pairs", color="y"),
        "datasets__val": write_pairs(folder / "pairs", name="photos_val", color="y"),
        "val__metrics": {"p": {"type": "tlw_psnr_y"}},
    },
}  # fmt: skip


@pytest.mark.parametrize("message", LACKS)
def test_what_a_validation_lacks_is_reported_before_training(photographs, train, tmp_path, lq, message):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "odd/a.png", 36)
    (tmp_path / "low").mkdir()
    cv2.imwrite(str(tmp_path / "low/low.png"), photograph("coffee", 0, 0, 18, 200))
    refused(message, train, plain_options(photographs, **LACKS[message](tmp_path)))
    assert not (tmp_path / "experiments").exists()


def test_swinir_model_validates_images_of_any_size(photographs, train, tmp_path):
    write(tmp_path / "odd/a.png", 36)
    changes = {"model_type": "SwinIRModel", "network_g": SWIN, "datasets__val__dataroot_gt": str(tmp_path / "odd")}
    assert "# psnr: " in log_text(train(plain_options(photographs, **changes, train__total_iter=4)))


def test_a_validation_that_fails_costs_nothing(photographs, train, register):
    """It is logged, the training goes on and is saved, in the modes and with the bits of one without a validation."""

    def fails_later(img, img2, **_):
        if img.shape != (48, 64, 3):  # not the smallest image, which is rehearsed
            raise ZeroDivisionError("on purpose")
        return 0.0

    opt = plain_options(photographs, val__metrics={"f": {"type": register(METRIC_REGISTRY, fails_later)}})
    folder = train(opt)
    for number in (4, 8):
        message = (
            f"The validation on photos_val after iteration {number} fails (ZeroDivisionError: on purpose); going on"
        )
        assert message in log_text(folder)
    plain = train(plain_options(photographs, name="plain", datasets__val=..., val=...))
    assert same(*(load_file(f / "models/net_g_8.pth", "")["params"] for f in (folder, plain)))


def test_a_validation_leaves_the_modes_of_networks(photographs, train, register):
    """Also those of a frozen batch norm, which BasicSR's ``train()`` would wake."""
    seen = []

    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12).eval()
            self.up = nn.PixelShuffle(2)

        def forward(self, x):
            seen.append((self.training, self.bn.training))
            return self.up(self.bn(self.conv(x)))

    class Model(SRModel):
        def optimize_parameters(self, current_iter):
            self.net_g.bn.eval()
            super().optimize_parameters(current_iter)

        def test(self):
            self.net_g.eval()
            if len(seen) > 1:  # after the rehearsal
                raise ZeroDivisionError("on purpose")
            super().test()

    network = {"type": register(ARCH_REGISTRY, Frozen)}
    train(plain_options(photographs, model_type=register(MODEL_REGISTRY, Model), network_g=network, val__val_freq=1))
    assert seen[-1] == (True, False)


def test_files_of_images_of_one_name(photographs, train, tmp_path):
    for name in ("x/a.png", "x/a.jpg", "y/a.png", "y/b.png"):
        write(tmp_path / name, 32)
    opt = plain_options(photographs, val__save_img=True, train__total_iter=4)
    opt["datasets"]["val"] |= {"name": "x", "dataroot_gt": str(tmp_path / "x")}
    opt["datasets"]["val_2"] = single(tmp_path / "y", "y")
    folder = train(opt)
    names = {p.parent.name for p in folder.glob("visualization/*/*_4.png")}
    large = {name: cv2.imread(str(folder / f"visualization/{name}/{name}_4.png")).shape[0] for name in names}
    assert large == {"x_a": 32, "a_jpg": 32, "y_a": 64, "b": 64}


@pytest.fixture
def run_on(photographs, tmp_path, monkeypatch):
    """Run ``tlw test`` on data sets in ``tmp_path``; returns the folder of the results."""

    def run(**datasets):
        opt = plain_options(photographs, train=..., logger=..., val__save_img=True, val__metrics=..., datasets=datasets)
        monkeypatch.chdir(tmp_path)
        run_test(str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])
        return tmp_path / "results/tiny"

    return run


def test_files_of_the_keys_of_an_lmdb_in_a_test(run_on, tmp_path):
    root = write_lmdb(tmp_path / "lq.lmdb", ["DSC.0", "DSC.1", "000/x", "001/x"], 24)
    results = run_on(test=single(root, io_backend={"type": "lmdb"}))
    saved = {p.name for p in (results / "visualization/alone").iterdir()}
    assert saved == {f"{name}_tiny.png" for name in ("DSC.0", "DSC.1", "000_x", "001_x")}


def test_a_test_set_that_is_not_there_is_left_out_and_named(photographs, run_on, tmp_path):
    gone = single(tmp_path / "gone", "gone")
    results = run_on(test_1=gone, test_2=single(photographs, "there"))
    assert {p.name for p in (results / "visualization").iterdir()} == {"there"}
    log = next(results.glob("test_*.log")).read_text()
    assert f"datasets.test_1.dataroot_lq: {tmp_path / 'gone'} is not a folder; this test set is left out." in log
    refused("gone is not a folder", run_on, test_1=gone)


def test_a_data_set_with_mean_and_std_is_measured_and_weighted_in_0_1(photographs, train, tmp_path, monkeypatch):
    """A network of the normalised images that gives what another gives of plain ones has its values and its loss."""
    seen, original = [], TLW.forward

    def note(self, sr, gt, *args, **kwargs):
        seen.append((sr.detach(), gt))
        return original(self, sr, gt, *args, **kwargs)

    monkeypatch.setattr(TLW, "forward", note)
    pairs = write_pairs(tmp_path)
    network = plain_options(photographs)["network_g"]
    # (v - rgb_mean)·img_range in, and back: the two see the same
    ways = {
        "plain": ({"rgb_mean": [0.5] * 3, "img_range": 2.0}, {}),
        "normalised": ({"rgb_mean": [0.0] * 3, "img_range": 1.0}, {"mean": [0.5] * 3, "std": [0.5] * 3}),
    }
    torch.save({"params": build_network({**network, **ways["plain"][0]}).state_dict()}, tmp_path / "net.pth")
    changes = {"train__total_iter": 1, "train__optim_g__lr": 1e-9, "train__rehearse": False, "val__val_freq": 1}
    changes |= {"val__save_img": True, "path__pretrain_network_g": str(tmp_path / "net.pth")}
    logs, images = [], []
    for name, (own, normalise) in ways.items():
        opt = tiny_options(photographs, name=name, network_g={**network, **own}, **changes)
        for section in opt["datasets"].values():
            section.update({**pairs, "name": section["name"], **normalise})
        folder = train(opt)
        logs.append(log_text(folder))
        images.append(cv2.imread(str(folder / "visualization/a/a_1.png")).astype(int))
    (sr, gt), (sr_of_normalised, gt_of_normalised) = seen
    assert torch.allclose(gt, gt_of_normalised, atol=1e-6) and torch.allclose(sr, sr_of_normalised, atol=1e-5)
    psnr = [float(log.split("# psnr: ")[1].split("\t")[0]) for log in logs]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.01)
    assert images[0].std() > 5 and abs(images[0] - images[1]).max() <= 1
    assert "TLW and its loss see the images in [0, 1]" in logs[1]
