# SPDX-License-Identifier: Apache-2.0
"""The worker's side: configs, log-mel, encoder, processor, thinker.

vLLM looks its architectures up here, by name.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import an architecture when vLLM asks for it: reading a config needs no layers."""
    if name == "Qwen3ASRForConditionalGeneration":
        from .transcriber import Qwen3ASRForConditionalGeneration

        return Qwen3ASRForConditionalGeneration
    if name == "Qwen3ASRForcedAlignerForTokenClassification":
        from .aligner import Qwen3ASRForcedAlignerForTokenClassification

        return Qwen3ASRForcedAlignerForTokenClassification
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
