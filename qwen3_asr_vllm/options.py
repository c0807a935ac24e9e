# SPDX-License-Identifier: Apache-2.0
"""Options of a transcription, which models, clients of a server and commands share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from .checks import check_number, check_string, check_strings, check_whole
from .geometry import MAX_CLIP_S

if TYPE_CHECKING:
    import numpy as np

    from .pauses import Pauses

MAX_BEAMS = 16  # vLLM returns 20 log-probabilities at each token: one per beam and end token
NUM_BEAMS = 4  # where neither the user nor the checkpoint says how many
MAX_LENGTH_PENALTY = 10.0
MAX_SPEAKERS = 64  # of a recording, that a request may ask for
DEFAULT_DIARIZER = "pyannote/speaker-diarization-community-1"
SPEAKER_COUNTS = ("num_speakers", "min_speakers", "max_speakers")  # fields of options


@dataclass(frozen=True)
class Beams:
    """A beam search: how many beams, and the power of the length that divides their scores."""

    width: int
    length_penalty: float = 1.0


@dataclass(frozen=True)
class TranscribeOptions:
    """Options of ``transcribe``, for a model in this process and for a server alike.

        model.transcribe("a.mp3", language="de")
        model.transcribe(["a.mp3", "b.mp3"], TranscribeOptions(language="de"))

    Raises TypeError for a value of another type, ValueError for text that is not Unicode and a
    number out of range.
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

    diarize: bool = False
    """Whether a diarizer finds the speakers; segments and words then have a ``speaker``.

    Segments are cut where the speaker changes. Voices are named A, B, C in the order of their
    first words, unless the diarizer names them.
    """

    num_speakers: int | None = None
    """Number of speakers; None: the diarizer counts them."""

    min_speakers: int | None = None
    """Least number of speakers; None: 1."""

    max_speakers: int | None = None
    """Largest number of speakers; None: as many as the diarizer finds."""

    known_speakers: Mapping[str, np.ndarray] = field(default_factory=dict, compare=False)
    """Names of speakers, each with a waveform of a few seconds of the voice alone."""

    skip_special_tokens: bool = True
    """Whether special tokens of the checkpoint, such as those of speakers, stay out of the text."""

    audio_track: int | None = None
    """Audio track of a video, from 1; None: the default track, or the first with sound."""

    use_beam_search: bool | None = None
    """Whether beam search decodes a clip; None: whether the checkpoint has beams by default."""

    n: int | None = None
    """Number of beams, 1 to 16; None: that of the checkpoint, else 4."""

    length_penalty: float | None = None
    """Power of the length that divides scores of beams, -10 to 10; None: the checkpoint's, else 1.

    Above 0 it favours long texts.
    """

    def __post_init__(self) -> None:
        if self.language is not None:
            check_string("language", self.language)
        check_string("context", self.context)
        for name in ("languages", "keywords"):  # tuples: an iterator can be read once only
            object.__setattr__(self, name, tuple(check_strings(name, getattr(self, name))))
        if self.max_clip_s is not None:
            check_number("max_clip_s", self.max_clip_s, 1, MAX_CLIP_S)
        if self.n is not None:
            check_whole("n", self.n, 1, MAX_BEAMS)
        if self.length_penalty is not None:
            limit = MAX_LENGTH_PENALTY
            check_number("length_penalty", self.length_penalty, -limit, limit)
        self._check_speakers()

    def _check_speakers(self) -> None:
        given = {name: getattr(self, name) for name in SPEAKER_COUNTS}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            check_whole(name, value, 1, MAX_SPEAKERS)
        if (given or self.known_speakers) and not self.diarize:
            name = next(iter(given), "known_speakers")
            raise ValueError(f"{name} is given; set diarize=True (--diarize) too.")
        least, most = given.get("min_speakers", 1), given.get("max_speakers", MAX_SPEAKERS)
        number = given.get("num_speakers", least)
        if not least <= number <= most:
            counts = ", ".join(f"{name} is {value}" for name, value in given.items())
            raise ValueError(f"{counts}: no number of speakers fits.")

    @property
    def full_context(self) -> str:
        """Context with the keywords, as one text."""
        from .prompt import join_context  # imports regex, which --help must not wait for

        return join_context(self.context, self.keywords)

    @property
    def beams(self) -> Beams | None:
        """Beams of the search; None without one. One beam is greedy decoding."""
        if not self.use_beam_search or self.n == 1:
            return None
        penalty = 1.0 if self.length_penalty is None else self.length_penalty
        return Beams(self.n or NUM_BEAMS, penalty)

    def with_defaults(self, defaults: Mapping[str, Any]) -> TranscribeOptions:
        """Return these options with what they leave open from the defaults of a checkpoint.

        ``defaults`` are those of ``generation_defaults``, of which a beam search is read. Raises
        ValueError for options of a beam search without one.
        """
        use = self.use_beam_search
        use = defaults.get("use_beam_search", False) if use is None else use
        if not use:
            for name, value in (("n", self.n), ("length_penalty", self.length_penalty)):
                if value not in (None, 1):
                    raise ValueError(f"{name} is {value:g}; set use_beam_search (--beams) too.")
            return replace(self, use_beam_search=False)
        names = ("n", "length_penalty")
        unset = {x: defaults[x] for x in names if x in defaults and getattr(self, x) is None}
        return replace(self, use_beam_search=True, **unset)

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
