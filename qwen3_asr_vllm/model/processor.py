# SPDX-License-Identifier: Apache-2.0
"""vLLM's input processing: waveform in, one prompt token per audio token.

No spectrogram is computed here: a clip travels to the worker as the samples of its chunks, in
int16 or float32 (``log_mel.narrow``) whatever the model's dtype, and each clip is prepared on its
own, because a log-mel spectrogram depends on everything it is padded with. Precomputed log-mel
features and audio embeddings are accepted in the place of waveforms. A clip that grows comes as
its windows (``streaming.Window``): an item each, so that vLLM's caches know the finished ones
again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.feature_extraction_utils import FeatureExtractionMixin
from vllm.config.multimodal import MultiModalDummyOptions
from vllm.inputs import MultiModalDataDict
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
)
from vllm.multimodal.parse import (
    AudioProcessorItems,
    DictEmbeddingItems,
    EmbeddingItems,
    ModalityDataItems,
    MultiModalDataItems,
    MultiModalDataParser,
)
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)

from ..audio import as_float
from ..geometry import FFT_LENGTH, HOP_LENGTH, MAX_CLIP_S, SAMPLE_RATE, Geometry, num_frames
from ..peaks import check_waveform
from ..prompt import AUDIO_PAD
from ..windows import Window
from .bounds import check_embeddings, check_log_mel
from .config import Qwen3ASRConfig, Qwen3ASRThinkerConfig
from .log_mel import cut_chunks, narrow


class ProcessingInfo(BaseProcessingInfo):
    """vLLM's questions about the model's inputs; refuses a checkpoint that does not fit."""

    def get_hf_config(self) -> Qwen3ASRThinkerConfig:
        thinker: Qwen3ASRThinkerConfig = self.ctx.get_hf_config(Qwen3ASRConfig).thinker_config
        return thinker

    # Looking into a config costs microseconds, and every request asks several times.

    @cached_property
    def geometry(self) -> Geometry:
        geometry: Geometry = self.get_hf_config().audio_config.geometry
        return geometry

    @cached_property
    def audio_token_id(self) -> int:
        """The id of ``<|audio_pad|>``, on which config and tokenizer must agree."""
        token_id = self.get_tokenizer().convert_tokens_to_ids(AUDIO_PAD)
        expected = self.get_hf_config().audio_token_id
        if token_id != expected:
            raise ValueError(
                f"audio_token_id is {expected} in the checkpoint's config, but {AUDIO_PAD} is "
                f"{token_id} in its tokenizer; use the tokenizer that came with the checkpoint."
            )
        check_vocabulary(self.get_tokenizer(), self.get_hf_config())
        return expected

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None}

    def get_supported_mm_processor_kwargs(self) -> dict[str, set[str]]:
        return {}

    def get_data_parser(self) -> MultiModalDataParser:
        model_config = self.ctx.model_config
        extractor, _ = FeatureExtractionMixin.get_feature_extractor_dict(
            model_config.model, revision=model_config.revision
        )
        check_front_end(extractor, self.get_hf_config())
        return DataParser(
            num_mel_bins=self.get_hf_config().audio_config.num_mel_bins,
            target_sr=SAMPLE_RATE,
            target_channels=1,
            audio_resample_method="soxr",
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def max_clip_samples(self, seq_len: int) -> int:
        """The longest clip that the model takes and a sequence of this length holds."""
        return min(MAX_CLIP_S * SAMPLE_RATE, self.geometry.max_samples(seq_len))

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int]
    ) -> Mapping[str, int]:
        longest = num_frames(self.max_clip_samples(seq_len))
        return {"audio": self.geometry.num_tokens(longest)}


def check_front_end(extractor: Mapping[str, Any], thinker: Qwen3ASRThinkerConfig) -> None:
    """Refuse a checkpoint trained on another spectrogram.

    ``extractor``: the fields of its preprocessor_config.json. Raises ValueError with the field.
    """
    ours = {
        "sampling_rate": SAMPLE_RATE,
        "hop_length": HOP_LENGTH,
        "n_fft": FFT_LENGTH,
        "feature_size": thinker.audio_config.num_mel_bins,
        "dither": 0.0,
    }
    for name, value in ours.items():
        if extractor.get(name, value) != value:
            raise ValueError(
                f"{name} is {extractor[name]} in the checkpoint's preprocessor_config.json; "
                f"Qwen3-ASR's log-mel spectrogram needs {value}."
            )


def check_vocabulary(tokenizer: Any, thinker: Qwen3ASRThinkerConfig) -> None:
    """Raise ValueError where the tokenizer has tokens that the embedding lacks."""
    added = tokenizer.get_added_vocab()
    token, token_id = max(added.items(), key=lambda item: item[1], default=("", 0))
    if token_id >= (size := thinker.text_config.vocab_size):
        raise ValueError(
            f"text_config.vocab_size is {size}, but the tokenizer's {token} is {token_id}; resize "
            "the embedding as transformers' resize_token_embeddings does, or use the tokenizer "
            "that came with the checkpoint."
        )


class DummyInputs(BaseDummyInputsBuilder[ProcessingInfo]):
    """The longest clip that fits, so that vLLM sizes its encoder budget and cache for it."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        return AUDIO_PAD * mm_counts.get("audio", 0)

    def get_dummy_mm_data(
        self,
        seq_len: int,
        mm_counts: Mapping[str, int],
        mm_options: MultiModalDummyOptions,
    ) -> MultiModalDataDict:
        num_audios = mm_counts.get("audio", 0)
        # the budget is per item, so profiling asks for one; several share the sequence
        length = self.info.max_clip_samples(seq_len // max(num_audios, 1))
        return {
            "audio": self._get_dummy_audios(
                length=length,
                num_audios=num_audios,
                overrides=mm_options.get("audio"),
            )
        }


class DataParser(MultiModalDataParser):
    """Accepts waveforms, log-mel features and audio embeddings; refuses everything else."""

    def __init__(self, *, num_mel_bins: int, **options: Any) -> None:
        super().__init__(**options)
        self._num_mel_bins = num_mel_bins

    def _parse_audio_data(self, data: Any) -> ModalityDataItems[Any, Any] | None:
        if isinstance(data, dict):
            required = {"input_audio_features", "audio_feature_lengths"}
            if required <= data.keys():  # else vLLM says what is missing
                check_features(
                    data["input_audio_features"], data["audio_feature_lengths"], self._num_mel_bins
                )
            return DictEmbeddingItems(
                data, modality="audio", required_fields=required, fields_factory=_feature_fields
            )
        if isinstance(data, list) and any(isinstance(item, Window) for item in data):
            return AudioProcessorItems(list(map(_checked, data)))
        items = super()._parse_audio_data(data)
        if isinstance(items, EmbeddingItems):
            check_embeddings([items.get(i) for i in range(len(items))])
        if isinstance(items, AudioProcessorItems):
            return AudioProcessorItems([_checked(items.get(i)) for i in range(len(items))])
        return items


def _checked(audio: Any) -> np.ndarray | Window | None:
    """Return a clip in the processor's terms; None stands for a clip in vLLM's cache."""
    if isinstance(audio, Window):
        check_waveform(audio.samples)
    return audio if audio is None or isinstance(audio, Window) else as_waveform(audio)


def as_waveform(samples: Any) -> np.ndarray:
    """Convert samples at 16 kHz to a waveform, (samples,) float32; integers are scaled.

    Raises ValueError for what is empty, too long for one clip, or beyond ``peaks.MAX_PEAK``.
    """
    waveform = as_float(np.asarray(samples))
    check_waveform(waveform)
    seconds = len(waveform) / SAMPLE_RATE
    if seconds > MAX_CLIP_S:
        raise ValueError(
            f"audio is {seconds:.1f} s; the model takes at most {MAX_CLIP_S} s in one clip. "
            "Split the recording, or use /v1/audio/transcriptions, which does."
        )
    return waveform


def check_features(features: Any, lengths: Any, num_mel_bins: int) -> None:
    """Raise ValueError for log-mel features that do not fit their lengths, the checkpoint, or the
    range of values."""
    frames = [int(length) for length in torch.as_tensor(lengths).flatten()]
    if isinstance(features, torch.Tensor) and features.ndim == 2:  # clip after clip
        fits = tuple(features.shape) == (num_mel_bins, sum(frames))
    else:
        fits = len(features) == len(frames) and all(
            clip.ndim == 2 and clip.shape[0] == num_mel_bins and clip.shape[1] >= length
            for clip, length in zip(features, frames, strict=True)
        )
    if not fits:
        shapes = [tuple(clip.shape) for clip in features]
        shape = tuple(features.shape) if isinstance(features, torch.Tensor) else shapes
        raise ValueError(
            f"input_audio_features are {shape} for audio_feature_lengths {frames}; give "
            f"({num_mel_bins}, {sum(frames)}), or ({num_mel_bins}, length) for each clip."
        )
    check_log_mel(features)


def _feature_fields(inputs: Mapping[str, torch.Tensor]) -> dict[str, MultiModalFieldConfig]:
    lengths = inputs.get("audio_feature_lengths", torch.empty(0))
    features = inputs.get("input_audio_features")
    padded = isinstance(features, torch.Tensor) and features.ndim == 3  # (clips, M, frames)
    fields = {
        "input_audio_features": MultiModalFieldConfig.batched("audio")
        if padded
        else MultiModalFieldConfig.flat_from_sizes("audio", lengths, dim=1),
        "audio_feature_lengths": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
    }
    if "feature_attention_mask" in inputs:
        fields["feature_attention_mask"] = MultiModalFieldConfig.batched("audio", keep_on_cpu=True)
    return fields


class Processor(BaseMultiModalProcessor[ProcessingInfo]):
    """Converts waveforms to the worker's chunks, and prompts to those with audio tokens."""

    def _call_hf_processor(
        self, hf_data: Mapping[str, object], hf_kwargs: Mapping[str, object]
    ) -> BatchFeature:
        if hf_kwargs:
            raise ValueError(
                f"mm_processor_kwargs {sorted(hf_kwargs)} are not supported: Qwen3-ASR's "
                "front end has nothing to set."
            )
        waveforms = hf_data.get("audio")
        if not waveforms:
            return BatchFeature()
        assert isinstance(waveforms, list)
        frames = [w.num_frames if isinstance(w, Window) else num_frames(len(w)) for w in waveforms]
        peaks = [w.peak if isinstance(w, Window) else -math.inf for w in waveforms]
        return BatchFeature(
            {
                "audio_chunks": [torch.from_numpy(self._chunks(w)) for w in waveforms],
                "audio_feature_lengths": torch.tensor(frames),
                "audio_peaks": torch.tensor(peaks, dtype=torch.float32),
            }
        )

    def _chunks(self, audio: np.ndarray | Window) -> np.ndarray:
        if isinstance(audio, Window):
            samples = narrow(audio.samples)
            return cut_chunks(samples, self.info.geometry, has_context=audio.has_context)
        return cut_chunks(narrow(audio), self.info.geometry)

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        if "audio_embeds" in hf_inputs:
            return {"audio_embeds": MultiModalFieldConfig.batched("audio")}
        if "audio_chunks" not in hf_inputs:
            return _feature_fields(hf_inputs)
        clips = [slice(i, i + 1) for i in range(len(hf_inputs["audio_chunks"]))]
        return {
            # A list of tensors: vLLM does not concatenate them on the engine's thread.
            "audio_chunks": MultiModalFieldConfig.flat("audio", clips),
            "audio_feature_lengths": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
            "audio_peaks": MultiModalFieldConfig.batched("audio", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, Any],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        token_id = self.info.audio_token_id

        def audio_tokens(item: int) -> list[int]:
            return [token_id] * self._num_tokens(out_mm_kwargs["audio"][item])

        return [PromptReplacement("audio", target=[token_id], replacement=audio_tokens)]

    def _num_tokens(self, item: MultiModalKwargsItem) -> int:
        if "audio_embeds" in item:
            return len(item["audio_embeds"].data)
        frames = int(item["audio_feature_lengths"].data)
        tokens = self.info.geometry.num_tokens(frames)
        if tokens < 1:
            raise ValueError("audio_feature_lengths is 0; a clip has at least one frame.")
        return tokens
