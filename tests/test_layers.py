"""Each module imports only from the layers below its own."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "tlw_basicsr"
FILES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path for path in PACKAGE.rglob("*.py")}
TREES = {name.removesuffix(".__init__"): ast.parse(path.read_text()) for name, path in FILES.items()}


def imports(tree):
    """The modules that a tree imports, as far as they are of this package or BasicSR."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("__"):
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in TREES else node.module for name in full]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("tlw_basicsr", "basicsr"))


USES = {name: set(imports(tree)) for name, tree in TREES.items() if name != "tlw_basicsr"}  # which is lazy


def is_in(module, *folders):
    return any(f"{module}.".startswith(f"tlw_basicsr.{folder}.") for folder in folders)


FORBIDDEN = {
    "core imports nothing but core": lambda a, b: is_in(a, "core") and not is_in(b, "core"),
    "util imports nothing but util and the core": lambda a, b: is_in(a, "util") and not is_in(b, "util", "core"),
    "nothing below engine imports engine": lambda a, b: (
        is_in(b, "engine") and not is_in(a, "engine", "tools", "commands")
    ),
    "nothing below the commands imports one": lambda a, b: (
        is_in(b, "commands", "cli") and not is_in(a, "commands", "cli", "__main__", "train", "test")
    ),
    "nothing but the entry points imports the command line": lambda a, b: (
        is_in(b, "cli") and not is_in(a, "cli", "__main__", "train", "test")
    ),
    "no command imports another": lambda a, b: (
        a != b and is_in(a, "commands") and is_in(b, "commands") and b.count(".") > 1
    ),
    "nothing imports the lazy names": lambda a, b: b == "tlw_basicsr",
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_imports_go_one_way(rule):
    assert not [f"{a} imports {b}" for a, uses in USES.items() for b in uses if FORBIDDEN[rule](a, b)]


def test_there_is_no_circle():
    tuple(TopologicalSorter(USES).static_order())


def test_no_function_imports_from_this_package():
    """Which would hide a circle. A heavy library of others may be imported late."""
    functions = [
        (name, node) for name, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)
    ]
    assert not [f"{name}.{f.name}" for name, f in functions if any(n.startswith("tlw_") for n in imports(f))]
