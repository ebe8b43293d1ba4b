import math

import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY

from tests.conftest import tiny_options
from tests.helpers import batch, built, log_text, refused
from tlw_basicsr import TLWMixin, TLWModel, with_tlw
from tlw_basicsr.models import tlw_model
from tlw_basicsr.models.training import TrainingMixin
from tlw_basicsr.util.files import load_file


def test_the_class_stands_on_its_base(photographs, tmp_path):
    model = built(photographs, tmp_path)
    assert type(model).__name__ == "TLWModel"
    assert isinstance(model, TLWModel) and isinstance(model, SRModel) and isinstance(model, TLWMixin)
    assert with_tlw(SRModel) is TLWModel is MODEL_REGISTRY.get("TLWModel")


def test_a_subclass_bears_its_own_name(photographs, tmp_path, register):
    class MyTLWModel(TLWModel):
        pass

    model = built(photographs, tmp_path, model_type=register(MODEL_REGISTRY, MyTLWModel))
    assert type(model).__name__ == "MyTLWModel" and isinstance(model, MyTLWModel)
    assert isinstance(model, TrainingMixin)


@pytest.mark.parametrize(("unit", "t"), [("epoch", 7), ("iter", 30)])
def test_k_follows_its_schedule(photographs, tmp_path, pair, unit, t):
    model = built(photographs, tmp_path, train__tlw__k_unit=unit)
    model.set_epoch(7)
    model.feed_data(batch(pair))
    model.optimize_parameters(31)
    expected = 0.3 + 0.6 * (1 - math.exp(-t / 4))
    log = model.get_current_log()
    assert log["k"] == pytest.approx(expected)
    assert log["w_mean"] == pytest.approx(expected, abs=1e-5)
    assert set(log) == {"l_pix", "l_w", "wc", "wc_gain", "w_mean", "w_std", "k"}
    assert log["wc"] == pytest.approx(math.exp(-log["l_w"]), rel=1e-5)
    assert 0 < log["w_std"] < 0.5


def test_epochs_without_our_loop_are_a_clear_error(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)
    model.epoch = None
    model.feed_data(batch(pair))
    refused("k_unit: iter", model.optimize_parameters, 1)


def test_the_log_reports_weights_that_are_nearly_constant(photographs, train, monkeypatch):
    monkeypatch.setattr(tlw_model, "NEARLY_CONSTANT", 0.5)
    text = log_text(train(tiny_options(photographs, train__total_iter=1)))
    assert "The weights are nearly constant (standard deviation 0.0" in text


def test_economy_needs_neither_a_network_nor_an_optimiser(photographs, train):
    tlw = {"preset": "economy", "k_unit": "iter"}
    experiment = train(tiny_options(photographs, network_w=..., train__optim_w=..., train__tlw=tlw))
    net_w = load_file(experiment / "models/net_w_8.pth", "")["params"]
    assert net_w["conv.0.weight"].shape == (16, 6, 7, 7)
    state = load_file(experiment / "training_states/8.state", "")
    assert state["optimizers"][1]["param_groups"][0]["lr"] == pytest.approx(1e-3 / 2)  # after the milestone at 4
    assert state["tlw"]["last_e_step"] == 1


def test_a_perceptual_loss_beside_tlw_adds_to_it(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)

    class Perceptual(torch.nn.Module):
        def forward(self, x, gt):
            return (x - gt).square().mean() * 0.5, None

    model.cri_perceptual = Perceptual()
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    assert {"l_pix", "l_percep", "l_w"} <= set(model.get_current_log())
