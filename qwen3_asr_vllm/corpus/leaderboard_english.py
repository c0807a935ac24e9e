# SPDX-License-Identifier: Apache-2.0
"""English texts as the Open ASR Leaderboard compares them.

Its normaliser began as Whisper's, from which it now differs: it removes more fillers, writes clock
times in one way, keeps "oh" a word outside of digits, joins compounds and the letters of acronyms,
and maps the spellings of a name to one. What both share comes from whisper-normalizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby

from whisper_normalizer.basic import remove_symbols_and_diacritics
from whisper_normalizer.english import EnglishNumberNormalizer, EnglishTextNormalizer

from .leaderboard_words import (
    COMPOUNDS,
    DROPPED_SPELLINGS,
    FILLERS,
    IS_AFTER,
    KEPT_CONTRACTIONS,
    NAMES,
    SPELLINGS,
)

_OH = "oh!"  # "oh" that is no digit; no other word has a mark
_NUMBER_TOKEN = re.compile(r"[-+£€$¢]?\d+(\.\d+)?")

Rules = list[tuple["re.Pattern[str]", str]]


class EnglishNormalizer:
    """Normalise a text: ``normalizer("It's five o'clock, Dr. Jon")`` is "it is 5 doctor john"."""

    def __init__(self) -> None:
        whisper = EnglishTextNormalizer()
        self._numbers = NumberNormalizer()
        self._times = TimeNormalizer(self._numbers)
        self._fillers = re.compile(rf"\b({'|'.join(FILLERS)})\b")
        self._contractions = _contractions(whisper.replacers)
        self._compounds = [(re.compile(rf"\b{p}\b"), word) for p, word in COMPOUNDS.items()]
        spellings = whisper.standardize_spellings.mapping
        self._spellings = {w: s for w, s in spellings.items() if w not in DROPPED_SPELLINGS}
        self._spellings |= SPELLINGS
        self._names = _names()

    def __call__(self, text: str) -> str:
        text = re.sub(r"[<\[][^>\]]*[>\]]", "", text.lower())
        text = re.sub(r"\([^)]+\)", "", text)
        text = self._fillers.sub("", text)
        text = self._times(re.sub(r"\s+'", "'", text))
        text = _replaced(text, self._contractions)
        text = re.sub(r"(\d),(\d)", r"\1\2", text)
        text = re.sub(r"\.(?![0-9])", " ", text)
        text = remove_symbols_and_diacritics(text, keep=".%$¢€£")
        text = self._numbers(_replaced(text, self._compounds))
        words = [self._spellings.get(word, word) for word in text.split()]
        text = " ".join(_joined_letters(self._names.get(word, word) for word in words))
        text = re.sub(r"[.$¢€£](?![0-9])|(?<![0-9])%", " ", text)
        return " ".join(text.split())


def _contractions(whisper: dict[str, str]) -> Rules:
    rules: Rules = []
    for pattern, words in whisper.items():
        if pattern == r"'s\b":
            pattern, words = rf"\b({'|'.join(IS_AFTER.split())})'s\b", r"\1 is"
        if pattern not in {rf"\b{word}\b" for word in KEPT_CONTRACTIONS}:
            rules.append((re.compile(pattern), words))
    return rules


def _names() -> dict[str, str]:
    name_by_spelling, name = {}, ""
    for word in NAMES.split():
        if word.endswith(":"):
            name = word[:-1]
        else:
            name_by_spelling[word] = name
    return name_by_spelling


def _replaced(text: str, rules: Rules) -> str:
    for pattern, words in rules:
        text = pattern.sub(words, text)
    return text


def _joined_letters(words: Iterator[str]) -> Iterator[str]:
    """Join single letters and digits that follow each other; with "a" or "i" from three on."""
    for is_single, run in groupby(words, lambda word: len(word) == 1 and word.isalnum()):
        characters = list(run)
        shortest = 2 if {"a", "i"}.isdisjoint(characters) else 3
        if is_single and len(characters) >= shortest:
            yield "".join(characters)
        else:
            yield from characters


class NumberNormalizer(EnglishNumberNormalizer):
    """Whisper's rules for numbers, but "oh" is a digit only among digits.

    A digit must follow it. Without a number before it, two must: "oh seven nine eight".
    """

    def __init__(self) -> None:
        super().__init__()
        self.suffixers[_OH] = {}  # such a word ends the number before it, and stays
        self.words.add(_OH)
        self.decimals.add(_OH)

    def process_words(self, words: list[str]) -> Iterator[str]:
        for word in super().process_words(self._marked(words)):
            yield word.replace(_OH, "oh")

    def _marked(self, words: list[str]) -> list[str]:
        words = list(words)
        for index, word in enumerate(words):
            if word == "oh" and not self._is_digit_at(words, index):
                words[index] = _OH
        return words

    def _is_digit_at(self, words: list[str], index: int) -> bool:
        if index and words[index - 1] in ("double", "triple"):
            return True
        follows = [self._is_digit(word) for word in words[index + 1 : index + 3]]
        return follows == [True, True] or (follows[:1] == [True] and self._is_number(words[:index]))

    def _is_digit(self, word: str) -> bool:
        named = word in self.zeros or word in self.ones or word in self.tens
        return named or re.fullmatch(r"\d+", word) is not None

    def _is_number(self, words: list[str]) -> bool:
        """Return whether the last of some words belongs to a number that can go on."""
        if words[-1:] == ["and"]:
            return words[-2:-1] != [] and words[-2] in self.multipliers
        last = words[-1] if words else ""
        named = last in self.multipliers or last == "point" or self._is_digit(last)
        return named or _NUMBER_TOKEN.fullmatch(last) is not None


class TimeNormalizer:
    """Write clock times in digits: "half past two" is "2:30", "five o'clock" and "5:00" are "5"."""

    def __init__(self, numbers: NumberNormalizer) -> None:
        self._numbers = numbers
        small = "|".join(numbers.ones)
        digit = "|".join(word for word, value in numbers.ones.items() if value < 10)
        tens = rf"(?:twenty|thirty|forty|fifty)(?:[\s-]+(?:{digit}))?"
        number = rf"(?:[0-9]{{1,2}}|{tens}|{small}|zero)"
        clock = r"o\s*['’]?\s*clock"
        self._relative = re.compile(
            rf"(?<![\w.:])(half|(?:a\s+)?quarter|{number}\s+minutes?)\s+(past|after|to|before)\s+"
            rf"({number})(?:\s+{clock})?\b"
        )
        self._full_hour = re.compile(rf"(?<![\w.:])({number})\s+{clock}\b")
        self._digits = re.compile(
            r"(?<![\w:./])([01]?[0-9]|2[0-3]):([0-5][0-9])(?![\w:]|\.[0-9])",
        )

    def __call__(self, text: str) -> str:
        text = self._relative.sub(self._write_relative, text)
        text = self._full_hour.sub(self._write_full_hour, text)
        return self._digits.sub(_write_digits, text)

    def _write_relative(self, match: re.Match[str]) -> str:
        amount, relation, hour = match[1], match[2], self._value(match[3])
        if amount == "half":
            minute = 30
        else:
            minute = 15 if amount.endswith("quarter") else self._value(amount.split("minute")[0])
        if hour > 23 or minute > 59:
            return match[0]
        if relation in ("to", "before") and minute:
            hour = (hour - 2) % 12 + 1 if 1 <= hour <= 12 else (hour - 1) % 24
            minute = 60 - minute
        return f"{hour}:{minute:02d}"

    def _write_full_hour(self, match: re.Match[str]) -> str:
        hour = self._value(match[1])
        return f"{hour}:00" if hour <= 23 else match[0]

    def _value(self, number: str) -> int:
        digits = self._numbers(number.replace("-", " ")).strip()
        return 1 if digits == "one" else int(digits)


def _write_digits(match: re.Match[str]) -> str:
    hour, minute = int(match[1]), int(match[2])
    return f"{hour}:{minute:02d}" if minute else str(hour)
