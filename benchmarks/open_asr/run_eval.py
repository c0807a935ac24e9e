# SPDX-License-Identifier: Apache-2.0
"""What does the Open ASR Leaderboard measure of a checkpoint? WER and RTFx of one English set.

    python benchmarks/open_asr/run_eval.py --model_id Qwen/Qwen3-ASR-0.6B --dataset ami_cleaned
    python benchmarks/open_asr/run_eval.py --model tests/checkpoints/asr --dtype float32 \\
        --manifest tests/data/heldout/manifest.jsonl --batch_size 8

The first form needs ``datasets`` and the leaderboard's package ``normalizer``, which loads the set,
writes the results and scores them. The second takes a manifest, or a folder with a text beside each
recording (``a.wav``, ``a.txt``), and needs neither; recordings in other languages are left out.
Results go to ``results/``, with texts as the model wrote them; ``qwen3-asr eval --open-asr
--pred-text results/*.jsonl`` scores them again. The time is that of inference on decoded audio,
batch by batch. The warm-up transcribes its clips without their first 10 ms, so that no cache knows
those that are timed. Other options go to vLLM's engine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.cli import models
from qwen3_asr_vllm.corpus import leaderboard
from qwen3_asr_vllm.corpus.evaluation import reference_text, stated_language
from qwen3_asr_vllm.corpus.sources import find_recordings
from qwen3_asr_vllm.geometry import SAMPLE_RATE
from qwen3_asr_vllm.recordings import Recording

RESULTS = Path("results")  # where the leaderboard's package writes, too

Row = dict[str, Any]


@dataclass(frozen=True)
class Clip:
    """One recording of a set, with its text as written."""

    name: str
    text: str
    waveform: np.ndarray  # (samples,), float32, 16 kHz


@dataclass(frozen=True)
class EvalSet:
    """A set: decodes its clips anew for each pass, and writes and scores results."""

    clips: Callable[[], Iterator[Clip]]
    finish: Callable[[list[Row]], None]


def main(arguments: list[str] | None = None) -> None:
    args, rest = parser().parse_known_args(arguments)
    load_set = local_set if args.manifest else hub_set
    run(args, load_set(args), load_model(args, rest))


def run(args: argparse.Namespace, evaluated: EvalSet, model: Any) -> None:
    most = args.max_eval_samples if args.max_eval_samples > 0 else None
    for batch in batches(islice(evaluated.clips(), most), args.batch_size, args.warmup_steps):
        transcribe(model, [clip.waveform[SAMPLE_RATE // 100 :] for clip in batch])
    rows: list[Row] = []
    for batch in batches(islice(evaluated.clips(), most), args.batch_size):
        rows += results(model, batch)
    if not rows:
        raise SystemExit("the set has no English recording with a text.")
    evaluated.finish(rows)


def batches(clips: Iterator[Clip], size: int, most: int | None = None) -> Iterator[list[Clip]]:
    """Yield lists of ``size`` clips, at most ``most`` of them."""
    return islice(iter(lambda: list(islice(clips, size)), []), most)


def results(model: Any, batch: list[Clip]) -> list[Row]:
    """Return the rows of a batch; each has an equal share of the batch's seconds."""
    start = time.perf_counter()
    texts = transcribe(model, [clip.waveform for clip in batch])
    share_s = (time.perf_counter() - start) / len(batch)
    return [
        {
            "audio_filepath": clip.name,
            "duration": len(clip.waveform) / SAMPLE_RATE,
            "time": share_s,
            "text": clip.text,
            "pred_text": text,
        }
        for clip, text in zip(batch, texts, strict=True)
    ]


def transcribe(model: Any, waveforms: list[np.ndarray]) -> list[str]:
    """Return the texts. Raises the error of a clip that failed: without it, no score is right."""
    texts = []
    for result in model.transcribe(waveforms, language="English"):
        if result.error is not None:
            raise result.error
        texts.append(result.transcript.text)
    return texts


def load_model(args: argparse.Namespace, rest: list[str]) -> Any:
    models.set_defaults(models.TRANSCRIBE_ENVIRONMENT)
    if args.device >= 0:
        models.set_defaults({"CUDA_VISIBLE_DEVICES": str(args.device)})
    return models.load_model(args.model_id, models.engine_options("eval", rest))


# sets ----


def local_set(args: argparse.Namespace) -> EvalSet:
    """Return the English recordings of a manifest or folder that the leaderboard would score."""
    found = find_recordings([args.manifest])
    texts = {recording: text_of(recording) for recording in found if is_english(recording)}
    scored = {r: text for r, text in texts.items() if leaderboard.is_scored(text)}
    print(f"{len(scored)} of {len(found)} recordings are in English and have a text")

    def clips() -> Iterator[Clip]:
        for recording, text in scored.items():
            yield Clip(str(recording), text, recording.load())

    def finish(rows: list[Row]) -> None:
        split = Path(args.manifest).resolve()
        where = {"dataset": "local", "name": split.parent.name, "split": split.stem}
        path = leaderboard.write_manifest(RESULTS, rows, model=args.model_id, **where)
        score = leaderboard.score(str(path), rows)
        print(f"Results saved at path: {path.resolve()}")
        print(f"WER: {score.wer} % RTFx: {score.rtfx}")

    return EvalSet(clips, finish)


def is_english(recording: Recording) -> bool:
    return stated_language(recording.row) in (None, "English")


def text_of(recording: Recording) -> str:
    """Return the text of the manifest, or of the .txt beside a recording; "" without one."""
    beside = Path(recording.source).with_suffix(".txt")
    text = reference_text(recording.row)
    return text if text is not None else beside.read_text("utf-8") if beside.is_file() else ""


def hub_set(args: argparse.Namespace) -> EvalSet:
    """Return a set of the Hub, through the leaderboard's own package."""
    try:
        from datasets import Audio
        from normalizer import data_utils
        from normalizer.eval_utils import score_results
    except ImportError as error:
        message = f"{error}: a set of the Hub needs datasets and the leaderboard's normalizer/"
        raise SystemExit(f"{message} on PYTHONPATH; --manifest needs neither.") from error
    if args.dataset is None:
        raise SystemExit("give --dataset, the name of a set such as ami_cleaned, or --manifest.")
    dataset = data_utils.prepare_data(data_utils.load_data(args))
    dataset = dataset.cast_column("audio", Audio(decode=False))  # decoded as qwen3-asr does

    def clips() -> Iterator[Clip]:
        for index, row in enumerate(dataset):
            name = row.get("id") or row.get("file_name") or f"sample_{index}"
            source = row["audio"]["bytes"] or row["audio"]["path"]
            yield Clip(str(name), row["original_text"], load_audio(source))

    def finish(rows: list[Row]) -> None:
        path = data_utils.write_manifest(
            column(rows, "text"),
            column(rows, "pred_text"),
            args.model_id,
            args.dataset_path,
            args.dataset,
            args.split,
            audio_length=column(rows, "duration"),
            transcription_time=column(rows, "time"),
            audio_filepaths=column(rows, "audio_filepath"),
        )
        print(f"Results saved at path: {Path(path).resolve()}")
        score_results(str(Path(path).parent), args.model_id)

    return EvalSet(clips, finish)


def column(rows: Iterable[Row], name: str) -> list[Any]:
    return [row[name] for row in rows]


# options, with the names that all entries of the leaderboard have ----


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model_id", "--model", required=True, help="checkpoint: a name on the Hub, or a folder")
    add("--manifest", help="a manifest or folder, instead of a set of the Hub")
    add("--dataset_path", default="hf-audio/open-asr-leaderboard", help="repository of the set")
    add("--dataset", help="name of the set; empty where the repository has only one")
    add("--split", default="test")
    add("--device", type=int, default=-1, help="index of the GPU; default: vLLM chooses")
    add("--batch_size", type=int, default=1024, help="clips that the engine gets at once")
    add("--max_eval_samples", type=int, default=-1, help="use only the first so many clips")
    add("--warmup_steps", type=int, default=1, help="batches to transcribe before the timed ones")
    parser.set_defaults(streaming=False)  # for the leaderboard's load_data: download a set first
    return parser


if __name__ == "__main__":
    main()
