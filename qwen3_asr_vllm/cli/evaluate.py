# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr eval``: the error rates of a model on a manifest with texts."""

from __future__ import annotations

import argparse
import time

from ..corpus.sources import find_recordings
from ..recordings import Recording, Result
from .terminal import check_stdout, complain, print_text, usage_error
from .transcribe import transcriber, wrong_for_a_server


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    if message := wrong_for_a_server(args, rest):
        return usage_error(message)
    check_stdout()
    report = _leaderboard_report if args.open_asr else _report
    try:
        results, elapsed_s = _results(args, rest, _recordings(args))
        failed = [result for result in results if result.transcript is None]
        text = report(args, results, elapsed_s, len(failed))
    except (ImportError, OSError, ValueError) as error:
        return usage_error(str(error))
    for result in failed:
        complain(str(result.error))
    print_text(text)
    return 1 if failed else 0


def _recordings(args: argparse.Namespace) -> list[Recording]:
    from ..corpus.evaluation import reference_text

    recordings = find_recordings(args.sources, report=complain)
    if silent := [r for r in recordings if reference_text(r.row) is None]:
        raise ValueError(f"{silent[0]}: its manifest has no reference text.")
    if args.open_asr:
        from ..corpus.leaderboard import check_english

        check_english(recordings)
    return recordings


def _results(
    args: argparse.Namespace, rest: list[str], recordings: list[Recording]
) -> tuple[list[Result], float | None]:
    """Return the results, and the seconds that they took; None if nothing was transcribed."""
    if args.pred_text:
        from ..corpus.evaluation import pred_text_results

        return pred_text_results(recordings), None
    transcribe = transcriber(args, rest)
    start = time.perf_counter()
    results = list(transcribe(recordings, in_order=False))
    return results, time.perf_counter() - start


def _report(
    args: argparse.Namespace, results: list[Result], elapsed_s: float | None, failed: int
) -> str:
    from ..corpus.evaluation import evaluate, pair, report

    scores = evaluate(pair(r, language=args.language) for r in results if r.transcript)
    speed = sum(score.seconds for score in scores) / elapsed_s if elapsed_s else None
    return report(scores, speed=speed, failed=failed, as_json=args.json)


def _leaderboard_report(
    args: argparse.Namespace, results: list[Result], elapsed_s: float | None, failed: int
) -> str:
    from ..corpus.leaderboard import leaderboard_scores, report

    manifests = [
        source
        for source in args.sources
        for _ in find_recordings([source], report=lambda message: None)
    ]
    scores = leaderboard_scores(results, manifests, elapsed_s=elapsed_s)
    return report(scores, failed=failed, as_json=args.json)
