# SPDX-License-Identifier: Apache-2.0
"""Manifests of a corpus."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from .audio import flipped
from .outcomes import Outcome, measure

NAMES: tuple[Any, ...] = (
    *(
        "a.wav",
        "../../a.wav",
        "/etc/passwd",
        "a/../../b",
        "..",
        ".",
        "",
        " ",
        "~root/a",
        "a\0b.wav",
    ),
    *("http://127.0.0.1:9/a.wav", "file:///etc/passwd", "ftp://x/y", "http://", "http://[::1/a"),
    *("-", "a" * 5_000, "\ud800", "\u202e.wav", "C:\\con", "**", "$(id)", "\n", None, 1, [], {}),
)
NUMBERS_OF_ROWS: tuple[Any, ...] = (
    *(None, 0, 1.5, -1, 1e308, float("nan"), float("inf"), "x", "1", True, [], {}, 10**400),
)
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt")


def manifest_case(number: int) -> tuple[str, bytes]:
    """The suffix and the bytes of a manifest, some of whose rows are wrong."""
    rng = np.random.default_rng([4, number])
    suffix = SUFFIXES[int(rng.integers(len(SUFFIXES)))]
    rows = [_row(rng) for _ in range(int(rng.integers(1, 6)))]
    if suffix in (".csv", ".tsv"):
        lines = [["audio_filepath", "offset", "duration"], *(list(row.values()) for row in rows)]
        text = "\n".join(("," if suffix == ".csv" else "\t").join(map(str, x)) for x in lines)
    elif suffix == ".txt":
        text = "\n".join(str(next(iter(row.values()), "")) for row in rows)
    else:
        text = "\n".join(json.dumps(row) for row in rows)
    data = text.encode(errors="surrogatepass") + b"\n"
    wild = rng.random()
    if wild < 0.1:
        return suffix, flipped(rng, data)
    odd = (b"[" * 100_000, b"\xff\xfe\0", b"\0", b"null", b'"', b"{" * 9, b"x" * 200_000, b"1e999")
    return suffix, data + odd[int(rng.integers(len(odd)))] if wild < 0.4 else data


def _row(rng: np.random.Generator) -> dict[str, Any]:
    key = ("audio_filepath", "file_name", "audio", "path", "x")[int(rng.integers(5))]
    row: dict[str, Any] = {key: NAMES[int(rng.integers(len(NAMES)))]}
    for name in ("offset", "duration"):
        if rng.random() < 0.4:
            row[name] = NUMBERS_OF_ROWS[int(rng.integers(len(NUMBERS_OF_ROWS)))]
    return row


def read_manifest(folder: Path, number: int) -> Outcome:
    """One manifest: recordings that can be loaded or refused, and stay in their folder; or no."""
    suffix, data = manifest_case(number)
    path = folder / f"manifest{suffix}"
    path.write_bytes(data)
    return measure(number, suffix, lambda: _recordings_of(path))


def _recordings_of(manifest: Path) -> tuple[str, str]:
    """The answer, and what is wrong with it."""
    from qwen3_asr_vllm.corpus.outputs import OutputFolder
    from qwen3_asr_vllm.corpus.sources import find_recordings

    folder, broken = manifest.parent, ""
    try:
        recordings = find_recordings([str(manifest)])
        for recording in recordings:
            out = OutputFolder(folder / "out", {"txt": str})
            inside = [p.resolve().is_relative_to(folder) for p in out.paths(recording).values()]
            broken = broken or ("" if all(inside) else f"{recording.name} leaves the folder")
            if not recording.source.startswith("http") and recording.source != "-":
                _refuse_quietly(recording)
    except (ValueError, OSError) as error:
        is_named = str(manifest) in str(error) or "would be written" in str(error)
        return f"refused: {str(error)[:200]}", "" if is_named else "no name"
    except Exception as error:
        return repr(error)[:200], "another exception than ValueError or OSError"
    return f"read: {len(recordings)} recordings", broken


def _refuse_quietly(recording: Any) -> None:
    try:
        recording.load()
    except (ValueError, OSError):
        pass
