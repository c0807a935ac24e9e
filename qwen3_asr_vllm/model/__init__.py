# SPDX-License-Identifier: Apache-2.0
"""What vLLM's worker loads: configs, log-mel, encoder, processor, thinker.

vLLM looks its architectures up here, by name.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """Import an architecture when vLLM asks for it: configs alone need no torch modules."""
    if name.startswith("Qwen3ASRFor"):
        from . import thinker

        return getattr(thinker, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
