"""Perceptual distances D(a, b) between images in [0, 1]: one value per sample.

A distance has three methods: ``features(x)``, ``compare(features_a, features_b)`` and the call, which joins them.
A caller that compares many images with one ``gt`` computes ``features(gt)`` once.
"""

import sys
import warnings
import zipfile
from collections.abc import Callable, Collection
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from tlw_basicsr.core.arguments import Kind, checked
from tlw_basicsr.core.functional import DistanceTo, at_least_fp32, one_per_sample

TRUNKS = {  # net: torchvision's name of it, and the layers of its `features` that are compared
    "vgg": ("vgg16", (3, 8, 15, 22, 29)),
    "alex": ("alexnet", (1, 4, 7, 9, 11)),
    "squeeze": ("squeezenet1_1", (1, 4, 7, 9, 10, 11, 12)),
}
ODD = Kind("an odd number of at least 3", lambda v: isinstance(v, int) and v >= 3 and v % 2 == 1)


class _EagerGradient(torch.autograd.Function):
    """A distance whose gradient is computed together with its value, so that the graph of one is freed before the next.

    Each sample's distance depends on that sample alone, so the gradient of their sum holds that of each.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return one_per_sample(distance(a), a)
        half = torch.is_autocast_enabled(a.device.type) and torch.get_autocast_dtype(a.device.type) == torch.float16
        scale = 1024.0 if half else 1.0  # fp16 has no room for the small gradients of a mean over pixels
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            d = one_per_sample(distance(leaf), leaf)
            if not d.requires_grad:
                raise ValueError("the distance must be differentiable: it gives its first images no gradient")
            (gradient,) = torch.autograd.grad(d.sum() * scale, leaf)
        ctx.save_for_backward(gradient / scale)
        return d.detach()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].view(-1, 1, 1, 1), None


class CachedDistanceTo(DistanceTo):
    """D(·, x) for the many images that an iteration compares with one x, whose features are computed once.

    They are computed when they are first needed. Gradients come with the values, see :class:`_EagerGradient`.

    Args:
        distance: D; of a :class:`FeatureDistance` the features of x are kept.
        gt: x (N, C, H, W) in [0, 1].
        chunk: samples that go through D at a time, all if None: less memory for more time.
    """

    def __init__(self, distance: nn.Module, gt: Tensor, chunk: int | None = None) -> None:
        super().__init__(distance, gt.detach())
        self.chunk = chunk or len(gt)
        # a tensor of inference mode has no version
        self._source, self._version = gt, None if gt.is_inference() else gt._version

    def is_of(self, gt: Tensor) -> bool:
        """Whether ``gt`` is the tensor that this was made of, unchanged since."""
        return self._source is gt and self._version is not None and self._version == gt._version

    def __call__(self, a: Tensor) -> Tensor:
        """D(a, x) of images in [0, 1]: (N,)."""
        pieces = zip(a.split(self.chunk), self.parts, strict=True)
        return torch.cat([_EagerGradient.apply(piece, part) for piece, part in pieces])

    @cached_property
    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """D(·, x) of every chunk."""
        distance = self.distance
        if not isinstance(distance, FeatureDistance) or type(distance).forward is not FeatureDistance.forward:
            return [DistanceTo(distance, part) for part in self.gt.split(self.chunk)]
        with torch.no_grad():
            references = [distance.features(part) for part in self.gt.split(self.chunk)]
        return [lambda a, b=reference: distance.compare(distance.features(a), b) for reference in references]


class FeatureDistance(nn.Module):
    """Base of the distances; a subclass gives ``features`` and ``compare``, or a ``forward`` of its own instead."""

    def features(self, x: Tensor) -> Any:
        """What :meth:`compare` needs of images ``x`` (N, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def compare(self, features_a: Any, features_b: Any) -> Tensor:
        """D of two batches by their features: (N,)."""
        raise NotImplementedError

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """D(a, b) of two batches of images (N, C, H, W) in [0, 1]: (N,)."""
        return self.compare(self.features(a), self.features(b))


class Trunk(nn.Sequential):
    """The first layers of a network, which returns the outputs of those numbered in ``taps``."""

    def __init__(self, layers: nn.Sequential, taps: Collection[int]) -> None:
        super().__init__(*layers[: max(taps) + 1])
        self.taps = taps

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images (N, 3, H, W), normalised, to feature maps."""
        maps = []
        for number, layer in enumerate(self):
            x = layer(x)
            if number in self.taps:
                maps.append(x)
        return maps


class LPIPSDistance(FeatureDistance):
    r"""Distance of deep features of a network of torchvision.

    With f_l the feature map of layer l, of unit length over the channels at every pixel::

        D(a, b) = Σ_l mean_{h,w} Σ_c v_lc (f_l(a) - f_l(b))²,   v = 1 without linear heads

    ``net='vgg', linear=False`` is the D of the TLW paper (relu1_2, 2_2, 3_3, 4_3, 5_3 of VGG-16); with
    ``linear=True`` it is LPIPS (Zhang et al., CVPR 2018, version 0.1). Images in [0, 1] are mapped to [-1, 1]. The
    gradient is finite where a feature vector is zero, which that of the ``lpips`` package is not.

    Args:
        net: ``'vgg'`` (images of at least 16 pixels a side), ``'alex'`` (32) or ``'squeeze'`` (32).
        linear: weight the channels by LPIPS' linear heads, which the ``lpips`` package ships.
        weights: None for torchvision's ImageNet weights (torch hub's cache, else a download); a path to such a
            file; or ``'random'`` for seeded random weights.
        seed: seed of the random weights.

    Raises:
        ValueError: an argument is not what is accepted, or the weights could not be loaded; the message says which
            file is needed and where.
        ImportError: torchvision, or for ``linear=True`` lpips, is not installed.
    """

    shift: Tensor
    scale: Tensor

    @checked
    def __init__(
        self,
        net: Literal["vgg", "alex", "squeeze"] = "vgg",
        linear: bool = False,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        from torchvision.models import get_model  # late: it takes longer to import than all of the core

        name, taps = TRUNKS[net]
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
            torch.manual_seed(seed)
            # without memory where the weights are read from a file
            with torch.device("cpu" if weights == "random" else "meta"):
                self.trunk = Trunk(get_model(name, weights=None).features, taps)
        if weights != "random":
            self.trunk.to_empty(device="cpu")
            state = read_weights(weights) if weights is not None else load_imagenet_weights(net)
            load_trunk(self.trunk, state, weights or net, net)
        self.heads = nn.ParameterList(load_heads(net)) if linear else None
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))
        self.requires_grad_(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` of the network; the rest is little."""
        self.trunk.compile(*args, **kwargs)

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length feature maps of every layer; one channel is taken for three equal ones.

        Raises:
            ValueError: another number of channels.
        """
        if x.shape[1] not in (1, 3):
            raise ValueError(f"LPIPSDistance: images must have 3 channels, or 1, got {x.shape[1]}")
        maps = [at_least_fp32(f) for f in self.trunk((2 * x - 1 - self.shift) / self.scale)]
        norms = [torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10 for f in maps]
        # in place where autograd allows: maps are large, and writing them anew takes a tenth of the time
        return [f / n if f.requires_grad else f.div_(n) for f, n in zip(maps, norms, strict=True)]

    def compare(self, features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
        """Σ over the layers of the mean squared difference: (N,)."""
        total = torch.zeros(len(features_a[0]), device=features_a[0].device)
        for layer, (a, b) in enumerate(zip(features_a, features_b, strict=True)):
            squared = nn.functional.mse_loss(a, b, reduction="none")
            summed = squared.sum(dim=1) if self.heads is None else nn.functional.conv2d(squared, self.heads[layer])
            total = total + at_least_fp32(summed).flatten(1).mean(dim=1)
        return total


class SSIMDistance(FeatureDistance):
    """Light distance that needs no weights: D(a, b) = 1 - SSIM(a, b), of the ``piq`` package, float32.

    SSIM (Wang et al., TIP 2004) with an 11×11 Gaussian window of σ = 1.5, averaged over pixels and channels. The
    images are first reflected at their borders by half a window: else pixels there would hardly count, and the weights
    that maximise the criterion would leave them untrained. As in SSIM's authors' code, they are average-pooled by
    round(shorter side / 256) where that is 2 or more.

    Args:
        kernel_size: side of the Gaussian window, odd; images must have more than half as many pixels a side.

    Raises:
        ValueError: ``kernel_size`` is not odd, or below 3.
        ImportError: piq is not installed.
    """

    @checked
    def __init__(self, kernel_size: Annotated[int, ODD] = 11) -> None:
        super().__init__()
        from piq import ssim  # late: it imports torchvision, which takes longer to import than all of the core

        self.kernel_size, self._ssim = kernel_size, ssim

    def features(self, x: Tensor) -> Tensor:
        """The image, clamped to [0, 1], as piq demands, and reflected at its borders."""
        return nn.functional.pad(at_least_fp32(x).clamp(0, 1), [self.kernel_size // 2] * 4, mode="reflect")

    def compare(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """1 - SSIM: (N,); NaN for a sample that is not finite, which piq refuses."""
        finite = (features_a.isfinite() & features_b.isfinite()).flatten(1).all(dim=1)
        images = [f.nan_to_num() for f in (features_a, features_b)]
        with torch.autocast(features_a.device.type, enabled=False):
            ssim = self._ssim(*images, kernel_size=self.kernel_size, data_range=1.0, reduction="none")
        return torch.where(finite, 1 - ssim, torch.nan)


# ------------------------------------------------------------------------------------------------- weights


def load_trunk(trunk: Trunk, state: Any, source: str, net: str) -> None:
    """Load what ``trunk`` needs of the state dict of torchvision's whole network ``net``.

    Raises:
        ValueError: a tensor is missing, of another shape or kind, or not finite.
    """
    own, prefix = trunk.state_dict(), "features."
    theirs = {name: state.get(prefix + name) if isinstance(state, dict) else None for name in own}
    if not all(
        torch.is_tensor(v) and v.is_floating_point() and v.shape == own[name].shape for name, v in theirs.items()
    ):
        raise ValueError(f"LPIPSDistance: weights: {source} does not hold the weights of torchvision's {net}")
    trunk.load_state_dict(theirs)
    if not all(value.isfinite().all() for value in trunk.state_dict().values()):
        raise ValueError(f"LPIPSDistance: weights: {source} has values that are not finite")


def read_weights(path: str) -> Any:
    """The content of a ``torch.save`` file; no code in it is run, and a flipped byte is found.

    Raises:
        ValueError: it does not exist or could not be loaded.
    """
    try:
        file = Path(path).expanduser()
        if not file.is_file():
            raise ValueError(f"LPIPSDistance: weights: {path} does not exist, or is not a file")
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:  # torch does not compare the checksums
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(f"{damaged} is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old formats
            return torch.load(file, map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # torch, zipfile and pickle each have their own
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"LPIPSDistance: weights: {path} could not be loaded ({reason})") from error


class MissingWeights(ValueError):
    """The ImageNet weights of a network are not in torch hub's cache, and could not be downloaded."""

    def __init__(self, net: str, reason: str, file: Path) -> None:
        self.net, self.reason, self.file = net, reason, file
        super().__init__(
            self.advise("LPIPSDistance", "take SSIMDistance(), which needs none", ", or name it by weights=PATH")
        )

    def advise(self, part: str, instead: str, option: str = "") -> str:
        """The message in the words of a caller: what to take instead, and the option that names the file."""
        return (
            f"{part}: the ImageNet weights of {self.net} could not be loaded ({self.reason}); {instead}, or put "
            f"torchvision's file {self.file.name} at {self.file}{option}"
        )

    def in_options(self) -> str:
        """The message for those who name the distance by ``{type: …}``."""
        return self.advise(
            "LPIPSDistance", "take {type: SSIMDistance}, which needs none", ", or name it by weights: PATH"
        )


def load_imagenet_weights(net: str) -> dict[str, Any]:
    """State dict of torchvision's network from torch hub's cache, or downloaded.

    Raises:
        MissingWeights: neither.
    """
    from torchvision.models import get_model_weights

    entry = get_model_weights(TRUNKS[net][0])["IMAGENET1K_V1"]
    try:
        return dict(
            entry.get_state_dict(progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True)
        )
    except Exception as error:
        file = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
        raise MissingWeights(net, f"{type(error).__name__}: {error}".splitlines()[0], file) from None


def load_heads(net: str) -> list[Tensor]:
    """LPIPS' linear heads, version 0.1: for each layer a kernel (1, C, 1, 1), from a file of the ``lpips`` package."""
    package = find_spec("lpips")
    if package is None or package.origin is None:
        raise ImportError("LPIPSDistance: linear=True needs the heads of the lpips package: pip install lpips")
    file = Path(package.origin).parent / "weights" / "v0.1" / f"{net}.pth"
    state = torch.load(file, map_location="cpu", weights_only=True)
    return [state[f"lin{layer}.model.1.weight"] for layer in range(len(state))]
