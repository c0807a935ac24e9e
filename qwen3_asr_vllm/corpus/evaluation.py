# SPDX-License-Identifier: Apache-2.0
"""Error rates of transcripts against reference texts, per language: WER and CER.

Texts are normalised as for Whisper's evaluations: English in spelling, numbers and contractions,
other languages in case, marks and punctuation. WER counts words; a language written without spaces
has CER only, which counts characters without spaces.
Needs jiwer and whisper-normalizer: pip install 'qwen3-asr-vllm[eval]'.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any

from ..languages import is_spaceless, resolve_language
from ..recordings import Recording, Result
from ..transcript import Transcript

TEXT_FIELDS = ("text", "transcription", "sentence", "transcript")  # reference text of a row
LANGUAGE_FIELDS = ("language", "lang", "locale", "target_lang", "source_lang")


@dataclass(frozen=True)
class Pair:
    """Reference and hypothesis of one recording."""

    reference: str
    hypothesis: str
    language: str | None  # name of the language; None: unknown
    seconds: float


@dataclass(frozen=True)
class Score:
    """Errors of one language. Rates are fractions; None if there are no words or characters."""

    language: str
    recordings: int
    seconds: float
    words: int
    wer: float | None
    characters: int
    cer: float | None
    hallucinated: int  # recordings without speech whose hypothesis has words


def evaluate(pairs: Iterable[Pair]) -> list[Score]:
    """Return a score for each language, sorted by name. Raises ImportError without jiwer."""
    pairs_by_language: dict[str, list[Pair]] = {}
    for pair in pairs:
        pairs_by_language.setdefault(pair.language or "unknown", []).append(pair)
    return [_score(name, pairs_by_language[name]) for name in sorted(pairs_by_language)]


def _score(language: str, pairs: list[Pair]) -> Score:
    normalize = normalizer(language)
    texts = [(normalize(pair.reference), normalize(pair.hypothesis)) for pair in pairs]
    words = [] if is_spaceless(language) else _counts(texts, "process_words")
    characters = _counts([(_joined(r), _joined(h)) for r, h in texts], "process_characters")
    return Score(
        language=language,
        recordings=len(pairs),
        seconds=sum(pair.seconds for pair in pairs),
        words=sum(words[:3]),
        wer=_rate(words),
        characters=sum(characters[:3]),
        cer=_rate(characters),
        hallucinated=sum(not reference and bool(text) for reference, text in texts),
    )


def _counts(texts: list[tuple[str, str]], process: str) -> list[int]:
    """Return hits, substitutions, deletions, insertions; empty references are skipped."""
    spoken = [(reference, text) for reference, text in texts if reference]
    if not spoken:
        return []
    references, hypotheses = map(list, zip(*spoken, strict=True))
    output = getattr(_require("jiwer"), process)(references, hypotheses)
    return [output.hits, output.substitutions, output.deletions, output.insertions]


def _rate(counts: list[int]) -> float | None:
    return sum(counts[1:]) / sum(counts[:3]) if counts else None


def _joined(text: str) -> str:
    return "".join(text.split())


@cache
def normalizer(language: str) -> Callable[[str], str]:
    """Return the usual text normaliser of a language."""
    _require("whisper_normalizer")
    if language == "English":
        from whisper_normalizer.english import EnglishTextNormalizer

        return EnglishTextNormalizer()
    if language in (
        "Hindi",
        "Thai",
    ):  # Whisper's basic normaliser would strip their vowels as accents
        jiwer = _require("jiwer")
        steps = (jiwer.RemovePunctuation(), jiwer.ToLowerCase(), jiwer.RemoveMultipleSpaces())
        return jiwer.Compose([*steps, jiwer.Strip()])
    from whisper_normalizer.basic import BasicTextNormalizer

    return BasicTextNormalizer()


def _require(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise ImportError("to score, do: pip install jiwer whisper-normalizer") from error


def pair(result: Result, *, language: str | None = None) -> Pair:
    """Return the reference and hypothesis of a result with a transcript.

    The language is the row's or, if it has none, ``language`` or that of the transcript.
    """
    recording, transcript = result.source, result.transcript
    assert transcript is not None
    return Pair(
        reference=reference_text(recording.row) or "",
        hypothesis=transcript.text,
        language=stated_language(recording.row) or language or transcript.language,
        seconds=transcript.duration,
    )


def pred_text_results(recordings: Iterable[Recording]) -> list[Result]:
    """Return the ``pred_text`` of each row as a result. Raises ValueError for a row without it."""
    results = []
    for index, recording in enumerate(recordings):
        row = recording.row
        if "pred_text" not in row:
            raise ValueError(f"{recording}: its manifest has no pred_text. Leave --pred-text out.")
        transcript = Transcript(str(row["pred_text"] or ""), float(row.get("duration") or 0))
        results.append(Result(index, recording, transcript=transcript))
    return results


def report(scores: Iterable[Score], *, speed: float | None, failed: int, as_json: bool) -> str:
    """Return a table or JSON. ``speed`` is in seconds of audio per second; None: unknown."""
    scores = list(scores)
    if as_json:
        rows = [asdict(score) for score in scores]
        document = {"scores": rows, "audio_s_per_s": speed, "failed": failed}
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    lines = ["language    recordings    audio s     WER %     CER %  hallucinated"]
    for score in scores:
        lines.append(
            f"{score.language:12}{score.recordings:10}{score.seconds:11.1f}"
            f"{_percent(score.wer):>10}{_percent(score.cer):>10}{score.hallucinated:14}"
        )
    if speed is not None:
        lines.append(f"{speed:.1f} seconds of audio per second")
    if failed:
        lines.append(f"{failed} recordings failed and are not counted")
    return "\n".join(lines) + "\n"


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{100 * rate:.2f}"


def reference_text(row: Mapping[str, Any]) -> str | None:
    """Return the reference text of a row; None if it has none."""
    return next((str(row[name]) for name in TEXT_FIELDS if row.get(name) is not None), None)


def stated_language(row: Mapping[str, Any]) -> str | None:
    """Return the language of a row, by name if known; None if the row has none."""
    stated = next((str(row[name]) for name in LANGUAGE_FIELDS if row.get(name)), None)
    try:
        return resolve_language(stated)
    except ValueError:
        return stated
