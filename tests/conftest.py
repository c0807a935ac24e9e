# SPDX-License-Identifier: Apache-2.0
"""What the tests share: random checkpoints built by transformers, and one vLLM per session."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

# The same examples everywhere, however slow: a busy machine proves nothing wrong. To search for
# others: pytest --hypothesis-profile=search
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
settings.register_profile("search", derandomize=False, max_examples=1000)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where tests serve

IN_TREE: dict[str, str] = {}  # what makes a server vLLM's own
CHECKPOINT = Path(__file__).parent / "checkpoints" / "asr"
ALIGNER = Path(__file__).parent / "checkpoints" / "aligner"
MOST_TIMING_ERROR_S = 0.06  # of a start or end, in the mean: classes of 80 ms give 0.02 at best
DATA = Path(__file__).parent / "data"
# In transformers, and in the checkpoints as published.
PUBLISHED_NAMES = {
    "model.audio_tower.": "thinker.audio_tower.",
    "model.multi_modal_projector.linear_1.": "thinker.audio_tower.proj1.",
    "model.multi_modal_projector.linear_2.": "thinker.audio_tower.proj2.",
    "model.language_model.": "thinker.model.",
    "lm_head.": "thinker.lm_head.",
    "score.": "thinker.lm_head.",
}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "servers have vLLM's own model: what the tests say of in-tree (V1 ...) makes them fail"
    parser.addoption("--in-tree", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--in-tree"):
        stubs = Path(__file__).parent.parent / "benchmarks" / "stubs"  # for torchvision
        IN_TREE.update(VLLM_PLUGINS="", PYTHONPATH=str(stubs))


def noise(seconds: float, *, seed: int = 0) -> np.ndarray:
    """A waveform that is nothing in particular: (samples,) float32 at 16 kHz."""
    rng = np.random.default_rng(seed)
    samples = round(seconds * 16_000)
    swell = np.sin(np.linspace(0, 9 * seconds, samples)) ** 2 + 0.05
    return (0.1 * swell * rng.standard_normal(samples)).astype(np.float32)


HOSTILE = (1e4, 1e10, 1e17, 1e30, 3e38, np.nan, np.inf)  # samples that no speech has


def poisoned(values: Any, value: float) -> Any:
    """A copy of an array or a tensor with ``value`` in its middle."""
    copy = values.copy() if isinstance(values, np.ndarray) else values.clone()
    flat = copy.reshape(-1)
    flat[len(flat) // 2] = value
    return copy


def reference_config(**sizes: Any) -> Any:
    """transformers' own config (the flat layout), small; ``sizes`` override the audio tower."""
    from transformers.models.qwen3_asr import Qwen3ASRConfig

    special = json.loads((CHECKPOINT / "config.json").read_text())["thinker_config"]
    audio = {
        "d_model": 64,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 128,
        "downsample_hidden_size": 16,
        "n_window": 50,
        "n_window_infer": 800,
    } | sizes
    text = {
        "vocab_size": special["text_config"]["vocab_size"],
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    }
    return Qwen3ASRConfig(
        audio_config=audio | {"output_dim": text["hidden_size"]},
        text_config=text | {"model_type": "qwen3", "tie_word_embeddings": True},
        audio_token_id=special["audio_token_id"],
        timestamp_token_id=special["audio_token_id"] + 2,  # <|audio_pad|> <asr_text> <timestamp>
        tie_word_embeddings=True,
    )


def reference_model(config: Any, *, seed: int = 0, num_classes: int = 0) -> Any:
    """transformers' own model with random weights, float32; large enough to disagree by.

    With ``num_classes`` it is a forced aligner.
    """
    import torch
    from transformers.models import qwen3_asr

    torch.manual_seed(seed)
    architecture = qwen3_asr.Qwen3ASRForConditionalGeneration
    if num_classes:
        config.num_labels = num_classes
        architecture = qwen3_asr.Qwen3ASRForTokenClassification
    model = architecture._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.5 * parameter[0].numel() ** -0.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
    return model.eval()


def shipped_reference() -> Any:
    """transformers' own model with the weights of ``CHECKPOINT``, float32."""
    from safetensors.torch import load_file
    from transformers.models.qwen3_asr import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

    thinker = json.loads((CHECKPOINT / "config.json").read_text())["thinker_config"]
    text = {n: v for n, v in thinker["text_config"].items() if not n.startswith("rope")}
    theta = thinker["text_config"]["rope_theta"]
    text |= {
        "model_type": "qwen3",
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    config = Qwen3ASRConfig(
        audio_config={n: v for n, v in thinker["audio_config"].items() if n != "model_type"},
        text_config=text,
        audio_token_id=thinker["audio_token_id"],
        tie_word_embeddings=True,
    )
    model = Qwen3ASRForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    weights = {}
    for name, tensor in load_file(CHECKPOINT / "model.safetensors").items():
        new, old = max(
            (item for item in PUBLISHED_NAMES.items() if name.startswith(item[1])),
            key=lambda item: len(item[1]),
        )
        weights[name.replace(old, new, 1)] = tensor.float()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}  # tied
    model.tie_weights()
    return model.eval()


def save_flat(model: Any, path: Path) -> Path:
    """The layout of ``Qwen/Qwen3-ASR-*-hf``."""
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    model.save_pretrained(path)
    Qwen3ASRFeatureExtractor().save_pretrained(path)
    for name in TOKENIZER_FILES:
        shutil.copy(CHECKPOINT / name, path)
    return path


def save_nested(model: Any, path: Path) -> Path:
    """The layout of ``Qwen/Qwen3-ASR-*``: thinker_config, and tensors under ``thinker.``."""
    from safetensors.torch import save_file

    save_flat(model, path)
    flat = json.loads((path / "config.json").read_text())
    text = flat["text_config"] | {"tie_word_embeddings": flat["tie_word_embeddings"]}
    text["rope_scaling"] = {
        "rope_type": "default",
        "mrope_section": [12, 10, 10],
        "interleaved": True,
    }
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    thinker = {"audio_token_id": flat["audio_token_id"], "audio_config": flat["audio_config"]}
    nested = {
        "architectures": ["Qwen3ASRForConditionalGeneration"],
        "model_type": "qwen3_asr",
        "thinker_config": thinker | {"text_config": text},
    }
    if hasattr(model, "score"):  # a forced aligner, which its publisher names no other way
        nested["timestamp_token_id"] = flat["timestamp_token_id"]
        nested["timestamp_segment_time"] = 80
        nested["thinker_config"] |= {"classify_num": model.num_labels}
    (path / "config.json").write_text(json.dumps(nested))
    tensors = {}
    for name, tensor in model.state_dict().items():
        old = next(old for old in PUBLISHED_NAMES if name.startswith(old))
        tensors[name.replace(old, PUBLISHED_NAMES[old], 1)] = tensor.contiguous().clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def eventually(is_so: Callable[[], Any], *, seconds: float = 600) -> None:
    """Waits until it is; the limit is for what never will be, and not for a slow machine."""
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never was"
        time.sleep(0.05)


def lines_run(function: Callable[[], Any]) -> int:
    """How many lines of Python a call runs: what it costs, on a machine of any speed."""
    lines = 0

    def trace(frame: Any, event: str, arg: Any) -> Any:
        nonlocal lines
        lines += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return lines


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that nobody is given but who asks for it by its number.

    On Linux, a socket that does not listen leaves room for one that does, if both allow it.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


@contextmanager
def on_a_port(app: Any) -> Iterator[str]:
    """An ASGI app, served by a thread; its address."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    if hasattr(app, "state"):
        app.state.server = server  # as vLLM does
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started)
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        yield f"http://{host}:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="session")
def vllm_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, so that vLLM's parallel layers can be built without an engine."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment

    with set_current_vllm_config(VllmConfig()):
        address = f"file://{tmp_path_factory.mktemp('rendezvous')}/store"
        init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield


def heldout() -> list[dict[str, Any]]:
    """What is said in the recordings that training never saw."""
    manifest = (DATA / "heldout" / "manifest.jsonl").read_text()
    return [json.loads(line) for line in manifest.splitlines()]


# Measured on the bundled checkpoint: 3.0, 0.0 and 0.0 % (its card says more).
MOST_ERRORS = {"English": 0.04, "German": 0.02, "Chinese": 0.02}


def error_rate(rows: list[dict[str, Any]], answers: list[str], language: str) -> float:
    """Words wrong, or characters in Chinese, over all recordings of a language."""
    pairs = [
        (r["text"], a) for r, a in zip(rows, answers, strict=True) if r["language"] == language
    ]
    expected, heard = (list(map(_normalize, texts)) for texts in zip(*pairs, strict=True))
    return (jiwer.cer if language == "Chinese" else jiwer.wer)(expected, heard)


def _normalize(text: str) -> str:
    return re.sub(r"[^\w\s]", "", text.lower())


@contextmanager
def engine(model: Path, *, start: Any = None, **options: Any) -> Iterator[Any]:
    """A real vLLM engine on the CPU in float32, in processes of its own.

    ``start``: what makes it from the options, ``vllm.LLM`` or ``Qwen3ASR``.
    """
    from vllm import LLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # ranks outnumber memory nodes
        defaults = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024}
        made = (start or LLM)(str(model), **defaults | {"max_num_seqs": 16} | options)
    try:
        yield made
    finally:
        engines = [made] if start is None else [made, getattr(made, "aligner", None)]
        for owner in filter(None, engines):  # at once, as vLLM's server does
            getattr(owner, "llm", owner).llm_engine.engine_core.shutdown(timeout=0)


@pytest.fixture(scope="session")
def model() -> Iterator[Any]:
    """The one ``Qwen3ASR``, with its aligner, that most tests ask."""
    from qwen3_asr_vllm import Qwen3ASR

    options = {"aligner": str(ALIGNER), "max_model_len": 4096, "enable_mm_embeds": True}
    with engine(CHECKPOINT, start=Qwen3ASR, **options) as made:
        yield made


# Every process of the server notes which addresses it asks for.
NOTE_ADDRESSES = """
import os, sys

def note(event, args):
    if event == "socket.getaddrinfo" or event == "socket.connect":
        address = args[0] if event == "socket.getaddrinfo" else args[1]
        if isinstance(address, tuple):
            address = address[0]
        if isinstance(address, str) and not address.startswith("/"):
            with open(os.environ["ADDRESSES"], "a") as file:
                file.write(f"{address}\\n")

sys.addaudithook(note)
import socket
socket.getaddrinfo("localhost", None)  # shows that notes are taken
"""


@dataclass(frozen=True)
class Server:
    url: str
    log: Path
    addresses: Path
    process: subprocess.Popen[bytes]


@contextmanager
def serving(
    folder: Path,
    *options: str,
    model: Path = CHECKPOINT,
    program: str = "qwen3_asr_vllm.cli serve",
    **env: str,
) -> Iterator[Server]:
    """``qwen3-asr serve`` on a tiny checkpoint, as a user starts it; ends with the block.

    ``program`` may be vLLM's own.
    """
    (folder / "sitecustomize.py").write_text(NOTE_ADDRESSES)
    command = [sys.executable, "-m", *program.split(), str(model)]
    command += "--host 127.0.0.1 --dtype float32 --enforce-eager".split()
    drop = ("HF_HUB_OFFLINE", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS", "VLLM_CPU_KVCACHE_SPACE")
    inherited = {name: value for name, value in os.environ.items() if name not in drop}
    env |= IN_TREE
    added = [env.pop("PYTHONPATH", None), os.environ.get("PYTHONPATH")]
    paths = [str(folder), *filter(None, added)]
    env |= {"ADDRESSES": str(folder / "addresses"), "PYTHONPATH": os.pathsep.join(paths)}
    env |= {"QWEN3_ASR_MAX_CLIP_S": "12"}  # the checkpoint learned on clips of a few sentences
    env |= {"QWEN3_ASR_MAX_UTTERANCE_S": "20", "QWEN3_ASR_REALTIME_IDLE_S": "10"}
    env |= {"VLLM_HOST_IP": "127.0.0.1"}  # else vLLM asks the kernel for its route to 8.8.8.8
    with reserved_port() as port, (folder / "log").open("w") as log:
        command += ["--port", str(port), *options]
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=inherited | env
        )
        made = Server(f"http://127.0.0.1:{port}", folder / "log", folder / "addresses", process)
        try:
            _wait_until_ready(process, made)
            yield made
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # vLLM's own program, while it starts
                process.kill()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one server that most tests ask; nobody stops it or gives it other options."""
    with serving(tmp_path_factory.mktemp("server")) as made:
        yield made


def speak(client: Any, waveform: np.ndarray, **options: Any) -> str:
    """A session of one utterance, and its transcript."""
    wanted = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
    speech = (32_767 * waveform).astype("<i2").tobytes()
    query = {"intent": "transcription"}
    with client.realtime.connect(extra_query=query, **options) as connection:
        connection.session.update(session={"type": "transcription", "audio": {"input": wanted}})
        connection.input_audio_buffer.append(audio=base64.b64encode(speech).decode())
        connection.input_audio_buffer.commit()
        for event in connection:
            if event.type.endswith("transcription.completed"):
                return str(event.transcript)
    raise AssertionError("the session ended without a transcript")


def _wait_until_ready(process: subprocess.Popen[bytes], server: Server) -> None:
    for _ in range(900):
        try:
            urllib.request.urlopen(f"{server.url}/health")
            return
        except (urllib.error.URLError, ConnectionError):
            if process.poll() is not None:
                break
            time.sleep(1)
    pytest.fail(f"the server did not start:\n{server.log.read_text()[-5000:]}")


def assert_timed(transcript: Any) -> None:
    """Words tile the text, in order, each inside its segment, these inside the recording."""
    end = 0.0
    assert "".join(segment.text for segment in transcript.segments) == transcript.text
    for segment in transcript.segments:
        assert "".join(word.word for word in segment.words) == segment.text
        assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)
        for word in segment.words:
            assert end <= word.start < word.end <= transcript.duration
            end = word.end
