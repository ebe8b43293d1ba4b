"""Today's trainings end where they ended before the code was last reshaped: every network, after 8 iterations."""

import hashlib
import math

import pytest
import torch

from tests.conftest import control_options, plain_options, tiny_options
from tests.helpers import GAN
from tlw_basicsr.util import files

TRAININGS = {
    "l1": (tiny_options, {}),
    "mse": (tiny_options, {"train__pixel_opt__base": "mse"}),
    "deterministic": (tiny_options, {"train__pixel_opt__stochastic": False, "train__tlw__k_unit": "iter"}),
    "fast": (tiny_options, {"train__tlw__preset": "fast", "train__accumulation_steps": 2}),
    "paper": (tiny_options, {"network_w__init": "paper", "train__init_g": "paper"}),
    "esrgan": (tiny_options, {"base_model": "ESRGANModel", "train__clip_grad_norm": 1.0, **GAN}),
    "random": (lambda photographs, **c: control_options(photographs, "random", **c), {}),
    "error": (lambda photographs, **c: control_options(photographs, "error", **c), {}),
    "plain": (plain_options, {}),
}
# a batch norm follows these biases: their gradients are rounding, and its mean goes with them
WITHOUT_EFFECT = [f"conv.{i}.bias" for i in (0, 3, 6)] + [f"conv.{i}.running_mean" for i in (1, 4, 7)]
PINNED = {
    "l1": {"net_g params": -3.5998079, "net_g params_ema": -3.5631469, "net_w params": 25.8597373},
    "mse": {"net_g params": -3.6026338, "net_g params_ema": -3.5641385, "net_w params": 25.8573418},
    "deterministic": {"net_g params": -3.5784079, "net_g params_ema": -3.5523270, "net_w params": 25.8638450},
    "fast": {"net_g params": -3.5646974, "net_g params_ema": -3.5401192, "net_w params": 19.4551259},
    "paper": {"net_g params": 0.7410027, "net_g params_ema": 0.7625459, "net_w params": 21.5150011},
    "esrgan": {
        "net_d params": 3.5418732,
        "net_g params": -3.5990462,
        "net_g params_ema": -3.5607189,
        "net_w params": 26.0064079,
    },
    "random": {"net_g params": -3.5896642, "net_g params_ema": -3.5564711},
    "error": {"net_g params": -3.5689249, "net_g params_ema": -3.5465932},
    "plain": {"net_g params": -3.5822820, "net_g params_ema": -3.5525179},
}


def fingerprint(experiment):
    """Of every network: the sum of its numbers, each with a factor that tells its place."""
    sums, bits = {}, hashlib.sha256()
    for path in sorted(experiment.glob("models/*_8.pth")):
        for key, state in sorted(files.load_file(path, "").items()):
            for tensor in state.values():
                bits.update(tensor.numpy().tobytes())
            numbers = torch.cat([t.double().flatten() for name, t in state.items() if name not in WITHOUT_EFFECT])
            factors = torch.cos(torch.arange(len(numbers), dtype=torch.float64))
            sums[f"{path.stem.removesuffix('_8')} {key}"] = (numbers * factors).sum().item()
    return sums, bits.hexdigest()[:16]


@pytest.mark.parametrize("name", TRAININGS)
def test_the_networks_are_those_of_before(photographs, train, name):
    options, changes = TRAININGS[name]
    sums, bits = fingerprint(train(options(photographs, **changes)))
    print(f'    "{name}": {sums},  # {bits}')  # by pytest -s, to compare bits on one machine
    assert sums.keys() == PINNED[name].keys()
    for network, value in sums.items():  # to some digits: other processors and versions of torch round otherwise
        assert math.isclose(value, PINNED[name][network], rel_tol=1e-4, abs_tol=1e-4), network
