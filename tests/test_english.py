# SPDX-License-Identifier: Apache-2.0
"""Plain English: no words that only the authors of this package understand."""

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
FOLDERS = ("qwen3_asr_vllm", "tests", "benchmarks")
MAX_WORDS = 8  # of a test's name, which should have seven
FILES = [
    *(ROOT / name for name in ("README.md", "docker/README.md")),
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.py"))),
    *(path for name in FOLDERS for path in sorted((ROOT / name).rglob("*.md"))),
    *sorted((ROOT / "qwen3_asr_vllm").rglob("*.html")),
]
FILES = [path for path in FILES if path != Path(__file__) and path.parent.name != "results"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_in_plain_english(path):
    lines = path.read_text("utf-8").splitlines()
    found = [
        f"{number}: {line.strip()}"
        for number, line in enumerate(lines, 1)
        if FORBIDDEN.search(line) or CLAUSE.search(line)
    ]
    assert found == []


def test_names_of_tests_are_short_claims():
    texts = [path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py"))]
    names = re.findall(r"^ *(?:async )?def test_(\w+)", "\n".join(texts), re.MULTILINE)
    assert len(names) > 900
    assert [name for name in names if len(name.split("_")) > MAX_WORDS] == []
    assert [name for name in names if re.match("(what|who|whoever|where)_", name)] == []


def test_a_forbidden_word_is_found():
    assert FORBIDDEN.search("the client is told why")
    assert FORBIDDEN.search("death_told")
    assert CLAUSE.search('"""What a server takes on."""')
    assert not CLAUSE.search('"""What does a server give under load?"""')
    assert not FORBIDDEN.search("a threshold")
