"""Files: damage anywhere is found, no code runs, what torch saves is read, and nothing is half written."""

import errno
import io
import os
import re
from collections import Counter, OrderedDict

import pytest
import torch

from tests.helpers import refused, same
from tlw_basicsr import UserError
from tlw_basicsr.util import files
from tlw_basicsr.util.files import load_file, remove_leftovers, save_file, temporary_name

CONTENT = {
    "params": OrderedDict(a=torch.rand(3, 4), b=torch.nn.Parameter(torch.rand(2, 2)), c=torch.tensor(3)),
    "half": [torch.rand(2).half(), torch.rand(2).bfloat16(), torch.rand(2).double(), torch.zeros(2, dtype=torch.uint8)],
    "view": torch.arange(12.0).view(3, 4)[:, 1],
    "values": (1, 2.5, None, True, "text", b"bytes", {1: [2]}),
    "milestones": Counter([1, 2, 2]),
    "size": torch.Size([1, 2]),
}


def save(content, **options):
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


@pytest.mark.parametrize("old", [False, True])
def test_what_torch_saves_of_plain_values_is_read(tmp_path, old):
    (tmp_path / "a.pth").write_bytes(save(CONTENT, _use_new_zipfile_serialization=not old))
    assert same(load_file(tmp_path / "a.pth", "it"), CONTENT)


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "a.pth").write_bytes(save(CONTENT))
    finally:
        torch.serialization.set_crc32_options(True)
    assert same(load_file(tmp_path / "a.pth", "it"), CONTENT)


def test_a_flipped_bit_anywhere_is_found_or_changes_nothing(tmp_path):
    """In every byte of the file: members, headers, the padding between them, the directory and its end."""
    content = {"params": {"a": torch.rand(3, 4), "b": torch.tensor(3)}}
    path, whole = tmp_path / "a.pth", save(content)
    found = 0
    for place in range(len(whole)):
        try:
            assert same(load_flipped(path, whole, place, (place * 5 + place // 64) % 8), content), place
        except UserError as error:
            assert "\n" not in str(error)
            found += 1
    assert found > len(whole) / 3  # the rest is padding


def test_a_tensor_that_looks_like_a_folder_is_found(tmp_path):
    """The directory has no checksum: by this bit torch takes a tensor for a folder, and gives memory as it lies."""
    whole = save({"a": torch.rand(3)})
    for start in [match.start() for match in re.finditer(b"PK\x01\x02", whole)]:
        refused("is damaged", load_flipped, tmp_path / "a.pth", whole, start + 38, 4)


def load_flipped(path, whole, place, bit):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << bit
    path.write_bytes(damaged)
    return load_file(path, "it")


def test_no_space_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_file({"a": torch.zeros(3)}, path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    refused(r"a\.pth can't be written \(No space left on device\)", save_file, {"a": torch.ones(3)}, path)
    assert torch.equal(load_file(path, "")["a"], torch.zeros(3))
    assert [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_only_what_a_kill_has_left_is_removed(tmp_path):
    names = [temporary_name(tmp_path / "a.pth").name for _ in range(99)]
    assert len(set(names)) == 99  # no two processes write to one
    own = [".mine.tmp", ".vimrc.12345.tmp", "a.deadbeef.tmp", ".deadbeef.tmp"]
    for name in [names[0], *own]:
        (tmp_path / name).touch()
    temporary_name(tmp_path / "folder").mkdir()
    remove_leftovers(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(own)
