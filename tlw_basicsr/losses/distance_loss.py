"""Perceptual distances D(a, b) between images in [0, 1]: one value per sample.

A distance has three methods: ``features(x)``, ``compare(features_a, features_b)`` and the call, which joins them.
Whoever compares many images with one ``gt`` computes ``features(gt)`` once.
"""

import sys
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import lpips
import piq
import torch
from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn
from torchvision import models as tv

from tlw_basicsr.core.functional import DistanceTo, at_least_fp32
from tlw_basicsr.networks import check_values
from tlw_basicsr.util.errors import UserError, expanded, first_line
from tlw_basicsr.util.files import load_file

TRUNK_WEIGHTS = {
    "vgg": tv.VGG16_Weights.IMAGENET1K_V1,
    "alex": tv.AlexNet_Weights.IMAGENET1K_V1,
    "squeeze": tv.SqueezeNet1_1_Weights.IMAGENET1K_V1,
}


class _EagerGradient(torch.autograd.Function):
    """A distance whose gradient is computed together with its value, so that the graph of one is freed before the next.

    Each sample's distance depends on that sample alone, so the gradient of their sum holds that of each.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, distance: Callable[[Tensor], Tensor]) -> Tensor:
        if not ctx.needs_input_grad[0]:
            return distance(a)
        half = torch.is_autocast_enabled(a.device.type) and torch.get_autocast_dtype(a.device.type) == torch.float16
        scale = 1024.0 if half else 1.0  # fp16 has no room for the small gradients of a mean over pixels
        with torch.enable_grad():
            leaf = a.detach().requires_grad_()
            d = distance(leaf)
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
        self._source, self._version = gt, gt._version

    def is_of(self, gt: Tensor) -> bool:
        """Whether ``gt`` is the tensor that this was made of, unchanged since."""
        return self._source is gt and self._version == gt._version

    def __call__(self, a: Tensor) -> Tensor:
        """D(a, x) of images in [0, 1]: (N,)."""
        pieces = zip(a.split(self.chunk), self.parts, strict=True)
        return torch.cat([_EagerGradient.apply(piece, part) for piece, part in pieces])

    @cached_property
    def parts(self) -> list[Callable[[Tensor], Tensor]]:
        """D(·, x) of every chunk."""
        distance = self.distance
        if not isinstance(distance, FeatureDistance):
            return [DistanceTo(distance, part) for part in self.gt.split(self.chunk)]
        with torch.no_grad():
            references = [distance.features(part) for part in self.gt.split(self.chunk)]
        return [lambda a, b=reference: distance.compare(distance.features(a), b) for reference in references]


class FeatureDistance(nn.Module):
    """Base of the distances; a subclass gives ``features`` and ``compare``."""

    def features(self, x: Tensor) -> Any:
        """What :meth:`compare` needs of images ``x`` (N, C, H, W) in [0, 1]."""
        raise NotImplementedError

    def compare(self, features_a: Any, features_b: Any) -> Tensor:
        """D of two batches by their features: (N,)."""
        raise NotImplementedError

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """D(a, b) of two batches of images (N, C, H, W) in [0, 1]: (N,)."""
        return self.compare(self.features(a), self.features(b))


@LOSS_REGISTRY.register()
class LPIPSDistance(FeatureDistance):
    r"""Distance of deep features, on the networks and heads of the ``lpips`` package.

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
        seed: of the random weights.

    Raises:
        UserError: the weights can't be had; the message says which file and where to put it.
    """

    def __init__(
        self,
        net: Literal["vgg", "alex", "squeeze"] = "vgg",
        linear: bool = False,
        weights: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if net not in TRUNK_WEIGHTS:
            raise UserError(f"LPIPSDistance: net must be one of {', '.join(TRUNK_WEIGHTS)}, got {net!r}")
        # Neither the random weights nor those overwritten below may touch the training's random numbers.
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")  # lpips calls torchvision the old way
            torch.manual_seed(seed)
            model = lpips.LPIPS(net=net, lpips=linear, pnet_rand=True, verbose=False)
        self.trunk, self.scaling = model.net, model.scaling_layer
        self.heads = model.lins if linear else None
        if weights != "random":
            state = trunk_state(net, weights)
            # lpips cuts torchvision's `features` into slices and keeps the layers' numbers
            names = {name: "features." + name.split(".", 1)[1] for name in self.trunk.state_dict()}
            if not all(
                torch.is_tensor(state.get(theirs)) and state[theirs].shape == self.trunk.state_dict()[ours].shape
                for ours, theirs in names.items()
            ):
                raise UserError(f"LPIPSDistance: {weights} does not hold the weights of torchvision's {net}")
            state = {ours: state[theirs] for ours, theirs in names.items()}
            check_values(state, self.trunk.state_dict(), weights or net, "LPIPSDistance weights")
            self.trunk.load_state_dict(state)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "LPIPSDistance":
        """Stay in eval mode: the heads have dropout."""
        return super().train(False)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """``torch.compile`` of the network; the rest is little."""
        self.trunk.compile(*args, **kwargs)

    def features(self, x: Tensor) -> list[Tensor]:
        """Unit-length feature maps of every layer."""
        maps = [at_least_fp32(f) for f in self.trunk(self.scaling(2 * x - 1))]
        norms = [torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10 for f in maps]
        # in place where autograd allows: maps are large, and writing them anew takes a tenth of the time
        return [f / n if f.requires_grad else f.div_(n) for f, n in zip(maps, norms, strict=True)]

    def compare(self, features_a: list[Tensor], features_b: list[Tensor]) -> Tensor:
        """Σ over the layers of the mean squared difference: (N,)."""
        total = torch.zeros(len(features_a[0]), device=features_a[0].device)
        for layer, (a, b) in enumerate(zip(features_a, features_b, strict=True)):
            squared = nn.functional.mse_loss(a, b, reduction="none")
            summed = squared.sum(dim=1) if self.heads is None else self.heads[layer](squared)
            total = total + at_least_fp32(summed).flatten(1).mean(dim=1)
        return total


@LOSS_REGISTRY.register()
class SSIMDistance(FeatureDistance):
    """Light distance that needs no weights: D(a, b) = 1 - SSIM(a, b), of the ``piq`` package, float32.

    SSIM (Wang et al., TIP 2004) with an 11×11 Gaussian window of σ = 1.5, averaged over pixels and channels. The
    images are first reflected at their borders by half a window: else pixels there would hardly count, and the weights
    that maximise the criterion would leave them untrained. As in SSIM's authors' code, they are average-pooled by
    round(shorter side / 256) where that is 2 or more.

    Args:
        kernel_size: side of the Gaussian window, odd; images must have more than half as many pixels a side.
    """

    def __init__(self, kernel_size: int = 11) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise UserError(f"SSIMDistance: kernel_size must be odd and at least 3, got {kernel_size}")
        self.kernel_size = kernel_size

    def features(self, x: Tensor) -> Tensor:
        """The image, clamped to [0, 1], which piq asks for, and reflected at its borders."""
        return nn.functional.pad(at_least_fp32(x).clamp(0, 1), [self.kernel_size // 2] * 4, mode="reflect")

    def compare(self, features_a: Tensor, features_b: Tensor) -> Tensor:
        """1 - SSIM: (N,); NaN for a sample that is not finite, which piq refuses."""
        finite = (features_a.isfinite() & features_b.isfinite()).flatten(1).all(dim=1)
        images = [f.nan_to_num() for f in (features_a, features_b)]
        with torch.autocast(features_a.device.type, enabled=False):
            ssim = piq.ssim(*images, kernel_size=self.kernel_size, data_range=1.0, reduction="none")
        return torch.where(finite, 1 - ssim, torch.nan)


def trunk_state(net: str, weights: str | None) -> dict[str, Tensor]:
    """State dict of torchvision's ImageNet network: from the path ``weights``, the hub's cache or a download."""
    if weights is not None:
        return load_file(expanded(weights, "distance.weights"), "LPIPSDistance weights")
    entry = TRUNK_WEIGHTS[net]
    try:
        return entry.get_state_dict(
            progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
        )
    except Exception as error:
        cached = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
        raise UserError(
            f"LPIPSDistance: the ImageNet weights of {net} can't be had ({first_line(error)}): put {cached.name} of "
            f"torchvision at {cached}, or set distance.weights to its path, or to 'random'"
        ) from error
