"""Export a trained network: NAME.onnx, checked by onnxruntime, and NAME.safetensors. Example:

  tlw export net.onnx net.safetensors --opt options/test/EDSR/test_EDSR_L1TLW_x4.yml
  tlw export net.onnx --model 4x_anything.safetensors

Both describe the network in their metadata. ONNX needs: pip install '.[export]'
"""

from pathlib import Path

from tqdm import tqdm

from tlw_basicsr.commands import add_network_arguments, parser_of
from tlw_basicsr.tools.experiment import load_sr_network
from tlw_basicsr.tools.export import NEEDED, check_installed, export_onnx, export_safetensors
from tlw_basicsr.util.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, write the files."""
    parser = parser_of("export", __doc__)
    parser.add_argument("out", nargs="+", type=Path, help="files to write, .onnx or .safetensors")
    add_network_arguments(parser)
    one_size = "ONNX for LR images of this size only, one at a time"
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help=one_size)
    args = parser.parse_args(argv)
    for path in args.out:
        if path.suffix.lower() not in NEEDED:
            raise UserError(f"{path}: unknown kind of file; accepted are names that end in {' or '.join(NEEDED)}")
        check_installed(path.suffix.lower())
    trained = load_sr_network(args)
    net, options = trained.net, trained.options
    for path in tqdm(args.out, desc="export", unit="file", disable=None):
        if path.suffix.lower() == ".onnx":
            difference = export_onnx(net, options, path, args.size and tuple(args.size))
            sizes = f"images of {args.size[0]}×{args.size[1]}, one at a time" if args.size else "any batch and size"
            tqdm.write(f"{path}: for {sizes}; differs by {difference:.1e} from the network")
        else:
            export_safetensors(net, options, path)
            tqdm.write(f"{path}: {sum(p.numel() for p in net.parameters()):,} parameters")
