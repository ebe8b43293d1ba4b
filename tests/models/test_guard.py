"""Numbers that go wrong: named in the iteration in which they appear, and the step leaves no trace."""

import math
from types import SimpleNamespace

import pytest
import torch

from tests.conftest import plain_options, tiny_options
from tests.helpers import EVERY_BASE, GAN, batch, built, feed_noise, iterate, log_lines, log_text, quick, refused, same
from tlw_basicsr import SSIMDistance, UserError
from tlw_basicsr.data.bicubic_sr_dataset import BicubicSRDataset
from tlw_basicsr.models import guard, training
from tlw_basicsr.util.files import load_file


def everything(model):
    """Copies of all networks with their buffers, and of all optimisers' states."""
    nets = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in model.networks().items()}
    states = [
        [{k: torch.as_tensor(v).clone() for k, v in s.items()} for s in o.state.values()] for o in model.optimizers
    ]
    return nets, states


def poisoned(tensor, value=math.nan):
    tensor = tensor.clone(memory_format=torch.contiguous_format)
    tensor.view(-1)[-1] = value
    return tensor


def poison_gradient(net):
    """A NaN in one gradient of a network, with finite losses."""
    parameter = [p for p in net.parameters() if p.requires_grad][-1]
    return parameter.register_hook(lambda g: poisoned(g, math.inf))


CAUSES = {
    "lq": None,
    "gt": None,
    # of the M step
    "weights w": lambda m: m.net_w.register_forward_hook(
        lambda _, __, w: w if torch.is_grad_enabled() else poisoned(w)
    ),
    "l_pix": lambda m: m.tlw.register_forward_hook(lambda _, __, loss: loss + math.inf),  # with a finite gradient
    "gradient of optimizer_g": lambda m: poison_gradient(m.net_g),
    "gradient of optimizer_w": lambda m: poison_gradient(m.net_w),
}


@pytest.mark.parametrize("cause", CAUSES)
def test_every_cause_is_named_and_leaves_no_trace(photographs, tmp_path, pair, cause, monkeypatch):
    messages = []
    monkeypatch.setattr(training, "get_root_logger", lambda: SimpleNamespace(warning=messages.append))
    model = built(photographs, tmp_path)
    good = {**batch(pair), "lq_path": ["a/lq.png", "b/lq.png"], "gt_path": ["a/gt.png", "b/gt.png"]}
    model.feed_data(good)
    model.optimize_parameters(1)
    before = everything(model)
    if cause in ("lq", "gt"):
        model.feed_data({**good, cause: poisoned(good[cause])})
        model.optimize_parameters(2)
    else:
        handle = CAUSES[cause](model)
        model.optimize_parameters(2)
        handle.remove()
    assert same(everything(model), before)
    assert model.get_current_log()["skipped"] == 1
    (message,) = messages
    assert message.startswith(f"Iteration 2: not finite: {cause}")
    assert all(path in message for path in ("a/lq.png", "b/gt.png")) and "\n" not in message
    model.feed_data(good)
    assert iterate(model, 3, "net_g", "net_w") == [True, True]
    assert model.guard.in_row == 0 and model.guard.skipped == 1


def test_the_first_step_of_all_can_be_undone(photographs, tmp_path, pair):
    """With the running averages of batch norm, which no gradient changes."""
    model = built(photographs, tmp_path)
    model.net_g.add_module("norm", torch.nn.BatchNorm2d(3))
    plain = model.net_g.forward
    model.net_g.forward = lambda x: model.net_g.norm(plain(x))
    model.feed_data({**batch(pair), "gt": poisoned(pair[1])})
    before = everything(model)
    model.optimize_parameters(1)
    assert same(everything(model), before) and before[1] == [[], []]
    assert model.tlw.last_e_step is None
    model.feed_data(batch(pair))
    # after the step of φ, whose Adam holds something then
    handle = model.net_g.conv_last.weight.register_hook(lambda g: g * math.inf)
    model.optimize_parameters(1)
    handle.remove()
    assert same(everything(model), before)


class Averaging(torch.nn.Module):
    """Its average is another tensor after each forward, its mask is meant to be infinite."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.register_buffer("average", torch.zeros(()))
        self.register_buffer("mask", torch.full((3,), -math.inf))

    def forward(self, x):
        self.average = 0.9 * self.average + 0.1 * x.detach().mean()
        return self.net(x)


def test_buffers_that_a_network_replaces_are_put_back_and_infinite_ones_are_no_cause(
    photographs, tmp_path, pair, monkeypatch
):
    messages = []
    monkeypatch.setattr(training, "get_root_logger", lambda: SimpleNamespace(warning=messages.append))
    model = built(photographs, tmp_path, plain_options)
    model.net_g = Averaging(model.net_g)
    model.model_ema = lambda decay: None
    for i in (1, 2):
        model.feed_data(batch(pair))
        model.optimize_parameters(i)
    before = everything(model)
    model.feed_data({**batch(pair), "lq": poisoned(batch(pair)["lq"])})
    model.optimize_parameters(3)
    assert same(everything(model), before) and before[0]["net_g"]["average"] > 0
    assert "not finite: lq, output, l_pix" in messages[0] and "state of net_g (" in messages[0]
    model.feed_data({**batch(pair), "gt": poisoned(pair[1])})
    model.optimize_parameters(4)
    assert "state of net_g" not in messages[1]
    model.feed_data(batch(pair))
    monkeypatch.setattr(model, "cri_pix", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.optimize_parameters(5)


NETS = {"SwinIRModel": "net_g", "SRGANModel": "net_d", "ESRGANModel": "net_w", "RealESRNetModel": "net_g"}
NETS["RealESRGANModel"] = "net_d"


@pytest.mark.parametrize("base", NETS)
def test_every_base_model_and_every_optimiser(photographs, tmp_path, base):
    """The discriminator's gradient comes after the steps of the two other networks."""
    model = built(photographs, tmp_path, base_model=base, **EVERY_BASE[base])
    feed_noise(model)
    model.optimize_parameters(1)
    before = everything(model)
    handle = poison_gradient(getattr(model, NETS[base]))
    model.optimize_parameters(2)
    handle.remove()
    assert same(everything(model), before)
    assert iterate(model, 3, NETS[base]) == [True]


def test_an_undone_step_is_as_if_it_had_not_been(photographs, tmp_path, pair):
    """Also with gradients kept for a later step: the bad ones are not in their mean."""
    many = {"train__accumulation_steps": 3, "train__tlw__weight_interval": 2, **GAN, "base_model": "ESRGANModel"}
    for more in ({}, many):
        ends = []
        for bad in ((), (2, 5)):
            torch.manual_seed(0)
            model = built(photographs, tmp_path, **more)
            for i in range(1, 7):
                if i in bad:
                    model.feed_data({**batch(pair), "gt": poisoned(pair[1])})
                    model.optimize_parameters(i)
                model.feed_data(batch(pair))
                torch.manual_seed(i)
                model.optimize_parameters(i)
            assert model.guard.skipped == len(bad)
            ends.append(everything(model))
        assert same(*ends), more


def test_max_bad_steps_in_a_row_end_the_training_with_a_file_to_look_at(photographs, train, tmp_path, monkeypatch):
    plain = BicubicSRDataset.__getitem__
    calls = []

    def item(self, index):
        got = plain(self, index)
        calls.append(index)
        # the first two batches, and all from the fifth on
        return got if 4 < len(calls) <= 8 else {**got, "gt": poisoned(got["gt"])}

    monkeypatch.setattr(BicubicSRDataset, "__getitem__", item)
    opt = quick(photographs, train__max_bad_steps=3, train__total_iter=20, logger__save_checkpoint_freq=1)
    opt["train"]["rehearse"] = False
    refused(r"train\.max_bad_steps: 3 iterations in a row .* 7: gt.*bad_step_7\.pth", train, opt)
    experiment = tmp_path / "experiments/tiny"
    dump = load_file(experiment / "bad_step_7.pth", "")
    assert dump["terms"][0] == "gt" and dump["batch"]["gt"].isnan().any() and all("photo" in p for p in dump["paths"])
    assert {p.name for p in experiment.glob("models/net_g_*")} == {f"net_g_{i}.pth" for i in range(1, 7)}
    first, second, fourth = (load_file(experiment / f"models/net_g_{i}.pth", "") for i in (1, 2, 4))
    assert same(first, second) and not same(first, fourth)
    assert log_text(experiment).count("The step is left out") == 5
    assert log_lines(experiment)[3]["skipped"] == "2.0000e+00"


def test_bad_steps_in_a_row_are_counted_on_in_a_resume(photographs, train, monkeypatch):
    """One is enough with ``max_bad_steps: 1``."""
    plain = BicubicSRDataset.__getitem__
    monkeypatch.setattr(BicubicSRDataset, "__getitem__", lambda *a: {**plain(*a), "gt": poisoned(plain(*a)["gt"])})

    def opt(limit, iterations):
        return quick(photographs, train__max_bad_steps=limit, train__total_iter=iterations, train__rehearse=False)

    with pytest.raises(UserError, match=r"max_bad_steps: 1 iterations in a row .* 1: gt"):
        train(opt(1, 4) | {"name": "one"})
    train(opt(3, 2))
    with pytest.raises(UserError, match=r"max_bad_steps: 3 iterations in a row .* 3: gt"):
        train(opt(3, 6), "--auto_resume")


def test_no_nan_reaches_a_saved_network(photographs, train, tmp_path):
    """A network that overflows in its step: finite gradients, infinite parameters."""
    with pytest.raises(UserError, match=r"8 iterations in a row were not finite.*step of optimizer_g"):
        train(tiny_options(photographs, train__optim_g__lr=1e30, train__max_bad_steps=8))
    experiment = tmp_path / "experiments/tiny"
    dump = load_file(experiment / "bad_step_8.pth", "")
    assert dump["iter"] == 8 and len(dump["paths"]) == 2 and dump["batch"]["lq"].shape == (2, 3, 8, 8)
    saved = [load_file(p, "")["params"] for p in experiment.glob("models/*.pth")]
    assert len(saved) == 2
    assert all(v.isfinite().all() for s in [*saved, dump["net_g"], dump["net_w"]] for v in s.values())
    assert "skipped" in log_lines(experiment)[-1]


def test_a_loss_that_refuses_nan_ends_no_training(photographs, tmp_path, pair):
    model = built(photographs, tmp_path)

    def refuse(*_, **__):
        raise AssertionError("expected values in [0, 1]")

    model.tlw.forward = refuse
    model.feed_data({**batch(pair), "gt": poisoned(pair[1])})
    model.optimize_parameters(1)
    assert model.guard.skipped == 1
    model.feed_data(batch(pair))
    with pytest.raises(AssertionError, match="expected values"):
        model.optimize_parameters(2)


def test_ssim_of_a_nan_is_nan_for_its_sample_alone(pair):
    a, b = pair
    a[0, 0, 3, 3] = math.nan
    d = SSIMDistance()(a, b)
    assert d[0].isnan() and torch.equal(d[1:], SSIMDistance()(a[1:], b[1:]))


def test_without_the_guard_nothing_is_looked_at(photographs, tmp_path, pair, monkeypatch):
    model = built(photographs, tmp_path, train__guard=False)
    monkeypatch.setattr(guard, "is_sound", lambda *_: pytest.fail("looked at"))
    model.feed_data({**batch(pair), "gt": poisoned(pair[1])})
    model.optimize_parameters(1)
    assert model.guard.skipped == 0 and any(p.isnan().any() for p in model.net_g.parameters())
