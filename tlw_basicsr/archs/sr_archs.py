"""The SR networks of the paper's comparison that BasicSR lacks; EDSR and RRDBNet are BasicSR's.

All take RGB in [0, 1] and see ``(x - rgb_mean)·img_range``. With the defaults that is [-1, 1], the range of the
published networks.
"""

from collections.abc import Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.architectures.HAT import HAT
from torch import Tensor, nn
from torch.nn import functional as F

from tlw_basicsr.compat import part_of_basicsr

GREY = (0.5, 0.5, 0.5)
RCAN = part_of_basicsr("basicsr.archs.rcan_arch", "RCAN", "TLWRCAN")


@ARCH_REGISTRY.register()
class TLWVDSR(nn.Module):
    """VDSR as in the paper's comparison: bicubic upsampling and a residual of convolutions without biases.

    With u the LR image, upsampled by torch's bicubic::

        x̂ = u + conv(relu(conv(… relu(conv(u)))))      num_block + 2 convolutions of 3×3

    Args:
        num_in_ch: channels of the LR image.
        num_out_ch: channels of the SR image, the same number.
        num_feat: channels of the hidden layers.
        num_block: convolutions between the first and the last.
        upscale: factor.
        img_range: the network sees ``(x - rgb_mean)·img_range``.
        rgb_mean: subtracted from the image in [0, 1].
    """

    mean: Tensor

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 10,
        upscale: int = 4,
        img_range: float = 2.0,
        rgb_mean: Sequence[float] = GREY,
    ) -> None:
        super().__init__()
        if num_in_ch != num_out_ch:
            raise ValueError(f"num_out_ch must be num_in_ch, {num_in_ch}, got {num_out_ch}")
        self.upscale = upscale
        self.img_range = img_range
        self.register_buffer("mean", torch.tensor(rgb_mean).view(1, -1, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1, bias=False)
        self.body = nn.ModuleList(nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=False) for _ in range(num_block))
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """LR (N, C, H, W) in [0, 1] to SR (N, C, s·H, s·W)."""
        x = (x - self.mean) * self.img_range
        upsampled = F.interpolate(x, scale_factor=self.upscale, mode="bicubic", align_corners=False)
        features = self.conv_first(upsampled).relu_()
        for conv in self.body:
            features = conv(features).relu_()
        return (upsampled + self.conv_last(features)) / self.img_range + self.mean


@ARCH_REGISTRY.register()
class TLWRCAN(RCAN):
    """RCAN as in the paper's comparison: BasicSR's, but upscaled by **one** PixelShuffle(s), for ×4 too.

    Args:
        num_in_ch: channels of the LR image.
        num_out_ch: channels of the SR image.
        num_feat: channels of the hidden layers.
        num_group: residual groups.
        num_block: blocks in a group.
        squeeze_factor: factor by which the channel attention reduces the channels.
        upscale: factor s, any.
        res_scale: factor of a block's residual.
        img_range: the network sees ``(x - rgb_mean)·img_range``.
        rgb_mean: subtracted from the image in [0, 1].
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_group: int = 10,
        num_block: int = 20,
        squeeze_factor: int = 16,
        upscale: int = 4,
        res_scale: float = 1,
        img_range: float = 2.0,
        rgb_mean: Sequence[float] = GREY,
    ) -> None:
        # BasicSR's upsampler is replaced, so any scale that it knows will do
        super().__init__(
            num_in_ch, num_out_ch, num_feat, num_group, num_block, squeeze_factor, 1, res_scale, img_range, rgb_mean
        )
        self.upsample = nn.Sequential(
            nn.Conv2d(num_feat, upscale**2 * num_feat, 3, padding=1), nn.PixelShuffle(upscale)
        )


@ARCH_REGISTRY.register()
class TLWHAT(HAT):
    """HAT, spandrel's; the defaults are the paper's small one. Images of any size are padded to the window.

    Args:
        num_in_ch: channels of the LR and the SR image.
        embed_dim: channels of the transformer.
        depths: blocks in each group.
        num_heads: attention heads in each group.
        window_size: side of the attention windows; a side of the LR image must have more than half as many pixels.
        compress_ratio: factor by which the convolution blocks reduce the channels.
        squeeze_factor: factor by which the channel attention reduces the channels.
        conv_scale: factor of the convolution blocks.
        overlap_ratio: by how much of a window the overlapping attention's windows are larger.
        mlp_ratio: hidden features of an MLP, in ``embed_dim``.
        drop_path_rate: stochastic depth while training.
        num_feat: channels around the upsampler.
        upscale: factor, 2, 3, 4 or 8.
        img_range: the network sees ``(x - rgb_mean)·img_range``.
        rgb_mean: subtracted from the image in [0, 1].
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        embed_dim: int = 96,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        window_size: int = 7,
        compress_ratio: int = 3,
        squeeze_factor: int = 30,
        conv_scale: float = 0.01,
        overlap_ratio: float = 0.0,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.1,
        num_feat: int = 64,
        upscale: int = 4,
        img_range: float = 2.0,
        rgb_mean: Sequence[float] = GREY,
    ) -> None:
        super().__init__(
            in_chans=num_in_ch,
            embed_dim=embed_dim,
            depths=tuple(depths),
            num_heads=tuple(num_heads),
            window_size=window_size,
            compress_ratio=compress_ratio,
            squeeze_factor=squeeze_factor,
            conv_scale=conv_scale,
            overlap_ratio=overlap_ratio,
            mlp_ratio=mlp_ratio,
            drop_path_rate=drop_path_rate,
            num_feat=num_feat,
            upscale=upscale,
            img_range=img_range,
        )
        self.mean = torch.tensor(rgb_mean).view(1, -1, 1, 1)


@ARCH_REGISTRY.register()
class UncertaintyHead(nn.Module):
    """Log-variance map s of the uncertainty baseline, from features of an SR network.

    Nearest upsampling to the SR image's size, then three 3×3 convolutions with ELU between. Source: Ning et al.,
    "Uncertainty-Driven Loss for Single Image Super-Resolution", NeurIPS 2021.

    Args:
        num_in_ch: channels of the features.
        num_out_ch: channels of the SR image.
        num_feat: channels between the convolutions.
        upscale: from the features' size to the SR image's.
    """

    def __init__(self, num_in_ch: int = 64, num_out_ch: int = 3, num_feat: int = 64, upscale: int = 4) -> None:
        super().__init__()
        self.num_in_ch = num_in_ch
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=upscale, mode="nearest"),
            nn.Conv2d(num_in_ch, num_feat, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(num_feat, num_feat, 3, padding=1),
            nn.ELU(),
            nn.Conv2d(num_feat, num_out_ch, 3, padding=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, C', H, W) to s (N, C, s·H, s·W)."""
        return self.body(features)
