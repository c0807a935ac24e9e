# SPDX-License-Identifier: Apache-2.0
"""Equal work: what each side of a benchmark did, read from its metrics, and that it was the same.

    clips, seconds of audio that the encoder got, tokens of prompts and of text

Times of unequal work cannot be compared. A side may decode a clip again, as this package does when
the text loops; it may end its texts earlier, or find a clip in a cache.
"""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import AUDIO_TOKEN, PROMPT

TOKENS_PER_S = 13  # of audio, the output of the encoder
CONTEXT = "Hamburg"  # without one, in-tree leaves out the system turn that the model was trained on
METRICS = {
    "clips": "vllm:request_success_total",
    "prompt_tokens": "vllm:prompt_tokens_total",
    "cached_tokens": "vllm:prompt_tokens_cached_total",
    "tokens": "vllm:generation_tokens_total",
}


@dataclass
class Work:
    """The work of an engine. ``clips`` counts attempts; ``encoded_s`` is the encoder's audio."""

    clips: int = 0
    encoded_s: float = 0.0
    prompt_tokens: int = 0
    tokens: int = 0

    def __add__(self, other: Work) -> Work:
        more = asdict(other)
        return Work(**{name: value + more[name] for name, value in asdict(self).items()})

    def __sub__(self, before: Work) -> Work:
        earlier = asdict(before)
        return Work(**{name: value - earlier[name] for name, value in asdict(self).items()})


class UnequalWork(SystemExit):
    """The sides did different work, or not the work that was asked for."""


def check_work(
    sides: Mapping[str, Work], *, clips: int | None = None, audio_s: float | None = None
) -> None:
    """Raise UnequalWork unless all sides did the same, and ``clips`` and ``audio_s`` if given.

    Seconds may differ by a token for each clip.
    """
    (first, expected), *_ = sides.items()
    for side, work in sides.items():
        for name, value in asdict(work).items():
            slack = work.clips / TOKENS_PER_S if name == "encoded_s" else 0
            if abs(value - asdict(expected)[name]) > slack:
                raise UnequalWork(
                    f"unequal work: {name} {asdict(expected)[name]:g} ({first}), {value:g} ({side})"
                )
        asked = {"clips": (clips, work.clips, 0), "seconds": (audio_s, work.encoded_s, work.clips)}
        for name, (wanted, value, slack) in asked.items():
            if wanted is not None and abs(value - wanted) > slack / TOKENS_PER_S:
                raise UnequalWork(f"{side} was sent {wanted:g} {name} and decoded {value:g}.")


# servers ----


def server_work(address: str, text_tokens: int) -> Work:
    """Read from ``/metrics`` what a server has done so far, in all its processes.

    ``text_tokens`` of each prompt are no audio.
    """
    totals = dict.fromkeys(METRICS, 0.0)
    for line in urllib.request.urlopen(f"{address}/metrics").read().decode().splitlines():
        for name, metric in METRICS.items():
            if line.startswith((f"{metric}{{", f"{metric} ")):
                totals[name] += float(line.rsplit(" ", 1)[1])
    clips, prompt_tokens = int(totals["clips"]), int(totals["prompt_tokens"])
    computed = prompt_tokens - totals["cached_tokens"] - clips * text_tokens
    return Work(clips, computed / TOKENS_PER_S, prompt_tokens, int(totals["tokens"]))


def num_text_tokens(model: Path, context: str = CONTEXT) -> int:
    """Return the tokens of a prompt with this context, those of the audio not counted."""
    from tokenizers import Tokenizer

    text = prompt(context).replace(AUDIO_TOKEN, "")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    return len(tokenizer.encode(text, add_special_tokens=False).ids)


def prompt(context: str = "") -> str:
    return PROMPT.format(AUDIO_TOKEN).replace("system\n", f"system\n{context}", 1)


# engines in this process ----


COUNTED: dict[str, Any] = {"disable_log_stats": False, "enable_logging_iteration_details": True}


class EngineWork:
    """Counts what a ``vllm.LLM`` does that has the options ``COUNTED``: a logger of its statistics.

    >>> count = EngineWork(llm)
    >>> count.work  # so far
    """

    def __init__(self, llm: Any) -> None:
        self.work = Work()
        llm.llm_engine.logger_manager.stat_loggers.append(self)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *others: Any, **named_others: Any
    ) -> None:
        done = Work()
        if scheduler_stats and (details := scheduler_stats.iteration_details):
            done.encoded_s += details.num_encoder_output_tokens / TOKENS_PER_S
        if iteration_stats:
            done.clips += len(iteration_stats.finished_requests)
            done.prompt_tokens += iteration_stats.num_prompt_tokens
            done.tokens += iteration_stats.num_generation_tokens
        self.work = self.work + done

    def log(self) -> None:
        """Print nothing; vLLM calls this every ten seconds."""
