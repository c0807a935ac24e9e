# SPDX-License-Identifier: Apache-2.0
"""The forced aligner in this process, through ``vllm.LLM``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

from .alignment import CLASS_MS, AlignmentOutput, AlignmentRequest, align
from .audio import AudioSource, load_audio
from .engine import death_told, engine_prompt, load_engine
from .transcript import Transcript
from .transcription import Transcription, run_together, with_warnings

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.outputs import PoolingRequestOutput

CPU_KV_CACHE_BYTES = 1 << 30  # 9,000 tokens of the 0.6B aligner in bf16: five minutes and its words
GPU_BYTES = 6 << 30  # of the 0.6B aligner beside another model: 2 GB of weights, graphs, KV cache
MOST_OF_GPU = 1 / 3  # of what both may take
UTILIZATION = 0.9  # of a GPU's memory for both, where nobody says gpu_memory_utilization


class ForcedAligner:
    """A Qwen3-ForcedAligner checkpoint, loaded into a vLLM engine of this process.

        from qwen3_asr_vllm import ForcedAligner

        if __name__ == "__main__":  # vLLM starts processes, which import this file again
            aligner = ForcedAligner("Qwen/Qwen3-ForcedAligner-0.6B")
            transcript = aligner.align("talk.mp3", "What is said in it.", language="English")
            for word in transcript.words:
                print(word.start, word.end, word.word)

    ``engine_options`` are those of ``vllm.LLM``; ``llm`` is the engine.

    Raises ImportError where vLLM is not installed, ValueError for a model that is no aligner.
    """

    def __init__(self, model: str, **engine_options: Any) -> None:
        options = {"limit_mm_per_prompt": {"audio": 1}} | engine_options
        self.llm = load_engine(model, options, cpu_kv_cache_bytes=CPU_KV_CACHE_BYTES)
        self.class_ms = class_ms(self.llm.model_config)

    @overload
    def align(
        self,
        audio: AudioSource,
        text: str,
        *,
        language: str | None = None,
        audio_track: int | None = None,
    ) -> Transcript: ...

    @overload
    def align(
        self,
        audio: list[AudioSource],
        text: list[str],
        *,
        language: str | None = None,
        audio_track: int | None = None,
    ) -> list[Transcript]: ...

    def align(
        self,
        audio: AudioSource | list[AudioSource],
        text: str | list[str],
        *,
        language: str | None = None,
        audio_track: int | None = None,
    ) -> Transcript | list[Transcript]:
        """When each word of a recording's text is said; or of many, which is much faster.

        A recording is anything that ``load_audio`` takes. ``language`` is a name or code; None
        tells Japanese and Korean by their script, and cuts all others alike. Put together, the
        words of all segments are the text without the white space around it.

        Raises ValueError, before the engine runs, for a language that the aligner does not know
        and, naming the file, for a recording that cannot be read; OSError for a file that cannot
        be opened and for an engine that died; ImportError, which says what to install, for
        Japanese without nagisa.
        """
        if isinstance(audio, list) != isinstance(text, list):
            raise TypeError("align() takes one recording and its text, or a list of each.")
        sources = audio if isinstance(audio, list) else [audio]
        texts = text if isinstance(text, list) else [text]
        if len(sources) != len(texts):
            raise ValueError(f"{len(sources)} recordings and {len(texts)} texts; give one for each")
        alignments = [
            _begin(source, said, language=language, audio_track=audio_track)
            for source, said in zip(sources, texts, strict=True)
        ]
        transcripts = run_together(alignments, self.time_units)
        return transcripts if isinstance(audio, list) else transcripts[0]

    def time_units(self, requests: Sequence[AlignmentRequest]) -> list[AlignmentOutput]:
        """The engine's answers, in the order of the requests.

        One that it refuses, such as a prompt longer than its context, has an ``error``.
        """
        from vllm.exceptions import VLLMValidationError

        prompts = list(map(engine_prompt, requests))
        try:
            with death_told("aligner"):
                outputs = self.llm.encode(prompts, pooling_task="token_classify", use_tqdm=False)
        except (ValueError, VLLMValidationError) as error:
            if len(requests) == 1:
                return [AlignmentOutput((), error=str(error))]
            return [output for request in requests for output in self.time_units([request])]
        return [read_times(output, self.class_ms) for output in outputs]


def _begin(
    source: AudioSource, text: str, *, language: str | None, audio_track: int | None
) -> Transcription:
    """The alignment of one recording, with what of it could not be read as warnings."""
    warnings: list[str] = []
    waveform = load_audio(source, on_warning=warnings.append, audio_track=audio_track)
    return with_warnings(align(waveform, text, language=language), warnings)


def read_times(output: PoolingRequestOutput, class_ms: float) -> AlignmentOutput:
    return AlignmentOutput([class_ms * number for number in output.outputs.data.tolist()])


def class_ms(model_config: ModelConfig) -> float:
    """Milliseconds from one time class to the next. Raises ValueError for what is no aligner."""
    config = model_config.hf_config
    if not getattr(config, "is_aligner", False):
        raise ValueError(
            f"{model_config.model} is no forced aligner: its config has no classify_num. "
            "Use one such as Qwen/Qwen3-ForcedAligner-0.6B."
        )
    return float(config.timestamp_segment_time or CLASS_MS)


def split_memory(total_bytes: int, utilization: float) -> tuple[float, float]:
    """What an aligner and a transcriber may take of the memory of one GPU, as vLLM counts it.

    Both as shares of all of it, together no more than ``utilization``.
    """
    aligner = min(GPU_BYTES / total_bytes, MOST_OF_GPU * utilization)
    return aligner, utilization - aligner
