# SPDX-License-Identifier: Apache-2.0
"""benchmarks/open_asr: the entry writes and scores results; its jobs are those of a submission."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import run_eval
import soundfile

from qwen3_asr_vllm.cli import entry as cli
from qwen3_asr_vllm.recordings import Result
from qwen3_asr_vllm.transcript import Transcript

SUBMIT = Path(run_eval.__file__).parent / "submit_jobs.sh"
SENTENCES = {  # by seconds: the reference, and the output of the model
    1.0: ("Um, it's a white paper.", "It's a whitepaper."),
    2.0: ("Twenty dollars", "$20"),
    3.0: ("The end of the colour", "the end of a color!"),
}


class FakeModel:
    """Knows each recording by its length, and keeps the sizes of its batches."""

    def __init__(self):
        self.batches = []

    def transcribe(self, waveforms, *, language):
        assert language == "English"
        self.batches.append([len(waveform) / 16_000 for waveform in waveforms])
        for index, waveform in enumerate(waveforms):
            seconds = len(waveform) / 16_000
            if seconds == 4:
                yield Result(index, waveform, error=ValueError("no such speech"))
            text = SENTENCES.get(round(seconds), ("", ""))[1]
            yield Result(index, waveform, transcript=Transcript(text, seconds))


def wav(seconds):
    file = io.BytesIO()
    soundfile.write(file, np.zeros(int(seconds * 16_000)), 16_000, format="WAV")
    return file.getvalue()


@pytest.fixture
def model(monkeypatch, tmp_path):
    model = FakeModel()
    monkeypatch.setattr(run_eval, "load_model", lambda args, rest: model)
    monkeypatch.chdir(tmp_path)
    return model


def local_manifest(folder, rows):
    lines = []
    for number, (seconds, fields) in enumerate(rows):
        (folder / f"{number}.wav").write_bytes(wav(seconds))
        lines.append(json.dumps({"audio_filepath": f"{number}.wav", **fields}) + "\n")
    path = folder / "set.jsonl"
    path.write_text("".join(lines))
    return str(path)


def rows_of(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_an_entry_writes_texts_as_they_are(model, tmp_path, capsys):
    rows = [(seconds, {"text": text}) for seconds, (text, _) in SENTENCES.items()]
    rows += [(1.0, {"text": "Ja", "language": "de"}), (1.0, {"text": "Um..."})]
    path = local_manifest(tmp_path, rows)
    run_eval.main(["--model", "tiny/asr", "--manifest", path, "--batch_size", "2"])
    assert model.batches == [[0.99, 1.99], [1.0, 2.0], [3.0]]  # the first is the warm-up
    (written,) = Path("results").iterdir()
    assert written.name == f"MODEL_tiny-asr_DATASET_local_{tmp_path.name}_set.jsonl"
    found = rows_of(written)
    assert [(row["text"], row["pred_text"]) for row in found] == list(SENTENCES.values())
    assert [row["duration"] for row in found] == [1.0, 2.0, 3.0]
    assert found[0]["time"] == found[1]["time"] > 0  # equal shares of a batch
    printed = capsys.readouterr().out
    assert "3 of 5 recordings are in English and have a text" in printed
    # it is a white paper | $20 | the end of the color: one of 11 words is wrong
    assert "WER: 9.09 % RTFx: " in printed
    assert cli.main(["eval", str(written), "--open-asr", "--pred-text", "--json"]) == 0
    (score,) = json.loads(capsys.readouterr().out)["scores"]
    assert (score["wer"], score["substitutions"]) == (9.09, 1)
    assert f"RTFx: {score['rtfx']}\n" in printed


def test_a_folder_has_texts_beside_recordings(model, tmp_path, capsys):
    (tmp_path / "set").mkdir()
    for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0)):
        (tmp_path / "set" / f"{name}.wav").write_bytes(wav(seconds))
    (tmp_path / "set" / "b.txt").write_text("twenty dollars\n")
    options = ["--batch_size", "8", "--warmup_steps", "0"]
    run_eval.main(["--model", "m", "--manifest", "set", *options])
    assert model.batches == [[2.0]]
    assert "1 of 3 recordings" in (printed := capsys.readouterr().out)
    assert "WER: 0.0 %" in printed


def test_failed_clips_give_no_score(model, tmp_path):
    path = local_manifest(tmp_path, [(1.0, {"text": "yes"}), (4.0, {"text": "no"})])
    with pytest.raises(ValueError, match="no such speech"):
        run_eval.main(["--model", "m", "--manifest", path, "--warmup_steps", "0"])
    assert not Path("results").exists()


def test_empty_sets_are_an_error(model, tmp_path):
    path = local_manifest(tmp_path, [(1.0, {"text": "Um"})])
    with pytest.raises(SystemExit, match="no English recording with a text"):
        run_eval.main(["--model", "m", "--manifest", path])


class FakeDataset(list):
    """Rows as ``datasets`` gives them while nothing decodes the audio."""

    def cast_column(self, name, feature):
        assert (name, feature) == ("audio", "undecoded")
        return self


@pytest.fixture
def leaderboard_package(monkeypatch):
    """Stands in for ``datasets`` and the leaderboard's own package; returns its calls."""
    calls = {}
    datasets, normalizer, eval_utils = map(
        ModuleType, ("datasets", "normalizer", "normalizer.eval_utils")
    )
    datasets.Audio = lambda decode: "decoded" if decode else "undecoded"
    normalizer.data_utils = data_utils = ModuleType("normalizer.data_utils")
    rows = [
        {"id": f"clip {seconds:g}", "original_text": text, "audio": {"bytes": wav(seconds)}}
        for seconds, (text, _) in SENTENCES.items()
    ]
    data_utils.load_data = lambda args: (
        args.streaming or (args.dataset_path, args.dataset, args.split)
    )
    data_utils.prepare_data = lambda source: calls.update(source=source) or FakeDataset(rows)
    data_utils.write_manifest = lambda *given, **named: (
        calls.update(given=given, **named) or "results/m.jsonl"
    )
    eval_utils.score_results = lambda *given: calls.update(scored=given)
    for module in (datasets, normalizer, eval_utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return calls


def test_hub_sets_use_the_leaderboards_package(model, leaderboard_package):
    options = ["--dataset", "ami_cleaned", "--max_eval_samples", "2", "--warmup_steps", "0"]
    run_eval.main(["--model_id", "Qwen/Qwen3-ASR-0.6B", "--device=0", *options])
    called = leaderboard_package
    where = ("hf-audio/open-asr-leaderboard", "ami_cleaned", "test")
    assert called["source"] == where
    texts, outputs, *rest = called["given"]
    assert list(zip(texts, outputs, strict=True)) == list(SENTENCES.values())[:2]
    assert rest == ["Qwen/Qwen3-ASR-0.6B", *where]
    assert called["audio_length"] == [1.0, 2.0] and called["audio_filepaths"] == [
        "clip 1",
        "clip 2",
    ]
    assert min(called["transcription_time"]) > 0
    assert called["scored"] == ("results", "Qwen/Qwen3-ASR-0.6B")


def test_missing_packages_are_named(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SystemExit, match="needs datasets and the leaderboard's normalizer/"):
        run_eval.main(["--model_id", "m", "--dataset", "ami_cleaned"])


# ---- image and jobs ----


def test_the_image_has_the_servers_vllm():
    server = SUBMIT.parents[2] / "docker" / "Dockerfile"
    version = next(line for line in server.read_text().splitlines() if line.startswith("ARG VLLM"))
    image = (SUBMIT.parent / "Dockerfile").read_text().splitlines()
    assert version in image
    assert any("qwen3-asr-vllm[eval]" in line for line in image)


@pytest.fixture
def submit(tmp_path):
    """Run submit_jobs.sh with an ``hf`` that only writes its arguments down."""
    (tmp_path / "bin").mkdir()
    hf = tmp_path / "bin" / "hf"
    hf.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        "line = (json.dumps(sys.argv[1:]) + '\\n').encode()\n"
        "log = os.open(os.environ['LOG'], os.O_CREAT | os.O_APPEND | os.O_WRONLY)\n"
        "os.write(log, line)\n"
        "sys.exit(int(os.environ.get('FAIL', '') in line.decode() and 'FAIL' in os.environ))\n"
    )
    hf.chmod(0o755)
    package = tmp_path / "normalizer"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "eval_utils.py").write_text("def score_results(*given): print('scored', *given)\n")

    def run(**environment):
        path = f"{hf.parent}:{os.environ['PATH']}"
        given = {"PATH": path, "NORMALIZER": str(package), "LOG": str(tmp_path / "log")}
        given |= {"SPACE": "me/space", "RESULTS_BUCKET": "me/bucket", **environment}
        command = ["bash", str(SUBMIT)]
        done = subprocess.run(command, env=given, cwd=tmp_path, capture_output=True, text=True)
        log = tmp_path / "log"
        return done, [
            json.loads(line) for line in log.read_text().splitlines()
        ] if log.exists() else []

    return run


def test_each_set_is_a_job(submit):
    done, calls = submit()
    assert done.returncode == 0, done.stderr
    jobs = [call for call in calls if call[:2] == ["jobs", "run"]]
    assert len(jobs) == 16 and len(calls) == 18  # two models of eight sets; results are fetched
    scripts = {job[-1] for job in jobs}
    assert len(scripts) == 16
    librispeech = "--split=test.other --dataset_path=hf-audio/open-asr-leaderboard --dataset=libris"
    assert sum(librispeech in script for script in scripts) == 2
    assert (
        sum("--dataset_path=VoiceArena/Monsoon_en_IN_test --dataset= " in s for s in scripts) == 2
    )
    assert all("hf.co/spaces/me/space" in job and "h200" in job for job in jobs)
    assert "scored results/Qwen-Qwen3-ASR-0.6B Qwen/Qwen3-ASR-0.6B" in done.stdout


def test_options_of_jobs_are_those_of_run_eval(submit):
    _, calls = submit(MODELS="m", ONLY_DATASETS="spgispeech")
    (job,) = [call for call in calls if call[:2] == ["jobs", "run"]]
    options = job[-1].split("run_eval.py")[1].split("&&")[0].split()
    args, rest = run_eval.parser().parse_known_args(options)
    assert rest == [] and (args.dataset, args.device) == ("spgispeech", 0)


def test_failed_jobs_fail_the_submission(submit):
    done, calls = submit(MODELS="m", FAIL="test.clean")
    assert done.returncode == 1 and "1 of 8 jobs of m failed" in done.stderr
    assert "scored" in done.stdout  # of the sets that there are
    done, _ = submit(MODELS="m", ONLY_DATASETS="libri")
    assert done.returncode == 1 and "'libri' names none of the sets" in done.stderr
    done, _ = submit(NORMALIZER="/nowhere")
    assert done.returncode == 1 and "set NORMALIZER" in done.stderr
