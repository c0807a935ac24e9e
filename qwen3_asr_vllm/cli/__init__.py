# SPDX-License-Identifier: Apache-2.0
"""The command ``qwen3-asr``."""

from .entry import main

__all__ = ["main"]
