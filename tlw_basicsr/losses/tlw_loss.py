"""The YAML's side of TLW: the pixel loss ``TLWLoss`` and the section ``train.tlw``."""

import inspect
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, cast

from basicsr.utils.registry import LOSS_REGISTRY
from torch import Tensor, nn

from tlw_basicsr.core.arguments import Kind
from tlw_basicsr.core.tlw import ECONOMY_NET_W, ECONOMY_OPTIM_W, PRESETS, TLW, Base, LossWeight, NumSamples, Stochastic
from tlw_basicsr.core.weightings import SHORT_NAMES, LDLWeights, LearnedWeights, PSPLWeights, Weighting
from tlw_basicsr.losses.distance_loss import build_distance
from tlw_basicsr.networks import get_section
from tlw_basicsr.registry import check_arguments, lookup
from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import Option, describe_parameters

LOSS_REGISTRY.register(LearnedWeights)
LOSS_REGISTRY.register(LDLWeights)
LOSS_REGISTRY.register(PSPLWeights)

WEIGHTS = Kind(
    f"one of {', '.join(SHORT_NAMES)}, or a section {{type: a registered Weighting, …}}",
    lambda v: isinstance(v, dict | Weighting) or (isinstance(v, str) and v in SHORT_NAMES),
    {"anyOf": [{"enum": list(SHORT_NAMES)}, {"type": "object", "required": ["type"]}]},
)
Weights = Annotated[str | dict | Weighting, WEIGHTS, "how the pixels are weighted: learned, or without learning"]
PAPER_DISTANCE = {"type": "LPIPSDistance", "net": "vgg"}  # the D of arXiv:2301.10575


@LOSS_REGISTRY.register()
class TLWLoss(nn.Module):
    """``train.pixel_opt`` of a :class:`tlw_basicsr.TLWModel`.

    It can't be called by itself: the model gives it the weighting network, see :meth:`make_tlw`. In a loop of your
    own, :class:`tlw_basicsr.TLW` is the loss, and the arguments that are not named here are as there.

    Args:
        distance: options of D, ``{type: a registered loss that gives one value per sample, …}``, or such a module. None
            for the paper's, ``{type: LPIPSDistance, net: vgg}``. The controls take no distance.
        reduction: BasicSR's; only the mean.
        weights: ``'learned'``, ``'random'``, ``'error'``, a :class:`tlw_basicsr.Weighting`, or the options of a
            registered one, ``{type: LDLWeights, …}``.
    """

    def __init__(
        self,
        distance: dict[str, Any] | nn.Module | None = None,
        base: Base = "l1",
        stochastic: Stochastic = True,
        num_samples: NumSamples = 3,
        loss_weight: LossWeight = 1.0,
        reduction: Literal["mean"] = "mean",
        weights: Weights = "learned",
    ) -> None:
        super().__init__()
        if reduction != "mean":
            raise UserError(f"TLWLoss: reduction must be mean, got {short(reduction)}")
        if not isinstance(distance, dict | nn.Module | None):
            raise UserError(
                f"TLWLoss: distance must be options such as {{type: LPIPSDistance, net: vgg}}, or a module, "
                f"got {short(distance)}"
            )
        if not WEIGHTS.accepts(weights):
            raise UserError(f"TLWLoss: weights: expected {WEIGHTS.text}, got {short(weights)}")
        weighting = build_weighting(weights)
        learned = isinstance(weighting, LearnedWeights)
        if not learned and distance is not None:
            raise UserError(f"TLWLoss: distance is not used with {type(weighting).__name__}; delete it")
        if learned and not isinstance(distance, nn.Module):
            distance = build_distance(PAPER_DISTANCE if distance is None else distance)
        self.distance = cast("nn.Module | None", distance)
        self.arguments = {
            "base": base,
            "weights": weighting,
            "stochastic": stochastic,
            "num_samples": num_samples,
            "loss_weight": loss_weight,
        }
        if not learned:
            self.make_tlw()  # raises where the options don't go together

    def make_tlw(self, **more: Any) -> TLW:
        """Build the :class:`tlw_basicsr.TLW` of these options and ``more`` arguments."""
        try:
            return TLW(self.distance, **self.arguments, **more)
        except ValueError as error:
            raise UserError(f"train.pixel_opt or train.tlw: {error}") from error

    def forward(self, sr: Tensor, gt: Tensor) -> Tensor:
        """Raise a UserError: there is no weighting network."""
        raise UserError("TLWLoss needs model_type: TLWModel, which has the weighting network; in Python use TLW")


def find_weighting(weights: Any) -> type[Weighting]:
    """The class that ``train.pixel_opt.weights`` names; that of ``learned`` if it is missing or no name at all."""
    if not isinstance(weights, dict):
        return SHORT_NAMES.get(weights, LearnedWeights) if isinstance(weights, str) else LearnedWeights
    place = "train.pixel_opt.weights"
    found = lookup(LOSS_REGISTRY, weights, place)
    if not (inspect.isclass(found) and issubclass(found, Weighting)):
        raise UserError(f"{place}.type: {weights['type']} is no Weighting; LDLWeights is one")
    check_arguments(weights, place, found)
    return found


def is_learned(pixel_opt: dict[str, Any]) -> bool:
    """Whether the weights of ``train.pixel_opt`` are those of a weighting network."""
    return issubclass(find_weighting(pixel_opt.get("weights")), LearnedWeights)


def build_weighting(weights: str | dict[str, Any] | Weighting) -> Weighting:
    """The weighting of ``train.pixel_opt.weights``."""
    if isinstance(weights, Weighting):
        return weights
    arguments = {key: value for key, value in weights.items() if key != "type"} if isinstance(weights, dict) else {}
    try:
        return find_weighting(weights)(**arguments)
    except ValueError as error:
        raise UserError(f"train.pixel_opt.weights: {error}") from error


@dataclass(frozen=True, kw_only=True)
class YamlOptions:
    """The options of ``train.tlw`` that are not arguments of :class:`tlw_basicsr.TLW`."""

    preset: Annotated[
        Literal["exact", "fast", "economy", "paper"],
        "values of the options that are not given: `exact`, the published mathematics; `economy` and `fast`, cheaper E "
        "steps; `paper`, all values of the published runs",
    ] = "exact"
    k_unit: Annotated[Literal["epoch", "iter"], "what t counts from 0: epochs (the paper's) or iterations"] = "epoch"
    use_channels_last: Annotated[bool, "weights of D and the weighting network in channels-last order"] = False
    sync_bn: Annotated[bool, "batch norm of the weighting network over all processes; GPUs only"] = False


def describe_options() -> dict[str, Option]:
    """Return the options of ``train.tlw``: the model's own, then TLW's that do not belong to ``train.pixel_opt``."""
    elsewhere = {"net_w", "optimizer", *describe_parameters(TLWLoss)}
    return {**describe_parameters(YamlOptions), **describe_parameters(TLW, without=elsewhere)}


def split_options(section: dict[str, Any] | None) -> tuple[YamlOptions, dict[str, Any]]:
    """Split ``train.tlw`` into the options of the model and the arguments of TLW, on top of their preset."""
    section = section or {}
    own = YamlOptions(**{key: value for key, value in section.items() if key in YamlOptions.__annotations__})
    arguments = {key: value for key, value in section.items() if key not in asdict(own)}
    return own, {**PRESETS[own.preset], **arguments}


def complete_economy(opt: dict[str, Any]) -> None:
    """Put ``network_w`` and ``train.optim_w``, which ``preset: economy`` may leave out, into the options.

    From there on they are like any other: resumed, found by ``path.pretrain_network_w`` and the tools.
    """
    train = get_section(opt, "train")
    loss, tlw = (get_section(train, key, "train") for key in ("pixel_opt", "tlw"))
    if tlw.get("preset") != "economy" or loss.get("type") != "TLWLoss" or not is_learned(loss):
        return
    data = get_section(get_section(opt, "datasets"), "train", "datasets")
    channels = 1 if data.get("color") == "y" else get_section(opt, "network_g").get("num_out_ch", 3)
    if opt.get("network_w") is None:
        opt["network_w"] = {"type": "TLWWeightNet", "num_in_ch": channels, **ECONOMY_NET_W}
    if train.get("optim_w") is None:
        train["optim_w"] = {"type": "Adam", **ECONOMY_OPTIM_W, "betas": list(ECONOMY_OPTIM_W["betas"])}
