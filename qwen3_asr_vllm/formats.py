# SPDX-License-Identifier: Apache-2.0
"""The formats of a transcript, as text.

    Transcript -> txt json srt vtt tsv lrc verbose_json

``layout`` stands for the parameters of ``subtitles.cues``: ``max_line_width``,
``max_line_count``, ``highlight_words``.
"""

from __future__ import annotations

import html
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

from .languages import resolve_language
from .subtitles import Cue, cues, one_line
from .transcript import Segment, Token, Transcript, Word

# Fields of segments that verbose_json has only where they were measured.
_WHERE_MEASURED = ("language_probability", "other_languages", "speaker", "other_speakers")
UNKNOWN_SPEAKER = "unknown"  # in diarized_json, whose type has a speaker in every segment


def _txt(transcript: Transcript) -> str:
    return transcript.text + "\n"


def _json(transcript: Transcript) -> str:
    """Write an object that always has these keys; segments have the fields that were measured.

    text, language (null without speech), languages, duration, segments, warnings
    """
    return _dumps(
        {
            "text": transcript.text,
            "language": transcript.language,
            "languages": transcript.languages,
            "duration": transcript.duration,
            "segments": [
                asdict(replace(s, tokens=None), dict_factory=_measured) for s in transcript.segments
            ],
            "warnings": transcript.warnings,
        }
    )


def _verbose_json(transcript: Transcript, *, temperature: float = 0.0) -> str:
    """Write OpenAI's verbose_json, where a segment has every field and no field is null.

    A confidence that was not measured is 0.0 and listed in ``unmeasured``: a forced language, for
    example, has no ``no_speech_prob``. ``seek`` is the start in frames of 10 ms. ``language`` is
    in lower case, as OpenAI has it, and "" without speech.
    """
    segments = transcript.segments
    words = list(map(word_row, transcript.words))
    confidences = ("avg_logprob", "no_speech_prob")
    unmeasured = [c for c in confidences if any(getattr(s, c) is None for s in segments)]
    return _dumps(
        {
            "task": "transcribe",
            "language": (transcript.language or "").lower(),
            "languages": [{"code": code} for code in transcript.codes],
            "duration": transcript.duration,
            "text": transcript.text,
            "segments": [_verbose_segment(i, s, temperature) for i, s in enumerate(segments)],
            **({"words": words} if words else {}),
            **({"unmeasured": unmeasured} if unmeasured else {}),
            **({"warnings": transcript.warnings} if transcript.warnings else {}),
            "usage": {"type": "duration", "seconds": transcript.duration},
        }
    )


def read_verbose_json(document: dict[str, Any]) -> Transcript:
    """Read verbose_json of this package, or of another server of OpenAI's API.

    Raises ValueError for any other document.
    """
    try:
        default = document.get("language") or None
        rows = document.get("segments") or []
        segments = tuple(_read_segment(row, default, document) for row in rows)
        segments = tuple(_with_words(segments, document.get("words") or ()))
        text, duration = str(document["text"]), float(document.get("duration") or 0)
        if text and not segments:
            segments = (Segment(0, duration, text, _model_language(default)),)
        return Transcript(text, duration, segments, tuple(document.get("warnings") or ()))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"no verbose_json: {str(document)[:200]}") from error


def _read_segment(row: dict[str, Any], language: str | None, document: dict[str, Any]) -> Segment:
    unmeasured = document.get("unmeasured", ())
    measured = {
        name: row.get(name) for name in ("avg_logprob", "no_speech_prob") if name not in unmeasured
    }
    words = list(map(_read_word, row.get("words") or ()))
    return Segment(
        start=float(row["start"]),
        end=float(row["end"]),
        text=str(row["text"]),
        language=_model_language(row["language"] if "language" in row else language),
        language_probability=row.get("language_probability"),
        words=tuple(words) or None,
        other_languages=tuple(row.get("other_languages") or ()) or None,
        speaker=row.get("speaker"),
        other_speakers=tuple(row.get("other_speakers") or ()) or None,
        **measured,
    )


def _read_word(row: dict[str, Any]) -> Word:
    return Word(
        word=row["word"],
        start=row["start"],
        end=row["end"],
        probability=row.get("probability"),
        speaker=row.get("speaker"),
        other_speakers=tuple(row.get("other_speakers") or ()) or None,
    )


def _with_words(segments: Sequence[Segment], rows: Iterable[dict[str, Any]]) -> Iterator[Segment]:
    """Yield the segments with their words, where the words joined are the segment's text."""
    words = list(map(_read_word, rows))
    for segment in segments:
        ends = accumulate(len(word.word) for word in words)
        number = next((n for n, end in enumerate(ends, 1) if end >= len(segment.text)), 0)
        first, rest = tuple(words[:number]), words[number:]
        if first and "".join(word.word for word in first) == segment.text:
            segment, words = replace(segment, words=first), rest
        yield segment


def _model_language(language: str | None) -> str | None:
    try:
        return resolve_language(language)
    except ValueError:  # another model's
        return language


def rounded(transcript: Transcript) -> Transcript:
    """Return the transcript as it is after writing and reading: rounded, without tokens."""
    segments = tuple(map(_rounded_segment, transcript.segments))
    return replace(transcript, duration=round(transcript.duration, 3), segments=segments)


def _rounded_segment(segment: Segment) -> Segment:
    numbers = {name: _rounded(x) for name, x in vars(segment).items() if isinstance(x, float)}
    words = segment.words and tuple(map(_rounded_word, segment.words))
    return replace(segment, **numbers, words=words, tokens=None)


def _rounded_word(word: Word) -> Word:
    numbers = {name: _rounded(x) for name, x in vars(word).items() if isinstance(x, float)}
    return replace(word, **numbers)


def _verbose_segment(index: int, segment: Segment, temperature: float) -> dict[str, Any]:
    text = segment.text.encode(errors="replace")
    return {
        "id": index,
        "seek": int(segment.start * 100),
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "language": segment.language,
        "tokens": [token.id for token in segment.tokens or ()],
        "temperature": temperature,
        "avg_logprob": segment.avg_logprob or 0.0,
        "compression_ratio": len(text) / len(zlib.compress(text)),
        "no_speech_prob": segment.no_speech_prob or 0.0,
        **_measured([(name, getattr(segment, name)) for name in _WHERE_MEASURED]),
        **({"words": list(map(word_row, segment.words))} if segment.words else {}),
    }


def word_row(word: Word) -> dict[str, Any]:
    """Return a word of OpenAI's ``words``, with its ``probability`` if it was measured."""
    return asdict(word, dict_factory=_measured)


def diarized_json(transcript: Transcript) -> str:
    """Write OpenAI's diarized_json: segments with their speakers."""
    return _dumps(
        {
            "task": "transcribe",
            "duration": transcript.duration,
            "text": transcript.text,
            "segments": diarized_segments(transcript),
            "usage": {"type": "duration", "seconds": transcript.duration},
        }
    )


def diarized_segments(transcript: Transcript) -> list[dict[str, Any]]:
    """Return the segments of diarized_json, each of which is also an event of a stream."""
    return [
        {
            "type": "transcript.text.segment",
            "id": f"seg_{index}",
            "start": segment.start,
            "end": segment.end,
            "speaker": UNKNOWN_SPEAKER if segment.speaker is None else segment.speaker,
            "text": segment.text,
            "language": segment.language,
            **_measured([("other_speakers", segment.other_speakers)]),
        }
        for index, segment in enumerate(transcript.segments)
    ]


def logprobs(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """Return OpenAI's list of log-probabilities."""
    return [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.text.encode(errors="replace")),
        }
        for token in tokens
    ]


def _srt(transcript: Transcript, **layout: Any) -> str:
    """Write SubRip, with speakers as "[Ada]: ".

    It has no escapes, so ``-->``, which parsers look for, becomes an arrow.
    """
    numbered = enumerate(cues(transcript, label="[{}]: ".format, **layout), 1)
    return "\n".join(f"{number}\n{_span(cue, ',')}\n{_srt_text(cue)}\n" for number, cue in numbered)


def _srt_text(cue: Cue) -> str:
    def escape(text: str) -> str:
        return text.replace("-->", "→")

    return escape(cue.label) + _lines(cue, escape)


def _vtt(transcript: Transcript, **layout: Any) -> str:
    """Write WebVTT, with &, < and > escaped, and speakers as voices: <v Ada>."""
    blocks = (f"{_span(cue, '.')}\n{_vtt_text(cue)}\n" for cue in cues(transcript, **layout))
    return "\n".join(["WEBVTT\n", *blocks])


def _vtt_text(cue: Cue) -> str:
    escape = partial(html.escape, quote=False)
    voice = "" if cue.speaker is None else f"<v {escape(one_line(cue.speaker))}>"
    return voice + _lines(cue, escape)


def _tsv(transcript: Transcript) -> str:
    """Write Whisper's table of segments: start and end in milliseconds, text."""
    rows = (
        f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{one_line(s.text)}\n"
        for s in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


def _lrc(transcript: Transcript, *, highlight_words: bool = False) -> str:
    """Write lyrics: one line per segment, after its start as [minutes:seconds].

    With ``highlight_words``, each word follows its start as <minutes:seconds>, and the line ends
    with its end: the enhanced format of karaoke players.
    """
    lines = (
        _karaoke_line(s) if highlight_words and s.words else one_line(s.text)
        for s in transcript.segments
    )
    starts = (f"[{_lrc_time(segment.start)}]" for segment in transcript.segments)
    return "".join(f"{start}{line}\n" for start, line in zip(starts, lines, strict=True))


def _karaoke_line(segment: Segment) -> str:
    words = segment.words or ()
    line = "".join(f" <{_lrc_time(w.start)}> {one_line(w.word)}" for w in words)
    return f"{line} <{_lrc_time(segment.end)}>"


def _dumps(document: dict[str, Any]) -> str:
    """Write indented JSON, with times and ratios to three decimals."""
    return json.dumps(_rounded(document), ensure_ascii=False, indent=2) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def _measured(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}


def _lines(cue: Cue, escape: Callable[[str], str]) -> str:
    """Return the text of a cue, with its marked word in <u>."""
    text = "\n".join(cue.lines)
    if cue.mark is None:
        return escape(text)
    visible = [i for i, char in enumerate(text) if not char.isspace()]
    first, end = visible[cue.mark.first], visible[cue.mark.end - 1] + 1
    return f"{escape(text[:first])}<u>{escape(text[first:end])}</u>{escape(text[end:])}"


def _span(cue: Cue, point: str) -> str:
    return f"{_clock(cue.start_ms, point)} --> {_clock(cue.end_ms, point)}"


def _clock(milliseconds: int, point: str) -> str:
    """Format hours, minutes and seconds: 01:02:03,456."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds % 60:02d}{point}{milliseconds:03d}"


def _lrc_time(seconds: float) -> str:
    minutes, hundredths = divmod(round(100 * seconds), 6000)
    return f"{minutes:02d}:{hundredths // 100:02d}.{hundredths % 100:02d}"


@dataclass(frozen=True)
class Format:
    """A format of transcripts: ``FORMATS["srt"](transcript)`` returns the text.

    The command line, outputs of a corpus and HTTP routes read this table, so a new format is a
    function and a row.
    """

    name: str  # on the command line, and the suffix of a file
    function: Callable[..., str]
    media_type: str = "text/plain"
    response_format: str | None = None  # OpenAI's name for it; None: no response has it
    is_timed: bool = True  # whether it shows when something is spoken
    is_streamed: bool = False  # whether a stream may end in it
    is_karaoke: bool = False  # whether it takes ``highlight_words``
    has_lines: bool = False  # whether it takes ``max_line_width`` and ``max_line_count``
    is_verbose: bool = False  # whether it takes ``temperature``, and words only where wanted

    @property
    def is_json(self) -> bool:
        return self.media_type == _JSON

    def __call__(self, transcript: Transcript, **layout: Any) -> str:
        return self.function(transcript, **layout)


_JSON = "application/json"
_ROWS = (
    Format("txt", _txt, response_format="text", is_timed=False, is_streamed=True),
    Format("json", _json, _JSON, "json", is_timed=False, is_streamed=True),
    Format("srt", _srt, "application/x-subrip", "srt", is_karaoke=True, has_lines=True),
    Format("vtt", _vtt, "text/vtt", "vtt", is_karaoke=True, has_lines=True),
    Format("tsv", _tsv, "text/tab-separated-values"),
    Format("lrc", _lrc, is_karaoke=True),
    Format("verbose_json", _verbose_json, _JSON, "verbose_json", is_streamed=True, is_verbose=True),
)
FORMATS = {row.name: row for row in _ROWS}
# By OpenAI's names. diarized_json needs speakers, which only a route tells apart.
RESPONSE_FORMATS = {row.response_format: row for row in _ROWS if row.response_format} | {
    "diarized_json": Format(
        "diarized_json", diarized_json, _JSON, "diarized_json", is_streamed=True
    )
}
SUBTITLES = tuple(row.name for row in _ROWS if row.has_lines)
KARAOKE = tuple(row.name for row in _ROWS if row.is_karaoke)
TIMED_TEXTS = tuple(row.name for row in _ROWS if row.is_timed and not row.is_json)


def format_named(name: str) -> Format:
    """Return a format by name or suffix. Raises ValueError with the list of formats."""
    if (found := FORMATS.get(name.removeprefix("."))) is None:
        raise ValueError(f"unknown format {name!r}; use one of {', '.join(FORMATS)}.")
    return found
