# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.geometry import HOP_LENGTH, MIN_SAMPLES, Geometry, num_frames

geometries = st.builds(
    lambda n_window, chunks: Geometry(n_window, chunks * 2 * n_window),
    st.integers(1, 120),
    st.integers(1, 12),
)


def convolved(frames: int) -> int:
    """Length after three real convolutions (k 3, s 2, p 1), by the textbook formula of each."""
    for _ in range(3):
        frames = (frames + 2 - 3) // 2 + 1
    return frames


@pytest.mark.parametrize("frames", [1, 2, 7, 8, 9, 50, 99, 100])
def test_tokens_match_the_convolutions(frames):
    import torch

    conv = torch.nn.Conv2d(1, 1, 3, 2, padding=1)
    assert Geometry().num_tokens(frames) == conv(conv(conv(torch.zeros(1, 1, 8, frames)))).shape[-1]


@given(geometries, st.integers(1, 200_000))
def test_tokens_are_the_sum_over_the_chunks(geometry, frames):
    by_chunk = geometry.frames_by_chunk(frames)
    assert sum(by_chunk) == frames
    assert len(by_chunk) == geometry.num_chunks(frames)
    assert all(n == geometry.chunk_frames for n in by_chunk[:-1])
    assert geometry.num_tokens(frames) == sum(map(convolved, by_chunk))


@given(geometries, st.integers(0, 100_000))
def test_windows_cover_every_token_once(geometry, tokens):
    windows = geometry.windows(tokens)
    assert sum(windows) == tokens
    assert all(w == geometry.window_tokens for w in windows[:-1])
    assert all(0 < w <= geometry.window_tokens for w in windows)


@given(geometries, st.integers(100, 50_000))
def test_max_samples_is_the_longest_clip(geometry, tokens):
    longest = geometry.max_samples(tokens)
    if longest > MIN_SAMPLES:
        assert geometry.num_tokens(num_frames(longest)) <= tokens
        assert geometry.num_tokens(num_frames(longest + HOP_LENGTH)) > tokens


def test_published_checkpoints_have_13_tokens_per_second():
    geometry = Geometry(50, 800)
    assert (geometry.chunk_tokens, geometry.window_tokens) == (13, 104)
    assert geometry.chunk_samples == 16_240
    assert num_frames(1) == num_frames(MIN_SAMPLES) == 50
    assert num_frames(16_159) == 100


@pytest.mark.parametrize(
    ("n_window", "n_window_infer", "field"),
    [(0, 800, "n_window"), (50, 850, "n_window_infer"), (50, 0, "n_window_infer")],
)
def test_impossible_lengths_name_the_field(n_window, n_window_infer, field):
    with pytest.raises(ValueError, match=rf"audio_config\.{field} is"):
        Geometry(n_window, n_window_infer)
