"""What users bring: YAML files and plugins that are legal in BasicSR, and those that would silently do something else."""

import pytest
import torch
import yaml
from basicsr.archs.edsr_arch import EDSR
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY

from tests.conftest import plain_options, set_option, tiny_options
from tests.helpers import check_all, log_text, quick, refused, same, single, write_pairs
from tlw_basicsr import BicubicSRDataset, UserError
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.networks import load_network
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.yaml_options import load_yaml

FFT = """
from basicsr.losses import build_loss
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
@MODEL_REGISTRY.register()
class FFTModel(SRModel):
    def init_training_settings(self):
        super().init_training_settings()
        options = self.opt['train']['fft_opt']
        self.start = options.pop('start_ratio')
        self.cri_fft = build_loss(options)
"""


def test_a_model_that_asks_may_have_it(photographs, tmp_path, monkeypatch):
    (tmp_path / "asks_for_fft.py").write_text(FFT)
    monkeypatch.chdir(tmp_path)
    fft = {"type": "L1Loss", "start_ratio": 0.5}
    asking = {"plugins": ["asks_for_fft"], "model_type": "FFTModel"}
    assert check_all(tmp_path, plain_options(photographs, **asking, train__fft_opt=fft)) == []
    misspelt = {"type": "L1Loss", "start_ratoi": 0.5}
    with pytest.raises(UserError, match=r"train\.fft_opt\.start_ratio: missing; it is read in building the model"):
        check_all(tmp_path, plain_options(photographs, **asking, train__fft_opt=misspelt))
    # left over of another model's file, of a network that is not there
    opt = plain_options(photographs, **asking, train__fft_opt=fft, train__optim_d={"type": "Adam", "lr": 1})
    assert check_all(tmp_path, opt) == ["train.optim_d: FFTModel never asks for it, so it has no effect"]


def test_keys_that_basicsr_does_not_read_are_noted(photographs, tmp_path, train):
    opt = plain_options(photographs, task="SR", print_network=True, train__total_iter=1)
    opt["datasets"]["train"] |= write_pairs(tmp_path, interval_list=[1])
    notes = [
        "datasets.train.interval_list: nothing in PairedImageDataset reads this option",
        "print_network: nothing in SRModel reads this option",
        "task: nothing in SRModel reads this option",
    ]
    assert sorted(check_all(tmp_path, opt)) == notes
    log = log_text(train(opt))
    assert all(f"WARNING: {note}" in log for note in notes)
    opt["datasets"]["val"]["interval_list"] = [1]  # our own data set
    refused(r"datasets\.val\.interval_list: unknown option", check_all, tmp_path, opt)


def test_an_option_that_some_iterations_alone_read_is_not_said_to_be_without_effect(photographs, tmp_path, monkeypatch):
    """As Real-ESRGAN's ``noise_range`` is by chance."""
    (tmp_path / "by_chance.py").write_text(
        "from basicsr.models.sr_model import SRModel\n"
        "from basicsr.utils.registry import MODEL_REGISTRY\n"
        "@MODEL_REGISTRY.register()\n"
        "class ByChanceModel(SRModel):\n"
        "    def feed_data(self, data):\n"
        "        super().feed_data(data)\n"
        "        if data is None:\n"
        "            self.opt['noise_range']\n"
    )
    monkeypatch.chdir(tmp_path)
    opt = plain_options(photographs, plugins=["by_chance"], model_type="ByChanceModel", noise_range=[1, 30], noises=1)
    notes = ["noise_range: ByChanceModel has not read it yet, but may"]
    assert check_all(tmp_path, opt) == [*notes, "noises: nothing in ByChanceModel reads this option"]


def test_the_scale_is_asked_for_where_it_is_needed(photographs, tmp_path, train, register):
    refused(r"scale: missing; network_g\.upscale is 2", check_all, tmp_path, plain_options(photographs, scale=...))

    class NoiseDataset(torch.utils.data.Dataset):
        def __init__(self, opt):
            self.opt = opt

        def __len__(self):
            return 4

        def __getitem__(self, index):
            gt = torch.rand(3, 16, 16)
            return {"lq": gt + 0.1 * torch.randn_like(gt), "gt": gt, "lq_path": "x.png", "gt_path": "x.png"}

    class Denoiser(torch.nn.Conv2d):
        def __init__(self, ratio: int = 2, x: int = None):  # noqa: RUF013
            super().__init__(3, 3, 3, 1, 1)

    register(DATASET_REGISTRY, NoiseDataset), register(ARCH_REGISTRY, Denoiser)
    opt = plain_options(photographs, scale=..., network_g={"type": "Denoiser"}, train__total_iter=1)
    data = {"name": "noise", "type": "NoiseDataset", "num_worker_per_gpu": 0, "batch_size_per_gpu": 2}
    opt["datasets"] = {"train": data, "val": single(photographs)}
    opt["val"] = {"val_freq": 1, "save_img": False}
    assert check_all(tmp_path, opt) == []
    # annotations of others are no law, but tell what may be wrong where building fails
    opt["network_g"] |= {"ratio": 1.25, "x": None}
    assert check_all(tmp_path, opt) == []
    assert (train(opt) / "models/net_g_latest.pth").is_file()
    opt["network_g"]["ratoi"] = 1
    refused(r"network_g\.ratoi: unknown option \(did you mean ratio\?\)", check_all, tmp_path, opt)


def test_global_pooling_with_batch_norm_is_tried_by_the_trainings_batch(photographs, tmp_path, register):
    class Pooled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 12, 3, 1, 1), torch.nn.BatchNorm2d(12)

        def forward(self, x):
            f = self.conv(x)
            return torch.nn.functional.pixel_shuffle(f * self.norm(f.mean((2, 3), keepdim=True)), 2)

    opt = plain_options(photographs, network_g={"type": register(ARCH_REGISTRY, Pooled)})
    check_all(tmp_path, opt)
    opt["datasets"]["train"]["batch_size_per_gpu"] = 1
    refused(r"network_g: Pooled fails in the first iteration \(ValueError: Expected more", check_all, tmp_path, opt)


ONE = {"num_in_ch": 1, "num_out_ch": 1, "num_feat": 4, "num_block": 1}


def one_channel(photographs, tmp_path, **changes):
    opt = quick(photographs, network_g={"type": "RRDBNet", "scale": 2, **ONE}, train__total_iter=2, **changes)
    opt["datasets"]["train"] |= write_pairs(tmp_path, color="y")
    return opt


def test_one_channel_is_tried_before_the_training(photographs, tmp_path, train):
    opt = one_channel(photographs, tmp_path)
    message = "network_w: TLWWeightNet fails in the first iteration .*one channel, which num_in_ch: 1"
    refused(message, check_all, tmp_path, opt)
    opt["network_w"]["num_in_ch"] = 1
    message = r"network_g: .* fails in the first iteration .*lq \(2, 1, 8, 8\).*num_in_ch: 1"
    # three channels, and a mean of RGB
    for network in ({"type": "RRDBNet", "scale": 2, **ONE, "num_in_ch": 3}, {"type": "EDSR", "upscale": 2, **ONE}):
        refused(message, check_all, tmp_path, {**opt, "network_g": network})
    assert (train(opt) / "models/net_w_latest.pth").is_file()


def test_the_economy_preset_trains_one_channel_without_more(photographs, tmp_path, train):
    changes = {"network_w": ..., "train__optim_w": ..., "train__tlw": {"preset": "economy", "k_unit": "iter"}}
    experiment = train(one_channel(photographs, tmp_path, **changes))
    state = load_file(experiment / "models/net_w_latest.pth", "")["params"]
    assert next(iter(state.values())).shape[:2] == (16, 2)


@pytest.mark.parametrize("root", ["images.h5", "tiles/*.png", ["a", "b"], {"a": 1}, [{"path": "x"}], 5])
def test_a_plugins_data_set_may_read_what_is_no_folder(photographs, tmp_path, register, root):
    class PackedDataset(BicubicSRDataset):
        def __init__(self, opt):
            super().__init__({**opt, "dataroot_gt": str(photographs), "gt_size": 16})

    data = {"type": register(DATASET_REGISTRY, PackedDataset), "dataroot_gt": root, "gt_size": 17}
    opt = plain_options(photographs)
    opt["datasets"]["train"] |= data
    check_all(tmp_path, opt)


def test_a_failing_augmentation_of_a_plugin_is_no_unreadable_picture(photographs, train, register):
    class AugmentingDataset(BicubicSRDataset):
        def __getitem__(self, index):
            return 1 / 0

    opt = plain_options(photographs, datasets__train__type=register(DATASET_REGISTRY, AugmentingDataset))
    refused(r"datasets\.train: AugmentingDataset fails on .* \(ZeroDivisionError", train, opt)


def test_a_key_twice_with_one_value_is_legal():
    assert load_yaml("path: {resume_state: ~, resume_state: ~}", "x") == {"path": {"resume_state": None}}
    for text in ("a: 1\na: 2", "a: ~\na: x", "a: {b: 1}\na: {b: 1}", "a: '1'\na: 1"):
        refused("the key 'a' is given twice, with different values", load_yaml, text, "x")


def test_the_forced_options_are_kept_with_the_training(photographs, train, tmp_path):
    opt = tiny_options(photographs, train__total_iter=1)
    folder = train(opt, "--force_yml", "network_g:num_feat=6", "train:optim_g:lr=1e-4")
    kept = read_options(str(folder / "options.yml"))
    set_option(opt, "network_g:num_feat", 6), set_option(opt, "train:optim_g:lr", 1e-4)
    assert kept == opt
    load_network(kept["network_g"], folder / "models/net_g_latest.pth", "params_ema")
    again = train(kept, root=tmp_path / "again")  # complete and usable again
    assert same(*(load_file(f / "models/net_g_latest.pth", "")["params"] for f in (folder, again)))


def test_without_forced_options_the_file_is_kept_as_it_is(photographs, train):
    opt = tiny_options(photographs, train__total_iter=1)
    text = (train(opt) / "options.yml").read_text("utf-8")
    assert text.endswith(yaml.safe_dump(opt, sort_keys=False)) and text.startswith("# 20")


def test_a_small_tile_needs_no_overlap():
    net = EDSR(3, 3, num_feat=4, num_block=1, upscale=2).eval()
    for tile, overlap in ((48, 24), (128, 32)):
        assert NetworkUpscaler(net, {"type": "EDSR", "num_in_ch": 3}, tile=tile).overlap == overlap
