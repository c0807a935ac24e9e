# SPDX-License-Identifier: Apache-2.0
"""What was said, when, and in which language; and the formats that it is written in.

    Transcript -> txt json srt vtt tsv lrc verbose_json

Times are seconds from the start of the recording. A field that is None was not measured.
Subtitles are measured in columns: a full-width character, as Chinese has, takes two.
"""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import accumulate, pairwise
from typing import Any, TypeAlias
from unicodedata import category, east_asian_width

from .languages import language_code, resolve_language

MAX_LINE_WIDTH = 42  # columns of a subtitle line: 42 Latin letters or 21 Chinese characters
MAX_LINE_COUNT = 2
MIN_CUE_S, MAX_CUE_S = 1.0, 7.0  # how long a subtitle stays

_LONG_SENTENCE = 120  # columns, about 8 s of speech: longer ones are cut at commas
_ABBREVIATIONS = "Mr|Mrs|Ms|Dr|St|Prof|No|vs"
_CLOSERS = "[\"'”’»)\\]）」』】》〉]*"


@dataclass(frozen=True)
class Word:
    """An aligned unit: a word, or one character of Chinese or Japanese."""

    word: str
    start: float
    end: float


@dataclass(frozen=True)
class Token:
    """A token that the model wrote. The texts of all tokens of an answer make its text.

    Of a character that takes several tokens, the last has it and the others are empty.
    """

    id: int
    text: str
    logprob: float  # nats


@dataclass(frozen=True)
class Segment:
    """A timed stretch of transcript, a sentence or a clause; ``language`` is a name.

    ``text`` begins with the white space before it, so that the texts of all segments, put
    together, are the text of the transcript. Confidences are the model's own, where asked for.
    """

    start: float
    end: float
    text: str
    language: str | None = None
    language_probability: float | None = None
    no_speech_prob: float | None = None
    avg_logprob: float | None = None  # nats per token
    words: tuple[Word, ...] | None = None
    tokens: tuple[Token, ...] | None = None
    speaker: str | None = None


@dataclass(frozen=True)
class Transcript:
    """One recording, transcribed. ``warnings`` say where ``text`` may be incomplete.

    ``loops`` counts answers that went round in circles and were asked for again.
    """

    text: str
    duration: float
    segments: tuple[Segment, ...] = ()
    warnings: tuple[str, ...] = ()
    loops: int = 0

    @property
    def words(self) -> tuple[Word, ...]:
        """Those of all segments that have any."""
        return tuple(word for segment in self.segments for word in segment.words or ())

    @property
    def languages(self) -> tuple[str, ...]:
        """Names of the languages spoken, in order of first use."""
        return tuple(dict.fromkeys(s.language for s in self.segments if s.language))

    @property
    def language(self) -> str | None:
        """The language spoken first; None if nobody speaks."""
        return next(iter(self.languages), None)


# text ---------------------------------------------------------------------------------------


def display_width(text: str) -> int:
    """Columns that a text takes: two for a full-width character, none for a combining one."""
    return sum(map(_columns, text))


@cache
def _columns(char: str) -> int:
    if category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if east_asian_width(char) in "WF" else 1


_SENTENCE_END = re.compile(f"[.!?…؟۔।]+{_CLOSERS}(?=\\s)|[。！？｡]+{_CLOSERS}")
_CLAUSE_END = re.compile(
    "[,;:،؛](?=\\s)|[，、；：]"
    "|(?<=[\u0e00-\u0e7f])(?=\\s+[\u0e00-\u0e7f])"  # a space is the comma of Thai
)
# A period that ends no sentence: of an initial, an ordinal (German "3. Oktober") or a title.
_ABBREVIATED = re.compile(rf"\b(?:[A-Za-zÀ-ɏА-я]|\d\d?|{_ABBREVIATIONS})\.$")


def split_sentences(text: str) -> list[str]:
    """The sentences of a stripped text, which put together are the text; none if it is empty.

    Each begins with the white space before it. One wider than 120 columns is cut at commas too.
    Marks tell sentences apart, not grammar: "approx. Six" makes two.
    """
    ends = (match.end() for match in _SENTENCE_END.finditer(text) if _ends_sentence(match))
    sentences = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    return [clause for sentence in sentences if sentence for clause in _clauses(sentence)]


def _ends_sentence(mark: re.Match[str]) -> bool:
    before, after = mark.string[max(0, mark.end() - 8) : mark.end()], mark.string[mark.end() :]
    next_char = after.lstrip()[:1]
    return bool(next_char) and not next_char.islower() and not _ABBREVIATED.search(before)


def _clauses(sentence: str) -> list[str]:
    """A sentence, cut at the comma nearest to its middle for as long as it is too wide."""
    matches = _CLAUSE_END.finditer(sentence)
    ends = [match.end() for match in matches if match.end() < len(sentence)]
    if display_width(sentence) <= _LONG_SENTENCE or not ends:
        return [sentence]
    end = _nearest_middle(sentence, ends)
    return [*_clauses(sentence[:end]), *_clauses(sentence[end:])]


def _nearest_middle(parts: Sequence[str], cuts: Iterable[int]) -> int:
    """That of the cuts, indices into the parts, whose sides are the most equal in width."""
    widths = [0, *accumulate(map(display_width, parts))]
    return min(cuts, key=lambda cut: abs(2 * widths[cut] - widths[-1]))


# subtitles ----------------------------------------------------------------------------------

_CLAUSE_MARKS = ",;:.!?…،؛؟۔।，、；：。！？"
_NO_LINE_START = "、。，．！？：；）」』】》〉”’…・ー々ぁぃぅぇぉっゃゅょァィゥェォッャュョ),.!?:;%"
_NO_LINE_END = "（「『【《〈“‘("


_Span: TypeAlias = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True)
class _Mark:
    """A word in a text: which of its visible characters, and when."""

    first: int
    end: int
    span: _Span


@dataclass(frozen=True)
class _Block:
    """What one subtitle shows: atoms, when each is said, and where the words are in them."""

    atoms: list[str]
    spans: list[_Span]
    marks: list[_Mark]


@dataclass(frozen=True)
class _Cue:
    start_ms: int
    end_ms: int
    lines: list[str]
    mark: _Mark | None = None  # the word that is shown underlined


def _cues(
    transcript: Transcript,
    *,
    max_line_width: int = MAX_LINE_WIDTH,
    max_line_count: int = MAX_LINE_COUNT,
    highlight_words: bool = False,
) -> Iterator[_Cue]:
    """The segments laid out as subtitles: in order, never two at once, each at least 1 ms.

    A segment that does not fit into one cue, or lasts longer than 7 s, is cut in halves, at a
    comma if one is near. A half lasts from its first word to its last; where words have no times,
    the time is shared by width. A cue stays for a second where the next one leaves the room, and
    for 7 s at most. With ``highlight_words`` it comes once for each of its words, underlined, and
    without between them.

    Raises ValueError for lines of less than two columns, or none.
    """
    if max_line_width < 2 or max_line_count < 1:
        raise ValueError(f"no text fits {max_line_count} line(s) of {max_line_width} column(s).")
    blocks = [
        block
        for segment in transcript.segments
        if (atoms := _atoms(segment.text, max_line_width))
        for block in _blocks(_block(atoms, segment), max_line_width, max_line_count)
    ]
    limits = [*(block.spans[0][0] for block in blocks[1:]), transcript.duration]
    shown_until = 0
    for block, limit in zip(blocks, limits, strict=False):
        start, end = block.spans[0][0], block.spans[-1][1]
        end = min(max(end, min(start + MIN_CUE_S, limit)), start + MAX_CUE_S)
        start_ms = max(round(1000 * start), shown_until)
        shown_until = max(round(1000 * end), start_ms + 1)
        cue = _Cue(start_ms, shown_until, _balanced_lines(block.atoms, max_line_width))
        yield from _highlighted(cue, block.marks) if highlight_words else [cue]


def _highlighted(cue: _Cue, marks: Iterable[_Mark]) -> Iterator[_Cue]:
    """A cue cut where its words begin and end."""
    shown_until = cue.start_ms
    for mark in marks:
        start, end = (min(max(round(1000 * t), shown_until), cue.end_ms) for t in mark.span)
        if shown_until < start:
            yield _Cue(shown_until, start, cue.lines)
        if start < end:
            yield _Cue(start, end, cue.lines, mark)
        shown_until = end
    if shown_until < cue.end_ms:
        yield _Cue(shown_until, cue.end_ms, cue.lines)


def _atoms(text: str, width: int) -> list[str]:
    """What stays on one line: words after a space, ideographs with the punctuation around them.

    White space becomes one space. A word that is wider than a line makes several atoms.
    """
    atoms: list[str] = []
    for char in _one_line(text):
        last = atoms[-1] if atoms else ""
        fits = not _columns(char) or display_width(last.lstrip() + char) <= width
        if last and fits and not _may_break(last[-1], char):
            atoms[-1] += char
        else:
            atoms.append(char)
    return atoms


def _may_break(left: str, right: str) -> bool:
    """Whether a line may end between two characters."""
    if left == " " or right == " ":
        return right == " "
    may = left not in _NO_LINE_END and right not in _NO_LINE_START and _columns(right) > 0
    return may and (_is_ideograph(left) or _is_ideograph(right))


def _is_ideograph(char: str) -> bool:
    """Whether it is full-width and written without spaces, unlike Korean."""
    return _columns(char) == 2 and not "\uac00" <= char <= "\ud7a3"


def _visible(text: str) -> int:
    """Characters that are not white space, whose number no layout changes."""
    return sum(not char.isspace() for char in text)


def _block(atoms: list[str], segment: Segment) -> _Block:
    """A whole segment; an atom is said when its words are, or as long as its width says."""
    edges = list(accumulate(map(_visible, atoms), initial=0))
    words = [word for word in segment.words or () if _visible(word.word)]
    word_edges = list(accumulate((_visible(word.word) for word in words), initial=0))
    if not words or word_edges[-1] != edges[-1]:
        widths = [0, *accumulate(max(1, display_width(atom)) for atom in atoms)]
        length = (segment.end - segment.start) / widths[-1]
        times = [segment.start + length * width for width in widths]
        return _Block(atoms, list(pairwise(times)), [])
    marks = [
        _Mark(first, end, (word.start, word.end))
        for word, (first, end) in zip(words, pairwise(word_edges), strict=True)
    ]
    chars = [span for mark in marks for span in _shares(mark)]
    spans = [(chars[first][0], chars[end - 1][1]) for first, end in pairwise(edges)]
    return _Block(atoms, spans, marks)


def _shares(mark: _Mark) -> Iterator[_Span]:
    """When each character of a word is said, for a word that is wider than a line."""
    (start, end), count = mark.span, mark.end - mark.first
    edges = [start + (end - start) * i / count for i in range(count + 1)]
    return pairwise(edges)


def _blocks(block: _Block, width: int, count: int) -> Iterator[_Block]:
    """A block, cut until each part fits into one cue."""
    atoms, spans = block.atoms, block.spans
    fits = len(_wrap(atoms, width)) <= count and spans[-1][1] - spans[0][0] <= MAX_CUE_S
    if fits or len(atoms) == 1:
        yield block
        return
    margin = len(atoms) // 4
    near = range(margin + 1, len(atoms) - margin)
    clause_ends = [cut for cut in near if atoms[cut - 1][-1] in _CLAUSE_MARKS]
    cut = _nearest_middle(atoms, clause_ends or range(1, len(atoms)))
    for half in _halves(block, cut):
        yield from _blocks(half, width, count)


def _halves(block: _Block, cut: int) -> tuple[_Block, _Block]:
    """The atoms before and after the cut; a word that it goes through is in both."""
    middle = sum(map(_visible, block.atoms[:cut]))
    left = [replace(m, end=min(m.end, middle)) for m in block.marks if m.first < middle]
    right = [
        replace(m, first=max(m.first - middle, 0), end=m.end - middle)
        for m in block.marks
        if m.end > middle
    ]
    return (
        _Block(block.atoms[:cut], block.spans[:cut], left),
        _Block(block.atoms[cut:], block.spans[cut:], right),
    )


def _wrap(atoms: list[str], width: int) -> list[str]:
    """Lines, each as full as it gets."""
    lines = [""]
    for atom in atoms:
        if lines[-1] and display_width(lines[-1] + atom) > width:
            lines.append("")
        lines[-1] += atom if lines[-1] else atom.lstrip(" ")
    return lines


def _balanced_lines(atoms: list[str], width: int) -> list[str]:
    """No more lines than ``_wrap`` needs, of the least width that does."""
    count = len(_wrap(atoms, width))
    fair = min(width, -(-display_width("".join(atoms)) // count))
    wraps = (_wrap(atoms, narrower) for narrower in range(fair, width + 1))
    return next(lines for lines in wraps if len(lines) <= count)


# formats ------------------------------------------------------------------------------------
#
# A ``layout`` is what ``_cues`` takes: max_line_width, max_line_count, highlight_words.


def _txt(transcript: Transcript) -> str:
    return transcript.text + "\n"


def _json(transcript: Transcript) -> str:
    """An object with these keys, always; a segment has the fields that were measured.

    text, language (null if nobody speaks), languages, duration, segments, warnings
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
    """OpenAI's format of this name, in which every field of a segment is there and no null.

    A confidence that was not measured is 0.0, and ``unmeasured`` lists its name: that nobody
    speaks cannot be said in a forced language. ``seek`` is the start in frames of 10 ms.
    ``language`` is in small letters, as OpenAI has it, and "" if nobody speaks.
    """
    segments = transcript.segments
    words = list(map(asdict, transcript.words))
    confidences = ("avg_logprob", "no_speech_prob")
    unmeasured = [c for c in confidences if any(getattr(s, c) is None for s in segments)]
    return _dumps(
        {
            "task": "transcribe",
            "language": (transcript.language or "").lower(),
            "languages": [{"code": language_code(name) or name} for name in transcript.languages],
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
    """What ``FORMATS["verbose_json"]``, or another server of OpenAI's route, wrote.

    Raises ValueError for what is no such document.
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
    words = [Word(w["word"], w["start"], w["end"]) for w in row.get("words") or ()]
    return Segment(
        start=float(row["start"]),
        end=float(row["end"]),
        text=str(row["text"]),
        language=_model_language(row["language"] if "language" in row else language),
        language_probability=row.get("language_probability"),
        words=tuple(words) or None,
        **measured,
    )


def _with_words(segments: Sequence[Segment], rows: Iterable[dict[str, Any]]) -> Iterator[Segment]:
    """Segments with those of a document's words that tile them, as ours do."""
    words = [Word(row["word"], row["start"], row["end"]) for row in rows]
    for segment in segments:
        ends = accumulate(len(word.word) for word in words)
        number = next((n for n, end in enumerate(ends, 1) if end >= len(segment.text)), 0)
        said, rest = tuple(words[:number]), words[number:]
        if said and "".join(word.word for word in said) == segment.text:
            segment, words = replace(segment, words=said), rest
        yield segment


def _model_language(language: str | None) -> str | None:
    try:
        return resolve_language(language)
    except ValueError:  # another model's
        return language


def rounded(transcript: Transcript) -> Transcript:
    """With times and ratios as they are written, and without the tokens, which are not: the same
    as a transcript that was written and read again."""
    segments = tuple(map(_rounded_segment, transcript.segments))
    return replace(transcript, duration=round(transcript.duration, 3), segments=segments)


def _rounded_segment(segment: Segment) -> Segment:
    numbers = {name: _rounded(x) for name, x in vars(segment).items() if isinstance(x, float)}
    words = segment.words and tuple(Word(**_rounded(vars(word))) for word in segment.words)
    return replace(segment, **numbers, words=words, tokens=None)


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
        **_measured([("language_probability", segment.language_probability)]),
        **({"words": [asdict(word) for word in segment.words]} if segment.words else {}),
    }


def diarized_json(transcript: Transcript) -> str:
    """OpenAI's format of this name: who said what."""
    return _dumps(
        {
            "task": "transcribe",
            "duration": transcript.duration,
            "text": transcript.text,
            "segments": [
                {
                    "type": "transcript.text.segment",
                    "id": f"seg_{index}",
                    "start": segment.start,
                    "end": segment.end,
                    "speaker": segment.speaker,
                    "text": segment.text,
                    "language": segment.language,
                }
                for index, segment in enumerate(transcript.segments)
            ],
            "usage": {"type": "duration", "seconds": transcript.duration},
        }
    )


def logprobs(tokens: Iterable[Token]) -> list[dict[str, Any]]:
    """OpenAI's list of this name."""
    return [
        {
            "token": token.text,
            "logprob": token.logprob,
            "bytes": list(token.text.encode(errors="replace")),
        }
        for token in tokens
    ]


def _srt(transcript: Transcript, **layout: Any) -> str:
    """SubRip. It has no escapes, so an arrow, which parsers look for, becomes another one."""
    return "\n".join(
        f"{number}\n{_span(cue, ',')}\n{_lines(cue, lambda text: text.replace('-->', '→'))}\n"
        for number, cue in enumerate(_cues(transcript, **layout), 1)
    )


def _vtt(transcript: Transcript, **layout: Any) -> str:
    """WebVTT, with &, < and > escaped."""
    escape = partial(html.escape, quote=False)
    blocks = (f"{_span(cue, '.')}\n{_lines(cue, escape)}\n" for cue in _cues(transcript, **layout))
    return "\n".join(["WEBVTT\n", *blocks])


def _tsv(transcript: Transcript) -> str:
    """Whisper's table of segments: start and end in milliseconds, text."""
    rows = (
        f"{round(1000 * s.start)}\t{round(1000 * s.end)}\t{_one_line(s.text)}\n"
        for s in transcript.segments
    )
    return "start\tend\ttext\n" + "".join(rows)


def _lrc(transcript: Transcript, *, highlight_words: bool = False) -> str:
    """Lyrics: a line for each segment, after its start as [minutes:seconds].

    With ``highlight_words``, each word has its start before it as <minutes:seconds>, and the line
    its end after it: the enhanced format of karaoke players.
    """
    lines = (
        _sung(s) if highlight_words and s.words else _one_line(s.text) for s in transcript.segments
    )
    starts = (f"[{_lrc_time(segment.start)}]" for segment in transcript.segments)
    return "".join(f"{start}{line}\n" for start, line in zip(starts, lines, strict=True))


def _sung(segment: Segment) -> str:
    words = segment.words or ()
    sung = "".join(f" <{_lrc_time(w.start)}> {_one_line(w.word)}" for w in words)
    return f"{sung} <{_lrc_time(segment.end)}>"


def _dumps(document: dict[str, Any]) -> str:
    """JSON for people, with times and ratios to three decimals."""
    return json.dumps(_rounded(document), ensure_ascii=False, indent=2) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


def _measured(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in fields if value is not None}


def _lines(cue: _Cue, escape: Callable[[str], str]) -> str:
    """The text of a cue, with its marked word in <u>."""
    text = "\n".join(cue.lines)
    if cue.mark is None:
        return escape(text)
    visible = [i for i, char in enumerate(text) if not char.isspace()]
    first, end = visible[cue.mark.first], visible[cue.mark.end - 1] + 1
    return f"{escape(text[:first])}<u>{escape(text[first:end])}</u>{escape(text[end:])}"


def _span(cue: _Cue, point: str) -> str:
    return f"{_clock(cue.start_ms, point)} --> {_clock(cue.end_ms, point)}"


def _clock(milliseconds: int, point: str) -> str:
    """Hours, minutes, seconds: 01:02:03,456."""
    seconds, milliseconds = divmod(milliseconds, 1000)
    hours, minutes = divmod(seconds // 60, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds % 60:02d}{point}{milliseconds:03d}"


def _lrc_time(seconds: float) -> str:
    minutes, hundredths = divmod(round(100 * seconds), 6000)
    return f"{minutes:02d}:{hundredths // 100:02d}.{hundredths % 100:02d}"


def _one_line(text: str) -> str:
    return " ".join(text.split())


FORMATS: dict[str, Callable[..., str]] = {
    "txt": _txt,
    "json": _json,
    "srt": _srt,
    "vtt": _vtt,
    "tsv": _tsv,
    "lrc": _lrc,
    "verbose_json": _verbose_json,
}
SUBTITLES = ("srt", "vtt")  # which also take max_line_width and max_line_count
KARAOKE = (*SUBTITLES, "lrc")  # which also take highlight_words
