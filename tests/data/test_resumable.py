import random

import numpy as np
import torch
from basicsr.data.data_sampler import EnlargedSampler
from torch.utils.data import DataLoader, Dataset

from tlw_basicsr.data.resumable import ResumableSampler, SeededDataset


class Noise(Dataset):
    """Items of random numbers of every generator."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return torch.tensor([index, random.random(), np.random.rand(), torch.rand(()).item()], dtype=torch.float64)


def load(epoch, start=0, workers=0, seed=1, rank=0, replicas=1):
    sampler = ResumableSampler(Noise(), replicas, rank)
    sampler.set_position(epoch, start)
    return torch.cat(list(DataLoader(SeededDataset(Noise(), seed), 2, sampler=sampler, num_workers=workers)))


def test_the_order_is_basicsrs():
    theirs = EnlargedSampler(Noise(), 1, 0, 3)
    ours = ResumableSampler(Noise(), 1, 0, 3)
    for epoch in (0, 1):
        theirs.set_epoch(epoch)
        ours.set_position(epoch, 0)
        assert [draw.index for draw in ours] == list(theirs)
    assert len(ours) == len(theirs) == 30


def test_an_epoch_continues_with_the_same_items_whatever_the_workers():
    whole = load(3)
    assert torch.equal(load(3, start=4), whole[4:])
    assert torch.equal(load(3, start=4, workers=2), whole[4:])


def test_epochs_seeds_and_ranks_differ():
    # the random numbers, not only the order
    numbers = {tuple(sorted(load(*a, **k)[:, 1].tolist())) for a, k in [((0,), {}), ((1,), {}), ((0,), {"seed": 2})]}
    assert len(numbers) == 3
    halves = [load(0, rank=r, replicas=2) for r in (0, 1)]
    assert not set(halves[0][:, 1].tolist()) & set(halves[1][:, 1].tolist())


def test_loading_leaves_the_random_numbers_of_the_training_alone():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    dataset = SeededDataset(Noise(), 0)
    for draw in ResumableSampler(Noise(), 1, 0):
        dataset[draw]
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected
