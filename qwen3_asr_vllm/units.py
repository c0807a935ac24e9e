# SPDX-License-Identifier: Apache-2.0
"""Splits text into aligned units: words, or single characters of Chinese.

    text -> units, each with its position in the text and its spoken form

The units are those that the forced aligner was trained on.
"""

from __future__ import annotations

import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from unicodedata import category, normalize

from .languages import ALIGNER_LANGUAGES, LANGUAGES


class AlignmentError(Exception):
    """The aligner returned no usable times, or cannot align this text."""


def check_language(language: str) -> None:
    """Raise ValueError, with the supported languages, for one that the aligner does not know."""
    if language not in ALIGNER_LANGUAGES:
        known = ", ".join(sorted(f"{LANGUAGES.code(name)} {name}" for name in ALIGNER_LANGUAGES))
        raise ValueError(f"the forced aligner does not know {language}; it times words of: {known}")


def cut_warnings(text: str, language: str | None) -> tuple[str, ...]:
    """Return warnings about how a text is split into words."""
    is_korean = (language or _script_language(text)) == "Korean"
    return (NO_DICTIONARY,) if is_korean and not korean_dictionary() else ()


@dataclass(frozen=True)
class Unit:
    """An aligned unit: its position in the text, and the characters that are spoken."""

    start: int
    end: int
    spoken: str  # letters, digits and apostrophes only


_CJK = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f\U0002b820-\U0002ceaf]"
)


_KANA = re.compile("[\u3041-\u3096\u30a1-\u30fa]")  # without ・ and ー, which Chinese uses too
_HANGUL = re.compile("[\uac00-\ud7a3]")
NO_DICTIONARY = (
    "Korean is split at spaces only, not before endings: there is no dictionary. "
    "pip install --no-deps qwen-asr, or name one with QWEN3_ASR_KOREAN_DICT."
)


_SPECIAL_TOKEN = re.compile(r"<\|[^|]*\|>")
_NOT_SPACE = re.compile(r"\S+")
_PIECE = re.compile(f"{_CJK.pattern}|(?:(?!{_CJK.pattern}).)+", re.DOTALL)


def split_units(text: str, language: str | None = None) -> list[Unit]:
    """Split a text into units, in order.

    Words are separated by spaces, and every Chinese character is a unit. nagisa splits Japanese.
    Korean is split before the endings that follow a word of the dictionary.
    """
    language = language or _script_language(text)
    cut: Callable[[str], Iterator[tuple[int, int]]] = {
        "Japanese": _cut_japanese,
        "Korean": _cut_korean,
    }.get(language or "", _cut_at_spaces)
    normal = partial(normalize, "NFKC" if language == "Japanese" else "NFC")
    spoken = ((start, end, _spoken(normal(text[start:end]))) for start, end in cut(text))
    return [Unit(*unit) for unit in spoken if unit[2]]


def _script_language(text: str) -> str | None:
    """Return the language that the script implies, if it is not split at spaces; else None."""
    return "Japanese" if _KANA.search(text) else "Korean" if _HANGUL.search(text) else None


def units_of(sentences: Sequence[str], language: str | None) -> Iterator[Unit]:
    """Yield the units of consecutive sentences; no unit spans two sentences."""
    if language is None and _KANA.search("".join(sentences)):
        language = "Japanese"  # including sentences without kana
    starts = accumulate(map(len, sentences), initial=0)
    for sentence, offset in zip(sentences, starts, strict=False):
        for unit in split_units(sentence, language):
            yield Unit(offset + unit.start, offset + unit.end, unit.spoken)


def _spoken(text: str) -> str:
    """Return the letters, digits and apostrophes of a text; "" if it has only apostrophes.

    A special token in the text, such as ``<|spk_0|>``, is not spoken.
    """
    words = _SPECIAL_TOKEN.sub("", text)
    spoken = "".join(char for char in words if char == "'" or category(char)[0] in "LN")
    return spoken if spoken.strip("'") else ""


def _cut_at_spaces(text: str) -> Iterator[tuple[int, int]]:
    for word in _NOT_SPACE.finditer(text):
        for piece in _PIECE.finditer(word[0]):
            yield word.start() + piece.start(), word.start() + piece.end()


_CLUSTER = re.compile(".[\u0300-\u036f\u3099\u309a\uff9e\uff9f]*", re.DOTALL)


def _cut_japanese(text: str) -> Iterator[tuple[int, int]]:
    """Yield the words of nagisa, which reads NFKC text: its lengths may differ from ours."""
    try:
        nagisa = import_module("nagisa")
    except ImportError as error:
        raise ImportError(
            "nagisa is needed to split Japanese into words: pip install 'qwen3-asr-vllm[ja]'"
        ) from error
    clusters = [match.span() for match in _CLUSTER.finditer(text)]
    read = list(accumulate(len(normalize("NFKC", text[s:e])) for s, e in clusters))
    ends = [
        clusters[min(bisect_left(read, end), len(clusters) - 1)][1]
        for end in accumulate(map(len, nagisa.wakati(text)))
    ]
    yield from pairwise([0, *ends])


def _cut_korean(text: str) -> Iterator[tuple[int, int]]:
    """Split each word after its longest prefix, of 2 letters or more, in the dictionary.

    Same result as soynlp's LTokenizer with the dictionary of qwen-asr.
    """
    known = korean_dictionary()
    for word in _NOT_SPACE.finditer(text):
        lengths = range(len(word[0]), 1, -1)
        length = next((n for n in lengths if word[0][:n] in known), len(word[0]))
        middle = word.start() + length
        yield word.start(), middle
        if middle < word.end():
            yield middle, word.end()


@cache
def korean_dictionary() -> frozenset[str]:
    """Return the Korean words of the file that QWEN3_ASR_KOREAN_DICT names, one word per line.

    Falls back to the dictionary of the package qwen-asr (``pip install --no-deps qwen-asr``),
    then to an empty set: Korean is then split at spaces only.

    Raises AlignmentError for a file that cannot be read.
    """
    given = os.environ.get("QWEN3_ASR_KOREAN_DICT")
    spec = None if given else find_spec("qwen_asr")
    if spec and spec.origin:
        given = str(Path(spec.origin).parent / "inference/assets/korean_dict_jieba.dict")
    if not given:
        return frozenset()
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise AlignmentError(
            f"Korean cannot be split into words: {given} cannot be read ({error}). Set "
            "QWEN3_ASR_KOREAN_DICT to a UTF-8 file with one word per line, or unset it"
        ) from error
    return frozenset(line.split()[0] for line in lines if line.strip())
