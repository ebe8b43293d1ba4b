"""TLW as the pixel loss of a framework that builds losses from plain options."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Annotated, Any, Literal

from torch import Tensor, nn

from tlw_basicsr.core.arguments import POSITIVE, checked
from tlw_basicsr.core.distances import LPIPSDistance, MissingWeights, SSIMDistance
from tlw_basicsr.core.tlw import ECONOMY_NET_W, ECONOMY_OPTIM_W, TLW, make_adam
from tlw_basicsr.core.weight_net import TLWWeightNet

DISTANCES = {"LPIPSDistance": LPIPSDistance, "SSIMDistance": SSIMDistance}


def build_distance(options: dict[str, Any]) -> nn.Module:
    """The distance of ``{"type": …, …}``."""
    arguments = dict(options)
    name = arguments.pop("type", None)
    if name not in DISTANCES:
        raise ValueError(f"TLWPixelLoss: distance.type must be one of {', '.join(DISTANCES)}, got {name!r}")
    return DISTANCES[name](**arguments)


class TLWPixelLoss(nn.Module):
    """Trainable Loss Weights in the place of an L1 loss: ``forward(sr, gt)`` also trains the weighting network.

    Every argument is a plain option, as a YAML or TOML has them::

        TLWPixelLoss(k_decay=100_000, distance={"type": "SSIMDistance"}, preset="economy", loss_weight=0.5)

    :attr:`tlw` is the :class:`tlw_basicsr.TLW` that does it; ``state_dict()`` has the weighting network, its optimiser
    and the position, without which a training can't be resumed. :meth:`register` lets a framework keep that, too.

    Args:
        k_decay: calls after which 63% of the way of k is done, such as the number of iterations of the training.
        distance: D, as ``{"type": "LPIPSDistance" or "SSIMDistance", …}`` or a module; None for the paper's.
        preset: values of the options that are not given, see :data:`tlw_basicsr.core.tlw.PRESETS`.
        loss_weight: factor of the loss, above 0.
        reduction: only ``"mean"``.
        net_w: options of :class:`tlw_basicsr.TLWWeightNet`; None for the preset's.
        optim_w: ``lr`` and ``betas`` of the weighting network's Adam; None for the preset's.
        options: further arguments of :class:`tlw_basicsr.TLW`, such as ``base``, ``weights``, ``k_start``, ``k_end``.

    Raises:
        ValueError: an option is not what is accepted, or does not go with another.
    """

    loss_weight = 1.0  # the factor is in what forward returns: a framework that multiplies by this does so once in all

    @checked
    def __init__(
        self,
        *,
        k_decay: float,
        distance: dict[str, Any] | nn.Module | None = None,
        preset: str = "economy",
        loss_weight: Annotated[float, POSITIVE] = 1.0,
        reduction: Literal["mean"] = "mean",
        net_w: dict[str, Any] | None = None,
        optim_w: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        economy = preset == "economy"
        if net_w is not None:
            options["net_w"] = TLWWeightNet(**{**(ECONOMY_NET_W if economy else {}), **net_w})
        if optim_w is not None:
            adam = {**(ECONOMY_OPTIM_W if economy else {}), **optim_w}
            options["optimizer"] = lambda parameters: make_adam(parameters, **adam)
        try:
            built = build_distance(distance) if isinstance(distance, dict) else distance
            self.tlw = TLW.from_preset(preset, built, k_decay=k_decay, loss_weight=loss_weight, **options)
        except MissingWeights as error:
            raise ValueError(f"TLWPixelLoss: distance: {error.in_options()}") from error

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """``loss_weight``·L_θ of x̂ (N, C, H, W) and x in [0, 1], scalar, after an E step on φ where one is due."""
        return self.tlw(sr, gt)

    @classmethod
    def register(cls, registry: Any, *models: type) -> None:
        """Add the class to a registry of losses, and let models save and load its state with their own training states.

        The registry is anything with ``register(cls)``, such as ``LOSS_REGISTRY`` of BasicSR and its descendants.
        The models have ``optimizers`` and write and read their states in ``save_training_state`` and
        ``resume_training``. The loss's state is one more of an optimiser's there.
        """
        registry.register(cls)
        for model in models:
            for name in ("save_training_state", "resume_training"):
                setattr(model, name, _with_losses(getattr(model, name)))


def _with_losses(method: Callable) -> Callable:
    """Return the method of a model, which finds the state of its TLW losses among those of its optimisers."""

    @wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimizers = self.optimizers
        self.optimizers = [*optimizers, *find_losses(vars(self))]
        try:
            return method(self, *args, **kwargs)
        finally:
            self.optimizers = optimizers

    return call


def find_losses(parts: dict[str, Any]) -> Iterator[TLWPixelLoss]:
    """Yield the losses among the attributes of a model, also those in a dict of losses."""
    for part in parts.values():
        if isinstance(part, TLWPixelLoss):
            yield part
        elif isinstance(part, dict):
            yield from find_losses(part)
