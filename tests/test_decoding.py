# SPDX-License-Identifier: Apache-2.0
"""The token budget covers speech and stays within the model."""

from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.decoding import max_new_tokens
from qwen3_asr_vllm.geometry import MAX_CLIP_S


@given(st.floats(0, MAX_CLIP_S))
def test_budget_covers_the_costliest_script_and_its_header(clip_s):
    assert max_new_tokens(clip_s) >= 32 + 20 * clip_s


@given(st.floats(0, MAX_CLIP_S), st.floats(0, MAX_CLIP_S))
def test_a_longer_clip_never_gets_fewer_tokens(a, b):
    assert (max_new_tokens(a) <= max_new_tokens(b)) or a > b


def test_the_longest_clip_leaves_the_context_room():
    audio_tokens, max_position_embeddings = 13 * MAX_CLIP_S, 65_536
    assert audio_tokens + max_new_tokens(MAX_CLIP_S) < max_position_embeddings - 10_000
