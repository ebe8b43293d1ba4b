"""The only place that knows of BasicSR's versions and forks, of other libraries' and of platforms.

It makes ``import basicsr`` work, of any version from 1.3.4 on, and of forks that ship a ``basicsr`` of their own;
:mod:`tlw_basicsr.plugin` calls it when BasicSR is imported. What is done to BasicSR stands in the five tables below;
:func:`tell_basicsr` says it in one line.
"""

import importlib
import inspect
import itertools
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tlw_basicsr.util.errors import UserError

# Modules of other libraries that BasicSR imports, and where their functions are now: torchvision since 0.17, SciPy.
MOVED_OUTSIDE = {
    "torchvision.transforms.functional_tensor": "torchvision.transforms.functional",
    "scipy.ndimage.filters": "scipy.ndimage",
}

# What a module imports for functions that few call, at a cost of seconds: imported when a function is called.
LATER = {
    "torchvision": ("torch._dynamo.utils",),
    "basicsr.archs.arch_util": ("distutils.version",),
    "basicsr.data.degradations": ("scipy.special", "scipy.stats"),
    "basicsr.metrics.fid": ("scipy.linalg",),
    "basicsr.metrics.niqe": ("scipy.special",),
}

# BasicSR's modules whose content went from one to another between its versions. Each gets what it lacks of the others
# of its group, so that code for either version finds it.
MOVED_INSIDE = [
    ["basicsr.utils.matlab_functions", "basicsr.utils.color_util"],  # 1.4.0
    ["basicsr.losses.losses", "basicsr.losses.basic_loss", "basicsr.losses.gan_loss"],  # 1.4.0
    ["basicsr.models.losses", "basicsr.losses.losses"],  # 1.3.4
]

# BasicSR's functions that ours take the place of: in BasicSR, and wherever they have been imported to.
REPLACED = {
    "basicsr.utils.img_util.imwrite": "tlw_basicsr.data.images.imwrite",  # files whole or not at all
    "basicsr.utils.img_util.imfrombytes": "tlw_basicsr.data.images.imfrombytes",  # takes an image of a cache, too
    "basicsr.utils.misc.mkdir_and_rename": "tlw_basicsr.compat.mkdir_and_rename",  # more than once a second
    "basicsr.utils.img_process_util.filter2D": "tlw_basicsr.compat.filter2D",  # today's torch pads to other strides
    "basicsr.ops.fused_act.fused_act.fused_leaky_relu": "tlw_basicsr.compat.fused_leaky_relu",  # without extension, too
    # OpenCV 5 takes whole numbers alone
    "basicsr.data.degradations.add_jpg_compression": "tlw_basicsr.data.images.add_jpg_compression",
    "basicsr.metrics.calculate_metric": "tlw_basicsr.models.validation.calculate_metric",  # refuses NaN
    # one rule for images, names and pairs, see tlw_basicsr.data.listing
    "basicsr.data.data_util.paired_paths_from_folder": "tlw_basicsr.data.listing.paired_paths_from_folder",
    "basicsr.data.data_util.paired_paths_from_lmdb": "tlw_basicsr.data.listing.paired_paths_from_lmdb",
    "basicsr.data.data_util.paired_paths_from_meta_info_file": (
        "tlw_basicsr.data.listing.paired_paths_from_meta_info_file"
    ),
    "basicsr.data.data_util.paths_from_lmdb": "tlw_basicsr.data.listing.paths_from_lmdb",
    "basicsr.data.data_util.scandir": "tlw_basicsr.data.listing.scandir",  # in basicsr.data alone
}

# What this BasicSR lacks, and what that costs.
MISSING: dict[str, str] = {}


class Later(types.ModuleType):
    """Stands in for a module that is imported when one of its functions is called."""

    def __getattr__(self, name: str) -> Callable:
        if name.startswith("_"):
            raise AttributeError(name)
        return lambda *args, **kwargs: getattr(importlib.import_module(self.__name__), name)(*args, **kwargs)


@contextmanager
def import_later(user: str) -> Iterator[None]:
    """Import the module ``user`` within it, without what it needs :data:`LATER`."""
    missing = {name: Later(name) for name in LATER.get(user, ()) if name not in sys.modules}
    sys.modules.update(missing)
    try:
        yield
    finally:
        for name in missing:
            del sys.modules[name]


def _find(name: str) -> types.ModuleType | None:
    """Return the module, or None if it does not exist."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise


def _complete(name: str, content: dict[str, Any]) -> None:
    """Give the module of this name, which is made if it does not exist, what it lacks of ``content``."""
    module = _find(name)
    if module is None:
        module = sys.modules[name] = types.ModuleType(name)
        parent, _, last = name.rpartition(".")
        setattr(sys.modules[parent], last, module)
    for key, value in content.items():
        if not hasattr(module, key):
            setattr(module, key, value)


def mend_imports_of_others() -> None:
    """Give other libraries the modules that BasicSR imports from them; before BasicSR is imported."""
    with import_later("torchvision"):
        importlib.import_module("torchvision")
    for name, source in MOVED_OUTSIDE.items():
        sys.modules.setdefault(name, Later(source))


def mend_imports_of_basicsr() -> None:
    """Give BasicSR's modules of :data:`MOVED_INSIDE` each other's content; after BasicSR is imported."""
    for group in MOVED_INSIDE:
        content = {
            key: value for name in group for key, value in vars(_find(name) or object).items() if key[:2] != "__"
        }
        for name in group:
            _complete(name, content)


def part_of_basicsr(module: str, name: str, cost: str) -> Any:
    """Return class ``name`` of BasicSR's ``module``; where this BasicSR lacks it, one that can't be built.

    ``cost`` says what can't be used without it, for :func:`tell_basicsr`.
    """
    found = getattr(_find(module), name, None)
    if found is not None:
        return found
    MISSING[f"{module}.{name}"] = cost

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise UserError(f"{cost} needs {module}.{name}, which {_place()} lacks; the one of pip install basicsr has it")

    return type(name, (), {"__init__": refuse, "__module__": module})


def _place() -> str:
    import basicsr

    version = getattr(basicsr, "__version__", None) or getattr(_find("basicsr.version"), "__version__", "?")
    return f"basicsr {version} of {Path(str(basicsr.__file__)).parent}"


def tell_basicsr() -> str:
    """Return a line for the log: which ``basicsr`` is used, from where, and what it lacks."""
    lacks = "; ".join(f"it lacks {part}: without it there is no {cost}" for part, cost in MISSING.items())
    return f"BasicSR: {_place()}{lacks and '; ' + lacks}."


def replace(original: Callable, new: Callable, inside: str = "") -> None:
    """Let all modules that have imported the function ``original``, or those ``inside`` a package, call ``new``."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "tlw_basicsr" or (inside and not f"{name}.".startswith(f"{inside}.")):
            continue
        names = [key for key, value in list(getattr(module, "__dict__", {}).items()) if value is original]
        for key in names:
            setattr(module, key, new)


def replace_functions() -> None:
    """Put the functions of :data:`REPLACED` in BasicSR's place, where a fork has not given them other arguments."""
    for theirs, ours in REPLACED.items():
        (module, name), (our_module, our_name) = theirs.rsplit(".", 1), ours.rsplit(".", 1)
        original = getattr(_find(module), name, None)
        new = getattr(importlib.import_module(our_module), our_name)
        if original is None or original is new:
            continue
        if list(inspect.signature(original).parameters) == list(inspect.signature(new).parameters):
            replace(original, new, "basicsr.data" if name == "scandir" else "")


def mkdir_and_rename(path: str) -> None:
    """BasicSR's: makes a folder; one of this name is renamed first by the time, and where that is taken a number."""
    if Path(path).exists():
        name = f"{path}_archived_{time.strftime('%Y%m%d_%H%M%S')}"
        names = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        new = next(name for name in names if not Path(name).exists())
        print(f"Path already exists. Rename it to {new}", flush=True)
        Path(path).rename(new)
    Path(path).mkdir(parents=True)


def filter2D(img: Tensor, kernel: Tensor) -> Tensor:
    """BasicSR's: every image (N, C, H, W) convolved with its kernel (N or 1, K, K), K odd, with reflected borders."""
    (n, c, h, w), size = img.shape, kernel.size(-1)
    if size % 2 == 0:
        raise ValueError(f"filter2D: the kernel's side must be odd, got {size}")
    padded = F.pad(img, [size // 2] * 4, mode="reflect").reshape(1, n * c, h + size - 1, w + size - 1)
    kernels = kernel.reshape(-1, 1, 1, size, size).expand(n, c, 1, size, size).reshape(n * c, 1, size, size)
    return F.conv2d(padded, kernels, groups=n * c).reshape(n, c, h, w)


def fused_leaky_relu(input: Tensor, bias: Tensor, negative_slope: float = 0.2, scale: float = 2**0.5) -> Tensor:
    """BasicSR's, of StyleGAN2: scale·leaky_relu(input + bias), by its CUDA extension where that is compiled."""
    module = importlib.import_module("basicsr.ops.fused_act.fused_act")
    if hasattr(module, "fused_act_ext") and input.is_cuda:
        return module.FusedLeakyReLUFunction.apply(input, bias, negative_slope, scale)
    return scale * F.leaky_relu(input + bias.view(1, -1, *[1] * (input.ndim - 2)), negative_slope)


class CudaMeans(TorchFunctionMode):
    """Within it, ``.cuda()`` and ``device='cuda'`` mean ``device``, the one that the model is on.

    BasicSR's Real-ESRGAN models call ``.cuda()`` in their constructors and queues, and its video models' validation
    asks for ``device='cuda'``, also where a training runs on the CPU.
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
