"""What users bring: YAML files and plugins that are legal in BasicSR, and those that would silently do something else."""

from copy import deepcopy

import cv2
import pytest
import yaml

from tests.conftest import photograph, plain_options, reset_logger, set_option, tiny_options
from tests.helpers import check_all
from tlw_basicsr import UserError
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.networks import load_network
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.yaml_options import load_yaml

# ------------------------------------------------------------------------------------------------- without effect


UNASKED = {
    "train:fft_opt": {"type": "L1Loss"},
    "train:gan_opt": {"type": "GANLoss", "gan_type": "vanilla"},
    "train:optim_d": {"type": "Adam", "lr": 1e-4},
    "network_d": {"type": "UNetDiscriminatorSN", "num_in_ch": 3},
}


@pytest.mark.parametrize("place", UNASKED)
@pytest.mark.parametrize("make", [plain_options, tiny_options])
def test_what_the_model_never_asks_for_is_refused(photographs, tmp_path, make, place):
    opt = make(photographs)
    set_option(opt, place, UNASKED[place])
    with pytest.raises(UserError, match=rf"^{place.replace(':', '.')}: SRModel never asks for it.*plugins"):
        check_all(tmp_path, opt)
    if place.endswith("_opt"):
        set_option(opt, place, None)
        assert check_all(tmp_path, opt) == []


def test_a_model_that_asks_may_have_it(photographs, tmp_path, monkeypatch):
    (tmp_path / "asks_for_fft.py").write_text(
        "from basicsr.losses import build_loss\n"
        "from basicsr.models.sr_model import SRModel\n"
        "from basicsr.utils.registry import MODEL_REGISTRY\n"
        "@MODEL_REGISTRY.register()\n"
        "class FFTModel(SRModel):\n"
        "    def init_training_settings(self):\n"
        "        super().init_training_settings()\n"
        "        options = self.opt['train']['fft_opt']\n"
        "        self.start = options.pop('start_ratio')\n"
        "        self.cri_fft = build_loss(options)\n"
    )
    monkeypatch.chdir(tmp_path)
    fft = {"type": "L1Loss", "start_ratio": 0.5}
    opt = plain_options(photographs, plugins=["asks_for_fft"], model_type="FFTModel", train__fft_opt=dict(fft))
    assert check_all(tmp_path, opt) == []
    opt["train"]["fft_opt"]["start_ratoi"] = opt["train"]["fft_opt"].pop("start_ratio")
    with pytest.raises(UserError, match=r"train\.fft_opt\.start_ratio: missing; it is read in building the model"):
        check_all(tmp_path, opt)
    # left over of another model's file, of a network that is not there
    opt = plain_options(
        photographs, model_type="FFTModel", train__fft_opt=fft, train__optim_d={"type": "Adam", "lr": 1}
    )
    assert check_all(tmp_path, opt) == ["train.optim_d: FFTModel never asks for it, so it has no effect"]


def test_keys_that_basicsr_does_not_read_are_noted(photographs, tmp_path):
    opt = plain_options(photographs, task="SR", print_network=True)
    opt["datasets"]["train"] = paired(tmp_path) | {"interval_list": [1]}
    assert check_all(tmp_path, opt) == [
        "task: nothing in SRModel reads this option",
        "print_network: nothing in SRModel reads this option",
        "datasets.train.interval_list: nothing in PairedImageDataset reads this option",
    ]
    opt["datasets"]["val"]["interval_list"] = [1]  # our own data set
    with pytest.raises(UserError, match=r"datasets\.val\.interval_list: unknown option"):
        check_all(tmp_path, opt)


def test_notes_come_into_the_log(photographs, train):
    folder = train(plain_options(photographs, task="SR", train__total_iter=1))
    log = next(folder.glob("train_*.log")).read_text()
    assert "WARNING: task: nothing in SRModel reads this option" in log


def paired(tmp_path, color=None):
    for name, side in (("gt", 32), ("lq", 16)):
        (tmp_path / name).mkdir(exist_ok=True)
        for number in range(2):
            cv2.imwrite(str(tmp_path / name / f"{number}.png"), photograph(height=side, width=side))
    return {
        "name": "pairs", "type": "PairedImageDataset", "dataroot_gt": str(tmp_path / "gt"),
        "dataroot_lq": str(tmp_path / "lq"), "io_backend": {"type": "disk"}, "gt_size": 16, "use_hflip": True,
        "use_rot": True, "num_worker_per_gpu": 0, "batch_size_per_gpu": 2, **({"color": color} if color else {}),
    }  # fmt: skip


def test_the_scale_is_asked_for_where_it_is_needed(photographs, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"scale: missing; network_g\.upscale is 2"):
        check_all(tmp_path, plain_options(photographs, scale=...))
    (tmp_path / "no_scale.py").write_text(
        "import torch\n"
        "from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY\n"
        "@DATASET_REGISTRY.register()\n"
        "class NoiseDataset(torch.utils.data.Dataset):\n"
        "    def __init__(self, opt):\n"
        "        self.opt = opt\n"
        "    def __len__(self):\n"
        "        return 4\n"
        "    def __getitem__(self, index):\n"
        "        gt = torch.rand(3, 16, 16)\n"
        "        return {'lq': gt + 0.1 * torch.randn_like(gt), 'gt': gt, 'lq_path': 'x.png', 'gt_path': 'x.png'}\n"
        "@ARCH_REGISTRY.register()\n"
        "class Denoiser(torch.nn.Conv2d):\n"
        "    def __init__(self, ratio: int = 2, x: int = None):\n"
        "        super().__init__(3, 3, 3, 1, 1)\n"
    )
    monkeypatch.chdir(tmp_path)
    opt = plain_options(photographs, plugins=["no_scale"], scale=..., network_g={"type": "Denoiser"})
    data = {"name": "noise", "type": "NoiseDataset", "num_worker_per_gpu": 0, "batch_size_per_gpu": 2}
    alone = {
        "name": "alone",
        "type": "SingleImageDataset",
        "dataroot_lq": str(photographs),
        "io_backend": {"type": "disk"},
    }
    opt["datasets"] = {"train": data, "val": alone}
    opt["val"] = {"val_freq": 1, "save_img": False}
    assert check_all(tmp_path, opt) == []
    # annotations of others are no law, but tell what may be wrong where building fails
    opt["network_g"] |= {"ratio": 1.25, "x": None}
    assert check_all(tmp_path, opt) == []
    opt["network_g"]["ratoi"] = 1
    with pytest.raises(UserError, match=r"network_g\.ratoi: unknown option \(did you mean ratio\?\)"):
        check_all(tmp_path, opt)


def test_a_trained_network_without_scale_trains(photographs, tmp_path, train, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    test_the_scale_is_asked_for_where_it_is_needed(photographs, tmp_path, monkeypatch)
    opt = plain_options(photographs, scale=..., network_g={"type": "Denoiser"}, train__total_iter=1)
    data = {"name": "noise", "type": "NoiseDataset", "num_worker_per_gpu": 0, "batch_size_per_gpu": 2}
    opt["datasets"] = {"train": data}
    opt.pop("val")
    assert (train(opt) / "models/net_g_latest.pth").is_file()


# ------------------------------------------------------------------------------------------------- the trial before


POOLED = """
import torch
from basicsr.utils.registry import ARCH_REGISTRY
@ARCH_REGISTRY.register()
class Pooled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 12, 3, 1, 1), torch.nn.BatchNorm2d(12)
    def forward(self, x):
        f = self.conv(x)
        return torch.nn.functional.pixel_shuffle(f * self.norm(f.mean((2, 3), keepdim=True)), 2)
"""


def test_global_pooling_with_batch_norm_is_tried_by_the_trainings_batch(photographs, tmp_path, monkeypatch):
    (tmp_path / "pooled.py").write_text(POOLED)
    monkeypatch.chdir(tmp_path)
    opt = plain_options(photographs, plugins=["pooled"], network_g={"type": "Pooled"})
    check_all(tmp_path, opt)
    opt["datasets"]["train"]["batch_size_per_gpu"] = 1
    with pytest.raises(UserError, match=r"network_g: Pooled fails in the first iteration \(ValueError: Expected more"):
        check_all(tmp_path, opt)


ONE = {"num_in_ch": 1, "num_out_ch": 1, "num_feat": 4, "num_block": 1}


def one_channel(photographs, tmp_path, **changes):
    opt = tiny_options(photographs, network_g={"type": "RRDBNet", "scale": 2, **ONE}, **changes)
    opt["datasets"] = {"train": paired(tmp_path, "y")}
    opt.pop("val")
    return opt


def test_one_channel_is_tried_before_the_training(photographs, tmp_path, train):
    opt = one_channel(photographs, tmp_path)
    with pytest.raises(
        UserError, match=r"network_w: TLWWeightNet fails in the first iteration .*one channel, which num_in_ch: 1"
    ):
        check_all(tmp_path, opt)
    opt["network_w"]["num_in_ch"] = 1
    check_all(tmp_path, opt)
    for network in (
        {"type": "RRDBNet", "scale": 2, **ONE, "num_in_ch": 3},
        {"type": "EDSR", "upscale": 2, **ONE},  # whose mean is of RGB
    ):
        with pytest.raises(
            UserError, match=r"network_g: .* fails in the first iteration .*lq \(2, 1, 8, 8\).*num_in_ch: 1"
        ):
            check_all(tmp_path, {**deepcopy(opt), "network_g": network})
    opt["train"]["total_iter"] = 2
    assert (train(opt) / "models/net_w_latest.pth").is_file()


def test_the_economy_preset_trains_one_channel_without_more(photographs, tmp_path, train):
    changes = {"network_w": ..., "train__optim_w": ..., "train__tlw": {"preset": "economy", "k_unit": "iter"}}
    opt = one_channel(photographs, tmp_path, **changes, train__total_iter=2)
    state = load_file(train(opt) / "models/net_w_latest.pth", "")["params"]
    assert next(iter(state.values())).shape[:2] == (16, 2)


def test_a_loss_that_refuses_its_options_is_told_before_folders_are_made(photographs, tmp_path, train):
    opt = plain_options(photographs, train__pixel_opt={"type": "L1Loss", "reduction": "average"})
    with pytest.raises(UserError, match=r"train\.pixel_opt: L1Loss fails in building the model \(ValueError"):
        train(opt)
    assert not (tmp_path / "experiments").exists()


# ------------------------------------------------------------------------------------------------- messages


def test_what_is_not_registered_points_to_plugins(photographs, tmp_path):
    for changes, message in (
        (
            {"model_type": "DATModel"},
            "model_type: 'DATModel' is not registered; a part of another repository needs plug",
        ),
        ({"model_type": "SRModl"}, r"'SRModl' is not registered \(did you mean SRModel\?\)"),
        ({"network_g": {"type": "DAT"}}, "network_g.type: 'DAT' is not registered; a part of another repository needs"),
    ):
        with pytest.raises(UserError, match=message) as error:
            check_all(tmp_path, plain_options(photographs, **changes))
        assert "_basicsr" not in str(error.value)
    with pytest.raises(UserError, match=r"network_g\.num_style_feat: missing"):
        check_all(tmp_path, tiny_options(photographs, base_model="StyleGAN2Model"))


def test_a_training_step_of_another_signature_is_told_before(photographs, tmp_path, monkeypatch):
    (tmp_path / "other_loop.py").write_text(
        "from basicsr.models.sr_model import SRModel\n"
        "from basicsr.utils.registry import MODEL_REGISTRY\n"
        "@MODEL_REGISTRY.register()\n"
        "class OtherLoopModel(SRModel):\n"
        "    def optimize_parameters(self, scaler, current_iter):\n"
        "        pass\n"
    )
    monkeypatch.chdir(tmp_path)
    opt = plain_options(photographs, plugins=["other_loop"], model_type="OtherLoopModel")
    message = r"model_type: OtherLoopModel fails in the first iteration .*missing 1 required positional argument: 'curr"
    with pytest.raises(UserError, match=message):
        check_all(tmp_path, opt)


def test_a_failing_augmentation_of_a_plugin_is_no_unreadable_picture(photographs, train, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "augments.py").write_text(
        "from basicsr.utils.registry import DATASET_REGISTRY\n"
        "from tlw_basicsr import BicubicSRDataset\n"
        "@DATASET_REGISTRY.register()\n"
        "class AugmentingDataset(BicubicSRDataset):\n"
        "    def __getitem__(self, index):\n"
        "        return 1 / 0\n"
    )
    opt = plain_options(photographs, plugins=["augments"])
    opt["datasets"]["train"]["type"] = "AugmentingDataset"
    with pytest.raises(UserError, match=r"datasets\.train: AugmentingDataset fails on .* \(ZeroDivisionError"):
        train(opt)


def test_a_key_twice_with_one_value_is_legal():
    assert load_yaml("path: {resume_state: ~, resume_state: ~}", "x") == {"path": {"resume_state": None}}
    for text in ("a: 1\na: 2", "a: ~\na: x", "a: {b: 1}\na: {b: 1}", "a: '1'\na: 1"):
        with pytest.raises(UserError, match="the key 'a' is given twice, with different values"):
            load_yaml(text, "x")


# ------------------------------------------------------------------------------------------------- afterwards


def test_the_forced_options_are_kept_with_the_training(photographs, train, tmp_path):
    opt = tiny_options(photographs, train__total_iter=1)
    folder = train(opt, "--force_yml", "network_g:num_feat=6", "train:optim_g:lr=1e-4")
    kept = read_options(str(folder / "options.yml"))
    expected = deepcopy(opt)
    expected["network_g"]["num_feat"], expected["train"]["optim_g"]["lr"] = 6, 1e-4
    assert kept == expected and "--force_yml" not in yaml.safe_dump(kept)
    load_network(kept["network_g"], folder / "models/net_g_latest.pth", "params_ema")
    reset_logger()
    again = train(kept, root=tmp_path / "again")  # complete and usable again
    one, other = (load_file(f / "models/net_g_latest.pth", "")["params"] for f in (folder, again))
    assert all((one[name] == other[name]).all() for name in one)


def test_without_forced_options_the_file_is_kept_as_it_is(photographs, train):
    opt = tiny_options(photographs, train__total_iter=1)
    text = (train(opt) / "options.yml").read_text("utf-8")
    assert text.endswith(yaml.safe_dump(opt, sort_keys=False)) and text.startswith("# 20")


def test_a_small_tile_needs_no_overlap():
    net = load_network_of(2)
    assert NetworkUpscaler(net, {"type": "EDSR", "num_in_ch": 3}, tile=48).step == 24
    assert NetworkUpscaler(net, {"type": "EDSR", "num_in_ch": 3}, tile=128).step == 96


def load_network_of(scale):
    from basicsr.archs.edsr_arch import EDSR

    return EDSR(3, 3, num_feat=4, num_block=1, upscale=scale).eval()


def test_an_argument_of_a_program_is_named_as_it_is(tmp_path, capsys):
    from tlw_basicsr import cli

    with pytest.raises(SystemExit):
        cli.run_command("evaluate", ["--gt", str(tmp_path), "--scale", "2", "--bicubic"])
    assert capsys.readouterr().err.startswith(f"error: --gt: {tmp_path} has no image")


def test_a_longer_training_than_the_annealing_of_its_state_tells_a_way_out(photographs, train, tmp_path):
    cosine = {"type": "CosineAnnealingRestartLR", "periods": [4], "eta_min": 0}
    opt = plain_options(photographs, train__total_iter=4, train__scheduler=cosine)
    train(opt)
    opt["train"] |= {"total_iter": 6, "scheduler": {**cosine, "periods": [6]}}
    with pytest.raises(
        UserError, match=r"train\.total_iter: the periods .* end at 4; to train longer, begin a training of"
    ):
        train(opt, "--auto_resume")


def test_evaluate_and_infer_take_the_same_entry(capsys):
    from tlw_basicsr import cli

    for command in ("evaluate", "infer"):
        with pytest.raises(SystemExit):
            cli.run_command(command, ["--help"])
        assert "default params_ema, or params" in " ".join(capsys.readouterr().out.split())
