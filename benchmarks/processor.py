# SPDX-License-Identifier: Apache-2.0
"""What does a clip cost on the one Python thread of an API server that prepares all requests?

    python benchmarks/processor.py

vLLM runs ``parse_mm_data`` and ``mm_processor.apply`` of every request on one thread, so their CPU
time bounds the throughput of a server whatever its GPU: ``audio-s/s`` is that bound. The ratio is
in-tree over ours; the sides take turns in processes of their own, one torch thread each, as in
the server. ``cached`` is the server's default, a multi-modal cache (here of new clips only);
without it is ``--mm-processor-cache-gb 0``.

Equal output is checked first: the same prompt token ids, and the log-mel that our encoder computes
from the samples against the features of in-tree, in float32.
"""

from __future__ import annotations

import argparse
import statistics
from functools import cache
from typing import Any

import numpy as np
from common import (
    AUDIO_TOKEN,
    PROMPT,
    both_sides,
    cpu_seconds,
    model_config,
    print_result,
    print_table,
    spread,
)
from support.audio import noise
from work import UnequalWork

LENGTHS_S = (30, 10, 5, 1)


@cache
def processor(dtype: str) -> Any:
    import torch
    from vllm.multimodal import MULTIMODAL_REGISTRY

    torch.set_num_threads(1)
    return MULTIMODAL_REGISTRY.create_processor(model_config(dtype))


@cache
def sender_cache() -> Any:
    """The default cache of a server, small enough that new clips evict old ones."""
    from vllm.multimodal.cache import LruKeyReplicatedSenderCache

    config = model_config()
    config.multimodal_config.mm_processor_cache_gb = 0.25
    return LruKeyReplicatedSenderCache(config)


def apply(waveform: np.ndarray, *, dtype: str = "bfloat16", cached: bool = False) -> Any:
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    mm_processor = processor(dtype)
    items = mm_processor.info.parse_mm_data({"audio": [(waveform, 16_000)]})
    inputs = ProcessorInputs(prompt(dtype), items, cache=sender_cache() if cached else None)
    return mm_processor.apply(inputs, TimingContext(enabled=False))


@cache
def _prompt_ids(dtype: str) -> tuple[int, ...]:
    return tuple(processor(dtype).info.get_tokenizer().encode(PROMPT.format(AUDIO_TOKEN)))


def prompt(dtype: str) -> list[int]:
    return list(_prompt_ids(dtype))


def apply_cost(seconds: float, cached: bool, repeats: int, seed: int) -> float:
    """CPU seconds of one clip; every call gets samples of its own."""
    clips = iter([noise(seconds, seed=seed + i) for i in range(repeats + 3)])
    for _ in range(3):
        apply(next(clips), cached=cached)
    return cpu_seconds(lambda: apply(next(clips), cached=cached), repeats=repeats)


def features(seconds: float) -> tuple[list[int], np.ndarray]:
    """Prompt token ids, and the log-mel that the encoder gets, (128, frames)."""
    output = apply(noise(seconds), dtype="float32")
    item = output["mm_kwargs"]["audio"][0]
    if "input_audio_features" in item:
        return output["prompt_token_ids"], item["input_audio_features"].data.numpy()
    import torch

    from qwen3_asr_vllm.geometry import Geometry
    from qwen3_asr_vllm.model.log_mel import LogMel, widen

    chunks, frames = widen(item["audio_chunks"].data), int(item["audio_feature_lengths"].data)
    log_mel = LogMel(128)(
        chunks,
        torch.tensor(Geometry().frames_by_chunk(frames)),
        torch.zeros(len(chunks), dtype=torch.long),
        num_clips=1,
        chunks_at_once=500,
    )
    return output["prompt_token_ids"], log_mel.transpose(0, 1).flatten(1)[:, :frames].numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    rows = []
    with both_sides() as sides:
        for seconds in LENGTHS_S:
            theirs, ours = (side.run(features, seconds) for side in sides.values())
            if theirs[0] != ours[0] or theirs[1].shape != ours[1].shape:
                raise UnequalWork("unequal work: prompt token ids or frames differ")
            difference = float(np.abs(theirs[1] - ours[1]).max())
            for cached in (False, True):
                times: dict[str, list[float]] = {name: [] for name in sides}
                for turn in range(args.rounds):
                    seed = 1000 * (turn + 1)
                    for name, side in sides.items():
                        cost = side.run(apply_cost, seconds, cached, args.repeats, seed)
                        times[name].append(cost)
                rows.append(row(seconds, cached, times, difference))
    print_table(rows)
    print_result("processor", rows)


def row(seconds: float, cached: bool, times: dict[str, list[float]], difference: float) -> dict:
    theirs, ours = (statistics.median(times[name]) for name in ("in-tree", "ours"))
    return {
        "clip_s": seconds,
        "cached": cached,
        "in-tree ms": theirs * 1e3,
        "ours ms": ours * 1e3,
        "ratio": theirs / ours,
        "spread": max(spread(values) for values in times.values()),
        "in-tree audio-s/s": seconds / theirs,
        "ours audio-s/s": seconds / ours,
        "max |d log-mel|": difference,
    }


if __name__ == "__main__":
    main()
