# SPDX-License-Identifier: Apache-2.0
"""Does bad input ever get more than a refusal?

    python benchmarks/robustness/fuzz.py                    5,000 recordings, 2,000 forms, and so on
    python benchmarks/robustness/fuzz.py --only form --count 500 --url http://localhost:8000
    python benchmarks/robustness/fuzz.py --case audio:1234  what that case is, and what comes of it

Every case is made from its number alone, so a failure can be run again. Each recording is decoded
as a server does it, in a process of its own within the limits of ``decode_worker.py``, whose end,
memory and CPU time are seen from outside. The law: a checked waveform, or ValueError with a
message, or a limit that was reached; never a crash. Forms go to a server: no status of 500 or
above, and every refusal is OpenAI's error object. So do an aligner's forms, and realtime sessions:
each goes on, whatever it was sent. Meanwhile the server stays small and answers others. Manifests
are read, or refused by name, and nothing would be written outside of the output folder.
What breaks the law is listed; then the exit code is 1.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # common
sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))  # support

from fuzzing.audio import audio_case
from fuzzing.decoding import load_all, work
from fuzzing.forms import alignment_case, ask, ask_aligner, form_case
from fuzzing.manifests import manifest_case, read_manifest
from fuzzing.outcomes import HANG_S, Outcome, at_once, memory
from fuzzing.sessions import converse, session_case

MAX_HEALTH_S = 20.0  # on a machine that has other work
MAX_SERVER_BYTES = 2 << 30


@contextmanager
def watching(url: str, pid: int | None) -> Iterator[dict[str, float]]:
    """The slowest answer of /health in the meantime, and the largest that the server was."""
    seen = {"health s": 0.0, "server MiB": 0.0}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.5):
            start = time.perf_counter()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=HANG_S * 5).close()
            except OSError:
                pass  # the cases say what is wrong
            seen["health s"] = max(seen["health s"], time.perf_counter() - start)
            if pid is not None:
                size = memory("VmRSS", pid) / 2**20
                seen["server MiB"] = max(seen["server MiB"], size)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        ended.set()
        thread.join()


def report(kind: str, outcomes: list[Outcome]) -> dict[str, Any]:
    """Prints what broke the law; returns the figures."""
    broken = [outcome for outcome in outcomes if outcome.broken]
    for outcome in broken[:50]:
        print(
            f"BROKEN {kind}:{outcome.number} ({outcome.name}): {outcome.broken}\n  {outcome.answer}"
        )
    answers = Counter(re.split(r"[\s:]", outcome.answer)[0] for outcome in outcomes)
    return {
        "cases": len(outcomes),
        "broken": len(broken),
        "answers": dict(answers.most_common(8)),
        "slowest s": max((o.seconds for o in outcomes), default=0.0),
        "most MiB": max((o.growth for o in outcomes), default=0) / 2**20,
    }


CASES = {"audio": 5_000, "form": 2_000, "alignment": 2_000, "session": 500, "manifest": 3_000}
AT_A_SERVER = {"form": ask, "alignment": ask_aligner, "session": converse}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--count", type=int, help="of each; default: thousands")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--url", help="of a server, with --only what it serves; default: start it")
    parser.add_argument("--case", help="KIND:NUMBER: show it, and run it, at --url where it must")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work()
        return 0
    if args.case:
        kind, _, number = args.case.partition(":")
        if kind not in CASES or not number.isdecimal():
            parser.error(f"--case {args.case}: give one of {', '.join(CASES)}, and a number")
        return _show(kind, int(number), args.url)
    if args.url and "alignment" in args.only and len(args.only) > 1:
        parser.error("--url: an aligner serves nothing else; say which it is (--only)")
    return _run(args)


def _show(kind: str, number: int, url: str | None) -> int:
    if kind == "audio":
        name, data = audio_case(number)
        shown: list[Any] = [name, f"{len(data)} bytes", data[:64].hex(" "), *load_all([number])]
    elif kind == "manifest":
        shown = [*manifest_case(number), *_read_manifests([number])]
    elif kind == "session":
        shown = session_case(number)
    else:
        case = form_case(number) if kind == "form" else alignment_case(number)
        shown = [case.route, case.headers, case.body[:3000]]
    if url and kind in AT_A_SERVER:
        shown.append(AT_A_SERVER[kind](url, number))
    print(*shown, sep="\n")
    return 0


def _read_manifests(numbers: Iterable[int]) -> Iterator[Outcome]:
    with tempfile.TemporaryDirectory() as folder:
        yield from (read_manifest(Path(folder).resolve(), number) for number in numbers)


def _run(args: argparse.Namespace) -> int:
    from common import print_result, print_table, server
    from support.checkpoints import ALIGNER, CHECKPOINT

    rows = []
    for model, kinds in (
        (None, ("audio", "manifest")),
        (CHECKPOINT, ("form", "session")),
        (ALIGNER, ("alignment",)),
    ):
        wanted = [kind for kind in kinds if kind in args.only]
        with ExitStack() as stack:
            url, pid = args.url, None
            if wanted and model and not url:
                url, pid = stack.enter_context(server("ours", model, ["--enforce-eager"]))
            for kind in wanted:
                numbers = range(args.first, args.first + (args.count or CASES[kind]))
                seen: dict[str, float] = {}
                if kind in AT_A_SERVER:
                    with watching(url, pid) as seen:
                        outcomes = list(at_once(AT_A_SERVER[kind], url, numbers))
                else:
                    load = load_all if kind == "audio" else _read_manifests
                    outcomes = list(load(numbers))
                rows.append({"input": kind} | report(kind, outcomes) | seen)
    print_table(rows)
    print_result("fuzz", rows)
    return 1 if any(map(_is_broken, rows)) else 0


def _is_broken(row: dict[str, Any]) -> bool:
    is_slow = row.get("health s", 0) > MAX_HEALTH_S
    return bool(row["broken"] or is_slow or row.get("server MiB", 0) > MAX_SERVER_BYTES / 2**20)


if __name__ == "__main__":
    sys.exit(main())
