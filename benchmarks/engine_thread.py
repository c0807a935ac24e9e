# SPDX-License-Identifier: Apache-2.0
"""What does a request cost the main thread of vLLM's engine, function by function?

    python benchmarks/engine_thread.py                                # 512 clips of 30 s
    python benchmarks/engine_thread.py --clips 128 --rounds 5

On a fast GPU this thread is the limit, and a CPU shows what it does: an engine core runs in the
benchmark's process, and encoder, decoder and head are replaced by functions that return zeros and
count up. All clips are in the engine at once, as the requests of as many clients are; what other
threads and processes do (decoding, processor, transport) happens before. Both sides get the same
clips of 16-bit samples, prompts and numbers of tokens, each with the parameters of its own
transcription route, and exit if they did unequal work.

A row is CPU time of the thread inside one function, without the rows below it that it calls:
microseconds of a request and of a step, the median of the rounds, the sides in turn. "batch clips"
joins the inputs of the clips of a step; "copy clips" is what a GPU adds there, a copy of each clip
to pinned memory, where joining has not made that copy already. ``spread`` is the noise, of the
worse side (``README.md``).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from typing import Any

from common import (
    AUDIO_TOKEN,
    IN_PROCESS,
    PROMPT,
    SIDES,
    Side,
    exit_on_sigterm,
    print_result,
    print_table,
    spread,
)
from support.audio import SAMPLE_RATE, speech
from support.checkpoints import CHECKPOINT

DISTINCT = 16  # clips that are made; the others are the same under another name
NUM_LOGITS = 256  # tokens that the empty model writes, one after the other: no loop
ENGINE_OPTIONS = {
    "dtype": "bfloat16",
    "max_model_len": 1024,
    "max_num_seqs": 512,
    "max_num_batched_tokens": 8192,
    "kv_cache_memory_bytes": 2 << 30,
    "enable_prefix_caching": False,
    "mm_processor_cache_gb": 0,
    "enforce_eager": True,
    "async_scheduling": False,
}


class Clock:
    """CPU time of this thread by function, each without the functions that it calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inner = [0.0]  # seconds of the functions called, by depth

    def measure(self, owner: Any, name: str, row: str | None = None) -> None:
        """Replace a function of an object or a module by one that is measured."""
        setattr(owner, name, self.measured(getattr(owner, name), row or name.strip("_")))

    def measured(self, function: Callable[..., Any], row: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self._inner.append(0.0)
            start = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                whole = time.thread_time() - start
                own = whole - self._inner.pop()
                self._inner[-1] += whole
                self.seconds[row] = self.seconds.get(row, 0.0) + own

        return run


@cache
def engine() -> tuple[Any, Clock]:
    """An engine core in this process, whose model does nothing, and the clock of its functions."""
    import torch
    from vllm import LLM
    from vllm.v1.worker import gpu_model_runner

    torch.set_num_threads(1)
    llm = LLM(str(CHECKPOINT), **ENGINE_OPTIONS)
    core = llm.llm_engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    clock = Clock()
    for name in ("schedule", "update_from_output"):
        clock.measure(core.scheduler, name)
    for name in (
        *("execute_model", "_update_states", "_prepare_inputs", "_build_attention_metadata"),
        *("_preprocess", "_execute_mm_encoder", "_gather_mm_embeddings", "sample_tokens"),
    ):
        clock.measure(runner, name)
    empty_model(runner.model, clock, llm.llm_engine.model_config.get_hidden_size())
    group = gpu_model_runner.group_and_batch_mm_kwargs
    gpu_model_runner.group_and_batch_mm_kwargs = clock.measured(
        lambda *args, **kwargs: list(group(*args, **kwargs)), "batch clips"
    )
    return llm, clock


def empty_model(model: Any, clock: Clock, hidden_size: int) -> None:
    """Replace the model's work by zeros, and its text by 0, 1, 2, ..."""
    import torch

    step = 0

    def compute_logits(hidden_states: torch.Tensor) -> torch.Tensor:
        nonlocal step
        logits = torch.zeros(len(hidden_states), NUM_LOGITS)
        logits[:, step % NUM_LOGITS] = 1.0
        step += 1
        return logits

    def copied(*tensors: torch.Tensor) -> None:
        for tensor in tensors:
            tensor.clone()

    copy = clock.measured(copied, "copy clips")

    def embed_multimodal(**inputs: Any) -> list[torch.Tensor]:
        for value in inputs.values():
            if isinstance(value, list):
                copy(*value)
        lengths = inputs["audio_feature_lengths"].flatten().tolist()
        return [torch.zeros(num_tokens(n), hidden_size, dtype=torch.bfloat16) for n in lengths]

    zeros = torch.zeros(ENGINE_OPTIONS["max_num_batched_tokens"], hidden_size, dtype=torch.bfloat16)
    model.forward = lambda input_ids, positions, *_, **__: zeros[: positions.shape[-1]]
    model.compute_logits = compute_logits
    model.embed_multimodal = embed_multimodal


def num_tokens(frames: int) -> int:
    """Audio tokens of a clip: 13 each second, and ceil(frames / 8) of the rest."""
    return frames // 100 * 13 + -(-(frames % 100) // 8)


def parameters(side: str, clip_s: float, max_tokens: int) -> Any:
    """The sampling parameters of the side's transcription route; all of them write the same."""
    from vllm import SamplingParams

    if side == "in-tree":
        params = SamplingParams(temperature=0.0)
    else:
        from qwen3_asr_vllm.decoding import Decoding, max_new_tokens
        from qwen3_asr_vllm.engine import sampling_params

        params = sampling_params(Decoding(max_new_tokens(clip_s)), {})
    params.max_tokens, params.ignore_eos = max_tokens, True
    return params


@cache
def requests(side: str, clip_s: float, max_tokens: int) -> list[Any]:
    """Processed requests of ``DISTINCT`` clips, as the engine core gets them."""
    llm, _ = engine()
    client, received = llm.llm_engine.engine_core, []
    client.add_request, add = received.append, client.add_request
    for seed in range(DISTINCT):
        clip = (speech(clip_s, seed=seed) * 2**15).round() / 2**15
        prompt = {"prompt": PROMPT.format(AUDIO_TOKEN)}
        audio = {"multi_modal_data": {"audio": [(clip, SAMPLE_RATE)]}}
        params = parameters(side, clip_s, max_tokens)
        llm.enqueue([prompt | audio], params, use_tqdm=False)
    client.add_request = add
    return received


def named(request: Any, name: str) -> Any:
    """The same request under a name of its own, and its clip too."""
    import msgspec

    features = [replace(f, identifier=name, mm_hash=name) for f in request.mm_features]
    return msgspec.structs.replace(request, request_id=name, mm_features=features)


def run(side: str, args: argparse.Namespace, round: int) -> tuple[dict[str, float], dict[str, int]]:
    """CPU seconds of the thread by function for all clips, and the work that was done."""
    llm, clock = engine()
    core = llm.llm_engine.engine_core.engine_core
    made = requests(side, args.clip_s, args.max_tokens)
    prepared = [
        core.preprocess_add_request(named(made[i % DISTINCT], f"{round}-{i}"))
        for i in range(args.clips)
    ]
    clock.seconds.clear()
    work = {"steps": 0, "prompt tokens": 0, "generated tokens": 0}
    work["prompt tokens"] = sum(len(request.prompt_token_ids) for request, _ in prepared)
    start = time.thread_time()
    for request, wave in prepared:
        core.add_request(request, wave)
    while core.scheduler.has_unfinished_requests():
        outputs, executed = core.step_fn()
        core.post_step(model_executed=executed)
        work["steps"] += 1
        for client in (outputs or {}).values():
            work["generated tokens"] += sum(len(o.new_token_ids) for o in client.outputs)
    whole = time.thread_time() - start
    rest = whole - sum(clock.seconds.values())
    return clock.seconds | {"rest": rest, "all": whole}, work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=512)
    parser.add_argument("--clip-s", type=float, default=30.0)
    parser.add_argument("--max-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    exit_on_sigterm()
    times: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    with ExitStack() as stack:
        sides = {name: stack.enter_context(closing(Side(name, **IN_PROCESS))) for name in SIDES}
        for turn in range(args.rounds):
            done = {}
            for name, side in sides.items():
                seconds, done[name] = side.run(run, name, args, turn)
                times[name].append(seconds)
            if done["ours"] != done["in-tree"]:
                raise SystemExit(f"unequal work: {done}")
    rows = [row(name, times, args.clips, done["ours"]["steps"]) for name in times["ours"][0]]
    print_table(rows)
    print_result("engine_thread", rows, **vars(args), work=done["ours"], load=os.getloadavg())


def row(
    function: str, times: dict[str, list[dict[str, float]]], clips: int, steps: int
) -> dict[str, Any]:
    """Return the median of the rounds, microseconds of a request and of a step, of both sides."""
    rounds = {side: [each.get(function, 0.0) * 1e6 for each in times[side]] for side in SIDES}
    medians = {side: statistics.median(values) for side, values in rounds.items()}
    found: dict[str, Any] = {"function": function}
    found |= {f"{side}, us/request": value / clips for side, value in medians.items()}
    found |= {f"{side}, us/step": value / steps for side, value in medians.items()}
    return found | {"spread": max(spread(values) for values in rounds.values() if any(values))}


if __name__ == "__main__":
    main()
