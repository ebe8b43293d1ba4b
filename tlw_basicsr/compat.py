"""The only place that knows of versions and platforms. Importing it makes ``import basicsr`` work.

BasicSR 1.4.2 imports two modules that newer libraries no longer have:

- ``torchvision.transforms.functional_tensor`` (gone in torchvision 0.17): only ``rgb_to_grayscale`` is used;
- ``scipy.ndimage.filters`` (deprecated in SciPy): only ``convolve`` is used.

Where one is missing, a module of that name with the one function takes its place.

Some of its models name the GPU outright, see :class:`CudaMeans`.
"""

import importlib
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


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


def replace(original: Callable, new: Callable) -> None:
    """Let BasicSR's modules that have imported the function ``original`` call ``new``."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "basicsr" and vars(module).get(original.__name__) is original:
            setattr(module, original.__name__, new)


class CudaMeans(TorchFunctionMode):
    """Within it, ``.cuda()`` and ``device='cuda'`` mean ``device``.

    BasicSR's Real-ESRGAN models call ``.cuda()`` in their constructors and queues, and its video models' validation
    asks for ``device='cuda'``, also where a training runs on the CPU.

    Args:
        device: the device that the model is on.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0].to(self.device)
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = self.device
        return func(*args, **kwargs)
