"""``tlw prepare``, see ``tlw prepare --help``."""

import sys
from pathlib import Path

from tlw_basicsr.commands import parser_of_prepare
from tlw_basicsr.tools.prepare import check_folder, prepare
from tlw_basicsr.util.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and prepare the data."""
    args = parser_of_prepare().parse_args(argv)
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
    lq = {"borders": args.borders, "rounding": args.rounding}
    made = prepare(args.gt, args.out, *cut, lmdb=args.lmdb, cache=args.cache, workers=args.workers, **lq)
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
