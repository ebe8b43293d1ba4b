"""Measure a trained network, bicubic, or a folder of SR images on a folder of HR images.

tlw evaluate --gt datasets/Set5 --scale 4 --bicubic
tlw evaluate --gt datasets/Set5 --scale 4 --sr results/SwinIR
tlw evaluate --gt datasets/Set5 --scale 4 --opt options/train/EDSR/train_EDSR_L1TLW_x4.yml \\
    --checkpoint experiments/train_EDSR_L1TLW_x4/models/net_g_best.pth --lpips --csv set5.csv
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tlw_basicsr.commands import add_arguments, parser_of
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.tools.evaluation import PROTOCOLS, Source, bicubic, evaluate, means
from tlw_basicsr.tools.experiment import load_trained
from tlw_basicsr.tools.report import csv_text, json_text
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.files import write_text


def find_sources(args: argparse.Namespace, protocols: list[str]) -> tuple[Mapping[str, Source], str]:
    """What makes the SR images of each protocol, and its name."""
    if args.bicubic:
        return {name: bicubic(args.scale, PROTOCOLS[name].quantize) for name in protocols}, "bicubic"
    if args.sr:
        return dict.fromkeys(protocols, Path(args.sr)), str(args.sr)
    opt = read_options(str(args.opt), allow_plugins=args.allow_plugins)
    trained = load_trained(opt, args.checkpoint, args.param_key)
    return dict.fromkeys(protocols, trained.upscaler(args.device, args.scale, args.opt)), str(trained)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, measure, print and write."""
    parser = parser_of("evaluate", __doc__)
    add_arguments(parser, "--gt", "--param_key", "--perceptual", "--grey-as-y", "--device", "--allow-plugins")
    parser.add_argument("--scale", type=int, required=True)
    parser.add_argument("--lq", type=Path, help="folder of LR images, for the field's protocol; default: made from HR")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bicubic", action="store_true", help="measure bicubic upscaling")
    what.add_argument("--sr", type=Path, help="folder of SR images NAME, NAMEx4 or NAME_…, for the field's protocol")
    what.add_argument("--opt", type=Path, help="YAML with network_g")
    parser.add_argument("--checkpoint", type=Path, help="with --opt; default: the YAML's, or its training's newest")
    both = "default: both; with --lq or --sr the field's (BasicSR's)"
    parser.add_argument("--protocol", choices=[*PROTOCOLS, "both"], help=both)
    parser.add_argument("--lpips", action="store_true", help="also LPIPS of VGG and AlexNet; needs their weights")
    parser.add_argument("--csv", type=Path, help="write the values of every image")
    parser.add_argument("--json", type=Path, help="write the means")
    args = parser.parse_args(argv)
    if not 1 <= args.scale <= 8:
        raise UserError(f"--scale: expected 1 to 8, got {args.scale}")
    if args.checkpoint and not args.opt:
        other = "--bicubic" if args.bicubic else "--sr"
        raise UserError(f"--checkpoint: not with {other}; give --opt to measure a network")
    if args.sr and not args.sr.is_dir():
        raise UserError(f"--sr: {args.sr} is not a folder")
    for option, path in (("--csv", args.csv), ("--json", args.json)):
        if path and (path.is_dir() or not path.parent.is_dir()):
            raise UserError(f"{option}: {path} can't be written; expected a file in a folder that exists")
    given = "--lq" if args.lq else "--sr" if args.sr else ""
    if given and args.protocol in ("paper", "both"):
        raise UserError(f"--protocol {args.protocol}: the paper's protocol makes LR from HR; leave {given} out")
    chosen = args.protocol or ("field" if given else "both")
    protocols = list(PROTOCOLS) if chosen == "both" else [chosen]
    sources, name = find_sources(args, protocols)
    settings = {"with_lpips": args.lpips, "with_perceptual": args.perceptual, "grey_as_y": args.grey_as_y}
    rows = evaluate(sources, args.gt, args.scale, lq_folder=args.lq, **settings, progress=sys.stderr.isatty())
    result = means(rows)
    print(f"{args.gt.name}, ×{args.scale}, {name}, mean of {len(rows) // len(protocols)} images\n")
    for protocol, values in result.items():
        print(f"{protocol}: " + ", ".join(f"{metric} {value:.6g}" for metric, value in values.items()))
    if args.csv:
        write_text(csv_text(rows), args.csv)
    if args.json:
        write_text(json_text(result), args.json)
