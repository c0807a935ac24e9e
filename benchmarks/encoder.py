# SPDX-License-Identifier: Apache-2.0
"""How long does the audio encoder take, and how much memory, against vLLM's in-tree encoder?

    python benchmarks/encoder.py                                       # time
    python benchmarks/encoder.py --memory                              # peak memory
    python benchmarks/encoder.py --device cuda --clips 1 8 32 --dtypes bfloat16
    python benchmarks/encoder.py --graph                               # needs CUDA
    python benchmarks/encoder.py --profile --clips 32                  # needs CUDA

Both encoders have the dimensions of a published checkpoint and equal random weights, get the same
log-mel spectrograms, and take turns in processes of their own. On a GPU, time is wall time; on a
CPU it is the CPU time of one thread, which is the wall time of an idle machine. ``ratio`` is
in-tree over ours; ``with log-mel`` is ours from the samples, which is what a worker runs: in-tree
computes the spectrogram in the API server instead (``processor.py``). ``max |d|`` compares the
audio tokens, relative to the largest.

``--graph`` times ours eagerly and as one CUDA graph over the same samples, bfloat16. ``--profile``
lists the kernels of one such call, by the time that the device spends in them.

Peak memory is what one call adds to a fresh process, weights not counted. It does not depend on
the number of layers, so ``--memory`` builds two.
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from collections.abc import Callable
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from common import SIDES, Side, both_sides, model_config, print_result, print_table, spread
from support.audio import noise
from support.checkpoints import AUDIO_SIZES
from work import UnequalWork

CLIP_S = 30
MEMORY_CASES = ((1, 30), (8, 30), (32, 30), (1, 1200))  # clips, seconds of each


@cache
def audio_config(size: str, layers: int | None) -> Any:
    config = model_config().hf_config.thinker_config.audio_config
    config.update(AUDIO_SIZES[size] | {"num_mel_bins": 128, "downsample_hidden_size": 480})
    config.update({"n_window": 50, "n_window_infer": 800, "conv_chunksize": 500})
    if layers:
        config.encoder_layers = layers
    return config


@cache
def encoder(side: str, size: str, dtype: str, device: str, layers: int | None = None) -> Any:
    """Either encoder; a weight is random, and the same wherever it has the same name."""
    import torch
    from vllm.utils.torch_utils import set_default_torch_dtype

    start_vllm()
    with set_default_torch_dtype(getattr(torch, dtype)), torch.device(device):
        if side == "ours":
            from qwen3_asr_vllm.model.encoder import AudioEncoder

            module = AudioEncoder(audio_config(size, layers))
        else:
            from vllm.model_executor.models.qwen3_omni_moe_thinker import Qwen3OmniMoeAudioEncoder

            module = Qwen3OmniMoeAudioEncoder(audio_config(size, layers))
    for name, parameter in module.named_parameters():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        if parameter.ndim > 1:
            weight = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(weight * parameter[0].numel() ** -0.5)
        else:
            parameter.data.fill_(float("norm" in name or "ln_" in name) * name.endswith("weight"))
    for part in module.modules():
        if method := getattr(part, "quant_method", None):
            method.process_weights_after_loading(part)
    return module.eval()


@cache
def start_vllm() -> Any:
    """One rank, and a config that stays current (while its context lives in the cache)."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import ensure_model_parallel_initialized, init_distributed_environment
    from vllm.utils.network_utils import get_open_port

    context = set_current_vllm_config(VllmConfig())
    context.__enter__()
    address = f"tcp://127.0.0.1:{get_open_port()}"
    init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
    ensure_model_parallel_initialized(1, 1)
    return context


@cache
def inputs(num_clips: int, seconds: float, device: str) -> tuple[Any, Any, list[int]]:
    """Chunks of samples, their log-mel (128, frames of all clips), and the frames of each."""
    import torch

    from qwen3_asr_vllm.geometry import Geometry, num_frames
    from qwen3_asr_vllm.model.log_mel import LogMel, cut_chunks

    geometry, log_mel = Geometry(), LogMel(128)
    chunks, features, frames = [], [], []
    for seed in range(num_clips):
        waveform = noise(seconds, seed=seed)
        frames.append(num_frames(len(waveform)))
        chunks.append(torch.from_numpy(cut_chunks(waveform, geometry)))
        by_chunk = torch.tensor(geometry.frames_by_chunk(frames[-1]))
        ids = torch.zeros(len(by_chunk), dtype=torch.long)
        mel = log_mel(chunks[-1], by_chunk, ids, num_clips=1, chunks_at_once=100)
        features.append(mel.transpose(0, 1).flatten(1)[:, : frames[-1]])
    return torch.cat(chunks).to(device), torch.cat(features, dim=1).to(device), frames


def prepared(side: str, model: tuple, batch: tuple, *, waveforms: bool) -> Callable[[], Any]:
    """A call that encodes a batch and returns its audio tokens, (tokens, output_dim)."""
    import torch

    tower = encoder(side, *model)
    chunks, features, frames = inputs(*batch)
    if waveforms:
        return lambda: torch.cat(list(tower.encode_waveforms(chunks, frames)))
    if side == "ours":
        return lambda: torch.cat(list(tower.encode_features(features.to(tower.dtype), frames)))
    from vllm.model_executor.models.qwen3_asr import _get_feat_extract_output_lengths

    lengths = torch.tensor(frames, device=features.device)
    tokens = _get_feat_extract_output_lengths(lengths)
    return lambda: tower(features.to(tower.dtype), feature_lens=lengths, aftercnn_lens=tokens)


def encode_seconds(side: str, model: tuple, batch: tuple, waveforms: bool) -> float:
    import torch

    call = prepared(side, model, batch, waveforms=waveforms)
    with torch.inference_mode():
        if batch[-1] == "cuda":
            return milliseconds(call, 1) / 1e3
        start = time.process_time()
        call()
        return time.process_time() - start


def outputs(side: str, model: tuple, batch: tuple, waveforms: bool) -> np.ndarray:
    """The audio tokens; also warms up."""
    import torch

    with torch.inference_mode():
        return prepared(side, model, batch, waveforms=waveforms)().float().cpu().numpy()


def set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def compare(sides: dict[str, Side], model: tuple, batch: tuple, rounds: int) -> dict:
    theirs = sides["in-tree"].run(outputs, "in-tree", model, batch, False)
    ours = sides["ours"].run(outputs, "ours", model, batch, False)
    if theirs.shape != ours.shape:
        raise UnequalWork(f"unequal work: audio tokens {theirs.shape}, in-tree, {ours.shape}, ours")
    sides["ours"].run(outputs, "ours", model, batch, True)
    cases = (("in-tree", False), ("ours", False), ("ours", True))
    times: dict[tuple[str, bool], list[float]] = {case: [] for case in cases}
    for _ in range(rounds):
        for side, waveforms in cases:
            times[side, waveforms].append(
                sides[side].run(encode_seconds, side, model, batch, waveforms)
            )
    in_tree, ours_s, with_log_mel = (statistics.median(times[case]) for case in cases)
    size, dtype, device, _ = model
    return {
        "size": size,
        "dtype": dtype,
        "device": device,
        "clips of 30 s": batch[0],
        "in-tree s": in_tree,
        "ours s": ours_s,
        "ratio": in_tree / ours_s,
        "ours with log-mel s": with_log_mel,
        "ratio with log-mel": in_tree / with_log_mel,
        "spread": max(map(spread, times.values())),
        "max |d|": float(np.abs(theirs - ours).max() / np.abs(theirs).max()),
    }


def peak_bytes(side: str, model: tuple, batch: tuple) -> int:
    """Measure the peak memory that one call adds; ours starts from the samples."""
    import torch

    call = prepared(side, model, batch, waveforms=side == "ours")
    with torch.inference_mode():
        if batch[-1] == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            return torch.cuda.max_memory_allocated() - before
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        call()
        return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) << 10


def graph_row(size: str, num_clips: int, rounds: int) -> dict[str, Any]:
    """Ours from the samples: kernel by kernel, and replayed. Runs in a process with CUDA."""
    import torch

    tower = encoder("ours", size, "bfloat16", "cuda")
    chunks, _, frames = inputs(num_clips, CLIP_S, "cuda")
    with torch.inference_mode():
        expected = torch.cat(list(tower.encode_waveforms(chunks, frames)))
        buffers = tower.graph_buffers(chunks, frames)
        tower.encode_graph(buffers)  # cuFFT plans, cuBLAS workspaces
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = tower.encode_graph(buffers)
        eager = milliseconds(lambda: tower.encode_waveforms(chunks, frames), rounds)
        graphed = milliseconds(graph.replay, rounds)
        difference = (replayed[: len(expected)] - expected).abs().max() / expected.abs().max()
    return {
        "size": size,
        "clips of 30 s": num_clips,
        "eager ms": eager,
        "graph ms": graphed,
        "ratio": eager / graphed,
        "graph audio-s/s": num_clips * CLIP_S / graphed * 1e3,
        "max |d|": float(difference),
    }


def profile_rows(size: str, num_clips: int) -> list[dict[str, Any]]:
    """Device time of one call of ours from the samples, by kernel. Runs in a process with CUDA."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    tower = encoder("ours", size, "bfloat16", "cuda")
    chunks, _, frames = inputs(num_clips, CLIP_S, "cuda")
    with torch.inference_mode():
        tower.encode_waveforms(chunks, frames)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            tower.encode_waveforms(chunks, frames)
            torch.cuda.synchronize()
    kernels = [event for event in profiler.key_averages() if event.self_device_time_total]
    total = sum(kernel.self_device_time_total for kernel in kernels)
    return [
        {
            "size": size,
            "clips of 30 s": num_clips,
            "ms": kernel.self_device_time_total / 1e3,
            "share": kernel.self_device_time_total / total,
            "calls": kernel.count,
            "kernel": kernel.key[:100],
        }
        for kernel in sorted(kernels, key=lambda kernel: -kernel.self_device_time_total)[:20]
    ]


def milliseconds(call: Callable[[], Any], rounds: int) -> float:
    """Wall time of one call, device included: the median."""
    import torch

    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:]) * 1e3


def graph_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for size in args.sizes:
        with closing(Side("ours")) as side:
            rows += [side.run(graph_row, size, clips, args.rounds) for clips in args.clips]
    return rows


def profiled_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for size in args.sizes:
        with closing(Side("ours")) as side:
            rows += [row for clips in args.clips for row in side.run(profile_rows, size, clips)]
    return rows


def memory_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for num_clips, seconds in MEMORY_CASES:
        row: dict[str, Any] = {"clips": num_clips, "clip_s": seconds, "dtype": args.dtypes[0]}
        for name in SIDES:
            model = (args.sizes[0], args.dtypes[0], args.device, 2)
            with closing(Side(name)) as side:  # a fresh process: nothing allocated before
                side.run(set_threads, args.threads)
                peak = side.run(peak_bytes, name, model, (num_clips, seconds, args.device))
            row[f"{name} MiB"] = peak / 2**20
        rows.append(row | {"ratio": row["in-tree MiB"] / row["ours MiB"]})
    return rows


def time_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    for size in args.sizes:
        for dtype in args.dtypes:
            with both_sides() as sides:  # one model at a time in memory
                for side in sides.values():
                    side.run(set_threads, args.threads)
                for num_clips in args.clips:
                    model = (size, dtype, args.device, None)
                    batch = (num_clips, CLIP_S, args.device)
                    rows.append(compare(sides, model, batch, args.rounds))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=AUDIO_SIZES, default=["0.6B", "1.7B"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--clips", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true", help="peak memory instead of time")
    parser.add_argument("--graph", action="store_true", help="CUDA graph against eager, ours")
    parser.add_argument("--profile", action="store_true", help="the kernels of ours")
    args = parser.parse_args()
    name, run = "encoder", time_rows
    if args.memory:
        name, run = "encoder memory", memory_rows
    elif args.graph:
        name, run = "encoder graph", graph_rows
    elif args.profile:
        name, run = "encoder profile", profiled_rows
    rows = run(args)
    print_table(rows)
    print_result(name, rows, threads=args.threads)


if __name__ == "__main__":
    main()
