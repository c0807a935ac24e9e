# SPDX-License-Identifier: Apache-2.0
"""The audio encoder: chunks of log-mel -> convolutions -> windowed attention -> audio tokens.

The encoder works on packed chunks, not on clips. A ``Layout`` gives the place of each clip. It is
computed from host integers before the first kernel runs, so a call never waits for the device.

Shapes: C chunks, M mel bins, F frames of a chunk, t tokens of a whole chunk, T tokens of a batch,
D = d_model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention.mm_encoder_attention import MMEncoderAttention
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.triton_utils import HAS_TRITON
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from ..geometry import Geometry
from .bounds import bounded
from .config import Qwen3ASRAudioEncoderConfig
from .kernels import bias_gelu_, first_conv
from .log_mel import LogMel

MAX_TIMESCALE = 10_000.0
GRAPH_BUFFERS = ("chunks", "chunk_frames", "clip_ids", "token_index", "windows", "peaks")
GRAPH_CHUNKS_AT_ONCE = 128  # through the stem: a graph keeps its peak of memory for good
CPU_CHUNKS_AT_ONCE = 8  # through the stem: what a core's caches hold of the convolutions
# Attention that can be captured: its kernels read the bounds of windows on the device.
GRAPH_BACKENDS = (
    AttentionBackendEnum.FLASH_ATTN,
    AttentionBackendEnum.ROCM_AITER_FA,
    AttentionBackendEnum.TRITON_ATTN,
)


class Layout:
    """The positions of chunks, tokens and windows of packed clips. Host integers only.

    ``frames``: mel frames of each clip. ``by_length`` sorts the windows by their length, so that
    equal ones are neighbours and one attention call takes them all; ``restore`` undoes it.
    """

    def __init__(self, frames: Sequence[int], geometry: Geometry, *, by_length: bool) -> None:
        by_chunk = [geometry.frames_by_chunk(n) for n in frames]
        self.clip_tokens = [geometry.num_tokens(n) for n in frames]
        self.chunk_frames = np.concatenate(by_chunk).astype(np.int64)
        self.clip_ids = np.repeat(np.arange(len(frames)), [len(chunks) for chunks in by_chunk])

        chunk_tokens = np.array([geometry.num_tokens(n) for n in self.chunk_frames])
        starts = np.arange(len(chunk_tokens)) * geometry.chunk_tokens
        self.token_index = _ranges(starts, chunk_tokens)  # (T,) into the (C * t) tokens of chunks

        self.windows = np.array([w for n in self.clip_tokens for w in geometry.windows(n)])
        self.restore: np.ndarray | None = None
        if by_length:
            self._sort_by_length()

    def _sort_by_length(self) -> None:
        order = np.argsort(-self.windows, kind="stable")
        starts = np.cumsum(self.windows) - self.windows
        packed = _ranges(starts[order], self.windows[order])
        self.windows = self.windows[order]
        self.token_index = self.token_index[packed]
        self.restore = np.argsort(packed)


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate the integers of [start, start + length) of all pairs."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(starts - (ends - lengths), lengths)


@dataclass(frozen=True)
class AttentionCalls:
    """The arguments of ``MMEncoderAttention`` for the windows of a batch.

    ``shapes``: (windows, tokens) of each call, which together make the T tokens; variable-length
    backends take them all in one, with their bounds in ``metadata``.
    """

    shapes: list[tuple[int, int]]
    metadata: Mapping[str, torch.Tensor | None] = field(default_factory=dict)


class AudioEncoder(nn.Module):
    """(C, M, F) chunks of log-mel -> (T, output_dim) audio tokens."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_stacked={
            ".self_attn.q_proj.": (".self_attn.qkv_proj.", "q"),
            ".self_attn.k_proj.": (".self_attn.qkv_proj.", "k"),
            ".self_attn.v_proj.": (".self_attn.qkv_proj.", "v"),
        }
    )

    positions: torch.Tensor

    def __init__(
        self,
        config: Qwen3ASRAudioEncoderConfig,
        *,
        quant_config: QuantizationConfig | None = None,
        keep_order: bool = False,
        prefix: str = "",
    ) -> None:
        """``keep_order``: never sort windows, so that row i of a layer is token i of the batch."""
        super().__init__()
        self.config = config
        self.keep_order = keep_order
        self.geometry = config.geometry
        self.log_mel = LogMel(config.num_mel_bins)

        channels = config.downsample_hidden_size
        # channels_last is what convolution kernels run fastest on, on CPU and GPU
        self.conv2d1 = _conv(1, channels)
        self.conv2d2 = _conv(channels, channels)
        self.conv2d3 = _conv(channels, channels)
        num_bins = math.ceil(config.num_mel_bins / 8)

        def replicated(inputs: int, outputs: int, name: str, *, bias: bool) -> ReplicatedLinear:
            return ReplicatedLinear(
                inputs,
                outputs,
                bias=bias,
                quant_config=quant_config,
                return_bias=False,
                prefix=f"{prefix}.{name}",
            )

        d_model = config.d_model
        self.conv_out = replicated(channels * num_bins, d_model, "conv_out", bias=False)
        positions = _sinusoids(self.geometry.chunk_tokens, d_model)
        self.register_buffer("positions", positions, persistent=False)
        self.layers = nn.ModuleList(
            EncoderLayer(config, quant_config=quant_config, prefix=f"{prefix}.layers.{i}")
            for i in range(config.encoder_layers)
        )
        self.ln_post = nn.LayerNorm(d_model)
        self.proj1 = replicated(d_model, d_model, "proj1", bias=True)
        self.act = get_act_fn(config.activation_function)
        self.proj2 = replicated(d_model, config.output_dim, "proj2", bias=True)

    @property
    def dtype(self) -> torch.dtype:
        return self.conv2d1.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.conv2d1.weight.device

    @property
    def attn_backend(self) -> AttentionBackendEnum:
        first: EncoderLayer = self.layers[0]  # type: ignore[assignment]
        return first.self_attn.attn.attn_backend

    def layout(self, frames: Sequence[int]) -> Layout:
        """Return the layout of clips with these mel frames, in attention's order."""
        by_length = self.attn_backend == AttentionBackendEnum.TORCH_SDPA and not self.keep_order
        return Layout(frames, self.geometry, by_length=by_length)

    def encode_waveforms(
        self,
        chunks: torch.Tensor,
        frames: Sequence[int],
        peaks: torch.Tensor | None = None,
    ) -> list[torch.Tensor]:
        """Encode samples, (C, S) float32 (``log_mel.cut_chunks``), to audio tokens of each clip.

        ``peaks``: (clips,) float32 on the host, of clips that are parts of longer ones.
        """
        layout = self.layout(frames)
        log_mel = self.log_mel(
            chunks,
            async_tensor_h2d(layout.chunk_frames, device=self.device),
            async_tensor_h2d(layout.clip_ids, device=self.device),
            num_clips=len(frames),
            chunks_at_once=self.config.conv_chunksize,
            peaks=None if peaks is None else async_tensor_h2d(peaks.numpy(), device=self.device),
        )
        return self._encode(log_mel, layout)

    def encode_features(self, features: torch.Tensor, frames: Sequence[int]) -> list[torch.Tensor]:
        """Encode log-mel features, (M, sum of frames), clip after clip, to audio tokens."""
        layout = self.layout(frames)
        num_frames = self.geometry.chunk_frames
        starts = np.cumsum(layout.chunk_frames) - layout.chunk_frames
        index = starts[:, None] + np.arange(num_frames)
        index[np.arange(num_frames) >= layout.chunk_frames[:, None]] = features.shape[1]
        columns = async_tensor_h2d(index.reshape(-1), device=self.device)
        padded = F.pad(features, (0, 1))[:, columns]  # (M, C * F), zeros past each clip's end
        return self._encode(padded.unflatten(1, (-1, num_frames)).transpose(0, 1), layout)

    def _encode(self, log_mel: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
        x = self(
            log_mel,
            async_tensor_h2d(layout.token_index, device=self.device),
            self.attention_calls(layout),
            chunks_at_once=self._chunks_at_once(),
        )
        if layout.restore is not None:
            x = x[async_tensor_h2d(layout.restore, device=self.device)]
        return list(x.split(layout.clip_tokens))

    def _chunks_at_once(self) -> int:
        """Return the chunks per call: few launches on a GPU, warm caches on a CPU."""
        limit = self.config.conv_chunksize
        return min(CPU_CHUNKS_AT_ONCE, limit) if self.device.type == "cpu" else limit

    def graph_buffers(
        self,
        chunks: torch.Tensor,
        frames: Sequence[int],
        peaks: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Build the buffers of ``encode_graph`` for the (C, S) samples of these clips.

        A graph of more chunks takes the same buffers padded with zeros: chunks of no frames, which
        have no peak and raise no floor; windows of no tokens; tokens that are never read.
        """
        layout = Layout(frames, self.geometry, by_length=False)
        windows = np.zeros(len(chunks), dtype=np.int32)  # every window has a chunk
        windows[: len(layout.windows)] = layout.windows
        loudest = np.full(len(chunks), -np.inf, dtype=np.float32)  # every clip has a chunk, too
        loudest[: len(frames)] = -np.inf if peaks is None else peaks.numpy()
        arrays = (layout.chunk_frames, layout.clip_ids, layout.token_index, windows, loudest)
        on_device = [async_tensor_h2d(array, device=self.device) for array in arrays]
        return dict(zip(GRAPH_BUFFERS, [chunks, *on_device], strict=True))

    def encode_graph(self, buffers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Encode the buffers: tokens of all clips, then those of the padding, (., output_dim).

        Nothing here depends on the clips but through the buffers, so that it can be captured in a
        CUDA graph. Before a capture it must run once, for cuFFT to make its plans.
        """
        chunks, frames, clip_ids, token_index, windows, peaks = (buffers[k] for k in GRAPH_BUFFERS)
        chunks_at_once = min(GRAPH_CHUNKS_AT_ONCE, self.config.conv_chunksize)
        log_mel = self.log_mel(
            chunks,
            frames,
            clip_ids,
            num_clips=len(chunks),
            chunks_at_once=chunks_at_once,
            peaks=peaks,
        )
        calls = self._graph_attention_calls(windows, len(token_index))
        x: torch.Tensor = self(log_mel, token_index, calls, chunks_at_once=chunks_at_once)
        return x

    def _graph_attention_calls(self, windows: torch.Tensor, num_tokens: int) -> AttentionCalls:
        """The padding gets windows of its own: rows that attention leaves unwritten may hold NaN,
        and kernels that multiply what they mask by zero carry it into a clip's last window."""
        length = self.geometry.window_tokens
        bounds = F.pad(windows.cumsum(0), (1, 0))
        padding = torch.arange(length, num_tokens + length, length, device=windows.device)
        bounds = torch.cat([bounds, (bounds[-1] + padding).clamp_(max=num_tokens)])
        metadata = {"cu_seqlens": bounds.int(), "max_seqlen": torch.tensor(length, device="cpu")}
        return AttentionCalls([(1, num_tokens)], metadata)

    def forward(
        self,
        log_mel: torch.Tensor,
        token_index: torch.Tensor,
        calls: AttentionCalls,
        *,
        chunks_at_once: int,
    ) -> torch.Tensor:
        """Encode (C, M, F) to (T, output_dim), in the order of ``token_index``; always ``bounded``.

        ``token_index``: (T,) into the C * t tokens of chunks. ``chunks_at_once`` bounds the memory
        of the convolutions.
        """
        log_mel = bounded(log_mel)
        x = torch.cat([self.stem(part) for part in log_mel.split(chunks_at_once)])
        x = self.conv_out(x.flatten(0, 1)[token_index])  # packed: LoRA counts one row per token
        positions = self.positions.to(x.dtype)
        x = x + positions[token_index % len(positions)]  # they restart in every chunk
        # Before attention, too: its kernels carry NaN from one clip into its neighbour.
        return bounded(self.transform(bounded(x), calls))

    def stem(self, log_mel: torch.Tensor) -> torch.Tensor:
        """Convolve (C, M, F) to (C, t, channels * M / 8); each chunk on its own."""
        x = self._convolve_by_kernels(log_mel) if self._has_kernels else self._convolve(log_mel)
        # (C, channels, M / 8, t)
        return x.permute(0, 3, 1, 2).flatten(2)  # the order that conv_out was trained on

    def _convolve(self, log_mel: torch.Tensor) -> torch.Tensor:
        x = log_mel.to(self.dtype).unsqueeze(1)
        for conv in (self.conv2d1, self.conv2d2, self.conv2d3):
            x = torch.ops.aten.gelu_(conv(x))  # in place: conv2d1 gives 3 MB per chunk in bf16
        return x

    def _convolve_by_kernels(self, log_mel: torch.Tensor) -> torch.Tensor:
        x = first_conv(log_mel, *self.conv2d1.parameters())
        for conv in (self.conv2d2, self.conv2d3):
            weight, bias = conv.parameters()
            x = bias_gelu_(F.conv2d(x, weight, stride=2, padding=1), bias)
        return x

    @property
    def _has_kernels(self) -> bool:
        return HAS_TRITON and self.device.type == "cuda"

    def transform(self, x: torch.Tensor, calls: AttentionCalls) -> torch.Tensor:
        """Run the transformer and the projector: (T, D) -> (T, output_dim)."""
        for layer in self.layers:
            x = layer(x, calls)
        return self.proj2(self.act(self.proj1(self.ln_post(x))))

    def attention_calls(self, layout: Layout) -> AttentionCalls:
        """Return one call per window length, or one for all where the backend takes bounds."""
        if layout.restore is not None:
            lengths, counts = np.unique(layout.windows, return_counts=True)
            shapes = zip(counts[::-1].tolist(), lengths[::-1].tolist(), strict=True)
            return AttentionCalls(list(shapes))
        bounds = np.concatenate(([0], np.cumsum(layout.windows))).astype(np.int32)
        arguments = _attention_arguments(self.attn_backend, bounds, self.config, self.device)
        return AttentionCalls([(1, int(bounds[-1]))], arguments)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = AutoWeightsLoader(self).load_weights(
            weights, mapper=self.hf_to_vllm_mapper
        )
        return loaded


class EncoderLayer(nn.Module):
    """A pre-norm transformer layer, (T, D) -> (T, D)."""

    def __init__(
        self,
        config: Qwen3ASRAudioEncoderConfig,
        *,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        shared = _parallel_options(config, quant_config)
        self.self_attn = EncoderAttention(
            config, quant_config=quant_config, prefix=f"{prefix}.self_attn"
        )
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = ColumnParallelLinear(
            config.d_model,
            config.encoder_ffn_dim,
            **shared,
            prefix=f"{prefix}.fc1",
        )
        self.activation_fn = get_act_fn(config.activation_function)
        self.fc2 = RowParallelLinear(
            config.encoder_ffn_dim,
            config.d_model,
            **shared,
            prefix=f"{prefix}.fc2",
        )
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: torch.Tensor, calls: AttentionCalls) -> torch.Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x), calls)
        x = x + self.fc2(self.activation_fn(self.fc1(self.final_layer_norm(x))))
        if x.dtype == torch.float16:  # the residual stream outgrows half precision
            limit = torch.finfo(x.dtype).max - 1000
            x = x.clamp(-limit, limit)
        return x


class EncoderAttention(nn.Module):
    """Attention inside windows and zero across them, (T, D) -> (T, D)."""

    def __init__(
        self,
        config: Qwen3ASRAudioEncoderConfig,
        *,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        num_heads = config.encoder_attention_heads
        self.head_dim = config.d_model // num_heads
        self.num_local_heads = num_heads // _tp_size(config)
        shared = _parallel_options(config, quant_config)
        self.qkv_proj = QKVParallelLinear(
            config.d_model,
            self.head_dim,
            num_heads,
            **shared,
            prefix=f"{prefix}.qkv_proj",
        )
        self.out_proj = RowParallelLinear(
            config.d_model,
            config.d_model,
            **shared,
            prefix=f"{prefix}.out_proj",
        )
        self.attn = MMEncoderAttention(
            self.num_local_heads, self.head_dim, scale=self.head_dim**-0.5, prefix=f"{prefix}.attn"
        )

    def forward(self, x: torch.Tensor, calls: AttentionCalls) -> torch.Tensor:
        qkv = self.qkv_proj(x).view(len(x), 3, self.num_local_heads, self.head_dim)
        parts = qkv.split([windows * tokens for windows, tokens in calls.shapes])
        outputs = [
            self._attend(part.unflatten(0, shape), calls)
            for part, shape in zip(parts, calls.shapes, strict=True)
        ]
        return self.out_proj(torch.cat(outputs) if len(outputs) > 1 else outputs[0])

    def _attend(self, qkv: torch.Tensor, calls: AttentionCalls) -> torch.Tensor:
        query, key, value = qkv.unbind(2)  # each (windows, tokens, heads, head_dim)
        attended: torch.Tensor = self.attn(query, key, value, **calls.metadata)
        return attended.flatten(2).flatten(0, 1)


def _attention_arguments(
    backend: AttentionBackendEnum,
    bounds: np.ndarray,
    config: Qwen3ASRAudioEncoderConfig,
    device: torch.device,
) -> dict[str, Any]:
    """Return the arguments of ``MMEncoderAttention`` for windows with these bounds."""
    attention = MMEncoderAttention
    return {
        "cu_seqlens": attention.maybe_recompute_cu_seqlens(
            backend, bounds, config.d_model, _tp_size(config), device
        ),
        # on the host: the backends read it as an integer
        "max_seqlen": torch.tensor(
            attention.compute_max_seqlen(backend, bounds), dtype=torch.int32, device="cpu"
        ),
        "sequence_lengths": attention.maybe_compute_seq_lens(backend, bounds, device),
    }


def _tp_size(config: Qwen3ASRAudioEncoderConfig) -> int:
    """Return the ranks that share a layer; 1, with all heads on each, if they do not divide."""
    size = get_tensor_model_parallel_world_size()
    return size if config.encoder_attention_heads % size == 0 else 1


def _parallel_options(
    config: Qwen3ASRAudioEncoderConfig, quant_config: QuantizationConfig | None
) -> dict[str, Any]:
    """Return the common arguments of the encoder's parallel matrices."""
    return {
        "quant_config": quant_config,
        "return_bias": False,
        "disable_tp": _tp_size(config) != get_tensor_model_parallel_world_size(),
    }


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, 3, 2, padding=1)
    return conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def _sinusoids(length: int, channels: int) -> torch.Tensor:
    """Sinusoidal positions, (length, channels) float32: sines, then cosines."""
    step = math.log(MAX_TIMESCALE) / (channels // 2 - 1)
    rates = torch.exp(-step * torch.arange(channels // 2, dtype=torch.float32))
    angles = torch.arange(length, dtype=torch.float32)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
