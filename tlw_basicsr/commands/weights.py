"""Draw what a weighting network does on one image, or how its weights change over a training.

  tlw weights --opt TRAINING.yml --image HR.png            # one figure that explains the method
  tlw weights --opt TRAINING.yml --image HR.png --strip    # a strip of w over the training

The networks are the newest of experiments/NAME/models, NAME from the YAML; --experiment names another folder, --iter
another iteration, --net_g and --net_w two files. Without a YAML, --network_g, --network_w and --distance give the
options.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from basicsr.utils import FileClient, img2tensor
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor

from tlw_basicsr.commands import parser_of
from tlw_basicsr.core.functional import k_schedule
from tlw_basicsr.data.bicubic_sr_dataset import lq_of_crop
from tlw_basicsr.data.images import read_image
from tlw_basicsr.engine.options import TLW, read_options
from tlw_basicsr.models.tlw_model import complete_economy, split_options
from tlw_basicsr.networks import get_section, load_network
from tlw_basicsr.pictures import ALL, Frame, method_figure, strip_figure
from tlw_basicsr.registry import check_arguments, lookup
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.files import load_file
from tlw_basicsr.util.kinds import FRACTION, Options, check_section
from tlw_basicsr.util.yaml_options import load_yaml


def options_of(args: argparse.Namespace) -> Options:
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
    check_section(train.get("tlw") or {}, "train.tlw", TLW)
    distance = get_section(train, "pixel_opt", "train").get("distance") or {"type": "LPIPSDistance", "net": "vgg"}
    opt["distance"] = load_yaml(args.distance, "--distance") if args.distance else distance
    check_arguments(opt["distance"], "distance", lookup(LOSS_REGISTRY, opt["distance"], "distance"))
    return opt


def read_pair(args: argparse.Namespace, scale: int) -> tuple[Tensor, Tensor]:
    """LR and HR image (3, H, W), RGB in [0, 1]. Without ``--lq``, LR is the 8-bit bicubic of HR cut to the scale."""
    client = FileClient("disk")
    gt = read_image(client, args.image)
    height, width = (side // scale for side in gt.shape[:2])
    if min(height, width) < 4:
        raise UserError(f"--image: {args.image} is too small for scale {scale}")
    gt = gt[: height * scale, : width * scale]
    lq = read_image(client, args.lq) if args.lq else lq_of_crop(gt, 0, 0, height, width, scale, True)
    if lq.shape[:2] != (height, width):
        raise UserError(f"--lq: {args.lq} is {lq.shape[0]}×{lq.shape[1]}, not {height}×{width} (1/{scale} of --image)")
    lq, gt = img2tensor([np.ascontiguousarray(lq), np.ascontiguousarray(gt)])
    return lq, gt


def k_of(args: argparse.Namespace, opt: Options, models: Path, iteration: int | None) -> float:
    """k of an iteration: ``--k``, else that in the training's state, else the schedule's."""
    if args.k is not None:
        return args.k
    if iteration is not None:
        state = models.parent / "training_states" / f"{iteration}.state"
        if state.is_file():
            tlw = load_file(state, "--iter").get("tlw")
            k = tlw.get("k") if isinstance(tlw, dict) else None
            if k is None or not FRACTION.accepts(k):
                raise UserError(f"--k: missing; {state} should hold {FRACTION.text} as tlw.k, it holds {short(k)}")
            return k
    own, arguments = split_options((opt.get("train") or {}).get("tlw"))
    if own.k_unit == "iter" and iteration is not None:
        schedule = {key: arguments[key] for key in ("k_start", "k_end", "k_decay") if key in arguments}
        return k_schedule(iteration - 1, **schedule)
    raise UserError("--k: missing; there is no training state with it here, and no iteration to compute it from")


def iterations_of(models: Path) -> list[int]:
    """The iterations of which both networks lie in ``models``, sorted."""
    found = [
        {int(m[1]) for p in models.glob(f"net_{n}_*.pth") if (m := re.fullmatch(rf"net_{n}_(\d+)\.pth", p.name))}
        for n in "gw"
    ]
    if not (both := sorted(found[0] & found[1])):
        raise UserError(f"--experiment: {models} holds no pair net_g_ITER.pth, net_w_ITER.pth")
    return both


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, draw."""
    parser = parser_of("weights", __doc__)
    parser.add_argument("--opt", metavar="YAML", help="training YAML")
    parser.add_argument("--network_g", metavar="OPTIONS", help="SR network, such as '{type: EDSR, num_in_ch: 3, …}'")
    parser.add_argument("--network_w", metavar="OPTIONS", help="weighting network, such as '{type: TLWWeightNet}'")
    parser.add_argument("--distance", metavar="OPTIONS", help="D, such as '{type: SSIMDistance}'; default: the YAML's")
    parser.add_argument("--image", required=True, help="HR image")
    parser.add_argument("--lq", help="LR image; default: MATLAB's bicubic of HR")
    parser.add_argument("--experiment", type=Path, help="folder of the training; default: experiments/NAME")
    parser.add_argument("--iter", type=int, help="iteration; default: the last one saved")
    parser.add_argument("--net_g", type=Path, help="checkpoint of the SR network, with --net_w")
    parser.add_argument("--net_w", type=Path, help="checkpoint of the weighting network, with --net_g")
    parser.add_argument("--param_key", choices=("params_ema", "params"), default="params_ema", help="of the SR network")
    parser.add_argument("--k", type=float, help="mean of the weights; default: what it was in the training")
    parser.add_argument("--crop", type=int, nargs=4, metavar=("TOP", "LEFT", "HEIGHT", "WIDTH"), help="part to show")
    parser.add_argument("--strip", action="store_true", help="draw w over the training")
    parser.add_argument("--columns", type=int, default=6, help="iterations in the strip (default 6)")
    parser.add_argument("--out", type=Path, help="file to write; default: weights.png or weights_strip.png")
    args = parser.parse_args(argv)
    if args.k is not None and not FRACTION.accepts(args.k):
        raise UserError(f"--k: expected {FRACTION.text}, got {args.k}")
    if args.columns < 1:
        raise UserError(f"--columns: expected a number of at least 1, got {args.columns}")
    if args.strip and args.iter is not None:
        raise UserError("--iter: not with --strip, which draws iterations from the first to the last; see --columns")
    for option in ("image", "lq"):
        path = getattr(args, option)
        if path and not Path(path).exists():
            raise UserError(f"--{option}: {path} does not exist")
    if (args.net_g is None) != (args.net_w is None):
        raise UserError("--net_g, --net_w: expected both or neither")
    if args.strip and args.net_g:
        raise UserError("--strip: needs the files of a training; expected --experiment instead of --net_g and --net_w")
    opt = options_of(args)
    models = (args.experiment or Path("experiments", str(opt.get("name")))) / "models"
    if args.net_g:
        number = re.search(r"_(\d+)\.pth$", args.net_w.name)
        chosen = [args.iter if args.iter is not None else int(number[1]) if number else None]
        models = args.net_w.parent
    else:
        there = iterations_of(models)
        if args.iter is not None and args.iter not in there:
            raise UserError(f"--iter: {args.iter} is not in {models}; accepted are {', '.join(map(str, there))}")
        spread = np.linspace(0, len(there) - 1, min(args.columns, len(there))).round().astype(int)
        chosen = [there[i] for i in spread] if args.strip else [args.iter or there[-1]]

    name, frames = Path(args.image).name, []
    for iteration in chosen:
        path_g = args.net_g or models / f"net_g_{iteration}.pth"
        path_w = args.net_w or models / f"net_w_{iteration}.pth"
        net_g = load_network(opt["network_g"], path_g, args.param_key)
        net_w = load_network(opt["network_w"], path_w, key="network_w")
        k = k_of(args, opt, models, iteration)
        upscale = NetworkUpscaler(net_g, opt["network_g"])
        lq, gt = read_pair(args, upscale.scale)
        crop = ALL
        if args.crop:
            top, left, height, width = args.crop
            if min(top, left, height - 1, width - 1) < 0 or top + height > gt.shape[1] or left + width > gt.shape[2]:
                raise UserError(f"--crop: {args.crop} is not within the {gt.shape[1]}×{gt.shape[2]} of {args.image}")
            crop = (slice(top, top + height), slice(left, left + width))
        sr = upscale(lq[None])[0].clamp(0, 1)
        if args.strip:
            w = net_w(sr[None], gt[None], k)[0]
            part = (..., *crop)
            assert iteration is not None  # of a training
            frames.append(Frame(iteration, k, sr[part], w[part]))
    if args.strip:
        out = args.out or Path("weights_strip.png")
        strip_figure(gt[part], frames, out, f"Error and weights over the training (means of RGB), {name}")
        print(f"{out}: iterations {', '.join(str(frame.iteration) for frame in frames)}")
        return
    options = {key: value for key, value in opt["distance"].items() if key != "type"}
    distance = LOSS_REGISTRY.get(opt["distance"]["type"])(**options)
    out = args.out or Path("weights.png")
    label = f"{name}, iteration {iteration:,}" if iteration is not None else name
    values = method_figure(net_w, k, distance, sr, gt, out, f"{label}, $D$: {opt['distance']['type']}", crop)
    print(f"{out}: " + ", ".join(f"{key} {value:.4f}" for key, value in values.items()))
