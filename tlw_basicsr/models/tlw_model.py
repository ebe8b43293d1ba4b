"""Training with Trainable Loss Weights on top of a BasicSR model."""

from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tlw_basicsr.errors import UserError
from tlw_basicsr.functional import k_schedule
from tlw_basicsr.losses.tlw_loss import TLWLoss
from tlw_basicsr.models.training import TrainingMixin, channels_last

PRESETS: dict[str, dict[str, Any]] = {
    "exact": {},
    "fast": {"importance": False, "weight_interval": 2},
    "paper": {  # stays so if the defaults change
        "k_start": 0.3, "k_end": 0.9, "k_decay": 100, "k_unit": "epoch", "importance": True, "weight_interval": 1
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TLWOptions:
    """The options ``train.tlw``.

    Attributes:
        preset: values of the options that are not given: ``exact``, the published mathematics; ``fast``:
            ``importance: false`` and ``weight_interval: 2``; ``paper``, all values of the published runs.
        k_start: k = k_start + (k_end - k_start)·(1 - exp(-t / k_decay)), see :func:`tlw_basicsr.k_schedule`.
        k_end: see ``k_start``.
        k_decay: see ``k_start``.
        k_unit: what t counts from 0: ``epoch`` (the paper's) or ``iter``.
        importance: take the ratios r_s into account in the M step; false leaves them out, r_s = 1.
        weight_interval: iterations from one E step to the next.
        use_amp: ``bf16`` runs the distance and the weighting network under autocast; FixedSum, the losses and their
            ratios stay in fp32. The SR network has ``train.use_amp``.
        use_channels_last: weights of the distance and the weighting network in channels-last order, faster on GPUs.
        distance_chunk: samples of a batch that go through the distance at a time: less memory for more time.
        sync_bn: batch norm of the weighting network over all processes; GPUs only.
    """

    preset: str = "exact"
    k_start: float = 0.3
    k_end: float = 0.9
    k_decay: float = 100
    k_unit: str = "epoch"
    importance: bool = True
    weight_interval: int = 1
    use_amp: str | bool = False
    use_channels_last: bool = False
    distance_chunk: int | None = None
    sync_bn: bool = False

    @classmethod
    def of(cls, section: dict[str, Any] | None) -> "TLWOptions":
        """From the YAML's section, on top of its preset."""
        section = section or {}
        return cls(**{**PRESETS[section.get("preset", "exact")], **section})


class TLWMixin(TrainingMixin):
    """Puts the weighting network and its E step into a BasicSR model's own training step.

    Every BasicSR model with a pixel loss calls ``self.cri_pix(self.output, target)`` once in its
    ``optimize_parameters``. That call is :meth:`tlw_pixel_loss` here: one step on the weighting network φ, then the
    weighted loss of the same SR image, of which the model's own code takes the gradient.

    Options: ``network_w``, ``train.optim_w``, ``train.pixel_opt`` (a ``TLWLoss``) and ``train.tlw``, see
    :class:`TLWOptions`. With a control as the ``TLWLoss`` there is no weighting network and no E step: ``net_w`` is
    None, the first two options are not there, and of ``train.tlw`` only k's schedule counts.
    """

    first_visuals: dict[str, Tensor] | None = None

    @property
    def own_optimizers(self) -> int:
        """Optimisers after those of the BasicSR model: the weighting network's."""
        return 0 if self.net_w is None else 1

    def init_training_settings(self) -> None:
        """Build the weighting network, then what the base model builds, then take the place of its pixel loss."""
        self.tlw = TLWOptions.of(self.opt["train"].get("tlw"))
        learned = self.opt["train"]["pixel_opt"].get("weights", "learned") == "learned"
        self.net_w = self.weighting_network() if learned else None
        self.k = self.tlw.k_start
        self.current_iter, self.last_e_step = 0, None
        self.epoch: int | None = None
        self.tlw_log: OrderedDict[str, Tensor] = OrderedDict()

        super().init_training_settings()
        if not isinstance(getattr(self, "cri_pix", None), TLWLoss):
            raise UserError("train.pixel_opt.type: TLWModel needs TLWLoss as the pixel loss")
        self.cri_tlw, self.cri_pix = self.cri_pix, self.tlw_pixel_loss
        if not learned:
            return
        self.cri_tlw.importance = self.tlw.importance
        self.cri_tlw.chunk = self.tlw.distance_chunk
        if self.tlw.use_channels_last or self.opt["train"].get("use_channels_last"):
            channels_last(self.cri_tlw)
        if self.opt["train"].get("use_compile"):
            self.cri_tlw.distance.compile()

    def weighting_network(self) -> nn.Module:
        """The weighting network on its device, in train mode, with the start values of ``path.pretrain_network_w``."""
        net_w = build_network(self.opt["network_w"])
        if self.tlw.sync_bn:
            if not self.opt["dist"] or self.device.type != "cuda":
                raise UserError("train.tlw.sync_bn: true needs a distributed training on GPUs; accepted here is false")
            net_w = nn.SyncBatchNorm.convert_sync_batchnorm(net_w)
        if self.tlw.use_channels_last:
            channels_last(net_w)
        net_w = self.model_to_device(net_w)
        self.print_network(net_w)
        load_path = self.opt["path"].get("pretrain_network_w")
        if load_path is not None:
            path = self.opt["path"]
            self.load_network(
                net_w, load_path, path.get("strict_load_w") is not False, path.get("param_key_w", "params")
            )
        return net_w.train()

    def setup_optimizers(self) -> None:
        """The base model's optimisers, then that of the weighting network."""
        super().setup_optimizers()
        if self.net_w is None:
            return
        optim_opt = dict(self.opt["train"]["optim_w"])
        self.optimizer_w = self.get_optimizer(optim_opt.pop("type"), self.net_w.parameters(), **optim_opt)
        self.optimizers.append(self.optimizer_w)

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch, counted from 0, for ``k_unit: epoch``."""
        self.epoch = epoch

    def optimize_parameters(self, current_iter: int) -> None:
        """The base model's step, with k of this iteration."""
        if self.tlw.k_unit == "iter":
            t = current_iter - 1
        elif self.epoch is not None:
            t = self.epoch
        else:
            raise UserError("train.tlw.k_unit: epoch needs tlw_basicsr's train.py; with another one, use k_unit: iter")
        self.k = k_schedule(t, self.tlw.k_start, self.tlw.k_end, self.tlw.k_decay)
        if self.net_w is not None:
            self.get_bare_model(self.net_w).k = self.k
        self.current_iter, last_e_step = current_iter, self.last_e_step
        super().optimize_parameters(current_iter)
        if self.guard.in_row:  # the step is undone
            self.last_e_step = last_e_step

    def tlw_pixel_loss(self, sr: Tensor, gt: Tensor, **_: Any) -> Tensor:
        """One iteration of expectation-maximisation on the SR image x̂ = ``sr`` that the base model has computed.

        E: one step on φ with L_φ, x̂ detached. M: fresh weights of the updated φ without gradient, and L_θ of x̂,
        whose step on θ is the base model's. The features of x are computed once for both. A control has the M step
        alone, with its own weights.

        Args:
            sr: x̂ in [0, 1], (N, C, H, W), or (N, T, C, H, W) of a video, whose frames are taken as samples.
            gt: x, likewise.

        Returns:
            L_θ, scalar.
        """
        if sr.ndim == 5:
            sr, gt = sr.flatten(0, 1), gt.flatten(0, 1)
        fixed_sr = sr.detach()
        self.guard.note("output", sr)
        if self.net_w is None:
            w = self.tlw_log["w"] = self.cri_tlw.control_weights(fixed_sr, gt, self.k)
            return self.cri_tlw(sr, gt, w)
        with self.tlw_autocast():
            distance = self.cri_tlw.distance_to(gt)
            # a GAN's generator, and with it this call, may wait for iterations
            if self.last_e_step is None or self.current_iter - self.last_e_step >= self.tlw.weight_interval:
                self.last_e_step = self.current_iter
                l_w = self.cri_tlw.weight_loss(fixed_sr, gt, self.net_w(fixed_sr, gt), distance)
                self.optimizer_w.zero_grad()
                l_w.backward()
                self.optimizer_w.step()
                self.tlw_log["l_w"] = l_w.detach()
                self.guard.note("l_w", l_w)
                self.guard.note_norm("gradient of optimizer_w", [p.grad for p in self.net_w.parameters()])

            with torch.no_grad():
                w = self.net_w(fixed_sr, gt)
            self.tlw_log["w"] = w
            self.guard.note("weights w", w)
            return self.cri_tlw(sr, gt, w, distance)

    def get_current_visuals(self) -> OrderedDict[str, Tensor]:
        """The base model's; the first image of a validation is kept for :meth:`log_weight_map`."""
        visuals = super().get_current_visuals()
        self.first_visuals = self.first_visuals or visuals
        return visuals

    def validation(
        self, dataloader: DataLoader, current_iter: int | str, tb_logger: Any, save_img: bool = False
    ) -> None:
        """The base model's; of the first validation set TensorBoard also gets the weights of its first image."""
        self.first_visuals = None
        super().validation(dataloader, current_iter, tb_logger, save_img)
        visuals, self.first_visuals = self.first_visuals or {}, None
        first_set = next((d["name"] for d in self.opt["datasets"].values() if d["phase"] == "val"), None)
        name = dataloader.dataset.opt["name"]
        if tb_logger and name == first_set and "gt" in visuals:
            self.log_weight_map(tb_logger, name, current_iter, visuals["result"], visuals["gt"])

    @torch.no_grad()
    def log_weight_map(self, tb_logger: Any, name: str, current_iter: int, sr: Tensor, gt: Tensor) -> None:
        """Log x, x̂ and w of an image beside each other, its middle 512×512 pixels, and the histogram of w.

        The weighting network is in eval mode for it: neither its batch norm nor random numbers change. Of a video it
        is the first frame.

        Args:
            tb_logger: TensorBoard's ``SummaryWriter``.
            name: of the image, in the tags ``weights/{name}`` and ``weights_histogram/{name}``.
            current_iter: iteration.
            sr: x̂ (…, C, H, W) in [0, 1].
            gt: x, likewise.
        """
        from tlw_basicsr.pictures import weights_beside  # matplotlib is slow to import, and few runs need it

        sr, gt = (middle(image.flatten(0, -4)[:1], 512).to(self.device) for image in (sr.clamp(0, 1), gt))
        if self.net_w is None:
            w = self.cri_tlw.control_weights(sr, gt, self.k)
        else:
            net_w = self.get_bare_model(self.net_w).eval()
            w = net_w(sr, gt)
            net_w.train()
        tb_logger.add_image(f"weights/{name}", weights_beside(gt[0], sr[0], w[0]), current_iter)
        tb_logger.add_histogram(f"weights_histogram/{name}", w, current_iter)

    def tlw_autocast(self) -> AbstractContextManager:
        """Autocast of the distance and the weighting network, if ``train.tlw.use_amp`` asks for it."""
        if not self.tlw.use_amp:
            return nullcontext()
        # without a cache: it would hand the M step the weights from before the E step
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def get_current_log(self) -> OrderedDict[str, float]:
        """The base model's log, and of the newest iteration with a pixel loss: L_φ, WC, k, mean and spread of w.

        WC = exp(-L_φ) is the geometric mean over the batch of the weight criterion of the E step's sample.
        """
        log, tensors = OrderedDict(super().get_current_log()), OrderedDict()
        if "l_w" in self.tlw_log:
            l_w = self.tlw_log["l_w"]
            tensors.update(l_w=l_w, wc=(-l_w).exp())
        if "w" in self.tlw_log:
            w = self.tlw_log["w"]
            tensors.update(w_mean=w.mean(), w_std=w.std())
            log["k"] = self.k
        if tensors:
            log.update(self.reduce_loss_dict(tensors))
        return log

    def save(self, epoch: int, current_iter: int) -> None:
        """``net_w_{current_iter}.pth``, then the base model's files, the training state last."""
        if self.net_w is not None:
            self.save_network(self.net_w, "net_w", current_iter)
        super().save(epoch, current_iter)

    def training_state(self) -> dict[str, Any]:
        """Also k, and when φ was last stepped."""
        return {**super().training_state(), "tlw": {"k": self.k, "last_e_step": self.last_e_step}}

    def resume_rest(self, resume_state: dict[str, Any]) -> None:
        """Also k, and when φ was last stepped."""
        super().resume_rest(resume_state)
        if "tlw" in resume_state:
            self.k = resume_state["tlw"]["k"]
            if self.net_w is not None:
                self.get_bare_model(self.net_w).k = self.k
            self.last_e_step = resume_state["tlw"]["last_e_step"]


def middle(image: Tensor, side: int) -> Tensor:
    """The middle of ``image`` (N, C, H, W), at most ``side`` × ``side``."""
    height, width = image.shape[-2:]
    top, left = max(height - side, 0) // 2, max(width - side, 0) // 2
    return image[..., top : top + side, left : left + side]


@cache
def with_tlw(base: type[BaseModel]) -> type[BaseModel]:
    """The class ``TLW{base}``: the BasicSR model class ``base`` trained with Trainable Loss Weights."""
    return type(f"TLW{base.__name__}", (TLWMixin, base), {})


@MODEL_REGISTRY.register()
class TLWModel:
    """``model_type: TLWModel``: the registered model ``base_model`` (default SRModel) under :class:`TLWMixin`."""

    def __new__(cls, opt: dict[str, Any]) -> BaseModel:
        """Build the model from BasicSR's options."""
        return with_tlw(MODEL_REGISTRY.get(opt.get("base_model", "SRModel")))(opt)
