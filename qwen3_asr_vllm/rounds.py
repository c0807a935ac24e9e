# SPDX-License-Identifier: Apache-2.0
"""Rounds of requests: generators that decide, and callers that own the engine.

generator  -- yields -->   [request, ...]
           <-- is sent --  [output, ...]  in the same order
           -- returns -->  result
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Generic, TypeAlias, TypeVar

from .transcript import Transcript

_Result = TypeVar("_Result")

# Yields EngineRequests or AlignmentRequests; is sent the outputs of the same kind.
Rounds: TypeAlias = Generator[list[Any], list[Any], _Result]
Transcription: TypeAlias = Rounds[Transcript]


class Steps(Generic[_Result]):
    """A generator of rounds as its pending ``requests``, until there is a ``result``."""

    requests: list[Any]
    result: _Result

    def __init__(self, rounds: Rounds[_Result]) -> None:
        self._rounds = rounds
        self.send(None)

    def send(self, outputs: list[Any] | None) -> None:
        """Continue with the outputs of ``requests``, in their order."""
        try:
            # A generator that has not started takes None only.
            self.requests = self._rounds.send(outputs)  # type: ignore[arg-type]
        except StopIteration as stop:
            self.requests = []
            self.result = stop.value


def run_rounds(rounds: Sequence[Rounds[_Result]]) -> Rounds[list[_Result]]:
    """Merge many generators of rounds into one, whose rounds hold the requests of all."""
    runs = list(map(Steps, rounds))
    while pending := [run for run in runs if run.requests]:
        requests = [request for run in pending for request in run.requests]
        outputs = yield requests
        if len(outputs) != len(requests):
            raise ValueError(f"{len(outputs)} outputs for {len(requests)} requests.")
        remaining = iter(outputs)
        for run in pending:
            run.send(list(islice(remaining, len(run.requests))))
    return [run.result for run in runs]


def run_together(
    transcriptions: Sequence[Transcription],
    generate: Callable[[list[Any]], list[Any]],
) -> list[Transcript]:
    """Drive many recordings at once; each round is one call with all their pending requests."""
    steps = Steps(run_rounds(transcriptions))
    while steps.requests:
        steps.send(generate(steps.requests))
    return steps.result


def with_warnings(rounds: Transcription, warnings: Sequence[str]) -> Transcription:
    """Run ``rounds``, and put ``warnings`` before those of the transcript."""
    transcript = yield from rounds
    return replace(transcript, warnings=(*warnings, *transcript.warnings))
