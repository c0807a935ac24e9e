# SPDX-License-Identifier: Apache-2.0
"""Beam search over one prompt, as transformers does it, without an engine.

    running beams  -- yields -->  [Prefix, ...]    those whose next tokens are not scored yet
                   <-- is sent -- [Scored, ...]    and the greedy continuation of each, scored too
                   -- returns --> Hypothesis

vLLM's own beam search sends every beam of every step as a request of one token, runs on to the
token limit, and divides scores by the length of prompt and output. This one stops as transformers
does, divides by the length of the output, and reads ahead: most beams go on greedily, so one
request of a few tokens scores several steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import nlargest
from operator import itemgetter

from .decoding import is_token_loop
from .options import Beams
from .rounds import Rounds

READ_AHEAD = 2  # tokens per request: more of them serve steps that no beam takes


@dataclass(frozen=True)
class Prefix:
    """The tokens of a beam, to be continued greedily by at most ``max_tokens``."""

    tokens: tuple[int, ...]
    max_tokens: int


@dataclass(frozen=True)
class Scored:
    """The greedy continuation of a prefix, and the log-probabilities at each of its tokens.

    ``logprobs`` hold the likeliest tokens of each position, ``num_scores(...)`` or more.
    """

    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]


@dataclass(frozen=True)
class Hypothesis:
    """A sequence of tokens with their log-probabilities in nats.

    ``finish_reason`` is vLLM's: "stop" after an end token, which is the last of ``tokens``;
    "length" at the token limit, "repetition" where nothing but loops was found.
    """

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str | None = None

    @cached_property
    def total(self) -> float:
        return sum(self.logprobs)

    def score(self, beams: Beams) -> float:
        """Return the log-probability, divided by a power of the length."""
        return self.total / len(self.tokens) ** beams.length_penalty


def num_scores(beams: Beams, end_ids: Collection[int]) -> int:
    """Return the number of likeliest tokens that the search reads at each position.

    Each of them may be an end token, and ``width`` others must go on.
    """
    return beams.width + len(end_ids)


def search(beams: Beams, *, end_ids: Collection[int], max_tokens: int) -> Rounds[Hypothesis]:
    """Search for the best sequence of tokens; yields prefixes, is sent their continuations.

    Same steps as transformers' beam search with ``early_stopping=False``: a hypothesis that ends
    counts if it is among the best ``width`` of its step, and the search stops when ``width`` of
    them beat the best running beam. In addition, a search whose best running beam loops ends with
    that beam.
    """
    scores: dict[tuple[int, ...], Mapping[int, float]] = {}
    running, finished = [Hypothesis()], list[Hypothesis]()
    while running:
        yield from _score(running, scores, max_tokens)
        running, ended = _step(beams, running, scores, end_ids, max_tokens)
        finished = nlargest(beams.width, finished + ended, key=lambda beam: beam.score(beams))
        is_full = len(finished) == beams.width
        if running and is_full and running[0].score(beams) <= finished[-1].score(beams):
            break
        if running and is_token_loop(running[0].tokens):
            return replace(running[0], finish_reason="repetition")
    return finished[0]


def _score(
    running: Sequence[Hypothesis], scores: dict[tuple[int, ...], Mapping[int, float]], limit: int
) -> Rounds[None]:
    """Request the scores of the beams that have none, and keep those of their continuations."""
    unscored = [beam.tokens for beam in running if beam.tokens not in scores]
    if not unscored:
        return
    # The whole output first: where the model is sure, all beams follow it nearly everywhere.
    most = READ_AHEAD if scores else limit
    requests = [Prefix(tokens, min(most, limit - len(tokens))) for tokens in unscored]
    outputs = yield requests
    for tokens, scored in zip(unscored, outputs, strict=True):
        for token, logprobs in zip(scored.tokens, scored.logprobs, strict=True):
            scores[tokens] = logprobs
            tokens += (token,)


def _step(
    beams: Beams,
    running: Sequence[Hypothesis],
    scores: Mapping[tuple[int, ...], Mapping[int, float]],
    end_ids: Collection[int],
    limit: int,
) -> tuple[list[Hypothesis], list[Hypothesis]]:
    """Continue the beams by one token: return those that run on, and those that ended."""
    continued = (
        (beam.total + logprob, beam, token, logprob)
        for beam in running
        for token, logprob in scores[beam.tokens].items()
    )
    best = nlargest((1 + len(end_ids)) * beams.width, continued, key=itemgetter(0))
    is_last = len(running[0].tokens) + 1 == limit
    grown = [
        Hypothesis(
            (*beam.tokens, token),
            (*beam.logprobs, logprob),
            "stop" if token in end_ids else "length" if is_last else None,
        )
        for _, beam, token, logprob in best
    ]
    ended = [beam for beam in grown[: beams.width] if beam.finish_reason]
    return [beam for beam in grown if not beam.finish_reason][: beams.width], ended
