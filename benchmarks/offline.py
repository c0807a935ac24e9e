# SPDX-License-Identifier: Apache-2.0
"""How much audio does ``LLM.generate`` transcribe per second: ours, in-tree, and transformers?

    python benchmarks/offline.py                                  # the tiny checkpoint
    python benchmarks/offline.py --model 0.6B --clips 8 --max-tokens 32
    python benchmarks/offline.py --files                          # from wav files to texts

All three get the same clips, prompt and weights, decode greedily in the same dtype, and run one
after the other, each in a process of its own. ``cpu s`` counts every thread, so it is what to
compare on a busy machine. ``same tokens`` compares the generated tokens with ours (random weights,
``--model 0.6B``, are drawn by each on its own, so there nothing is compared). transformers runs
its own model in batches of ``--batch``, with the features of its own extractor.

``--files`` asks what a corpus costs from files to texts, on the held-out recordings of the tests:
``LLM.generate`` with prompts written by hand, ours and in-tree; ``Qwen3ASR.transcribe``, which
takes turns with the first in one process, so that ``overhead`` is that of our layer; and ``vllm
run-batch``, whose start is subtracted: a run over all files, less one over a single file.
"""

from __future__ import annotations

import argparse
import base64
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import cache
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
    side_environment,
    speech,
    spread,
)

PROMPT = (
    "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n<|audio_start|>{}<|audio_end|>"
    "<|im_end|>\n<|im_start|>assistant\n"
)
AUDIO_TOKEN = "<|audio_pad|>"
HELDOUT = CHECKPOINT.parent.parent / "data" / "heldout"
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


# files ----


def by_hand(llm: Any, files: list[str]) -> list[str]:
    """What a careful user writes: decode, prompt, generate, cut the header off."""
    import soundfile
    from vllm import SamplingParams

    clips = [soundfile.read(file, dtype="float32")[0] for file in files]
    prompt = PROMPT.format(AUDIO_TOKEN)
    requests = [{"prompt": prompt, "multi_modal_data": {"audio": [clip]}} for clip in clips]
    outputs = llm.generate(requests, SamplingParams(temperature=0, max_tokens=256), use_tqdm=False)
    return [output.outputs[0].text.split("<asr_text>")[-1] for output in outputs]


@cache
def loaded(model: str, batch: int, dtype: str, *, ours: bool) -> Any:
    from vllm import LLM

    options = {"dtype": dtype, "max_model_len": 4096, "max_num_seqs": batch}
    options |= {"enforce_eager": True, "enable_prefix_caching": False, "mm_processor_cache_gb": 0}
    if not ours:
        return LLM(model, **options)
    from qwen3_asr_vllm import Qwen3ASR

    return Qwen3ASR(model, **options)


def time_files(
    name: str, model: str, files: list[str], args: argparse.Namespace
) -> tuple[float, float, list[str]]:
    """Wall and CPU seconds of one pass, and the texts."""
    made = loaded(model, args.batch, args.dtype, ours=name != "in-tree")
    start, start_cpu = time.perf_counter(), time.process_time()
    if name == "Qwen3ASR":
        texts = [result.transcript.text for result in made.transcribe(files)]
    else:
        texts = by_hand(made if name == "in-tree" else made.llm, files)
    return time.perf_counter() - start, time.process_time() - start_cpu, texts


def time_run_batch(
    model: str, files: list[str], args: argparse.Namespace
) -> tuple[float, float, list[str]]:
    """The same for ``vllm run-batch``, start included."""
    with tempfile.TemporaryDirectory() as folder:
        requests, answers = Path(folder, "in.jsonl"), Path(folder, "out.jsonl")
        with requests.open("w") as output:
            for index, file in enumerate(files):
                audio = base64.b64encode(Path(file).read_bytes()).decode()
                body = {"model": model, "file_url": f"data:audio/wav;base64,{audio}"}
                line = {"custom_id": str(index), "method": "POST", "body": body}
                output.write(json.dumps(line | {"url": "/v1/audio/transcriptions"}) + "\n")
        options = f"--dtype {args.dtype} --max-model-len 4096 --max-num-seqs {args.batch}"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.run_batch", "--model", model]
        command += ["-i", str(requests), "-o", str(answers), "--enforce-eager", *options.split()]
        command += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        environment = side_environment("ours") | {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        rows = [json.loads(line) for line in answers.read_text().splitlines()]
    texts = {int(row["custom_id"]): row["response"]["body"]["text"] for row in rows}
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return wall, cpu, [texts[index] for index in range(len(files))]


def wav_files(folder: Path, count: int) -> tuple[list[str], float]:
    """Held-out sentences, over and over with a little noise, and their seconds together."""
    import soundfile

    sources = sorted(path for path in HELDOUT.glob("*.flac") if not path.name.startswith("none"))
    rng, files, seconds = np.random.default_rng(0), [], 0.0
    for index in range(count):
        samples, _ = soundfile.read(sources[index % len(sources)], dtype="float32")
        samples = samples + 1e-4 * rng.standard_normal(len(samples)).astype(np.float32)
        files.append(str(folder / f"{index:04d}.wav"))
        soundfile.write(files[-1], samples, SAMPLE_RATE)
        seconds += len(samples) / SAMPLE_RATE
    return files, seconds


def compare_files(args: argparse.Namespace) -> None:
    model = str(CHECKPOINT if args.model == "tiny" else args.model)
    passes: dict[str, list[tuple[float, float, list[str]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files, seconds = wav_files(Path(folder), args.clips)
        for names in (("LLM.generate", "Qwen3ASR"), ("in-tree",))[: 2 - args.no_others]:
            side = "in-tree" if "in-tree" in names else "ours"
            with closing(Side(side, **IN_PROCESS)) as process:
                process.run(time_files, names[0], model, files[:8], args)  # warms up
                for turn in range(args.rounds):
                    for name in names[:: (-1) ** turn]:
                        result = process.run(time_files, name, model, files, args)
                        passes.setdefault(name, []).append(result)
        if not args.no_others:
            one, everything = (time_run_batch(model, part, args) for part in (files[:1], files))
            difference = everything[0] - one[0], everything[1] - one[1], everything[2]
            passes["vllm run-batch"] = [difference]
    expected = passes["LLM.generate"][0][2]
    baseline = statistics.median(cpu for _, cpu, _ in passes["LLM.generate"])
    rows = []
    for name, results in passes.items():
        wall, cpu = (statistics.median(result[i] for result in results) for i in (0, 1))
        cpus = [result[1] for result in results]
        same = sum(a == b for a, b in zip(results[0][2], expected, strict=True))
        rows.append(
            {
                "": name,
                "wall s": wall,
                "cpu s": cpu,
                "audio-s/s": seconds / wall,
                "cpu against LLM.generate": cpu / baseline,
                "spread": spread(cpus) if len(cpus) > 1 else None,
                "same text": f"{same}/{len(files)}",
            }
        )
    print_table(rows)
    pairs = zip(passes["Qwen3ASR"], passes["LLM.generate"], strict=True)
    overheads = [ours[1] / hand[1] - 1 for ours, hand in pairs]
    print(
        f"overhead of Qwen3ASR in CPU time, pass by pass: median {statistics.median(overheads):.1%}"
    )
    print_result(
        "offline-files",
        rows,
        files=len(files),
        audio_s=seconds,
        dtype=args.dtype,
        batch=args.batch,
        overheads=overheads,
    )


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
    parser.add_argument("--files", action="store_true", help="from files to texts")
    parser.add_argument("--no-others", action="store_true", help="--files without the last two")
    parser.add_argument("--rounds", type=int, default=5, help="of --files")
    args = parser.parse_args()
    if args.files:
        compare_files(args)
        return
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
