"""The network of a file, of any architecture that spandrel knows.

``network_g: {type: SpandrelNetwork, file: PATH}``
"""

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from tlw_basicsr.networks import read_model
from tlw_basicsr.util.errors import expanded


@ARCH_REGISTRY.register()
def SpandrelNetwork(file: str) -> nn.Module:
    """Build the network of a file with its weights, to be trained on.

    Its class is spandrel's for the architecture, so that what is trained is known by spandrel, and so by chaiNNer,
    again. The file is safetensors, or a checkpoint of BasicSR's format or a bare state dict; of the average, where
    there is one.
    """
    return read_model(expanded(file, "file"), what="file").model.train()
