"""Prepare training data: cut HR images into tiles, make LR folders, LMDBs and meta_info.txt.

It may be stopped and run again; what is complete is kept. Example:

  tlw prepare --gt DIV2K_train_HR --out datasets/DIV2K/tiles512 --crop-size 512 --scales 2 3 4
"""

import os
from collections.abc import Sequence
from pathlib import Path

from tlw_basicsr.cli import parser_of
from tlw_basicsr.data.prepare import prepare
from tlw_basicsr.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments and prepare the data."""
    parser = parser_of("prepare", __doc__)
    parser.add_argument("--gt", type=Path, required=True, help="folder of HR images")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill: HR/, LRbicx2/, …, meta_info.txt")
    parser.add_argument("--crop-size", type=int, help="side of the tiles in pixels; default: whole images")
    parser.add_argument("--step", type=int, help="from tile to tile; default: the crop size, no overlap")
    parser.add_argument(
        "--thresh-size", type=int, help="more pixels than this left at a border make one more tile; default: none do"
    )
    parser.add_argument("--scales", type=int, nargs="*", default=[], help="make LR images of these scales")
    parser.add_argument("--multiple", type=int, help="cut tiles to a multiple of this; default: fits the scales")
    parser.add_argument("--lmdb", action="store_true", help="also pack the folders into LMDBs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    args = parser.parse_args(argv)
    for name in ("crop_size", "step", "multiple", "workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: expected a number of at least 1, got {value}")
    if any(scale < 2 for scale in args.scales):
        raise UserError(f"--scales: expected numbers of at least 2, got {args.scales}")
    made = prepare(
        args.gt,
        args.out,
        args.crop_size,
        args.step,
        args.thresh_size,
        args.scales,
        args.multiple,
        args.lmdb,
        args.workers,
    )
    print(f"{args.out}: {made['tiles']} HR tiles of {made['images']} images, {made['images_lq']} LR images")
