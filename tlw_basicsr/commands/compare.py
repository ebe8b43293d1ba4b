"""Write a page that compares the images of several results, and its numbers as CSV. Examples:

  tlw compare bicubic L1.yml TLW.yml --gt datasets/Set5
  tlw compare bicubic --model 4x_A.safetensors TLW=4x_B.pth --gt datasets/Set5
  tlw compare bicubic SwinIR=results/SwinIR TLW.yml --gt datasets/Set5 --scale 4 --distance '{type: SSIMDistance}'

A result is: bicubic; the YAML of a training or test, whose network is taken, and its weighting network if it lies
beside it; a file of any network that spandrel knows; or a folder of SR images named as the HR images, or NAMEx4, or
NAME_…. LABEL= before it gives it a name.
The page opens from the file system. LR images are made from HR by MATLAB's bicubic, of 8 bits.
"""

from collections.abc import Sequence
from pathlib import Path

from tlw_basicsr.commands import add_arguments, parser_of
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.networks import of_file
from tlw_basicsr.tools.comparison import HR, Result, shoot, write_page
from tlw_basicsr.tools.evaluation import bicubic
from tlw_basicsr.tools.experiment import Trained, build_distance, load_trained, load_weighting
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import Options
from tlw_basicsr.util.yaml_options import load_yaml


def find_source(name: str, argument: str, allow_plugins: bool, param_key: str) -> str | Path | tuple[Trained, Options]:
    """What an argument names: ``'bicubic'``, a folder of SR images, or a network and the YAML's options."""
    path = Path(name).expanduser()
    if name == "bicubic":
        return name
    if path.is_dir():
        return path
    if path.suffix.lower() in (".safetensors", ".pth", ".pt", ".ckpt"):
        return load_trained({"network_g": of_file(path)}, path, param_key), {}
    if path.suffix.lower() not in (".yml", ".yaml"):
        raise UserError(f"{argument}: expected bicubic, a folder of SR images, a YAML (.yml) or a network's file")
    opt = read_options(str(path), allow_plugins=allow_plugins)
    return load_trained(opt, param_key=param_key), opt


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the arguments, make the images, write the page."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("results", nargs="*", metavar="[LABEL=]RESULT", help="bicubic, a YAML, a file or a folder")
    parser.add_argument("--model", nargs="+", default=[], metavar="[LABEL=]FILE", help="more results: networks' files")
    parser.add_argument("--scale", type=int, help="of the super-resolution; default: the networks'")
    parser.add_argument("--distance", metavar="OPTIONS", help="also D, such as '{type: SSIMDistance}'")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="page to write; default compare.html")
    add_arguments(parser, "--gt", "--param_key", "--device", "--allow-plugins")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: {args.out} must end in .html")
    distance = build_distance(load_yaml(args.distance, "--distance"), "--distance") if args.distance else None
    sources = {}
    arguments = [*args.results, *args.model]
    if not arguments:
        raise UserError("compare: expected at least one result, such as bicubic or --model FILE")
    for argument in arguments:
        labelled = "=" in argument and not Path(argument).exists()
        label, _, name = argument.partition("=") if labelled else ("", "", argument)
        path = Path(name).expanduser()
        label = label or (path.stem if path.is_file() else path.name) or name
        source = find_source(name, argument, args.allow_plugins, args.param_key)
        label = source[0].named(label) if isinstance(source, tuple) else label
        if label == HR or label in sources:
            raise UserError(f"{label}: names more than one result; give them names, such as first={arguments[0]}")
        sources[label] = source
    upscalers = {
        label: source[0].upscaler(args.device) for label, source in sources.items() if isinstance(source, tuple)
    }
    scales = sorted({upscale.scale for upscale in upscalers.values()} | ({args.scale} if args.scale else set()))
    if len(scales) != 1:
        raise UserError(f"--scale: {'expected one' if not scales else f'the results differ: {scales}'}")
    if not 1 <= scales[0] <= 8:
        raise UserError(f"--scale: expected 1 to 8, got {scales[0]}")
    scale = scales[0]
    about = "PSNR and SSIM of Y, 8-bit images, without a border of the scale."
    about += f" D: {args.distance}." if args.distance else ""
    results = []
    for label, source in sources.items():
        if isinstance(source, tuple):
            trained, opt = source
            results.append(Result(label, upscalers[label], load_weighting(opt, trained.path.parent)))
            about += f" {label}: {trained}."
        else:
            results.append(Result(label, source if isinstance(source, Path) else bicubic(scale)))
    shots = shoot(results, args.gt, scale, distance)
    write_page(args.out, shots, f"{args.gt.name} ×{scale}", about)
    print(f"{args.out}: {len(shots)} images, {args.out.stat().st_size / 1e6:.1f} MB; {args.out.with_suffix('.csv')}")
