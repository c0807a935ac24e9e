# SPDX-License-Identifier: Apache-2.0
"""How much audio does the forced aligner time per second: ours, in-tree, and transformers?

    python benchmarks/aligner.py                                   # the tiny checkpoint
    python benchmarks/aligner.py --model 0.6B --layers 4 --clips 8

All three get the same clips, words and weights, run in the same dtype, one after the other, each
in a process of its own, and end with the class of each timestamp. ``cpu s`` counts every thread,
so it is what to compare on a busy machine. ``bytes`` is what a request brings back from the
engine: our engine returns classes, in-tree's a row of numbers for every token. ``same`` compares
the classes with ours. ``--model 0.6B`` has the widths of Qwen3-ForcedAligner-0.6B and random
weights, which each draws on its own, so there nothing is compared; ``--layers`` makes encoder and
decoder shallower than 24 and 28 layers, so that a small machine is done today.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
from common import CHECKPOINT, RECORDING, SAMPLE_RATE, Side, print_result, print_table, speech

ALIGNER = CHECKPOINT.parent / "aligner"
ARCHITECTURE = "Qwen3ASRForcedAlignerForTokenClassification"
AUDIO_TOKEN, TIMESTAMP = "<|audio_pad|>", "<timestamp>"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def prompt(args: argparse.Namespace, seed: int, audio: str = AUDIO_TOKEN) -> str:
    words = RECORDING.with_suffix(".txt").read_text().split()
    said = islice(cycle(words[seed:] + words[:seed]), round(args.clip_s * args.words_per_s))
    return f"<|audio_start|>{audio}<|audio_end|>" + "".join(f"{w}{TIMESTAMP * 2}" for w in said)


def run_vllm(model: str, dummy: bool, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from vllm import LLM

    llm = LLM(
        model,
        runner="pooling",
        hf_overrides={"architectures": [ARCHITECTURE]},
        dtype=args.dtype,
        load_format="dummy" if dummy else "auto",
        max_model_len=4096,
        max_num_seqs=args.batch,
        enforce_eager=True,
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
    )
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

    return measured(classes, args)


def run_transformers(model: str, dummy: bool, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    torch.set_num_threads(args.threads)
    tokenizer, extract = AutoTokenizer.from_pretrained(model), Qwen3ASRFeatureExtractor()
    reference = transformers_model(Path(model), dummy).to(getattr(torch, args.dtype))
    timestamp = reference.config.timestamp_token_id

    @torch.inference_mode()
    def batch_classes(first: int, clips: list[np.ndarray]) -> list[list[int]]:
        audio = extract(
            clips, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True
        )
        features, mask = audio["input_features"].to(reference.dtype), audio["attention_mask"]
        if not counted:
            audio_tokens = reference.model.get_audio_features(features[:1], mask[:1])
            counted.append(len(audio_tokens.pooler_output))
        prompts = [prompt(args, first + i, AUDIO_TOKEN * counted[0]) for i in range(len(clips))]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="right")
        logits = reference(
            **inputs, input_features=features, input_features_mask=mask, use_cache=False
        ).logits
        best = logits.argmax(-1)
        return [
            row[ids == timestamp].tolist() for row, ids in zip(best, inputs.input_ids, strict=True)
        ]

    counted: list[int] = []  # audio tokens of a clip: all last the same

    def classes(clips: list[np.ndarray]) -> tuple[list[list[int]], int]:
        starts = range(0, len(clips), args.batch)
        parts = [batch_classes(start, clips[start : start + args.batch]) for start in starts]
        return [found for part in parts for found in part], 0

    return measured(classes, args)


def transformers_model(path: Path, dummy: bool) -> Any:
    """transformers' own model of a checkpoint in the nested layout, which it cannot read."""
    from safetensors.torch import load_file
    from transformers.models.qwen3_asr import Qwen3ASRConfig, Qwen3ASRForTokenClassification

    document = json.loads((path / "config.json").read_text())
    thinker = document["thinker_config"]
    text = thinker["text_config"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text.pop("rope_scaling", None)
    thinker["audio_config"].pop("model_type", None)  # its name in the nested layout
    config = Qwen3ASRConfig(
        audio_config=thinker["audio_config"],
        text_config=text | {"rope_parameters": rope},
        audio_token_id=thinker["audio_token_id"],
        timestamp_token_id=document["timestamp_token_id"],
        tie_word_embeddings=False,
        num_labels=thinker["classify_num"],
    )
    model = Qwen3ASRForTokenClassification._from_config(config, attn_implementation="sdpa")
    if not dummy:
        renames = {
            "thinker.audio_tower.proj": "model.multi_modal_projector.linear_",
            "thinker.audio_tower.": "model.audio_tower.",
            "thinker.model.": "model.language_model.",
            "thinker.lm_head.": "score.",
        }
        state = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            old = next(old for old in renames if name.startswith(old))
            state[name.replace(old, renames[old], 1)] = tensor.float()
        model.load_state_dict(state)
    return model.eval()


def wide_checkpoint(folder: Path, layers: int | None) -> Path:
    """The tiny aligner's tokenizer with the widths of the published one, and no weights."""
    for file in ALIGNER.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    document = json.loads((ALIGNER / "config.json").read_text())
    thinker = document["thinker_config"]
    thinker["audio_config"] |= {
        "d_model": 1024,
        "encoder_layers": layers or 24,
        "encoder_attention_heads": 16,
        "encoder_ffn_dim": 4096,
        "output_dim": 1024,
        "downsample_hidden_size": 480,
    }
    thinker["text_config"] |= {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": layers or 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 152_064,
    }
    thinker["text_config"]["rope_scaling"]["mrope_section"] = [24, 20, 20]
    (folder / "config.json").write_text(json.dumps(document))
    return folder


def measured(classes: Any, args: argparse.Namespace) -> dict[str, Any]:
    classes([speech(args.clip_s, seed=10**6 + i) for i in range(2)])  # warms up
    clips = [speech(args.clip_s, seed=seed) for seed in range(args.clips)]
    start, start_cpu = time.perf_counter(), time.process_time()
    found, num_bytes = classes(clips)
    return {
        "wall s": time.perf_counter() - start,
        "cpu s": time.process_time() - start_cpu,
        "classes": found,
        "bytes": num_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, 0.6B, or a checkpoint")
    parser.add_argument("--layers", type=int, help="of encoder and decoder; with --model 0.6B")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--clip-s", type=float, default=30.0)
    parser.add_argument("--words-per-s", type=float, default=2.5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of transformers")
    args = parser.parse_args()
    dummy = args.model == "0.6B"
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = ALIGNER if args.model == "tiny" else Path(args.model)
        if dummy:
            path = wide_checkpoint(Path(folder), args.layers)
        for name in ("ours", "in-tree", "transformers"):
            run = run_transformers if name == "transformers" else run_vllm
            with closing(Side("in-tree" if name == "in-tree" else "ours", **IN_PROCESS)) as side:
                results[name] = side.run(run, str(path), dummy, args)
    rows = [row(name, results, args, dummy) for name in results]
    print_table(rows)
    print_result("aligner", rows, model=args.model, layers=args.layers, dtype=args.dtype)


def row(
    name: str, results: dict[str, dict[str, Any]], args: argparse.Namespace, dummy: bool
) -> dict[str, Any]:
    result, ours = results[name], results["ours"]
    pairs = zip(result["classes"], ours["classes"], strict=True)
    same = sum(a == b for theirs, own in pairs for a, b in zip(theirs, own, strict=True))
    return {
        "engine": name,
        "clips": args.clips,
        "clip_s": args.clip_s,
        "wall s": result["wall s"],
        "cpu s": result["cpu s"],
        "audio-s/s": args.clips * args.clip_s / result["wall s"],
        "cpu ratio to ours": result["cpu s"] / ours["cpu s"],
        "bytes": result["bytes"],
        "same": "" if dummy else f"{same}/{sum(map(len, ours['classes']))}",
    }


if __name__ == "__main__":
    main()
