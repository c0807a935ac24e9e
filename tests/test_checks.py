# SPDX-License-Identifier: Apache-2.0
"""Arguments of another type or range: the error names the argument and what it must be."""

from __future__ import annotations

import numpy as np
import pytest

from qwen3_asr_vllm.alignment import align
from qwen3_asr_vllm.checks import check_number
from qwen3_asr_vllm.languages import resolve_language
from qwen3_asr_vllm.prompt import join_context
from qwen3_asr_vllm.rounds import Steps

SILENCE = np.zeros(16_000, np.float32)
WRONG = {
    "text is None, of type NoneType; it must be a string": lambda: Steps(align(SILENCE, None)),
    "text is b'Hello', of type bytes": lambda: Steps(align(SILENCE, b"Hello")),
    "language is 5, of type int": lambda: Steps(align(SILENCE, "Hello", language=5)),
    r"language is \['de'\], of type list": lambda: resolve_language(["de"]),
    r"keywords\[1\] is None": lambda: join_context("", ["Anna", None]),
    "keywords is 'Anna', of type str; it must be a list": lambda: join_context("", "Anna"),
    "keywords is 5": lambda: join_context("", 5),
    "context is None": lambda: join_context(None, []),
    "max_clip_s is '60', of type str; it must be a number": lambda: check_number(
        "max_clip_s", "60", 1, 1200
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_types_are_named(message):
    with pytest.raises(TypeError, match=message):
        WRONG[message]()


@pytest.mark.parametrize("text", ["a\udce9", "\ud800"])
def test_half_a_surrogate_pair_is_named(text):
    for name, call in {
        "text": lambda: Steps(align(SILENCE, text)),
        "context": lambda: join_context(text, []),
        r"keywords\[0\]": lambda: join_context("", [text]),
        "language": lambda: resolve_language(text),
    }.items():
        with pytest.raises(ValueError, match=rf"{name} holds '\\ud.* at character {len(text) - 1}"):
            call()


@pytest.mark.parametrize("number", [2**70, float("nan"), float("inf"), 0, -1])
def test_numbers_out_of_range_are_named(number):
    with pytest.raises(ValueError, match="max_clip_s is .*; it must be 1 to 1200"):
        check_number("max_clip_s", number, 1, 1200)
