# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr eval``: the error rates of a model on a manifest with texts."""

from __future__ import annotations

import argparse
import time

from ..corpus.sources import find_recordings
from .terminal import check_stdout, complain, print_text, usage_error
from .transcribe import transcriber, wrong_for_a_server


def evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    from ..corpus.evaluation import evaluate, pair, pred_text_results, reference_text, report

    if message := wrong_for_a_server(args, rest):
        return usage_error(message)
    check_stdout()
    try:
        recordings = find_recordings(args.sources, report=complain)
        if silent := [r for r in recordings if reference_text(r.row) is None]:
            raise ValueError(f"{silent[0]}: its manifest has no reference text.")
        if args.pred_text:
            results = pred_text_results(recordings)
        else:
            transcribe = transcriber(args, rest)
            start = time.perf_counter()
            results = list(transcribe(recordings, in_order=False))
            elapsed_s = time.perf_counter() - start
        scores = evaluate(pair(r, language=args.language) for r in results if r.transcript)
    except (ImportError, OSError, ValueError) as error:
        return usage_error(str(error))
    speed = None if args.pred_text else sum(score.seconds for score in scores) / elapsed_s
    failed = [result for result in results if result.transcript is None]
    for result in failed:
        complain(str(result.error))
    print_text(report(scores, speed=speed, failed=len(failed), as_json=args.json))
    return 1 if failed else 0
