# SPDX-License-Identifier: Apache-2.0
"""Do short requests wait while a server transcribes a long recording?

    python benchmarks/fairness.py                      # the tiny checkpoint, an hour of speech
    python benchmarks/fairness.py --minutes 20 --requests 40

Starts ``qwen3-asr serve`` of in-tree (with ``VLLM_PLUGINS=""``), then of ours (the same command, so
both with the same raised limits). Posts short clips one after the other to the idle server; then
uploads one long recording and posts as many short clips, of other speech, beside it. ``p50`` and
``p95`` are of the short ones. ``done before`` says how many of those beside it were answered before
the long one, which takes ``long s``; after it they meet an idle server again, and are not counted.
``ratio`` is p95 beside over p95 idle: 1 is a server that the long one does not slow at all. Both
servers must do the same work for the short clips while they are idle (``work.py``); they cut the
long recording differently.
"""

from __future__ import annotations

import argparse
import asyncio
import shlex
import time
from typing import Any

from common import SIDES, exit_on_sigterm, percentile, print_result, print_table, server
from serve import REQUEST_TIMEOUT_S, post
from support.audio import speech_clip
from support.checkpoints import CHECKPOINT
from work import CONTEXT, Work, check_work, num_text_tokens, server_work


async def ask_in_turn(session: Any, address: str, seeds: range, args: argparse.Namespace) -> list:
    """Seconds that each short clip takes, and when it was answered."""
    answered = []
    for seed in seeds:
        clip = speech_clip(args.clip_s, seed)
        answer = await post(session, address, clip, args)
        answered.append((answer.seconds, time.perf_counter()))
    return answered


async def measure(address: str, args: argparse.Namespace) -> tuple[dict[str, Any], Work]:
    """Return a row, and the work of the short clips that the idle server got."""
    import aiohttp

    long_wav = await asyncio.to_thread(speech_clip, 60 * args.minutes, 10**6)
    timeout = aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await ask_in_turn(session, address, range(3), args)  # warm up
        before = server_work(address, args.text_tokens)
        idle = await ask_in_turn(session, address, range(100, 100 + args.requests), args)
        work = server_work(address, args.text_tokens) - before
        started = time.perf_counter()
        long = asyncio.create_task(post(session, address, long_wav, args))
        await asyncio.sleep(args.head_start_s)
        seeds = range(10_000, 10_000 + args.requests)
        beside = await ask_in_turn(session, address, seeds, args)
        long_s = (await long).seconds
    overtook = [seconds for seconds, when in beside if when < started + long_s]
    return row([seconds for seconds, _ in idle], overtook, long_s), work


def row(idle: list[float], beside: list[float], long_s: float) -> dict[str, Any]:
    idle_p95, beside_p95 = percentile(idle, 0.95), percentile(beside, 0.95)
    return {
        "idle p50 s": percentile(idle, 0.5),
        "idle p95 s": idle_p95,
        "beside p50 s": percentile(beside, 0.5),
        "beside p95 s": beside_p95,
        "ratio": beside_p95 and idle_p95 and beside_p95 / idle_p95,
        "done before": len(beside),
        "long s": long_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--minutes", type=float, default=60.0, help="of the long recording")
    parser.add_argument("--requests", type=int, default=40, help="short ones, idle and beside")
    parser.add_argument("--clip-s", type=float, default=5.0)
    parser.add_argument("--head-start-s", type=float, default=1.0, help="of the long recording")
    parser.add_argument("--max-tokens", type=int, default=400, help="in one clip")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--server-args", default="--enforce-eager", help="one string")
    args = parser.parse_args()
    exit_on_sigterm()
    args.whole = True  # not streamed
    args.context = CONTEXT
    args.text_tokens = num_text_tokens(CHECKPOINT)
    arguments = ["--max-model-len", "4096", "--dtype", args.dtype, *shlex.split(args.server_args)]
    rows, works = [], {}
    for side in args.sides:
        with server(side, CHECKPOINT, arguments) as (address, _):
            measured, works[side] = asyncio.run(measure(address, args))
            rows.append({"side": side} | measured)
    check_work(works, clips=args.requests, audio_s=args.requests * args.clip_s)
    print_table(rows)
    print_result("fairness", rows, minutes=args.minutes, requests=args.requests, clip_s=args.clip_s)


if __name__ == "__main__":
    main()
