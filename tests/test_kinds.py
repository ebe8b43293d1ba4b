"""Kinds of options, and how they are read from signatures."""

import inspect
from typing import Annotated, Literal

import pytest

from tlw_basicsr.util.kinds import (
    BOOL,
    FRACTION,
    POSITIVE,
    describe_parameters,
    one_of,
    or_none,
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
