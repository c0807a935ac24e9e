# SPDX-License-Identifier: Apache-2.0
"""How one clip is decoded: greedily, within a token budget that its duration sets."""

import math

DEFAULT_CLIP_S = 60.0  # seconds; with cuts in the second half, clips last 30 to 60 s

_BASE_TOKENS = 64  # the header, and room for a word in a very short clip
_TOKENS_PER_S = 25  # fast Chinese needs about 8, the costliest scripts about 20


def max_new_tokens(clip_s: float) -> int:
    """The most text tokens that ``clip_s`` seconds of speech can need.

    Far above real speech, far below the model's context: a loop ends here, and reaching the
    budget (``finish_reason == "length"``) means that text may be missing or repeated.
    """
    return _BASE_TOKENS + math.ceil(_TOKENS_PER_S * clip_s)
