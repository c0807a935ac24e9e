# SPDX-License-Identifier: Apache-2.0
"""What does a 30 s upload cost before the engine sees it, and does decoding leave the GIL?

    python benchmarks/decode.py
    python benchmarks/decode.py --uploads   the third table only

First table: CPU time of decoding and resampling an uploaded file (``load_audio``: ours against
vLLM's own, as each transcription route calls it), alone and followed by the multi-modal processor
(``processor.py``). ``ratio`` is in-tree over ours. The samples are compared too: the downmix is
bit-identical, the resampler is another one (soxr instead of FFmpeg's).

Second table: wall time to decode the same files with 1, 2 and more threads and with a pool of
processes. A speed-up near that of the processes says that the decoder releases the GIL; one near
1 says that only a pool of processes would use more cores. On a busy machine read the processes'
speed-up as what the machine had to give.

Third table: uploads a second through ``load_posted`` as a server calls it, with decoders in its
threads (``audio.py``, as it was) and in processes of their own (``decoders.py``), 1 and 8 at a
time, and the CPU time of one. The sides take turns; each number is the median of the rounds.
"""

from __future__ import annotations

import argparse
import io
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from multiprocessing import get_context
from tempfile import SpooledTemporaryFile

import numpy as np
import psutil
from common import SIDES, Side, both_sides, cpu_seconds, print_result, print_table, spread
from processor import apply
from support.audio import noise

SECONDS = 30
# format -> sampling rate, channels, and how soundfile writes it
FORMATS: dict[str, tuple[int, int, dict[str, str]]] = {
    "wav 16k mono": (16_000, 1, {"format": "WAV"}),
    "wav 48k stereo": (48_000, 2, {"format": "WAV"}),
    "flac 16k mono": (16_000, 1, {"format": "FLAC"}),
    "mp3 16k mono": (16_000, 1, {"format": "MP3"}),
    "mp3 48k stereo": (48_000, 2, {"format": "MP3"}),
    "opus 48k mono": (48_000, 1, {"format": "OGG", "subtype": "OPUS"}),
}
WORKERS = (1, 2, 4)


def encoded(name: str) -> bytes:
    """A file in this format: noise with a spectrum that falls like that of speech."""
    import soundfile

    sampling_rate, channels, options = FORMATS[name]
    length = SECONDS * sampling_rate
    white = noise(length * channels / 16_000)[: length * channels]
    samples = np.cumsum(white.reshape(length, channels), axis=0)
    samples -= np.linspace(samples[0], samples[-1], length)
    samples *= 0.5 / np.abs(samples).max()
    file = io.BytesIO()
    soundfile.write(file, samples, sampling_rate, **options)
    return file.getvalue()


def decode(side: str, data: bytes) -> np.ndarray:
    if side == "ours":
        from qwen3_asr_vllm.audio import load_audio

        return load_audio(data)
    from vllm.multimodal.media.audio import load_audio as load_in_tree

    return load_in_tree(io.BytesIO(data), sr=16_000)[0]


def decode_cost(side: str, data: bytes, repeats: int) -> float:
    decode(side, data)
    return cpu_seconds(lambda: decode(side, data), repeats=repeats)


def both_cost(side: str, data: bytes, repeats: int) -> float:
    apply(decode(side, data))
    return cpu_seconds(lambda: apply(decode(side, data)), repeats=repeats)


def with_threads(side: str, data: bytes, files: int, workers: int) -> float:
    """Wall seconds to decode ``files`` files in this process."""
    with ThreadPoolExecutor(workers) as pool:
        return in_pool(pool, side, data, files)


def in_pool(pool: Executor, side: str, data: bytes, files: int) -> float:
    start = time.perf_counter()
    for waveform in pool.map(decode, [side] * files, [data] * files):
        assert len(waveform)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--files", type=int, default=16, help="decoded by each pool; 0: none")
    parser.add_argument("--uploads", action="store_true")
    args = parser.parse_args()
    if args.uploads:
        rows = upload_rows(args.rounds, args.files)
        print_table(rows)
        print_result("uploads", rows)
        return
    costs: list[dict] = []
    walls: list[dict] = []
    with both_sides() as sides:
        for name in FORMATS:
            data = encoded(name)
            theirs, ours = (sides[s].run(decode, s, data) for s in SIDES)
            times: dict[str, list[float]] = {}
            for _ in range(args.rounds):
                for side in SIDES:
                    for function in (decode_cost, both_cost):
                        cost = sides[side].run(function, side, data, args.repeats)
                        times.setdefault(f"{side} {function.__name__}", []).append(cost)
            costs.append(cost_row(name, theirs, ours, times))
        print_table(costs)
        if args.files:
            walls = wall_rows(sides, args.files)
    print()
    print_table(walls)
    uploads = upload_rows(args.rounds, args.files)
    print()
    print_table(uploads)
    print_result("decode", costs, parallel=walls, uploads=uploads)


def cost_row(
    name: str, theirs: np.ndarray, ours: np.ndarray, times: dict[str, list[float]]
) -> dict:
    median = {key: statistics.median(values) for key, values in times.items()}
    length = min(len(theirs), len(ours))
    difference = np.abs(theirs[:length] - ours[:length])[160:-160]
    return {
        "file": name,
        "in-tree decode ms": median["in-tree decode_cost"] * 1e3,
        "ours decode ms": median["ours decode_cost"] * 1e3,
        "decode ratio": median["in-tree decode_cost"] / median["ours decode_cost"],
        "in-tree decode+apply ms": median["in-tree both_cost"] * 1e3,
        "ours decode+apply ms": median["ours both_cost"] * 1e3,
        "decode+apply ratio": median["in-tree both_cost"] / median["ours both_cost"],
        "spread": max(map(spread, times.values())),
        "max |d sample|": float(difference.max()),
        "d samples": len(ours) - len(theirs),
    }


def wall_rows(sides: dict[str, Side], files: int) -> list[dict]:
    rows = []
    pools = {n: ProcessPoolExecutor(n, get_context("spawn")) for n in WORKERS}
    for name in FORMATS:
        data = encoded(name)
        rows += [thread_row(sides[side], data, name, files) for side in SIDES]
        rows.append(process_row(pools, data, name, files))
    for pool in pools.values():
        pool.shutdown()
    return rows


def thread_row(side: Side, data: bytes, name: str, files: int) -> dict:
    rates = {}
    for n in WORKERS:
        seconds = [side.run(with_threads, side.side, data, files, n) for _ in "123"]
        rates[f"{n} files/s"] = files / min(seconds)
    return {"file": name, "decoder": side.side, "workers": "threads"} | with_speedup(rates)


def process_row(pools: dict[int, ProcessPoolExecutor], data: bytes, name: str, files: int) -> dict:
    rates = {}
    for n, pool in pools.items():
        in_pool(pool, "ours", data, 2 * n)  # imports
        rates[f"{n} files/s"] = files / min(in_pool(pool, "ours", data, files) for _ in "123")
    return {"file": name, "decoder": "ours", "workers": "processes"} | with_speedup(rates)


def with_speedup(rates: dict[str, float]) -> dict[str, float]:
    return rates | {"2 over 1": rates["2 files/s"] / rates["1 files/s"]}


def upload_rows(rounds: int, files: int) -> list[dict]:
    """Uploads a second of 30 s files, by threads and by decoder processes."""
    from qwen3_asr_vllm.audio import load_audio
    from qwen3_asr_vllm.server.decoders import Decoders

    loaders = {"threads": load_audio, "processes": Decoders().load_audio}
    names = ("wav 16k mono", "flac 16k mono", "mp3 16k mono", "m4a 48k mono")
    rows = []
    for name in names:
        data = m4a() if name.startswith("m4a") else encoded(name)
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for at_once, (side, load) in product((1, 8), loaders.items()):
                before_s = cpu_s_of_all()
                rate = upload_rate(load, data, files, at_once)
                found.setdefault(f"{side}, {at_once} at once: 1/s", []).append(rate)
                if at_once == 1:
                    cpu_ms = (cpu_s_of_all() - before_s) / files * 1e3
                    found.setdefault(f"{side}: CPU ms", []).append(cpu_ms)
        rows.append({"file": name} | {key: statistics.median(v) for key, v in found.items()})
    return rows


def cpu_s_of_all() -> float:
    """CPU time of this process and of what it has started, once children have ended."""
    time.sleep(0.1)
    process = psutil.Process()
    times = [p.cpu_times() for p in (process, *process.children(recursive=True))]
    return sum(t.user + t.system + t.children_user + t.children_system for t in times)


def upload_rate(load: Callable[..., np.ndarray], data: bytes, files: int, at_once: int) -> float:
    """Uploads a second, each a file as Starlette keeps it."""
    from starlette.datastructures import UploadFile

    from qwen3_asr_vllm.server.admission import Admission
    from qwen3_asr_vllm.server.uploads import load_posted

    admission = Admission()

    def post(_: int) -> None:
        file = SpooledTemporaryFile(max_size=1 << 20)
        file.write(data)
        with admission.reserve() as reservation:
            upload = UploadFile(file)
            load_posted(upload, reservation, longest_s=60.0, load=load, on_warning=print)

    with ThreadPoolExecutor(at_once) as pool:
        start = time.perf_counter()
        for _ in pool.map(post, range(files)):
            pass
        return files / (time.perf_counter() - start)


def m4a() -> bytes:
    """The same noise as AAC."""
    import av
    import soundfile

    samples = soundfile.read(io.BytesIO(encoded("opus 48k mono")), dtype="float32")[0]
    file = io.BytesIO()
    with av.open(file, "w", format="ipod") as output:
        stream = output.add_stream("aac", rate=48_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(samples[None], "fltp", "mono")
        frame.sample_rate = 48_000
        output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return file.getvalue()


if __name__ == "__main__":
    main()
