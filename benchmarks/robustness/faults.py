# SPDX-License-Identifier: Apache-2.0
"""What does a client see when something breaks, how long does it last, and what is left behind?

    python benchmarks/robustness/faults.py      all of them; two servers for each death
    python benchmarks/robustness/faults.py --only engine-killed storm
    python benchmarks/robustness/faults.py --only sighup --moments "weights are read" idle

The last sends a signal at two of the moments of ``signals.py``.

Every fault is injected for real, while clients wait for answers; ``disk-full`` mounts a small file
system, which needs root. ``clients saw`` counts outcomes, and ``known within s`` is when the last
of them knew. ``next client`` came right after. ``recovery`` is when the old server had ended, and
how long after its start a new one answered, which an orchestrator would start; of the others, how
soon all was as before. ``left`` is what is still there in the end.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

import openai
import psutil
from clients import CLIENTS, CLIP_S, ask, mid_request, running, short_request, upload
from common import QUIET, print_result, print_table, server
from signals import ended
from support.audio import HELDOUT, speech_clip
from support.checkpoints import ALIGNER, CHECKPOINT

from qwen3_asr_vllm.corpus.outputs import INDEX

ARGUMENTS = ["--enforce-eager", "--max-model-len", "2048"]
PATIENCE_S = 120.0  # after which what is still there is left
SLOW_READERS = 64
PAUSE_S = 10.0  # before they read


def processes(pid: int) -> list[psutil.Process]:
    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def num_alive(members: list[psutil.Process]) -> int:
    """Processes that are alive, and no zombies."""
    alive = 0
    for each in members:
        with suppress(psutil.NoSuchProcess):
            alive += each.is_running() and each.status() != psutil.STATUS_ZOMBIE
    return alive


def kill(members: list[psutil.Process]) -> None:
    for each in members:
        with suppress(psutil.NoSuchProcess):  # it ended with the one before
            each.kill()


def seen(asked: list[Future[str]]) -> str:
    counts = Counter(future.result() for future in asked)
    return ", ".join(f"{number} x {what}" for what, number in counts.most_common())


def death(break_it: Callable[[int], None], *options: str) -> dict[str, Any]:
    """A server that dies of it while clients wait, and the one after it."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        with server("ours", CHECKPOINT, [*ARGUMENTS, *options]) as (address, pid):
            members = processes(pid)
            asked = mid_request(pool, address)
            begin = time.monotonic()
            break_it(pid)
            saw = seen(asked)
            known_s = time.monotonic() - begin
            late = short_request(address)
            ended, left = end_of(members, begin)
    begin = time.monotonic()
    with server("ours", CHECKPOINT, ARGUMENTS) as (address, _):
        again = short_request(address)
        started = time.monotonic() - begin
    return {
        "clients saw": saw,
        "known within s": known_s,
        "next client": late,
        "recovery": f"ended after {ended:.1f} s; the next server: {again} after {started:.0f} s",
        "left": f"{left} processes",
    }


def end_of(members: list[psutil.Process], begin: float) -> tuple[float, int]:
    """Seconds from ``begin`` until all have ended, or patience has; how many are left."""
    while num_alive(members) and time.monotonic() - begin < PATIENCE_S:
        time.sleep(0.2)
    return time.monotonic() - begin, num_alive(members)


def engine_killed() -> dict[str, Any]:
    return death(lambda pid: kill(processes(pid)[1:]))


def all_killed() -> dict[str, Any]:
    return death(lambda pid: kill(processes(pid)))


def stopped() -> dict[str, Any]:
    return death(lambda pid: os.kill(pid, signal.SIGTERM))


def stopped_gently() -> dict[str, Any]:
    return death(lambda pid: os.kill(pid, signal.SIGTERM), "--shutdown-timeout", "100")


def storm() -> dict[str, Any]:
    """Two hundred clients that hang up in the upload or in the answer."""
    file = speech_clip(30, 1)
    with server("ours", CHECKPOINT, ARGUMENTS) as (address, pid):
        short_request(address)
        api = psutil.Process(pid)
        before = api.num_fds()
        for number in range(200):
            with upload(address, file, share=(number % 5 + 1) / 5):
                pass
        begin = time.monotonic()
        late = short_request(address)
        waited = time.monotonic() - begin
        while (left := running(address)) and time.monotonic() - begin < PATIENCE_S:
            short_request(address)  # the engine says how much it has when it does something
        idle = time.monotonic() - begin
        time.sleep(1)
        descriptors = api.num_fds() - before
    return {
        "clients saw": "200 x hung up",
        "known within s": None,
        "next client": late,
        "recovery": f"the next client waited {waited:.1f} s; idle after {idle:.1f} s",
        "left": f"{descriptors} descriptors, {left:.0f} requests",
    }


def disk_full() -> dict[str, Any]:
    """A batch that writes to a file system of 32 KiB."""
    recordings = sorted(HELDOUT.glob("*.flac"))[:20]
    command = [sys.executable, "-m", "qwen3_asr_vllm.cli", "transcribe", *map(str, recordings)]
    command += ["--model", str(CHECKPOINT), "-f", "json,verbose_json,srt"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], check=True)
        try:
            begin = time.monotonic()
            result = subprocess.run(
                [*command, "-o", folder], capture_output=True, text=True, env=os.environ | QUIET
            )
            seconds = time.monotonic() - begin
            files = [path for path in Path(folder).iterdir() if path.name != INDEX]
            hidden = sum(path.name.startswith(".") for path in files)
            whole = sum(map(is_whole, files))
        finally:
            subprocess.run(["umount", folder], check=True)
    last = (result.stderr.strip().splitlines() or [""])[-1]
    return {
        "clients saw": f"exit code {result.returncode}: {last[-120:]}",
        "known within s": seconds,
        "next client": None,
        "recovery": "make room and run it again",
        "left": f"{whole} whole files, {len(files) - whole - hidden} cut, {hidden} hidden",
    }


def is_whole(path: Path) -> bool:
    is_hidden = path.name.startswith(".")  # being written
    return not is_hidden and path.read_text().endswith(("}\n", "\n\n", ".\n", "。\n"))


def aligner_killed() -> dict[str, Any]:
    """Half of the clients need word times when the aligner dies; the supervisor starts it again."""
    options = ["--aligner", str(ALIGNER), "--aligner-options=--enforce-eager"]
    with (
        ThreadPoolExecutor(CLIENTS) as pool,
        server("ours", CHECKPOINT, options + ARGUMENTS) as (
            address,
            pid,
        ),
    ):
        asked = [
            pool.submit(ask, address, speech_clip(CLIP_S, seed), words=seed % 2 == 1)
            for seed in range(CLIENTS)
        ]
        while not running(address):
            time.sleep(0.05)
        begin = time.monotonic()
        subprocess.run(["pkill", "-KILL", "-f", f"serve {ALIGNER}"], check=True)
        saw = seen(asked)
        known_s = time.monotonic() - begin
        late = ask(address, speech_clip(2, 99), words=True)
        while ask(address, speech_clip(2, 98), words=True) != "text":
            time.sleep(0.5)
        again = time.monotonic() - begin
    return {
        "clients saw": saw,
        "known within s": known_s,
        "next client": f"wants words: {late}",
        "recovery": f"words again after {again:.0f} s",
        "left": None,
    }


def one_of_two_killed() -> dict[str, Any]:
    """One of two engines behind a port dies; the supervisor starts both again."""
    with (
        ThreadPoolExecutor(CLIENTS) as pool,
        server("ours", CHECKPOINT, ["--engines-per-gpu", "2", *ARGUMENTS]) as (address, pid),
    ):
        asked = mid_request(pool, address)
        members = processes(pid)
        begin = time.monotonic()
        kill([each for each in members if "EngineCore_DP1" in "".join(each.cmdline())])
        saw = seen(asked)
        known_s = time.monotonic() - begin
        late = short_request(address)
        while short_request(address) != "text":
            time.sleep(0.5)
        again = time.monotonic() - begin
        left = num_alive(members)
    return {
        "clients saw": saw,
        "known within s": known_s,
        "next client": late,
        "recovery": f"text again after {again:.0f} s",
        "left": f"{left} processes of the first start",
    }


def slow_readers() -> dict[str, Any]:
    """Streams whose readers take nothing for ten seconds, and then all of it."""
    with ThreadPoolExecutor(SLOW_READERS) as pool:
        with server("ours", CHECKPOINT, ARGUMENTS) as (address, pid):
            short_request(address)
            api = psutil.Process(pid)
            before = api.memory_info().rss
            asked = [pool.submit(read_late, address, seed) for seed in range(SLOW_READERS)]
            time.sleep(PAUSE_S / 2)
            begin = time.monotonic()
            late = short_request(address)
            waited = time.monotonic() - begin
            saw = seen(asked)
            grown = (api.memory_info().rss - before) >> 20
    return {
        "clients saw": saw,
        "known within s": None,
        "next client": late,
        "recovery": f"the next client waited {waited:.1f} s",
        "left": f"{grown} MiB more in the HTTP process",
    }


def read_late(address: str, seed: int) -> str:
    with upload(address, speech_clip(CLIP_S, seed), share=1, stream=True) as connection:
        time.sleep(PAUSE_S)
        with connection.getresponse() as response:
            return "text" if b"[DONE]" in response.read() else "a cut stream"


def sessions() -> dict[str, Any]:
    """Realtime sessions in the middle of an utterance, whose engine is killed."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        with server("ours", CHECKPOINT, ARGUMENTS) as (address, pid):
            asked = [pool.submit(speak, address, seed) for seed in range(CLIENTS)]
            while not running(address):
                time.sleep(0.05)
            members = processes(pid)
            begin = time.monotonic()
            kill(members[1:])
            saw = seen(asked)
            known_s = time.monotonic() - begin
            late = speak(address, 99)
            ended, left = end_of(members, begin)
    return {
        "clients saw": saw,
        "known within s": known_s,
        "next client": late,
        "recovery": f"ended after {ended:.1f} s",
        "left": f"{left} processes",
    }


def speak(address: str, seed: int) -> str:
    """The outcome of a session that sends a minute faster than it is decoded."""
    pcm = speech_clip(CLIP_S, seed)[44:]
    audio = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        try:
            with client.realtime.connect(extra_query={"intent": "transcription"}) as session:
                wanted = {"type": "transcription", "audio": {"input": audio}}
                session.session.update(session=wanted)
                session.input_audio_buffer.append(audio=base64.b64encode(pcm).decode())
                session.input_audio_buffer.commit()
                for event in session:
                    if event.type.endswith("transcription.completed"):
                        return "text"
                    if "error" in event.model_dump():
                        return f"error event: {event.error.code or event.error.message[:60]}"
        except Exception as error:  # whatever ends a session is what its client saw
            return type(error).__name__
    return "closed without an event"


def changing_files() -> dict[str, Any]:
    """A batch whose recordings are cut, grown and put back all the while."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recordings = [Path(shutil.copy(path, folder)) for path in sorted(HELDOUT.glob("*.flac"))]
        is_over = threading.Event()

        def change() -> None:
            rng = random.Random(0)
            while not is_over.is_set():
                path = rng.choice(recordings)
                whole = (HELDOUT / path.name).read_bytes()
                for content in (whole[: len(whole) // 2], whole + whole, whole):
                    path.write_bytes(content)

        changer = threading.Thread(target=change)
        changer.start()
        try:
            result = batch(recordings, folder / "out")
        finally:
            is_over.set()
            changer.join()
        outputs = list((folder / "out").glob("[!.]*"))
        cut = sum(not is_whole(path) for path in outputs)
        again = batch(recordings, folder / "out")
    return {
        "clients saw": f"exit code {result.returncode}, {len(outputs)} of {len(recordings)} done",
        "known within s": None,
        "next client": None,
        "recovery": f"run again when they stay: exit code {again.returncode}",
        "left": f"{cut} cut files",
    }


def batch_ended(number: signal.Signals) -> dict[str, Any]:
    """A batch with an engine of its own that is stopped in the middle, and run again."""
    recordings = sorted(HELDOUT.glob("*.flac"))
    with tempfile.TemporaryDirectory() as name:
        out, undisturbed = Path(name, "out"), Path(name, "undisturbed")
        first, second = (["--manifest-out", f"{each}.jsonl"] for each in (out, undisturbed))
        process = subprocess.Popen(batch_command(recordings, out, *first), env=os.environ | QUIET)
        while len(list(out.glob("[!.]*"))) < len(recordings) / 4:
            assert process.poll() is None, "the batch ended before it could be killed"
            time.sleep(0.01)
        members = processes(process.pid)
        begin = time.monotonic()
        process.send_signal(number)
        code = process.wait()
        ended, left = end_of(members, begin)
        done = len(list(out.glob("[!.]*")))
        again = batch(recordings, out, *first)
        batch(recordings, undisturbed, *second)
        same = sum(
            (out / path.name).exists() and (out / path.name).read_bytes() == path.read_bytes()
            for path in undisturbed.glob("[!.]*")
        )
        same_manifest = Path(first[1]).read_bytes() == Path(second[1]).read_bytes()
    return {
        "clients saw": f"exit code {code}, {done} of {len(recordings)} done",
        "known within s": None,
        "next client": f"run again: exit code {again.returncode}",
        "recovery": f"{same} of {len(recordings)} files and the manifest ({same_manifest}) are "
        "byte for byte those of a run that nothing disturbed",
        "left": f"{left} processes, the engine ended after {ended:.1f} s",
    }


def corrupt_state() -> dict[str, Any]:
    """A batch that goes on from a manifest with a torn line and bytes that are no text."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recordings = sorted(HELDOUT.glob("*.flac"))[:20]
        manifest = folder / "out.jsonl"
        options = ["--manifest-out", str(manifest)]
        batch(recordings[:10], folder / "out", *options)
        lines = manifest.read_bytes().splitlines(keepends=True)
        manifest.write_bytes(b"".join(lines[:8]) + b"\xff\x00{\n" + lines[8] + lines[9][:20])
        result = batch(recordings, folder / "out", *options)
        rows = [line for line in manifest.read_bytes().splitlines() if is_row(line)]
    last = (result.stderr.strip().splitlines() or [""])[-1]
    return {
        "clients saw": f"exit code {result.returncode}: {last[-100:]}",
        "known within s": None,
        "next client": None,
        "recovery": f"{len(rows)} of {len(recordings)} recordings in the manifest",
        "left": None,
    }


def is_row(line: bytes) -> bool:
    try:
        return "pred_text" in json.loads(line)
    except ValueError:
        return False


def batch_command(recordings: list[Path], folder: Path, *options: str) -> list[str]:
    command = [sys.executable, "-m", "qwen3_asr_vllm.cli", "transcribe", *map(str, recordings)]
    return [*command, "--model", str(CHECKPOINT), "-f", "json", "-o", str(folder), *options]


def batch(recordings: list[Path], folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = batch_command(recordings, folder, *options)
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | QUIET)


FAULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "engine-killed": engine_killed,
    "all-killed": all_killed,
    "stopped": stopped,
    "stopped-gently": stopped_gently,
    "storm": storm,
    "disk-full": disk_full,
    "aligner-killed": aligner_killed,
    "one-of-two-killed": one_of_two_killed,
    "slow-readers": slow_readers,
    "sessions": sessions,
    "changing-files": changing_files,
    "batch-killed": partial(batch_ended, signal.SIGKILL),
    "batch-ctrl-c": partial(batch_ended, signal.SIGINT),
    "corrupt-state": corrupt_state,
}


SIGNALS = {
    number.name.lower(): number
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*FAULTS, *SIGNALS]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--moments", nargs="+", help="of the signals; default: all twenty")
    parser.add_argument("--at-once", type=int, default=1, help="servers that get a signal")
    args = parser.parse_args()
    faults = FAULTS | {
        name: partial(ended, number, names=args.moments, at_once=args.at_once)
        for name, number in SIGNALS.items()
    }
    if "disk-full" in args.only and os.geteuid():
        parser.error("disk-full mounts a file system: run it as root, or name the others (--only)")
    rows = []
    for name in args.only:
        rows.append({"fault": name} | faults[name]())
        print(rows[-1], flush=True)
    print_table(rows)
    print_result("faults", rows)


if __name__ == "__main__":
    main()
