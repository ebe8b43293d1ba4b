"""BasicSR models with Trainable Loss Weights; building any model for training."""

from copy import deepcopy
from typing import Any

from basicsr.models.base_model import BaseModel
from basicsr.utils import get_root_logger
from basicsr.utils.registry import MODEL_REGISTRY

from tlw_basicsr.models.tlw_model import TLWMixin, TLWModel, with_tlw
from tlw_basicsr.models.training import TrainingMixin, with_training
from tlw_basicsr.util.errors import UserError, first_line

__all__ = ["TLWMixin", "TLWModel", "TrainingMixin", "build_model", "with_tlw", "with_training"]


def build_model(opt: dict[str, Any]) -> BaseModel:
    """BasicSR's ``build_model``, with :class:`TrainingMixin` in every model class."""
    opt = deepcopy(opt)
    model = MODEL_REGISTRY.get(opt["model_type"])
    if isinstance(model, type) and issubclass(model, BaseModel):
        model = with_training(model)
    try:
        built = model(opt)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{opt['model_type']}: the option {error} is missing") from error
    except Exception as error:  # a model raises what it likes
        raise UserError(f"{opt['model_type']} can't be built from these options ({first_line(error)})") from error
    get_root_logger().info(f"Model [{type(built).__name__}] is created.")
    return built
