# SPDX-License-Identifier: Apache-2.0
"""Python, the route and the command line recognise the files of users."""

from __future__ import annotations

import re
import subprocess
import sys

import httpx
import numpy as np
import pytest
from support.audio import DATA
from test_reading import FIELD, RATE, encode, remux, video, with_size

from qwen3_asr_vllm.audio import load_audio

pytestmark = pytest.mark.vllm

E1 = "Catherine Reed lives in Madrid."
E2 = "The hospital opens at five thirty."
HELLO = " ".join((DATA / "hello.txt").read_text().split())


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Files by name, with their text and what their warning says."""
    folder = tmp_path_factory.mktemp("field")
    hello, e1 = load_audio(DATA / "hello.flac"), load_audio(FIELD / "out_of_phase.flac")
    silence = np.zeros(len(hello), np.float32)
    unfinished = with_size(encode("wav", e1), b"data", 4, 0, 4, "little")
    silent_first = encode("mkv", silence, hello)
    damaged = bytearray(encode("aac", np.concatenate([e1, silence[:RATE], e1])))
    middle = len(damaged) // 2
    damaged[middle : middle + 60] = bytes(range(60))
    in_ts = remux(encode("m4a", hello), "mpegts", lambda t: 0.0)
    made = {
        "one_bad_packet.aac": (bytes(damaged), f"{E1} {E1}", "damaged packet"),
        "data_size_0.wav": (unfinished, E1, "states 0 bytes"),
        "first_track_is_silent.mkv": (silent_first, HELLO, "track 1 of 2 is silent"),
        "starts_at_1.4_s.ts": (in_ts, HELLO, ""),
        "audio_starts_late.mkv": (video(3.94, "matroska", hello), HELLO, ""),
    }
    given = {
        "joined.mp3": (f"{E1} {E2}", ""),
        "chained_vorbis.ogg": (f"{E1} {E2}", ""),
        "mono_then_stereo.mp3": (f"{E1} {E2}", ""),
        "garbage_in_the_middle.mp3": (f"{E1} {E2}", "damaged packets at 0:01"),
        "out_of_phase.flac": (E1, ""),
        "gap_of_2_s.webm": (HELLO, ""),
    }
    made |= {name: ((FIELD / name).read_bytes(), *right) for name, right in given.items()}
    for name, (data, *_) in made.items():
        (folder / name).write_bytes(data)
    return {folder / name: right for name, (_, *right) in made.items()}


def words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def test_python_recognises_the_files_of_users(model, recordings):
    for result in model.transcribe(list(recordings)):
        assert result.transcript is not None, result.error
        text, warning = recordings[result.source]
        assert words(result.transcript.text) == words(text), result.source.name
        if warning:
            assert warning in " ".join(result.transcript.warnings)
        else:
            assert result.transcript.warnings == ()
        if "late" in result.source.name:
            assert result.transcript.segments[0].start == pytest.approx(4.24, abs=0.1)


def test_route_and_command_recognise_the_same(server, recordings):
    for path, (text, warning) in recordings.items():
        route = f"{server.url}/v1/audio/transcriptions"
        answer = httpx.post(route, files={"file": path.open("rb")}, timeout=60).json()
        assert words(answer["text"]) == words(text), path.name
        assert warning in " ".join(answer.get("warnings", [])), path.name
    command = [sys.executable, "-m", "qwen3_asr_vllm.cli", "transcribe", "--server", server.url]
    paths = list(map(str, recordings))
    printed = subprocess.run([*command, *paths], capture_output=True, text=True, check=True)
    for text, warning in recordings.values():
        assert warning in printed.stderr
        assert text.split()[0] in printed.stdout
