"""Print a YAML to start from. Examples:

  tlw options                              # lists the names
  tlw options recipe_EDSR_x4 > my.yml      # a training for use in practice
  tlw options EDSR_L1TLW_x4                # the training of a cell of the paper's tables
  tlw options test_EDSR_L1TLW_x4           # its test
  tlw options --schema > tlw.schema.json   # beside my.yml: editors complete and check the file

Change its name and its paths; docs/options.md explains every option.
"""

from importlib import import_module

from tlw_basicsr.commands import parser_of
from tlw_basicsr.tools.recipes import describe_recipes, recipe
from tlw_basicsr.tools.report import json_text

GROUPS = {  # titles by the beginning of a name
    "recipe_": "For use in practice",
    "quickstart_": "Small ones, which `tlw quickstart` runs",
    "": "The trainings of the paper's tables; test_NAME is the test of each",
}


def main(argv: list[str] | None = None) -> None:
    """Print the YAML, the names, or the schema."""
    parser = parser_of("options", __doc__)
    parser.add_argument("name", nargs="?", help="name of a YAML; without it the names are listed")
    parser.add_argument("--schema", action="store_true", help="print the JSON schema of all options, for editors")
    parser.add_argument("--json", action="store_true", help="list the names as JSON, for scripts")
    args = parser.parse_args(argv)
    if args.schema:
        # the only one that needs BasicSR
        print(json_text(import_module("tlw_basicsr.engine.json_schema").write_schema()))
    elif args.name:
        print(recipe(args.name), end="")
    elif args.json:
        print(json_text(describe_recipes()))
    else:
        about = {name: text for name, text in describe_recipes().items() if not name.startswith("test_")}
        for beginning, title in GROUPS.items():
            print(f"{title}:")
            for name in [name for name in about if name.startswith(beginning)]:
                print(f"  {name:26}  {about.pop(name)}")
