"""Kinds of options, and how they are read from signatures."""

import inspect
from typing import Annotated, Literal

import pytest

from tests.helpers import refused
from tlw_basicsr.util.errors import UserError
from tlw_basicsr.util.kinds import (
    BOOL,
    FRACTION,
    POSITIVE,
    check_section,
    describe_parameters,
    one_of,
    or_none,
    suggestion,
    whole,
)


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


def test_a_section_is_checked_in_one_line():
    schema = {"k_start": FRACTION, "k_end": FRACTION}
    check_section({"k_start": 0.1, "other": 1}, "train", schema, strict=False)
    with pytest.raises(UserError, match=r"^train\.k_ned: unknown option \(did you mean k_end\?\)"):
        check_section({"k_ned": 0.1}, "train", schema, required=["k_end"], strict=False)
    for section, message in (
        ({"k_strat": 0.1}, r"train\.tlw\.k_strat: unknown option \(did you mean k_start\?\); accepted are k_end, k_st"),
        ({"k_start": 2}, r"train\.tlw\.k_start: expected a number in \(0, 1\), got 2"),
        ([], r"train\.tlw: expected a section"),
    ):
        refused(message, check_section, section, "train.tlw", schema)
    refused(r"^k_end: missing; expected a number", check_section, {}, "", schema, required=["k_end"])
    assert suggestion("zzz", ["k_start"]) == ""
