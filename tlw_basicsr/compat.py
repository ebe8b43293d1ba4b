"""The only place that knows of versions and platforms. Importing it makes ``import basicsr`` work.

BasicSR 1.4.2 imports two modules that newer libraries no longer have:

- ``torchvision.transforms.functional_tensor`` (gone in torchvision 0.17): only ``rgb_to_grayscale`` is used;
- ``scipy.ndimage.filters`` (deprecated in SciPy): only ``convolve`` is used.

Where one is missing, a module of that name with the one function takes its place.
"""

import importlib
import sys
import types
import warnings


def _alias(name: str, source: str, attribute: str) -> None:
    """Make ``from name import attribute`` work, with ``source``'s attribute where module ``name`` is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            getattr(importlib.import_module(name), attribute)
    except (ImportError, AttributeError):
        module = types.ModuleType(name)
        setattr(module, attribute, getattr(importlib.import_module(source), attribute))
        sys.modules[name] = module


_alias("torchvision.transforms.functional_tensor", "torchvision.transforms.functional", "rgb_to_grayscale")
_alias("scipy.ndimage.filters", "scipy.ndimage", "convolve")
