"""Turn a BasicSR training YAML into its TLW version, or write one that fine-tunes a network's file. Examples:

  tlw add IN.yml OUT.yml
  tlw add --model 4x_anything.safetensors > my.yml

Comments and order stay, and a file that has TLW already stays as it is. The pixel loss (L1Loss, MSELoss,
CharbonnierLoss, NAFNet's PSNRLoss, SwinFIR's CharbonnierLossColor, or any other with --base) becomes TLWLoss, with the
distance SSIMDistance, which needs no download, preset: economy and a schedule of k over the whole training. Every
change is printed.
"""

from importlib import import_module
from pathlib import Path

from tlw_basicsr.commands import parser_of
from tlw_basicsr.tools.add_tlw import add_tlw, describe_changes
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.files import write_text


def main(argv: list[str] | None = None) -> None:
    """Parse the arguments, rewrite the file."""
    parser = parser_of("add", __doc__)
    parser.add_argument("input", type=Path, metavar="IN.yml", nargs="?", help="BasicSR training YAML")
    parser.add_argument("output", type=Path, metavar="OUT.yml", nargs="?", help="file to write; may be IN.yml")
    model = "print a YAML that fine-tunes the network of this file, any that spandrel knows"
    parser.add_argument("--model", type=Path, metavar="FILE", help=model)
    parser.add_argument("--name", help="name of the experiment (default: the old one's or the file's with _TLW)")
    balance = "change loss_weight so that the pixel loss weighs against GAN and other losses as before"
    parser.add_argument("--keep-balance", action="store_true", help=balance)
    base = "what TLW weights, for a pixel loss that is not known here: |x̂ − x| or its square"
    parser.add_argument("--base", choices=("l1", "mse"), help=base)
    args = parser.parse_args(argv)
    if args.model:
        if args.input or args.keep_balance or args.base:
            raise UserError("--model: prints a whole YAML; expected no other arguments than --name")
        tool = import_module("tlw_basicsr.tools.fine_tuning")  # it needs BasicSR, which the rest does not
        print(tool.fine_tuning(args.model, args.name), end="")
        return
    if not args.output:
        raise UserError("tlw add: expected IN.yml OUT.yml, or --model FILE")
    try:
        text = args.input.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{args.input}: can't be read as text ({type(error).__name__})") from error
    new = add_tlw(text, str(args.input), keep_balance=args.keep_balance, new_name=args.name, base=args.base)
    if args.output.exists() and not args.output.is_file():
        raise UserError(f"{args.output}: is not a file that can be written")
    write_text(new, args.output.resolve())  # a link stays a link
    print(f"{args.output}: {'has TLW already' if new == text else 'TLW added'}")
    for line in describe_changes(text, new):
        print(f"  {line}")
