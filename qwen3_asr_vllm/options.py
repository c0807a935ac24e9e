# SPDX-License-Identifier: Apache-2.0
"""Options of a transcription, which models, clients of a server and commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from .checks import check_number, check_string, check_strings
from .geometry import MAX_CLIP_S

if TYPE_CHECKING:
    from .pauses import Pauses


@dataclass(frozen=True)
class TranscribeOptions:
    """Options of ``transcribe``, for a model in this process and for a server alike.

        model.transcribe("a.mp3", language="de")
        model.transcribe(["a.mp3", "b.mp3"], TranscribeOptions(language="de"))

    Raises TypeError for a value of another type, ValueError for text that is not Unicode and a
    ``max_clip_s`` out of range.
    """

    language: str | None = None
    """Name or code of the language of every clip; None detects the language of each clip."""

    languages: Sequence[str] = ()
    """Names or codes of the languages to detect one of; empty: all."""

    context: str = ""
    """Text that biases the model, such as the topic or the text before."""

    keywords: Sequence[str] = ()
    """Names and terms to expect; context and keywords hold 10,000 characters together."""

    max_clip_s: float | None = None
    """Longest clip in seconds, 1 to 1200; None: 60, or the setting of the server."""

    pauses: Pauses | None = None
    """Pauses that end a clip; None: clips end near ``max_clip_s``."""

    confidences: bool = False
    """Whether segments have their confidences and tokens."""

    word_timestamps: bool = False
    """Whether an aligner times the words; segments then last from their first word to their last.

    A warning names each language that the aligner does not know.
    """

    audio_track: int | None = None
    """Audio track of a video, from 1; None: the default track, or the first with sound."""

    def __post_init__(self) -> None:
        if self.language is not None:
            check_string("language", self.language)
        check_string("context", self.context)
        for name in ("languages", "keywords"):  # tuples: an iterator can be read once only
            object.__setattr__(self, name, tuple(check_strings(name, getattr(self, name))))
        if self.max_clip_s is not None:
            check_number("max_clip_s", self.max_clip_s, 1, MAX_CLIP_S)

    @property
    def full_context(self) -> str:
        """Context with the keywords, as one text."""
        from .prompt import join_context  # imports regex, which --help must not wait for

        return join_context(self.context, self.keywords)

    def sanitized(self, control_tokens: tuple[str, ...]) -> TranscribeOptions:
        """Return these options with the keywords in the context, and no control token in it."""
        from .prompt import sanitize_context

        context = sanitize_context(self.full_context, control_tokens)
        return replace(self, context=context, keywords=())


def merge_options(
    options: TranscribeOptions | None, changes: Mapping[str, Any]
) -> TranscribeOptions:
    """Return ``options`` with ``changes`` to its fields; None stands for the defaults.

    Raises TypeError for a name that is no field, and what ``TranscribeOptions`` raises.
    """
    if options is not None and not isinstance(options, TranscribeOptions):
        raise TypeError(f"options is {options!r:.60}; pass TranscribeOptions(...) or keywords.")
    names = [field.name for field in fields(TranscribeOptions)]
    if unknown := [name for name in changes if name not in names]:
        raise TypeError(f"unknown option {unknown[0]!r}; the options are {', '.join(names)}.")
    return replace(options or TranscribeOptions(), **changes)
