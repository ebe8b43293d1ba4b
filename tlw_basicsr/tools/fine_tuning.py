"""A training that fine-tunes the network of a file, written as a YAML."""

from pathlib import Path

from tlw_basicsr.networks import describe_model, of_file
from tlw_basicsr.tools.recipes import change, recipe
from tlw_basicsr.util.errors import UserError, short
from tlw_basicsr.util.kinds import FOLDER_NAME


def fine_tuning(file: Path, name: str | None = None) -> str:
    """Return the YAML text of a training that fine-tunes the network of a file, at a small learning rate.

    Args:
        file: The file, see :func:`tlw_basicsr.networks.read_model`.
        name: Name of the experiment; None for the file's with ``_TLW``.
    """
    facts = describe_model(file)
    scale, channels = facts["upscale"], (facts["num_in_ch"], facts["num_out_ch"])
    if channels != (3, 3):
        raise UserError(f"--model: {file} takes {channels[0]} and gives {channels[1]} channels; expected 3, RGB")
    multiple = facts["window_size"]
    side = max(-(-48 // multiple) * multiple, facts["smallest_side"])
    name = name if name is not None else f"{file.stem}_TLW"
    if not FOLDER_NAME.accepts(name):
        raise UserError(f"--name: expected {FOLDER_NAME.text}, got {short(name)}")
    changes = {
        "name": name,
        "scale": scale,
        "datasets": {"train": {"gt_size": side * scale}},
        "network_g": of_file(file),
        "path": dict.fromkeys(("pretrain_network_g", "param_key_g", "strict_load_g")),
        "val": {"metrics": {metric: {"crop_border": scale} for metric in ("psnr", "ssim")}},
    }
    if scale == 1:  # what the network restores is not made by bicubic
        for key in ("train", "val"):
            changes["datasets"].setdefault(key, {}).update(
                type="PairedImageDataset", dataroot_lq=f"datasets/{key}/LQ", dataroot_gt=f"datasets/{key}/GT"
            )
    text = change(recipe("recipe_EDSR_finetune_x4"), changes)
    first = text.partition("\n")[0]  # the line by which editors find the schema
    title = f"# {facts['architecture']} ×{scale} of {file.name}, fine-tuned with L1 and Trainable Loss Weights (TLW)."
    return f"{first}\n{title}\n{text[text.index('# Data:') :]}"
