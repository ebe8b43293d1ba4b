"""The published checkpoints of arXiv:2301.10575 as networks of BasicSR and this package.

The published networks take and give BGR in [-1, 1], ours RGB in [0, 1]. The weights of the first and last layers are
reordered for the channels, and the networks' options set the range, so results differ by rounding only.
"""

import re
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from basicsr.archs import build_network
from torch import Tensor

from tlw_basicsr.networks import check_fit
from tlw_basicsr.tools.recipes import COMPARISON, recipe
from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.files import load_file, save_file, write_text
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.yaml_options import load_yaml

HAT_BGR_MEAN = (0.4488, 0.4371, 0.4040)  # HAT subtracts it from its input in [-1, 1]


class Published(NamedTuple):
    """One published network."""

    names: dict[str, str | None]  # patterns of its tensors' names, and what they become; None: not used
    options: Options | None = None  # where those of the network that it becomes are not a recipe's
    first: str = "conv_first.weight"  # takes the image
    groups: int = 1  # images that follow each other in the input channels
    last: str = "conv_last"  # gives the image
    section: str = "network_g"  # of a YAML with its options


PUBLISHED = {
    "edsr": Published(
        {
            r"(sub|add)_mean\.(weight|bias)": None,
            r"head\.0\.(.*)": r"conv_first.\1",
            r"body\.16\.(.*)": r"conv_after_body.\1",
            r"body\.(\d+)\.body\.0\.(.*)": r"body.\1.conv1.\2",
            r"body\.(\d+)\.body\.2\.(.*)": r"body.\1.conv2.\2",
            r"tail\.0\.(.*)": r"upsample.\1",
            r"tail\.1\.(.*)": r"conv_last.\1",
        },
    ),
    "vdsr": Published(
        {
            r"conv1\.0\.(.*)": r"conv_first.\1",
            r"trunk\.(\d+)\.conv\.(.*)": r"body.\1.\2",
            r"conv2\.(.*)": r"conv_last.\1",
        },
    ),
    "rcan": Published(
        {
            r"sf\.(.*)": r"conv_first.\1",
            r"rgs\.(\d+)\.module\.20\.(.*)": r"body.\1.conv.\2",
            r"rgs\.(\d+)\.module\.(\d+)\.module\.(0|2)\.(.*)": r"body.\1.residual_group.\2.rcab.\3.\4",
            r"rgs\.(\d+)\.module\.(\d+)\.module\.3\.module\.(.*)": r"body.\1.residual_group.\2.rcab.3.attention.\3",
            r"conv1\.(.*)": r"conv_after_body.\1",
            r"upscale\.0\.(.*)": r"upsample.0.\1",
            r"conv2\.(.*)": r"conv_last.\1",
        },
    ),
    "hat": Published(
        {r"net\.(.*)": r"\1"},
        {"rgb_mean": [(1 + m) / 2 for m in reversed(HAT_BGR_MEAN)]},  # 2v - 1 - m = 2(v - (1 + m) / 2)
    ),
    "weight": Published(
        {r"(conv\..*)": r"\1"},
        {"type": "TLWWeightNet", "num_feat": 64},
        first="conv.0.weight",
        groups=2,
        last="conv.9",
        section="network_w",
    ),
}


def convert(path: Path, net: str, scale: int | None = None) -> tuple[dict[str, Tensor], Options]:
    """Read a published checkpoint; return a state dict and the options of the network that it belongs to.

    ``net`` is a key of :data:`PUBLISHED`; ``scale`` is None if only one is published, or if the network has none.
    """
    published, network = PUBLISHED[net], net.upper()
    scales, _ = COMPARISON.get(network, ((), ()))  # a weighting network has none
    if scale is None and len(scales) == 1:
        scale = scales[0]
    if scales and scale not in scales:
        given = "missing" if scale is None else scale
        raise UserError(f"--scale: {given}; published for {net} are {', '.join(map(str, scales))}")
    state = {}
    for name, tensor in load_file(path, "IN.pth").items():
        if not torch.is_tensor(tensor):
            raise UserError(
                f"IN.pth: {path} holds more than tensors, {type(tensor).__name__} under {short(name)}; expected is a "
                "plain state dict, as it was published"
            )
        ours = _rename(str(name).removeprefix("module."), published.names)
        if ours is None:
            raise UserError(f"IN.pth: {path} is no published {net}: it has a tensor {name!r:.80}")
        if ours:
            state[ours] = tensor
    options = load_yaml(recipe(f"{network}_L1TLW_x{scale}"), net)["network_g"] if scales else {}
    options |= published.options or {}
    model = build_network(dict(options))
    try:
        check_fit(state, model, True, path, f"IN.pth as {f'{net} ×{scale}' if scales else net}")
    except UserError as error:
        shapes = [{name: tensor.shape for name, tensor in s.items()} for s in (state, model.state_dict())]
        hint = "" if shapes[0] == shapes[1] else "; check --net and --scale"
        raise UserError(f"{error}{hint}") from error
    flip_channels(state, published)
    return state, options


def _rename(name: str, names: dict[str, str | None]) -> str | None:
    """Return our name of a published tensor: empty if it is not used, None if it is unknown."""
    for pattern, ours in names.items():
        if match := re.fullmatch(pattern, name):
            return match.expand(ours or "")
    return None


def flip_channels(state: dict[str, Tensor], published: Published) -> None:
    """Turn BGR into RGB, in place: in the input of the first layer and in the output of the last."""
    order = [3 * group + channel for group in range(published.groups) for channel in (2, 1, 0)]
    state[published.first] = state[published.first][:, order].contiguous()
    for name in (f"{published.last}.weight", f"{published.last}.bias"):
        if name in state:
            state[name] = state[name][[2, 1, 0]].contiguous()


def convert_file(source: Path, target: Path, net: str, scale: int | None = None) -> Path:
    """Write ``target`` as ``{'params': …}`` and beside it a YAML that names it; return the path of the YAML."""
    state, options = convert(source, net, scale)
    section = PUBLISHED[net].section
    factor = options.get("upscale")
    head = f"# the network of {target.name}, converted from a published checkpoint ({net}"
    head += f", ×{factor})\nscale: {factor}\n" if factor else ")\n"
    save_file({"params": state}, target)
    content = {section: options, "path": {f"pretrain_{section}": str(target)}}
    options_path = target.with_suffix(".yml")
    write_text(head + yaml.safe_dump(content, sort_keys=False), options_path)
    return options_path
