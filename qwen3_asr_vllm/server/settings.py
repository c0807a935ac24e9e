# SPDX-License-Identifier: Apache-2.0
"""Limits of a server, from the environment."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from vllm import envs

MAX_UPLOAD_MB = 1024  # MiB, unless VLLM_MAX_AUDIO_CLIP_FILESIZE_MB says otherwise

_Number = TypeVar("_Number", int, float)


def limit(variable: str, default: Any) -> Any:
    """vLLM's limit where it is set; vLLM's own defaults would refuse a lecture."""
    return getattr(envs, variable) if envs.is_set(variable) else default


def setting(variable: str, default: _Number) -> _Number:
    """A number above 0 of the default's type, from the environment if it is set there.

    Raises ValueError, which names the variable, for anything else.
    """
    given = os.environ.get(variable)
    if given is None:
        return default
    try:
        if (number := type(default)(given)) > 0:
            return number
    except ValueError:
        pass
    kind = "whole number" if isinstance(default, int) else "number"
    raise ValueError(f"{variable} is {given!r}; give a {kind} above 0.")
