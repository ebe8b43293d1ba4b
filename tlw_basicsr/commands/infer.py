"""``tlw infer``, see ``tlw infer --help``."""

import glob
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from tlw_basicsr.commands import parser_of_infer
from tlw_basicsr.data.images import SUFFIXES, read_picture
from tlw_basicsr.data.listing import name_images
from tlw_basicsr.networks import fill_defaults
from tlw_basicsr.tools.experiment import load_sr_network
from tlw_basicsr.tools.inference import DTYPES, upscale_picture, write_result
from tlw_basicsr.util.errors import UserError, clean, coloured, first_line, reason_of


def find_images(source: str) -> list[Path]:
    """The images that an argument names: a file, those of a folder, or those of a glob; sorted."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            if folders := sorted(p.name for p in path.iterdir() if p.is_dir()):
                left_out = f"{len(folders)} folders in it are left out, such as {folders[0]}"
                note(f"{source}: {left_out}; '{source}/**/*.png' goes into folders")
            seen = [p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith(".")]
            found = [p for p in seen if is_file(p)]  # without macOS' ._photo.jpg, as in every folder of images
        elif path.exists():
            found = [path]
        else:
            found = [p for p in map(Path, glob.glob(str(path), recursive=True)) if is_file(p)]  # noqa: PTH207, may be absolute
    except (OSError, RuntimeError) as error:  # no permission, too long, the home of nobody
        raise UserError(f"{source}: can't be read ({reason_of(error)})") from error
    if not found:
        kind = "has no image" if path.is_dir() else "does not exist"
        raise UserError(f"{source}: {kind}")
    return sorted(found)


def note(message: str) -> None:
    """One line on stderr, beside the bar."""
    tqdm.write(f"{coloured('note:', 33)} {clean(message)}", file=sys.stderr)


def is_file(path: Path) -> bool:
    """Whether it is a file, or a link to nothing or to what can't be reached: reading it reports that in a line."""
    return os.path.isfile(path) or not os.path.exists(path)  # noqa: PTH110, PTH113, pathlib's raise


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, upscale one image after the other."""
    args = parser_of_infer().parse_args(argv)
    if Path(args.suffix).name != args.suffix or len(args.suffix) > 100:
        raise UserError(f"--suffix: expected a part of a file name, at most 100 characters, got {args.suffix!r}")
    trained = load_sr_network(args)
    tiles = {"tile": args.tile or None, "overlap": args.overlap}
    upscale = trained.upscaler(args.device, dtype=DTYPES[args.dtype], **tiles)
    if args.tile and not fill_defaults(trained.options).get("takes_tiles", True):
        note(f"{args.model}: its architecture is best without tiles; --tile 0 takes the whole image, if memory allows")

    made, skipped, images = [], [], {}

    def skip(message: object) -> None:
        skipped.append(message)
        tqdm.write(f"{coloured('skipped:', 31)} {clean(str(message))}", file=sys.stderr)

    for source in args.inputs:
        try:
            # a link in a folder is an image of its own name
            images |= {path.parent.resolve() / path.name: path for path in find_images(source)}
        except UserError as error:
            skip(error)
    inputs = {os.path.realpath(path) for path in images}
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: {args.out} can't be made ({error.strerror})") from error

    def write(sr: np.ndarray, target: Path, path: Path) -> None:
        try:
            if message := write_result(sr, target, path, args.compression):
                note(message)
            made.append(target)
        except UserError as error:
            skip(error)
        except OSError as error:
            skip(f"{target} can't be written ({reason_of(error)})")

    names = name_images(list(images))
    with ThreadPoolExecutor(1) as writer:  # an image is written while the network works on the next one
        writing = writer.submit(lambda: None)
        for name, path in zip(names, tqdm(images.values(), unit="image", disable=None), strict=True):
            target = args.out / f"{name}{args.suffix}.png"
            if os.path.realpath(target) in inputs:
                skip(f"{path}: its result would replace the input {target}; choose another --out or --suffix")
                continue
            try:
                progress = partial(tqdm, unit="tile", leave=False, disable=None, desc=clean(path.name))
                sr = upscale_picture(upscale, read_picture(path), progress)
                writing.result()
                writing = writer.submit(write, sr, target, path)
            except UserError as error:
                skip(error)
            except (RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
                hint = "; try a smaller --tile" if isinstance(error, (torch.OutOfMemoryError, MemoryError)) else ""
                skip(f"{path}: can't be upscaled ({first_line(error)}){hint}")
        writing.result()
    print(f"{args.out}: {len(made)} written, {len(skipped)} skipped, by {trained}")
    sys.exit(1 if skipped else 0)
