# SPDX-License-Identifier: Apache-2.0
"""Decoding policy of one clip: token budget, repetition loops, prompt leaks, confidence.

    decode greedily, within a budget    -- loops? -->  decode both halves of the clip
    decode a half                       -- loops? -->  decode it again with a repetition penalty
    decode again                        -- loops? -->  keep three copies and warn

vLLM stops an output whose last tokens repeat; nothing here runs an engine. An output that only
repeats the context is a prompt leak and is discarded.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING
from unicodedata import category

from .languages import display_width
from .prompt import ASR_TEXT, PUBLISHED, TextProtocol, header_end
from .transcript import Token

if TYPE_CHECKING:
    from .options import Beams

# vLLM looks for a repeated pattern at the end of the output, at every token and on the engine's
# thread: 0.5 us per size of pattern. Longer patterns reach the token budget, and are found in the
# text.
LOOP_MAX_PATTERN = 16  # tokens of the longest pattern that vLLM looks for
LOOP_MIN_COUNT = 12  # copies that make a loop; speech rarely repeats a word that often
LOOP_PENALTY = 1.1  # repetition penalty of the last attempt: mild, because it costs accuracy

_BASE_TOKENS = 64  # tokens for the header, and for a word in a very short clip
_TOKENS_PER_S = 25
_SPOKEN_TOKENS_PER_S = 20  # at most: fast Chinese needs about 8, the costliest scripts about 20

_KEPT_COPIES = 3  # copies that are kept of a repeated run
_LONGEST_PERIOD = 400  # characters of the longest run that is looked for
_SUFFIX = 3  # characters; a run of four copies repeats this suffix, whatever its period

_LEAKED_ITEMS = 3  # consecutive context items that make a leak; one or two may be real speech
_LEAKED_WIDTH = 30  # columns of a short context that count as a leak when it is repeated whole


@dataclass(frozen=True)
class Decoding:
    """Decoding options of one clip, as plain data.

    ``scored_languages``: languages, and "None" for no speech, whose log-probability is requested
    at the token that names the language. ``wants_logprobs``: request it for every token.
    ``beams``: search with these; None decodes greedily, or samples as the user asks.
    ``special_tokens`` may stand before the header.
    """

    max_tokens: int
    repetition_penalty: float = 1.0
    wants_logprobs: bool = False
    scored_languages: tuple[str, ...] = ()
    beams: Beams | None = None
    special_tokens: tuple[str, ...] = ()


def max_new_tokens(clip_s: float) -> int:
    """Return the token budget of a clip of ``clip_s`` seconds.

    It lies far above real speech and far below the model's context. An output that reaches it
    (``finish_reason == "length"``) may be incomplete or repeated.
    """
    return _BASE_TOKENS + math.ceil(_TOKENS_PER_S * clip_s)


# loops --------------------------------------------------------------------------------------


def min_loop_pattern(max_tokens: int) -> int:
    """Return the shortest pattern that vLLM has to look for within a token budget.

    A loop of 1 to 8 tokens is a loop of 9 to 16, too. If any speech leaves a budget room for 12
    copies of 16 tokens, looking for those finds each loop, and costs nothing before token 108.
    """
    spoken = (max_tokens - _BASE_TOKENS) * _SPOKEN_TOKENS_PER_S / _TOKENS_PER_S
    has_room = max_tokens - spoken >= LOOP_MAX_PATTERN * LOOP_MIN_COUNT
    return LOOP_MAX_PATTERN // 2 + 1 if has_room else 1


def is_loop(text: str, finish_reason: str | None) -> bool:
    """Return whether an output ended in a repetition loop."""
    if finish_reason == "length":  # a pattern longer than the engine looks for
        return settled_length(text) < len(text) / 2
    return finish_reason == "repetition"


def is_token_loop(tokens: Sequence[int]) -> bool:
    """Return whether the last tokens repeat, as vLLM's ``repetition_detection`` finds it."""
    for size in range(1, LOOP_MAX_PATTERN + 1):
        tail = tokens[-LOOP_MIN_COUNT * size :]
        if len(tail) == LOOP_MIN_COUNT * size and tail[size:] == tail[:-size]:
            return True
    return False


def settled_length(text: str) -> int:
    """Return the length of the text that stays even if the text turns out to loop.

    A run of more than three copies at the end is shortened to three copies, up to the end of a
    word. The result never shrinks while the text grows.
    """
    kept = min((_kept(text, period) for period in _periods(text)), default=len(text))
    return len(text[:kept].rstrip())


def _periods(text: str) -> Iterator[int]:
    """Yield the periods of all runs of more than three copies at the end of the text."""
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
    """Return the end of the third copy of the run of this period, extended to the end of a word."""
    start = len(text) - _KEPT_COPIES * period - 1
    while start > 0 and text[start - 1] == text[start - 1 + period]:
        start -= 1
    to_the_end_of_a_word = max(0, text[start : start + period].find(" "))
    return min(len(text), start + _KEPT_COPIES * period + to_the_end_of_a_word)


# leaks --------------------------------------------------------------------------------------

_ITEM_END = re.compile(r"[,;\n，、；]")


def is_leak(text: str, context: str) -> bool:
    """Return whether a text only repeats the context, as the model does in noise.

    That is at least three consecutive items of a list, or the whole of a context of 30 columns.
    """
    words, items = _words(text), _items(context)
    for start in range(len(items)):
        for end in range(start + 1, len(items) + 1):
            repeated = " ".join(items[start:end])
            if repeated == words:
                return end - start >= _LEAKED_ITEMS or (
                    end - start == len(items) and display_width(repeated) >= _LEAKED_WIDTH
                )
            if len(repeated) > len(words):
                break
    return False


def may_leak(text: str, context: str) -> bool:
    """Return whether a growing text has only repeated the context so far."""
    return bool(context) and f" {_words(text)}" in f" {_words(context)}"


def _items(context: str) -> list[str]:
    return [item for item in map(_words, _ITEM_END.split(context)) if item]


def _words(text: str) -> str:
    """Return the text in lower case, without punctuation."""
    return " ".join(re.sub(r"[\W_]+", " ", text.casefold()).split())


# confidence ---------------------------------------------------------------------------------


def place_tokens(
    tokens: Sequence[Token],
    text: str,
    *,
    language: str | None = None,
    protocol: TextProtocol = PUBLISHED,
) -> list[tuple[int, Token]]:
    """Return the tokens that wrote the text, each with the index of its first character.

    ``language`` is the forced language: such an output has no header.
    """
    raw = "".join(token.text for token in tokens)
    header = header_end(raw, language=language, protocol=protocol)
    no_text = {ASR_TEXT, *protocol.removed_tokens}
    placed: list[tuple[int, Token]] = []
    read = at = 0  # characters read of the output and of the text
    for token in tokens:
        read += len(token.text)
        is_header = read < header or (read == header and token.text)
        if is_header or token.text in no_text:
            continue
        start = at
        for char in token.text:
            at += text.startswith(" " + char, at)  # a joining space, which no token wrote
            at += text.startswith(char, at)
        if at > start or (not token.text and at < len(text)):  # the latter: part of a character
            placed.append((start, token))
    return placed


def language_probability(
    tokens: Sequence[Token], protocol: TextProtocol = PUBLISHED
) -> float | None:
    """Return the probability of the language in the header; None without a header."""
    name: list[Token] = []
    read = ""
    for token in tokens:
        if token.text in protocol.special_tokens:
            continue
        if token.text == ASR_TEXT:
            return math.exp(sum(t.logprob for t in name)) if name else None
        if read.strip() == "language":
            name.append(token)
        else:
            read += token.text
    return None


def likeliest_language(candidates: Sequence[str], language_logprobs: Mapping[str, float]) -> str:
    """Return the likeliest candidate, by the log-probability of the first token of its name."""
    return max(candidates, key=lambda name: language_logprobs.get(name, -math.inf))


def mean_logprob(tokens: Sequence[Token]) -> float | None:
    """Return the mean log-probability in nats per token; None without tokens."""
    return fmean(token.logprob for token in tokens) if tokens else None


_END_MARK = re.compile(
    "(?<![.])[.!?؟۔।。！？｡][\"'”’»)\\]）」』】》〉]*$"
)  # "..." ends no sentence
_WITHOUT_END_MARKS = {"Thai"}


def completeness(text: str, tokens: Sequence[Token], languages: Sequence[str] = ()) -> float:
    """Return the probability that a text is complete: that of the mark that ends its sentence.

    Without such a mark it is the probability that the model gave to any token but the end.
    ``tokens`` are those of the output, with its end token; without them, or in a language
    without such marks, the mark alone decides, or nothing does (0.5).
    """
    mark = _END_MARK.search(text)
    if not mark and set(languages) & _WITHOUT_END_MARKS:
        return 0.5 if text else 0.0
    if not text or not tokens:
        return float(bool(mark))
    if not mark:
        return 1 - math.exp(tokens[-1].logprob)
    marks = (token for token in reversed(tokens) if mark[0][0] in token.text)
    return math.exp(next(marks, tokens[-1]).logprob)


def word_probabilities(
    words: Sequence[str], placed: Sequence[tuple[int, Token]], start: int = 0
) -> Iterator[float | None]:
    """Yield the geometric mean of the probabilities of each word's tokens; None without tokens.

    ``words`` are adjacent, the first at index ``start`` of the text of ``place_tokens``. A token
    that spans several words counts for each. Punctuation counts only in a word of nothing else.
    """
    tokens_at: dict[int, list[Token]] = {}
    for begin, token in placed:
        tokens_at.setdefault(begin, []).append(token)
    begins = list(tokens_at)
    for word in words:
        places = range(start, start + len(word))
        spoken = [i for i in places if _is_spoken(word[i - start])]
        owners = {begins[bisect_right(begins, i) - 1] for i in spoken or places if begins}
        logprob = mean_logprob([token for begin in owners for token in tokens_at[begin]])
        yield None if logprob is None else math.exp(logprob)
        start += len(word)


def _is_spoken(char: str) -> bool:
    return category(char)[0] in "LMN"  # letters, marks, numbers
