# SPDX-License-Identifier: Apache-2.0
"""Bounds of the numbers that reach encoder and decoder: finite, and within float16.

One NaN in the KV cache stays there after its request: attention multiplies what it masks by zero,
and zero times NaN is NaN, so later requests that reuse the block get wrong text. Two checks:

    processor   refuses what no audio gives, and names the value        (check_*)
    model       replaces it, on the device and inside captured graphs   (bounded)

Waveforms have their range in ``peaks.py``.
"""

from __future__ import annotations

from typing import Any

import torch

LIMIT = 1e4  # of audio tokens: the decoder's residual stream has 5e4 left in float16
LOG_MEL_RANGE = (-2.0, 3.0)  # samples in the range of peaks.py give -1.5 to 2.3
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bounded(x: torch.Tensor) -> torch.Tensor:
    """Clamp ``x`` to [-LIMIT, LIMIT], with 0 for NaN; other values keep their bits."""
    return x.nan_to_num(0.0).clamp_(-LIMIT, LIMIT)


def check_log_mel(clips: Any) -> None:
    """Raise ValueError for features, a tensor or a list of them, out of the range of log-mel.

    The message names the value.
    """
    advice = "Compute them as transformers' Qwen3ASRFeatureExtractor does, from samples in [-1, 1]."
    _check(clips, "input_audio_features", *LOG_MEL_RANGE, advice)


def check_embeddings(clips: Any) -> None:
    """Raise ValueError for audio embeddings out of range; the message names the value."""
    advice = "Send what the audio encoder of this checkpoint gives."
    _check(clips, "audio_embeds", -LIMIT, LIMIT, advice)


def _check(clips: Any, name: str, low: float, high: float, advice: str) -> None:
    for clip in [clips] if isinstance(clips, torch.Tensor) else map(torch.as_tensor, clips):
        if clip.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} are {clip.dtype}; give float32, float16 or bfloat16.")
        if not clip.numel():
            raise ValueError(f"{name} are empty; a clip has at least one frame, or one token.")
        for value in clip.aminmax():  # NaN is both
            if not low <= value <= high:
                raise ValueError(
                    f"{name} hold {value:g}; allowed are {low:g} to {high:g}. {advice}"
                )
