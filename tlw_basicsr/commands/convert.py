"""Convert a published checkpoint of arXiv:2301.10575 to BasicSR's format.

tlw convert SRModel_tlw1_best.pth EDSR_L1TLW_x4.pth --net edsr --scale 4

writes EDSR_L1TLW_x4.pth as {'params': …} and EDSR_L1TLW_x4.yml with the network's options and the checkpoint's name,
for the argument --opt of other commands.
"""

from pathlib import Path

from tlw_basicsr.commands import parser_of
from tlw_basicsr.tools.convert import PUBLISHED, convert_file
from tlw_basicsr.util.errors import UserError


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments and convert."""
    parser = parser_of("convert", __doc__)
    parser.add_argument("source", metavar="IN.pth", type=Path, help="the published file")
    parser.add_argument("target", metavar="OUT.pth", type=Path, help="the file to write; OUT.yml goes beside it")
    parser.add_argument("--net", required=True, choices=list(PUBLISHED))
    needed = "required except for hat (×4 only) and weight (has none); a wrong one goes unnoticed for vdsr"
    parser.add_argument("--scale", type=int, help=needed)
    args = parser.parse_args(argv)
    if args.target.suffix != ".pth":
        raise UserError(f"OUT.pth: {args.target} must end in .pth")
    if args.source.resolve() == args.target.resolve():
        raise UserError(f"OUT.pth: {args.target} is IN.pth; name another file")
    options = convert_file(args.source, args.target, args.net, args.scale)
    print(f"Written: {args.target}, {options}")
