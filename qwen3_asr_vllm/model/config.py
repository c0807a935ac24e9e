# SPDX-License-Identifier: Apache-2.0
"""The four config classes of Qwen3-ASR, as checkpoints write them.

Two layouts exist and both are read:

    Qwen/Qwen3-ASR-1.7B      {"thinker_config": {"audio_config": ..., "text_config": ...}}
    Qwen/Qwen3-ASR-1.7B-hf   {"audio_config": ..., "text_config": ..., "audio_token_id": ...}

Either becomes a ``Qwen3ASRConfig`` that holds a thinker, so the rest of the package knows one.
Names, fields and defaults are those of vLLM's ``transformers_utils.configs.qwen3_asr``.
"""

from __future__ import annotations

import logging
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from ..geometry import Geometry

logger = logging.getLogger(__name__)

MROPE_KEYS = ("mrope_section", "mrope_interleaved", "interleaved")
ALIGNER = "Qwen3ASRForcedAlignerForTokenClassification"
THINKER_FIELDS = ("audio_config", "text_config", "audio_token_id", "audio_start_token_id")


class Qwen3ASRAudioEncoderConfig(PreTrainedConfig):
    """The audio encoder: convolution stem, windowed attention, projector.

    ``n_window`` is half a chunk and ``n_window_infer`` an attention window, in mel frames;
    ``conv_chunksize`` bounds the chunks that the stem holds at once; ``output_dim`` is the
    decoder's hidden size.
    """

    model_type = "qwen3_asr_audio_encoder"

    num_mel_bins: int = 128
    encoder_layers: int = 32
    encoder_attention_heads: int = 20
    encoder_ffn_dim: int = 5120
    d_model: int = 1280
    dropout: float | int = 0
    attention_dropout: float | int = 0
    activation_function: str = "gelu"
    activation_dropout: float | int = 0
    scale_embedding: bool = False
    initializer_range: float = 0.02
    max_source_positions: int = 1500
    n_window: int = 100
    output_dim: int = 3584
    n_window_infer: int = 400
    conv_chunksize: int = 500
    downsample_hidden_size: int = 480

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs["num_hidden_layers"] = self.encoder_layers
        super().__post_init__(**kwargs)

    @property
    def geometry(self) -> Geometry:
        """Lengths of chunks, windows and tokens. Raises ValueError where they do not fit."""
        return Geometry(self.n_window, self.n_window_infer)


class Qwen3ASRTextConfig(PreTrainedConfig):
    """The text decoder, a Qwen3.

    Audio and text share one row of positions, so a checkpoint's M-RoPE is plain RoPE: its
    ``mrope_section`` is dropped on reading, and vLLM prepares one row instead of three.
    """

    model_type = "qwen3_asr_text"
    base_config_key = "text_config"

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_theta: float = 5000000.0
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float | int = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        rope = kwargs.pop("rope_scaling", None) or self.rope_parameters or {}
        self.rope_parameters = {"rope_theta": self.rope_theta} | _plain_rope(rope)
        self.rope_theta = self.rope_parameters["rope_theta"]
        super().__post_init__(**kwargs)


class Qwen3ASRThinkerConfig(PreTrainedConfig):
    """Encoder and decoder together, with the ids that mark audio in a prompt.

    ``classify_num`` is set in forced aligners: their head gives that many time classes.
    """

    model_type = "qwen3_asr_thinker"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_index": "audio_token_id"}  # of drafters
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "audio_config": Qwen3ASRAudioEncoderConfig,
        "text_config": Qwen3ASRTextConfig,
    }

    audio_config: Any = None
    text_config: Any = None
    audio_token_id: int = 151646
    audio_start_token_id: int = 151647
    user_token_id: int = 872
    initializer_range: float = 0.02
    classify_num: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.audio_config = _sub_config(Qwen3ASRAudioEncoderConfig, self.audio_config)
        self.text_config = _sub_config(Qwen3ASRTextConfig, self.text_config)
        super().__post_init__(**kwargs)


class Qwen3ASRConfig(PreTrainedConfig):
    """A whole checkpoint: the thinker, and the metadata of its makers.

    ``support_languages`` lists language names; ``timestamp_token_id`` and
    ``timestamp_segment_time`` (milliseconds per class) belong to forced aligners. Their
    architecture is corrected: checkpoints name that of a transcriber, or of transformers.

    Raises ValueError for a forced aligner without a ``timestamp_token_id``.
    """

    model_type = "qwen3_asr"
    sub_configs: ClassVar[dict[str, type[PreTrainedConfig]]] = {
        "thinker_config": Qwen3ASRThinkerConfig
    }

    thinker_config: Any = None
    support_languages: list[str] | None = None
    timestamp_token_id: int | None = None
    timestamp_segment_time: int | float | None = None
    token_classification_bias: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        flat = {key: kwargs.pop(key) for key in THINKER_FIELDS if key in kwargs}
        if self.thinker_config is None:
            self.thinker_config = _thinker_of_flat(flat, kwargs)
        self.thinker_config = _sub_config(Qwen3ASRThinkerConfig, self.thinker_config)
        super().__post_init__(**kwargs)
        _name_aligner(self)

    @property
    def is_aligner(self) -> bool:
        """Whether its head classifies times instead of writing words."""
        return self.thinker_config.classify_num is not None

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The decoder's config, by which vLLM sizes its KV cache."""
        text_config: PreTrainedConfig = self.thinker_config.text_config
        return text_config


def _sub_config(cls: type[PreTrainedConfig], given: Any) -> PreTrainedConfig:
    if isinstance(given, dict):
        return cls(**{k: v for k, v in given.items() if k != "model_type"})
    return cls() if given is None else given


def _thinker_of_flat(flat: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """The thinker of the flat layout, whose ``tie_word_embeddings`` stands at the top."""
    if not flat:
        logger.info("No thinker_config given: the thinker takes its default values.")
    text_config = flat.get("text_config")
    if isinstance(text_config, dict) and "tie_word_embeddings" in top:
        flat["text_config"] = text_config | {"tie_word_embeddings": top["tie_word_embeddings"]}
    return flat


def _name_aligner(config: Any) -> None:
    """Give a forced aligner, in either layout, its classes and its architecture."""
    if "Qwen3ASRForTokenClassification" in (config.architectures or ()):
        config.thinker_config.classify_num = config.num_labels
    if not config.is_aligner:
        return
    config.architectures = [ALIGNER]
    if config.timestamp_token_id is None:
        raise ValueError(
            "timestamp_token_id is not in the config of this forced aligner; take config.json "
            "from its publisher, or set it to the id of <timestamp>."
        )


def _plain_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """RoPE parameters without M-RoPE, and with the old key ``type`` moved to ``rope_type``."""
    plain = {key: value for key, value in rope.items() if key not in MROPE_KEYS}
    if "type" in plain:
        plain["rope_type"] = plain["type"]
    if plain.get("rope_type") == "mrope":
        plain["type"] = plain["rope_type"] = "default"
    return plain
