"""Training data that continues where an interrupted run stopped, whatever the number of workers.

BasicSR's samplers start an epoch again on resume, and its workers repeat their random numbers in every epoch. Here the
sampler can begin inside an epoch, and the random numbers of an item depend on the seed, the epoch and the item's
position alone.
"""

import random
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
from basicsr.data import build_dataset
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import Dataset

from tlw_basicsr.data.listing import mend_paths
from tlw_basicsr.registry import OTHER, find_origin
from tlw_basicsr.util.errors import UserError, first_line


class Draw(NamedTuple):
    """One item to load: the index of an image, and the place in the training that seeds its random numbers."""

    index: int
    epoch: int
    rank: int
    position: int


class ResumableSampler(EnlargedSampler):
    """BasicSR's sampler in the same order, which yields :class:`Draw` s and can begin inside an epoch."""

    def __init__(self, dataset: Dataset, num_replicas: int, rank: int, ratio: int = 1) -> None:
        super().__init__(dataset, num_replicas, rank, ratio)
        self.start = 0

    def set_position(self, epoch: int, start: int) -> None:
        """Begin with the item at ``start`` of ``epoch``."""
        self.set_epoch(epoch)
        self.start = start

    def __iter__(self) -> Iterator[Draw]:
        for position, index in enumerate(super().__iter__()):
            if position >= self.start:
                yield Draw(index, self.epoch, self.rank, position)


class CheckedDataset(Dataset):
    """A data set whose errors are one line that names the image; ``where`` is the place of its options."""

    def __init__(self, opt: dict[str, Any], where: str) -> None:
        self.where = where
        try:
            self.dataset = build_dataset(opt)
        except UserError:
            raise
        except Exception as error:
            reason = first_line(error)
            raise UserError(f"{where}: {opt['type']} can't be built from these options ({reason})") from error
        if hasattr(self.dataset, "paths"):
            self.dataset.paths = mend_paths(self.dataset.paths, opt)

    def __getattr__(self, name: str) -> Any:
        if name == "dataset":  # not set yet
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  torch's Dataset has no length

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except UserError:
            raise
        except Exception as error:  # the data set raises what it likes
            paths = getattr(self.dataset, "paths", None)
            item = paths[index] if isinstance(paths, list) and index < len(paths) else f"item {index}"
            item = " or ".join(map(str, item.values())) if isinstance(item, dict) else item
            kind = type(self.dataset)  # one of others has code of its own, which does more than reading
            failure = f"{kind.__name__} fails on {item}" if find_origin(kind) == OTHER else f"{item} can't be read"
            raise UserError(f"{self.where}: {failure} ({first_line(error)})") from error


class NamedDataset(CheckedDataset):
    """A data set for validation, whose result images BasicSR saves under ``names``, if they are set.

    BasicSR takes a result's name from the stem of the item's ``lq_path``, which may be that of several images.
    """

    names: list[str] | None = None

    def __getitem__(self, index: int) -> Any:
        item = super().__getitem__(index)
        if self.names:  # in the same folder: video models also take names from there
            path = PurePosixPath(str(item["lq_path"]).replace("\\", "/"))
            item["lq_path"] = str(path.with_name(f"{self.names[index]}.png"))
        return item


class SeededDataset(Dataset):
    """A data set that is indexed by :class:`Draw` and gives every item random numbers of its own.

    The generators of python, numpy and torch are seeded for the item and restored after it.
    """

    def __init__(self, dataset: Dataset, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]  torch's Dataset has no length

    def __getitem__(self, draw: Draw) -> Any:
        python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        sequence = np.random.SeedSequence([self.seed, draw.epoch, draw.rank, draw.position])
        words = [int(word) for word in sequence.generate_state(3)]
        try:
            random.seed(words[0])
            np.random.seed(words[1])
            torch.default_generator.manual_seed(words[2])  # torch.manual_seed takes a millisecond, and seeds GPUs
            return self.dataset[draw.index]
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(cpu)
