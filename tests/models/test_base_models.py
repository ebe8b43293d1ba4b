"""TLW on every kind of BasicSR model, trained and validated through YAML on the CPU."""

import cv2
import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import photograph, plain_options, set_option, tiny_options
from tests.helpers import (
    EVERY_BASE,
    built,
    check_all,
    check_resume,
    feed_noise,
    gradient_norm,
    iterate,
    log_lines,
    log_text,
    refused,
)
from tlw_basicsr import with_tlw
from tlw_basicsr.models.guard import StepGuard
from tlw_basicsr.models.optimizer import MixedPrecision, TrainingOptimizer
from tlw_basicsr.util.files import load_file


@pytest.fixture(scope="module")
def large_photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    for number, left in enumerate((0, 112)):
        cv2.imwrite(str(folder / f"p{number}.png"), photograph("astronaut", 50, left, 400, 400)[..., ::-1])
    (folder / "meta.txt").write_text("p0.png\np1.png\n")
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two clips, of which REDS4's 000 is for validation: 100 names, for REDS, of a few files."""
    root = tmp_path_factory.mktemp("clips")
    for part, side in (("gt", 256), ("lq", 64)):
        for clip, frames in (("000", 3), ("001", 100)):
            folder = root / part / clip
            folder.mkdir(parents=True)
            for number in range(frames):
                target = folder / f"{number:08d}.png"
                if number < 4:
                    image = photograph("astronaut", 10 * number, 120, 256, 256)
                    cv2.imwrite(str(target), cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA))
                else:
                    target.symlink_to(folder / f"{number % 4:08d}.png")
        (root / "val" / part).mkdir(parents=True)
        (root / "val" / part / "000").symlink_to(root / part / "000")
    (root / "meta.txt").write_text("000 100 (256,256,3)\n001 100 (256,256,3)\n")
    return root


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


def real_esrgan(folder):
    data = {"name": "real", "type": "RealESRGANDataset", "dataroot_gt": str(folder), "io_backend": {"type": "disk"}}
    data |= {"meta_info": str(folder / "meta.txt"), "use_hflip": True, "use_rot": False, "num_worker_per_gpu": 0}
    data["batch_size_per_gpu"] = 2  # whose images have kernels of their own
    network = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 4, "num_block": 1, "upscale": 4}
    return {**DEGRADATION, "scale": 4, "network_g": network, "datasets__train": {**data, **KERNELS}}


def test_real_esrgans_queues_are_resumed(train, photographs, large_photographs, tmp_path):
    """They hold images of earlier iterations, and decide from when on images are taken out of them."""
    changes = {**real_esrgan(large_photographs), "datasets__val": ..., "val": ..., "train__tlw__k_unit": "iter"}
    changes |= {"base_model": "RealESRNetModel", "queue_size": 4, "gt_usm": True, "train__total_iter": 5}
    check_resume(train, tmp_path, tiny_options(photographs, **changes), 3)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("jpeg_range", ..., "jpeg_range: missing; it is read in the first iteration"),
        ("gt_size", ..., "gt_size: missing; it is read in the first iteration"),
        ("queue_size", 3, "queue_size: 3"),
    ],
)
def test_what_real_esrgan_asks_for_is_one_line_before_the_training(
    photographs, large_photographs, tmp_path, key, value, message
):
    changes = {**real_esrgan(large_photographs), "datasets__val": ..., "val": ..., "train__tlw__k_unit": "iter"}
    opt = tiny_options(photographs, **changes, base_model="RealESRNetModel", gt_usm=True)
    set_option(opt, key, value)
    refused(message, check_all, tmp_path, opt)


def test_real_esrgan_weights_the_sharpened_target(photographs, tmp_path):
    """The target of TLW is what the base model gives its pixel loss, here the USM-sharpened image."""
    model = built(photographs, tmp_path, base_model="RealESRGANModel", **EVERY_BASE["RealESRGANModel"])
    feed_noise(model)
    model.gt_usm = torch.ones_like(model.gt)
    seen = []
    model.net_w.register_forward_hook(lambda _, args, __: seen.append(args[1]))
    model.optimize_parameters(1)
    assert len(seen) == 2 and all(torch.equal(gt, model.gt_usm) for gt in seen)


def videos(clips, kind, **more):
    def of(folder, name, kind):
        folders = {"dataroot_gt": str(folder / "gt"), "dataroot_lq": str(folder / "lq")}
        return {"name": name, "type": kind, **folders, "io_backend": {"type": "disk"}, "num_frame": 3}

    train = {
        **of(clips, "REDS", kind), "dataroot_flow": None, "meta_info_file": str(clips / "meta.txt"),
        "val_partition": "REDS4", "interval_list": [1], "random_reverse": False, "use_hflip": False, "use_rot": False,
        "num_worker_per_gpu": 0, "batch_size_per_gpu": 1, **more,
    }  # fmt: skip
    test = "VideoTestDataset" if kind == "REDSDataset" else "VideoRecurrentTestDataset"
    val = {**of(clips / "val", "REDS4", test), "cache_data": True, "padding": "reflection"}
    return {"datasets": {"train": train, "val": val}, "train__ema_decay": 0}


@pytest.mark.parametrize("base", EVERY_BASE)
def test_every_base_model_trains_and_validates(train, photographs, large_photographs, clips, base):
    changes = {"base_model": base, "train__total_iter": 3, "train__tlw__k_unit": "iter", "val__val_freq": 3}
    changes |= {"logger__use_tb_logger": True, "logger__save_checkpoint_freq": 3}
    if base.startswith("Real"):
        changes |= real_esrgan(large_photographs)
    elif base == "EDVRModel":
        changes |= videos(clips, "REDSDataset", gt_size=64)
    elif base == "VideoRecurrentModel":
        changes |= videos(clips, "REDSRecurrentDataset", gt_size=256, test_mode=False)
    experiment = train(tiny_options(photographs, **{**EVERY_BASE[base], **changes}))
    lines = log_lines(experiment)
    has_gan = base.endswith("GANModel")
    losses = {"l_g_pix", "l_g_gan", "l_d_real", "l_d_fake"} if has_gan else {"l_pix"}
    assert len(lines) == 3 and {"l_w", "wc", "k", "w_mean", *losses} <= lines[-1].keys()
    text = log_text(experiment)
    assert f"Model [{with_tlw(MODEL_REGISTRY.get(base)).__name__}] is created" in text and "# psnr:" in text
    saved = {path.name for path in experiment.glob("models/*_3.pth")}
    assert saved == {f"net_{name}_3.pth" for name in ("gdw" if has_gan else "gw")}
    assert len(load_file(experiment / "training_states/3.state", "")["optimizers"]) == len(saved)
    events = EventAccumulator(str(experiment.parents[1] / "tb_logger" / experiment.name)).Reload()
    assert len(events.Tags()["images"]) == 1 and events.Tags()["images"][0].startswith("weights/")


@pytest.mark.parametrize("plain", [True, False])
def test_what_a_models_own_class_keeps_is_resumed_or_said(train, photographs, register, plain):
    """A scale that grows, as a ``GradScaler``'s."""

    class Scale:
        value = 1.0

        def state_dict(self):
            return {"value": self.value if plain else object()}

        def load_state_dict(self, state):
            self.value = state["value"]

    class WithAScale(SRModel):
        def init_training_settings(self):
            super().init_training_settings()
            self.scaler = Scale()

        def optimize_parameters(self, current_iter):
            self.scaler.value *= 2
            super().optimize_parameters(current_iter)
            self.log_dict["l_scale"] = self.scaler.value

    register(MODEL_REGISTRY, WithAScale)
    train(tiny_options(photographs, base_model="WithAScale", train__total_iter=4))
    experiment = train(tiny_options(photographs, base_model="WithAScale"), "--auto_resume")
    text = log_text(experiment)
    assert ("scaler of the model is not saved (its state holds a object)" in text) is not plain
    assert ("The state lacks scaler of the model: the resumed training will differ." in text) is not plain
    assert float(log_lines(experiment)[-1]["l_scale"]) == (2**8 if plain else 2**4)


def test_what_a_model_writes_into_its_attributes_is_resumed(train, photographs, register):
    """A number, a list with a tensor, and a buffer of a loss; an option that was changed for the resume stays so."""

    class Remembering(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(()))

        def forward(self, sr, gt):
            self.mean = 0.5 * self.mean + 1  # another tensor in every iteration
            return (sr - gt).abs().mean()

    class WithMemory(SRModel):
        def init_training_settings(self):
            super().init_training_settings()
            self.total, self.history, self.weight = 0.0, [torch.zeros(())], self.opt["train"]["total_iter"]
            self.cri_own = Remembering()

        def optimize_parameters(self, current_iter):
            super().optimize_parameters(current_iter)
            self.cri_own(self.output, self.gt)
            self.total += 1
            self.history.append(self.history[-1] + 2)
            memory = {"total": self.total, "mean": self.cri_own.mean, "last": self.history[-1], "weight": self.weight}
            self.log_dict.update({f"l_{name}": float(value) for name, value in memory.items()})

    register(MODEL_REGISTRY, WithMemory)
    train(tiny_options(photographs, base_model="WithMemory", train__total_iter=4))
    experiment = train(tiny_options(photographs, base_model="WithMemory"), "--auto_resume")
    last = {name: float(log_lines(experiment)[-1][f"l_{name}"]) for name in ("total", "mean", "last", "weight")}
    assert last == {"total": 8, "mean": pytest.approx(2 - 2**-7, rel=1e-3), "last": 16, "weight": 8}


def test_the_moving_average_has_the_running_averages(photographs, tmp_path):
    """Those of batch norm, which no gradient changes; of a refused step it has none."""
    model = built(photographs, tmp_path)
    for name in ("net_g", "net_g_ema"):
        setattr(model, name, torch.nn.Sequential(getattr(model, name), torch.nn.BatchNorm2d(3)))
    for i, value in enumerate((0.5, float("nan")), 1):
        feed_noise(model)
        model.lq.fill_(value)
        model.optimize_parameters(i)
        ours, averaged = model.net_g[1], model.net_g_ema[1]
        assert ours.num_batches_tracked == averaged.num_batches_tracked == 1
        assert torch.equal(ours.running_mean, averaged.running_mean) and averaged.running_mean.abs().min() > 0


def test_a_model_may_have_an_average_without_basicsrs_attribute_of_its_decay(photographs, train, register):
    """As GFPGAN's."""

    class OwnAverageModel(SRModel):
        def optimize_parameters(self, current_iter):
            self.ema_decay = 0.5
            super().optimize_parameters(current_iter)
            del self.ema_decay

    opt = plain_options(photographs, model_type=register(MODEL_REGISTRY, OwnAverageModel), train__total_iter=1)
    opt["val"]["val_freq"] = 1
    assert "Validation of params_ema." in log_text(train(opt))


def test_a_buffer_that_fits_the_size_of_the_image_is_each_networks_own(photographs, train, register):
    """As positions that are kept for the next image of the same size; validation images are of other sizes."""

    class Positioned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 12, 3, 1, 1)
            self.register_buffer("position", torch.zeros(1, 1))

        def forward(self, x):
            if self.position.shape != x.shape[2:]:
                self.position = torch.rand(x.shape[2:])
            return torch.pixel_shuffle(self.conv(x + self.position), 2)

    network = {"type": register(ARCH_REGISTRY, Positioned)}
    text = log_text(train(plain_options(photographs, network_g=network)))
    assert text.count("# psnr:") == 2 and "not finite" not in text


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


def test_accumulated_gradients_survive_a_resume(train, photographs, tmp_path):
    """Checkpoints between two steps, of optimisers that step at different iterations."""
    changes = {"train__accumulation_steps": 3, "train__tlw__weight_interval": 2}
    whole, _ = check_resume(train, tmp_path, tiny_options(photographs, **changes), 4)
    assert load_file(whole / "training_states/4.state", "")["accumulated"][0]["count"] == 1


def test_a_model_that_is_registered_as_a_function_trains_without_tlw_alone(train, photographs, register):
    def model_by_function(opt):
        return SRModel(opt)

    name = register(MODEL_REGISTRY, model_by_function)
    message = "base_model: model_by_function is no class that TLW can extend"
    refused(message, train, tiny_options(photographs, base_model=name))
    train(plain_options(photographs, model_type=name, train__total_iter=2))


@pytest.mark.parametrize("base", EVERY_BASE)
def test_sizes_accumulation_and_clipping_on_every_base_model(photographs, tmp_path, base):
    """Batches of other sizes, two to a step, every optimiser's gradient clipped, with EMA where the base has it."""
    is_video = base in ("EDVRModel", "VideoRecurrentModel")
    changes = {
        "train__accumulation_steps": 2,
        "train__clip_grad_norm": 1e-4,
        "train__ema_decay": 0 if is_video else 0.9,
    }
    model = built(photographs, tmp_path, base_model=base, **changes, **EVERY_BASE[base])
    norms = []
    for optimizer in model.optimizers:
        optimizer.register_step_pre_hook(lambda o, *_: norms.append(gradient_norm(o)))
    names = ["net_g", "net_w"] if is_video else ["net_g", "net_w", "net_g_ema"]
    for i, size in enumerate([(64, 64), (64, 96)] * 2 if is_video else [(8, 8), (8, 12), (16, 8), (8, 8)], 1):
        feed_noise(model, base, 1, size)
        assert iterate(model, i, *names) == [i % 2 == 0] * len(names)
    assert norms == pytest.approx([1e-4] * 2 * len(model.optimizers), rel=1e-2)
