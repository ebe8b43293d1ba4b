"""A network trained here is an ordinary file: BasicSR's own code and spandrel read it."""

import re

import cv2
import pytest
import torch
from basicsr.archs import build_network
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel import ModelLoader
from spandrel.architectures.RCAN import RCAN

from tests.conftest import as_tensor, photograph, plain_options, tiny_options, write_yaml
from tests.helpers import SWINIR, run_python, write_pairs
from tlw_basicsr.util.files import load_file

# spandrel knows RRDBNet with num_grow_ch 32, the published one
RRDB = {
    "type": "RRDBNet", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "num_grow_ch": 32, "scale": 4,
}  # fmt: skip
# a state dict does not hold img_range and mean: spandrel takes the published networks' 1 and DIV2K's mean
HAT = {
    "type": "TLWHAT", "upscale": 2, "window_size": 8, "embed_dim": 12, "depths": [2], "num_heads": [2],
    "mlp_ratio": 2, "compress_ratio": 3, "squeeze_factor": 4, "overlap_ratio": 0.5, "img_range": 1.0, "rgb_mean": [0.4488, 0.4371, 0.4040],
}  # fmt: skip
RCAN_OF_SPANDREL = {
    "type": "RCAN_spandrel",
    "scale": 2,
    "n_resgroups": 1,
    "n_resblocks": 1,
    "n_feats": 8,
    "reduction": 4,
}
NETWORKS = {"ESRGAN": RRDB, "SwinIR": SWINIR | {"img_size": 16, "img_range": 1.0}, "HAT": HAT, "RCAN": RCAN_OF_SPANDREL}
if "RCAN_spandrel" not in ARCH_REGISTRY:  # as a plugin registers a network
    ARCH_REGISTRY._do_register("RCAN_spandrel", RCAN)
# BasicSR needs its imports mended with today's torchvision, which is no part of loading the network
THEIR_TEST = """
import sys, types, torchvision.transforms.functional as functional
name = "torchvision.transforms.functional_tensor"
sys.modules[name] = types.ModuleType(name)
sys.modules[name].rgb_to_grayscale = functional.rgb_to_grayscale
from basicsr.test import test_pipeline
test_pipeline(".")
assert not [name for name in sys.modules if name.startswith("tlw_basicsr")]
"""


@pytest.mark.parametrize("architecture", NETWORKS)
def test_what_tlw_has_trained_loads_in_spandrel_and_in_basicsr(photographs, train, script, tmp_path, architecture):
    network = NETWORKS[architecture]
    scale = network.get("scale") or network["upscale"]
    changes = {"train__total_iter": 2, "train__ema_decay": 0, "scale": scale, "network_g": network}
    changes["base_model"] = "SwinIRModel" if architecture == "SwinIR" else "SRModel"
    path = train(tiny_options(photographs, **changes)) / "models/net_g_latest.pth"

    net = build_network(dict(network))
    SRModel.load_network(SRModel.__new__(SRModel), net, str(path))  # BasicSR's own loading code
    net.eval()
    image = as_tensor(photograph(height=32, width=48))
    script("export.py", "net.safetensors", "--network", network, "--checkpoint", path)
    for file in (path, tmp_path / "net.safetensors"):
        descriptor = ModelLoader().load_from_file(str(file))
        assert (descriptor.architecture.id, descriptor.scale) == (architecture, scale)
        with torch.no_grad():  # copies, because RCAN writes to its input
            assert torch.allclose(descriptor.model.eval()(image.clone()), net(image.clone()), atol=1e-6)


def test_basicsrs_own_test_script_runs_it_without_this_package(photographs, train, tmp_path):
    trained = train(tiny_options(photographs, train__total_iter=2)) / "models/net_g_latest.pth"
    opt = plain_options(photographs, name="theirs", num_gpu=0, train=..., logger=...)
    opt["datasets"] = {"test": write_pairs(tmp_path)}
    opt["path"] = {"pretrain_network_g": str(trained), "strict_load_g": True, "param_key_g": "params_ema"}
    opt["val"] = {"save_img": True, "suffix": None, "metrics": {"psnr": {"type": "calculate_psnr", "crop_border": 2}}}
    write_yaml(tmp_path, opt)
    done = run_python(tmp_path, "-c", THEIR_TEST, "-opt", "options.yml")
    assert re.search(r"# psnr: \d+\.\d+", done.stdout + done.stderr)
    net = build_network(dict(opt["network_g"])).eval()
    net.load_state_dict(load_file(trained, "")["params_ema"])
    lq = cv2.imread(str(tmp_path / "lq/a.png"))
    with torch.no_grad():
        expected = net(as_tensor(lq[..., ::-1].copy()))[0].clamp(0, 1).permute(1, 2, 0).numpy()[..., ::-1] * 255
    theirs = cv2.imread(str(next((tmp_path / "results/theirs").rglob("a_*.png"))))
    assert abs(theirs - expected).max() <= 0.51
