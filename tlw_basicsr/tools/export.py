"""Trained networks as ONNX and safetensors files."""

import json
import logging
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tlw_basicsr.networks import FROM_FILE, count_input_channels, describe_model
from tlw_basicsr.tools.inference import NetworkUpscaler
from tlw_basicsr.util.errors import UserError, first_line
from tlw_basicsr.util.files import whole_file

TOLERANCE = 1e-4  # largest difference between the results of network and file, on images in [0, 1]
NEEDED = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".safetensors": ("safetensors",)}


def check_installed(suffix: str) -> None:
    """Raise a :class:`UserError` if a package that writes files of ``suffix`` is missing."""
    missing = [name for name in NEEDED[suffix] if find_spec(name) is None]
    if missing:
        raise UserError(
            f"{suffix} files need {' and '.join(missing)}, not installed here: pip install 'tlw_basicsr[export]', or "
            f"pip install {' '.join(missing)}"
        )


def metadata(options: dict[str, Any], upscaler: NetworkUpscaler) -> dict[str, str]:
    """Return what a file says about its network: architecture, options as JSON, scale, and the multiple of sides."""
    from_file = options["type"] == FROM_FILE  # whose name says nothing to others
    arguments = {} if from_file else {key: value for key, value in options.items() if key != "type"}
    return {
        "architecture": describe_model(options["file"])["architecture"] if from_file else options["type"],
        "options": json.dumps(arguments),
        "scale": str(upscaler.scale),
        "size_multiple": str(upscaler.multiple),
        "images": "RGB in [0, 1], (N, C, H, W)",
    }


def export_safetensors(net: nn.Module, options: dict[str, Any], path: Path) -> None:
    """Write the weights as safetensors, under the names of the state dict, with :func:`metadata`."""
    from safetensors.torch import save

    state = {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}
    content = save(state, metadata(options, NetworkUpscaler(net, options)))
    with whole_file(path) as file:
        file.write(content)


def export_onnx(net: nn.Module, options: dict[str, Any], path: Path, size: tuple[int, int] | None = None) -> float:
    """Write the network as ONNX with input ``lq`` and output ``sr``; onnxruntime checks it before the file appears.

    With ``size`` the file takes LR images of this height and width only, one at a time, else any batch and size.
    Returns the largest difference between the results of onnxruntime and of the network.
    """
    import onnxruntime

    upscaler = NetworkUpscaler(net, options)
    side = -(-16 // upscaler.multiple) * upscaler.multiple
    if size is not None and any(length < 1 or length % upscaler.multiple for length in size):
        raise UserError(f"--size: expected multiples of {upscaler.multiple} for {options['type']}, got {size}")
    # the network is traced with the first and checked with all
    batches = [(1, *size)] * 2 if size else [(2, 2 * side, 3 * side), (1, 3 * side, 2 * side), (3, side, 4 * side)]
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(n, count_input_channels(options), h, w, generator=generator) for n, h, w in batches]
    hint = "" if size else "; --size HEIGHT WIDTH exports it for images of one size"
    try:
        content = _onnx_bytes(net, images[0], size is None, metadata(options, upscaler))
        session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        difference = 0.0
        for image in images:
            (sr,) = session.run(None, {"lq": image.numpy()})
            with torch.no_grad():
                difference = max(difference, (torch.from_numpy(sr) - net(image)).abs().max().item())
    except Exception as error:  # exporter and runtime raise all kinds of errors
        raise UserError(f"{options['type']} can't be exported to ONNX ({first_line(error)}){hint}") from error
    if not difference <= TOLERANCE:
        raise UserError(f"{options['type']}: its ONNX results differ by {difference:.1e}, so no file was written{hint}")
    with whole_file(path) as file:
        file.write(content)
    return difference


def _onnx_bytes(net: nn.Module, image: Tensor, dynamic: bool, about: dict[str, str]) -> bytes:
    anything = torch.export.Dim.DYNAMIC
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(
            net,
            (image,),
            input_names=["lq"],
            output_names=["sr"],
            dynamic_shapes=({0: anything, 2: anything, 3: anything},) if dynamic else None,
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # it is one with dynamo
    model = program.model_proto
    for key, value in about.items():
        model.metadata_props.add(key=key, value=value)
    return model.SerializeToString()
