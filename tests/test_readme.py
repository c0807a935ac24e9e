# SPDX-License-Identifier: Apache-2.0
"""Every command of the READMEs is run: here, by the test that is named, or it says why not.

A command that is in none of the tables fails.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
READMES = (
    "README.md",
    "qwen3_asr_vllm/README.md",
    "qwen3_asr_vllm/server/README.md",
    "qwen3_asr_vllm/cli/README.md",
    "docker/README.md",
    "tests/README.md",
    "benchmarks/accuracy.md",
)
PROGRAMS = ("qwen3-asr ", "vllm ", "curl ", "python3 ", "pip ", "pytest ", "docker ", "arecord ")
PROGRAMS += ("VLLM_PLUGINS=qwen3_asr ", ".ci/", "apt-get ")

# Beginnings of commands, and why they are not run here.
ELSEWHERE = {
    "apt-get ": "installs; .ci/run installs the same packages",
    "docker ": "needs docker; .ci/dockerfile runs the steps of Dockerfile.cpu without it",
    "pip install '.[gpu]'": "needs a GPU",
    "pip install '.[": "installs; .ci/run installs '.[test]'",
    "pip install --no-deps qwen-asr": "installs; test_alignment.py reads such a dictionary",
    "qwen3-asr serve MODEL --data-parallel-size 4": "test_weather.py serves with two",
    "qwen3-asr serve MODEL --engines-per-gpu 2": "test_engines.py, test_supervisor.py",
    "qwen3-asr serve MODEL --aligner ALIGNER": "test_supervisor.py",
    "qwen3-asr serve Qwen/": "needs a GPU and a download; the tests serve the tiny checkpoint",
    "vllm serve Qwen/": "as above; test_core_route.py",
    "VLLM_PLUGINS=qwen3_asr vllm serve": "test_weather.py",
    "qwen3-asr --list-languages": "test_cli.py",
    "qwen3-asr doctor --server ": "test_probe.py",
    "qwen3-asr doctor": "test_cli.py",
    "qwen3-asr eval ": "test_evaluation.py",
    "qwen3-asr stream ": "test_offline.py",
    "arecord ": "needs a microphone; test_offline.py has samples come from a pipe",
    "qwen3-asr transcribe corpus.jsonl --ray": "test_cluster.py",
    "qwen3-asr align ": "test_offline.py aligns with the same checkpoint, test_cli.py calls it",
    "qwen3-asr transcribe talk.mp3 --word_timestamps": "as align, and needs a download",
    "qwen3-asr serve MODEL --diarizer": "test_supervisor.py serves with a diarizer",
    "pip install sherpa-onnx": "its models are not in a package",
    "pip install 'nemo_toolkit[asr]'": "its checkpoints are not in a package",
    "python3 -m venv .venv": ".ci/run runs both",
    "pytest ": "these tests are among them",
    ".ci/dockerfile": "installs all that the image has",
    ".ci/next-vllm": "downloads another vLLM, on which it runs these tests",
}
# Run against the server of the tests: the beginning, and what takes the place of its files.
HERE = {
    "curl http://localhost:8000/v1/audio/transcriptions": {},
    "qwen3-asr transcribe recordings/": {
        "recordings/": "tests/data/heldout",
        "more/**/*.mp3": "tests/data/three_*.flac",
        "https://example.org/a.mp3": "tests/data/hello.flac",
        "corpus.jsonl": "{folder}/corpus.jsonl",
    },
}


def commands() -> list[str]:
    """The lines of indented blocks, and the code between words, that begin with a program."""
    found = []
    for name in READMES:
        text = (ROOT / name).read_text()
        found += re.findall(r"^ {4}\s*(.+)$", text, re.M) + re.findall(r"`([^`\n]+)`", text)
    return [each for each in found if each.startswith(PROGRAMS) and not is_name(each)]


def is_name(code: str) -> bool:
    """Of a command, without anything to do."""
    programs, commands = "qwen3-asr|vllm", "serve|transcribe|stream|align|eval|run-batch"
    return bool(re.fullmatch(rf"({programs}) ({commands})|\.ci/run", code))


def beginning(command: str, table: dict) -> str | None:
    return next((start for start in table if command.startswith(start)), None)


def test_every_command_is_run_or_explained():
    assert len(commands()) > 8
    unknown = [c for c in commands() if not (beginning(c, ELSEWHERE) or beginning(c, HERE))]
    assert unknown == []
    used = {beginning(c, ELSEWHERE) or beginning(c, HERE) for c in commands()}
    assert used == {*ELSEWHERE, *HERE}


def test_python_of_the_readme_is_python():
    texts = [(ROOT / name).read_text() for name in READMES]
    blocks = [block for text in texts for block in re.findall(r"```python\n(.*?)```", text, re.S)]
    assert len(blocks) > 2
    for block in blocks:
        names = {}
        exec(compile(block, "README.md", "exec"), names | {"__name__": "imported"})


def test_files_that_the_readmes_name_exist():
    for name in READMES:
        text = (ROOT / name).read_text()
        links = re.findall(r"\]\((?!https?:)([^)#]+)\)", text)
        for test in re.findall(r"`(?:tests/)?(?:\w+/)?(test_\w+\.py)`", text):
            assert [*Path(__file__).parent.rglob(test)], f"{name}: {test}"
        for link in links:
            base = ROOT if link.startswith("/") else (ROOT / name).parent
            assert (base / link.lstrip("/")).exists(), f"{name}: {link}"


@pytest.mark.vllm
@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("curl")])
def test_curl_prints_the_lines_of_readmes(server, command):
    line, _, printed = command.partition("   # ")
    line = line.replace("http://localhost:8000", server.url)
    result = subprocess.run(shlex.split(line), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if printed:
        assert re.sub(r"\s", "", result.stdout).startswith(re.sub(r"\s|\.{3}$", "", printed))


@pytest.mark.vllm
@pytest.mark.parametrize("command", [c for c in commands() if c.startswith(tuple(HERE)[1:])])
def test_a_command_works_on_a_server(server, tmp_path, command):
    """Its files replaced by some that are here, its folder by one of this test."""
    part = {"audio_filepath": str(ROOT / "tests/data/hello.flac"), "offset": 1, "duration": 3}
    (tmp_path / "corpus.jsonl").write_text(json.dumps(part) + "\n")
    replaced = HERE[beginning(command, HERE)] | {"out": str(tmp_path / "out")}
    words = [replaced.get(word, word) for word in shlex.split(command)[1:]]
    words = [word.format(folder=tmp_path) for word in words]
    words = [str(tmp_path / word) if word.endswith("out.jsonl") else word for word in words]
    result = subprocess.run(
        [sys.executable, "-m", "qwen3_asr_vllm.cli", *words, "--server", server.url],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) > 70
    assert (tmp_path / "out" / "hello.srt").read_text().startswith("1\n00:00:0")
