# SPDX-License-Identifier: Apache-2.0
"""Does the engine search beams as transformers does, and do probabilities of words find errors?

    python tests/checkpoints/evaluate_engine.py          # needs espeak-ng for the last part

*Beams*: ``equal`` counts the spoken clips of ``tests/data/heldout``, as they are and in noise,
whose text, through vLLM's engine in float32, is transformers' own with the same beams and penalty;
``other`` counts those whose text is not that of greedy decoding. *Cost*: the time of a search
relative to greedy decoding, of all clips together and of one after the other. *Words*: of the
words that are substituted or inserted in held-out sentences, ``found`` counts those with a
probability under 0.5, and ``flagged`` counts them among all words; ``half`` is the percentage of
the words, least probable first, that holds half of the wrong ones. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grammar
import heldout
import jiwer
import numpy as np
from evaluate import CHECKPOINT, Transcriber, normalise

from qwen3_asr_vllm import Qwen3ASR, Transcript, load_audio

ALIGNER = CHECKPOINT.parent / "aligner"
HELDOUT = CHECKPOINT.parents[1] / "data" / "heldout"
SEARCHES = ((4, 1.0), (4, 0.7))  # beams and length penalty
NUM_CLIPS = 50  # half of them in noise
UNSURE = 0.5


def shipped_clips() -> list[heldout.Clip]:
    """Return clips of all languages and voices, as they are and in noise."""
    rows = map(json.loads, (HELDOUT / "manifest.jsonl").read_text().splitlines())
    spoken = [row for row in rows if row["text"]]
    clips = [
        heldout.Clip(load_audio(HELDOUT / row["audio_filepath"]), row["text"], row["language"], "")
        for row in (spoken[i * 2 * len(spoken) // NUM_CLIPS] for i in range(NUM_CLIPS // 2))
    ]
    return [*clips, *map(in_noise, clips)]


def in_noise(clip: heldout.Clip) -> heldout.Clip:
    """Add white noise as loud as the speech: there, beams find other texts."""
    noise = np.random.default_rng(0).standard_normal(len(clip.waveform)) * clip.waveform.std()
    return replace(clip, waveform=(clip.waveform + noise).astype(np.float32))


def timed(model: Qwen3ASR, clips: list[heldout.Clip], **options: Any) -> tuple[list[str], float]:
    """Return the texts of clips that are decoded together, and the seconds."""
    start = time.perf_counter()
    results = model.transcribe([clip.waveform for clip in clips], **options)
    texts = [result.transcript.text for result in results]
    return texts, time.perf_counter() - start


def searches() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield the name of each search, and its options."""
    for width, penalty in SEARCHES:
        names = {"beams": width, "length_penalty": penalty}
        yield names, {"use_beam_search": True, "n": width, "length_penalty": penalty}


def measure_beams(model: Qwen3ASR, clips: list[heldout.Clip]) -> Iterator[dict[str, Any]]:
    greedy, _ = timed(model, clips)
    for names, options in searches():
        texts, _ = timed(model, clips, **options)
        generation = {"num_beams": options["n"], "length_penalty": options["length_penalty"]}
        reference = Transcriber(CHECKPOINT, **generation)(clips)
        yield names | {
            "clips": len(clips),
            "equal": sum(a == b for a, (_, b) in zip(texts, reference, strict=True)),
            "other": sum(a != b for a, b in zip(texts, greedy, strict=True)),
        }


def measure_cost(model: Qwen3ASR, clips: list[heldout.Clip]) -> Iterator[dict[str, Any]]:
    some = clips[::6]

    def seconds(**options: Any) -> tuple[float, float]:
        timed(model, some, **options)  # warm up
        together = min(timed(model, clips, **options)[1] for _ in range(3))
        return together, sum(timed(model, [clip], **options)[1] for clip in some)

    greedy_s, greedy_alone_s = seconds()
    for names, options in searches():
        together_s, alone_s = seconds(**options)
        yield names | {
            "cost": round(together_s / greedy_s, 2),
            "cost one by one": round(alone_s / greedy_alone_s, 2),
        }


def judged_words(transcript: Transcript, clip: heldout.Clip) -> list[tuple[float, bool]]:
    """Return the probability of each word, and whether it is wrong."""
    words = [
        (piece, word.probability)
        for word in transcript.words
        for piece in normalise(word.word).split()
    ]
    expected = normalise(clip.text)
    if clip.language == "Chinese":
        expected = " ".join(expected.replace(" ", ""))
    alignment = jiwer.process_words(expected, " ".join(piece for piece, _ in words))
    wrong = {
        index
        for chunk in alignment.alignments[0]
        if chunk.type in ("substitute", "insert")
        for index in range(chunk.hyp_start_idx, chunk.hyp_end_idx)
    }
    return [(probability, index in wrong) for index, (_, probability) in enumerate(words)]


def half_of_errors(judged: list[tuple[float, bool]]) -> float:
    """Return the percentage of words, least probable first, with half of the wrong ones."""
    ranks = [rank for rank, (_, is_wrong) in enumerate(sorted(judged), 1) if is_wrong]
    return round(100 * ranks[(len(ranks) - 1) // 2] / len(judged), 1) if ranks else 0.0


def measure_words(model: Qwen3ASR, count: int) -> Iterator[dict[str, Any]]:
    for language in grammar.LANGUAGES:
        voices = {"held_out_voices": True, "engine": "espeak"}
        clips = heldout.spoken_clips(language, count=count, **voices)
        clips += heldout.long_clips(language, count=max(8, count // 10))
        options = {"word_timestamps": True, "confidences": True, "max_clip_s": 40}
        results = model.transcribe([clip.waveform for clip in clips], **options)
        judged = [
            word
            for result, clip in zip(results, clips, strict=True)
            for word in judged_words(result.transcript, clip)
        ]
        errors = [probability for probability, is_wrong in judged if is_wrong]
        yield {
            "spoken": language,
            "words": len(judged),
            "wrong": len(errors),
            "found": sum(probability < UNSURE for probability in errors),
            "flagged": sum(probability < UNSURE for probability, _ in judged),
            "half": half_of_errors(judged),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="sentences of each language")
    parser.add_argument("--part", choices=["beams", "cost", "words"], help="default: all")
    args = parser.parse_args()
    engine = {"dtype": "float32", "max_model_len": 4096, "max_num_seqs": 16}
    aligner = str(ALIGNER) if args.part in (None, "words") else None
    model = Qwen3ASR(str(CHECKPOINT), aligner=aligner, **engine)
    rows = []
    for part, measured in (
        ("beams", lambda: measure_beams(model, shipped_clips())),
        ("cost", lambda: measure_cost(model, shipped_clips())),
        ("words", lambda: measure_words(model, args.count)),
    ):
        for row in measured() if args.part in (None, part) else ():
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
