# SPDX-License-Identifier: Apache-2.0
"""The transcriber's architecture: a thinker that writes text, and the hooks of vLLM's own route."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from transformers.models.whisper.tokenization_whisper import LANGUAGES as WHISPER_LANGUAGES
from vllm.config import ModelConfig, SpeechToTextConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import PromptType, TokensPrompt
from vllm.logger import init_logger
from vllm.model_executor.models.interfaces import (
    StreamingTranscriptionPostProcessor,
    SupportsEagle3,
    SupportsLoRA,
    SupportsTranscription,
)
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import cached_encode
from vllm.tokenizers import cached_tokenizer_from_config

from ..chat_template import load_protocol
from ..geometry import DEFAULT_CLIP_S, MAX_CLIP_S, SAMPLE_RATE, num_frames
from ..iso639 import codes_of
from ..languages import LANGUAGES, SPACELESS_CODES, checkpoint_languages
from ..prompt import (
    NO_TRANSLATION,
    PUBLISHED,
    OutputStream,
    TextProtocol,
    build_prompt,
    parse_output,
    sanitize_context,
)
from .processor import DummyInputs, ProcessingInfo, Processor
from .thinker import Thinker

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

HEAD = "language_model.lm_head.weight"
EMBEDDING = "language_model.model.embed_tokens.weight"
SPLIT_SEARCH_S = 10  # seconds before a clip's limit in which vLLM's own route looks for silence


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Qwen3ASRForConditionalGeneration(
    Thinker, SupportsTranscription, SupportsLoRA, SupportsEagle3
):
    """The transcriber: audio and text in, text out."""

    supports_tower_connector_lora: ClassVar[bool] = True
    # vLLM refuses a class that lists a code Whisper lacks; get_generation_prompt accepts all
    supported_languages: ClassVar[Mapping[str, str]] = {
        code: name for code, name in LANGUAGES.items() if code in WHISPER_LANGUAGES
    }
    no_space_languages: ClassVar[set[str]] = set(SPACELESS_CODES)
    decoder = Qwen3ForCausalLM
    hf_to_vllm_mapper = Thinker.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "thinker.lm_head": "language_model.lm_head",
            "lm_head": "language_model.lm_head",
        }
    )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

    def fill_head(self, loaded: set[str]) -> set[str]:
        """Copy the embedding if nothing but the head is missing: quantizers save tied ones so."""
        names = {name for name, _ in self.named_parameters()}
        if names - loaded != {HEAD} or EMBEDDING not in names:
            return set()
        logger.warning("The checkpoint has no lm_head; its embedding takes the place.")
        self.get_parameter(HEAD).data.copy_(self.get_parameter(EMBEDDING).data)
        return {HEAD}

    def get_mm_lora_token_counts(
        self, *, modality: str, mm_kwargs: MultiModalKwargsItem | None, num_mm_embeds: int
    ) -> tuple[int, int | None]:
        return num_mm_embeds, None  # the layers see one row per audio token

    # --- vLLM's own transcription route ---------------------------------------------------------

    @classmethod
    def get_speech_to_text_config(
        cls, model_config: ModelConfig, task_type: str
    ) -> SpeechToTextConfig:
        max_clip_s = _max_clip_s(model_config.max_model_len)
        return SpeechToTextConfig(
            sample_rate=SAMPLE_RATE,
            max_audio_clip_s=max_clip_s,
            overlap_chunk_second=min(SPLIT_SEARCH_S, max_clip_s // 2),
        )

    @classmethod
    def get_num_audio_tokens(
        cls, audio_duration_s: float, stt_config: SpeechToTextConfig, model_config: ModelConfig
    ) -> int | None:
        frames = num_frames(int(audio_duration_s * SAMPLE_RATE))
        tokens: int = model_config.hf_config.thinker_config.audio_config.geometry.num_tokens(frames)
        return tokens

    @classmethod
    def validate_language(cls, language: str | None) -> str | None:
        """Return the code of a language given in any spelling; None detects the language.

        ``get_generation_prompt``, which has the config, rejects what the checkpoint does not know.
        """
        declared = checkpoint_languages()
        try:
            name = declared.resolve(language)
        except ValueError:
            return next(iter(codes_of(language or "")), language)
        return None if name is None else declared.code(name)

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> PromptType:
        if stt_params.task_type != "transcribe":
            raise ValueError(NO_TRANSLATION)
        context = "\n".join(filter(None, (stt_params.request_prompt, stt_params.hotwords)))
        tokenizer = cached_tokenizer_from_config(stt_params.model_config)
        protocol = _protocol(stt_params.model_config, tokenizer)
        prompt = build_prompt(
            context=sanitize_context(context, protocol.control_tokens),
            language=protocol.languages.resolve(stt_params.language),
            protocol=protocol,
        )
        return TokensPrompt(
            prompt_token_ids=cached_encode(tokenizer, prompt),
            multi_modal_data={"audio": stt_params.audio},
        )

    @classmethod
    def post_process_output(cls, text: str) -> str:
        return parse_output(text, protocol=_declared_protocol()).text

    @classmethod
    def get_streaming_post_processor_cls(cls) -> type[StreamingTranscriptionPostProcessor]:
        return DeltaCleaner


_PROTOCOLS: WeakKeyDictionary[Any, TextProtocol] = WeakKeyDictionary()  # by tokenizer


def _protocol(model_config: ModelConfig, tokenizer: Any) -> TextProtocol:
    """Return the protocol of a checkpoint, which is read once: vLLM caches the tokenizer."""
    if (protocol := _PROTOCOLS.get(tokenizer)) is None:
        protocol = _PROTOCOLS[tokenizer] = load_protocol(model_config, tokenizer)
    return protocol


def _declared_protocol() -> TextProtocol:
    """Return the published protocol with the declared languages: these hooks get no config."""
    return replace(PUBLISHED, languages=checkpoint_languages())


class DeltaCleaner(StreamingTranscriptionPostProcessor):
    """Converts raw deltas of one clip to deltas of its text."""

    def __init__(self) -> None:
        self.stream = OutputStream(protocol=_declared_protocol())

    def process_delta(self, text_delta: str, finished: bool) -> str:
        text = self.stream.push(text_delta)
        return text + self.stream.finish() if finished else text


def _max_clip_s(max_model_len: int) -> int:
    """Return the seconds of a clip: QWEN3_ASR_MAX_CLIP_S, as far as the model's length allows.

    A second takes 13 tokens of prompt and up to about as many of text.
    """
    given = os.environ.get("QWEN3_ASR_MAX_CLIP_S", f"{DEFAULT_CLIP_S:g}")
    if not given.isdecimal() or not 1 <= int(given) <= MAX_CLIP_S:
        raise ValueError(
            f"QWEN3_ASR_MAX_CLIP_S is {given!r}; give whole seconds from 1 to {MAX_CLIP_S}."
        )
    return max(1, min(int(given), max_model_len // 32))
