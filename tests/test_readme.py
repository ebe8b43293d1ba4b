"""The README's YAML is YAML, and its options exist."""

import re

import pytest

from tests.conftest import ROOT, control_options, plain_options, tiny_options
from tests.models.test_base_models import GAN
from tlw_basicsr.models.tlw_model import PRESETS, TLWOptions
from tlw_basicsr.options import TLW, TRAIN, check_options, load_yaml

README = (ROOT / "README.md").read_text("utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)


def update(target, source):
    for key, value in source.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict) and "type" not in value:
            update(target[key], value)
        else:
            target[key] = value


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: b.splitlines()[0][:40])
def test_the_options_of_every_example_exist(photographs, block):
    example = load_yaml(block, "README.md")
    if "plugins" in example:
        assert example["plugins"] == ["hat.archs", "hat.models"]  # the HAT plugin's modules, not installed here
        return
    opt = tiny_options(photographs)
    if example.get("base_model") == "ESRGANModel":
        opt = tiny_options(photographs, **GAN)
    if example.get("model_type") == "UncertaintyModel":
        opt = plain_options(photographs)
    if "weights" in example.get("train", {}).get("pixel_opt", {}):
        opt = control_options(photographs, "random")
    update(opt, example)
    check_options(opt, True)


def test_every_option_of_tlw_is_in_the_readme():
    assert len(BLOCKS) >= 4
    for name in TLW:
        assert name in TLWOptions.__dataclass_fields__
        assert f"`{name}`" in README or f"train.tlw.{name}" in README, name
    for name in ("use_amp", "use_channels_last", "use_compile", "use_tf32", "accumulation_steps", "clip_grad_norm"):
        assert name in TRAIN and name in README
    assert set(TLW) == set(TLWOptions.__dataclass_fields__)
    assert all(set(values) <= set(TLW) for values in PRESETS.values())


def test_every_file_that_the_readme_names_exists():
    for path in set(re.findall(r"(?:scripts|options|tlw_basicsr)/[\w/.]+\.(?:py|sh|yml)", README)):
        assert (ROOT / path).is_file(), path
