# SPDX-License-Identifier: Apache-2.0
"""The text of a clip while the engine decodes it."""

from __future__ import annotations

from .decoding import may_leak, settled_length
from .prompt import OutputStream, ParsedOutput
from .transcription import LEAK, EngineRequest, are_candidates, fault_of


class LiveText:
    """The text of one output while the engine writes it, as far as it is never retracted.

    Withheld are copies of a repeated run, of which a loop keeps few, text that may be a prompt
    leak, and any output whose language is no candidate. If the clip must be decoded again,
    ``finish`` returns nothing, the next output starts with ``shown``, and ``is_settled`` stays
    False.
    """

    def __init__(self, request: EngineRequest) -> None:
        self.shown = ""
        self.is_settled = False
        self._request = request
        self._stream = OutputStream(language=request.language, protocol=request.protocol)
        self._text = ""
        self._may_leak = True

    def push(self, raw: str) -> str:
        """Take the next characters of the output; return the text that is now settled."""
        self._text += self._stream.push(raw)
        self._may_leak = self._may_leak and may_leak(self._text, self._request.context)
        if not self._text or self._may_leak or not self._is_candidate():
            return ""
        return self._show(settled_length(self._text))

    def finish(self, finish_reason: str | None) -> str:
        """Return the rest of the text, when the output is complete."""
        self._text += self._stream.finish()
        parsed = ParsedOutput(self._stream.language, self._text, self._stream.languages[1:])
        fault = fault_of(self._request, parsed, finish_reason)
        self.is_settled = fault in (None, LEAK)
        return "" if fault else self._show(len(self._text))

    def _is_candidate(self) -> bool:
        return are_candidates(self._stream.languages, self._request.candidates)

    def _show(self, length: int) -> str:
        delta = self._text[len(self.shown) : length]
        self.shown += delta
        return delta
