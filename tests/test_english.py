# SPDX-License-Identifier: Apache-2.0
"""Plain English: code, messages and READMEs avoid words that only their authors understand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = re.compile(
    r"\b(told|hear[sd]?|nobody|somebody|whoever|wish(es)?|seats?|no more|goes round|lent)\b|"
    r"\b(told|hear[sd]?|wish(es)?|seats?)_|_(told|hear[sd]?|wish(es)?|seats?)\b",
    re.IGNORECASE,
)
CLAUSE = re.compile(
    r'"""(What|Who|Whoever|Those)\b(?![^"\n]*\?)'
)  # a docstring that is no sentence
FILES = [
    *sorted((ROOT / "qwen3_asr_vllm").rglob("*.py")),
    *sorted((ROOT / "qwen3_asr_vllm").rglob("*.html")),
    *sorted((ROOT / "qwen3_asr_vllm").rglob("*.md")),
    *(ROOT / name for name in ("README.md", "docker/README.md", "tests/README.md")),
    *(ROOT / "benchmarks" / name for name in ("README.md", "accuracy.md")),
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_in_plain_english(path):
    lines = path.read_text("utf-8").splitlines()
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if FORBIDDEN.search(line) or CLAUSE.search(line)
    ]
    assert found == []


def test_a_forbidden_word_is_found():
    assert FORBIDDEN.search("the client is told why")
    assert FORBIDDEN.search("death_told")
    assert CLAUSE.search('"""What a server takes on."""')
    assert not CLAUSE.search('"""What does a server give under load?"""')
    assert not FORBIDDEN.search("a threshold")
