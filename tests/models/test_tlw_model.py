import math
from functools import partial

import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY

from tests.conftest import control_options, tiny_options
from tlw_basicsr import TLWMixin, UserError, error_weights, k_schedule, weighted_pixel_loss, with_tlw
from tlw_basicsr.models import build_model
from tlw_basicsr.models.training import TrainingMixin
from tlw_basicsr.states import get_random_state, set_random_state


def built(photographs, tmp_path, options=tiny_options, **changes):
    opt = options(photographs, **changes)
    opt |= {"is_train": True, "dist": False, "rank": 0, "world_size": 1}
    opt["path"] |= {"models": str(tmp_path), "training_states": str(tmp_path)}
    model = build_model(opt)
    if isinstance(model, TLWMixin):
        model.set_epoch(0)
    return model


def batch(pair):
    sr, gt = pair
    return {"lq": torch.nn.functional.avg_pool2d(sr, 2), "gt": gt}


def parameters(net):
    return {name: value.detach().clone() for name, value in net.state_dict().items()}


def changed(before, net):
    return any(not torch.equal(value, before[name]) for name, value in net.named_parameters())


def test_the_class_stands_on_its_base(photographs, tmp_path):
    model = built(photographs, tmp_path)
    assert type(model).__name__ == "TLWSRModel"
    assert isinstance(model, SRModel) and isinstance(model, TLWMixin)
    assert with_tlw(SRModel) is with_tlw(SRModel)
    assert "TLWModel" in MODEL_REGISTRY


def test_e_step_changes_phi_alone_and_m_step_theta_alone(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)
    model.feed_data(batch(pair))
    theta, phi = parameters(model.net_g), parameters(model.net_w)

    model.optimizer_g.zero_grad()
    output = model.net_g(model.lq)
    l_theta = model.cri_pix(output, model.gt)  # the E step happens in this call
    assert changed(phi, model.net_w)
    assert not changed(theta, model.net_g)
    assert all(p.grad is None for p in model.net_g.parameters())

    phi = parameters(model.net_w)
    model.net_w.zero_grad()
    l_theta.backward()
    model.optimizer_g.step()
    assert changed(theta, model.net_g)
    assert not changed(phi, model.net_w)
    assert all(p.grad is None for p in model.net_w.parameters())


def test_one_iteration_is_the_papers(photographs, tmp_path, pair):
    """The same iteration, written out: one step on L_φ, fresh weights of the new φ, one step on L_θ of the same x̂."""
    model = built(photographs, tmp_path, train__ema_decay=0)
    twin = built(photographs, tmp_path, train__ema_decay=0)
    twin.net_g.load_state_dict(model.net_g.state_dict())
    twin.net_w.load_state_dict(model.net_w.state_dict())
    data = batch(pair)

    torch.manual_seed(9)
    model.update_learning_rate(1)
    model.feed_data(data)
    model.optimize_parameters(1)

    torch.manual_seed(9)
    twin.net_w.k = k_schedule(0)
    loss = twin.cri_tlw
    adam_w = torch.optim.Adam(twin.net_w.parameters(), 1e-3)
    adam_g = torch.optim.Adam(twin.net_g.parameters(), 1e-3)
    sr = twin.net_g(data["lq"])
    distance = loss.distance_to(data["gt"])
    loss.weight_loss(sr.detach(), data["gt"], twin.net_w(sr.detach(), data["gt"]), distance).backward()
    adam_w.step()
    with torch.no_grad():
        w = twin.net_w(sr, data["gt"])
    loss(sr, data["gt"], w, distance).backward()
    adam_g.step()

    for ours, expected in ((model.net_g, twin.net_g), (model.net_w, twin.net_w)):
        for name, value in expected.state_dict().items():
            assert torch.allclose(ours.state_dict()[name], value, rtol=1e-5, atol=1e-7), name


def test_sr_network_is_run_once_and_the_weighting_network_twice_in_train_mode(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)
    calls = []
    model.net_g.register_forward_hook(lambda *_: calls.append("g"))
    model.net_w.register_forward_hook(
        lambda net, *_: calls.append(f"w{int(net.training)}{int(torch.is_grad_enabled())}")
    )
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    assert calls == ["g", "w11", "w10"]


@pytest.mark.parametrize(("unit", "t"), [("epoch", 7), ("iter", 30)])
def test_k_follows_its_schedule(photographs, tmp_path, pair, unit, t):
    model = built(photographs, tmp_path, train__tlw__k_unit=unit)
    model.set_epoch(7)
    model.feed_data(batch(pair))
    model.optimize_parameters(31)
    expected = 0.3 + 0.6 * (1 - math.exp(-t / 4))
    assert model.net_w.k == pytest.approx(expected)
    log = model.get_current_log()
    assert log["k"] == pytest.approx(expected)
    assert log["w_mean"] == pytest.approx(expected, abs=1e-5)
    assert set(log) == {"l_pix", "l_w", "wc", "w_mean", "w_std", "k"}
    assert log["wc"] == pytest.approx(math.exp(-log["l_w"]), rel=1e-5)
    assert 0 < log["w_std"] < 0.5


@pytest.mark.parametrize("weights", ["random", "error"])
def test_a_control_steps_theta_alone_with_weights_of_mean_k(photographs, tmp_path, pair, weights):
    model = built(photographs, tmp_path, partial(control_options, weights=weights), train__tlw__k_unit="iter")
    assert model.net_w is None and model.cri_tlw.distance is None
    assert model.optimizers == [model.optimizer_g]
    model.feed_data(batch(pair))
    theta = parameters(model.net_g)
    with torch.no_grad():
        sr = model.net_g(model.lq)
    model.optimize_parameters(31)
    assert changed(theta, model.net_g)
    k = 0.3 + 0.6 * (1 - math.exp(-30 / 4))
    log = model.get_current_log()
    assert set(log) == {"l_pix", "w_mean", "w_std", "k"}
    assert log["k"] == pytest.approx(k) and log["w_mean"] == pytest.approx(k, abs=1e-5)
    if weights == "error":
        expected = weighted_pixel_loss(2 * sr - 1, 2 * model.gt - 1, error_weights(sr, model.gt, k))
        assert log["l_pix"] == pytest.approx(expected.item(), rel=1e-5)
        assert log["w_std"] > 0.01


@pytest.mark.parametrize("weights", ["random", "error"])
def test_controls_train(photographs, tmp_path, pair, weights):
    model = built(photographs, tmp_path, partial(control_options, weights=weights, train__pixel_opt__base="mse"))
    model.feed_data(batch(pair))
    losses = []
    for i in range(1, 31):
        model.optimize_parameters(i)
        losses.append(model.get_current_log()["l_pix"])
    assert sum(losses[-5:]) < sum(losses[:5])


def test_epochs_without_our_loop_are_a_clear_error(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)
    model.epoch = None
    model.feed_data(batch(pair))
    with pytest.raises(UserError, match="k_unit: iter"):
        model.optimize_parameters(1)


def test_weights_learn_to_raise_the_criterion(photographs, tmp_path, pair):
    """With θ held still, WC must rise well above 1, its value for weights of no meaning at k = 1/2."""
    model = built(photographs, tmp_path, network_w__num_feat=8, train__optim_w__lr=1e-2, train__tlw__k_start=0.5)
    data = batch(pair)
    model.feed_data(data)
    sr = torch.nn.functional.interpolate(data["lq"], scale_factor=2, mode="bicubic")
    wc = []
    model.net_w.k = 0.5
    for model.current_iter in range(1, 81):
        model.tlw_pixel_loss(sr, data["gt"])
        wc.append(math.exp(-model.tlw_log["l_w"].item()))
    assert sum(wc[:5]) / 5 < 1.5
    assert sum(wc[-5:]) / 5 > 2


@pytest.mark.parametrize("stochastic", [True, False])
@pytest.mark.parametrize("base", ["l1", "mse"])
def test_every_variant_trains(photographs, tmp_path, pair, stochastic, base):
    model = built(photographs, tmp_path, train__pixel_opt__stochastic=stochastic, train__pixel_opt__base=base)
    model.feed_data(batch(pair))
    losses = []
    for i in range(1, 31):
        model.optimize_parameters(i)
        losses.append(model.get_current_log()["l_pix"])
    assert all(math.isfinite(v) for v in losses)
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_perceptual_loss_beside_tlw_adds_to_it(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)

    class Perceptual(torch.nn.Module):
        def forward(self, x, gt):
            return (x - gt).square().mean() * 0.5, None

    model.cri_perceptual = Perceptual()
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    assert {"l_pix", "l_percep", "l_w"} <= set(model.get_current_log())


def test_frames_of_a_video_are_samples(photographs, tmp_path, pair):
    folded, unfolded = built(photographs, tmp_path), built(photographs, tmp_path)
    unfolded.net_w.load_state_dict(folded.net_w.state_dict())
    losses = []
    for model, (sr, gt) in ((folded, pair), (unfolded, (pair[0][None], pair[1][None]))):
        torch.manual_seed(2)
        losses.append(model.tlw_pixel_loss(sr, gt).item())
    assert losses[0] == losses[1]
    assert torch.equal(folded.tlw_log["w"], unfolded.tlw_log["w"])


def test_optimisers_and_schedulers_cover_both_networks(photographs, tmp_path):
    model = built(photographs, tmp_path)
    assert model.optimizers == [model.optimizer_g, model.optimizer_w]
    assert len(model.schedulers) == 2
    ids = {id(p) for p in model.net_w.parameters()}
    assert {id(p) for group in model.optimizer_w.param_groups for p in group["params"]} == ids


def test_random_state_goes_and_comes_back():
    import random

    import numpy as np

    state = get_random_state()
    expected = random.random(), np.random.rand(), torch.rand(2).tolist()
    set_random_state(state)
    assert (random.random(), np.random.rand(), torch.rand(2).tolist()) == expected


def test_a_plain_model_gets_whole_files_too(photographs, tmp_path):
    model = built(photographs, tmp_path, model_type="SRModel", train__pixel_opt={"type": "L1Loss"})
    assert isinstance(model, TrainingMixin) and type(model).__name__ == "SRModel"
