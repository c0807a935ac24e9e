# SPDX-License-Identifier: Apache-2.0
"""How much audio does ``LLM.generate`` transcribe per second: ours, in-tree, and transformers?

    python benchmarks/offline.py                                  # the tiny checkpoint
    python benchmarks/offline.py --model 0.6B --clips 8 --max-tokens 32
    python benchmarks/offline.py --qwen-asr /tmp/qwen-asr         # its makers' package, too
    python benchmarks/offline.py --files                          # from a folder to texts
    python benchmarks/offline.py --files --no-others --model 0.6B --clips 16 --max-tokens 11

All three get the same clips, prompt and weights, decode greedily in the same dtype, and run one
after the other, each in a process of its own. All must do the same work (``work.py``), which
``--model 0.6B`` ensures with weights that count (``counting.py``). ``cpu s`` counts every thread,
so it is what to compare on a busy machine. ``same answers`` compares the generated tokens with
ours. transformers runs its own model in batches of ``--batch``, with the features of its own
extractor. qwen-asr needs an older transformers, so it lives in a folder (``pip install --no-deps
--target FOLDER qwen-asr transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
accelerate``); of its answers only the text is compared.

``--files`` asks what a corpus costs from a folder of wav files to texts, the held-out recordings of
the tests: ``LLM.generate`` with prompts written by hand; ``Qwen3ASR.transcribe``, which takes turns
with it in one process, so that ``overhead`` is that of our layer; ``HTTP``, which is ``qwen3-asr
serve`` and ``--clients`` that post the files; in-tree's ``LLM.generate``; and ``vllm run-batch``,
whose start is subtracted: a run over all files, less one over a single file. All must do the same
work; of ``run-batch``, which has no metrics, the texts must be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import serve
from common import (
    AUDIO_TOKEN,
    IN_PROCESS,
    Side,
    exit_on_sigterm,
    print_result,
    print_table,
    server,
    side_environment,
    spread,
)
from counting import COUNTING, chosen_checkpoint
from engines import (
    Reference,
    add_engine_options,
    by_engine,
    engine_options,
    engine_row,
    measured,
)
from support.audio import HELDOUT, SAMPLE_RATE
from support.checkpoints import CHECKPOINT
from work import (
    EngineWork,
    UnequalWork,
    Work,
    check_work,
    num_text_tokens,
    prompt,
    server_work,
)

from qwen3_asr_vllm import transcription


def run_vllm(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(str(model), **engine_options(args))
    params = SamplingParams(temperature=0, max_tokens=args.max_tokens)

    def generate(clips: list[np.ndarray]) -> list[list[int]]:
        outputs = llm.generate(requests(clips), params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    return measured(generate, args, EngineWork(llm))


def requests(clips: list[np.ndarray]) -> list[dict[str, Any]]:
    return [{"prompt": prompt(), "multi_modal_data": {"audio": [clip]}} for clip in clips]


def run_transformers(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    import torch

    reference = Reference(model, args)
    config = json.loads((model / "generation_config.json").read_text())
    stop = config["eos_token_id"]

    @torch.inference_mode()
    def generate(clips: list[np.ndarray]) -> list[list[int]]:
        tokens: list[list[int]] = []
        for start in range(0, len(clips), args.batch):
            tokens += generate_batch(clips[start : start + args.batch])
        return tokens

    def generate_batch(clips: list[np.ndarray]) -> list[list[int]]:
        features = reference.features(clips)
        text = prompt().replace(AUDIO_TOKEN, reference.audio_tokens(features))
        ids = reference.tokenizer([text] * len(clips), return_tensors="pt").input_ids
        generated = reference.model.generate(
            input_ids=ids.to(reference.device),
            attention_mask=torch.ones_like(ids).to(reference.device),
            **features,
            do_sample=False,
            max_new_tokens=args.max_tokens,
            eos_token_id=stop,
            pad_token_id=0,
        )
        tokens = [trimmed(row, stop) for row in generated[:, ids.shape[1] :].tolist()]
        reference.count(len(clips), ids.numel(), sum(map(len, tokens)))
        return tokens

    return measured(generate, args, reference)


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

    return measured(transcribe, args, SimpleNamespace(work=Work()))


# from files to texts ----


class Pass(NamedTuple):
    """One pass over all files; ``work`` is None where nothing counts it."""

    wall_s: float
    cpu_s: float
    texts: list[str]
    work: Work | None = None


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
    """Return an engine of this process, and the count of its work."""
    from vllm import LLM

    from qwen3_asr_vllm import Qwen3ASR

    made = (Qwen3ASR if ours else LLM)(model, **dict(options))
    return made, EngineWork(made.llm if ours else made)


def time_files(name: str, model: str, files: list[str], args: argparse.Namespace) -> Pass:
    """Measure one pass of an engine in this process."""
    if args.counts:  # a text that never ends has as many tokens everywhere
        transcription.max_new_tokens = lambda clip_s: args.max_tokens
    options = tuple(engine_options(args).items())
    made, count = loaded(model, options, ours=name != "in-tree")
    work, start, start_cpu = count.work, time.perf_counter(), time.process_time()
    if name == "Qwen3ASR":
        texts = [result.transcript.text for result in made.transcribe(files)]
    else:
        texts = by_hand(made if name == "in-tree" else made.llm, files, args.max_tokens)
    seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return Pass(*seconds, texts, count.work - work)


def http_passes(model: str, files: list[str], args: argparse.Namespace) -> list[Pass]:
    """Measure passes of ``qwen3-asr serve`` with as many clients as ``args.clients``."""
    options = ["--max-model-len", "4096", "--dtype", args.dtype, "--max-num-seqs", str(args.batch)]
    options += ["--no-enable-prefix-caching", "--mm-processor-cache-gb", "0"]
    options += [] if args.compile else ["--enforce-eager"]
    wavs = [Path(file).read_bytes() for file in files]
    passes = []
    with server("ours", Path(model), options) as (address, pid):
        asyncio.run(serve.drive(address, wavs[:8], args.clients, args))  # warms up
        for _ in range(args.rounds):
            work, cpu = server_work(address, args.text_tokens), serve.cpu_by_process(pid)
            wall_s, answers = asyncio.run(serve.drive(address, wavs, args.clients, args))
            cpu_s = sum(serve.cpu_by_process(pid).values()) - sum(cpu.values())
            work = server_work(address, args.text_tokens) - work
            passes.append(Pass(wall_s, cpu_s, [answer.text for answer in answers], work))
    return passes


def time_run_batch(model: str, files: list[str], args: argparse.Namespace) -> Pass:
    """Measure one pass of ``vllm run-batch``, start included."""
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
    return Pass(wall, cpu, [texts[index] for index in range(len(files))])


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


def measure_files(model: str, files: list[str], args: argparse.Namespace) -> dict[str, list[Pass]]:
    """Measure all that turn these files into texts."""
    passes: dict[str, list[Pass]] = {}
    for names in (("LLM.generate", "Qwen3ASR"), ("in-tree",))[: 2 - args.no_others]:
        side = "in-tree" if "in-tree" in names else "ours"
        with closing(Side(side, **IN_PROCESS)) as process:
            for name in names:
                process.run(time_files, name, model, files[:8], args)  # warms up
            for turn in range(args.rounds):
                for name in names[:: (-1) ** turn]:
                    result = process.run(time_files, name, model, files, args)
                    passes.setdefault(name, []).append(result)
    passes["HTTP"] = http_passes(model, files, args)
    if not args.no_others:
        one, everything = (time_run_batch(model, part, args) for part in (files[:1], files))
        wall_s, cpu_s = everything.wall_s - one.wall_s, everything.cpu_s - one.cpu_s
        passes["vllm run-batch"] = [Pass(wall_s, cpu_s, everything.texts)]
    return passes


def check_passes(passes: dict[str, list[Pass]], audio_s: float) -> None:
    """Raise UnequalWork unless every pass did the same; that is, wrote the same without counts."""
    expected = passes["LLM.generate"][0].texts
    for name, results in passes.items():
        for result in results:
            if result.work is None and result.texts != expected:
                raise UnequalWork(f"{name} wrote other texts than LLM.generate.")
    works = {name: results[0].work for name, results in passes.items()}
    counted = {name: work for name, work in works.items() if work is not None}
    check_work(counted, clips=len(expected), audio_s=audio_s)


def compare_files(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = chosen_checkpoint(args.model, folder)
        args.text_tokens = num_text_tokens(model, context="")
        files, seconds = wav_files(folder, args.clips)
        passes = measure_files(str(model), files, args)
    check_passes(passes, seconds)
    rows = [files_row(name, passes, seconds) for name in passes]
    print_table(rows)
    pairs = zip(passes["Qwen3ASR"], passes["LLM.generate"], strict=True)
    overheads = [ours.cpu_s / hand.cpu_s - 1 for ours, hand in pairs]
    print(
        f"overhead of Qwen3ASR in CPU time, pass by pass: median {statistics.median(overheads):.1%}"
    )
    about = {"model": args.model, "dtype": args.dtype, "batch": args.batch, "load": os.getloadavg()}
    print_result("offline-files", rows, audio_s=seconds, overheads=overheads, **about)


def files_row(name: str, passes: dict[str, list[Pass]], seconds: float) -> dict[str, Any]:
    results, expected = passes[name], passes["LLM.generate"]
    wall_s = statistics.median(result.wall_s for result in results)
    cpus = [result.cpu_s for result in results]
    texts = zip(results[0].texts, expected[0].texts, strict=True)
    return {
        "": name,
        "files": len(expected[0].texts),
        "tokens": results[0].work and results[0].work.tokens,
        "wall s": wall_s,
        "cpu s": statistics.median(cpus),
        "audio-s/s": seconds / wall_s,
        "cpu against LLM.generate": statistics.median(cpus)
        / statistics.median(result.cpu_s for result in expected),
        "spread": spread(cpus) if len(cpus) > 1 else None,
        "same text": sum(a == b for a, b in texts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="tiny, counting, 0.6B, 1.7B, or a checkpoint"
    )
    add_engine_options(parser, clip_s=10.0)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--compile", action="store_true", help="let vLLM compile the decoder")
    parser.add_argument("--files", action="store_true", help="from a folder of files to texts")
    parser.add_argument("--no-others", action="store_true", help="--files without the last two")
    parser.add_argument("--rounds", type=int, default=5, help="of --files")
    parser.add_argument("--clients", type=int, default=32, help="of --files, that ask over HTTP")
    parser.add_argument("--qwen-asr", metavar="FOLDER", help="where qwen-asr is installed")
    args = parser.parse_args()
    exit_on_sigterm()
    args.counts = args.model in COUNTING
    args.dummy, args.whole, args.context = False, True, ""
    if args.files:
        compare_files(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = chosen_checkpoint(args.model, Path(folder))
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
    return engine_row(name, results, args) | {"same answers": f"{same}/{args.clips}"}


def texts(tokens: list[list[int]], model: Path) -> list[str]:
    from transformers import AutoTokenizer

    decoded: list[str] = AutoTokenizer.from_pretrained(model).batch_decode(
        tokens, skip_special_tokens=True
    )
    return decoded


if __name__ == "__main__":
    main()
