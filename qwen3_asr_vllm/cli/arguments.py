# SPDX-License-Identifier: Apache-2.0
"""How the command line parses: a strict parser, types of values, and Whisper's spellings."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from ..formats import FORMATS
from ..languages import read_languages
from ..printable import printable
from .languages import languages_of

FLAGS = ("--word-timestamps", "--highlight-words")  # options that take a boolean in Whisper
BOOLEANS = ("True", "False")  # values of these options in Whisper


class Parser(argparse.ArgumentParser):
    """A parser that rejects repeated options; argparse would ignore the first value."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("action", None, _StoreOnce)

    def error(self, message: str) -> NoReturn:
        super().error(printable(message, max_chars=len(message)))


class _StoreOnce(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: Any = None,
    ) -> None:
        given = vars(namespace).setdefault("_given", set())
        if option and self.dest in given:
            parser.error(f"{'/'.join(self.option_strings)} is given twice; give one value")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class ListLanguages(argparse.Action):
    def __call__(
        self, parser: argparse.ArgumentParser, _: Any, model: Any, option: Any = None
    ) -> None:
        try:
            languages = languages_of(model)
        except (ImportError, OSError, ValueError) as error:
            parser.error(str(error))
        for code, name in languages.items():
            print(f"{code:4} {name}")
        parser.exit()


def with_hyphens(argument: str) -> str:
    """Return an option with hyphens: --max_line_width=20 becomes --max-line-width=20."""
    if not argument.startswith("--"):
        return argument
    name = re.split("[=.]", argument, maxsplit=1)[0]
    return name.replace("_", "-") + argument[len(name) :]


def without_booleans(arguments: Iterable[str]) -> list[str]:
    """Turn the boolean values of Whisper into flags: --word_timestamps True."""
    kept: list[str] = []
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag in FLAGS and value in BOOLEANS:
            kept.append(flag)
            argument = value
        if argument not in BOOLEANS or not kept or kept[-1] not in FLAGS:
            kept.append(argument)
        elif argument == "False":
            kept.pop()
    return kept


def word_list(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def format_list(value: str) -> list[str]:
    """Parse a comma-separated list of formats, each once."""
    names = list(FORMATS) if value == "all" else list(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        known = ", ".join(FORMATS)
        raise argparse.ArgumentTypeError(f"unknown format {unknown[0]!r}; use {known}, or all")
    return names


def declared_languages(value: str) -> dict[str, str]:
    try:
        return read_languages(value, "the option")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def step_seconds(value: str) -> float:
    from ..streaming import CLIP_S, MIN_STEP_S

    return seconds_between(MIN_STEP_S, CLIP_S)(value)


def seconds_between(least: float, most: float) -> Callable[[str], float]:
    def seconds(value: str) -> float:
        try:
            if least <= float(value) <= most:
                return float(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{value!r} is not from {least:g} to {most:g} seconds")

    return seconds


def number_between(
    kind: type[int] | type[float], least: float, most: float
) -> Callable[[str], int | float]:
    def number(value: str) -> int | float:
        try:
            if least <= kind(value) <= most:
                return kind(value)
        except ValueError:
            pass
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"{value!r} is not {what} from {least:g} to {most:g}")

    return number


def at_least(least: int) -> Callable[[str], int]:
    def number(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {least}")
        return int(value)

    return number
