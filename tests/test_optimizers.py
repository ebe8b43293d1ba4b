"""Optimisers and learning-rate schedules by name: BasicSR's and torch's, also over an interruption."""

import pytest
import torch
from basicsr.models.base_model import BaseModel

from tests.helpers import check_resume, quick
from tlw_basicsr.models.optimizers import build_optimizer
from tlw_basicsr.util.files import load_file

OPTIMIZERS = [
    {"type": "AdamW", "lr": 1e-3, "weight_decay": 0.01},
    {"type": "SGD", "lr": 1e-2, "momentum": 0.9},
    {"type": "RMSprop", "lr": 1e-3},
    {"type": "NAdam", "lr": 1e-3},
]
SCHEDULERS = [
    {"type": "CosineAnnealingLR", "T_max": 8},
    {"type": "StepLR", "step_size": 2},
    {"type": "OneCycleLR", "max_lr": 1e-3, "total_steps": 8},
    {"type": "CosineAnnealingWarmRestarts", "T_0": 3},
]


@pytest.mark.parametrize(("optimizer", "scheduler"), zip(OPTIMIZERS, SCHEDULERS, strict=True), ids=lambda o: o["type"])
def test_a_training_with_them_is_the_same_after_an_interruption(photographs, train, tmp_path, optimizer, scheduler):
    changes = {"train__optim_g": optimizer, "train__scheduler": scheduler, "train__total_iter": 8}
    whole, _ = check_resume(train, tmp_path, quick(photographs, **changes), 4)
    state = load_file(whole / "training_states/8.state", "")
    reference = getattr(torch.optim, optimizer["type"])([torch.nn.Parameter(torch.zeros(1))], **keywords(optimizer))
    schedule = getattr(torch.optim.lr_scheduler, scheduler["type"])(reference, **keywords(scheduler))
    for _ in range(7):
        reference.step()
        schedule.step()
    assert state["optimizers"][0]["param_groups"][0]["lr"] == pytest.approx(reference.param_groups[0]["lr"])


def keywords(section):
    return {key: value for key, value in section.items() if key != "type"}


def test_an_optimiser_of_the_installed_basicsr_comes_first(monkeypatch):
    def get_optimizer(self, optim_type, params, lr, **options):
        if optim_type != "Own":
            raise NotImplementedError
        return torch.optim.SGD(params, lr * 2, **options)

    monkeypatch.setattr(BaseModel, "get_optimizer", get_optimizer)
    parameters = [torch.nn.Parameter(torch.zeros(1))]
    assert build_optimizer("Own", parameters, lr=1).param_groups[0]["lr"] == 2
    assert isinstance(build_optimizer("RAdam", parameters, lr=1), torch.optim.RAdam)
    with pytest.raises(NotImplementedError):
        build_optimizer("None", parameters, lr=1)
