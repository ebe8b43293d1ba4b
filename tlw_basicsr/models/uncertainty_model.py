"""The uncertainty baseline of the paper's comparison."""

from collections import OrderedDict
from typing import Any

import torch
from basicsr.archs import build_network
from basicsr.models.sr_model import SRModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.core.functional import check_range
from tlw_basicsr.losses.uncertainty_loss import UncertaintyLoss
from tlw_basicsr.models.training import TrainingMixin
from tlw_basicsr.networks import check_fit, read_network
from tlw_basicsr.util.errors import UserError

STAGE_ONE_KEYS = {"net_g": "stage_one_g", "net_u": "stage_one_u"}


class FeatureTap:
    """Keeps the input of the module of this name in a network."""

    def __init__(self, net: nn.Module, name: str) -> None:
        try:
            module = net.get_submodule(name)
        except AttributeError:
            choices = ", ".join(child for child, _ in net.named_children())
            raise UserError(
                f"train.uncertainty.features: {name!r} is not a module of {type(net).__name__}; accepted are {choices}"
            ) from None
        self.features: Tensor | None = None
        module.register_forward_pre_hook(self._keep)

    def _keep(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.features = inputs[0]

    def take(self) -> Tensor:
        """Return the features of the last forward, and forget them."""
        features, self.features = self.features, None
        if features is None:
            raise UserError("train.uncertainty.features: the network's forward does not pass this module")
        return features


@MODEL_REGISTRY.register()
class UncertaintyModel(TrainingMixin, SRModel):
    """Uncertainty-driven loss (Ning et al., NeurIPS 2021) in two stages of one training.

    Stage one trains the SR network and a head that predicts the log-variance map s from its features, with L_ESU. At
    its end both are copied and frozen; stage two trains the SR network from there with L_UDL and the copies' s, and
    with a fresh optimiser. The head steps with ``optim_g``.

    Options beside SRModel's: ``network_u`` (an :class:`UncertaintyHead`), ``train.pixel_opt: {type: UncertaintyLoss}``
    and :class:`tlw_basicsr.engine.schema.UncertaintyOptions`; a ``stage_one_iter`` of 0 starts stage two from
    ``path.pretrain_network_g`` and ``_u``.
    """

    def init_training_settings(self) -> None:
        """Build the head, then what SRModel builds, then take the place of its pixel loss."""
        options = self.opt["train"].get("uncertainty") or {}
        self.stage_one_iter = options["stage_one_iter"]
        self.features_name = options.get("features", "upsample")
        self.net_u = self.load_pretrained(self.model_to_device(build_network(self.opt["network_u"])), "u")
        self.tap = FeatureTap(self.get_bare_model(self.net_g), self.features_name)
        self.stage_one: dict[str, nn.Module] | None = None
        super().init_training_settings()
        self.cri_uncertainty: UncertaintyLoss = self.cri_pix
        self.cri_pix: Any = self.uncertainty_pixel_loss

    def setup_optimizers(self) -> None:
        """Add the head's parameters to the SR network's optimiser."""
        super().setup_optimizers()
        self.optimizer_g.add_param_group({"params": list(self.net_u.parameters())})

    def begin_stage_two(self) -> None:
        """Keep frozen copies of the SR network and the head; forget the optimiser's moments and gradients."""
        self.freeze({name: self.get_bare_model(getattr(self, name)).state_dict() for name in STAGE_ONE_KEYS})
        self.optimizer_g.state.clear()
        self.optimizer_g.forget_gradients()

    def freeze(self, states: dict[str, dict[str, Tensor]]) -> None:
        """Build stage one's networks, which predict s in stage two, from their state dicts."""
        networks = {}
        with torch.random.fork_rng():
            for name, state in states.items():
                net = build_network(self.opt[name.replace("net", "network")]).to(self.device)
                net.load_state_dict(state)
                networks[name] = net.eval().requires_grad_(False)
        self.stage_one_tap = FeatureTap(networks["net_g"], self.features_name)
        self.stage_one = networks
        self.net_u.requires_grad_(False)

    def optimize_parameters(self, current_iter: int) -> None:
        """Run SRModel's step in the stage of this iteration."""
        if self.stage_one is None and current_iter > self.stage_one_iter:
            get_root_logger().info("Stage two of the uncertainty baseline begins.")
            self.begin_stage_two()
        super().optimize_parameters(current_iter)

    def uncertainty_pixel_loss(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Return L_ESU or L_UDL, a scalar, of the SR image (N, C, H, W) in [0, 1] that SRModel has computed."""
        if not hasattr(self, "s_log"):
            check_range(gt)  # of the first batch alone, since it waits for the device
        if self.stage_one is None:
            s, stage = self.net_u(self.tap.take()), 1
        else:
            with torch.no_grad():
                self.stage_one["net_g"](self.lq)
                s, stage = self.stage_one["net_u"](self.stage_one_tap.take()), 2
            self.tap.take()
        s = s[..., : sr.shape[-2], : sr.shape[-1]]  # HAT pads the image
        self.s_log = {"s_mean": s.detach().mean(), "s_std": s.detach().std()}
        return self.cri_uncertainty(sr, gt, s, stage)

    def get_current_log(self) -> OrderedDict[str, float]:
        """Return SRModel's log, the stage, and mean and spread of s."""
        log = super().get_current_log()
        log["stage"] = 1 if self.stage_one is None else 2
        log.update(self.read_losses(getattr(self, "s_log", {})))
        return log

    def save(self, epoch: int, current_iter: int) -> None:
        """Write ``net_u_{current_iter}.pth``, in stage two with stage one's networks, then SRModel's files."""
        nets = {"params": self.net_u}
        for name, net in (self.stage_one or {}).items():
            nets[STAGE_ONE_KEYS[name]] = net
        self.save_network([*nets.values()], "net_u", current_iter, [*nets])
        super().save(epoch, current_iter)

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Also load stage one's networks, if it has ended."""
        if resume_state["iter"] > self.stage_one_iter:
            path, what = self.opt["path"]["pretrain_network_u"], "path.pretrain_network_u"
            states = {name: read_network(path, key, what) for name, key in STAGE_ONE_KEYS.items()}
            for name, state in states.items():
                check_fit(state, self.get_bare_model(getattr(self, name)), True, path, what)
            self.freeze(states)
        super().resume_training(resume_state)
