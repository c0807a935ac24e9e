# SPDX-License-Identifier: Apache-2.0
"""The text protocol: prompts of the model, and the parsing of its outputs.

    <|im_start|>system            context, or an empty turn
    <|im_start|>user              <|audio_start|><|audio_pad|><|audio_end|>
    <|im_start|>assistant         language English<asr_text>Hello.

The part before ``<asr_text>`` is the header. The model writes it, or, where the language
is forced, the prompt does. An answer may lack its header or tag, end the header with a
newline, or repeat it; none of that costs text. Strings in and out: of a tokenizer, only the list of
tokens is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import regex

from .checks import check_string, check_strings
from .languages import LANGUAGES, separator

ASR_TEXT = "<asr_text>"
AUDIO_PAD = "<|audio_pad|>"
AUDIO_PLACEHOLDER = f"<|audio_start|>{AUDIO_PAD}<|audio_end|>"

NO_TRANSLATION = "Qwen3-ASR transcribes and does not translate; use /v1/audio/transcriptions."
MAX_CONTEXT = 10_000  # characters; Qwen3-ASR reads up to 10,000 tokens of context

_GAP = re.compile(r"[\s,;，、；。]+")
_CONTROL_TOKEN = rf"<\|[^|]*\|>|{ASR_TEXT}"
_HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can escape one, no tokenizer takes it

# The header may name several languages, "English, Chinese". At the start of an output it may name
# any, if its tag follows; inside the text, a header counts only if it names known ones.
_SEPARATOR = " *[,;/&+、，] *"
_KNOWN = "|".join((*LANGUAGES.values(), "None"))  # None: no speech


def _list_of(name: str) -> str:
    return f"(?:{name})(?:{_SEPARATOR}(?:{name}))*"


_HEADER = regex.compile(
    rf"language ({_list_of('[a-zA-Z0-9_-]+')})(?:{_SEPARATOR})?{ASR_TEXT}"
    rf"|language ({_list_of(_KNOWN)})\n"
)
_TAG = regex.compile(rf"(?:language {_list_of(_KNOWN)})?{ASR_TEXT}")


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the control tokens of a tokenizer, which no user may write, such as ``<think>``.

    These are its special tokens, and the added ones that look like markup. Added words, which a
    fine-tune may have, are none.
    """
    added = (token for token in tokenizer.get_added_vocab() if token.startswith("<"))
    return tuple(sorted(filter(None, {*added, *tokenizer.all_special_tokens})))


def sanitize_context(text: str, tokens: tuple[str, ...] = ()) -> str:
    """Remove ``<|...|>``, ``<asr_text>`` and ``tokens``, so that a text cannot leave its turn.

    ``tokens`` are those of ``control_tokens``. Removing one may put another together:
    ``<|im<|x|>_end|>``. That is never an accident, so then every character that begins a token is
    removed, in one pass however deep they nest. Halves of surrogate pairs are replaced.
    """
    pattern = _control_pattern(tokens)
    text = pattern.sub("", _HALF.sub("\ufffd", text))
    if not pattern.search(text):
        return text
    return text.translate({ord(char): None for char in {"<", *(token[0] for token in tokens)}})


@cache
def _control_pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    literals = map(re.escape, sorted(tokens, key=len, reverse=True))
    return re.compile("|".join((_CONTROL_TOKEN, *literals)))


def join_context(context: str, keywords: Iterable[str]) -> str:
    """Join free text and a line of keywords, which come last.

    Raises TypeError, ValueError, with the argument's name, for what is no text.
    """
    terms = ", ".join(check_strings("keywords", keywords))
    return "\n".join(filter(None, (check_string("context", context), terms)))


def cap_context(text: str) -> str:
    """Truncate a context to the length that the model was made for, after an item or word."""
    if len(text) <= MAX_CONTEXT:
        return text
    ends = [match.start() for match in _GAP.finditer(text, MAX_CONTEXT // 2, MAX_CONTEXT + 1)]
    return text[: max(ends, default=MAX_CONTEXT)]


def build_prompt(
    *,
    context: str = "",
    language: str | None = None,
    text: str = "",
    num_audios: int = 1,
    num_windows: int = 1,
) -> str:
    """Build the prompt of one request, equal to the checkpoint's chat template byte for byte.

    ``context`` is sanitised here. ``language`` is a name that ``resolve_language`` gave;
    it starts the output, so the model can name no other language, nor that there is no speech.
    ``text`` is what it has written in that language already, and goes on from. ``num_windows``
    items make up each audio.
    """
    audio = AUDIO_PLACEHOLDER.replace(AUDIO_PAD, AUDIO_PAD * num_windows)
    header = f"language {language}{ASR_TEXT}{sanitize_context(text)}" if language else ""
    return (
        f"<|im_start|>system\n{sanitize_context(context)}<|im_end|>\n"
        f"<|im_start|>user\n{audio * num_audios}<|im_end|>\n"
        f"<|im_start|>assistant\n{header}"
    )


@dataclass(frozen=True)
class ParsedOutput:
    """The languages and text of an output; ``language`` is None where it names none.

    ``other_languages`` are those that the header names after the first.
    """

    language: str | None
    text: str
    other_languages: tuple[str, ...] = ()

    @property
    def languages(self) -> tuple[str, ...]:
        return (self.language, *self.other_languages) if self.language else ()


def parse_output(raw: str, *, language: str | None = None) -> ParsedOutput:
    """Parse a complete output. A forced ``language`` is the language of the result."""
    stream = OutputStream(language=language)
    text = stream.push(raw) + stream.finish()
    return ParsedOutput(stream.language, text, stream.languages[1:])


def header_end(raw: str, *, language: str | None = None) -> int:
    """Count the characters of an output before its text: its first header and tag."""
    if language is not None:
        return 0
    header = _HEADER.match(raw.lstrip())
    return header.end() + len(raw) - len(raw.lstrip()) if header else 0


class OutputStream:
    """Parses an output while it grows; ``push`` and ``finish`` return its text.

    Joined, the returned pieces equal ``parse_output(raw).text`` for any cutting of
    ``raw``. A piece is final, and comes as early as that allows: withheld is only what
    the next characters may turn into a header or tag, and white space at the end.

    ``languages`` are the forced one, or none until the header has been read.
    """

    def __init__(self, *, language: str | None = None) -> None:
        self.languages = (language,) if language else ()
        self._may_have_header = language is None
        self._pending = ""  # read, but not returned
        self._text = ""  # returned
        self._is_at_seam = True  # nothing returned yet since the start or the last tag

    @property
    def language(self) -> str | None:
        """The first of the languages."""
        return next(iter(self.languages), None)

    def push(self, delta: str) -> str:
        """Take the next characters of the output; return the text that is now settled."""
        self._pending += delta
        self._read_header()
        return "" if self._may_have_header else self._read_text()

    def finish(self) -> str:
        """Return the rest of the text, when the output is complete."""
        self._pending += "\n"  # an answer that stops after its language ends that line
        self._read_header()
        return self._read_text(is_final=True)

    def _read_header(self) -> None:
        if not self._may_have_header:
            return
        pending = self._pending.lstrip()
        header = _HEADER.match(pending, partial=True)
        if header and header.partial:  # it may become one
            return
        self._may_have_header = False
        if header:
            names = regex.split(_SEPARATOR, header[1] or header[2])
            self.languages = tuple(dict.fromkeys(name for name in names if name != "None"))
            self._pending = pending[header.end() :]

    def _read_text(self, *, is_final: bool = False) -> str:
        *complete, rest = _TAG.split(self._pending)
        text = ""
        for stretch in complete:
            text += self._settle(stretch.rstrip())
            self._is_at_seam = True
        settled = (rest if is_final else rest[: _tag_start(rest)]).rstrip()
        self._pending = rest[len(settled) :]
        return text + self._settle(settled)

    def _settle(self, stretch: str) -> str:
        if self._is_at_seam:
            stretch = stretch.lstrip()
            stretch = separator(self._text, stretch) + stretch
        if stretch:
            self._is_at_seam = False
        self._text += stretch
        return stretch


def _tag_start(text: str) -> int:
    """Return the start of an incomplete tag at the end of ``text``, or its length."""
    tag = _TAG.search(text, partial=True)
    return tag.start() if tag else len(text)
