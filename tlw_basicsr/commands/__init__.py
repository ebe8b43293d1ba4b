"""The commands of ``tlw``, a module each, and arguments that need none of their imports."""

import os
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

COMMANDS = {  # the modules of this package, and what they do
    "quickstart": "train a small network with L1 and with TLW, and compare them",
    "prepare": "cut HR images into tiles; make LR images, LMDBs, meta_info.txt",
    "options": "print a YAML to start from: a recipe or a cell of the paper's tables",
    "add": "write TLW into a BasicSR training YAML that you have",
    "train": "train by a YAML",
    "test": "test by a YAML",
    "weights": "draw what the weighting network has learned",
    "infer": "upscale images",
    "evaluate": "measure a network, or bicubic, on a folder of HR images",
    "compare": "write a page that compares the images of several results",
    "tables": "train and measure the paper's comparison, and write its tables",
    "export": "write ONNX and safetensors",
    "completion": "print the completion of a shell",
    "convert": "read the paper's published checkpoints",
}
INFER = """Upscale images by a trained network: files, folders and globs.

  tlw infer photo.jpg --model 4x_anything.safetensors
  tlw infer photo.jpg folder 'more/*.png' --opt TRAINING.yml --out results/inference

Results are PNG files named as the images, with --suffix; where names are equal, their suffix or folder is added.
16 bits, alpha (by bicubic), grey and the colour space (ICC profile, gAMA) stay. What can't be read, or would be
replaced by its result, is skipped.
Exit code: 0 all done, 1 some skipped, 2 wrong usage.
"""
PREPARE = """Prepare training data: cut HR images into tiles, make LR folders, LMDBs and meta_info.txt.

It may be stopped and run again: what is complete is kept, and tiles of images that are gone or have changed are
replaced. With --check it reads every image of folders or LMDBs and names those that can't be read. Examples:

  tlw prepare --gt DIV2K_train_HR --out datasets/DIV2K/tiles512 --crop-size 512 --scales 2 3 4
  tlw prepare --check datasets/DIV2K/tiles512/HR datasets/DIV2K/tiles512/LRbicx4
"""


def parser_of(name: str, text: str | None) -> ArgumentParser:
    """The parser of ``tlw NAME``, with a text that keeps its lines."""
    return ArgumentParser(prog=f"tlw {name}", description=text, formatter_class=RawDescriptionHelpFormatter)


SHARED: dict[str, dict[str, Any]] = {
    "--gt": {"type": Path, "required": True, "help": "folder of HR images"},
    "--param_key": {"default": "params_ema", "help": "entry of a checkpoint; default params_ema, else params"},
    "--device": {"default": "auto", "help": "auto (default), cpu, cuda, cuda:1, …"},
    "--allow-plugins": {"action": "store_true", "help": "import the plugins, code, that the YAML names"},
    "--perceptual": {"action": "store_true", "help": "also GMSD, HaarPSI and VIF, which need no weights"},
    "--grey-as-y": {"action": "store_true", "help": "take the levels of a grey HR image as Y (field)"},
}


def add_arguments(parser: ArgumentParser, *names: str) -> None:
    """Add arguments that several commands have."""
    for name in names:
        parser.add_argument(name, **SHARED[name])


def add_network_arguments(parser: ArgumentParser) -> Any:
    """Add the arguments that name an SR network and its checkpoint; returns their group, of which one is given."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="FILE", help="a file of any network that spandrel knows; no options needed")
    source.add_argument("--opt", metavar="YAML", help="training or test YAML with the network's options (network_g)")
    source.add_argument("--network", metavar="OPTIONS", help="these options alone: '{type: EDSR, num_in_ch: 3, …}'")
    newest = "default: the YAML's path.pretrain_network_g, else experiments/NAME/models/net_g_latest.pth"
    parser.add_argument("--checkpoint", metavar="PTH", help=newest)
    add_arguments(parser, "--param_key", "--allow-plugins")
    return source


def parser_of_infer() -> ArgumentParser:
    """The parser of ``tlw infer``."""
    parser = parser_of("infer", INFER)
    parser.add_argument("inputs", nargs="+", help="images, folders of images, or globs ('**' goes into folders)")
    add_network_arguments(parser)
    parser.add_argument("--out", type=Path, default=Path("results/inference"), help="folder; default results/inference")
    parser.add_argument("--suffix", default="", help="added to the name of the image, such as _x4")
    parser.add_argument("--tile", type=int, default=512, help="largest tile in LR pixels, 512; 0: the whole image")
    parser.add_argument("--overlap", type=int, help="of tiles, in LR pixels; default: 32, or half of a smaller tile")
    add_arguments(parser, "--device")
    parser.add_argument("--compression", type=int, choices=range(10), help="of the PNGs, 0 to 9; default: the fastest")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32", help="precision of the network")
    return parser


def parser_of_prepare() -> ArgumentParser:
    """The parser of ``tlw prepare``."""
    parser = parser_of("prepare", PREPARE)
    parser.add_argument("--gt", type=Path, help="folder of HR images")
    parser.add_argument("--out", type=Path, help="folder to fill: HR/, LRbicx2/, …, meta_info.txt")
    parser.add_argument("--crop-size", type=int, help="side of the tiles in pixels (default: whole images)")
    parser.add_argument("--step", type=int, help="distance from tile to tile (default: the crop size, no overlap)")
    thresh = "add a tile at a border where more than this many pixels are left (default: never)"
    parser.add_argument("--thresh-size", type=int, help=thresh)
    parser.add_argument("--scales", type=int, nargs="*", default=[], help="make LR images of these scales")
    borders = "beyond the border: the image mirrored, or its outer pixels repeated, as SelfExSR and RCAN have it"
    parser.add_argument("--borders", choices=("mirror", "replicate"), default="mirror", help=borders)
    rounding = "round to 8 bits after each of two passes, as MATLAB, or once at the end, as in EDSR's benchmark at ×8"
    parser.add_argument("--rounding", choices=("twice", "once"), default="twice", help=rounding)
    parser.add_argument("--multiple", type=int, help="cut tiles to a multiple of this (default: fits the scales)")
    parser.add_argument("--lmdb", action="store_true", help="also pack the folders into LMDBs")
    parser.add_argument("--cache", type=Path, help="fill a folder with the decoded images, for datasets.train.cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="number of processes")
    parser.add_argument("--check", type=Path, nargs="+", metavar="FOLDER", help="only read all images of these")
    return parser


# commands whose arguments are read, and refused, before the command is imported
PARSERS = {"infer": parser_of_infer, "prepare": parser_of_prepare}
