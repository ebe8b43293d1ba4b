"""The SR networks of the paper's comparison that BasicSR lacks; EDSR and RRDBNet are BasicSR's.

All take RGB in [0, 1] and see ``(x - rgb_mean)·img_range``. With the defaults that is [-1, 1], the range of the
published networks.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from spandrel.architectures.HAT import HAT
from torch import Tensor, nn
from torch.nn import functional as F

from tlw_basicsr.compat import part_of_basicsr

GREY = (0.5, 0.5, 0.5)
InChannels = Annotated[int, "channels of the LR image"]
OutChannels = Annotated[int, "channels of the SR image"]
ImgRange = Annotated[float, "the network sees `(x - rgb_mean)·img_range`"]
RgbMean = Annotated[Sequence[float], "subtracted from the image in [0, 1]"]
RCAN = part_of_basicsr("basicsr.archs.rcan_arch", "RCAN", "TLWRCAN")


@ARCH_REGISTRY.register()
class TLWVDSR(nn.Module):
    """VDSR as in the paper's comparison: bicubic upsampling and a residual of convolutions without biases.

    With u the LR image, upsampled by torch's bicubic::

        x̂ = u + conv(relu(conv(… relu(conv(u)))))      num_block + 2 convolutions of 3×3
    """

    mean: Tensor

    def __init__(
        self,
        num_in_ch: InChannels = 3,
        num_out_ch: Annotated[int, "channels of the SR image, the same number"] = 3,
        num_feat: Annotated[int, "channels of the hidden layers"] = 64,
        num_block: Annotated[int, "convolutions between the first and the last"] = 10,
        upscale: Annotated[int, "factor"] = 4,
        img_range: ImgRange = 2.0,
        rgb_mean: RgbMean = GREY,
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
    """RCAN as in the paper's comparison: BasicSR's, but upscaled by **one** PixelShuffle(s), for ×4 too."""

    def __init__(
        self,
        num_in_ch: InChannels = 3,
        num_out_ch: OutChannels = 3,
        num_feat: Annotated[int, "channels of the hidden layers"] = 64,
        num_group: Annotated[int, "residual groups"] = 10,
        num_block: Annotated[int, "blocks in a group"] = 20,
        squeeze_factor: Annotated[int, "factor by which the channel attention reduces the channels"] = 16,
        upscale: Annotated[int, "factor s, any"] = 4,
        res_scale: Annotated[float, "factor of a block's residual"] = 1,
        img_range: ImgRange = 2.0,
        rgb_mean: RgbMean = GREY,
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
    """HAT, spandrel's; the defaults are the paper's small one. Images of any size are padded to the window."""

    def __init__(
        self,
        num_in_ch: Annotated[int, "channels of the LR and the SR image"] = 3,
        embed_dim: Annotated[int, "channels of the transformer"] = 96,
        depths: Annotated[Sequence[int], "blocks in each group"] = (6, 6, 6, 6),
        num_heads: Annotated[Sequence[int], "attention heads in each group"] = (6, 6, 6, 6),
        window_size: Annotated[
            int, "side of the attention windows; a side of the LR image must have more than half as many pixels"
        ] = 7,
        compress_ratio: Annotated[int, "factor by which the convolution blocks reduce the channels"] = 3,
        squeeze_factor: Annotated[int, "factor by which the channel attention reduces the channels"] = 30,
        conv_scale: Annotated[float, "factor of the convolution blocks"] = 0.01,
        overlap_ratio: Annotated[float, "by how much of a window the overlapping attention's windows are larger"] = 0.0,
        mlp_ratio: Annotated[float, "hidden features of an MLP, in `embed_dim`"] = 4.0,
        drop_path_rate: Annotated[float, "stochastic depth while training"] = 0.1,
        num_feat: Annotated[int, "channels around the upsampler"] = 64,
        upscale: Annotated[int, "factor, 2, 3, 4 or 8"] = 4,
        img_range: ImgRange = 2.0,
        rgb_mean: RgbMean = GREY,
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
    """

    def __init__(
        self,
        num_in_ch: Annotated[int, "channels of the features"] = 64,
        num_out_ch: OutChannels = 3,
        num_feat: Annotated[int, "channels between the convolutions"] = 64,
        upscale: Annotated[int, "from the features' size to the SR image's"] = 4,
    ) -> None:
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
