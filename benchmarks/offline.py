# SPDX-License-Identifier: Apache-2.0
"""How much audio does ``LLM.generate`` transcribe per second: ours, in-tree, and transformers?

    python benchmarks/offline.py                                  # the tiny checkpoint
    python benchmarks/offline.py --model 0.6B --clips 8 --max-tokens 32
    python benchmarks/offline.py --qwen-asr /tmp/qwen-asr         # its makers' package, too
    python benchmarks/offline.py --files                          # from wav files to texts
    python benchmarks/offline.py --files --no-others --model 0.6B --clips 16 --max-tokens 11

All three get the same clips, prompt and weights, decode greedily in the same dtype, and run one
after the other, each in a process of its own. ``cpu s`` counts every thread, so it is what to
compare on a busy machine. ``same answers`` compares the generated tokens with ours (random weights,
``--model 0.6B``, are drawn by each on its own, so there nothing is compared). transformers runs
its own model in batches of ``--batch``, with the features of its own extractor. qwen-asr needs an
older transformers, so it lives in a folder (``pip install --no-deps --target FOLDER qwen-asr
transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 accelerate``); of its answers the
text is compared.

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
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from common import (
    AUDIO_TOKEN,
    IN_PROCESS,
    PROMPT,
    Reference,
    Side,
    add_engine_options,
    by_engine,
    engine_options,
    engine_row,
    measured,
    print_result,
    print_table,
    side_environment,
    spread,
)
from support.audio import HELDOUT, SAMPLE_RATE
from support.checkpoints import AUDIO_SIZES, CHECKPOINT, checkpoint_like

from qwen3_asr_vllm import transcription


def run_vllm(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), **engine_options(args) | {"enforce_eager": not args.compile})
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens, ignore_eos=args.dummy)

    def generate(clips: list[np.ndarray]) -> list[list[int]]:
        outputs = llm.generate(requests(clips), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return measured(generate, args)


def requests(clips: list[np.ndarray]) -> list[dict[str, Any]]:
    prompt = PROMPT.format(AUDIO_TOKEN)
    return [{"prompt": prompt, "multi_modal_data": {"audio": [clip]}} for clip in clips]


def run_transformers(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    reference = Reference(model, args)
    config = json.loads((model / "generation_config.json").read_text())
    stop = None if args.dummy else config["eos_token_id"]

    @torch.inference_mode()
    def generate(clips: list[np.ndarray]) -> list[list[int]]:
        tokens: list[list[int]] = []
        for start in range(0, len(clips), args.batch):
            tokens += generate_batch(clips[start : start + args.batch])
        return tokens

    def generate_batch(clips: list[np.ndarray]) -> list[list[int]]:
        features = reference.features(clips)
        prompt = PROMPT.format(reference.audio_tokens(features))
        ids = reference.tokenizer([prompt] * len(clips), return_tensors="pt").input_ids
        generated = reference.model.generate(
            input_ids=ids.to(reference.device),
            attention_mask=torch.ones_like(ids).to(reference.device),
            **features,
            do_sample=False,
            max_new_tokens=args.max_tokens,
            min_new_tokens=args.max_tokens if args.dummy else None,
            eos_token_id=stop,
            pad_token_id=0,
        )
        return [trimmed(row, stop or []) for row in generated[:, ids.shape[1] :].tolist()]

    return measured(generate, args)


def trimmed(tokens: list[int], stop: list[int]) -> list[int]:
    """Up to and with the first token that ends an answer, as vLLM returns them."""
    ends = [i for i, token in enumerate(tokens) if token in stop]
    return tokens[: ends[0] + 1] if ends else tokens


def run_qwen_asr(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch
    from qwen_asr import Qwen3ASRModel

    torch.set_num_threads(args.threads)
    asr = Qwen3ASRModel.from_pretrained(
        str(model),
        dtype=getattr(torch, args.dtype),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        max_inference_batch_size=args.batch,
        max_new_tokens=args.max_tokens,
    )
    config = json.loads((model / "generation_config.json").read_text())
    # it has the stop tokens of the published checkpoints built in
    asr.model.generate = partial(asr.model.generate, eos_token_id=config["eos_token_id"])

    def transcribe(clips: list[np.ndarray]) -> list[str]:
        results = asr.transcribe([(clip, SAMPLE_RATE) for clip in clips])
        return [f"language {each.language}<asr_text>{each.text}" for each in results]

    return measured(transcribe, args)


# from files to texts ----


def by_hand(llm: Any, files: list[str], max_tokens: int) -> list[str]:
    """Do what a careful user writes by hand: decode, prompt, generate, cut the header off."""
    import soundfile
    from vllm import SamplingParams

    clips = [soundfile.read(file, dtype="float32")[0] for file in files]
    params = SamplingParams(temperature=0, max_tokens=max_tokens)
    outputs = llm.generate(requests(clips), params, use_tqdm=False)
    return [output.outputs[0].text.split("<asr_text>")[-1] for output in outputs]


@cache
def loaded(model: str, options: tuple[tuple[str, Any], ...], *, ours: bool) -> Any:
    from vllm import LLM

    from qwen3_asr_vllm import Qwen3ASR

    return (Qwen3ASR if ours else LLM)(model, **dict(options))


def time_files(
    name: str, model: str, files: list[str], args: argparse.Namespace
) -> tuple[float, float, list[str]]:
    """Wall and CPU seconds of one pass, and the texts."""
    if args.dummy:  # random weights never end: all answers have as many tokens
        transcription.max_new_tokens = lambda clip_s: args.max_tokens
    options = tuple(engine_options(args).items())
    made = loaded(model, options, ours=name != "in-tree")
    start, start_cpu = time.perf_counter(), time.process_time()
    if name == "Qwen3ASR":
        texts = [result.transcript.text for result in made.transcribe(files)]
    else:
        texts = by_hand(made if name == "in-tree" else made.llm, files, args.max_tokens)
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
    passes: dict[str, list[tuple[float, float, list[str]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = str(CHECKPOINT if args.model == "tiny" else args.model)
        if args.dummy:
            model = str(checkpoint_like(args.model, Path(folder)))
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
    add_engine_options(parser, clip_s=10.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the decoder")
    parser.add_argument("--files", action="store_true", help="from files to texts")
    parser.add_argument("--no-others", action="store_true", help="--files without the last two")
    parser.add_argument("--rounds", type=int, default=5, help="of --files")
    parser.add_argument("--qwen-asr", metavar="FOLDER", help="where qwen-asr is installed")
    args = parser.parse_args()
    args.dummy = args.model in AUDIO_SIZES
    if args.dummy and args.qwen_asr:
        parser.error(f"--qwen-asr loads weights, and {args.model} has none")
    if args.files:
        compare_files(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = CHECKPOINT if args.model == "tiny" else Path(args.model)
        if args.dummy:
            path = checkpoint_like(args.model, Path(folder))
        results = by_engine(run_vllm, run_transformers, path, args)
        if args.qwen_asr:
            with closing(Side("ours", PYTHONPATH=args.qwen_asr)) as side:
                results["qwen-asr"] = side.run(run_qwen_asr, path, args)
    rows = [row(name, results, args) for name in results]
    print_table(rows)
    print_result("offline", rows, model=args.model, dtype=args.dtype, batch=args.batch)


def row(name: str, results: dict[str, dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    answers, ours = results[name]["answers"], results["ours"]["answers"]
    if name == "qwen-asr":
        ours = texts(ours, CHECKPOINT if args.model == "tiny" else Path(args.model))
    same = sum(a == b for a, b in zip(answers, ours, strict=True))
    return engine_row(name, results, args) | {
        "tokens": None if name == "qwen-asr" else sum(map(len, answers)),
        "same answers": None if args.dummy else f"{same}/{args.clips}",
    }


def texts(tokens: list[list[int]], model: Path) -> list[str]:
    from transformers import AutoTokenizer

    decoded: list[str] = AutoTokenizer.from_pretrained(model).batch_decode(
        tokens, skip_special_tokens=True
    )
    return decoded


if __name__ == "__main__":
    main()
