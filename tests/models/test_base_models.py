"""TLW on every kind of BasicSR model, trained and validated through YAML on the CPU."""

import cv2
import pytest
import torch
from basicsr.utils.registry import MODEL_REGISTRY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import photograph, tiny_options
from tests.helpers import EVERY_BASE, GAN, log_lines, same
from tlw_basicsr import UserError, with_tlw
from tlw_basicsr.models.guard import StepGuard, list_parameters
from tlw_basicsr.models.optimizer import MixedPrecision, TrainingOptimizer
from tlw_basicsr.util.files import load_file

EDSR = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 4}


@pytest.fixture(scope="session")
def large_photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    for number, left in enumerate((0, 112)):
        cv2.imwrite(str(folder / f"p{number}.png"), photograph("astronaut", 50, left, 400, 400)[..., ::-1])
    (folder / "meta.txt").write_text("p0.png\np1.png\n")
    return folder


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Two clips, of which REDS4's 000 is for validation: 100 names, for REDS, of a few files."""
    root = tmp_path_factory.mktemp("clips")
    for part, side in (("gt", 256), ("lq", 64)):
        for clip in ("000", "001"):
            folder = root / part / clip
            folder.mkdir(parents=True)
            frames = 100 if clip == "001" else 3
            for number in range(frames):
                target = folder / f"{number:08d}.png"
                if number < 4:
                    image = photograph("astronaut", 10 * number, 120, 256, 256)
                    cv2.imwrite(str(target), cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
                else:
                    target.symlink_to(folder / f"{number % 4:08d}.png")
    (root / "val").mkdir()
    for part in ("gt", "lq"):
        (root / "val" / part).mkdir()
        (root / "val" / part / "000").symlink_to(root / part / "000")
    (root / "meta.txt").write_text("000 100 (256,256,3)\n001 100 (256,256,3)\n")
    return root


def run(train, photographs, base, **changes):
    """Train three iterations; returns the experiment and its log."""
    opt = tiny_options(
        photographs,
        base_model=base,
        train__total_iter=3,
        logger__use_tb_logger=True,
        train__tlw__k_unit="iter",
        val__val_freq=3,
        logger__save_checkpoint_freq=3,
        **changes,
    )
    experiment = train(opt)
    lines = log_lines(experiment)
    assert len(lines) == 3
    assert {"l_w", "wc", "k", "w_mean"} <= lines[-1].keys()
    text = next(experiment.glob("train_*.log")).read_text()
    assert f"Model [{with_tlw(MODEL_REGISTRY.get(base)).__name__}] is created" in text
    assert "# psnr:" in text
    assert (experiment / "models/net_w_3.pth").is_file()
    events = EventAccumulator(str(experiment.parents[1] / "tb_logger" / experiment.name)).Reload()
    assert len(events.Tags()["images"]) == 1 and events.Tags()["images"][0].startswith("weights/")
    return experiment, lines


def test_sr_model(train, photographs):
    _, lines = run(train, photographs, "SRModel")
    assert "l_pix" in lines[-1]


def test_swinir_model(train, photographs):
    net = {
        "type": "SwinIR", "upscale": 2, "in_chans": 3, "img_size": 8, "window_size": 4, "img_range": 1.0, "depths": [1],
        "embed_dim": 8, "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffledirect", "resi_connection": "1conv",
    }  # fmt: skip
    run(train, photographs, "SwinIRModel", network_g=net)


@pytest.mark.parametrize("base", ["SRGANModel", "ESRGANModel"])
def test_gan_models_keep_their_other_losses(train, photographs, base):
    experiment, lines = run(train, photographs, base, **GAN)
    assert {"l_g_pix", "l_g_gan", "l_d_real", "l_d_fake"} <= lines[-1].keys()
    state = load_file(experiment / "training_states/3.state", "")
    assert len(state["optimizers"]) == 3  # g, d, w
    assert (experiment / "models/net_d_3.pth").is_file()


def test_a_gan_resumes(train, photographs):
    changes = {**GAN, "base_model": "ESRGANModel", "logger__save_checkpoint_freq": 2, "val__val_freq": 100}
    whole = load_file(train(tiny_options(photographs, name="whole", **changes)) / "models/net_g_8.pth", "")
    train(tiny_options(photographs, train__total_iter=4, **changes))
    resumed = load_file(train(tiny_options(photographs, **changes), "--auto_resume") / "models/net_g_8.pth", "")
    assert all(torch.equal(whole["params"][n], resumed["params"][n]) for n in whole["params"])


def test_without_a_pixel_loss_in_an_iteration_there_is_no_e_step(train, photographs):
    """net_d_init_iters: the generator waits, and so does the weighting network."""
    opt = tiny_options(photographs, base_model="SRGANModel", train__net_d_init_iters=2, train__total_iter=3, **GAN)
    lines = log_lines(train(opt))
    assert "l_w" not in lines[0] and "l_w" not in lines[1]
    assert "l_w" in lines[2]


DEGRADATION = {
    "resize_prob": [0.2, 0.7, 0.1], "resize_range": [0.5, 1.5], "gaussian_noise_prob": 0.5, "noise_range": [1, 30],
    "poisson_scale_range": [0.05, 3], "gray_noise_prob": 0.4, "jpeg_range": [30, 95], "second_blur_prob": 0.8,
    "resize_prob2": [0.3, 0.4, 0.3], "resize_range2": [0.5, 1.2], "gaussian_noise_prob2": 0.5, "noise_range2": [1, 25],
    "poisson_scale_range2": [0.05, 2.5], "gray_noise_prob2": 0.4, "jpeg_range2": [30, 95], "gt_size": 32, "queue_size": 2,
}  # fmt: skip
KERNELS = {
    "blur_kernel_size": 21, "kernel_list": ["iso", "aniso"], "kernel_prob": [0.5, 0.5], "sinc_prob": 0.1,
    "blur_sigma": [0.2, 3], "betag_range": [0.5, 4], "betap_range": [1, 2], "blur_kernel_size2": 21,
    "kernel_list2": ["iso", "aniso"], "kernel_prob2": [0.5, 0.5], "sinc_prob2": 0.1, "blur_sigma2": [0.2, 1.5],
    "betag_range2": [0.5, 4], "betap_range2": [1, 2], "final_sinc_prob": 0.8, "gt_size": 32,
}  # fmt: skip


def real_esrgan(large_photographs, base):
    data = {
        "name": "real",
        "type": "RealESRGANDataset",
        "dataroot_gt": str(large_photographs),
        "meta_info": str(large_photographs / "meta.txt"),
        "io_backend": {"type": "disk"},
        "use_hflip": True,
        "use_rot": False,
        "num_worker_per_gpu": 0,
        "batch_size_per_gpu": 2,  # whose images have kernels of their own
        **KERNELS,
    }
    changes = {**DEGRADATION, "scale": 4, "network_g": EDSR, "datasets__train": data}
    if base == "RealESRNetModel":
        return {**changes, "gt_usm": True}
    return {**changes, **GAN, "l1_gt_usm": True, "percep_gt_usm": True, "gan_gt_usm": False}


@pytest.mark.parametrize("base", ["RealESRNetModel", "RealESRGANModel"])
def test_real_esrgan_models_degrade_on_the_fly_on_the_cpu(train, photographs, large_photographs, base):
    run(train, photographs, base, **real_esrgan(large_photographs, base))


def test_real_esrgans_queues_are_resumed(train, photographs, large_photographs, tmp_path):
    """They hold images of earlier iterations, and decide from when on images are taken out of them."""
    changes = {**real_esrgan(large_photographs, "RealESRNetModel"), "datasets__val": ..., "val": ...}
    changes |= {"base_model": "RealESRNetModel", "queue_size": 4, "train__tlw__k_unit": "iter"}
    changes |= {"train__total_iter": 5, "logger__save_checkpoint_freq": 3}
    whole = train(tiny_options(photographs, **changes), root=tmp_path / "whole")
    train(tiny_options(photographs, **{**changes, "train__total_iter": 3}), root=tmp_path / "cut")
    resumed = train(tiny_options(photographs, **changes), "--auto_resume", root=tmp_path / "cut")
    for name in ("models/net_g_5.pth", "training_states/5.state"):
        assert same(load_file(whole / name, ""), load_file(resumed / name, "")), name


def test_real_esrgan_weights_the_sharpened_target(photographs, tmp_path):
    """The target of TLW is what the base model gives its pixel loss, here the USM-sharpened image."""
    from tests.helpers import built

    model = built(
        photographs, tmp_path, base_model="RealESRGANModel", l1_gt_usm=True, percep_gt_usm=True, gan_gt_usm=False, **GAN
    )
    model.lq, model.gt, model.gt_usm = torch.rand(1, 3, 16, 16), torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32)
    seen = []
    model.net_w.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    model.optimize_parameters(1)
    assert len(seen) == 2 and all(torch.equal(gt, model.gt_usm) for gt in seen)


def video_data(clips, kind, **more):
    train = {
        "name": "REDS",
        "type": kind,
        "dataroot_gt": str(clips / "gt"),
        "dataroot_lq": str(clips / "lq"),
        "dataroot_flow": None,
        "meta_info_file": str(clips / "meta.txt"),
        "val_partition": "REDS4",
        "io_backend": {"type": "disk"},
        "interval_list": [1],
        "random_reverse": False,
        "use_hflip": False,
        "use_rot": False,
        "num_frame": 3,
        "num_worker_per_gpu": 0,
        "batch_size_per_gpu": 1,
        **more,
    }
    val = {
        "name": "REDS4",
        "type": "VideoTestDataset" if kind == "REDSDataset" else "VideoRecurrentTestDataset",
        "dataroot_gt": str(clips / "val/gt"),
        "dataroot_lq": str(clips / "val/lq"),
        "io_backend": {"type": "disk"},
        "cache_data": True,
        "num_frame": 3,
        "padding": "reflection",
    }
    return {"scale": 4, "datasets": {"train": train, "val": val}, "train__ema_decay": 0}


def test_edvr_model(train, photographs, clips):
    net = {
        "type": "EDVR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_frame": 3, "deformable_groups": 1,
        "num_extract_block": 1, "num_reconstruct_block": 1,
    }  # fmt: skip
    run(train, photographs, "EDVRModel", network_g=net, **video_data(clips, "REDSDataset", gt_size=64))


def test_video_recurrent_model_with_basicvsr(train, photographs, clips):
    net = {"type": "BasicVSR", "num_feat": 8, "num_block": 1}
    data = video_data(clips, "REDSRecurrentDataset", gt_size=256, test_mode=False)
    _, lines = run(train, photographs, "VideoRecurrentModel", network_g=net, **data)
    assert "l_pix" in lines[-1]


def test_a_models_own_class(train, photographs):
    from basicsr.models.sr_model import SRModel

    class FromATest(SRModel):
        """Adds a loss of its own."""

        def optimize_parameters(self, current_iter):
            super().optimize_parameters(current_iter)
            self.log_dict["l_mine"] = 1.0

    if "FromATest" not in MODEL_REGISTRY:
        MODEL_REGISTRY.register(FromATest)
    _, lines = run(train, photographs, "FromATest")
    assert float(lines[-1]["l_mine"]) == 1.0


@pytest.mark.parametrize("plain", [True, False])
def test_what_a_models_own_class_keeps_is_resumed_or_said(train, photographs, tmp_path, plain):
    """A scale that grows, as a ``GradScaler``'s."""
    from basicsr.models.sr_model import SRModel

    class Scale:
        value = 1.0

        def state_dict(self):
            return {"value": self.value if plain else object()}

        def load_state_dict(self, state):
            self.value = state["value"]

    class WithAScale(SRModel):
        def optimize_parameters(self, current_iter):
            self.scaler = getattr(self, "scaler", None) or Scale()
            self.scaler.value *= 2
            super().optimize_parameters(current_iter)
            self.log_dict["l_scale"] = self.scaler.value

        def init_training_settings(self):
            super().init_training_settings()
            self.scaler = Scale()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODEL_REGISTRY._obj_map, "WithAScale", WithAScale)
        train(tiny_options(photographs, base_model="WithAScale", train__total_iter=4))
        experiment = train(tiny_options(photographs, base_model="WithAScale"), "--auto_resume")
    text = "".join(log.read_text() for log in experiment.glob("*.log"))
    assert ("scaler of the model is not saved (its state holds a object)" in text) is not plain
    assert ("The state lacks scaler of the model: the resumed training will differ." in text) is not plain
    assert float(log_lines(experiment)[-1]["l_scale"]) == (2**8 if plain else 2**4)


def test_the_moving_average_has_the_running_averages(photographs, tmp_path):
    """Those of batch norm, which no gradient changes; of a refused step it has none."""
    from tests.helpers import built

    model = built(photographs, tmp_path)
    for name in ("net_g", "net_g_ema"):
        setattr(model, name, torch.nn.Sequential(getattr(model, name), torch.nn.BatchNorm2d(3)))
    for i, value in enumerate((0.5, float("nan")), 1):
        model.lq, model.gt = torch.full((2, 3, 8, 8), value), torch.rand(2, 3, 16, 16)
        model.optimize_parameters(i)
        ours, averaged = model.net_g[1], model.net_g_ema[1]
        assert ours.num_batches_tracked == averaged.num_batches_tracked == 1
        assert torch.equal(ours.running_mean, averaged.running_mean) and averaged.running_mean.abs().min() > 0


def test_a_model_without_a_pixel_loss_is_a_clear_error(train, photographs):
    with pytest.raises(UserError, match=r"network_g\.num_style_feat: missing; it is read in building"):
        train(tiny_options(photographs, base_model="StyleGAN2Model"))


@pytest.mark.parametrize("base", ["SRModel", "ESRGANModel"])
def test_accumulation_is_one_step_on_the_mean_of_the_gradients(photographs, tmp_path, base):
    from tests.helpers import built

    more = GAN if base == "ESRGANModel" else {}
    model = built(photographs, tmp_path, base_model=base, train__accumulation_steps=2, **more)
    nets = [model.net_g, model.net_w]
    before = [[p.detach().clone() for p in net.parameters()] for net in nets]
    ema = [p.detach().clone() for p in model.net_g_ema.parameters()]
    gradients = []
    for i in (1, 2):
        model.lq, model.gt = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
        if i == 2:
            first = [[p.grad.clone() for p in net.parameters()] for net in nets]
            model.optimizer_g.register_step_pre_hook(
                lambda *_: gradients.extend(p.grad.clone() for p in model.net_g.parameters())
            )
        model.optimize_parameters(i)
        if i == 1:
            for net, values in zip(nets, before, strict=True):
                assert all(torch.equal(p, v) for p, v in zip(net.parameters(), values, strict=True))
            assert all(torch.equal(p, v) for p, v in zip(model.net_g_ema.parameters(), ema, strict=True))
    assert any(not torch.equal(p, v) for p, v in zip(model.net_g.parameters(), before[0], strict=True))
    assert any(not torch.equal(p, v) for p, v in zip(model.net_w.parameters(), before[1], strict=True))
    assert any(not torch.equal(p, v) for p, v in zip(model.net_g_ema.parameters(), ema, strict=True))
    assert len(gradients) == len(first[0])


def test_accumulated_gradients_equal_those_of_the_joined_batch():
    torch.manual_seed(1)
    data, start = torch.rand(4, 3), torch.rand(3)

    def trained(batches, every):
        w = start.clone().requires_grad_()
        optimizer = TrainingOptimizer(
            torch.optim.Adam([w], 0.1), StepGuard(lambda flag: flag), MixedPrecision("cpu", False), every
        )
        for batch in batches:
            optimizer.zero_grad()
            (batch @ w).square().mean().backward()
            optimizer.step()
        return w.detach()

    assert torch.allclose(trained(data.split(2), 2), trained([data], 1))
    assert not torch.allclose(trained(data.split(2), 1), trained([data], 1))


def test_clipping_bounds_the_gradient_of_every_optimiser(photographs, tmp_path):
    from tests.helpers import built

    model = built(photographs, tmp_path, base_model="ESRGANModel", train__clip_grad_norm=1e-4, **GAN)
    norms = {}
    for name in "gdw":
        optimizer = getattr(model, f"optimizer_{name}")
        optimizer.register_step_pre_hook(
            lambda o, *_, name=name: norms.update(
                {name: torch.cat([p.grad.flatten() for p in list_parameters(o)]).norm().item()}
            )
        )
    model.lq, model.gt = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
    model.optimize_parameters(1)
    assert norms == {name: pytest.approx(1e-4, rel=1e-2) for name in "gdw"}


def test_batches_of_different_sizes(photographs, train):
    opt = tiny_options(photographs, datasets__train__gt_size=None, datasets__train__batch_size_per_gpu=1)
    assert len(log_lines(train(opt))) == 8


def test_cuda_in_basicsrs_models_means_the_models_device():
    from tlw_basicsr.compat import CudaMeans

    with CudaMeans(torch.device("cpu")):
        assert torch.zeros(2, device="cuda").device.type == "cpu"
        assert torch.zeros(2).cuda().device.type == "cpu"
        assert torch.nn.Linear(2, 2).cuda().weight.device.type == "cpu"


def test_phi_learns_whenever_the_generator_does(photographs, tmp_path):
    """net_d_iters 2 and weight_interval 2: counting iterations alone, the two would never meet."""
    from tests.helpers import built

    model = built(
        photographs, tmp_path, base_model="ESRGANModel", train__tlw__preset="fast", train__net_d_iters=2, **GAN
    )
    stepped = []
    for i in range(1, 9):
        before = [p.detach().clone() for p in model.net_w.parameters()]
        model.lq, model.gt = torch.rand(2, 3, 8, 8), torch.rand(2, 3, 16, 16)
        model.optimize_parameters(i)
        stepped.append(any(not torch.equal(p, b) for p, b in zip(model.net_w.parameters(), before, strict=True)))
    assert stepped == [False, True] * 4


def test_accumulated_gradients_survive_a_resume(train, photographs, tmp_path):
    """Checkpoints between two steps, of optimisers that step at different iterations."""
    changes = {"train__accumulation_steps": 3, "train__tlw__weight_interval": 2, "logger__save_checkpoint_freq": 4}
    whole = train(tiny_options(photographs, **changes), root=tmp_path / "whole")
    train(tiny_options(photographs, train__total_iter=4, **changes), root=tmp_path / "cut")
    assert load_file(tmp_path / "cut/experiments/tiny/training_states/4.state", "")["accumulated"][0]["count"] == 1
    resumed = train(tiny_options(photographs, **changes), "--auto_resume", root=tmp_path / "cut")
    for name in ("models/net_g_8.pth", "models/net_w_8.pth", "training_states/8.state"):
        assert same(load_file(whole / name, ""), load_file(resumed / name, "")), name


def test_a_function_may_be_registered_as_a_model(train, photographs):
    from basicsr.models.sr_model import SRModel

    def model_by_function(opt):
        return SRModel(opt)

    if "model_by_function" not in MODEL_REGISTRY:
        MODEL_REGISTRY.register(model_by_function)
    with pytest.raises(UserError, match="base_model: model_by_function is no class that TLW can extend"):
        train(tiny_options(photographs, base_model="model_by_function"))
    plain = tiny_options(
        photographs, model_type="model_by_function", network_w=..., train__optim_w=..., train__tlw=...,
        train__pixel_opt={"type": "L1Loss"}, train__total_iter=2,
    )  # fmt: skip
    train(plain)


@pytest.mark.parametrize("base", EVERY_BASE)
def test_sizes_accumulation_and_clipping_on_every_base_model(photographs, tmp_path, base):
    """Batches of other sizes, two to a step, clipped, with EMA where the base has it."""
    from tests.helpers import built

    model = built(
        photographs, tmp_path, base_model=base, train__accumulation_steps=2, train__clip_grad_norm=0.1,
        train__ema_decay=0 if "V" in base else 0.9, **EVERY_BASE[base],
    )  # fmt: skip
    norms = []
    model.optimizer_w.register_step_pre_hook(
        lambda o, *_: norms.append(torch.cat([p.grad.flatten() for p in list_parameters(o)]).norm().item())
    )
    video = base in ("EDVRModel", "VideoRecurrentModel")
    scale = 4 if video else 2
    stepped = []
    for i, (h, w) in enumerate(
        [(64, 64), (64, 96), (96, 64), (64, 64)] if video else [(8, 8), (8, 12), (16, 8), (8, 8)], 1
    ):
        frames = (3,) if video else ()
        model.lq = torch.rand(1, *frames, 3, h, w)
        model.gt = torch.rand(1, *(frames if base == "VideoRecurrentModel" else ()), 3, scale * h, scale * w)
        model.gt_usm = model.gt
        before = [[p.detach().clone() for p in net.parameters()] for net in (model.net_g, model.net_w)]
        model.optimize_parameters(i)
        after = [list(net.parameters()) for net in (model.net_g, model.net_w)]
        stepped.append(
            [any(not torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in zip(before, after, strict=True)]
        )
    assert stepped == [[False, False], [True, True]] * 2
    assert len(norms) == 2 and all(norm <= 0.1 * 1.001 for norm in norms)
