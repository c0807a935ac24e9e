# SPDX-License-Identifier: Apache-2.0
"""Three engines that take the same clips: this package's, vLLM's in-tree, and transformers.

Each is measured in a process of its own, and all must do the same work (``work.py``).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from common import AUDIO_TOKEN, IN_PROCESS, Side
from support.audio import SAMPLE_RATE, speech
from support.checkpoints import published_model
from work import COUNTED, TOKENS_PER_S, Work, check_work


def add_engine_options(parser: argparse.ArgumentParser, *, clip_s: float) -> None:
    """Add the options that all three engines get."""
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--clip-s", type=float, default=clip_s)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of transformers")


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return options of ``vllm.LLM``, without the caches that would recognize a clip."""
    return {
        "dtype": args.dtype,
        "load_format": "dummy" if args.dummy else "auto",
        "max_model_len": 4096,
        "max_num_seqs": args.batch,
        "enforce_eager": not getattr(args, "compile", False),
        "mm_processor_cache_gb": 0,
        "enable_prefix_caching": False,
        **COUNTED,
    }


def by_engine(
    run_vllm: Callable[..., Any],
    run_transformers: Callable[..., Any],
    model: Path,
    args: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Measure this package, in-tree and transformers in turn, each in a process of its own."""
    results = {}
    for name in ("ours", "in-tree", "transformers"):
        run = run_transformers if name == "transformers" else run_vllm
        with closing(Side("in-tree" if name == "in-tree" else "ours", **IN_PROCESS)) as side:
            results[name] = side.run(run, model, args)
    works = {name: result["work"] for name, result in results.items()}
    check_work(works, clips=args.clips, audio_s=args.clips * args.clip_s)
    return results


def measured(
    answer: Callable[[list[np.ndarray]], Any], args: argparse.Namespace, count: Any
) -> dict[str, Any]:
    """Measure one pass over the clips, after a warm-up with two others.

    ``count.work`` is what the engine has done so far (``work.py``).
    """
    answer([speech(args.clip_s, seed=10**6 + i) for i in range(2)])
    clips = [speech(args.clip_s, seed=seed) for seed in range(args.clips)]
    work, start, start_cpu = count.work, time.perf_counter(), time.process_time()
    answers = answer(clips)
    return {
        "wall s": time.perf_counter() - start,
        "cpu s": time.process_time() - start_cpu,
        "answers": answers,
        "work": count.work - work,
    }


def engine_row(
    name: str, results: dict[str, dict[str, Any]], args: argparse.Namespace
) -> dict[str, Any]:
    result = results[name]
    return {
        "engine": name,
        "clips": args.clips,
        "clip_s": args.clip_s,
        "wall s": result["wall s"],
        "cpu s": result["cpu s"],
        "encoded s": result["work"].encoded_s,
        "tokens": result["work"].tokens,
        "audio-s/s": args.clips * args.clip_s / result["wall s"],
        "cpu ratio to ours": result["cpu s"] / results["ours"]["cpu s"],
    }


class Reference:
    """transformers' own model of a checkpoint; ``options`` are those of ``published_model``."""

    def __init__(self, path: Path, args: argparse.Namespace, **options: Any) -> None:
        import torch
        from transformers import AutoTokenizer
        from transformers.models import qwen3_asr

        torch.set_num_threads(args.threads)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self._extract = qwen3_asr.Qwen3ASRFeatureExtractor()
        self._num_audio_tokens = 0
        self.work = Work()
        model = published_model(path, has_weights=not args.dummy, **options)
        self.model = model.to(self.device, getattr(torch, args.dtype))

    def features(self, clips: list[np.ndarray]) -> dict[str, Any]:
        """The part of a batch of the model's input that is audio."""
        audio = self._extract(
            clips, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True
        )
        return {
            "input_features": audio["input_features"].to(self.device, self.model.dtype),
            "input_features_mask": audio["attention_mask"].to(self.device),
        }

    def count(self, num_clips: int, prompt_tokens: int, tokens: int = 0) -> None:
        """Add a batch to ``work``; ``prompt_tokens`` are those of all its prompts together."""
        encoded_s = num_clips * self._num_audio_tokens / TOKENS_PER_S
        self.work = self.work + Work(num_clips, encoded_s, prompt_tokens, tokens)

    def audio_tokens(self, features: dict[str, Any]) -> str:
        """Count the audio tokens of one clip; all clips have the same length."""
        if not self._num_audio_tokens:
            first = (tensor[:1] for tensor in features.values())
            self._num_audio_tokens = len(self.model.model.get_audio_features(*first).pooler_output)
        return AUDIO_TOKEN * self._num_audio_tokens
