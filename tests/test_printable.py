# SPDX-License-Identifier: Apache-2.0
"""Names from outside in logs and on terminals."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a.wav", "a.wav"),
        ("Zürich 東京 مرحبا 👩‍👧.flac", "Zürich 東京 مرحبا 👩‍👧.flac"),
        ("\x1b[2J\x1b]0;owned\x07", r"\x1b[2J\x1b]0;owned\x07"),
        ("\x9b31mred", r"\x9b31mred"),  # an escape sequence of C1
        ("a\r\nlevel=ERROR b\x85c\u2028d\u2029e", r"a\r\nlevel=ERROR b\x85c\u2028d\u2029e"),
        ("invoice\u202egpj.exe", r"invoice\u202egpj.exe"),
        ("\u2066a\u2069\u200f\u061c\ufeff", r"\u2066a\u2069\u200f\u061c\ufeff"),
        ("\udcff.wav", r"\udcff.wav"),  # a name that is not UTF-8
        ("x" * 1000, "x" * 197 + "..."),
    ],
)
def test_controls_are_escaped_and_letters_stay(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_nothing_printed_controls_a_terminal(text):
    shown = printable(text)
    assert not {unicodedata.category(char) for char in shown} & {"Cc", "Cs", "Zl", "Zp"}
    assert len(shown.splitlines()) <= 1
