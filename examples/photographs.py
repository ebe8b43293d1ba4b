"""Crops of scikit-image's photographs, for the examples."""

import skimage.data
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

NAMES = ("astronaut", "coffee", "chelsea", "rocket")


class Crops(Dataset):
    """``length`` pairs: an HR crop of ``side`` pixels, RGB in [0, 1], and its LR image, half as large."""

    def __init__(self, length: int, side: int = 48) -> None:
        self.length, self.side = length, side
        arrays = [getattr(skimage.data, name)().copy() for name in NAMES]
        self.images = [torch.from_numpy(array).permute(2, 0, 1).float() / 255 for array in arrays]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image = self.images[index % len(self.images)]
        generator = torch.Generator().manual_seed(index)
        top, left = (int(torch.randint(length - self.side, (), generator=generator)) for length in image.shape[1:])
        gt = image[:, top : top + self.side, left : left + self.side]
        return F.interpolate(gt[None], scale_factor=0.5, mode="bicubic", antialias=True)[0], gt
