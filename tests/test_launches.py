"""What an iteration asks of a GPU, counted on ``meta``, and graphs of its steps, replayed on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tests.conftest import DEVICE, control_options, plain_options, tiny_options
from tests.helpers import EVERY_BASE, GAN, batch, built, load_script, same
from tlw_basicsr import TLW, LPIPSDistance, SSIMDistance, TLWWeightNet
from tlw_basicsr.core import functional, graphs
from tlw_basicsr.core import tlw as core_tlw

# ------------------------------------------------------------------------------------------------- counts


@pytest.fixture(scope="module")
def count():
    return load_script("count_launches").count


VGG = {"type": "LPIPSDistance", "net": "vgg"}
ECONOMY = {"network_w": ..., "train__optim_w": ..., "train__tlw": {"preset": "economy", "k_unit": "iter"}}
EDSR = {"network_g": {
    "type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 16, "upscale": 4,
}, "scale": 4}  # fmt: skip
COUNTS = {  # of EDSR 16/64: launches by part, waits
    "l1": (plain_options, {}, {"forward": 129, "loss": 4, "backward": 167, "guard": 8}, 318, 1),
    "economy": (
        tiny_options, {**ECONOMY, "train__pixel_opt__distance": VGG},
        {"M step": 5, "E step": 1.875, "backward": 165, "guard": 11.125}, 322, 1.125,
    ),
    "error": (lambda p, **c: control_options(p, "error", **c), {}, {"M step": 3}, 315, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTS)
def test_an_iteration_has_so_many_launches_and_waits(count, photographs, name):
    options, changes, parts, launches, waits = COUNTS[name]
    counts = count(options(photographs, **EDSR, **changes), 16, 192)
    assert {part: counts[part]["launches"] for part in parts} == parts
    everything = {"optimiser": 7, "EMA": 2, "other": 1}
    assert {part: counts[part]["launches"] for part in everything} == everything
    assert counts["all"] == {"launches": launches, "waits": waits, "uploads": 0}


def test_without_graphs_a_step_is_counted_by_its_operations(count, photographs):
    options = tiny_options(photographs, **EDSR, **ECONOMY, train__pixel_opt__distance=VGG)
    counts = count(options, 16, 192, use_graphs=False)
    assert counts["all"]["launches"] > 450 and counts["all"]["waits"] == 1.125


# ------------------------------------------------------------------------------------------------- replays


class Recorder(TorchDispatchMode):
    """Notes the operations of a call, to run them again on the same tensors, as a CUDA graph does."""

    replays = 0

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        memory = tree_map(lambda x: x.detach() if torch.is_tensor(x) else x, (args, kwargs or {}, result))
        self.operations.append((func, *memory))  # not the tensors, which may get other memory
        return result

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, result in self.operations:
                if func._schema.returns and all(
                    r.alias_info and not r.alias_info.is_write for r in func._schema.returns
                ):
                    continue  # a view, of memory that is written again
                again = func(*args, **kwargs)
                for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                    if torch.is_tensor(old) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


def record(function):
    with Recorder() as recorder:
        results = function()
    return results, recorder.replay


@pytest.fixture
def recorders(monkeypatch):
    """Graphs on the CPU too; returns how many replays there were."""
    recorder = record if DEVICE.type == "cpu" else graphs.RECORDERS[DEVICE.type]

    def counted(function):
        results, replay = recorder(function)

        def call():
            Recorder.replays += 1
            replay()

        return results, call

    monkeypatch.setitem(graphs.RECORDERS, DEVICE.type, counted)
    Recorder.replays = 0
    return lambda: Recorder.replays


def make_tlw(**options):
    torch.manual_seed(0)
    if options.get("weights", "learned") == "learned":
        options.setdefault("distance", LPIPSDistance("squeeze", weights="random"))
        options.setdefault("net_w", TLWWeightNet(num_feat=4, prior="error"))
        options = {"importance": False, "weight_interval": 2, "weight_batch": 1, "weight_crop": 40, **options}
    return TLW(**options).to(DEVICE)


def steps(tlw, pair, first, last, between=lambda tlw, pair: None):
    """Iterations of a loop of one's own: losses, gradients and weights, φ, and where the random numbers are."""
    found = []
    for i in range(first, last):
        torch.manual_seed(i)
        sr = (pair[0] + 0.01 * i).clone().requires_grad_()
        loss = tlw(sr, pair[1].roll(i, -1), t=i)
        loss.backward()
        found += [loss.detach(), sr.grad, tlw.log["w"].clone(), tlw.log.get("l_w", loss).detach().clone()]
        between(tlw, pair)
    return [*found, torch.get_rng_state(), *[v.clone() for k, v in tlw.state_dict().items() if "extra" not in k]]


OPTIONS = {
    "economy": {},
    "every iteration": {"weight_interval": 1, "weight_batch": None, "weight_crop": None, "base": "mse"},
    "deterministic": {"stochastic": False, "loss_weight": 0.5},
    "chunks": {"distance_chunk": 1, "weight_batch": 2},
    "importance": {"importance": True, "weight_batch": None, "weight_crop": None, "use_graphs": True},
    "own modules": {"use_graphs": True},
    "bf16": {"use_amp": "bf16"},
    "random": {"weights": "random"},
    "error": {"weights": "error"},
}


class OwnWeights(nn.Module):
    """A weighting network of a user, with buffers."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(6, 3, 3, padding=1), nn.BatchNorm2d(3))

    def forward(self, sr, gt, k):
        return functional.fixed_sum(self.net(torch.cat([sr, gt], 1)).sigmoid(), k)


@pytest.mark.parametrize("name", OPTIONS)
def test_replays_have_the_bits_of_the_steps_themselves(pair, recorders, monkeypatch, name):
    options = OPTIONS[name]
    if name == "own modules":
        torch.manual_seed(1)
        options = {**options, "net_w": OwnWeights()}
    graphed = make_tlw(**copy.deepcopy(options))
    found = steps(graphed, pair, 0, 6)
    assert graphed.graphs_failure is None and recorders() >= 5
    monkeypatch.delitem(graphs.RECORDERS, DEVICE.type)
    assert same(found, steps(make_tlw(**copy.deepcopy(options)), pair, 0, 6))


def other_size(tlw, pair):
    tlw(*(image[:1, :, :44, :44].clone().requires_grad_(image is pair[0]) for image in pair)).backward()


def in_eval_mode(tlw, pair):
    tlw.eval()(pair[0].clone().requires_grad_(), pair[1]).backward()
    tlw.train()
    tlw.weights(*pair, t=1)
    tlw.summarize()


def reload_state(tlw, pair):
    tlw.load_state_dict(copy.deepcopy(tlw.state_dict()))


def under_autocast(tlw, pair):
    with torch.autocast(DEVICE.type, torch.bfloat16):
        tlw(pair[0].bfloat16().requires_grad_(), pair[1]).backward()


def with_frozen_norm(tlw, pair):
    tlw.net_w.eval()
    tlw(pair[0].clone().requires_grad_(), pair[1]).backward()
    tlw.net_w.train()


@pytest.mark.parametrize("between", [other_size, in_eval_mode, reload_state, under_autocast, with_frozen_norm])
def test_what_comes_between_two_replays_changes_nothing_of_them(pair, recorders, monkeypatch, between):
    found = steps(make_tlw(), pair, 0, 6, between)
    assert recorders() >= 4
    monkeypatch.delitem(graphs.RECORDERS, DEVICE.type)
    assert same(found, steps(make_tlw(), pair, 0, 6, between))


def test_copies_and_other_parameters_are_recorded_anew(pair, recorders, monkeypatch):
    def run():
        tlw = make_tlw()
        found = steps(tlw, pair, 0, 4)
        other = copy.deepcopy(tlw)
        found += steps(other, pair, 4, 8) + steps(tlw, pair, 4, 7)  # each with its own φ
        for p in tlw.net_w.parameters():
            p.data = p.data.clone()  # in other memory
        found += steps(tlw, pair, 7, 10)
        return found + steps(tlw.double(), [image.double() for image in pair], 10, 14)

    found = run()
    assert recorders() > 12
    monkeypatch.delitem(graphs.RECORDERS, DEVICE.type)
    assert same(found, run())


def test_two_losses_before_one_backward_have_their_own_gradients(pair, recorders):
    tlw = make_tlw(weights="error")
    steps(tlw, pair, 0, 3)
    first, second = (image.clone().requires_grad_() for image in pair)
    loss = tlw(first, pair[1], t=3) + tlw(second, pair[0], t=3)
    loss.backward()
    alone = [image.clone().requires_grad_() for image in pair]
    for image, gt in zip(alone, reversed(pair), strict=True):
        tlw(image, gt, t=3).backward()
    assert torch.equal(first.grad, alone[0].grad) and torch.equal(second.grad, alone[1].grad)
    assert not torch.equal(first.grad, second.grad)


def test_what_cannot_be_recorded_runs_as_it_does_and_says_why(pair, recorders):
    tlw = make_tlw(distance=SSIMDistance(5), use_graphs=True)  # piq reads values of the images
    before = recorders()
    steps(tlw, pair, 0, 6)
    assert "waits for the device" in tlw.graphs_failure and recorders() - before == 5  # of the M step
    hooked = [make_tlw() for _ in range(3)]
    hooked[0].net_w.register_forward_hook(lambda *_: None)
    hooked[1].net_w.register_forward_pre_hook(lambda *_: None)
    hooked[2].net_w.conv[0].register_full_backward_hook(lambda *_: None)
    changing = make_tlw(weights="error")
    for side in (40, 40, 42, 42, 44, 44, 46, 46, 48, 48):
        changing(pair[0][..., :side].clone().requires_grad_(), pair[1][..., :side])
    assert changing.graphs_failure == "the shapes of the batches keep changing"
    before = recorders()
    for each in hooked:
        steps(each, pair, 0, 4)
    steps(make_tlw(use_graphs=False), pair, 0, 4)
    steps(make_tlw(net_w=OwnWeights()), pair, 0, 4)  # of others: only when asked
    assert recorders() == before


def everything(model):
    nets = {name: {k: v.clone() for k, v in net.state_dict().items()} for name, net in model.networks().items()}
    return nets, dict(model.get_current_log()), torch.get_rng_state()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train__accumulation_steps": 2},
        {"base_model": "ESRGANModel", "train__net_d_iters": 2, **GAN},
        {"train__use_amp": "bf16"},
        {"train__use_amp": "fp16"},
    ],
    ids=str,
)
def test_twelve_iterations_of_a_model_end_with_the_same_bits(
    photographs, tmp_path, pair, recorders, changes, monkeypatch
):
    distance = {"type": "LPIPSDistance", "net": "squeeze", "weights": "random"}
    tlw = {"preset": "economy", "k_unit": "iter", "weight_interval": 3, "weight_batch": 1, "weight_crop": 40}
    options = {**ECONOMY, "train__tlw": tlw, "train__pixel_opt__distance": distance, **changes}

    def run():
        torch.manual_seed(0)
        model = built(photographs, tmp_path, **options)
        for i in range(1, 13):
            model.feed_data(batch([image.roll(i, 2) for image in pair]))
            torch.manual_seed(i)
            model.optimize_parameters(i)
        assert model.tlw.graphs_failure is None and model.guard.skipped == 0
        return everything(model)

    found = run()
    assert recorders() >= (7 if "base_model" in changes else 12)
    monkeypatch.delitem(graphs.RECORDERS, DEVICE.type)
    assert same(found, run())


@pytest.mark.parametrize(
    "wait",
    [
        torch.Tensor.item,
        torch.nonzero,
        torch.unique,
        lambda x: x.masked_select(x > 0),
        lambda x: x[x > 0],
        lambda x: x.__setitem__(x > 0, torch.ones(1)),
    ],
)
def test_an_operation_that_the_host_waits_for_is_not_recorded(wait):
    with graphs.NoWaits():
        torch.ones(2)[torch.tensor([1])].where(torch.tensor([True]), 0).sin()
    with graphs.NoWaits(), pytest.raises(RuntimeError, match="waits for the device"):
        wait(torch.ones(1))


# ------------------------------------------------------------------------------------------------- the rest


def test_gt_out_of_range_is_found_at_the_next_log(pair, monkeypatch):
    """On a device whose values have to be waited for."""
    for module in (functional, core_tlw):
        monkeypatch.setattr(module, "is_at_hand", lambda _: False)
    sr, gt = pair
    with pytest.raises(ValueError, match=r"gt must be an image in \[0, 1\], got values from 0 to 250"):
        make_tlw(weights="error")(sr, 255 * gt)
    tlw = make_tlw(weights="error")
    for _ in range(core_tlw.FIRST_LOOKS):
        tlw(sr, gt)
    tlw.summarize()
    for bad in (-gt, gt, gt / torch.zeros_like(gt)):
        tlw(sr, bad)
    with pytest.raises(ValueError, match=r"gt must be an image in \[0, 1\], got values from -0.98"):
        tlw.summarize()
    tlw(sr, gt)
    tlw.summarize()


@pytest.mark.parametrize("base", ["SRModel", "ESRGANModel"])
def test_losses_are_read_when_the_log_is_written(photographs, tmp_path, pair, base):
    model = built(photographs, tmp_path, base_model=base, **EVERY_BASE[base])
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    losses = {name: value for name, value in model.log_dict.items() if name.startswith("l_")}
    assert losses and all(torch.is_tensor(value) and not value.requires_grad for value in losses.values())
    log = model.get_current_log()
    assert all(isinstance(value, (int, float)) for value in log.values())
    assert {name: log[name] for name in losses} == {name: value.item() for name, value in losses.items()}


def test_the_average_is_basicsrs(photographs, tmp_path, pair):
    from basicsr.models.base_model import BaseModel

    model = built(photographs, tmp_path, plain_options)
    model.net_g.register_buffer("counter", torch.tensor(7))
    model.net_g_ema.register_buffer("counter", torch.tensor(0))
    model.feed_data(batch(pair))
    model.optimize_parameters(1)
    expected = copy.copy(model)
    expected.net_g_ema = copy.deepcopy(model.net_g_ema)
    model.model_ema(0.9)
    BaseModel.model_ema(expected, 0.9)
    assert all(map(torch.equal, model.net_g_ema.parameters(), expected.net_g_ema.parameters()))
    assert model.net_g_ema.counter == 7
