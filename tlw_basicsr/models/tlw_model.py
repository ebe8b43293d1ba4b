"""Training with Trainable Loss Weights on top of a BasicSR model: a thin adapter of :class:`tlw_basicsr.TLW`."""

from collections import OrderedDict
from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.models.base_model import BaseModel
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tlw_basicsr.core.tlw import NEARLY_CONSTANT
from tlw_basicsr.data.images import undo_normalization
from tlw_basicsr.losses.tlw_loss import TLWLoss, complete_economy, is_learned, split_options
from tlw_basicsr.models.training import TrainingMixin, channels_last
from tlw_basicsr.pictures import weights_beside
from tlw_basicsr.util.errors import UserError


class TLWMixin(TrainingMixin):
    """Puts a :class:`tlw_basicsr.TLW` into a BasicSR model's own training step.

    Every BasicSR model with a pixel loss calls ``self.cri_pix(self.output, target)`` once in its
    ``optimize_parameters``. That call is :meth:`tlw_pixel_loss` here, one iteration of TLW: a step on the weighting
    network φ, then the weighted loss of the same SR image, of which the model's own code takes the gradient.

    Options: ``network_w``, ``train.optim_w``, ``train.pixel_opt`` (a ``TLWLoss``) and ``train.tlw``. With ``preset:
    economy`` the first two may be left out. A control has neither: ``net_w`` is None then, and of ``train.tlw`` only
    k's schedule counts.
    """

    first_visuals: dict[str, Tensor] | None = None
    further: Mapping[str, Tensor] = MappingProxyType({})
    graphs_failure: str | None = None

    def init_training_settings(self) -> None:
        """Build the weighting network and what the base model builds; replace the base model's pixel loss."""
        complete_economy(self.opt)
        train = self.opt["train"]
        self.tlw_options, arguments = split_options(train.get("tlw"))
        learned = is_learned(train["pixel_opt"])
        self.net_w = self.make_net_w() if learned else None
        if self.opt["datasets"]["train"].get("mean"):
            get_root_logger().info("datasets.train.mean, std: TLW and its loss see the images in [0, 1], without them.")
        self.epoch: int | None = None

        super().init_training_settings()
        loss = getattr(self, "cri_pix", None)
        if not isinstance(loss, TLWLoss):
            raise UserError("train.pixel_opt.type: TLWModel needs TLWLoss as the pixel loss")
        optimizer = (lambda _: self.optimizer_w) if learned else None
        self.tlw = loss.make_tlw(net_w=self.net_w, optimizer=optimizer, **arguments)
        self.tlw.to(self.device)
        self.k = self.tlw.k(0)
        self.cri_pix = self.tlw_pixel_loss
        if "sr_ema" in self.tlw.weighting.needs and not hasattr(self, "net_g_ema"):
            kind = type(self.tlw.weighting).__name__
            raise UserError(f"train.ema_decay: {kind} needs the moving average of the network; accepted is above 0")
        if self.tlw.distance is None:
            return
        if self.tlw_options.use_channels_last or train.get("use_channels_last"):
            channels_last(self.tlw.distance)
        if train.get("use_compile"):
            self.tlw.distance.compile()

    def make_net_w(self) -> nn.Module:
        """Build the weighting network on its device, in train mode, from ``path.pretrain_network_w`` if that is given.

        It is not wrapped for distributed training: TLW averages its gradients over processes.
        """
        train = self.opt["train"]
        net_w = build_network(self.opt["network_w"])
        if self.tlw_options.sync_bn:
            if not self.opt["dist"] or self.device.type != "cuda":
                raise UserError("train.tlw.sync_bn: true needs a distributed training on GPUs; accepted here is false")
            net_w = nn.SyncBatchNorm.convert_sync_batchnorm(net_w)
        if self.tlw_options.use_channels_last or train.get("use_channels_last"):
            channels_last(net_w)
        if train.get("use_compile"):
            net_w.compile()
        return self.load_pretrained(net_w.to(self.device), "w")

    def setup_optimizers(self) -> None:
        """Build the base model's optimisers, then that of the weighting network."""
        super().setup_optimizers()
        if self.net_w is None:
            return
        optim_opt = dict(self.opt["train"]["optim_w"])
        optimizer = self.get_optimizer(optim_opt.pop("type"), self.net_w.parameters(), **optim_opt)
        self.optimizer_w = self.wrap_optimizer(optimizer)
        self.optimizers.append(self.optimizer_w)
        self.own_optimizers = 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, counted from 0, for ``k_unit: epoch``."""
        self.epoch = epoch

    def feed_data(self, data: dict[str, Any]) -> None:
        """Take a batch, with the images that the weighting needs beside those of the base model."""
        super().feed_data(data)
        needs = self.tlw.weighting.needs if self.is_train else ()
        self.further = {name: data[name].to(self.device) for name in needs if name in data}

    def optimize_parameters(self, current_iter: int) -> None:
        """Run the base model's step with k of this iteration."""
        self.t = current_iter - 1 if self.tlw_options.k_unit == "iter" else self.epoch
        if self.t is None:
            raise UserError("train.tlw.k_unit: epoch needs tlw_basicsr's train.py; with another one, use k_unit: iter")
        self.k = self.tlw.k(self.t)
        self.iteration, self.last_e_step = current_iter, self.tlw.last_e_step
        super().optimize_parameters(current_iter)

    def undo_iteration(self) -> None:
        """As in every training; the iteration has had no E step."""
        super().undo_iteration()
        self.tlw.last_e_step = self.last_e_step

    def list_terms(self) -> dict[str, Any]:
        """As in every training, with TLW's."""
        return {**super().list_terms(), "l_w": self.tlw.log.get("l_w"), "weights w": self.tlw.log.get("w")}

    def tlw_pixel_loss(self, sr: Tensor, gt: Tensor, **_: Any) -> Tensor:
        """Return L_θ, a scalar, of the SR image that the base model has computed, after the E step where one is due.

        Images that the data set has normalised by ``mean`` and ``std`` are brought back to [0, 1] for it.
        """
        sr, gt = (undo_normalization(image, self.opt["datasets"]["train"]) for image in (sr, gt))
        # a GAN's generator, and with it the pixel loss, may wait for iterations
        loss = self.tlw(sr, gt, self.t, iteration=self.iteration, **self.list_further())
        self.watch_losses(loss)
        return loss

    @torch.no_grad()
    def list_further(self) -> dict[str, Tensor]:
        """The images that the weighting needs beside x̂ and x."""
        train, weighting = self.opt["datasets"]["train"], self.tlw.weighting
        images = dict(self.further)
        if "sr_ema" in weighting.needs:
            images["sr_ema"] = undo_normalization(self.net_g_ema(self.lq), train)
        if missing := [name for name in weighting.needs if name not in images]:
            kind = type(weighting).__name__
            raise UserError(f"datasets.train: {train['type']} gives no {missing[0]}, which {kind} needs in each batch")
        return images

    def get_current_visuals(self) -> OrderedDict[str, Tensor]:
        """Return the base model's; keep the first image of a validation for :meth:`log_weight_map`."""
        visuals = super().get_current_visuals()
        self.first_visuals = self.first_visuals or visuals
        return visuals

    def validation(self, dataloader: DataLoader, current_iter: int, tb_logger: Any, save_img: bool = False) -> None:
        """Validate as the base model; TensorBoard also gets the weights of the first set's first image."""
        self.first_visuals = None
        super().validation(dataloader, current_iter, tb_logger, save_img)
        opt: dict[str, Any] = getattr(dataloader.dataset, "opt")  # noqa: B009, a torch Dataset has none
        visuals = {key: undo_normalization(image, opt) for key, image in (self.first_visuals or {}).items()}
        self.first_visuals = None
        first_set = next((d["name"] for d in self.opt["datasets"].values() if d["phase"] == "val"), None)
        name = opt["name"]
        if tb_logger and name == first_set and "gt" in visuals and not self.tlw.weighting.needs:
            self.log_weight_map(tb_logger, name, current_iter, visuals["result"], visuals["gt"])

    @torch.no_grad()
    def log_weight_map(self, tb_logger: Any, name: str, current_iter: int, sr: Tensor, gt: Tensor) -> None:
        """Log the middle 512×512 pixels of x, x̂ and w beside each other, and the histogram of w.

        Neither the weighting network's batch norm nor random numbers change. Images are (…, C, H, W) in [0, 1]; a video
        is logged by its first frame.
        """
        sr, gt = (cut_middle(image.flatten(0, -4)[:1], 512).to(self.device) for image in (sr.clamp(0, 1), gt))
        w = self.tlw.weights(sr, gt, getattr(self, "t", None))
        tb_logger.add_image(f"weights/{name}", weights_beside(gt[0], sr[0], w[0]), current_iter)
        tb_logger.add_histogram(f"weights_histogram/{name}", w, current_iter)

    def get_current_log(self) -> OrderedDict[str, float]:
        """Return the base model's log, k, and :meth:`tlw_basicsr.TLW.summarize` of its last pixel loss."""
        log = super().get_current_log()
        try:
            summary = self.tlw.summarize()
        except ValueError as error:  # the gt of an iteration since the last log
            raise UserError(str(error)) from error
        if self.tlw.graphs_failure not in (None, self.graphs_failure):
            self.graphs_failure = self.tlw.graphs_failure
            get_root_logger().info(f"train.tlw.use_graphs: steps run without CUDA graphs ({self.graphs_failure}).")
        if summary:
            log["k"] = self.k
            log.update(self.read_losses(summary))
            if log["w_std"] < NEARLY_CONSTANT:
                get_root_logger().info(f"The weights are nearly constant (standard deviation {log['w_std']:.4f}).")
        return log

    def save(self, epoch: int, current_iter: int) -> None:
        """Write ``net_w_{current_iter}.pth``, then the base model's files, the training state last."""
        if self.net_w is not None:
            self.save_network(self.net_w, "net_w", current_iter)
        super().save(epoch, current_iter)

    def training_state(self) -> dict[str, Any]:
        """As in every training, with k and the iteration of the last E step."""
        return {**super().training_state(), "tlw": {"k": self.k, "last_e_step": self.tlw.last_e_step}}

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """As in every training, with what :meth:`training_state` adds."""
        super().resume_training(resume_state)
        if "tlw" in resume_state:
            self.k, self.tlw.last_e_step = resume_state["tlw"]["k"], resume_state["tlw"]["last_e_step"]


def cut_middle(image: Tensor, side: int) -> Tensor:
    """Return the middle of ``image`` (N, C, H, W), at most ``side`` × ``side`` pixels."""
    height, width = image.shape[-2:]
    top, left = max(height - side, 0) // 2, max(width - side, 0) // 2
    return image[..., top : top + side, left : left + side]


@MODEL_REGISTRY.register()
class TLWModel(TLWMixin, SRModel):
    """SRModel, or the registered model ``base_model``, trained with Trainable Loss Weights, see :class:`TLWMixin`."""

    def __new__(cls, opt: dict[str, Any]) -> Any:
        """Build the model on ``base_model`` instead where that is another one."""
        base = MODEL_REGISTRY.get(opt.get("base_model", "SRModel"))
        return super().__new__(cls) if cls is not TLWModel or base is SRModel else with_tlw(base)(opt)


@cache
def with_tlw(base: type[BaseModel]) -> type[BaseModel]:
    """Return ``TLW{base}``, the BasicSR model class ``base`` trained with Trainable Loss Weights."""
    return TLWModel if base is SRModel else type(f"TLW{base.__name__}", (TLWMixin, base), {})
