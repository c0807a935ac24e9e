# SPDX-License-Identifier: Apache-2.0
"""The command ``qwen3-asr``."""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Run one command line and return its exit code, also for Ctrl-C during the imports."""
    try:
        from . import entry

        return entry.main(argv)
    except KeyboardInterrupt:
        print("qwen3-asr: stopped", file=sys.stderr)
        return 130
