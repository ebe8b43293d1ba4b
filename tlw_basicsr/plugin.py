"""Registers this package with BasicSR as soon as BasicSR is imported, by whomever.

``import tlw_basicsr`` imports neither BasicSR nor torch. A finder at the head of ``sys.meta_path`` waits for the first
``import basicsr``, which fails with today's torchvision unless :mod:`tlw_basicsr.compat` mends it before; when it is
done, the plugin's parts are imported, which registers them. If a module of this package is what imports BasicSR, that
module is completed first, since the parts may need it.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

PACKAGE = "tlw_basicsr"
MISSING = "BasicSR is not installed in this environment; run: tlw-setup"
PARTS = (
    "archs.spandrel_arch",
    "archs.sr_archs",
    "archs.tlw_weight_net_arch",
    "data.bicubic_sr_dataset",
    "losses.distance_loss",
    "losses.tlw_loss",
    "losses.uncertainty_loss",
    "metrics.paper_metrics",
    "models.tlw_model",
    "models.uncertainty_model",
)


class Registrar(MetaPathFinder):
    """Finds BasicSR and this package's modules as the finders behind it do, and notes when they are imported."""

    def __init__(self) -> None:
        self.depth = 0  # modules, of BasicSR's and ours, that are being imported
        self.due = False  # BasicSR is imported, the plugin's parts are not yet

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's spec, with a loader that calls :meth:`execute`."""
        if fullname.split(".")[0] not in ("basicsr", PACKAGE):
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next((spec for finder in others if (spec := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            # of the loader, which is made for this module: its other methods are used by runpy, inspect and others
            setattr(spec.loader, "exec_module", partial(self.execute, spec.loader.exec_module))  # noqa: B010
        elif fullname == "basicsr" and self.depth:  # one of our modules needs it; a folder without __init__.py won't do
            raise ModuleNotFoundError(MISSING, name=fullname)
        return spec

    def execute(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Execute a module; then register the plugin, if that is due and no module of ours is half imported."""
        self.depth += 1
        try:
            if module.__name__ == "basicsr":
                self.execute_basicsr(run, module)
            elif module.__name__.startswith("basicsr."):
                with import_module(f"{PACKAGE}.compat").import_later(module.__name__):
                    run(module)
            else:
                run(module)
        finally:
            self.depth -= 1
        if self.due and not self.depth:
            self.register()

    def execute_basicsr(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        """Execute BasicSR, mended; where it is incomplete or lacks a package, raise an ImportError of one line."""
        compat = import_module(f"{PACKAGE}.compat")
        try:
            compat.mend_imports_of_others()
            run(module)
            compat.mend_imports_of_basicsr()
        except Exception as error:
            reason = explain(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
            raise ImportError(f"{module.__file__} could not be imported: {reason}") from error
        self.due = True

    def register(self) -> None:
        """Import the plugin's parts, and put functions of ours in the place of BasicSR's."""
        self.due = False
        for part in PARTS:
            import_module(f"{PACKAGE}.{part}")
        import_module(f"{PACKAGE}.compat").replace_functions()


def explain(error: ImportError) -> str:
    """Return what an import error says, in one line, and what to do where a package is missing."""
    spec = find_spec("basicsr")
    if spec is None or spec.loader is None:
        return MISSING
    text = " ".join(str(error).split())
    missing = isinstance(error, ModuleNotFoundError) and not str(error.name).startswith("basicsr.")
    return f"{text}; run: tlw-setup" if missing else text


def install() -> None:
    """Wait for BasicSR, or register at once if it has been imported already."""
    registrar = Registrar()
    sys.meta_path.insert(0, registrar)
    if sys.modules.get("basicsr") is not None:
        import_module(f"{PACKAGE}.compat").mend_imports_of_basicsr()
        registrar.register()
