"""Registers the weighting network of the core with BasicSR: ``network_w: {type: TLWWeightNet, …}``."""

from basicsr.utils.registry import ARCH_REGISTRY

from tlw_basicsr.core.weight_net import TLWWeightNet

ARCH_REGISTRY.register(TLWWeightNet)
