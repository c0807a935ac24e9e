# SPDX-License-Identifier: Apache-2.0
"""The log-mel spectrogram of Whisper, for many clips at once, where the model runs.

    waveform -- narrow, cut_chunks --> int16 or float32 -- engine --> widen -- LogMel --> log-mel

The host only cuts a waveform into chunks; the transform runs on the worker's device, in float32,
with a number of operations that does not depend on the number of clips.

Shapes: C chunks of all clips of a batch, S = 16240 samples, F = 100 frames, M = 128 mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from transformers.audio_utils import mel_filter_bank

from ..geometry import (
    FFT_LENGTH,
    HALF_FFT,
    HOP_LENGTH,
    MIN_SAMPLES,
    SAMPLE_RATE,
    Geometry,
)

FLOOR = 1e-10  # of the mel power
DYNAMIC_RANGE = 8.0  # log10 below the loudest bin of the clip
FULL_SCALE = 32_768.0  # of samples of 16 bits
NARROWED_AT_ONCE = 1 << 15  # samples: they stay in a core's cache


@np.errstate(over="ignore", invalid="ignore")  # the processor has checked the range
def narrow(waveform: np.ndarray) -> np.ndarray:
    """Scale samples to 16 bits: int16 where all are whole numbers then, else float32.

    They are in 16-bit PCM at 16 kHz; int16 halves what the engine's thread copies. ``widen``
    restores the samples exactly in both cases: the scale is a power of two.
    """
    narrowed = np.empty(len(waveform), np.int16)
    for start in range(0, len(waveform), NARROWED_AT_ONCE):
        scaled = waveform[start : start + NARROWED_AT_ONCE] * np.float32(FULL_SCALE)
        part = narrowed[start : start + NARROWED_AT_ONCE]
        part[:] = scaled
        if not np.array_equal(part, scaled):
            return waveform * np.float32(FULL_SCALE)
    return narrowed


def widen(chunks: Sequence[torch.Tensor]) -> torch.Tensor:
    """Join the chunks of clips, each (its C, S) int16 or float32, to samples, (C, S) float32."""
    return torch.cat(list(chunks)).float().div_(FULL_SCALE)


def cut_chunks(
    waveform: np.ndarray, geometry: Geometry, *, has_context: bool = False
) -> np.ndarray:
    """Cut a waveform into the samples that the frames of each chunk see, (C, S), of its type.

    ``waveform``: (samples,), a clip, or with ``has_context`` a later part of one that opens with
    the 200 samples before its first frame. A clip is zero-padded to 0.5 s and reflected by half a
    transform at its start; either is at its end, as a centred STFT does; past that the last chunk
    holds zeros.
    """
    if len(waveform) < MIN_SAMPLES and not has_context:
        waveform = np.pad(waveform, (0, MIN_SAMPLES - len(waveform)))
    before = 0 if has_context else HALF_FFT  # samples that the first frame sees and are not there
    stride = geometry.chunk_frames * HOP_LENGTH
    num_samples = len(waveform) + before - HALF_FFT
    num_chunks = geometry.num_chunks(num_samples // HOP_LENGTH)
    chunks = np.empty((num_chunks, geometry.chunk_samples), dtype=waveform.dtype)
    chunks[-1] = 0
    for i, chunk in enumerate(chunks):
        start = i * stride - before  # in the waveform
        part = waveform[max(start, 0) : start + len(chunk)]
        chunk[max(-start, 0) :][: len(part)] = part
    chunks[0, :before] = waveform[before:0:-1]
    tail = chunks[-1, before + len(waveform) - (num_chunks - 1) * stride :][:HALF_FFT]
    tail[:] = waveform[-2 : -HALF_FFT - 2 : -1][: len(tail)]
    return chunks


class LogMel(nn.Module):
    """The log-mel spectrogram of chunks. Same numbers as ``WhisperFeatureExtractor``."""

    window: torch.Tensor
    filters: torch.Tensor

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        filters = mel_filter_bank(
            num_frequency_bins=FFT_LENGTH // 2 + 1,
            num_mel_filters=num_mel_bins,
            min_frequency=0.0,
            max_frequency=SAMPLE_RATE / 2,
            sampling_rate=SAMPLE_RATE,
            norm="slaney",
            mel_scale="slaney",
        )
        window = torch.hann_window(FFT_LENGTH, dtype=torch.float32)
        self.register_buffer("window", window, persistent=False)
        self.register_buffer(
            "filters", torch.tensor(filters, dtype=torch.float32), persistent=False
        )

    def forward(
        self,
        chunks: torch.Tensor,
        frames: torch.Tensor,
        clip_ids: torch.Tensor,
        *,
        num_clips: int,
        chunks_at_once: int,
        peaks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute log-mel of packed chunks, (C, M, F) float32, zero past the end of each clip.

        ``chunks``: (C, S) float32. ``frames``: (C,) frames that each chunk holds of its clip.
        ``clip_ids``: (C,) which clip a chunk belongs to: the floor is one per clip.
        ``chunks_at_once`` bounds the memory of the transform. ``peaks``: (num_clips,) float32, the
        loudest bin of what a clip is a part of; -inf, or None for all, where it stands alone.
        """
        log_mel = torch.cat([self._log_power(part) for part in chunks.split(chunks_at_once)])
        num_frames = log_mel.shape[-1]
        past_end = torch.arange(num_frames, device=chunks.device) >= frames[:, None]
        past_end = past_end[:, None, :]  # (C, 1, F)
        own = log_mel.masked_fill(past_end, -torch.inf).amax((1, 2))
        if peaks is None:
            peaks = own.new_full((num_clips,), -torch.inf)
        floor = peaks.scatter_reduce(0, clip_ids, own, "amax") - DYNAMIC_RANGE
        log_mel = torch.maximum(log_mel, floor[clip_ids][:, None, None])
        return ((log_mel + 4.0) / 4.0).masked_fill(past_end, 0.0)

    @torch.inference_mode()
    def loudest(
        self, waveform: np.ndarray, geometry: Geometry, *, has_context: bool = False
    ) -> float:
        """Return the largest value of a clip or a part of one (``cut_chunks``), before any floor.

        Computed on the host, in whole chunks, so that the bits are those of ``forward`` there.
        """
        chunks = torch.from_numpy(cut_chunks(waveform, geometry, has_context=has_context))
        num_samples = len(waveform) - HALF_FFT if has_context else max(len(waveform), MIN_SAMPLES)
        log_mel = self._log_power(chunks).transpose(0, 1).flatten(1)
        return float(log_mel[:, : num_samples // HOP_LENGTH].max())

    def _log_power(self, chunks: torch.Tensor) -> torch.Tensor:
        frames = chunks.unfold(-1, FFT_LENGTH, HOP_LENGTH) * self.window  # (C, F, 400)
        power = torch.fft.rfft(frames).abs().square()  # (C, F, 201)
        mel = power @ self.filters  # (C, F, M)
        return mel.clamp_(min=FLOOR).log10_().transpose(1, 2)
