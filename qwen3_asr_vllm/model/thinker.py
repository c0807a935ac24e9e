# SPDX-License-Identifier: Apache-2.0
"""The thinker: our audio encoder and vLLM's Qwen3, shared by transcriber and aligner.

    audio -> AudioEncoder -> audio tokens, in the place of <|audio_pad|> -> Qwen3 -> hidden states

Also here: loading weights of either checkpoint layout, and CUDA graphs of the encoder.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsEncoderCudaGraph,
    SupportsMultiModal,
    SupportsPP,
)
from vllm.model_executor.models.module_mapping import MultiModelKeys
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    maybe_prefix,
    scatter_output_slices,
)
from vllm.sequence import IntermediateTensors
from vllm.v1.worker.encoder_cudagraph_defs import (
    EncoderCudaGraphCaptureInputs,
    EncoderCudaGraphConfig,
    EncoderCudaGraphPathConfig,
    EncoderCudaGraphReplayBuffers,
    EncoderItemSpec,
)

from .. import __version__
from ..prompt import AUDIO_PLACEHOLDER
from .bounds import LIMIT, bounded
from .checkpoint import check_dimensions, check_fused_parts, checked_tensors
from .config import Qwen3ASRThinkerConfig
from .encoder import GRAPH_BACKENDS, GRAPH_BUFFERS, AudioEncoder
from .log_mel import widen

logger = init_logger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

# Chunks of the CUDA graphs of the encoder: a batch is padded to the next larger graph.
GRAPH_CHUNKS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 160, 192, 256)
# Methods that store no list of unquantized modules: their makers leave the audio tower alone.
UNLISTED_QUANTIZATION = ("gptq", "gptq_marlin", "auto_gptq", "awq", "awq_marlin", "auto_awq")


class Thinker(nn.Module, SupportsMultiModal, SupportsPP, SupportsEncoderCudaGraph):
    """Encoder and decoder: audio tokens take the place of ``<|audio_pad|>``, hidden states out."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    decoder: ClassVar[type[nn.Module]]  # holds a Qwen3Model as its ``model``
    language_model: Any
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "thinker.model.": "language_model.model.",
            "thinker.audio_tower.": "audio_tower.",
            # the flat layout of transformers
            "model.audio_tower.": "audio_tower.",
            "model.language_model.": "language_model.model.",
            "model.multi_modal_projector.linear_1": "audio_tower.proj1",
            "model.multi_modal_projector.linear_2": "audio_tower.proj2",
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
        raise ValueError(f"Qwen3-ASR takes audio; it takes no {modality}.")

    # --- audio and text in, hidden states out ---------------------------------------------------

    def embed_multimodal(self, **kwargs: Any) -> MultiModalEmbeddings:
        """Encode each clip to (tokens, hidden), in the order of the prompt."""
        kind, clips, frames = self._clips(kwargs)
        if kind == "audio_embeds":
            return [bounded(clip) for clip in clips]
        if kind == "audio_chunks":
            return self.audio_tower.encode_waveforms(widen(clips), frames, _peaks(kwargs))
        return self.audio_tower.encode_features(torch.cat(clips, dim=1), frames)

    def _clips(self, mm_kwargs: dict[str, Any]) -> tuple[str, list[torch.Tensor], list[int]]:
        """Return the kind of a batch's clips, the data of each, and its mel frames."""
        if (embeds := mm_kwargs.get("audio_embeds")) is not None:
            return "audio_embeds", list(embeds), [len(clip) for clip in embeds]
        frames = mm_kwargs["audio_feature_lengths"].flatten().tolist()  # kept on the host
        if (chunks := mm_kwargs.get("audio_chunks")) is not None:
            return "audio_chunks", chunks, frames
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
        """Return the token budgets of the graphs that a step can fill."""
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
            kind: chosen,
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
        """Build the buffers of one clip of whole chunks that fills the budget."""
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
        _, clips, frames = self._clips(mm_kwargs)
        buffers = self.audio_tower.graph_buffers(widen(clips), frames, _peaks(mm_kwargs))
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

        Raises ValueError for a tensor that does not fit the config, and where a whole checkpoint
        lacks part of a fused matrix.
        """
        names: set[str] = set()

        def seen() -> Iterator[tuple[str, torch.Tensor]]:
            for name, tensor in checked_tensors(weights, self.config):
                names.add(name)
                yield name, tensor

        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            seen(), mapper=self.hf_to_vllm_mapper
        )
        loaded |= self.fill_head(loaded)
        if loaded.issuperset(name for name, _ in self.named_parameters()):
            check_fused_parts(names, self.packed_modules_mapping)
        return loaded

    def fill_head(self, loaded: set[str]) -> set[str]:
        """Fill a head that the checkpoint lacks; return the names of its parameters."""
        return set()

    def get_mm_mapping(self) -> MultiModelKeys:
        return MultiModelKeys.from_string_field(
            language_model="language_model", tower_model=["audio_tower."]
        )


def _peaks(mm_kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """Return the loudest bin of each part's clip, (clips,) float32; None without parts."""
    return None if (peaks := mm_kwargs.get("audio_peaks")) is None else peaks.flatten()


def graph_obstacle(encoder: AudioEncoder, vllm_config: VllmConfig) -> str | None:
    """Return why requested CUDA graphs of the encoder cannot be captured; None if they can."""
    if not vllm_config.compilation_config.cudagraph_mm_encoder:
        return None
    if encoder.attn_backend not in GRAPH_BACKENDS:
        return f"its attention runs on {encoder.attn_backend.name}, which cannot be captured"
    lora = vllm_config.lora_config
    if lora is not None and lora.enable_tower_connector_lora:
        return "adapters of the audio tower need the order of tokens, and a graph reorders clips"
    return None


def _tower_quantization(quant_config: QuantizationConfig | None) -> QuantizationConfig | None:
    if quant_config is None or quant_config.get_name() not in UNLISTED_QUANTIZATION:
        return quant_config
    return quant_config if getattr(quant_config, "modules_to_not_convert", None) else None
