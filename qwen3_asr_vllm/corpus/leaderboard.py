# SPDX-License-Identifier: Apache-2.0
"""Scores as the Open ASR Leaderboard computes them for English, and its manifests.

A manifest has a row for each recording: audio_filepath, duration and time in seconds, text, and
pred_text, both as written. Texts are normalised (``leaderboard_english.py``); words are aligned by
kaldialign, where a word written together or apart is no error; the rate is that of all words of a
manifest, in percent with two decimals. RTFx is seconds of audio per second of inference.
Needs kaldialign and whisper-normalizer: pip install 'qwen3-asr-vllm[eval]'.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ..recordings import Recording, Result
from .evaluation import reference_text, stated_language

Row = Mapping[str, Any]

IGNORED = "ignore time segment in scoring"  # text of a segment that counts as empty


@dataclass(frozen=True)
class LeaderboardScore:
    """The score of one manifest. ``wer`` is in percent; infinite for words where none belong."""

    manifest: str
    recordings: int
    wer: float
    insertions: int
    deletions: int
    substitutions: int
    audio_s: float | None  # None, as the two below, if a row has no duration or time
    inference_s: float | None
    rtfx: float | None


def leaderboard_scores(
    results: Iterable[Result], manifests: Sequence[str], *, elapsed_s: float | None
) -> list[LeaderboardScore]:
    """Return the score of each manifest; ``manifests`` has that of each recording, by index.

    ``elapsed_s`` is the time that all took. None: the column ``time`` has that of each.
    Raises what ``score`` raises.
    """
    done = sorted((r for r in results if r.transcript), key=lambda result: result.index)
    rows_by_manifest: dict[str, list[Row]] = {}
    for result in done:
        time_s = None if elapsed_s is None else elapsed_s / len(done)
        rows_by_manifest.setdefault(manifests[result.index], []).append(_row(result, time_s))
    return [score(manifest, rows) for manifest, rows in rows_by_manifest.items()]


def check_english(recordings: Iterable[Recording]) -> None:
    """Raise ValueError for a recording whose row states a language other than English."""
    for recording in recordings:
        if (language := stated_language(recording.row)) not in (None, "English"):
            raise ValueError(f"{recording} is in {language}; --open-asr scores English only.")


def _row(result: Result, time_s: float | None) -> Row:
    row, transcript = result.source.row, result.transcript
    assert transcript is not None
    return {
        **row,
        "text": reference_text(row) or "",
        "pred_text": transcript.text,
        "duration": transcript.duration,
        "time": row.get("time") if time_s is None else time_s,
    }


def score(manifest: str, rows: Sequence[Row]) -> LeaderboardScore:
    """Return the score of the rows of one manifest.

    Rows with a ``parent_id`` are parts of a recording, which is scored as a whole.
    Raises ValueError for a part that is missing, ImportError without kaldialign.
    """
    align = _aligner()
    rows = _merged(rows)
    references = [normalizer()(row["text"]).split() for row in rows]
    hypotheses = [normalizer()(row["pred_text"]).split() for row in rows]
    errors = align(references, hypotheses, merge_compounds=True)
    audio_s, inference_s = _total(rows, "duration"), _total(rows, "time")
    is_timed = audio_s is not None and inference_s is not None
    return LeaderboardScore(
        manifest=manifest,
        recordings=len(rows),
        wer=round(100 * errors["err_rate"], 2),
        insertions=errors["ins"],
        deletions=errors["del"],
        substitutions=errors["sub"],
        audio_s=audio_s if is_timed else None,
        inference_s=inference_s if is_timed else None,
        rtfx=round(audio_s / inference_s, 4) if audio_s and inference_s else None,
    )


def _aligner() -> Callable[..., dict[str, Any]]:
    try:
        from kaldialign import batch_error_rate
    except ImportError as error:
        raise ImportError("to score, do: pip install 'kaldialign>=0.12'") from error
    return batch_error_rate


@cache
def normalizer() -> Callable[[str], str]:
    """Return the leaderboard's normaliser of English. Raises ImportError."""
    try:
        from .leaderboard_english import EnglishNormalizer
    except ImportError as error:
        raise ImportError("to score, do: pip install whisper-normalizer") from error
    return EnglishNormalizer()


def is_scored(text: str) -> bool:
    """Return whether the leaderboard keeps a recording with this reference text."""
    return normalizer()(text) not in ("", IGNORED)


def _total(rows: Iterable[Row], field: str) -> float | None:
    """Return the sum of a field in seconds; None if a row lacks it, or has 0."""
    values = [row.get(field) for row in rows]
    return float(sum(filter(None, values))) if all(values) else None


def _merged(rows: Sequence[Row]) -> Sequence[Row]:
    """Join the parts of each recording, whose text is that of its first part."""
    if not rows or "parent_id" not in rows[0]:
        return rows
    parts_by_parent: dict[str, list[Row]] = {}
    for row in rows:
        parts_by_parent.setdefault(row["parent_id"], []).append(row)
    return [_whole(parent, parts_by_parent[parent]) for parent in sorted(parts_by_parent)]


def _whole(parent: str, parts: list[Row]) -> Row:
    parts.sort(key=lambda part: part["chunk_index"])
    found = [part["chunk_index"] for part in parts]
    if found != list(range(len(parts))):
        raise ValueError(f"{parent}: its parts have chunk_index {found}; they must count from 0.")
    return {
        "text": parts[0]["text"],
        "pred_text": " ".join(part["pred_text"] for part in parts),
        "duration": _total(parts, "duration"),
        "time": _total(parts, "time"),
    }


def report(scores: Sequence[LeaderboardScore], *, failed: int, as_json: bool) -> str:
    """Return a table or JSON: each manifest, and the mean of their rates with the RTFx of all."""
    mean = sum(score.wer for score in scores) / max(1, len(scores))
    audio_s, inference_s = (_total(map(asdict, scores), f) for f in ("audio_s", "inference_s"))
    speed = round(audio_s / inference_s, 2) if audio_s and inference_s else None
    if as_json:
        rows = [asdict(score) | {"wer": _finite(score.wer)} for score in scores]
        document = {"scores": rows, "mean_wer": _finite(mean), "rtfx": speed, "failed": failed}
        return json.dumps(document, ensure_ascii=False, indent=2) + "\n"
    lines = ["    WER %  inserted   deleted  replaced       RTFx  recordings  manifest"]
    for each in scores:
        lines.append(
            f"{each.wer:9.2f}{each.insertions:10}{each.deletions:10}{each.substitutions:10}"
            f"{_number(each.rtfx):>11}{each.recordings:12}  {each.manifest}"
        )
    if len(scores) > 1:
        lines.append(f"{mean:9.2f}{'':30}{_number(speed):>11}{'':12}  mean WER, RTFx of all")
    if failed:
        lines.append(f"{failed} recordings failed and are not counted")
    return "\n".join(lines) + "\n"


def _finite(rate: float) -> float | None:
    return rate if math.isfinite(rate) else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_manifest(
    folder: Path, rows: Iterable[Row], *, model: str, dataset: str, name: str, split: str
) -> Path:
    """Write a manifest with the name and the fields of the leaderboard; return its path."""
    model, dataset, name = (part.replace("/", "-") for part in (model, dataset, name))
    path = folder / f"MODEL_{model}_DATASET_{dataset}_{name}_{split}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    fields = ("audio_filepath", "duration", "time", "text", "pred_text")
    lines = (json.dumps({f: row[f] for f in fields}, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
