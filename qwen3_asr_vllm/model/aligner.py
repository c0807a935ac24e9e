# SPDX-License-Identifier: Apache-2.0
"""The forced aligner's architecture: a thinker that classifies the time of each ``<timestamp>``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.pooler import Pooler, PoolingParamsUpdate
from vllm.model_executor.models.interfaces_base import default_pooling_type
from vllm.model_executor.models.qwen3 import Qwen3Model
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.tasks import PoolingTask
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.outputs import PoolerOutput
from vllm.v1.pool.metadata import PoolingMetadata

from .processor import DummyInputs, ProcessingInfo, Processor
from .thinker import Thinker

CLASSIFIED_AT_ONCE = 1024  # rows of time classes: 20 MB of float32 for 5000 classes


class Headless(nn.Module):
    """A Qwen3 without its language head."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.model = Qwen3Model(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)


@default_pooling_type(tok_pooling_type="ALL")
@MULTIMODAL_REGISTRY.register_processor(Processor, info=ProcessingInfo, dummy_inputs=DummyInputs)
class Qwen3ASRForcedAlignerForTokenClassification(Thinker):
    """The forced aligner: audio and words in, the time class of each ``<timestamp>`` out."""

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
    """Pools hidden states to the likeliest class at each timestamp of each request.

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
        """Pool (tokens of all requests, hidden) to (timestamps,) int32 each; None while unfinished.

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
        """Classify rows: (rows, hidden) -> (rows, classes)."""
        logits: torch.Tensor = self.classifier(rows.to(self.classifier.weight.dtype))
        return logits

    def best(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the likeliest classes: (rows, hidden) -> (rows,) int32, in bounded memory."""
        parts = [self.logits(part).argmax(-1) for part in rows.split(CLASSIFIED_AT_ONCE)]
        return torch.cat(parts).to(torch.int32)
