# SPDX-License-Identifier: Apache-2.0
"""The text of a clip that grows: what each step keeps, and what is final."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os.path import commonprefix

import regex

from .decoding import completeness, place_tokens
from .languages import separator
from .prompt import (
    ASR_TEXT,
    PUBLISHED,
    OutputStream,
    ParsedOutput,
    TextProtocol,
    header_end,
    parse_output,
    whole_tokens,
)
from .transcript import Token
from .windows import Tokenizer

UNFIXED_STEPS = 2  # first steps of a clip, which decode their text from the start
UNFIXED_TOKENS = 5  # last tokens of the text, which the next step decodes again
_UNSCORED = -1  # id of a token that stands for text without log-probabilities


class Draft:
    """The text of one clip, which every step extends.

    A step continues ``prefix``: the last text less its last tokens. Text is kept, and starts every
    later prefix, once two consecutive steps agree on it and it is older than those tokens. Whole
    words of the kept text are final (whole characters in languages without spaces), so emitted
    text is never retracted.
    """

    def __init__(
        self, tokenizer: Tokenizer, language: str | None, protocol: TextProtocol = PUBLISHED
    ) -> None:
        self._tokenizer = tokenizer
        self._language = language
        self._protocol = protocol
        self._tokens: list[Token] = []  # of the raw text, where the engine gives them
        self._num_scored = 0  # characters of the text whose tokens ``new_tokens`` has returned
        self._stream = OutputStream(language=language, protocol=protocol)
        self._raw = ""  # the last output, with its prefix
        self._kept = ""  # the start of all later outputs
        self._num_read = 0  # characters of the raw text that the output stream has read
        self._steps = 0
        self.prefix = ""
        self.text = ""  # final text

    @property
    def tentative(self) -> str:
        """The text after the final text, which may still change."""
        return self._parsed.text[len(self.text) :]

    def completeness(self, tokens: Sequence[Token]) -> float:
        """Return the probability that all text is complete; ``tokens`` are of the last output."""
        spoken = replace(self._protocol, keeps_special_tokens=False)
        text = parse_output(self._raw, language=self._language, protocol=spoken).text
        return completeness(text, tokens, self.languages)

    @property
    def forced_language(self) -> str | None:
        return self._language

    @property
    def languages(self) -> tuple[str, ...]:
        """The languages of the header, or the forced one."""
        return self._stream.languages

    def restarted(self, language: str | None, protocol: TextProtocol) -> Draft:
        """Return a draft in another language that continues the final text."""
        draft = Draft(self._tokenizer, language, protocol)
        if self.text:
            named = ", ".join(self.languages)
            header = f"language {named}{ASR_TEXT}" if named and not language else ""
            draft._raw = draft._kept = draft.prefix = header + self.text
            draft._read(len(draft._raw))
            draft._num_scored = len(draft.text)
        return draft

    def accept(self, output: str, *, is_cut_off: bool = False, tokens: Sequence[Token] = ()) -> str:
        """Take the model's output after the prefix; return the text that became final.

        After an output that was cut off, at its token limit or as a loop, the next step starts
        from the kept text.
        """
        self._tokens = [*self._prefix_tokens(), *tokens] if tokens else []
        previous = self._raw if self._steps else None
        self._raw = self.prefix + output.replace("\ufffd", "")
        self._steps += 1
        stable = "" if is_cut_off or not self._parsed.text else self._roll_back()
        if previous is not None:
            agreed = whole_tokens(commonprefix([previous, stable]), self._protocol)
            self._kept = max(self._kept, agreed, key=len)
        is_fixed = self._steps >= UNFIXED_STEPS
        self.prefix = max(self._kept, stable, key=len) if is_fixed else self._kept
        return self._read(_whole_words(self._kept, start=self._num_read))

    def is_in_another_language(self, output: str, candidates: Sequence[str]) -> bool:
        """Return whether an output names none of the candidates, and nothing is final yet."""
        if not candidates or self._language or self.text:
            return False
        parsed = parse_output(self.prefix + output, protocol=self._protocol)
        return bool(parsed.text) and not set(parsed.languages) <= set(candidates)

    def new_tokens(self) -> list[Token]:
        """Return the tokens of the text that became final since the last call."""
        placed = place_tokens(
            self._tokens, self.text, language=self._language, protocol=self._protocol
        )
        start, self._num_scored = self._num_scored, len(self.text)
        return [token for at, token in placed if at >= start and token.id != _UNSCORED]

    def finish(self) -> str:
        """Return the rest of the text, when the clip is complete."""
        delta = self._stream.push(self._raw[self._num_read :]) + self._stream.finish()
        self.text += delta
        return delta

    def _prefix_tokens(self) -> list[Token]:
        """Return the tokens of the prefix; text that no engine output scored is two of its own."""
        if not self._tokens:
            header = header_end(self.prefix, language=self._language, protocol=self._protocol)
            return [
                Token(_UNSCORED, self.prefix[:header], 0.0),
                Token(_UNSCORED, self.prefix[header:], 0.0),
            ]
        tokens, left = [], len(self.prefix)
        for token in self._tokens:
            if left <= 0:
                break
            tokens.append(replace(token, text=token.text[:left]))
            left -= len(token.text)
        return tokens

    @property
    def _parsed(self) -> ParsedOutput:
        return parse_output(self._raw, language=self._language, protocol=self._protocol)

    def _read(self, end: int) -> str:
        delta = self._stream.push(self._raw[self._num_read : end])
        self._num_read = end
        self.text += delta
        return delta

    def _roll_back(self) -> str:
        """Return the last output less 5 tokens, or more if that would split a character."""
        ids = self._tokenizer.encode(self._raw, add_special_tokens=False)
        for end in range(len(ids) - UNFIXED_TOKENS, 0, -1):
            text = self._tokenizer.decode(ids[:end])
            if "\ufffd" not in text and self._raw.startswith(text):
                return text
        return ""


def _whole_words(text: str, *, start: int) -> int:
    """Return the end of the last whole word (or character without spaces) after ``start``.

    The last grapheme is left out, because combining marks may still follow.
    """
    *graphemes, _ = regex.findall(r"\X", text[start:]) or [""]
    after = text[start + sum(map(len, graphemes)) :]
    while graphemes and separator(graphemes[-1], after):
        after = graphemes.pop() + after
    return len(text) - len(after) if graphemes else start
