# SPDX-License-Identifier: Apache-2.0
"""Checks of arguments, whose errors name the argument and what it must be."""

from __future__ import annotations

from collections.abc import Iterable


def check_string(name: str, value: object) -> str:
    """Return a string. Raises TypeError for anything else, ValueError for what is not Unicode."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is {_shown(value)}; it must be a string.")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            half = f"{ascii(value[error.start])} at character {error.start}"
            raise ValueError(f"{name} holds {half}, which is no text in UTF-8.") from error
    return value


def check_strings(name: str, values: object) -> list[str]:
    """Return a list of strings. Raises TypeError for anything else, one string included."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {_shown(values)}; it must be a list of strings.")
    return [check_string(f"{name}[{number}]", value) for number, value in enumerate(values)]


def check_number(name: str, value: object, least: float, most: float) -> float:
    """Return a number in a range. Raises TypeError for anything else, ValueError out of it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {_shown(value)}; it must be a number.")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value:g}; it must be {least:g} to {most:g}.")
    return value


def check_whole(name: str, value: object, least: int, most: int) -> int:
    """Return a whole number in a range. Raises as ``check_number`` does."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {_shown(value)}; it must be a whole number.")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; it must be {least} to {most}.")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return f"{text[:60]}{'...' if len(text) > 60 else ''}, of type {type(value).__name__}"
