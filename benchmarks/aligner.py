# SPDX-License-Identifier: Apache-2.0
"""How much audio does the forced aligner time per second: ours, in-tree, and transformers?

    python benchmarks/aligner.py                                   # the tiny checkpoint
    python benchmarks/aligner.py --model 0.6B --layers 4 --clips 8

All three get the same clips, words and weights, run in the same dtype, one after the other, each
in a process of its own, and end with the class of each timestamp. All must encode the same audio
and prompts (``work.py``). ``cpu s`` counts every thread, so it is what to compare on a busy
machine. ``bytes`` is what a request brings back from the engine: our engine returns classes,
in-tree's a row of numbers for every token. ``same`` compares the classes with ours. ``--model
0.6B`` has the widths of Qwen3-ForcedAligner-0.6B and random weights, which each draws on its own,
so there nothing is compared; ``--layers`` makes encoder and decoder shallower than 24 and 28
layers, so that a small machine is done today.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from common import AUDIO_TOKEN, print_result, print_table
from engines import (
    Reference,
    add_engine_options,
    by_engine,
    engine_options,
    engine_row,
    measured,
)
from support.audio import RECORDING
from support.checkpoints import ALIGNER, AUDIO_SIZES, TEXT_SIZES, resized
from work import EngineWork

ARCHITECTURE = "Qwen3ASRForcedAlignerForTokenClassification"
TIMESTAMP = "<timestamp>"


def prompt(args: argparse.Namespace, seed: int, audio: str = AUDIO_TOKEN) -> str:
    words = RECORDING.with_suffix(".txt").read_text().split()
    said = islice(cycle(words[seed:] + words[:seed]), round(args.clip_s * args.words_per_s))
    return f"<|audio_start|>{audio}<|audio_end|>" + "".join(f"{w}{TIMESTAMP * 2}" for w in said)


def run_vllm(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from vllm import LLM

    overrides = {"architectures": [ARCHITECTURE]}
    llm = LLM(str(model), runner="pooling", hf_overrides=overrides, **engine_options(args))
    timestamp = llm.get_tokenizer().convert_tokens_to_ids(TIMESTAMP)

    def classes(clips: list[np.ndarray]) -> tuple[list[list[int]], int]:
        requests = [
            {"prompt": prompt(args, seed), "multi_modal_data": {"audio": clip}}
            for seed, clip in enumerate(clips)
        ]
        outputs = llm.encode(requests, pooling_task="token_classify", use_tqdm=False)
        found = []
        for output in outputs:
            data = output.outputs.data
            if data.ndim > 1:  # a row for every token: the client picks
                is_marked = torch.tensor(output.prompt_token_ids) == timestamp
                data = data[is_marked].argmax(-1)
            found.append(data.tolist())
        return found, max(output.outputs.data.nbytes for output in outputs)

    return measured(classes, args, EngineWork(llm))


def run_transformers(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    config = json.loads((model / "config.json").read_text())
    timestamp = config["timestamp_token_id"]
    reference = Reference(
        model,
        args,
        kind="Qwen3ASRForTokenClassification",
        head="score",
        timestamp_token_id=timestamp,
        tie_word_embeddings=False,
        num_labels=config["thinker_config"]["classify_num"],
    )

    @torch.inference_mode()
    def batch_classes(first: int, clips: list[np.ndarray]) -> list[list[int]]:
        features = reference.features(clips)
        audio = reference.audio_tokens(features)
        prompts = [prompt(args, first + i, audio) for i in range(len(clips))]
        inputs = reference.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="right"
        ).to(reference.device)
        best = reference.model(**inputs, **features, use_cache=False).logits.argmax(-1)
        marked = inputs.input_ids == timestamp
        reference.count(len(clips), int(inputs.attention_mask.sum()))
        return [row[mark].tolist() for row, mark in zip(best, marked, strict=True)]

    def classes(clips: list[np.ndarray]) -> tuple[list[list[int]], int]:
        starts = range(0, len(clips), args.batch)
        parts = [batch_classes(start, clips[start : start + args.batch]) for start in starts]
        return [found for part in parts for found in part], 0

    return measured(classes, args, reference)


def wide_checkpoint(folder: Path, layers: int | None) -> Path:
    """The tiny aligner with the widths of the published one, for random weights."""
    return resized(
        ALIGNER,
        folder,
        audio=AUDIO_SIZES["1.7B"] | {"output_dim": 1024, "encoder_layers": layers or 24},
        text=TEXT_SIZES["0.6B"] | {"vocab_size": 152_064, "num_hidden_layers": layers or 28},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, 0.6B, or a checkpoint")
    parser.add_argument("--layers", type=int, help="of encoder and decoder; with --model 0.6B")
    add_engine_options(parser, clip_s=30.0)
    parser.add_argument("--words-per-s", type=float, default=2.5)
    args = parser.parse_args()
    args.dummy = args.model == "0.6B"
    with tempfile.TemporaryDirectory() as folder:
        path = ALIGNER if args.model == "tiny" else Path(args.model)
        if args.dummy:
            path = wide_checkpoint(Path(folder), args.layers)
        results = by_engine(run_vllm, run_transformers, path, args)
    rows = [row(name, results, args) for name in results]
    print_table(rows)
    print_result("aligner", rows, model=args.model, layers=args.layers, dtype=args.dtype)


def row(name: str, results: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    (classes, num_bytes), (ours, _) = results[name]["answers"], results["ours"]["answers"]
    pairs = zip(classes, ours, strict=True)
    same = sum(a == b for theirs, own in pairs for a, b in zip(theirs, own, strict=True))
    return engine_row(name, results, args) | {
        "bytes": num_bytes,
        "same": "" if args.dummy else f"{same}/{sum(map(len, ours))}",
    }


if __name__ == "__main__":
    main()
