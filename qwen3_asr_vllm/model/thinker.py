# SPDX-License-Identifier: Apache-2.0
"""The architectures that vLLM looks up by name, and what they add to encoder and decoder.

    Qwen3ASRForConditionalGeneration               audio and text in, text out
    Qwen3ASRForcedAlignerForTokenClassification    audio and words in, times out

Both are a ``Thinker``: our ``AudioEncoder`` and vLLM's own Qwen3. All architectures stand in this
one file because vLLM caches what it knows of a model class by the hash of its file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import ModelConfig, SpeechToTextConfig, VllmConfig
from vllm.config.speech_to_text import SpeechToTextParams
from vllm.inputs import PromptType, TokensPrompt
from vllm.logger import init_logger
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    StreamingTranscriptionPostProcessor,
    SupportsEagle3,
    SupportsEncoderCudaGraph,
    SupportsLoRA,
    SupportsMultiModal,
    SupportsPP,
    SupportsTranscription,
)
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM, Qwen3Model
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    maybe_prefix,
    scatter_output_slices,
)
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalKwargsItem
from vllm.multimodal.processing import cached_encode
from vllm.sequence import IntermediateTensors
from vllm.tasks import PoolingTask
from vllm.tokenizers import cached_tokenizer_from_config
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphPathConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from .. import __version__
from ..decoding import DEFAULT_CLIP_S
from ..geometry import MAX_CLIP_S, SAMPLE_RATE, num_frames
from ..languages import LANGUAGES, language_code, resolve_language
from ..prompt import AUDIO_PLACEHOLDER, NO_TRANSLATION, OutputStream, build_prompt, parse_output
from .bounds import LIMIT, bounded
from .config import Qwen3ASRThinkerConfig
from .encoder import GRAPH_BACKENDS, GRAPH_BUFFERS, AudioEncoder
from .processor import DummyInputs, ProcessingInfo, Processor

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

# Slots of the CUDA graphs of the encoder: what a batch lacks of the next larger is computed, too.
GRAPH_CHUNKS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
SPLIT_SEARCH_S = 10  # seconds before a clip's limit in which vLLM's own route looks for silence
CLASSIFIED_AT_ONCE = 1024  # rows of time classes: 20 MB of float32 for 5000 classes
# Methods that store no list of unquantized modules: their makers leave the audio tower alone.
UNLISTED_QUANTIZATION = ("gptq", "gptq_marlin", "auto_gptq", "awq", "awq_marlin", "auto_awq")


class Thinker(nn.Module, SupportsMultiModal, SupportsPP, SupportsEncoderCudaGraph):
    """Encoder and decoder: audio tokens take the place of ``<|audio_pad|>``, hidden states out."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    decoder: ClassVar[type[Qwen3ForCausalLM | Headless]]  # what holds a Qwen3Model
    language_model: Any
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "thinker.model.": "language_model.model.",
            "thinker.audio_tower.": "audio_tower.",
            # the flat layout of transformers
            "model.audio_tower.": "audio_tower.",
            "model.language_model.": "language_model.model.",
            "model.multi_modal_projector.linear_1.": "audio_tower.proj1.",
            "model.multi_modal_projector.linear_2.": "audio_tower.proj2.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Qwen3ASRThinkerConfig = vllm_config.model_config.hf_config.thinker_config
        check_dimensions(config)
        logger.info_once("Qwen3-ASR is served by the plugin qwen3_asr_vllm %s.", __version__)
        self.config = config

        with self._mark_tower_model(vllm_config, "audio"):  # type: ignore[operator]
            self.audio_tower = AudioEncoder(
                config.audio_config,
                quant_config=_tower_quantization(vllm_config.quant_config),
                keep_order=vllm_config.lora_config is not None,  # adapters go by row
                prefix=maybe_prefix(prefix, "audio_tower"),
            )
        compilation = vllm_config.compilation_config
        if obstacle := graph_obstacle(self.audio_tower, vllm_config):
            compilation.cudagraph_mm_encoder = False
            logger.info("No CUDA graphs of the audio encoder: %s.", obstacle)
        elif not compilation.encoder_cudagraph_token_budgets:  # vLLM's are powers of two
            compilation.encoder_cudagraph_token_budgets = self.graph_budgets(vllm_config)
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = self.decoder(
                vllm_config=vllm_config.with_hf_config(
                    config.text_config, architectures=["Qwen3ForCausalLM"]
                ),
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = (
            self.language_model.model.make_empty_intermediate_tensors
        )
        self._takes_prompt_embeds = vllm_config.model_config.enable_prompt_embeds

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        if modality.startswith("audio"):
            return AUDIO_PLACEHOLDER
        raise ValueError(f"Qwen3-ASR hears audio; it takes no {modality}.")

    # --- audio and text in, hidden states out ---------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Audio tokens of each clip, (tokens, hidden), in the order of the prompt."""
        kind, clips, frames = self._clips(kwargs)
        if kind == "audio_embeds":
            return [bounded(clip) for clip in clips]
        if kind == "audio_chunks":
            return self.audio_tower.encode_waveforms(kwargs[kind], frames, _peaks(kwargs))
        return self.audio_tower.encode_features(torch.cat(clips, dim=1), frames)

    def _clips(self, mm_kwargs: dict[str, Any]) -> tuple[str, list[torch.Tensor], list[int]]:
        """What the clips of a batch came as, the data of each, and its mel frames."""
        if (embeds := mm_kwargs.get("audio_embeds")) is not None:
            return "audio_embeds", list(embeds), [len(clip) for clip in embeds]
        frames = mm_kwargs["audio_feature_lengths"].flatten().tolist()  # kept on the host
        if (chunks := mm_kwargs.get("audio_chunks")) is not None:
            num_chunks = [self.audio_tower.geometry.num_chunks(n) for n in frames]
            return "audio_chunks", list(chunks.split(num_chunks)), frames
        features = mm_kwargs["input_audio_features"]
        if isinstance(features, list) or features.ndim == 3:  # clips apart, maybe padded
            clips = [clip[:, :n] for clip, n in zip(features, frames, strict=True)]
        else:
            clips = list(features.split(frames, dim=1))
        return "input_audio_features", clips, frames

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | IntermediateTensors:
        if intermediate_tensors is not None:
            inputs_embeds = None
        elif inputs_embeds is not None and self._takes_prompt_embeds:  # no processor saw them
            inputs_embeds.nan_to_num_(0.0).clamp_(-LIMIT, LIMIT)  # in place: graphs read the buffer
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds
        )

    # --- CUDA graphs of the encoder -------------------------------------------------------------
    #
    # vLLM captures one graph for each budget of tokens and packs the clips of a step into the
    # smallest that holds them. A graph is made of chunks, so the budget counts the tokens of whole
    # chunks: 13 each, however few of the last one's a clip keeps. Features and embeddings take no
    # part in it; ``postprocess_encoder_output`` encodes them as ``embed_multimodal`` does.

    def get_encoder_cudagraph_config(self) -> EncoderCudaGraphConfig:
        return EncoderCudaGraphConfig(
            modalities=["audio"],
            buffer_keys=list(GRAPH_BUFFERS),
            out_hidden_size=self.config.text_config.hidden_size,
            paths={"audio": EncoderCudaGraphPathConfig()},
        )

    def get_input_modality(self, mm_kwargs: dict[str, Any]) -> str:
        return "audio"

    def get_max_frames_per_video(self) -> int:
        return 1

    def graph_budgets(self, vllm_config: VllmConfig) -> list[int]:
        """Tokens of each graph, of those that a step can fill."""
        chunk_tokens = self.audio_tower.geometry.chunk_tokens
        budgets = [num_chunks * chunk_tokens for num_chunks in GRAPH_CHUNKS]
        in_a_step = vllm_config.scheduler_config.max_num_batched_tokens
        return [budget for budget in budgets if budget <= in_a_step] or budgets[:1]

    def get_encoder_cudagraph_budget_range(self, vllm_config: VllmConfig) -> tuple[int, int]:
        budgets = self.graph_budgets(vllm_config)
        return budgets[0], budgets[-1]

    def get_encoder_cudagraph_item_specs(self, mm_kwargs: dict[str, Any]) -> list[EncoderItemSpec]:
        kind, clips, frames = self._clips(mm_kwargs)
        if kind == "audio_embeds":
            return [EncoderItemSpec(len(clip), len(clip)) for clip in clips]
        geometry = self.audio_tower.geometry
        path_tokens = geometry.chunk_tokens if kind == "audio_chunks" else 0
        return [
            EncoderItemSpec(
                input_size=geometry.num_chunks(n),
                output_tokens=geometry.num_tokens(n),
                path_output_tokens={"audio": geometry.num_chunks(n) * path_tokens},
            )
            for n in frames
        ]

    def select_encoder_cudagraph_items(
        self, mm_kwargs: dict[str, Any], indices: list[int]
    ) -> dict[str, Any]:
        kind, clips, frames = self._clips(mm_kwargs)
        chosen = [clips[i] for i in indices]
        peaks = {} if (peaks := _peaks(mm_kwargs)) is None else {"audio_peaks": peaks[indices]}
        return peaks | {
            kind: torch.cat(chosen) if kind == "audio_chunks" else chosen,
            "audio_feature_lengths": torch.tensor([frames[i] for i in indices]),
        }

    def prepare_encoder_cudagraph_capture_inputs(
        self,
        token_budget: int,
        max_batch_size: int,
        max_frames_per_batch: int,
        device: torch.device,
        dtype: torch.dtype,
        path: str = "default",
        axis_keys: tuple[Hashable, ...] | None = None,
    ) -> EncoderCudaGraphCaptureInputs:
        """The buffers of one clip of whole chunks that fills the budget."""
        geometry = self.audio_tower.geometry
        num_chunks = max(1, token_budget // geometry.chunk_tokens)
        chunks = torch.zeros(num_chunks, geometry.chunk_samples, device=device)
        return EncoderCudaGraphCaptureInputs(
            self.audio_tower.graph_buffers(chunks, [num_chunks * geometry.chunk_frames])
        )

    def prepare_encoder_cudagraph_replay_buffers(
        self,
        mm_kwargs: dict[str, Any],
        max_batch_size: int,
        max_frames_per_batch: int,
        path: str = "default",
    ) -> EncoderCudaGraphReplayBuffers:
        _, _, frames = self._clips(mm_kwargs)
        chunks, peaks = mm_kwargs["audio_chunks"], _peaks(mm_kwargs)
        buffers = self.audio_tower.graph_buffers(chunks, frames, peaks)
        return EncoderCudaGraphReplayBuffers({**buffers})

    def encoder_cudagraph_forward(
        self, inputs: dict[str, torch.Tensor], path: str = "default"
    ) -> torch.Tensor:
        return self.audio_tower.encode_graph(inputs)

    def encoder_eager_forward(
        self, mm_kwargs: dict[str, Any], path: str = "default"
    ) -> torch.Tensor:
        return torch.cat(list(self.embed_multimodal(**mm_kwargs)))

    def postprocess_encoder_output(
        self,
        outputs: dict[str, torch.Tensor],
        indices: list[int],
        per_item_out_tokens: list[int],
        dest: dict[int, torch.Tensor] | list[torch.Tensor | None],
        clone: bool = False,
        batch_mm_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if (tokens := outputs.get("audio")) is None:
            tokens = self.encoder_eager_forward(batch_mm_kwargs or {})
        scatter_output_slices(tokens, indices, per_item_out_tokens, dest, clone)

    # --- weights -------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load either layout, or a part, as an update of weights has it.

        Raises ValueError where a whole checkpoint lacks part of a fused matrix.
        """
        names: set[str] = set()

        def seen() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                names.add(name)
                yield name, tensor

        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            seen(), mapper=self.hf_to_vllm_mapper
        )
        if loaded.issuperset(name for name, _ in self.named_parameters()):
            check_fused_parts(names, self.packed_modules_mapping)
        return loaded

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", tower_model=["audio_tower."]
        )


@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Qwen3ASRForConditionalGeneration(
    Thinker, SupportsTranscription, SupportsLoRA, SupportsEagle3
):
    """Audio and text in, text out."""

    supports_tower_connector_lora: ClassVar[bool] = True
    # vLLM refuses a class that lists a code Whisper lacks; validate_language knows all 30
    supported_languages: ClassVar[Mapping[str, str]] = {
        code: name for code, name in LANGUAGES.items() if code != "fil"
    }
    no_space_languages: ClassVar[set[str]] = {"zh", "yue", "ja", "th"}
    decoder = Qwen3ForCausalLM
    hf_to_vllm_mapper = Thinker.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "thinker.lm_head.": "language_model.lm_head.",
            "lm_head.": "language_model.lm_head.",
        }
    )

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        logits: torch.Tensor | None = self.language_model.compute_logits(hidden_states)
        return logits

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
        """The code of a language given in any spelling; None lets the model detect it."""
        name = resolve_language(language)
        return None if name is None else language_code(name)

    @classmethod
    def get_generation_prompt(cls, stt_params: SpeechToTextParams) -> PromptType:
        if stt_params.task_type != "transcribe":
            raise ValueError(NO_TRANSLATION)
        context = "\n".join(filter(None, (stt_params.request_prompt, stt_params.hotwords)))
        prompt = build_prompt(context=context, language=resolve_language(stt_params.language))
        tokenizer = cached_tokenizer_from_config(stt_params.model_config)
        return TokensPrompt(
            prompt_token_ids=cached_encode(tokenizer, prompt),
            multi_modal_data={"audio": stt_params.audio},
        )

    @classmethod
    def post_process_output(cls, text: str) -> str:
        return parse_output(text).text

    @classmethod
    def get_streaming_post_processor_cls(cls) -> type[StreamingTranscriptionPostProcessor]:
        return DeltaCleaner


def _peaks(mm_kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """(clips,) float32: the loudest bin of what each is a part of; None where none is a part."""
    return None if (peaks := mm_kwargs.get("audio_peaks")) is None else peaks.flatten()


class DeltaCleaner(StreamingTranscriptionPostProcessor):
    """Raw deltas of one clip -> deltas of its text."""

    def __init__(self) -> None:
        self.stream = OutputStream()

    def process_delta(self, text_delta: str, finished: bool) -> str:
        text = self.stream.push(text_delta)
        return text + self.stream.finish() if finished else text


class Headless(nn.Module):
    """A Qwen3 without the head that writes words."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = Qwen3Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)


@default_pooling_type(tok_pooling_type="ALL")
@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Qwen3ASRForcedAlignerForTokenClassification(Thinker):
    """Audio and words in; out comes the time class of each ``<timestamp>`` in the prompt."""

    is_pooling_model: ClassVar[bool] = True
    decoder = Headless
    hf_to_vllm_mapper = Thinker.hf_to_vllm_mapper | WeightsMapper(
        orig_to_new_prefix={
            "thinker.lm_head.": "pooler.classifier.",
            "score.": "pooler.classifier.",
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config = vllm_config.model_config.hf_config
        self.pooler = TimestampPooler(
            self.config.text_config.hidden_size,
            config.thinker_config.classify_num,
            bias=config.token_classification_bias,
            timestamp_token_id=config.timestamp_token_id,
            dtype=vllm_config.model_config.head_dtype,
        )


class TimestampPooler(Pooler):
    """Hidden states -> for each request, the likeliest class at each of its timestamps.

    Only rows of timestamps are classified, and of these only the argmax leaves the engine: two
    int32 a word instead of 5000 floats a token. ``use_activation=False`` asks for the logits.
    """

    def __init__(
        self,
        hidden_size: int,
        num_classes: int,
        *,
        bias: bool,
        timestamp_token_id: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.classifier = nn.Linear(hidden_size, num_classes, bias=bias, dtype=dtype)
        self.timestamp_token_id = timestamp_token_id

    def get_supported_tasks(self) -> set[PoolingTask]:
        return {"token_classify"}

    def get_pooling_updates(self, task: PoolingTask) -> PoolingParamsUpdate:
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata
    ) -> PoolerOutput:
        """(tokens of all requests, hidden) -> (timestamps,) int32 each; None while unfinished.

        A long prompt may come in parts, whose classes wait in the state of its request.
        """
        cursor = pooling_metadata.get_pooling_cursor()
        outputs: list[torch.Tensor | None] = []
        for hidden, prompt, end, params, state, is_finished in zip(
            hidden_states.split(cursor.num_scheduled_tokens_cpu.tolist()),
            pooling_metadata.get_prompt_token_ids_cpu(),
            cursor.seq_lens_cpu.tolist(),
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            cursor.get_finished_mask(),
            strict=True,
        ):
            is_marked = prompt[end - len(hidden) : end] == self.timestamp_token_id
            rows = hidden[async_tensor_h2d(is_marked.nonzero().flatten(), hidden.device)]
            parts = state.hidden_states_cache
            if end == len(hidden):  # also a prompt that was preempted: it starts again
                parts.clear()
            parts.append(self.logits(rows) if params.use_activation is False else self.best(rows))
            outputs.append(torch.cat(parts) if is_finished else None)
            if is_finished:
                state.clean()
        return outputs

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows, classes)."""
        logits: torch.Tensor = self.classifier(rows.to(self.classifier.weight.dtype))
        return logits

    def best(self, rows: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) -> (rows,) int32, in bounded memory."""
        parts = [self.logits(part).argmax(-1) for part in rows.split(CLASSIFIED_AT_ONCE)]
        return torch.cat(parts).to(torch.int32)


def check_dimensions(config: Qwen3ASRThinkerConfig) -> None:
    """Refuse a config that encoder and decoder cannot be built from; names the field."""
    audio, text = config.audio_config, config.text_config
    audio.geometry  # noqa: B018  (refuses windows that do not hold whole chunks)
    if audio.output_dim != text.hidden_size:
        raise ValueError(
            f"audio_config.output_dim is {audio.output_dim}, but text_config.hidden_size is "
            f"{text.hidden_size}: audio tokens must have the decoder's size."
        )
    if audio.d_model % audio.encoder_attention_heads:
        raise ValueError(
            f"audio_config.d_model is {audio.d_model}; it must be a multiple of "
            f"encoder_attention_heads = {audio.encoder_attention_heads}."
        )
    if audio.d_model % 2:
        raise ValueError(
            f"audio_config.d_model is {audio.d_model}; sinusoidal positions need it even."
        )
    if audio.scale_embedding:
        raise ValueError(
            "audio_config.scale_embedding is true; no Qwen3-ASR encoder scales its input. "
            "Set it to false."
        )


def check_fused_parts(names: set[str], packed: Mapping[str, list[str]]) -> None:
    """Of every fused matrix (q, k, v; gate, up) all parts must have been in the checkpoint."""
    for parts in packed.values():
        # a KV cache has scales for k and v alone, with names like k_proj.k_scale
        pattern = re.compile(rf"\.(?:{'|'.join(parts)})\.(?=(?:weight|bias|qweight)(?:_packed)?$)")
        groups = {pattern.sub(".{}.", name) for name in names if pattern.search(name)}
        wanted = {group.replace("{}", part) for group in groups for part in parts}
        if missing := sorted(wanted - names):
            raise ValueError(
                f"the checkpoint has no tensor {missing[0]} ({len(missing)} missing in all); "
                "download it again."
            )


def graph_obstacle(encoder: AudioEncoder, vllm_config: VllmConfig) -> str | None:
    """Why CUDA graphs of the encoder cannot be had although they were asked for."""
    if not vllm_config.compilation_config.cudagraph_mm_encoder:
        return None
    if encoder.attn_backend not in GRAPH_BACKENDS:
        return f"its attention runs on {encoder.attn_backend.name}, which cannot be captured"
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        return "adapters of the audio tower go by row, and a graph takes clips in another order"
    return None


def _tower_quantization(quant_config: QuantizationConfig | None) -> QuantizationConfig | None:
    if quant_config is None or quant_config.get_name() not in UNLISTED_QUANTIZATION:
        return quant_config
    return quant_config if getattr(quant_config, "modules_to_not_convert", None) else None


def _max_clip_s(max_model_len: int) -> int:
    """Seconds of audio per clip: QWEN3_ASR_MAX_CLIP_S, as far as the model's length allows.

    A second takes 13 tokens of prompt and up to about as many of text.
    """
    given = os.environ.get("QWEN3_ASR_MAX_CLIP_S", f"{DEFAULT_CLIP_S:g}")
    if not given.isdecimal() or not 1 <= int(given) <= MAX_CLIP_S:
        raise ValueError(
            f"QWEN3_ASR_MAX_CLIP_S is {given!r}; give whole seconds from 1 to {MAX_CLIP_S}."
        )
    return max(1, min(int(given), max_model_len // 32))
