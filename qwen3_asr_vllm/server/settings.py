# SPDX-License-Identifier: Apache-2.0
"""Environment variables of a server: one table of their names, ranges, effects and defaults.

Some are vLLM's, with larger defaults: vLLM's own would reject a lecture. The README of this folder
shows the table.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from ..geometry import DEFAULT_CLIP_S, MAX_CLIP_S
from ..languages import VARIABLE, read_languages

DAY_S = 86_400


class Setting(NamedTuple):
    """One variable: a number of the type of ``least``, or a text if it has no range."""

    name: str
    default: int | float | None
    least: int | float | None
    most: int | float | None
    effect: str

    @property
    def range(self) -> str:
        if self.least is None:
            return "a text"
        kind = "a whole number" if isinstance(self.least, int) else "a number"
        return f"{kind}, {self.least:g} to {self.most:.0f}"

    def read(self) -> Any:
        """Return the value, or the default where the variable is not set.

        Raises ValueError that names the variable, its value and its range.
        """
        given = os.environ.get(self.name)
        if self.least is None or self.most is None:
            return given or self.default
        if given is None:
            return self.default
        try:
            number = type(self.least)(given)
        except ValueError:
            number = None
        if number is None or not self.least <= number <= self.most:  # NaN is in no range
            raise ValueError(f"{self.name} is {given!r}; give {self.range}, or unset it.")
        return number


SETTINGS = {
    row[0]: Setting(*row)
    for row in (
        ("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", 1024, 1, 1 << 20, "MiB of one upload; beyond: 413"),
        (
            *("VLLM_MAX_AUDIO_DECODE_DURATION_S", 14_400, 1, 100 * DAY_S),
            "seconds of one recording; beyond: 400",
        ),
        (
            *("VLLM_MAX_AUDIO_PREPROCESS_WORKERS", None, 1, 256),
            "threads that decode audio; by default a few more than the CPU cores",
        ),
        (
            *("QWEN3_ASR_MAX_RECORDINGS", 1024, 1, 1_000_000),
            "recordings and sessions at once; beyond: 503",
        ),
        (
            *("QWEN3_ASR_MAX_AUDIO_S", 57_600.0, 1.0, 1000 * DAY_S),
            "seconds of audio held at once; beyond: 503",
        ),
        (
            *("QWEN3_ASR_MAX_UPLOADS_MB", 8192, 1, 1 << 24),
            "MiB of undecoded uploads held at once, in memory and in TMPDIR; beyond: 503",
        ),
        (
            *("QWEN3_ASR_MAX_CLIP_S", int(DEFAULT_CLIP_S), 1, MAX_CLIP_S),
            "seconds of the longest clip of one engine request",
        ),
        (
            *("QWEN3_ASR_MAX_UTTERANCE_S", 1200.0, 1.0, DAY_S),
            "seconds of the longest utterance of a session",
        ),
        (
            *("QWEN3_ASR_REALTIME_IDLE_S", 300.0, 1.0, DAY_S),
            "seconds without an event that end a session",
        ),
        (VARIABLE, None, None, None, "languages that the checkpoint knows beyond its config"),
        ("QWEN3_ASR_ALIGNER_URL", None, None, None, "address of the aligner's server"),
        ("QWEN3_ASR_ALIGNER_API_KEY", None, None, None, "its API key"),
        ("QWEN3_ASR_DIARIZER_URL", None, None, None, "address of the diarizer's server"),
        ("QWEN3_ASR_KOREAN_DICT", None, None, None, "file of Korean words, one per line"),
    )
}


def setting(name: str) -> Any:
    """Return the value of a variable of the table. Raises ValueError if it is out of range."""
    return SETTINGS[name].read()


def check_settings() -> None:
    """Raise ValueError for the first variable that is out of its range, or names no language."""
    for each in SETTINGS.values():
        each.read()
    read_languages(setting(VARIABLE) or "", VARIABLE)
