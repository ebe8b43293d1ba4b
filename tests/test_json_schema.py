"""Kinds of options, read from signatures, and the options as a JSON schema: what the check accepts is never refused, and what it refuses mostly is."""

import inspect
import json
from typing import Annotated, Literal

import pytest
from jsonschema import Draft7Validator

from tests.bad_input import JUNK
from tests.conftest import ROOT, control_options, plain_options, set_option, tiny_options
from tests.helpers import EVERY_BASE
from tests.test_options import IN_THE_FILE
from tlw_basicsr.core.arguments import BOOL, FRACTION, POSITIVE, one_of, or_none, whole
from tlw_basicsr.engine import schema
from tlw_basicsr.engine.json_schema import write_schema
from tlw_basicsr.engine.options import check_options
from tlw_basicsr.losses.tlw_loss import describe_options
from tlw_basicsr.tools.recipes import FILES, recipe
from tlw_basicsr.util.kinds import ANY, describe_parameters
from tlw_basicsr.util.yaml_options import load_yaml


@pytest.fixture(scope="module")
def validator():
    text = json.dumps(write_schema())
    Draft7Validator.check_schema(json.loads(text))
    return Draft7Validator(json.loads(text))


def test_our_yaml_files_are_right_and_name_the_schema(validator):
    for name in (*FILES, "RCAN_L1Uncertainty_x3", "EDSR_L1Error_x2", "test_HAT_L1_x4"):
        text = recipe(name)
        assert text.splitlines()[0] == "# yaml-language-server: $schema=tlw.schema.json"
        assert not [error.message for error in validator.iter_errors(load_yaml(text, name))], name
    assert len(FILES) == len([*ROOT.glob("options/**/*.yml")]) == 12


@pytest.mark.parametrize("base", EVERY_BASE)
def test_options_of_every_base_model_are_right(validator, photographs, base):
    opt = tiny_options(photographs, base_model=base, **EVERY_BASE[base])
    assert not [error.message for error in validator.iter_errors(opt)]


def test_options_without_tlw_and_of_plugins_are_right(validator, photographs):
    scaled = plain_options(photographs, datasets__train__scale=2, datasets__val__phase="val")
    check_options(scaled, is_train=True)
    for opt in (plain_options(photographs), control_options(photographs, "error"), scaled):
        assert validator.is_valid(opt)
    theirs = tiny_options(photographs, network_g__res_scale="1")  # BasicSR's annotations and defaults bind nobody
    check_options(theirs, is_train=True)
    assert validator.is_valid(theirs)
    changes = {"model_type": "TheirModel", "network_g": {"type": "Theirs", "a": 1}, "train__pixel_opt": {"type": "B"}}
    assert validator.is_valid(tiny_options(photographs, plugins=["theirs"], **changes))
    assert not validator.is_valid(tiny_options(photographs, **changes))


@pytest.mark.parametrize(("place", "value", "_"), IN_THE_FILE)
def test_what_is_wrong_is_refused_by_the_schema_too(validator, photographs, place, value, _):
    opt = tiny_options(photographs)
    set_option(opt, place, value)
    assert not validator.is_valid(opt)


SECTIONS = [
    schema.TopOptions, schema.LoaderOptions, schema.BicubicSROptions, schema.BasicSROptions, schema.TrainOptions,
    schema.UncertaintyOptions, schema.ValOptions, schema.LoggerOptions, schema.DistOptions,
]  # fmt: skip
OPTIONS = {name: option for call in SECTIONS for name, option in describe_parameters(call).items()} | describe_options()
VALUES = [*JUNK, 1, 2, 64, 0.3, 1e-4, 5e3, "auto", "{}x4", "bf16", "iter", "cpu", "economy", False, ["a"], ["a", "b"]]


@pytest.mark.parametrize("name", OPTIONS)
def test_the_schema_of_an_option_accepts_what_its_kind_accepts(name):
    kind = OPTIONS[name].kind
    assert kind.schema or kind is ANY, "a kind says what of it a JSON schema can say"
    validator = Draft7Validator({**kind.schema})
    values = [value for value in VALUES if not isinstance(value, bytes)]
    accepted = [value for value in values if kind.accepts(value)]
    assert all(map(validator.is_valid, accepted))
    assert kind is ANY or sum(map(validator.is_valid, values)) < len(values)


def part(
    k_start: Annotated[float, FRACTION, "k at the start"] = 0.3,
    chunk: Annotated[int | None, or_none(whole(1))] = None,
    base: Literal["l1", "mse"] = "l1",
    bare: int = 1,
    *,
    needed: bool,
    **others,
): ...


KINDS = [
    # kind, what it accepts, what it does not
    (whole(1), [1, 10**6], [0, True, 1.0, "1", None]),
    (whole(0, 4), [0, 4], [5, -1]),
    (one_of(False, "bf16"), [False, "bf16"], [0, True, "fp16", None]),
    (or_none(POSITIVE), [None, 1e-9], [0, "~"]),
    (FRACTION, [0.5], [0, 1, float("nan"), True]),
    (BOOL, [True, False], [0, 1, "true", None]),
]


@pytest.mark.parametrize(("kind", "right", "wrong"), KINDS)
def test_a_kind_accepts_what_its_text_says(kind, right, wrong):
    assert all(kind.accepts(value) for value in right)
    assert not any(kind.accepts(value) for value in wrong), kind.text


def test_a_signature_tells_kind_meaning_and_default():
    options = describe_parameters(part)
    assert list(options) == ["k_start", "chunk", "base", "bare", "needed"]
    assert options["k_start"] == (FRACTION, "k at the start", 0.3)
    assert options["chunk"].kind.text == "a whole number of at least 1, or ~" and options["chunk"].meaning == ""
    assert options["base"].kind.accepts("mse") and not options["base"].kind.accepts("l2")
    assert not options["bare"].kind.accepts(1.5)
    assert options["needed"] == (BOOL, "", inspect.Parameter.empty)
