"""Print a YAML to start from. Examples:

  tlw options                           # lists the names
  tlw options EDSR_L1TLW_x4 > my.yml    # the training of a cell of the paper's tables
  tlw options test_EDSR_L1TLW_x4        # its test
  tlw options recipe_EDSR_x4            # a training for use in practice

Change its name and its paths; docs/options.md explains every option.
"""

from collections.abc import Sequence

from tlw_basicsr.commands import parser_of
from tlw_basicsr.tools.recipes import list_recipes, recipe


def main(argv: Sequence[str] | None = None) -> None:
    """Print the YAML, or the names."""
    parser = parser_of("options", __doc__)
    parser.add_argument("name", nargs="?", help="name of a YAML; without it the names are listed")
    name = parser.parse_args(argv).name
    print(recipe(name) if name else "\n".join(list_recipes()), end="" if name else "\n")
