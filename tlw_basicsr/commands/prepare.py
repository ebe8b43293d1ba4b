"""Prepare training data: cut HR images into tiles, make LR folders, LMDBs and meta_info.txt.

It may be stopped and run again: what is complete is kept, and tiles of images that are gone or have changed are
replaced. With --check it reads every image of folders or LMDBs and names those that can't be read. Examples:

  tlw prepare --gt DIV2K_train_HR --out datasets/DIV2K/tiles512 --crop-size 512 --scales 2 3 4
  tlw prepare --check datasets/DIV2K/tiles512/HR datasets/DIV2K/tiles512/LRbicx4
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from tlw_basicsr.commands import parser_of
from tlw_basicsr.tools.prepare import check_folder, prepare
from tlw_basicsr.util.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and prepare the data."""
    parser = parser_of("prepare", __doc__)
    parser.add_argument("--gt", type=Path, help="folder of HR images")
    parser.add_argument("--out", type=Path, help="folder to fill: HR/, LRbicx2/, …, meta_info.txt")
    parser.add_argument("--crop-size", type=int, help="side of the tiles in pixels (default: whole images)")
    parser.add_argument("--step", type=int, help="distance from tile to tile (default: the crop size, no overlap)")
    thresh = "add a tile at a border where more than this many pixels are left (default: never)"
    parser.add_argument("--thresh-size", type=int, help=thresh)
    parser.add_argument("--scales", type=int, nargs="*", default=[], help="make LR images of these scales")
    parser.add_argument("--multiple", type=int, help="cut tiles to a multiple of this (default: fits the scales)")
    parser.add_argument("--lmdb", action="store_true", help="also pack the folders into LMDBs")
    parser.add_argument("--cache", type=Path, help="fill a folder with the decoded images, for datasets.train.cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FOLDER", help="only read every image of these")
    args = parser.parse_args(argv)
    for name in ("crop_size", "step", "multiple", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a number of at least 1, got {value}")
    if args.check:
        sys.exit(check(args.check, args.workers))
    for name in ("gt", "out"):
        if getattr(args, name) is None:
            raise UserError(f"--{name}: missing; needed are --gt and --out, or --check")
    if any(scale < 2 for scale in args.scales):
        raise UserError(f"--scales: expected numbers of at least 2, got {args.scales}")
    cut = (args.crop_size, args.step, args.thresh_size, args.scales, args.multiple)
    made = prepare(args.gt, args.out, *cut, lmdb=args.lmdb, cache=args.cache, workers=args.workers)
    print(f"{args.out}: {made['tiles']} HR tiles of {made['images']} images, {made['images_lq']} LR images")
    if made["left_out"]:
        print(f"Left out: {made['left_out']} images in subfolders of {args.gt}")
    if made["deleted"]:
        print(f"Replaced: the tiles of {made['deleted']} images that are gone or have changed")


def check(folders: list[Path], workers: int) -> int:
    """Check the folders, print which images can't be read, and return the exit code: 1 if there are any."""
    bad = 0
    for folder in folders:
        images, faults = check_folder(folder, workers)
        for line in faults:
            print(line, file=sys.stderr)
        print(f"{folder}: {images} images, {len(faults)} can't be read")
        bad += len(faults)
    return int(bad > 0)
