# SPDX-License-Identifier: Apache-2.0
"""A batch whose disk is full, or whose notes are torn: whole files or none, and it goes on later.

Servers and engines that die are in test_weather.py; files that change in test_fuzz.py.
"""

from __future__ import annotations

import resource
import signal
import subprocess
import sys

from qwen3_asr_vllm.corpus.outputs import OutputFolder, OutputManifest
from qwen3_asr_vllm.formats import FORMATS
from qwen3_asr_vllm.recordings import Recording
from qwen3_asr_vllm.transcript import Segment, Transcript

# Write one transcript after the other, each larger than the last, until the disk says no.
WRITE = """
import sys
from pathlib import Path
import test_faults as batch

folder, manifest = batch.outputs(Path(sys.argv[1]))
for recording in batch.RECORDINGS:
    try:
        for output in (folder, manifest):
            if not output.is_done(recording):
                output.write(recording, batch.transcript(recording))
    except OSError as error:
        sys.exit(str(error))
"""
RECORDINGS = [Recording(f"/data/{n}.wav", f"{n}", {"audio_filepath": f"/{n}"}) for n in range(20)]


def transcript(recording):
    text = f"Recording {recording.name} says so. " * (1 + 3 * int(recording.name))
    return Transcript(text, 9.0, (Segment(0.0, 9.0, text, "English"),))


def outputs(folder):
    formats = {"txt": FORMATS["txt"], "json": FORMATS["json"]}
    return OutputFolder(folder / "out", formats), OutputManifest(folder / "out.jsonl")


def run(folder, *, most_bytes=None):
    """In a process that cannot write a file larger than that: what a full disk does to a write."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails, and not the process
        if most_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))

    command = [sys.executable, "-B", "-c", WRITE, str(folder)]  # no bytecode cut off at the limit
    env = {"PYTHONPATH": ":".join(sys.path)}
    return subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, env=env)


def written(folder):
    """Every file of the output folder that is not hidden."""
    return {p.name: p.read_text() for p in (folder / "out").iterdir() if p.name[0] != "."}


def expected(recordings=RECORDINGS):
    return {
        f"{recording.name}.{suffix}": FORMATS[suffix](transcript(recording))
        for recording in recordings
        for suffix in ("txt", "json")
    }


def test_runs_resume_after_a_full_disk(tmp_path):
    result = run(tmp_path, most_bytes=4_000)
    assert result.returncode == 1 and "File too large" in result.stderr
    left = written(tmp_path)
    assert 5 < len(left) < 40
    assert left.items() <= expected().items()  # each as it should be
    assert run(tmp_path).returncode == 0
    assert written(tmp_path) == expected()
    _, manifest = outputs(tmp_path)
    assert all(map(manifest.is_done, RECORDINGS))
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 20


def test_torn_notes_lose_only_one_line(tmp_path):
    assert run(tmp_path).returncode == 0
    path = tmp_path / "out.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for size in range(len(whole) - len(lines[-1]) - 3, len(whole)):
        path.write_bytes(whole[:size])
        _, manifest = outputs(tmp_path)
        done = sum(map(manifest.is_done, RECORDINGS))
        assert done == (whole[:size] + b"\n").count(b"}\n")  # complete, with its end or without
    assert run(tmp_path).returncode == 0
    assert path.read_bytes() == whole
