# SPDX-License-Identifier: Apache-2.0
"""How one clip is decoded, and when an answer is not to be trusted.

    decode greedily, within a budget    -- loops? -->  both halves of the clip
    a half                              -- loops? -->  again, with a repetition penalty
    again                               -- loops? -->  keep three copies, and say so

vLLM stops an answer whose last tokens repeat; nothing here runs an engine. What is decided are
plain numbers and text. An answer that only says the context back is a leak, and is dropped.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from .languages import display_width
from .prompt import ASR_TEXT, header_end
from .transcript import Token

DEFAULT_CLIP_S = 60.0  # seconds; with cuts in the second half, clips last 30 to 60 s

# vLLM looks for a run of a pattern of tokens at the end of every answer, at every token: 0.5 us
# for each size of pattern. Longer patterns run into the budget, where the text shows them.
LOOP_MAX_PATTERN = 16  # tokens
LOOP_MIN_COUNT = 12  # copies; nobody says a word twelve times in a row, or the retry shows it
LOOP_PENALTY = 1.1  # repetition penalty of the last attempt: mild, for it costs accuracy

_BASE_TOKENS = 64  # the header, and room for a word in a very short clip
_TOKENS_PER_S = 25  # fast Chinese needs about 8, the costliest scripts about 20

_KEPT_COPIES = 3  # of a repeated run at the end of an answer that loops
_LONGEST_PERIOD = 400  # characters
_SUFFIX = 3  # characters; what repeats in a run of four copies, whatever its period

_LEAKED_ITEMS = 3  # in a row; a speaker may well say one keyword, or two
_LEAKED_WIDTH = 30  # columns of a context of one or two items that is said back whole


@dataclass(frozen=True)
class Decoding:
    """How the engine decodes one clip, as plain data.

    ``slot_names``: languages, and "None" for no speech, whose probability is wanted where the
    model names the language. ``wants_logprobs``: that of every token is wanted.
    """

    max_tokens: int
    repetition_penalty: float = 1.0
    wants_logprobs: bool = False
    slot_names: tuple[str, ...] = ()


def max_new_tokens(clip_s: float) -> int:
    """The most text tokens that ``clip_s`` seconds of speech can need.

    Far above real speech, far below the model's context: what no other guard stops ends here, and
    reaching the budget (``finish_reason == "length"``) means that text may be missing or repeated.
    """
    return _BASE_TOKENS + math.ceil(_TOKENS_PER_S * clip_s)


# loops --------------------------------------------------------------------------------------


def is_loop(text: str, finish_reason: str | None) -> bool:
    """Whether an answer went round in circles until something stopped it."""
    if finish_reason == "length":  # a long pattern that the engine did not look for
        return settled_length(text) < len(text) / 2
    return finish_reason == "repetition"


def settled_length(text: str) -> int:
    """How much of a growing text stays, should it turn out to end in a loop.

    All of it, unless it ends in a run of more than three copies, of which three stay, and the rest
    of a word. If the text loops, this is what remains of it, and it was never more before.
    """
    kept = min((_kept(text, period) for period in _periods(text)), default=len(text))
    return len(text[:kept].rstrip())


def _periods(text: str) -> Iterator[int]:
    """Periods of the runs of more than three copies that the text ends in."""
    if len(text) <= _SUFFIX:
        return
    suffix, last = text[-_SUFFIX:], len(text) - _SUFFIX
    at = last
    while (at := text.rfind(suffix, max(0, last - _LONGEST_PERIOD), at + _SUFFIX - 1)) >= 0:
        period = last - at
        tail = text[-_KEPT_COPIES * period - 1 :]
        if len(tail) > _KEPT_COPIES * period and tail[period:] == tail[:-period]:
            yield period


def _kept(text: str, period: int) -> int:
    """Where the third copy ends of the run of this period that the text ends in, or its word."""
    start = len(text) - _KEPT_COPIES * period - 1
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    to_the_end_of_a_word = max(0, text[start : start + period].find(" "))
    return min(len(text), start + _KEPT_COPIES * period + to_the_end_of_a_word)


# leaks --------------------------------------------------------------------------------------

_ITEM_END = re.compile(r"[,;\n，、；]")


def is_leak(text: str, context: str) -> bool:
    """Whether a text is nothing but the context said back: the model does so in noise.

    At least three items of a list in a row, or all of a context that is long enough.
    """
    words, items = _words(text), _items(context)
    for start in range(len(items)):
        for end in range(start + 1, len(items) + 1):
            said = " ".join(items[start:end])
            if said == words:
                return end - start >= _LEAKED_ITEMS or (
                    end - start == len(items) and display_width(said) >= _LEAKED_WIDTH
                )
            if len(said) > len(words):
                break
    return False


def may_leak(text: str, context: str) -> bool:
    """Whether a text that still grows has been nothing but context so far."""
    return bool(context) and f" {_words(text)}" in f" {_words(context)}"


def _items(context: str) -> list[str]:
    return [item for item in map(_words, _ITEM_END.split(context)) if item]


def _words(text: str) -> str:
    """In small letters, without punctuation."""
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())


# confidence ---------------------------------------------------------------------------------


def place_tokens(
    tokens: Sequence[Token], text: str, *, language: str | None = None
) -> list[tuple[int, Token]]:
    """Which tokens of an answer wrote its text, each with the index in it where it begins.

    ``language`` is the forced one: such an answer has no header.
    """
    header = header_end("".join(token.text for token in tokens), language=language)
    placed: list[tuple[int, Token]] = []
    read = at = 0  # characters of the answer, characters of the text
    for token in tokens:
        read += len(token.text)
        if read <= header or token.text == ASR_TEXT:
            continue
        start = at
        for char in token.text:
            at += text.startswith(" " + char, at)  # a seam, which no token wrote
            at += text.startswith(char, at)
        if at > start or (not token.text and at < len(text)):  # the latter: part of a character
            placed.append((start, token))
    return placed


def language_probability(tokens: Sequence[Token]) -> float | None:
    """Probability of the language that opens an answer; None where it has no header."""
    name: list[Token] = []
    read = ""
    for token in tokens:
        if token.text == ASR_TEXT:
            return math.exp(sum(t.logprob for t in name)) if name else None
        if read.strip() == "language":
            name.append(token)
        else:
            read += token.text
    return None


def mean_logprob(tokens: Sequence[Token]) -> float | None:
    """In nats per token; None of no tokens."""
    return fmean(token.logprob for token in tokens) if tokens else None
