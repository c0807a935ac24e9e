# SPDX-License-Identifier: Apache-2.0
"""Lengths: samples, mel frames, chunks, windows, audio tokens.

    16000 samples = 100 frames = 1 chunk = 13 tokens = 1 s
    8 chunks = 1 attention window = 104 tokens = 8 s

Every length in the package is computed here, in host integers, from the checkpoint's own
``n_window`` and ``n_window_infer``; nothing else does this arithmetic. The numbers above are
those of the published checkpoints (``n_window`` 50, ``n_window_infer`` 800).
"""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_RATE = 16_000  # samples per second
HOP_LENGTH = 160  # samples per frame: 10 ms
FFT_LENGTH = 400  # samples that one frame sees: 25 ms
HALF_FFT = FFT_LENGTH // 2  # samples on either side of a frame's centre
CONV_STRIDE = 8  # frames per token: three convolutions of stride 2
MIN_SAMPLES = SAMPLE_RATE // 2  # a shorter clip is zero-padded to 0.5 s
MAX_CLIP_S = 1200  # seconds of audio that the model takes in one clip
DEFAULT_CLIP_S = 60.0  # seconds; with cuts in the second half, clips last 30 to 60 s


def num_frames(num_samples: int) -> int:
    """Mel frames of a clip; the padding of a clip under 0.5 s counts."""
    return max(num_samples, MIN_SAMPLES) // HOP_LENGTH


@dataclass(frozen=True)
class Geometry:
    """The lengths of one checkpoint.

    ``n_window``: half a chunk, in frames. ``n_window_infer``: an attention window, in frames.

    Raises ValueError where a window does not hold a whole number of chunks.
    """

    n_window: int = 50
    n_window_infer: int = 800

    def __post_init__(self) -> None:
        if self.n_window < 1:
            raise ValueError(f"audio_config.n_window is {self.n_window}; it must be at least 1.")
        if self.n_window_infer < 1 or self.n_window_infer % self.chunk_frames:
            raise ValueError(
                f"audio_config.n_window_infer is {self.n_window_infer} frames; it must be a "
                f"positive multiple of 2 * n_window = {self.chunk_frames}."
            )

    @property
    def chunk_frames(self) -> int:
        """Frames that the convolutions see at once."""
        return 2 * self.n_window

    @property
    def window_samples(self) -> int:
        """Samples from one attention window to the next."""
        return self.n_window_infer * HOP_LENGTH

    @property
    def chunk_samples(self) -> int:
        """Samples that the frames of one chunk see: consecutive chunks overlap by 240."""
        return (self.chunk_frames - 1) * HOP_LENGTH + FFT_LENGTH

    @property
    def chunk_tokens(self) -> int:
        """Tokens of a whole chunk."""
        return _ceil_div(self.chunk_frames, CONV_STRIDE)

    @property
    def window_tokens(self) -> int:
        """Tokens that encoder attention sees at once."""
        return self.n_window_infer // self.chunk_frames * self.chunk_tokens

    def num_chunks(self, frames: int) -> int:
        """Chunks of a clip; the last one may be short."""
        return _ceil_div(frames, self.chunk_frames)

    def frames_by_chunk(self, frames: int) -> list[int]:
        """Frames of each chunk of a clip, in order."""
        whole, rest = divmod(frames, self.chunk_frames)
        return [self.chunk_frames] * whole + [rest] * (rest > 0)

    def num_tokens(self, frames: int) -> int:
        """Tokens of a clip: 13 per chunk, ceil(frames / 8) in a short last chunk."""
        whole, rest = divmod(frames, self.chunk_frames)
        return whole * self.chunk_tokens + _ceil_div(rest, CONV_STRIDE)

    def max_samples(self, tokens: int) -> int:
        """Samples of the longest clip that fits into this many tokens."""
        whole, rest = divmod(tokens, self.chunk_tokens)
        return (whole * self.chunk_frames + rest * CONV_STRIDE + 1) * HOP_LENGTH - 1

    def windows(self, tokens: int) -> list[int]:
        """Tokens of each attention window of a clip, in order."""
        whole, rest = divmod(tokens, self.window_tokens)
        return [self.window_tokens] * whole + [rest] * (rest > 0)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
