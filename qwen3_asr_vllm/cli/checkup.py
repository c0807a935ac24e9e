# SPDX-License-Identifier: Apache-2.0
"""Checks of a model on recordings that ship with the package: ``qwen3-asr doctor --model MODEL``.

``speech/`` holds a few sentences of a synthesizer, with the text and the times of each word. Each
check returns its finding, or raises an error with the problem.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ..geometry import SAMPLE_RATE
from ..offline import Qwen3ASR
from ..recordings import only
from ..transcript import Transcript
from .models import load_model
from .parity import TOP, compare

FOLDER = Path(__file__).with_name("speech")
MAX_ERROR = 0.25  # of the characters of a language: names are spelled in several ways
MAX_CHANGE = 0.05  # of the characters, between two ways of decoding the same speech
MAX_WORD_S = 0.1  # mean error of word times
PAUSE_S = 0.8  # between the sentences of the long recording
BATCHES = 4  # of all sentences, to measure the throughput


@dataclass(frozen=True)
class Sentence:
    """A recording, float32 at 16 kHz, and what is spoken in it."""

    waveform: np.ndarray
    text: str
    language: str
    words: list[tuple[int, float, float]]  # first character, start and end in seconds


@cache
def sentences() -> tuple[Sentence, ...]:
    """Return the sentences that ship with the package."""
    from ..audio import load_audio

    rows = json.loads((FOLDER / "sentences.json").read_text(encoding="utf-8"))
    return tuple(
        Sentence(load_audio(FOLDER / row.pop("file")), **row | {"words": list(row["words"])})
        for row in rows
    )


def model_checks(
    checkpoint: str, *, aligner: str | None, options: dict[str, Any]
) -> dict[str, Callable[[], str]]:
    """Return checks by name, in order. The first loads the model.

    It raises ConnectionError if that fails: without an engine the others would fail alike.
    """
    loaded: list[Qwen3ASR] = []

    def load() -> str:
        begin = time.perf_counter()
        with_top = {"max_logprobs": TOP} | options | ({"aligner": aligner} if aligner else {})
        try:
            loaded.append(load_model(checkpoint, with_top))
        except Exception as error:  # whatever vLLM raises
            raise ConnectionError(f"{checkpoint} does not load: {error}") from error
        config = loaded[0].llm.model_config
        return f"{checkpoint} in {time.perf_counter() - begin:.0f} s, {config.dtype}"

    checks = {"model": load}
    for name, check in CHECKS.items():
        if name != "word times" or aligner:
            checks[name] = partial(lambda check: check(loaded[0]), check)
    return checks


# the checks ---------------------------------------------------------------------------------


def check_texts(model: Qwen3ASR) -> str:
    """Compare the texts with what the sentences say, by language."""
    rates: dict[str, float] = {}
    for language in dict.fromkeys(sentence.language for sentence in sentences()):
        spoken = [sentence for sentence in sentences() if sentence.language == language]
        texts = [transcript.text for transcript in transcripts(model, spoken)]
        rates[language] = error_rate("".join(s.text for s in spoken), "".join(texts))
        if rates[language] > MAX_ERROR:
            raise RuntimeError(
                f"{rates[language]:.0%} of the characters in {language} are wrong (bound "
                f"{MAX_ERROR:.0%}): {texts[0][:80]!r} instead of {spoken[0].text!r}"
            )
    return "characters wrong: " + ", ".join(f"{n} {rate:.1%}" for n, rate in rates.items())


def check_languages(model: Qwen3ASR) -> str:
    """Compare the detected languages."""
    wrong = [
        f"{transcript.languages} for {sentence.text!r}"
        for sentence, transcript in zip(sentences(), transcripts(model, sentences()), strict=True)
        if list(transcript.languages) != [sentence.language]
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(sentences())} are wrong: {'; '.join(wrong[:3])}")
    return f"{len(sentences())} of {len(sentences())} detected"


def check_silence(model: Qwen3ASR) -> str:
    """Transcribe silence, and faint noise, which is decoded."""
    noise = np.random.default_rng(0).standard_normal(3 * SAMPLE_RATE).astype(np.float32)
    for name, waveform in {"silence": 0 * noise, "noise": 0.01 * noise}.items():
        if text := model.transcribe(waveform).text:
            raise RuntimeError(f"3 s of {name} give the text {text[:80]!r}")
    return "no text from 3 s of silence and 3 s of noise"


def check_word_times(model: Qwen3ASR) -> str:
    """Align the known texts, and compare with the times of the synthesizer."""
    assert model.aligner
    errors: list[float] = []
    for sentence in sentences():
        found = model.aligner.align(sentence.waveform, sentence.text, language=sentence.language)
        starts = {start: (begin, end) for start, begin, end in sentence.words}
        at = 0
        for word in (word for segment in found.segments for word in segment.words or ()):
            at += len(word.word) - len(word.word.lstrip())
            if at in starts:
                begin, end = starts[at]
                errors += [abs(word.start - begin), abs(word.end - end)]
            at += len(word.word.lstrip())
    if not errors:
        raise RuntimeError("no word of the sentences was aligned")
    mean = sum(errors) / len(errors)
    found_text = f"{1000 * mean:.0f} ms off in the mean of {len(errors) // 2} words"
    if mean > MAX_WORD_S:
        raise RuntimeError(f"{found_text} (bound {1000 * MAX_WORD_S:.0f} ms)")
    return found_text


def check_streaming(model: Qwen3ASR) -> str:
    """Compare the text of a stream with the text of the same recording."""
    sentence = max(sentences(), key=lambda sentence: len(sentence.waveform))
    pieces = np.array_split(sentence.waveform, 20)
    streamed = "".join(update.delta for update in model.stream(pieces))
    return same_text("streamed", streamed, "offline", model.transcribe(sentence.waveform).text)


def check_long_recording(model: Qwen3ASR) -> str:
    """Compare a recording that is cut at its pauses with its sentences."""
    pause = np.zeros(round(PAUSE_S * SAMPLE_RATE), np.float32)
    joined = np.concatenate([part for s in sentences() for part in (s.waveform, pause)])
    longest = max(len(sentence.waveform) for sentence in sentences()) / SAMPLE_RATE + PAUSE_S
    whole = model.transcribe(joined, max_clip_s=longest)
    apart = "".join(transcript.text for transcript in transcripts(model, sentences()))
    return same_text(f"{len(joined) / SAMPLE_RATE:.0f} s in one", whole.text, "apart", apart)


def check_transformers(model: Qwen3ASR) -> str:
    """Compare log-probabilities with transformers' classes on the same weights."""
    return compare(model, [sentence.waveform for sentence in sentences()[::3]])


def measure_throughput(model: Qwen3ASR) -> str:
    """Measure a small batch."""
    batch = list(sentences()) * BATCHES
    begin = time.perf_counter()
    transcripts(model, batch)
    seconds = time.perf_counter() - begin
    audio_s = sum(len(sentence.waveform) for sentence in batch) / SAMPLE_RATE
    return f"{audio_s / seconds:.0f} s of audio per second, with {len(batch)} clips at once"


CHECKS: dict[str, Callable[[Qwen3ASR], str]] = {
    "texts": check_texts,
    "languages": check_languages,
    "silence": check_silence,
    "word times": check_word_times,
    "streaming": check_streaming,
    "long recording": check_long_recording,
    "transformers": check_transformers,
    "throughput": measure_throughput,
}

# texts --------------------------------------------------------------------------------------


def transcripts(model: Qwen3ASR, spoken: Sequence[Sentence]) -> list[Transcript]:
    """Transcribe the sentences, all at once. Raises the first error."""
    return [
        only([result]) for result in model.transcribe([sentence.waveform for sentence in spoken])
    ]


def same_text(name: str, text: str, other: str, expected: str) -> str:
    """Raise RuntimeError where two texts differ in more than a few characters."""
    rate = error_rate(expected, text)
    if rate > MAX_CHANGE:
        raise RuntimeError(
            f"{rate:.0%} of the characters change (bound {MAX_CHANGE:.0%}); "
            f"{name}: {text[:80]!r}, {other}: {expected[:80]!r}"
        )
    return f"{name} and {other}: {rate:.1%} of the characters differ"


def error_rate(reference: str, text: str) -> float:
    """Return edits per character of the reference, without case, spaces and punctuation."""
    expected, given = ([c for c in t.casefold() if c.isalnum()] for t in (reference, text))
    row = list(range(len(given) + 1))
    for i, char in enumerate(expected, 1):
        before, row = row, [i]
        for j, other in enumerate(given, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (char != other)))
    return row[-1] / max(1, len(expected))
