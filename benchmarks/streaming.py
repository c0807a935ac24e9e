# SPDX-License-Identifier: Apache-2.0
"""What does streaming cost, does it grow with the length, and which text does it give?

    python benchmarks/streaming.py                                # all four questions
    python benchmarks/streaming.py --parts encode sessions
    python benchmarks/streaming.py --parts hour --minutes 10

* ``encode``: speech fed in steps of 2 s. Audio seconds that the encoder was given, as the engine
  counts them (``work.py``), and how much of the prompts the prefix cache held; for our windows, and
  for the whole clip fed again at every step, which is ``fewer`` times as much. Both must take as
  many steps to the same text.
* ``hour``: many minutes of speech fed faster than it would be spoken. Milliseconds of a step in
  the last part over those in the first: 1 is flat.
* ``sessions``: so many streams, a step of each at a time in one batch. They keep up where a round
  takes less than a step.
* ``words``: error rate of the streams' text and of ``transcribe`` on the same recordings.

All of it on the tiny checkpoint through ``LLM``, whose engine is a process of its own. The clock
means something only on a quiet machine; the counts do everywhere. Each part prints its table, and
a JSON line of all parts so far.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import jiwer
import numpy as np
import soundfile
from common import QUIET, print_result, print_table
from support.audio import HELDOUT, SAMPLE_RATE, speech
from support.checkpoints import CHECKPOINT
from work import COUNTED, EngineWork, UnequalWork

STEP_S = 2.0


class Bench:
    """The model, and its engine's counts."""

    def __init__(self, args: argparse.Namespace) -> None:
        from qwen3_asr_vllm import Qwen3ASR

        self.args = args
        self.model = Qwen3ASR(
            str(CHECKPOINT),
            dtype="float32",
            max_model_len=8192,
            max_num_seqs=64,
            block_size=args.block_size,
            **COUNTED,
        )
        self.count = EngineWork(self.model.llm)

    def stream(self, *, clip_s: float, step_s: float = STEP_S) -> Any:
        options = {"language": None, "context": "", "step_s": step_s, "clip_s": clip_s}
        return self.model._stream(**options, max_clip_s=2 * clip_s)

    def generate(self, requests: list[Any], prompts: list[dict[str, Any]]) -> list[Any]:
        from qwen3_asr_vllm.engine import sampling_params

        params = [sampling_params(request.decoding, {}) for request in requests]
        return self.model.llm.generate(prompts, params, use_tqdm=False)

    def run(
        self,
        stream: Any,
        waveform: np.ndarray,
        *,
        prompt_of: Callable[[Any, Any], dict[str, Any]],
        on_step: Callable[[Any], None] = lambda output: None,
    ) -> str:
        """All text of a stream that is fed a step at a time."""
        for piece in pieces(waveform):
            stream.push(piece)
            self.answer(stream, prompt_of, on_step)
        stream.finish()
        self.answer(stream, prompt_of, on_step)
        return stream.text

    def answer(self, stream: Any, prompt_of: Any, on_step: Any) -> None:
        while request := stream.request():
            (output,) = self.generate([request], [prompt_of(stream, request)])
            on_step(output)
            stream.accept(output.outputs[0].text, output.outputs[0].finish_reason)


def pieces(waveform: np.ndarray) -> Iterator[np.ndarray]:
    size = round(STEP_S * SAMPLE_RATE)
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


def as_windows(stream: Any, request: Any) -> dict[str, Any]:
    return dict(request.engine_prompt)


def as_whole(stream: Any, request: Any) -> dict[str, Any]:
    """The same request with the whole clip as one item, as it is fed again elsewhere."""
    prompt = re.sub(r"(<\|audio_pad\|>)+", "<|audio_pad|>", request.prompt)
    clip = stream._clip.samples[: stream._sent].copy()
    return {"prompt": prompt, "multi_modal_data": {"audio": [clip]}}


def measure_encode(bench: Bench) -> list[dict[str, Any]]:
    rows, texts = [], {}
    for seconds in (60, 120):
        for name, prompt_of in {"whole clip": as_whole, "windows": as_windows}.items():
            waveform = speech(seconds + 0.0025, seed=seconds)
            before, seen = bench.count.work, []
            text = bench.run(
                bench.stream(clip_s=600), waveform, prompt_of=prompt_of, on_step=seen.append
            )
            work = bench.count.work - before
            prompt = sum(len(output.prompt_token_ids) for output in seen)
            cached = sum(output.num_cached_tokens for output in seen)
            texts[seconds, name] = text
            rows.append(
                {
                    "audio s": seconds,
                    "fed as": name,
                    "steps": len(seen),
                    "encoded s": work.encoded_s,
                    "tokens": work.tokens,
                    "prompt tokens": prompt,
                    "of them cached": cached / prompt,
                    "same text": text == texts[seconds, "whole clip"],
                }
            )
        whole, windows = rows[-2:]
        if whole["steps"] != windows["steps"] or not windows["same text"]:
            raise UnequalWork(f"unequal work at {seconds} s: other steps, or other texts")
        whole["fewer"], windows["fewer"] = 1.0, whole["encoded s"] / windows["encoded s"]
    return rows


def measure_hour(bench: Bench) -> list[dict[str, Any]]:
    """Every ten minutes are the same speech with other noise, so that they can be compared."""
    minutes = bench.args.minutes
    times: list[float] = []
    rng = np.random.default_rng(0)
    stream = bench.stream(clip_s=bench.args.clip_s)
    started = time.monotonic()
    for minute in range(minutes):
        said = speech(60.0, seed=minute % 10)
        for piece in pieces(said + 1e-4 * rng.standard_normal(len(said)).astype(np.float32)):
            stream.push(piece)
            before = time.perf_counter()
            bench.answer(stream, as_windows, lambda output: None)
            times.append(1000 * (time.perf_counter() - before))
        if time.monotonic() - started > bench.args.budget_s:
            minutes = minute + 1
            break
    count = round(600 / STEP_S) if minutes > 20 else len(times) // 4
    parts = [times[start : start + count] for start in range(0, len(times) - count + 1, count)]
    medians = [statistics.median(part) for part in parts]
    row = {
        "minutes": minutes,
        "steps": len(times),
        "medians ms": " ".join(f"{median:.0f}" for median in medians),
        "last / first": medians[-1] / medians[0],
        "p95 ms": float(np.percentile(times, 95)),
        "x real time": minutes * 60 / (time.monotonic() - started),
        "characters": len(stream.text),
    }
    return [row]


def measure_sessions(bench: Bench) -> list[dict[str, Any]]:
    rows = []
    for count in bench.args.sessions:
        streams = [bench.stream(clip_s=bench.args.clip_s) for _ in range(count)]
        # No clip twice, for the engine would know it again.
        waveforms = [speech(bench.args.session_s, seed=1000 * count + i) for i in range(count)]
        rounds = []
        for step in zip(*map(pieces, waveforms), strict=True):
            before = time.perf_counter()
            asked = []
            for stream, piece in zip(streams, step, strict=True):
                stream.push(piece)
                if request := stream.request():
                    asked.append((stream, request))
            if not asked:  # the first step ends 40 samples after the first piece
                continue
            outputs = bench.generate(
                [request for _, request in asked], [r.engine_prompt for _, r in asked]
            )
            for (stream, _), output in zip(asked, outputs, strict=True):
                stream.accept(output.outputs[0].text, output.outputs[0].finish_reason)
            rounds.append(time.perf_counter() - before)
        median, worst = statistics.median(rounds), float(np.percentile(rounds, 95))
        rows.append(
            {
                "sessions": count,
                "round median s": median,
                "p95 s": worst,
                "keeps up": worst < STEP_S,
                "load": os.getloadavg()[0],
            }
        )
    return rows


def measure_words(bench: Bench) -> list[dict[str, Any]]:
    lines = (HELDOUT / "manifest.jsonl").read_text().splitlines()
    manifest = [json.loads(line) for line in lines]
    rows = []
    for language in ("English", "German", "Chinese"):
        chosen = [row for row in manifest if row["language"] == language][:: bench.args.every]
        expected = [row["text"] for row in chosen]
        paths = [HELDOUT / row["audio_filepath"] for row in chosen]
        offline = [bench.model.transcribe(path).text for path in paths]
        streamed = [
            bench.run(
                bench.stream(clip_s=bench.args.clip_s),
                soundfile.read(path, dtype="float32")[0],
                prompt_of=as_windows,
            )
            for path in paths
        ]
        rate = jiwer.cer if language == "Chinese" else jiwer.wer
        rows.append(
            {
                "language": language,
                "recordings": len(chosen),
                "errors offline": rate(*map(normalized, (expected, offline))),
                "errors streamed": rate(*map(normalized, (expected, streamed))),
                "same text": sum(a == b for a, b in zip(offline, streamed, strict=True)),
            }
        )
    return rows


def normalized(texts: list[str]) -> list[str]:
    return [re.sub(r"[^\w\s]", "", text.lower()) for text in texts]


PARTS = {
    "encode": measure_encode,
    "words": measure_words,
    "sessions": measure_sessions,
    "hour": measure_hour,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--minutes", type=int, default=60)
    parser.add_argument("--budget-s", type=float, default=3600, help="for hour, which then ends")
    parser.add_argument(
        "--clip-s", type=float, default=6.0, help="the tiny model was trained on up to 12 s"
    )
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 8, 16, 32])
    parser.add_argument("--session-s", type=float, default=30.0)
    parser.add_argument("--every", type=int, default=1, help="of the recordings of words")
    parser.add_argument("--block-size", type=int, default=32, help="tokens of a KV cache block")
    args = parser.parse_args()
    os.environ.update(QUIET)
    bench = Bench(args)
    results: dict[str, list[dict[str, Any]]] = {}
    for name in args.parts:
        print(f"\n{name}", flush=True)
        results[name] = PARTS[name](bench)
        print_table(results[name])
        rows = [{"part": part, **row} for part, found in results.items() for row in found]
        print_result("streaming", rows, block_size=args.block_size, clip_s=args.clip_s)


if __name__ == "__main__":
    main()
