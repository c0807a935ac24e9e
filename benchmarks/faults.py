# SPDX-License-Identifier: Apache-2.0
"""What does a client see when something breaks, how long does it last, and what is left behind?

    python benchmarks/faults.py               all of them; a server is started for each death
    python benchmarks/faults.py --only engine-killed disk-full

Every fault is injected for real, while clients wait for answers. ``clients saw`` counts outcomes.
``recovery`` is the time from the fault until a server answers again: the start of a new one where
the old one died, which an orchestrator would do. ``left`` is what is still there a moment later.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import CHECKPOINT, RECORDING, print_result, print_table
from serve import server, speech_clip

ARGUMENTS = ["--enforce-eager", "--max-model-len", "2048"]
CLIENTS = 8


def ask(address: str, file: bytes, *, stream: bool = False) -> str:
    """What one client saw, in a word or two."""
    import openai

    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=600)
    try:
        answer = client.audio.transcriptions.create(
            model="model", file=("a.wav", file), stream=stream
        )
        if not stream:
            return "text"
        return "text" if list(answer)[-1].type == "transcript.text.done" else "a cut stream"
    except openai.APIStatusError as error:
        return f"{error.status_code} {error.code or ''}".strip()
    except openai.APIConnectionError:
        return "connection closed"
    except openai.APIError as error:
        return f"error event: {error.message[:60]}"


def processes(pid: int) -> list[Any]:
    import psutil

    root = psutil.Process(pid)
    return [root, *root.children(recursive=True)]


def running(address: str) -> float:
    import re
    import urllib.request

    text = urllib.request.urlopen(f"{address}/metrics").read().decode()
    return sum(map(float, re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", text, re.M)))


def mid_request(
    pool: ThreadPoolExecutor, address: str, *, seconds: float = 60.0
) -> list[Future[str]]:
    """Clients, half of them streaming, whose recordings the engine is decoding."""
    asked = [
        pool.submit(ask, address, speech_clip(seconds, seed), stream=seed % 2 == 1)
        for seed in range(CLIENTS)
    ]
    while not running(address) and not all(future.done() for future in asked):
        time.sleep(0.05)
    return asked


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
            told = time.monotonic() - begin
            late = ask(address, speech_clip(2, 99))
            while any(each.is_running() and each.status() != "zombie" for each in members):
                if time.monotonic() - begin > 120:
                    break
                time.sleep(0.2)
            ended = time.monotonic() - begin
            left = sum(each.is_running() and each.status() != "zombie" for each in members)
        with server("ours", CHECKPOINT, ARGUMENTS) as (address, _):
            begin = time.monotonic()
            again = ask(address, speech_clip(2, 99))
    return {
        "clients saw": saw,
        "told within s": told,
        "next client": late,
        "recovery": f"all ended after {ended:.1f} s; the next server answers {again}",
        "left": f"{left} processes",
    }


def engine_killed() -> dict[str, Any]:
    def kill(pid: int) -> None:
        for process in processes(pid)[1:]:
            process.kill()

    return death(kill)


def all_killed() -> dict[str, Any]:
    def kill(pid: int) -> None:
        for process in processes(pid):
            process.kill()

    return death(kill)


def stopped() -> dict[str, Any]:
    return death(lambda pid: os.kill(pid, signal.SIGTERM))


def stopped_gently() -> dict[str, Any]:
    return death(lambda pid: os.kill(pid, signal.SIGTERM), "--shutdown-timeout", "100")


def storm() -> dict[str, Any]:
    """Two hundred clients that hang up in the upload or in the answer."""
    import http.client

    body = speech_clip(30, 1)
    head = b"--b\r\nContent-Disposition: form-data; name=file; filename=a.wav\r\n\r\n"
    body = head + body + b"\r\n--b--\r\n"
    with server("ours", CHECKPOINT, ARGUMENTS) as (address, pid):
        ask(address, speech_clip(2, 0))
        api = processes(pid)[0]
        before = api.num_fds()
        for number in range(200):
            connection = http.client.HTTPConnection(address[7:])
            connection.putrequest("POST", "/v1/audio/transcriptions")
            connection.putheader("Content-Type", "multipart/form-data; boundary=b")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[: len(body) * (number % 5 + 1) // 5])
            connection.close()
        begin = time.monotonic()
        late = ask(address, speech_clip(2, 99))
        told = time.monotonic() - begin
        while running(address):
            time.sleep(0.1)
        idle = time.monotonic() - begin
        time.sleep(1)
        left = f"{api.num_fds() - before} descriptors, 0 requests"
    return {
        "clients saw": "200 x hung up",
        "told within s": 0.0,
        "next client": late,
        "recovery": f"the next client waited {told:.1f} s; idle after {idle:.1f} s",
        "left": left,
    }


def disk_full() -> dict[str, Any]:
    """A batch that writes to a file system of 32 KiB; needs root, to mount it."""
    recordings = sorted((RECORDING.parent / "heldout").glob("*.flac"))[:20]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "qwen3_asr_vllm.cli", "transcribe", *map(str, recordings)]
        command += ["--model", str(CHECKPOINT), "-f", "json,verbose_json,srt", "-o", folder]
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], check=True)
        try:
            begin = time.monotonic()
            result = subprocess.run(command, capture_output=True, text=True, env=environment)
            seconds = time.monotonic() - begin
            broken = [path.name for path in Path(folder).iterdir() if not is_whole(path)]
            whole = sum(map(is_whole, Path(folder).iterdir()))
        finally:
            subprocess.run(["umount", folder], check=True)
    last = (result.stderr.strip().splitlines() or [""])[-1]
    return {
        "clients saw": f"exit code {result.returncode}: {last[-120:]}",
        "told within s": seconds,
        "next client": "-",
        "recovery": "make room and run it again",
        "left": f"{whole} whole files, {len(broken)} cut: {', '.join(broken[:3])}",
    }


def is_whole(path: Path) -> bool:
    return path.read_text().endswith(("}\n", "\n\n", ".\n", "。\n"))


FAULTS: dict[str, Callable[[], dict[str, Any]]] = {
    "engine-killed": engine_killed,
    "all-killed": all_killed,
    "stopped": stopped,
    "stopped-gently": stopped_gently,
    "storm": storm,
    "disk-full": disk_full,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=FAULTS, default=list(FAULTS))
    args = parser.parse_args()
    rows = []
    for name in args.only:
        rows.append({"fault": name} | FAULTS[name]())
        print(rows[-1], flush=True)
    print_table(rows)
    print_result("faults", rows)


if __name__ == "__main__":
    main()
