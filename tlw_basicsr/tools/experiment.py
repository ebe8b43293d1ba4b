"""The files of a training: its networks, found by its YAML and loaded, the iterations, k and the distance D."""

import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.core.arguments import FRACTION, STR
from tlw_basicsr.core.functional import Distance, k_schedule
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.losses.tlw_loss import complete_economy, split_options
from tlw_basicsr.models.validation import describe_average
from tlw_basicsr.networks import find_device, get_section, is_safetensors, load_network, of_file
from tlw_basicsr.registry import check_arguments, lookup
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.errors import UserError, expanded, short
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.yaml_options import load_yaml


@dataclass(frozen=True)
class Trained:
    """An SR network with the weights of a file."""

    net: nn.Module  # in eval mode on the CPU
    options: Options  # network_g
    path: Path
    entry: str  # params_ema or params, with a warning of a young average; empty for a file that is a state dict
    normalization: Options  # mean and std of the data sets that its images come from, or empty

    def __str__(self) -> str:
        return f"{self.path} ({self.entry})" if self.entry else str(self.path)

    def named(self, label: str) -> str:
        """A result's label with the entry that it was made of, such as ``TLW (params_ema)``."""
        entry = self.entry.partition(",")[0]
        return f"{label} ({entry})" if entry else label

    def upscaler(
        self, device: str = "auto", scale: int | None = None, origin: object = "", **more: Any
    ) -> NetworkUpscaler:
        """The network as an upscaler of whole images, or with ``more`` arguments."""
        more |= {"device": find_device(device), "normalization": self.normalization}
        upscale = NetworkUpscaler(self.net, self.options, **more)
        if scale is not None and upscale.scale != scale:
            raise UserError(f"--scale: {scale}, but the network of {origin} is of scale {upscale.scale}")
        return upscale


def load_sr_network(args: Namespace) -> Trained:
    """The SR network that the arguments of a command name, see :func:`tlw_basicsr.commands.add_network_arguments`."""
    if args.model is not None:
        if args.checkpoint:
            raise UserError("--checkpoint: not with --model, which is the checkpoint")
        return load_trained({"network_g": of_file(args.model)}, args.model, args.param_key)
    if args.network is not None:
        opt = {"network_g": load_yaml(args.network, "--network")}
    else:
        opt = read_options(str(args.opt), allow_plugins=args.allow_plugins)
    return load_trained(opt, args.checkpoint, args.param_key)


def load_trained(opt: Options, checkpoint: str | Path | None = None, param_key: str = "params_ema") -> Trained:
    """``network_g`` of the options with the weights of ``checkpoint``, by default those of :func:`find_checkpoint`."""
    path = Path(checkpoint or find_checkpoint(opt, "g"))
    net = load_network(opt.get("network_g"), path, param_key)
    content = {} if is_safetensors(path) else load_file(path, "checkpoint")
    entry = next((key for key in (param_key, "params") if isinstance(content.get(key), dict)), "")
    age = describe_age(opt, path) if entry == "params_ema" else ""
    return Trained(net, opt["network_g"], path, entry + age, find_normalization(opt))


def find_normalization(opt: Options) -> Options:
    """``mean`` and ``std`` of the first data set that normalises its images; empty if none does."""
    sets = get_section(opt, "datasets").values()
    found = [each for each in sets if isinstance(each, dict) and each.get("mean") and each.get("std")]
    return {key: found[0][key] for key in ("mean", "std")} if found else {}


def describe_age(opt: Options, path: Path) -> str:
    """What is to be known of a checkpoint's ``params_ema``: nothing, or that the average is young."""
    train = get_section(opt, "train")
    found = re.search(r"_(\d+)\.pth$", path.name)
    decay, iterations = train.get("ema_decay", 0), int(found[1]) if found else train.get("total_iter", 0)
    known = all(isinstance(value, (int, float)) for value in (decay, iterations))
    return describe_average(decay, iterations) if known else ""


def find_checkpoint(opt: Options, label: str) -> Path:
    """The checkpoint that a YAML names for ``network_{label}``, else the newest of its training in this folder."""
    key = f"pretrain_network_{label}"
    named = get_section(opt, "path").get(key)
    if named is not None and not STR.accepts(named):
        raise UserError(f"path.{key}: expected the path of a checkpoint, or ~, got {short(named)}")
    path = Path("experiments", str(opt.get("name")), "models", f"net_{label}_latest.pth")
    if not named and not path.is_file():
        raise UserError(f"--checkpoint: missing; the options name no path.{key}, and {path} does not exist")
    return expanded(named, f"path.{key}") if named else path


def list_iterations(models: Path) -> list[int]:
    """The iterations whose two networks lie in the folder ``models``, sorted."""
    g, w = ({path.stem.removeprefix(f"net_{n}_") for path in models.glob(f"net_{n}_*.pth")} for n in "gw")
    if not (both := [int(iteration) for iteration in g & w if iteration.isdecimal()]):
        raise UserError(
            f"--experiment: {models} holds no pair net_g_ITER.pth, net_w_ITER.pth; a training saves one every "
            "logger.save_checkpoint_freq iterations"
        )
    return sorted(both)


def find_k(opt: Options, models: Path, iteration: int | None) -> float:
    """The mean k of the weights at an iteration: that in the training's state, else the schedule's."""
    if iteration is not None:
        state = models.parent / "training_states" / f"{iteration}.state"
        if state.is_file():
            tlw = load_file(state, "--iter").get("tlw")
            k = tlw.get("k") if isinstance(tlw, dict) else None
            if k is None or not FRACTION.accepts(k):
                raise UserError(f"--k: missing; {state} should hold {FRACTION.text} as tlw.k, it holds {short(k)}")
            return k
    own, arguments = split_options(get_section(get_section(opt, "train"), "tlw", "train"))
    if own.k_unit == "iter" and iteration is not None:
        schedule = {key: arguments[key] for key in ("k_start", "k_end", "k_decay") if key in arguments}
        return k_schedule(iteration - 1, **schedule)
    raise UserError("--k: missing; there is no training state with it here, and no iteration to compute it from")


def load_weighting(opt: Options, models: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The newest weighting network in a training's folder, with the k of its iteration; None if there is none."""
    complete_economy(opt)
    if "network_w" not in opt or not any(models.glob("net_w_[0-9]*.pth")):
        return None
    iteration = list_iterations(models)[-1]
    net_w = load_network(opt["network_w"], models / f"net_w_{iteration}.pth", key="network_w")
    return partial(net_w, k=find_k(opt, models, iteration))


def build_distance(options: Options, place: str) -> Distance:
    """D by its options."""
    arch = lookup(LOSS_REGISTRY, options, place)
    check_arguments(options, place, arch)
    return arch(**{key: value for key, value in options.items() if key != "type"})
