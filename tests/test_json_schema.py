"""The options as a JSON schema: what the check accepts is never refused, and what it refuses mostly is."""

import json

import pytest
from jsonschema import Draft7Validator

from tests.bad_input import JUNK
from tests.conftest import ROOT, control_options, plain_options, set_option, tiny_options
from tests.helpers import EVERY_BASE
from tests.test_options import IN_THE_FILE
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
    for opt in (plain_options(photographs), control_options(photographs, "error")):
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
