"""Files of tensors: read without running code, written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tlw_basicsr.errors import UserError, first_line


def load_file(path: str | Path, what: str) -> dict[str, Any]:
    """Load a ``torch.save`` file with ``weights_only=True``, on the CPU.

    Args:
        path: the file.
        what: the option that names it, for the message.

    Returns:
        The dict it holds.

    Raises:
        UserError: no such file, damaged, not a dict, or a pickle with more than tensors and plain values in it.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{what}: {path} does not exist") from None
    except IsADirectoryError:
        raise UserError(f"{what}: {path} is a folder, not a file") from None
    except Exception as error:  # torch, zipfile and pickle each raise what they like
        raise UserError(
            f"{what}: {path} is no readable checkpoint: damaged, another kind of file, or with objects in it that "
            f"are not plain tensors and values, which are not loaded ({type(error).__name__})"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"{what}: {path} must hold a dict of tensors, it holds a {type(content).__name__}")
    return content


def save_file(content: dict[str, Any], path: str | Path) -> None:
    """Write ``content`` by ``torch.save``, see :func:`written_whole`."""
    with written_whole(path) as file:
        torch.save(content, file)


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A temporary file beside ``path`` to write to, which is synced and renamed to ``path`` at the end.

    Raises:
        UserError: it can't be written (a full disk, a folder without permission); an earlier file is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} can't be written ({first_line(error)})") from error


def network_state(path: str | Path, param_key: str | None, what: str) -> dict[str, torch.Tensor]:
    """State dict of a network in BasicSR's format ``{'params': …, 'params_ema': …}``, ``module.`` removed.

    Args:
        path: the file.
        param_key: the entry to take; ``'params'`` where it is missing; None for a file that is the state dict.
        what: the option that names the file, for the message.

    Raises:
        UserError: as :func:`load_file`, or no such entry, or it holds something else than named tensors.
    """
    content = load_file(path, what)
    if param_key is not None:
        entry = content.get(param_key, content.get("params"))
        if entry is None:
            keys = ", ".join(map(str, list(content)[:4]))
            raise UserError(f"{what}: {path} has no entry {param_key!r} (BasicSR's format), it starts with {keys}")
        content = entry
    if not isinstance(content, dict) or not all(torch.is_tensor(v) for v in content.values()):
        raise UserError(f"{what}: {path} does not hold a network's tensors under {param_key!r}")
    return {str(name).removeprefix("module."): tensor for name, tensor in content.items()}


def check_fit(state: dict[str, torch.Tensor], net: torch.nn.Module, strict: bool, path: str | Path, what: str) -> None:
    """Raise a :class:`UserError` that names the first difference unless ``state`` fits ``net``.

    With ``strict=False`` names may differ, and so may shapes, as in BasicSR; but one tensor must fit.
    """
    own = net.state_dict()
    missing = [name for name in own if name not in state]
    unknown = [name for name in state if name not in own]
    shapes = [name for name in own if name in state and own[name].shape != state[name].shape]
    name = type(net).__name__
    if not strict:
        if len(missing) + len(shapes) == len(own):
            raise UserError(f"{what}: {path} is of another network, none of its tensors fits {name}")
        return
    if missing or unknown:
        example = f"{missing[0]} is missing" if missing else f"{unknown[0]} is not in {name}"
        raise UserError(
            f"{what}: {path} is of another network than network {name} of the options: {len(missing)} tensors missing,"
            f" {len(unknown)} unknown ({example})"
        )
    if shapes:
        first = shapes[0]
        raise UserError(
            f"{what}: {path} is of another network than network {name} of the options: {first} is "
            f"{tuple(state[first].shape)}, not {tuple(own[first].shape)}"
        )


def write_text(text: str, path: str | Path) -> None:
    """Write a text file as :func:`save_file` writes tensors: whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"{path} can't be written ({first_line(error)})") from error
