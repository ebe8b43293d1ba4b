"""Measure a trained network, bicubic, or a folder of SR images on a folder of HR images.

tlw evaluate --gt datasets/Set5 --scale 4 --bicubic
tlw evaluate --gt datasets/Set5 --scale 4 --sr results/SwinIR
tlw evaluate --gt datasets/Set5 --model 4x_anything.safetensors
tlw evaluate --gt datasets/Set5 --scale 4 --opt options/train/EDSR/train_EDSR_L1TLW_x4.yml \\
    --checkpoint experiments/train_EDSR_L1TLW_x4/models/net_g_best.pth --lpips --csv set5.csv
"""

import argparse
from pathlib import Path

from tlw_basicsr.commands import add_arguments, add_network_arguments, parser_of
from tlw_basicsr.tools.evaluation import BICUBIC, PROTOCOLS, Source, evaluate, means
from tlw_basicsr.tools.experiment import load_sr_network
from tlw_basicsr.tools.report import csv_text, json_text
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.files import write_text

STDOUT = Path("-")


def find_source(args: argparse.Namespace) -> tuple[Source, str, int]:
    """What makes the SR images, its name, and the scale."""
    if args.bicubic or args.sr:
        return args.sr or BICUBIC, str(args.sr or BICUBIC), args.scale
    trained = load_sr_network(args)
    upscale = trained.upscaler(args.device, args.scale, args.model or args.opt or "--network")
    return upscale, str(trained), upscale.scale


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = parser_of("evaluate", __doc__)
    add_arguments(parser, "--gt", "--perceptual", "--grey-as-y", "--device")
    parser.add_argument("--scale", type=int, help="scale of the super-resolution; default: the network's")
    parser.add_argument("--lq", type=Path, help="folder of LR images, for the field's protocol; default: made from HR")
    what = add_network_arguments(parser)
    what.add_argument("--bicubic", action="store_true", help="measure bicubic upscaling")
    what.add_argument("--sr", type=Path, help="folder of SR images NAME, NAMEx4 or NAME_…, for the field's protocol")
    both = "default: both; with --lq or --sr the field's (BasicSR's)"
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "both"], help=both)
    parser.add_argument("--lpips", action="store_true", help="also LPIPS of VGG and AlexNet; needs their weights")
    parser.add_argument("--csv", type=Path, help="write the values of every image")
    json_help = "write the means into a file; without one print them as JSON alone"
    parser.add_argument("--json", type=Path, nargs="?", const=STDOUT, metavar="FILE", help=json_help)
    args = parser.parse_args(argv)
    bare = "--bicubic" if args.bicubic else "--sr" if args.sr else ""
    if args.scale is None and bare:
        raise UserError(f"--scale: missing; {bare} needs it")
    if args.scale is not None and not 1 <= args.scale <= 8:
        raise UserError(f"--scale: expected 1 to 8, got {args.scale}")
    if args.checkpoint and bare:
        raise UserError(f"--checkpoint: not with {bare}; give --opt to measure a network")
    if args.sr and not args.sr.is_dir():
        raise UserError(f"--sr: {args.sr} is not a folder")
    for option, path in (("--csv", args.csv), ("--json", args.json)):
        if path and path != STDOUT and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{option}: {path} can't be written; expected a file in a folder that exists")
    given = "--lq" if args.lq else "--sr" if args.sr else ""
    if given and args.protocol in ("paper", "both"):
        raise UserError(f"--protocol {args.protocol}: the paper's protocol makes LR from HR; leave {given} out")
    chosen = args.protocol or ("field" if given else "both")
    protocols = list(PROTOCOLS) if chosen == "both" else [chosen]
    source, name, scale = find_source(args)
    settings = {"with_lpips": args.lpips, "with_perceptual": args.perceptual, "grey_as_y": args.grey_as_y}
    rows = evaluate(dict.fromkeys(protocols, source), args.gt, scale, lq_folder=args.lq, **settings)
    result = means(rows)
    if args.json == STDOUT:
        print(json_text(result))
    else:
        print(f"{args.gt.name}, ×{scale}, {name}, mean of {len(rows) // len(protocols)} images\n")
        for protocol, values in result.items():
            print(f"{protocol}: " + ", ".join(f"{metric} {value:.6g}" for metric, value in values.items()))
    if args.csv:
        write_text(csv_text(rows), args.csv)
    if args.json and args.json != STDOUT:
        write_text(json_text(result), args.json)
