# SPDX-License-Identifier: Apache-2.0
"""The text protocol: prompts of the model, and the parsing of its outputs.

    <|im_start|>system            context, or an empty turn
    <|im_start|>user              <|audio_start|><|audio_pad|><|audio_end|>
    <|im_start|>assistant         language English<asr_text>Hello.

The part before ``<asr_text>`` is the header. The model writes it, or, where the language
is forced, the prompt does. An answer may lack its header or tag, end the header with a
newline, or repeat it; no text is lost then. Strings in and out: of a tokenizer, only the list of
tokens is read.

``PUBLISHED`` is the protocol of the published checkpoints. A fine-tune may have another chat
template, and more special tokens: ``chat_template.py`` reads its ``TextProtocol``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import regex

from .checks import check_string, check_strings
from .languages import LANGUAGES, Languages, separator

ASR_TEXT = "<asr_text>"
AUDIO_PAD = "<|audio_pad|>"
AUDIO_PLACEHOLDER = f"<|audio_start|>{AUDIO_PAD}<|audio_end|>"

NO_TRANSLATION = "Qwen3-ASR transcribes and does not translate; use /v1/audio/transcriptions."
NO_CONTEXT = (
    "the chat template of this checkpoint has no place for a context; leave out prompt, keywords "
    "and context."
)
MAX_CONTEXT = 10_000  # characters; Qwen3-ASR reads up to 10,000 tokens of context
CONTEXT = "\ue000"  # stands for the context in a rendered chat template

_GAP = re.compile(r"[\s,;，、；。]+")
_CONTROL_TOKEN = rf"<\|[^|]*\|>|{ASR_TEXT}"
_HALF = re.compile("[\ud800-\udfff]")  # of a character: JSON can escape one, no tokenizer takes it

# The header may name several languages, "English, Chinese". At the start of an output it may name
# any, if its tag follows; inside the text, a header counts only if it names known ones.
_SEPARATOR = " *[,;/&+、，] *"
_ANY_NAME = "[a-zA-Z0-9_-]+"


@dataclass(frozen=True)
class TextProtocol:
    """The text protocol of a checkpoint: its chat template, rendered once, and its tokens.

    ``bare`` is the prompt without a context, ``with_context`` the one that has ``CONTEXT`` in the
    place of the context; None: the template has no place for one. Both hold ``AUDIO_PAD`` once.
    ``control_tokens`` are those that no user may write. Outputs hold ``special_tokens``, which
    parsing removes or, with ``keeps_special_tokens``, leaves in the text. ``languages`` are those
    that headers name and requests force.
    """

    bare: str
    with_context: str | None
    control_tokens: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    keeps_special_tokens: bool = False
    languages: Languages = LANGUAGES

    @property
    def removed_tokens(self) -> tuple[str, ...]:
        """The special tokens that are no text."""
        return () if self.keeps_special_tokens else self.special_tokens


_USER_TURN = f"<|im_start|>user\n{AUDIO_PLACEHOLDER}<|im_end|>\n<|im_start|>assistant\n"
PUBLISHED = TextProtocol(
    bare=f"<|im_start|>system\n<|im_end|>\n{_USER_TURN}",
    with_context=f"<|im_start|>system\n{CONTEXT}<|im_end|>\n{_USER_TURN}",
)


def control_tokens(tokenizer: Any) -> tuple[str, ...]:
    """Return the control tokens of a tokenizer, which no user may write, such as ``<think>``.

    These are its special tokens, and the added ones that look like markup. Added words, which a
    fine-tune may have, are none.
    """
    added = (token for token in tokenizer.get_added_vocab() if token.startswith("<"))
    return tuple(sorted(filter(None, {*added, *tokenizer.all_special_tokens})))


def sanitize_context(text: str, tokens: tuple[str, ...] = ()) -> str:
    """Remove ``<|...|>``, ``<asr_text>`` and ``tokens``, so that a text cannot end its turn.

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
    protocol: TextProtocol = PUBLISHED,
) -> str:
    """Build the prompt of one request, equal to the checkpoint's chat template byte for byte.

    ``context`` is sanitised here; a template without a place for it ignores it.
    ``language`` is a name of the checkpoint's languages; it starts the output, so the model can
    name no other language, nor that there is no speech. ``text`` is what it has written in that
    language already, and goes on from. ``num_windows`` items make up each audio.
    """
    context = sanitize_context(context)
    prompt = (protocol.with_context if context else None) or protocol.bare
    prompt = prompt.replace(AUDIO_PLACEHOLDER, AUDIO_PLACEHOLDER * num_audios)
    prompt = prompt.replace(AUDIO_PAD, AUDIO_PAD * num_windows).replace(CONTEXT, context)
    header = f"language {language}{ASR_TEXT}{sanitize_context(text)}" if language else ""
    return prompt + header


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


def parse_output(
    raw: str, *, language: str | None = None, protocol: TextProtocol = PUBLISHED
) -> ParsedOutput:
    """Parse a complete output. A forced ``language`` is the language of the result."""
    stream = OutputStream(language=language, protocol=protocol)
    text = stream.push(raw) + stream.finish()
    return ParsedOutput(stream.language, text, stream.languages[1:])


def header_end(raw: str, *, language: str | None = None, protocol: TextProtocol = PUBLISHED) -> int:
    """Count the characters of an output before its text: its first header and tag."""
    header = None if language else _patterns(protocol).header.match(raw)
    return header.end() if header else 0


def whole_tokens(raw: str, protocol: TextProtocol) -> str:
    """Return the output without an incomplete special token at its end."""
    special = _patterns(protocol).special.search(raw, partial=True)
    while special and not special.partial:
        special = _patterns(protocol).special.search(raw, special.end(), partial=True)
    return raw[: special.start()] if special else raw


def _list_of(name: str) -> str:
    return f"(?:{name})(?:{_SEPARATOR}(?:{name}))*"


class _Patterns(NamedTuple):
    """Patterns of an output: its header, tags and special tokens, which separate texts (seams)."""

    header: regex.Pattern[str]
    seam: regex.Pattern[str]
    special: regex.Pattern[str]


@cache
def _patterns(protocol: TextProtocol) -> _Patterns:
    def any_of(pattern: str, tokens: tuple[str, ...]) -> str:
        return "|".join((pattern, *map(regex.escape, sorted(tokens, key=len, reverse=True))))

    known = any_of("None", tuple(protocol.languages.values()))  # None: no speech
    before = any_of(r"\s", protocol.special_tokens)
    return _Patterns(
        header=regex.compile(
            rf"(?P<before>(?:{before})*)(?:"
            rf"language ({_list_of(f'{known}|{_ANY_NAME}')})(?:{_SEPARATOR})?{ASR_TEXT}"
            rf"|language ({_list_of(known)})\n)"
        ),
        seam=regex.compile(
            any_of(rf"(?:language {_list_of(known)})?{ASR_TEXT}", protocol.removed_tokens)
        ),
        special=regex.compile(any_of("(?!)", protocol.special_tokens)),
    )


class OutputStream:
    """Parses an output while it grows; ``push`` and ``finish`` return its text.

    Joined, the returned pieces equal ``parse_output(raw).text`` for any cutting of
    ``raw``. A piece is final, and comes as early as that allows: withheld is only what
    the next characters may turn into a header, tag or special token, and white space at the end.

    ``languages`` are the forced one, or none until the header has been read.
    """

    def __init__(self, *, language: str | None = None, protocol: TextProtocol = PUBLISHED) -> None:
        self._patterns = _patterns(protocol)
        self._keeps_special_tokens = protocol.keeps_special_tokens
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
        header = self._patterns.header.match(self._pending, partial=True)
        if header and header.partial:  # it may become one
            return
        self._may_have_header = False
        if header:
            names = regex.split(_SEPARATOR, header[2] or header[3])
            self.languages = tuple(dict.fromkeys(name for name in names if name != "None"))
            before = header["before"] if self._keeps_special_tokens else ""
            self._pending = before + self._pending[header.end() :]

    def _read_text(self, *, is_final: bool = False) -> str:
        *complete, rest = self._patterns.seam.split(self._pending)
        text = ""
        for stretch in complete:
            text += self._settle(stretch.rstrip())
            self._is_at_seam = True
        settled = (rest if is_final else rest[: self._seam_start(rest)]).rstrip()
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

    def _seam_start(self, text: str) -> int:
        """Return the start of an incomplete seam at the end of ``text``, or its length."""
        seam = self._patterns.seam.search(text, partial=True)
        return seam.start() if seam else len(text)
