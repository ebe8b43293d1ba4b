"""Draw what a weighting network does on one image, or say in numbers what weightings do on a folder of images.

  tlw weights --opt TRAINING.yml --image HR.png            # one figure that explains the method
  tlw weights --opt TRAINING.yml --image HR.png --strip    # the weights over the training
  tlw weights --opt TRAINING.yml --data datasets/Set5      # a table and a plot: learned weights, and others beside them
  tlw weights --opt TRAINING.yml --data datasets/Set5 --strip   # the learned weights over the training

The networks are the newest of experiments/NAME/models, NAME from the YAML; --experiment names another folder, --iter
another iteration, --net_g and --net_w two files. Without a YAML, --network_g, --network_w and --distance give the
options.
"""

import argparse
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from tlw_basicsr.commands import parser_of
from tlw_basicsr.core.arguments import FRACTION
from tlw_basicsr.core.weightings import ErrorWeights, LDLWeights, PSPLWeights
from tlw_basicsr.data.images import image_size
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.losses.tlw_loss import PAPER_DISTANCE, complete_economy, describe_options
from tlw_basicsr.networks import get_section, load_network
from tlw_basicsr.pictures import Frame, find_probabilities, method_figure, strip_figure
from tlw_basicsr.tools.evaluation import FIELD, pairs, read_pair
from tlw_basicsr.tools.experiment import Trained, build_distance, find_k, list_iterations, load_trained
from tlw_basicsr.tools.report import json_text
from tlw_basicsr.tools.weight_maps import describe_set, map_of, write_rows
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options, check_section
from tlw_basicsr.util.yaml_options import load_yaml


def read_all_options(args: argparse.Namespace) -> Options:
    """The options of the two networks, ``train.tlw`` and the distance, from the YAML and the arguments."""
    opt = read_options(args.opt) if args.opt else {"name": "", "train": {}}
    complete_economy(opt)
    for key in ("network_g", "network_w"):
        text = getattr(args, key)
        if text:
            opt[key] = load_yaml(text, f"--{key}")
        if key not in opt:
            missing = "--opt or " if not args.opt else f"{args.opt} has none; it may be of a control or without TLW; "
            raise UserError(f"--{key}: missing; {missing}--{key} gives the network's options")
    train = get_section(opt, "train")
    kinds = {name: option.kind for name, option in describe_options().items()}
    check_section(train.get("tlw") or {}, "train.tlw", kinds)
    distance = get_section(train, "pixel_opt", "train").get("distance") or PAPER_DISTANCE
    opt["distance"] = load_yaml(args.distance, "--distance") if args.distance else distance
    return opt


OTHERS = {"error": ErrorWeights, "LDL": LDLWeights, "PSPL, σ = 1": PSPLWeights}


class Moment(NamedTuple):
    """The networks of an iteration, or of two files."""

    trained: Trained
    net_w: nn.Module
    k: float
    iteration: int | None


def load_moments(args: argparse.Namespace, opt: Options) -> Iterator[Moment]:
    """The networks of ``--net_g`` and ``--net_w``, of ``--iter``, of several with ``--strip``, or the newest."""
    models = (args.experiment or Path("experiments", str(opt.get("name")))) / "models"
    if args.net_g:
        number = re.search(r"_(\d+)\.pth$", args.net_w.name)
        chosen = [args.iter if args.iter is not None else int(number[1]) if number else None]
        models = args.net_w.parent
    else:
        available = list_iterations(models)
        if args.iter is not None and args.iter not in available:
            raise UserError(f"--iter: {args.iter} is not in {models}; accepted are {', '.join(map(str, available))}")
        spread = np.linspace(0, len(available) - 1, min(args.columns, len(available))).round().astype(int)
        chosen = [available[i] for i in spread] if args.strip else [args.iter or available[-1]]
    for iteration in tqdm(chosen, unit="network", disable=None):
        trained = load_trained(opt, args.net_g or models / f"net_g_{iteration}.pth", args.param_key)
        net_w = load_network(opt["network_w"], args.net_w or models / f"net_w_{iteration}.pth", key="network_w")
        yield Moment(trained, net_w, args.k if args.k is not None else find_k(opt, models, iteration), iteration)


def report(args: argparse.Namespace, values: dict[str, Any], text: str) -> None:
    """Print the values, or with ``--json`` as JSON alone."""
    print(json_text(values) if args.json else text)


def describe(args: argparse.Namespace, moments: Iterable[Moment], options: Options) -> None:
    """Write the numbers of the weights on the folder ``--data``: of every moment, or beside other weightings."""
    rows, distance = [], build_distance(options, "distance")
    for moment in moments:
        maps = {"learned": find_probabilities(moment.net_w)}
        if args.strip:
            maps = {f"iteration {moment.iteration:,}": maps["learned"]}
        else:
            maps |= {label: map_of(weighting()) for label, weighting in OTHERS.items()}
        upscale = moment.trained.upscaler("cpu")
        rows += describe_set(pairs(args.data, upscale.scale, FIELD), upscale, maps, moment.k, distance)
    out = args.out or Path("weights_data.png")
    k = "" if args.strip else f", mean k = {moment.k:.2f}"
    table = write_rows(rows, out, f"Weights on {args.data.name}{k}")
    files = f"{out}, {out.with_suffix('.csv')}; {moment.trained}"
    report(args, {"file": str(out), "rows": rows}, f"{table}\n{files}")


def draw(args: argparse.Namespace, moments: Iterable[Moment], options: Options) -> None:
    """Draw the weights of every moment on ``--image``: a strip, or one figure."""
    name, frames = Path(args.image).name, []
    gt_size = image_size(Path(args.image), "--image")
    lq_size = image_size(Path(args.lq), "--lq") if args.lq else None
    for trained, net_w, k, iteration in moments:
        upscale = trained.upscaler("cpu")
        expected = tuple(side // upscale.scale for side in gt_size)
        if lq_size and lq_size != expected:
            sides = f"{expected[0]}×{expected[1]} (1/{upscale.scale} of --image)"
            raise UserError(f"--lq: {args.lq} is {lq_size[0]}×{lq_size[1]}, not {sides}")
        pair = read_pair(args.image, upscale.scale, FIELD, args.lq)
        sides = pair.gt.shape[2:]
        top, left, height, width = args.crop or (0, 0, *sides)
        if min(top, left, height - 1, width - 1) < 0 or top + height > sides[0] or left + width > sides[1]:
            raise UserError(f"--crop: {args.crop} is not within the {sides[0]}×{sides[1]} of {args.image}")
        crop = (slice(top, top + height), slice(left, left + width))
        sr, part = upscale(pair.lq).clamp(0, 1), (0, ..., *crop)
        if args.strip:
            assert iteration is not None  # of a training
            frames.append(Frame(iteration, k, sr[part], net_w(sr, pair.gt, k)[part]))
    if args.strip:
        out = args.out or Path("weights_strip.png")
        strip_figure(pair.gt[part], frames, out, f"Error and weights over the training (means of RGB), {name}")
        iterations = [frame.iteration for frame in frames]
        text = f"{out}: iterations {', '.join(map(str, iterations))}"
        return report(args, {"file": str(out), "iterations": iterations}, text)
    out = args.out or Path("weights.png")
    label = f"{name}, iteration {iteration:,}" if iteration is not None else name
    title = f"{label}, $D$: {options['type']}"
    values = method_figure(net_w, k, build_distance(options, "distance"), sr[0], pair.gt[0], out, title, crop)
    text = ", ".join(f"{key} {value:.4f}" for key, value in values.items())
    report(args, {"file": str(out), "iteration": iteration, **values}, f"{out}: {text}; {trained}")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, draw."""
    parser = parser_of("weights", __doc__)
    parser.add_argument("--opt", metavar="YAML", help="training YAML")
    parser.add_argument("--network_g", metavar="OPTIONS", help="SR network, such as '{type: EDSR, num_in_ch: 3, …}'")
    parser.add_argument("--network_w", metavar="OPTIONS", help="weighting network, such as '{type: TLWWeightNet}'")
    parser.add_argument("--distance", metavar="OPTIONS", help="D, such as '{type: SSIMDistance}'; default: the YAML's")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--image", help="HR image")
    what.add_argument("--data", type=Path, help="folder of HR images; their LR images are made of them")
    parser.add_argument("--lq", help="LR image, with --image; default: MATLAB's bicubic of HR")
    parser.add_argument("--experiment", type=Path, help="folder of the training; default: experiments/NAME")
    parser.add_argument("--iter", type=int, help="iteration; default: the last one saved")
    parser.add_argument("--net_g", type=Path, help="checkpoint of the SR network, with --net_w")
    parser.add_argument("--net_w", type=Path, help="checkpoint of the weighting network, with --net_g")
    parser.add_argument("--param_key", choices=("params_ema", "params"), default="params_ema", help="of the SR network")
    parser.add_argument("--k", type=float, help="mean of the weights; default: what it was in the training")
    parser.add_argument("--crop", type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"), help="part to show")
    parser.add_argument("--strip", action="store_true", help="show the weights over the training")
    parser.add_argument("--columns", type=int, default=6, help="iterations in the strip (default 6)")
    parser.add_argument("--json", action="store_true", help="print the values as JSON, for scripts")
    parser.add_argument("--out", type=Path, help="file to write; default: weights.png and the like")
    args = parser.parse_args(argv)
    if args.k is not None and not FRACTION.accepts(args.k):
        raise UserError(f"--k: expected {FRACTION.text}, got {args.k}")
    if args.columns < 1:
        raise UserError(f"--columns: expected a number of at least 1, got {args.columns}")
    if args.strip and args.iter is not None:
        raise UserError("--iter: not with --strip, which draws iterations from the first to the last; see --columns")
    for option in ("lq", "crop") if args.data else ():
        if getattr(args, option):
            raise UserError(f"--{option}: with --image alone, not with --data")
    if (args.net_g is None) != (args.net_w is None):
        raise UserError("--net_g, --net_w: expected both or neither")
    if args.strip and args.net_g:
        raise UserError("--strip: needs the files of a training; expected --experiment instead of --net_g and --net_w")
    opt = read_all_options(args)
    (describe if args.data else draw)(args, load_moments(args, opt), opt["distance"])
