"""Write a page that compares the images of several results, and its numbers as CSV. Examples:

  tlw compare bicubic L1.yml TLW.yml --gt datasets/Set5
  tlw compare bicubic --model 4x_A.safetensors TLW=4x_B.pth --gt datasets/Set5
  tlw compare bicubic SwinIR=results/SwinIR TLW.yml --gt datasets/Set5 --scale 4 --distance '{type: SSIMDistance}'

A result is: bicubic; the YAML of a training or test, whose network is taken, and its weighting network if it lies
beside it; a file of any network that spandrel knows; or a folder of SR images named as the HR images, or NAMEx4, or
NAME_…. LABEL= before it gives it a name.
The page opens from the file system. LR images are made from HR by MATLAB's bicubic, of 8 bits.
"""

from argparse import Namespace
from pathlib import Path

from tlw_basicsr.commands import add_arguments, parser_of
from tlw_basicsr.engine.options import read_options
from tlw_basicsr.networks import of_file
from tlw_basicsr.tools.comparison import HR, Result, compare, of_network
from tlw_basicsr.tools.evaluation import BICUBIC
from tlw_basicsr.tools.experiment import load_trained
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.yaml_options import load_yaml


def find_result(argument: str, args: Namespace) -> Result:
    """The result that an argument names."""
    labelled = "=" in argument and not Path(argument).exists()
    label, _, name = argument.partition("=") if labelled else ("", "", argument)
    path = Path(name).expanduser()
    label = label or (path.stem if path.is_file() else path.name) or name
    if name == BICUBIC or path.is_dir():
        return Result(label, BICUBIC if name == BICUBIC else path)
    if path.suffix.lower() in (".safetensors", ".pth", ".pt", ".ckpt"):
        opt = {"network_g": of_file(path)}
        return of_network(label, load_trained(opt, path, args.param_key), {}, args.device)
    if path.suffix.lower() not in (".yml", ".yaml"):
        raise UserError(f"{argument}: expected bicubic, a folder of SR images, a YAML (.yml) or a network's file")
    opt = read_options(str(path), allow_plugins=args.allow_plugins)
    return of_network(label, load_trained(opt, param_key=args.param_key), opt, args.device)


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, make the images, write the page."""
    parser = parser_of("compare", __doc__)
    parser.add_argument("results", nargs="*", metavar="[LABEL=]RESULT", help="bicubic, a YAML, a file or a folder")
    parser.add_argument("--model", nargs="+", default=[], metavar="[LABEL=]FILE", help="more results: networks' files")
    parser.add_argument("--scale", type=int, help="scale of the super-resolution; default: the networks'")
    parser.add_argument("--distance", metavar="OPTIONS", help="also D, such as '{type: SSIMDistance}'")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="page to write; default compare.html")
    add_arguments(parser, "--gt", "--param_key", "--device", "--allow-plugins")
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out: {args.out} must end in .html")
    distance = load_yaml(args.distance, "--distance") if args.distance else None
    arguments = [*args.results, *args.model]
    if not arguments:
        raise UserError("compare: expected at least one result, such as bicubic or --model FILE")
    results: dict[str, Result] = {}
    for argument in arguments:
        result = find_result(argument, args)
        if result.label == HR or result.label in results:
            raise UserError(
                f"{result.label}: names more than one result; give them names, such as first={arguments[0]}"
            )
        results[result.label] = result
    scales = {result.source.scale for result in results.values() if isinstance(result.source, NetworkUpscaler)}
    scales |= {args.scale} - {None}
    if len(scales) != 1:
        raise UserError(f"--scale: {'expected one' if not scales else f'the results differ: {sorted(scales)}'}")
    (scale,) = scales
    if not 1 <= scale <= 8:
        raise UserError(f"--scale: expected 1 to 8, got {scale}")
    number = compare([*results.values()], args.gt, scale, args.out, distance)
    print(f"{args.out}: {number} images, {args.out.stat().st_size / 1e6:.1f} MB; {args.out.with_suffix('.csv')}")
