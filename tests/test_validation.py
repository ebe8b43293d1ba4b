"""What a validation needs is told before training; what fails in it loses nothing; every image has a file of its own."""

import cv2
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY
from torch import nn

from tests.conftest import photograph, plain_options, tiny_options
from tests.helpers import write, write_lmdb
from tlw_basicsr import UserError
from tlw_basicsr.models.validation import calculate_metric, names_of_sets

PSNR = {"type": "calculate_psnr", "crop_border": 2, "test_y_channel": True}
SSIM = {"type": "calculate_ssim", "crop_border": 4, "test_y_channel": True}


@pytest.fixture
def lq(tmp_path):
    """A folder of two LR images without HR images."""
    for name in ("a.png", "b.png"):
        write(tmp_path / "lq" / name, 24)
    return tmp_path / "lq"


def single(lq, name="alone", **options):
    return {
        "name": name,
        "type": "SingleImageDataset",
        "dataroot_lq": str(lq),
        "io_backend": {"type": "disk"},
        **options,
    }


def test_metrics_without_hr_images_are_refused_before_training(photographs, train, lq, tmp_path):
    opt = plain_options(photographs, datasets__val=single(lq))
    with pytest.raises(
        UserError, match=r"val.metrics.psnr: calculate_psnr compares with HR images, and datasets.val has none"
    ):
        train(opt)
    assert not (tmp_path / "experiments").exists()


def test_the_best_networks_need_hr_images_in_the_first_set(photographs, train, lq):
    opt = plain_options(photographs, val__save_best="psnr")
    opt["datasets"] = {"train": opt["datasets"]["train"], "val": single(lq), "val_2": opt["datasets"]["val"]}
    with pytest.raises(UserError, match=r"datasets.val has none; .* or take a data set of pairs as the first"):
        train(opt)
    del opt["val"]["save_best"]
    assert "# psnr: " in next(train(opt).glob("train_*.log")).read_text()


@pytest.mark.parametrize("model", [plain_options, tiny_options])
def test_images_without_hr_are_saved_and_not_measured(photographs, train, lq, model):
    opt = model(photographs, datasets__val=single(lq), val__metrics=..., val__save_img=True)
    folder = train(opt)
    assert sorted(p.name for p in folder.glob("visualization/*/*")) == ["a_4.png", "a_8.png", "b_4.png", "b_8.png"]


def test_a_second_set_without_hr_images_has_no_metrics(photographs, train, lq):
    """BasicSR takes the last training batch's HR image for it."""
    opt = plain_options(photographs, datasets__val_2=single(lq), val__save_img=True, val__metrics={"psnr": PSNR})
    folder = train(opt)
    log = next(folder.glob("train_*.log")).read_text()
    assert "Validation photos_val" in log and "Validation alone" not in log and "fails" not in log
    assert (folder / "visualization/a/a_8.png").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"val__metrics": {"s": {**SSIM, "crop_border": 30}}}, r"val.metrics.s: calculate_ssim fails in the validation on photos_val .*gt \(1, 3, 48, 64\)"),
        ({"datasets__val__mod_crop": 16, "val__metrics": {"n": {"type": "calculate_niqe", "crop_border": 0}}}, "val.metrics.n: calculate_niqe"),
        ({"datasets__val_2": "same name"}, "datasets.val_2.name: photos_val is also that of datasets.val; name another"),
        ({"datasets__val_2": {"name": "x", "type": "SingleImageDataset", "dataroot_lq": "."}}, "datasets.val_2.io_backend: missing; it is read in the validation on x"),
    ],
)  # fmt: skip
def test_what_a_validation_lacks_is_told_before_training(photographs, train, tmp_path, changes, message):
    opt = plain_options(photographs)
    if changes.get("datasets__val_2") == "same name":
        changes = {"datasets__val_2": dict(opt["datasets"]["val"])}
    with pytest.raises(UserError, match=message):
        train(plain_options(photographs, **changes))
    assert not (tmp_path / "experiments").exists()


def test_ssim_of_an_image_smaller_than_its_window_is_told(photographs, train, tmp_path):
    """18×200 with a border of 4 leaves 10 pixels of 11: BasicSR's mean of the set would be NaN."""
    (tmp_path / "val").mkdir()
    cv2.imwrite(str(tmp_path / "val/low.png"), photograph("coffee", 0, 0, 18, 200))
    opt = plain_options(photographs, datasets__val__dataroot_gt=str(tmp_path / "val"), val__metrics={"ssim": SSIM})
    with pytest.raises(
        UserError, match=r"val.metrics.ssim: calculate_ssim gives no number for an image of 18×200 pixels"
    ):
        train(opt)


def test_an_empty_set_is_told_before_training(photographs, train, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"datasets.val_2: alone has no image"):
        train(plain_options(photographs, datasets__val_2=single(tmp_path / "empty")))


@pytest.mark.parametrize(("model", "refused"), [("SRModel", True), ("SwinIRModel", False)])
def test_a_network_of_windows_at_sizes_that_do_not_fit(photographs, train, tmp_path, model, refused):
    swin = {
        "type": "SwinIR", "upscale": 2, "img_size": 8, "window_size": 8, "depths": [1], "embed_dim": 6, "num_heads": [1],
        "mlp_ratio": 1, "upsampler": "pixelshuffledirect", "img_range": 1.0,
    }  # fmt: skip
    opt = plain_options(photographs, model_type=model, network_g=swin, train__total_iter=2, val__val_freq=2)
    write(tmp_path / "val/a.png", 36)
    opt["datasets"]["val"]["dataroot_gt"] = str(tmp_path / "val")
    if not refused:
        assert (train(opt) / "models/net_g_latest.pth").is_file()
        return
    with pytest.raises(
        UserError, match=r"network_g: SwinIR fails in the validation on .*lq \(1, 3, 18, 18\).*SwinIRModel"
    ):
        train(opt)


def one_channel(photographs, folder, **changes):
    for name in ("a.png", "b.png"):
        write(folder / "gt" / name, 32)
        write(folder / "y_lq" / name, 16)
    pairs = {
        "type": "PairedImageDataset", "dataroot_gt": str(folder / "gt"), "dataroot_lq": str(folder / "y_lq"), "color": "y",
        "io_backend": {"type": "disk"},
    }  # fmt: skip
    opt = plain_options(photographs, **changes)
    opt["network_g"] = {
        "type": "SRVGGNetCompact",
        "num_in_ch": 1,
        "num_out_ch": 1,
        "num_feat": 4,
        "num_conv": 1,
        "upscale": 2,
    }
    for key in ("train", "val"):
        opt["datasets"][key].update(pairs)
    return opt


def test_metrics_of_three_channels_on_one_are_told(photographs, train, tmp_path):
    opt = one_channel(photographs, tmp_path, val__metrics={"p": {"type": "tlw_psnr_y"}})
    with pytest.raises(UserError, match=r"val.metrics.p: tlw_psnr_y fails in the validation on .*gt \(1, 1, 32, 32\)"):
        train(opt)


@pytest.fixture
def registered():
    """Register a class, and forget it after the test."""
    known = []

    def register(registry, kind):
        registry.register(kind)
        known.append((registry, kind.__name__))
        return kind.__name__

    yield register
    for registry, name in known:
        del registry._obj_map[name]


def test_a_validation_that_fails_costs_nothing(photographs, train, registered):
    """It is logged, the training goes on and is saved, in the modes and with the bits of one without a validation."""

    def fails_later(img, img2, **_):
        if img.shape != (48, 64, 3):  # not the smallest image, which is rehearsed
            raise ZeroDivisionError("on purpose")
        return 0.0

    fails_later.__name__ = "fails_later"

    opt = plain_options(photographs, val__metrics={"f": {"type": registered(METRIC_REGISTRY, fails_later)}})
    folder = train(opt)
    log = next(folder.glob("train_*.log")).read_text()
    for number in (4, 8):
        assert (
            f"The validation on photos_val after iteration {number} fails (ZeroDivisionError: on purpose); going on"
            in log
        )
    plain = train(plain_options(photographs, name="plain", datasets__val=..., val=...))
    states = [torch.load(f / "models/net_g_8.pth", weights_only=True)["params"] for f in (folder, plain)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_validation_leaves_the_modes_of_networks(photographs, train, registered):
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

    class Model(MODEL_REGISTRY.get("SRModel")):
        def optimize_parameters(self, current_iter):
            self.net_g.bn.eval()
            super().optimize_parameters(current_iter)

        def test(self):
            self.net_g.eval()
            if len(seen) > 1:  # after the rehearsal
                raise ZeroDivisionError("on purpose")
            super().test()

    names = registered(MODEL_REGISTRY, Model), registered(ARCH_REGISTRY, Frozen)
    train(plain_options(photographs, model_type=names[0], network_g={"type": names[1]}, val__val_freq=1))
    assert seen[-1] == (True, False)


def test_files_of_images_of_one_name(photographs, train, tmp_path):
    for name in ("x/a.png", "x/a.jpg", "y/a.png", "y/b.png"):
        write(tmp_path / name, 32)
    sets = {
        "train": plain_options(photographs)["datasets"]["train"],
        "val": {
            "name": "x",
            "type": "BicubicSRDataset",
            "dataroot_gt": str(tmp_path / "x"),
            "io_backend": {"type": "disk"},
        },
        "val_2": single(tmp_path / "y", "y"),
    }
    folder = train(plain_options(photographs, datasets=sets, val__save_img=True, train__total_iter=4))
    names = {p.parent.name for p in folder.glob("visualization/*/*_4.png")}
    assert names == {"x_a", "a_jpg", "y_a", "b"}
    large = {name: cv2.imread(str(folder / f"visualization/{name}/{name}_4.png")).shape[0] for name in names}
    assert large == {"x_a": 32, "a_jpg": 32, "y_a": 64, "b": 64}


def test_files_of_the_keys_of_an_lmdb_in_a_test(photographs, tmp_path, monkeypatch):
    from tests.conftest import write_yaml
    from tlw_basicsr.engine.pipeline import test_pipeline as run_test

    keys = ["DSC.0", "DSC.1", "000/x", "001/x"]
    root = write_lmdb(tmp_path / "lq.lmdb", keys, 24)
    opt = plain_options(photographs, train=..., logger=..., val__save_img=True, val__metrics=...)
    opt["datasets"] = {"test": single(root, io_backend={"type": "lmdb"})}
    monkeypatch.chdir(tmp_path)
    run_test(str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])
    saved = {p.name for p in (tmp_path / "results/tiny/visualization/alone").iterdir()}
    assert saved == {f"{name}_tiny.png" for name in ("DSC.0", "DSC.1", "000_x", "001_x")}


def test_a_test_set_that_is_not_there_is_left_out_and_named(photographs, tmp_path, monkeypatch):
    from tests.conftest import write_yaml
    from tlw_basicsr.engine.pipeline import test_pipeline as run_test

    there = {"type": "BicubicSRDataset", "dataroot_gt": str(photographs), "io_backend": {"type": "disk"}}
    gone = there | {"name": "gone", "dataroot_gt": str(tmp_path / "gone")}
    opt = plain_options(photographs, train=..., logger=..., val__save_img=True, val__metrics=...)
    opt["datasets"] = {"test_1": gone, "test_2": there | {"name": "there"}}
    monkeypatch.chdir(tmp_path)
    run_test(str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])
    assert {p.name for p in (tmp_path / "results/tiny/visualization").iterdir()} == {"there"}
    log = next((tmp_path / "results/tiny").glob("test_*.log")).read_text()
    assert f"datasets.test_1.dataroot_gt: {tmp_path / 'gone'} is not a folder; this test set is left out." in log
    opt["datasets"].pop("test_2")
    with pytest.raises(UserError, match="gone is not a folder"):
        run_test(str(tmp_path), ["-opt", str(write_yaml(tmp_path, opt))])


def test_a_set_that_tells_no_paths_keeps_its_names():
    class Other:
        def __len__(self):
            return 3

    assert names_of_sets([Other()]) == [None]


def test_a_metric_takes_both_names_of_an_image_and_gives_a_number(registered):
    def old_metric(img1, img2, **_):
        return float(abs(img1.astype(float) - img2).max())

    name = registered(METRIC_REGISTRY, old_metric)
    images = [photograph(height=40, width=40), photograph("coffee", height=40, width=40)]
    for first in ("img", "img1"):
        data = {first: images[0], "img2": images[1]}
        assert calculate_metric(data, {"type": name}) > 0
        assert calculate_metric(data, {"type": "tlw_mse", "better": "lower"}) > 0
    with pytest.raises(UserError, match="calculate_ssim gives no number for an image of 18×40 pixels"):
        calculate_metric({"img": images[0][:18], "img2": images[1][:18]}, SSIM)


def test_a_data_set_with_mean_and_std_is_measured_and_weighted_in_0_1(photographs, train, tmp_path, monkeypatch):
    """A network of the normalised images that gives what another gives of plain ones has its values and its loss."""
    from basicsr.archs import build_network

    from tlw_basicsr import TLW

    network = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 2}
    seen, original = [], TLW.forward

    def note(self, sr, gt, *args, **kwargs):
        seen.append((sr.detach(), gt))
        return original(self, sr, gt, *args, **kwargs)

    monkeypatch.setattr(TLW, "forward", note)
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / "gt" / name, 32)
        write(tmp_path / "lq" / name, 16)
    torch.manual_seed(0)
    # (v - rgb_mean)·img_range in, and back: the two see the same
    plain = build_network({**network, "rgb_mean": [0.5] * 3, "img_range": 2.0})
    torch.save({"params": plain.state_dict()}, tmp_path / "net.pth")
    logs, images = {}, {}
    for name, own, normalise in (
        ("plain", {"rgb_mean": [0.5] * 3, "img_range": 2.0}, {}),
        ("normalised", {"rgb_mean": [0.0] * 3, "img_range": 1.0}, {"mean": [0.5] * 3, "std": [0.5] * 3}),
    ):
        opt = tiny_options(
            photographs,
            name=name,
            network_g={**network, **own},
            train__total_iter=1,
            val__save_img=True,
            train__rehearse=False,
        )
        pairs = {
            "type": "PairedImageDataset", "dataroot_gt": str(tmp_path / "gt"), "dataroot_lq": str(tmp_path / "lq"),
            **normalise,
        }  # fmt: skip
        for key in ("train", "val"):
            opt["datasets"][key].update(pairs)
        opt["path"] = {"pretrain_network_g": str(tmp_path / "net.pth")}
        opt["train"]["optim_g"]["lr"] = 1e-9
        opt["val"]["val_freq"] = 1
        folder = train(opt)
        logs[name] = next(folder.glob("train_*.log")).read_text()
        images[name] = cv2.imread(str(folder / "visualization/a/a_1.png"))
    (sr, gt), (sr_of_normalised, gt_of_normalised) = seen
    assert torch.allclose(gt, gt_of_normalised, atol=1e-6) and torch.allclose(sr, sr_of_normalised, atol=1e-5)
    psnr = [float(log.split("# psnr: ")[1].split("\t")[0]) for log in logs.values()]
    assert psnr[0] == pytest.approx(psnr[1], abs=0.01) and images["plain"].std() > 5
    assert abs(images["plain"].astype(int) - images["normalised"]).max() <= 1
    assert "TLW and its loss see the images in [0, 1]" in logs["normalised"]
