"""Write a page that compares the images of several results, and its numbers as CSV. Examples:

  tlw compare bicubic L1.yml TLW.yml --gt datasets/Set5
  tlw compare bicubic SwinIR=results/SwinIR TLW.yml --gt datasets/Set5 --scale 4 --distance '{type: SSIMDistance}'

A result is: bicubic; the YAML of a training or test, whose network is taken, and its weighting network if it lies
beside it; or a folder of SR images named as the HR images, or NAMEx4, or NAME_…. LABEL= before it gives it a name.
The page opens from the file system. LR images are made from HR by MATLAB's bicubic, of 8 bits.
"""

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor

from tlw_basicsr.commands import parser_of
from tlw_basicsr.commands.weights import iterations_of, k_of
from tlw_basicsr.core.functional import Distance
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.models.tlw_model import complete_economy
from tlw_basicsr.networks import find_device, load_network
from tlw_basicsr.registry import check_arguments, lookup
from tlw_basicsr.tools.comparison import HR, Result, shoot, write_page
from tlw_basicsr.tools.evaluation import bicubic
from tlw_basicsr.tools.experiment import find_checkpoint
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.yaml_options import load_yaml


def find_weights(opt: Options, models: Path) -> Callable[[Tensor, Tensor], Tensor] | None:
    """The newest weighting network in a training's folder, with the k of its iteration; None if there is none."""
    if "network_w" not in opt or not any(models.glob("net_w_*.pth")):
        return None
    iteration = iterations_of(models)[-1]
    net_w = load_network(opt["network_w"], models / f"net_w_{iteration}.pth", key="network_w")
    return partial(net_w, k=k_of(argparse.Namespace(k=None), opt, models, iteration))


def find_result(source: str, device: str) -> tuple[Result, int | None]:
    """The result that an argument names, and its scale where it has one.

    Raises:
        UserError: it is not one, or its options or checkpoint are wrong.
    """
    label, separator, name = source.partition("=")
    if not separator:
        label, name = "", source
    path = Path(name).expanduser()
    if name == "bicubic":
        return Result(label or name), None
    if path.is_dir():
        return Result(label or path.name or name, folder=path), None
    if path.suffix.lower() not in (".yml", ".yaml"):
        raise UserError(f"{source}: expected bicubic, a folder of SR images or a YAML (.yml)")
    opt = read_options(str(path))
    complete_economy(opt)
    checkpoint = find_checkpoint(opt, "g")
    upscale = NetworkUpscaler(
        load_network(opt["network_g"], checkpoint, "params_ema"), opt["network_g"], device=find_device(device)
    )
    return Result(label or path.stem, upscale, weigh=find_weights(opt, Path(checkpoint).parent)), upscale.scale


def build_distance(options: Options | None) -> Distance | None:
    """D by its options; None without."""
    if options is None:
        return None
    arch = lookup(LOSS_REGISTRY, options, "--distance")
    check_arguments(options, "--distance", arch)
    return arch(**{key: value for key, value in options.items() if key != "type"})


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, make the images, write the page."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("results", nargs="+", metavar="[LABEL=]RESULT", help="bicubic, a YAML or a folder")
    parser.add_argument("--gt", type=Path, required=True, help="folder of HR images")
    parser.add_argument("--scale", type=int, help="of the super-resolution; default: the networks'")
    parser.add_argument("--distance", metavar="OPTIONS", help="also D, such as '{type: SSIMDistance}'")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="page to write; default compare.html")
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, …")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: {args.out} must end in .html")
    distance = build_distance(load_yaml(args.distance, "--distance") if args.distance else None)
    found = [find_result(source, args.device) for source in args.results]
    labels = [result.label for result, _ in found]
    for label in labels:
        if label == HR or labels.count(label) > 1:
            raise UserError(f"{label}: names more than one result; give them names, such as first={args.results[0]}")
    scales = sorted({scale for _, scale in found if scale} | ({args.scale} if args.scale else set()))
    if len(scales) != 1:
        raise UserError(f"--scale: {'expected one' if not scales else f'the results differ: {scales}'}")
    if not 1 <= scales[0] <= 8:
        raise UserError(f"--scale: expected 1 to 8, got {scales[0]}")
    scale = scales[0]
    results = [
        Result(result.label, bicubic(scale)) if result.upscale is None and result.folder is None else result
        for result, _ in found
    ]
    shots = shoot(results, args.gt, scale, distance)
    about = "PSNR and SSIM of Y, 8-bit images, without a border of the scale."
    about += f" D: {args.distance}." if args.distance else ""
    write_page(args.out, shots, f"{args.gt.name} ×{scale}", about)
    print(f"{args.out}: {len(shots)} images, {args.out.stat().st_size / 1e6:.1f} MB; {args.out.with_suffix('.csv')}")
