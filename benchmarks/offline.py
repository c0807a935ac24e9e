# SPDX-License-Identifier: Apache-2.0
"""How much audio does ``LLM.generate`` transcribe per second: ours, in-tree, and transformers?

    python benchmarks/offline.py                                  # the tiny checkpoint
    python benchmarks/offline.py --model 0.6B --clips 8 --max-tokens 32

All three get the same clips, prompt and weights, decode greedily in the same dtype, and run one
after the other, each in a process of its own. ``cpu s`` counts every thread, so it is what to
compare on a busy machine. ``same tokens`` compares the generated tokens with ours (random weights,
``--model 0.6B``, are drawn by each on its own, so there nothing is compared). transformers runs
its own model in batches of ``--batch``, with the features of its own extractor.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    AUDIO_SIZES,
    CHECKPOINT,
    SAMPLE_RATE,
    Side,
    checkpoint_like,
    print_result,
    print_table,
    speech,
)

PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>{}<|audio_end|>"
    "<|im_end|>\n<|im_start|>assistant\n"
)
AUDIO_TOKEN = "<|audio_pad|>"
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def run_vllm(model: str, dummy: bool, args: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        model,
        dtype=args.dtype,
        load_format="dummy" if dummy else "auto",
        max_model_len=4096,
        max_num_seqs=args.batch,
        enforce_eager=not args.compile,
        mm_processor_cache_gb=0,
        enable_prefix_caching=False,
    )
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=dummy)

    def generate(clips: list[np.ndarray]) -> list[list[int]]:
        prompt = PROMPT.format(AUDIO_TOKEN)
        requests = [{"prompt": prompt, "multi_modal_data": {"audio": [clip]}} for clip in clips]
        outputs = llm.generate(requests, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return measured(generate, args)


def run_transformers(model: str, dummy: bool, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    torch.set_num_threads(args.threads)
    tokenizer, extract = AutoTokenizer.from_pretrained(model), Qwen3ASRFeatureExtractor()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    reference = transformers_model(Path(model), dummy).to(device, getattr(torch, args.dtype))
    stop = [744, 746] if not dummy else None  # of the tiny checkpoint's generation_config.json

    @torch.inference_mode()
    def generate(clips: list[np.ndarray]) -> list[list[int]]:
        tokens: list[list[int]] = []
        for start in range(0, len(clips), args.batch):
            tokens += generate_batch(clips[start : start + args.batch])
        return tokens

    def generate_batch(clips: list[np.ndarray]) -> list[list[int]]:
        audio = extract(
            clips, sampling_rate=SAMPLE_RATE, padding="longest", return_attention_mask=True
        )
        features = audio["input_features"].to(device, reference.dtype)
        mask = audio["attention_mask"].to(device)
        pooled = reference.get_audio_features(features[:1], mask[:1]).pooler_output
        prompt = tokenizer(PROMPT.format(AUDIO_TOKEN * len(pooled)), return_tensors="pt")
        ids = prompt.input_ids.expand(len(clips), -1).to(device)  # clips of one length
        generated = reference.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            input_features=features,
            input_features_mask=mask,
            do_sample=False,
            max_new_tokens=args.max_tokens,
            min_new_tokens=args.max_tokens if dummy else None,
            eos_token_id=stop,
            pad_token_id=0,
        )
        return [trimmed(row, stop or []) for row in generated[:, ids.shape[1] :].tolist()]

    return measured(generate, args)


def trimmed(tokens: list[int], stop: list[int]) -> list[int]:
    """Up to and with the first token that ends an answer, as vLLM returns them."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def transformers_model(path: Path, dummy: bool) -> Any:
    """transformers' own model of a checkpoint in the nested layout, which it cannot read."""
    from safetensors.torch import load_file
    from transformers.models.qwen3_asr import Qwen3ASRConfig, Qwen3ASRForConditionalGeneration

    thinker = json.loads((path / "config.json").read_text())["thinker_config"]
    text = thinker["text_config"]
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    text.pop("rope_scaling", None)
    thinker["audio_config"].pop("model_type", None)  # its name in the nested layout
    config = Qwen3ASRConfig(
        audio_config=thinker["audio_config"],
        text_config=text | {"rope_parameters": rope},
        audio_token_id=thinker["audio_token_id"],
        tie_word_embeddings=text["tie_word_embeddings"],
    )
    model = Qwen3ASRForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    if not dummy:
        renames = {
            "thinker.audio_tower.proj": "model.multi_modal_projector.linear_",
            "thinker.audio_tower.": "model.audio_tower.",
            "thinker.model.": "model.language_model.",
            "thinker.lm_head.": "lm_head.",
        }
        state = {}
        for name, tensor in load_file(path / "model.safetensors").items():
            old = next(old for old in renames if name.startswith(old))
            state[name.replace(old, renames[old], 1)] = tensor.float()
        missing, unexpected = model.load_state_dict(state, strict=False)
        assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
        model.tie_weights()
    return model.eval()


def measured(generate: Any, args: argparse.Namespace) -> dict[str, Any]:
    generate([speech(args.clip_s, seed=10**6 + i) for i in range(2)])  # warms up
    clips = [speech(args.clip_s, seed=seed) for seed in range(args.clips)]
    start, start_cpu = time.perf_counter(), time.process_time()
    tokens = generate(clips)
    return {
        "wall s": time.perf_counter() - start,
        "cpu s": time.process_time() - start_cpu,
        "tokens": tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, 0.6B, 1.7B, or a checkpoint")
    parser.add_argument("--clips", type=int, default=32)
    parser.add_argument("--clip-s", type=float, default=10.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2, help="of transformers")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the decoder")
    args = parser.parse_args()
    dummy = args.model in AUDIO_SIZES
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        path = CHECKPOINT if args.model == "tiny" else Path(args.model)
        if dummy:
            path = checkpoint_like(args.model, Path(folder))
        for name in ("ours", "in-tree", "transformers"):
            run = run_transformers if name == "transformers" else run_vllm
            with closing(Side("in-tree" if name == "in-tree" else "ours", **IN_PROCESS)) as side:
                results[name] = side.run(run, str(path), dummy, args)
    rows = [row(name, results, args, dummy) for name in results]
    print_table(rows)
    print_result("offline", rows, model=args.model, dtype=args.dtype, batch=args.batch)


def row(
    name: str, results: dict[str, dict[str, Any]], args: argparse.Namespace, dummy: bool
) -> dict[str, Any]:
    result, ours = results[name], results["ours"]
    same = sum(a == b for a, b in zip(result["tokens"], ours["tokens"], strict=True))
    return {
        "engine": name,
        "clips": args.clips,
        "clip_s": args.clip_s,
        "wall s": result["wall s"],
        "cpu s": result["cpu s"],
        "audio-s/s": args.clips * args.clip_s / result["wall s"],
        "cpu ratio to ours": result["cpu s"] / ours["cpu s"],
        "tokens": sum(map(len, result["tokens"])),
        "same tokens": None if dummy else f"{same}/{args.clips}",
    }


if __name__ == "__main__":
    main()
