# SPDX-License-Identifier: Apache-2.0
"""The command line: quick help, exit codes, files written, and what reaches vLLM."""

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
import soundfile

from qwen3_asr_vllm.cli import arguments, models, vllm_serve
from qwen3_asr_vllm.cli import entry as cli
from qwen3_asr_vllm.cli.terminal import bar
from qwen3_asr_vllm.corpus import locks
from qwen3_asr_vllm.corpus import ray_data as cluster
from qwen3_asr_vllm.engine import SHARED_GPU_WORKER
from qwen3_asr_vllm.formats import FORMATS
from qwen3_asr_vllm.languages import LANGUAGES
from qwen3_asr_vllm.options import TranscribeOptions
from qwen3_asr_vllm.recordings import Progress, Result
from qwen3_asr_vllm.streaming import Update
from qwen3_asr_vllm.transcript import Segment, Transcript, Word


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )


class FakeModel:
    """Transcribes each recording as its length, and keeps its options."""

    def transcribe(self, recordings, options, *, in_order, progress):
        self.options, self.sources = options, []
        for index, recording in enumerate(recordings):
            self.sources.append(recording.source)
            try:
                seconds = len(recording.load()) / 16_000
            except (OSError, ValueError) as error:
                yield Result(index, recording, error=error)
            else:
                yield Result(index, recording, transcript=said(seconds))


def said(seconds):
    text = f"{seconds:g} seconds"
    segments = (Segment(0, seconds, text, "English"),)
    return Transcript(text, seconds, segments, ("loop",) if seconds > 1 else ())


@pytest.fixture
def model(monkeypatch):
    fake = FakeModel()
    monkeypatch.setattr(models, "load_model", lambda name, options: fake)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    return fake


@pytest.fixture
def files(tmp_path):
    """a.wav of 1 s, b.wav of 2 s, letter.wav that is none."""
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    soundfile.write(tmp_path / "b.wav", np.zeros(32_000), 16_000)
    (tmp_path / "letter.wav").write_text("Dear Sir or Madam")
    return [str(tmp_path / name) for name in ("a.wav", "letter.wav", "b.wav")]


def written(folder):
    """The files of an output folder, without its index."""
    return {path.name: path for path in folder.iterdir() if not path.name.startswith(".")}


# ---- help ----


def packages_imported(*arguments: str) -> set[str]:
    """By a run of Python: those that pip installs."""
    result = python("-X", "importtime", *arguments)
    assert result.returncode == 0, result.stderr
    names = (line.split("|")[-1].strip() for line in result.stderr.splitlines())
    return {name.partition(".")[0] for name in names} & packages_distributions().keys()


@pytest.mark.parametrize("command", [[], ["transcribe"], ["stream"], ["serve"], ["doctor"]])
def test_help_imports_no_other_package(command):
    of_the_machine = packages_imported("-c", "pass")
    line = ["-m", "qwen3_asr_vllm.cli", *command, "--help"]
    assert packages_imported(*line) - of_the_machine == {"qwen3_asr_vllm"}
    assert "usage: qwen3-asr" in python(*line).stdout


def test_version_is_the_package_version(capsys):
    from qwen3_asr_vllm import __version__

    with pytest.raises(SystemExit, match="0"):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"qwen3-asr {__version__}\n"


# ---- wrong command lines ----

WRONG = {
    "": "required: COMMAND",
    "sing": "invalid choice: 'sing'",
    "transcribe": "required: SOURCE",
    "transcribe a.wav -f srt,docx": "unknown format 'docx'; use txt, json, srt, vtt",
    "transcribe a.wav --max_line_width 1": "'1' is not a whole number from 2",
    "transcribe a.wav --max_line_count two": "'two' is not a whole number from 1",
    "transcribe a.wav -l Klingon": "declare Klingon with QWEN3_ASR_LANGUAGES=tlh=Klingon",
    "transcribe a.wav --extra-languages he:Hebrew": "the option has 'he:Hebrew'; give code=Name",
    "transcribe a.wav --max-clip-s 5000": "'5000' is not from 1 to 1200 seconds",
    "stream a.wav --step-s 0": "'0' is not from 0.1 to 60 seconds",
    "transcribe a.wav --max-clip-s long": "'long' is not from 1 to 1200 seconds",
    "transcribe a.wav --task translate": "invalid choice: 'translate'",
    "transcribe a.wav --language en --language de": "-l/--language is given twice",
    "transcribe a.wav -c Anna --initial_prompt Ben": "--prompt is given twice",
    "transcribe a.wav -f srt --output_format=srt": "--format is given twice",
    "transcribe a.wav -o a -o b": "-o/--output-dir is given twice",
    "align a.wav b.txt -m a -m b": "-m/--model/--aligner is given twice",
    "stream a.wav -r 16000 --rate 8000": "-r/--rate is given twice",
    "doctor --server a --server b": "--server is given twice",
    "align a.wav": "required: TEXT",
    "align a.wav a.txt -l Elbonian": "unsupported language 'Elbonian'",
    "doctor --gpu": "unrecognized arguments: --gpu",
}


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("--word_timestamps True --highlight_words False a.wav", ["--word-timestamps"]),
        ("a.wav --word-timestamps=True", ["--word-timestamps"]),
        ("a.wav --highlight_words --word_timestamps=False", ["--highlight-words"]),
        ("True a.wav", ["True"]),
    ],
)
def test_flags_accept_the_values_of_whisper(line, flags):
    given = arguments.without_booleans(map(arguments.with_hyphens, line.split()))
    assert sorted(given) == sorted([*flags, "a.wav"])


@pytest.mark.parametrize("line", WRONG)
def test_wrong_command_lines_exit_2(line, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(line.split())
    assert WRONG[line] in capsys.readouterr().err


def test_serve_without_a_model_is_refused(capsys):
    assert cli.main(["serve"]) == 2
    assert "serve needs a model, such as Qwen/Qwen3-ASR-1.7B" in capsys.readouterr().err


# ---- transcribe ----


def test_only_texts_go_to_stdout(model, files, capsys):
    assert cli.main(["transcribe", files[0], files[2]]) == 0
    out, err = capsys.readouterr()
    assert out == "1 seconds\n2 seconds\n"
    assert err == f"qwen3-asr: {files[2]}: loop\n"


@pytest.mark.parametrize(
    "line",
    [
        "-l zh-CN -c Anna --max-clip-s 30 --keywords Maier,Ulm --languages zh,yue --audio-track 2 "
        "--no-skip-special-tokens",
        "--language Chinese --initial_prompt Anna --chunk_size=30 --hotwords=Maier,\tUlm "
        "--languages=Chinese,Cantonese --audio-track=2 --no_skip_special_tokens",
    ],
)
def test_options_reach_the_model(model, files, line):
    cli.main(["transcribe", files[0], *line.split(" ")])
    assert model.options == TranscribeOptions(
        language="Chinese",
        languages=["Chinese", "Cantonese"],
        context="Anna",
        keywords=["Maier", "Ulm"],
        max_clip_s=30.0,
        confidences=False,
        skip_special_tokens=False,
        audio_track=2,
    )


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_shows_a_progress_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with bar(hidden=False) as show:
        show(Progress(2, 1, 20.0, 10.0, 4))
        time.sleep(0.2)
        show(Progress(4, 2, 40.0, 30.0, 4))
    shown = terminal.getvalue()
    assert re.search(r"75% \|.*\| 2/4 \d+\.\dx real time, \d\d:\d\d left", shown)
    with bar(hidden=True) as show:
        show(Progress(2, 1, 20.0, 10.0, 4))
    assert terminal.getvalue() == shown


@pytest.mark.parametrize("error", [ImportError("no vLLM"), OSError("the engine died")])
def test_fatal_errors_are_one_line(files, monkeypatch, capsys, error):
    def load(name, options):
        raise error

    monkeypatch.setattr(models, "load_model", load)
    assert cli.main(["transcribe", files[0]]) == 1
    assert capsys.readouterr().err == f"qwen3-asr: {error}\n"


def test_json_is_one_document(model, files, capsys):
    assert cli.main(["transcribe", files[0], "-f", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["text"], document["language"]) == ("1 seconds", "English")


def test_formats_are_written_side_by_side(model, files, tmp_path, capsys):
    line = ["transcribe", files[0], files[2], "-f", "srt,verbose_json,srt"]
    assert cli.main(line) == 2
    assert "several formats need -o DIR" in capsys.readouterr().err
    assert cli.main([*line, "-o", str(tmp_path / "out")]) == 0
    assert written(tmp_path / "out").keys() == {
        "a.srt",
        "a.verbose.json",
        "b.srt",
        "b.verbose.json",
    }
    assert (tmp_path / "out/a.srt").read_text().endswith("--> 00:00:01,000\n1 seconds\n")


def test_all_formats_are_written(model, files, tmp_path):
    assert cli.main(["transcribe", files[0], "-f", "all", "-o", str(tmp_path / "out")]) == 0
    assert len(written(tmp_path / "out")) == len(FORMATS)


def test_subtitles_have_the_requested_layout(model, files, capsys):
    layout = ["--max_line_width", "4", "--max_line_count", "3"]
    assert cli.main(["transcribe", files[0], "-f", "vtt", *layout]) == 0
    assert capsys.readouterr().out.endswith("\n1\nseco\nnds\n")


def test_a_failed_file_costs_no_other(model, files, tmp_path, capsys):
    folder = tmp_path / "new" / "folder"
    assert cli.main(["transcribe", *files, "-o", str(folder)]) == 1
    assert {name: path.read_text() for name, path in written(folder).items()} == {
        "a.txt": "1 seconds\n",
        "b.txt": "2 seconds\n",
    }
    out, err = capsys.readouterr()
    assert out == "" and "letter.wav: not audio" in err
    assert err.endswith(f"1 of 3 failed: {files[1]}\n")


def test_no_model_is_loaded_without_recordings(files, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("loaded"))
    assert cli.main(["transcribe", "gone.wav", "none.mp3"]) == 1
    assert "gone.wav: no such file" in (err := capsys.readouterr().err) and "none.mp3" in err


def test_finished_recordings_are_skipped(model, files, tmp_path, capsys):
    line = ["transcribe", *files, "-f", "txt,srt", "-o", str(tmp_path / "out")]
    line += ["--manifest_out", str(tmp_path / "out.jsonl")]
    assert cli.main(line) == 1 and len(model.sources) == 3
    first = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (tmp_path / "out" / "b.srt").unlink()
    assert cli.main(line) == 1 and model.sources == files[1:]
    assert "1 of 3 are finished; --overwrite transcribes them again" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == first
    assert cli.main([*line, "--overwrite"]) == 1 and len(model.sources) == 3
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == first


def test_ctrl_c_keeps_results_and_names_commands(model, files, tmp_path, capsys):
    def interrupted(recordings, *_, **__):
        yield Result(0, recordings[0], transcript=said(1))
        raise KeyboardInterrupt

    model.transcribe = interrupted
    assert cli.main(["transcribe", *files, "-o", str(tmp_path / "out")]) == 130
    assert list(written(tmp_path / "out")) == ["a.txt"]
    assert "the same command continues from here" in capsys.readouterr().err


class FakeStream:
    """Emits the number of samples, at the end."""

    def stream(self, samples, **options):
        num_samples = sum(map(len, samples))
        yield Update(f"{num_samples} samples", "")


class Microphone(io.BytesIO):
    """Emits text without end; Ctrl-C comes at the third piece."""

    num_read = 0

    def read1(self, size):
        self.num_read += 1
        if self.num_read == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return bytes(2_000)


def test_ctrl_c_ends_streams_with_their_text(monkeypatch, capsys):
    monkeypatch.setattr(models, "load_model", lambda *_: FakeStream())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Microphone()))
    before = signal.getsignal(signal.SIGINT)
    assert cli.main(["stream", "-"]) == 130
    assert capsys.readouterr() == ("4000 samples\n", "")  # with what was in the pipe
    assert signal.getsignal(signal.SIGINT) is before


def test_a_stream_takes_languages_and_a_track(tmp_path, monkeypatch, capsys):
    video = tmp_path / "video.mkv"
    tracks = "-f lavfi -i anullsrc=r=16000:d=2 -f lavfi -i aevalsrc=0.3*sin(2000*t):d=2"
    command = f"ffmpeg -v error {tracks} -map 0 -map 1 -c:a flac {video}"
    subprocess.run(command.split(), check=True)
    given = []

    class Stream(FakeStream):
        def stream(self, samples, **options):
            given.append(options)
            pieces = list(samples)
            yield Update(f"{max(map(np.max, pieces)):.1f}", "")

    monkeypatch.setattr(models, "load_model", lambda *_: Stream())
    assert cli.main(["stream", str(video), "--languages", "de,en"]) == 0
    assert cli.main(["stream", str(video), "--audio-track", "1", "--no-skip-special-tokens"]) == 0
    out, err = capsys.readouterr()
    assert out == "0.3\n0.0\n"
    assert err.count("audio track 1 of 2 is silent, so track 2 was read") == 1
    assert [options["languages"] for options in given] == [["German", "English"], []]
    assert [options["skip_special_tokens"] for options in given] == [True, False]


def test_a_pipe_has_no_tracks(capsys):
    assert cli.main(["stream", "-", "--audio-track", "2"]) == 2
    assert "a pipe has one track" in capsys.readouterr().err


SPAWN = """
import multiprocessing, signal
from qwen3_asr_vllm.cli.stream import _hidden_from_children
with _hidden_from_children():
    pool = multiprocessing.get_context("spawn").Pool(1)
print(signal.SIGINT in pool.apply(signal.pthread_sigmask, (signal.SIG_BLOCK, ())))
print(signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_ctrl_c_of_streams_spares_the_engine():
    assert python("-c", SPAWN).stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    "line", ["eval {m}", "align {a} {m}", "stream {a}", "transcribe {m} --ray 1 -o o"]
)
def test_ctrl_c_is_no_traceback(files, tmp_path, monkeypatch, capsys, line):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    for name in ("load_model", "load_aligner"):
        monkeypatch.setattr(models, name, interrupted)
    monkeypatch.setattr(cluster, "_batches_done", interrupted)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": "a.wav", "text": "Hi."}))
    assert cli.main(line.format(a=files[0], m=tmp_path / "m.jsonl").split()) == 130
    assert capsys.readouterr().err == "qwen3-asr: stopped\n"


def test_ray_workers_get_absolute_paths(files, tmp_path, monkeypatch):
    given = {}
    monkeypatch.setattr(
        cluster, "_batches_done", lambda todo, **o: given.update(o, todo=todo) or ()
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    line = ["transcribe", "a.wav", "https://h.test/b.wav", "--ray", "1", "-o", "out", "-m", "tiny"]
    assert cli.main(line) == 0
    assert [r.source for r in given["todo"]] == [files[0], "https://h.test/b.wav"]
    assert given["worker"]["model"] == str(tmp_path / "tiny")
    assert given["worker"]["folder"] == str(tmp_path / "out")
    assert cli.main(["transcribe", "-", "--ray", "1", "-o", "out"]) == 2


@pytest.mark.parametrize(
    ("gpus", "engine"),
    [
        ("1", {}),
        ("0", {}),
        ("0.5", {"gpu_memory_utilization": 0.45, "worker_cls": SHARED_GPU_WORKER}),
        (
            "0.25 --gpu-memory-utilization 0.8",
            {"gpu_memory_utilization": 0.2, "worker_cls": SHARED_GPU_WORKER},
        ),
    ],
)
def test_workers_on_ray_may_share_a_gpu(files, tmp_path, monkeypatch, gpus, engine):
    given = {}
    monkeypatch.setattr(cluster, "_batches_done", lambda todo, **o: given.update(o) or ())
    monkeypatch.setattr(
        models, "engine_options", lambda _, rest: {"gpu_memory_utilization": 0.8} if rest else {}
    )
    line = f"transcribe {files[0]} --ray 2 -o {tmp_path / 'out'} --gpus-per-worker {gpus}"
    assert cli.main(line.split()) == 0
    assert given["worker"]["engine_options"] == engine
    assert given["num_gpus"] == float(gpus.split()[0])


def test_ray_shows_a_progress_bar(files, tmp_path, monkeypatch):
    batches = [[{"source": file, "seconds": 60.0, "error": None}] for file in files[:2]]

    def batches_done(todo, **_):
        for batch in batches:
            time.sleep(0.2)
            yield batch

    monkeypatch.setattr(cluster, "_batches_done", batches_done)
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    assert cli.main(["transcribe", *files[:2], "--ray", "1", "-o", str(tmp_path)]) == 0
    assert re.search(r"50% \|.*\| 1/2 \d+\.\dx real time", terminal.getvalue())
    assert "2 transcribed, 0 skipped, 0 failed" in terminal.getvalue()


def test_standard_input_is_a_recording(model, files, monkeypatch, capsys):
    with open(files[2]) as file:
        monkeypatch.setattr(sys, "stdin", file)
        assert cli.main(["transcribe", "-"]) == 0
    assert capsys.readouterr().out == "2 seconds\n"


@pytest.fixture
def hebrew(tmp_path):
    """A checkpoint whose config declares Hebrew."""
    folder = tmp_path / "hebrew"
    folder.mkdir()
    (folder / "config.json").write_text('{"support_languages": ["English", "Hebrew"]}')
    return str(folder)


def test_languages_of_a_checkpoint_are_listed(hebrew, monkeypatch, capsys):
    monkeypatch.setenv("QWEN3_ASR_LANGUAGES", "ckb=Sorani")
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--list-languages", hebrew])
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {code: name for code, name in rows} == {**LANGUAGES, "he": "Hebrew", "ckb": "Sorani"}


def test_languages_of_no_checkpoint_are_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["--list-languages", str(tmp_path)])
    assert "has no config.json" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["he", "Hebrew", "he-IL"])
def test_languages_of_the_checkpoint_resolve(model, files, hebrew, given):
    assert cli.main(["transcribe", files[0], "-m", hebrew, "-l", given]) == 0
    assert model.options.language == "Hebrew"


def test_declared_languages_reach_the_model(model, files, monkeypatch):
    loaded = []
    monkeypatch.setattr(models, "load_model", lambda *given: loaded.append(given) or model)
    line = [
        "transcribe",
        files[0],
        "--extra_languages",
        "he=Hebrew,ur=Urdu",
        "--languages",
        "he,ur",
    ]
    assert cli.main(line) == 0
    assert loaded[0][1] == {"languages": {"he": "Hebrew", "ur": "Urdu"}}
    assert model.options.languages == ("Hebrew", "Urdu")


def test_declared_languages_reach_the_server(monkeypatch):
    from qwen3_asr_vllm.server import supervisor

    monkeypatch.setenv("QWEN3_ASR_LANGUAGES", "ur=Urdu")
    monkeypatch.setattr(supervisor, "serve", lambda argv: 0 if argv == ["x", "--port", "1"] else 1)
    assert cli.main(["serve", "x", "--extra-languages", "he=Hebrew", "--port", "1"]) == 0
    assert os.environ["QWEN3_ASR_LANGUAGES"] == "ur=Urdu,he=Hebrew"
    assert cli.main(["serve", "x", "--extra-languages", "he:Hebrew"]) == 2


def test_a_server_resolves_its_own_languages(model, files, monkeypatch):
    monkeypatch.setattr(models, "connect", lambda args: model)
    assert cli.main(["transcribe", files[0], "--server", "http://x", "-l", "he-IL"]) == 0
    assert model.options.language == "he-IL"


def test_languages_are_listed(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["--list_languages"])
    assert capsys.readouterr().out.split() == [w for pair in LANGUAGES.items() for w in pair]


@pytest.mark.parametrize("line", ["", "-o out -f srt", "-o out --overwrite"])
def test_ray_writes_only_shards(files, line, capsys):
    assert cli.main(["transcribe", files[0], "--ray", "2", *line.split()]) == 2
    assert "--ray writes JSONL shards" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--word_timestamps", "--aligner=x", "--align_model=x"])
def test_ray_times_no_words(files, option, capsys):
    assert cli.main(["transcribe", files[0], "--ray", "2", "-o", "out", option]) == 2
    assert capsys.readouterr().err.startswith("qwen3-asr: --ray has no word times;")


@pytest.mark.parametrize("option", ["--max-clip-s=30", "--gpu-memory-utilization=0.5"])
def test_a_server_gets_no_engine_options(files, option, capsys):
    assert cli.main(["transcribe", files[0], "--server", "localhost:1", option]) == 2
    assert "set" in capsys.readouterr().err


def test_an_unreachable_server_is_named(files, capsys):
    assert cli.main(["transcribe", files[0], "--server", "localhost:1"]) == 1
    assert "the server at http://localhost:1 is unreachable" in capsys.readouterr().err


def test_two_files_are_never_written_to_one(model, files, tmp_path, capsys):
    soundfile.write(tmp_path / "a.flac", np.zeros(160), 16_000)
    line = ["transcribe", files[0], str(tmp_path / "a.flac")]
    assert cli.main([*line, "-o", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert f"a.wav and {tmp_path}/a.flac would both be written to {tmp_path}/a.txt" in err
    assert not (tmp_path / "a.txt").exists()
    assert cli.main([*line, "--manifest-out", str(tmp_path / "out.jsonl")]) == 0
    assert cli.main(line) == 0


def test_another_folder_s_recording_is_not_finished(model, files, tmp_path, capsys):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        os.link(files[0], tmp_path / folder / "x.wav")
    one, two = (str(tmp_path / folder / "x.wav") for folder in ("one", "two"))
    line = ["-o", str(tmp_path / "out")]
    assert cli.main(["transcribe", one, *line]) == 0
    assert cli.main(["transcribe", two, *line]) == 2
    err = capsys.readouterr().err
    assert f"out/x.txt is the transcript of {one}, not of {two}; write to another folder" in err
    assert cli.main(["transcribe", one, *line]) == 0
    assert "1 of 1 are finished" in capsys.readouterr().err
    assert cli.main(["transcribe", two, *line, "--overwrite"]) == 0
    assert cli.main(["transcribe", two, *line]) == 0
    assert cli.main(["transcribe", one, *line]) == 2


def test_relative_rows_belong_to_their_own_manifest(model, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, file in ("one", files[0]), ("two", files[2]):
        (tmp_path / folder).mkdir()
        os.link(file, tmp_path / folder / "x.wav")
        (tmp_path / folder / "m.jsonl").write_text('{"audio_filepath": "x.wav"}\n')
    for _ in range(2):
        for folder in ("one", "two"):
            line = ["transcribe", f"{folder}/m.jsonl", "--manifest-out", "out.jsonl"]
            assert cli.main(line) == 0
    rows = list(map(json.loads, open("out.jsonl")))
    assert [row["pred_text"] for row in rows] == ["1 seconds", "2 seconds"]
    assert [row["audio_filepath"] for row in rows] == ["x.wav", "x.wav"]
    assert [row["audio_source"] for row in rows] == [
        str(tmp_path / folder / "x.wav") for folder in ("one", "two")
    ]


@pytest.mark.parametrize("output", ["-o out", "--manifest-out out.jsonl"])
def test_two_runs_into_one_output_are_refused(model, files, tmp_path, monkeypatch, capsys, output):
    """The second one begins in the middle of the first."""
    codes = []

    def transcribe(recordings, options, **run):
        if not codes:
            codes.append(None)
            codes[0] = cli.main(line)
        yield from FakeModel().transcribe(recordings, options, **run)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locks, "PATIENCE_S", 0.1)
    model.transcribe = transcribe
    line = ["transcribe", *files[::2], *output.split()]
    assert cli.main(line) == 0 and codes == [1]
    err = capsys.readouterr().err
    assert f"another run writes to {output.split()[1]}; wait for it to end" in err
    assert "failed" not in err
    assert cli.main(line) == 0  # the lock is gone
    assert "2 of 2 are finished" in capsys.readouterr().err


KILLED = """
import os, signal, sys
from qwen3_asr_vllm.cli import main, models
class Model:
    def transcribe(self, recordings, *_, **__):
        open(os.path.join(sys.argv[1], "." + 32 * "0" + ".part"), "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
models.load_model = lambda *_: Model()
main(["transcribe", sys.argv[2], "-o", sys.argv[1], "--manifest-out", sys.argv[1] + "/m.jsonl"])
"""


def test_a_killed_run_leaves_no_lock(model, files, tmp_path):
    out = str(tmp_path / "out")
    assert python("-c", KILLED, out, files[0]).returncode == -signal.SIGKILL
    assert cli.main(["transcribe", files[0], "-o", out, "--manifest-out", f"{out}/m.jsonl"]) == 0
    assert not list((tmp_path / "out").glob("*.part"))


def test_output_folders_must_not_be_files(model, files, tmp_path, capsys):
    for option in ("-o", files[2]), ("--manifest-out", str(tmp_path)):
        assert cli.main(["transcribe", files[0], *option]) == 2
    assert not hasattr(model, "sources")
    err = capsys.readouterr().err
    assert f"{files[2]} is a file" in err and f"{tmp_path} is a folder, not a file" in err


def test_a_manifest_never_overwrites_its_source(model, files, tmp_path, capsys):
    path = tmp_path / "m.jsonl"
    path.write_text(row := json.dumps({"audio_filepath": files[0]}) + "\n")
    for overwrite in [], ["--overwrite"]:
        assert cli.main(["transcribe", str(path), "--manifest-out", str(path), *overwrite]) == 2
    assert path.read_text() == row
    assert "m.jsonl is a source of this run" in capsys.readouterr().err


def test_manifest_lines_go_into_a_pipe(model, files, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        lines = pool.submit((tmp_path / "pipe").read_text)
        assert cli.main(["transcribe", files[0], "--manifest-out", str(tmp_path / "pipe")]) == 0
    assert json.loads(lines.result())["pred_text"] == "1 seconds"


def test_a_full_device_is_one_line(model, files, capsys):
    assert cli.main(["transcribe", files[0], "--manifest-out", "/dev/full"]) == 1
    assert "No space left on device: '/dev/full'" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["\x1bcgone.wav", "a\x85b.wav", "a\u2028b.wav", "a\u202eb.wav"])
def test_no_name_reaches_a_terminal_raw(files, name, tmp_path, capsys):
    (tmp_path / "m.jsonl").write_text(json.dumps({"audio_filepath": name}))
    assert cli.main(["transcribe", name, str(tmp_path / "m.jsonl")]) == 1
    with pytest.raises(SystemExit):
        cli.main(["doctor", name])
    control = set(name) - set("cgone.wavb")
    assert len(control) == 1 and control.isdisjoint(capsys.readouterr().err)


LONG = 300 * "x" + ".wav"


def test_a_name_too_long_fails_one_file(model, files, tmp_path, capsys):
    (tmp_path / "list.txt").write_text(f"a.wav\n{LONG}\n")
    for source in (str(tmp_path / LONG), str(tmp_path / "list.txt")):
        out = tmp_path / f"out-{len(source)}"
        assert cli.main(["transcribe", source, files[2], "-o", str(out)]) == 1
        assert (out / "b.txt").exists()
        err = capsys.readouterr().err
        assert "too long" in err and re.search(r"1 of \d failed", err)


def test_too_long_result_names_fail_one_file(model, files, tmp_path, capsys):
    name = 249 * "y"  # with .txt it fits, with .verbose.json it does not
    os.link(files[0], long := tmp_path / f"{name}.wav")
    line = ["transcribe", str(long), files[2], "-o", str(tmp_path / "out")]
    assert cli.main([*line, "-f", "verbose_json"]) == 1
    assert model.sources == [files[2]] and list(written(tmp_path / "out")) == ["b.verbose.json"]
    err = capsys.readouterr().err
    assert "too long for the name of a file: 262 bytes of at most 255" in err
    assert "1 of 2 failed" in err
    assert cli.main(line) == 0
    assert (tmp_path / "out" / f"{name}.txt").read_text() == "1 seconds\n"


def test_a_name_outside_utf8_fails_one_row(model, files, tmp_path, capfd):
    name = os.fsdecode(bytes(tmp_path / "caf") + b"\xe9.wav")
    os.link(files[0], name)
    out = tmp_path / "out.jsonl"
    assert cli.main(["transcribe", name, files[2], "--manifest-out", str(out)]) == 1
    assert [json.loads(row)["audio_filepath"] for row in out.open()] == [files[2]]
    err = capfd.readouterr().err
    assert "not UTF-8, as a manifest must be; rename it" in err and "1 of 2 failed" in err
    assert cli.main(["transcribe", name, "-o", str(tmp_path)]) == 0


def test_late_full_disks_are_one_line(model, files, tmp_path, monkeypatch, capsys):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    out = str(tmp_path / "out.jsonl")
    assert cli.main(["transcribe", files[0], "--manifest-out", out]) == 1
    assert capsys.readouterr().err == f"qwen3-asr: [Errno 28] No space left on device: '{out}'\n"
    assert cli.main(["transcribe", *files, "-o", str(tmp_path / "out")]) == 1
    assert "Errno 28" in (err := capsys.readouterr().err) and len(err.splitlines()) == 1


def test_overwrite_keeps_the_manifest_until_its_replacement(files, tmp_path, monkeypatch):
    out = tmp_path / "out.jsonl"
    out.write_text(row := json.dumps({"audio_filepath": "x.wav", "pred_text": "Hi."}) + "\n")
    line = ["transcribe", files[0], "--manifest-out", str(out), "--overwrite"]
    assert cli.main([*line, "--server", "localhost:1"]) == 1
    assert out.read_text() == row
    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(models, "load_model", lambda *_: FakeModel())
    assert cli.main(line) == 0
    assert [json.loads(row)["audio_filepath"] for row in out.open()] == [files[0]]


@pytest.mark.vllm
def test_other_options_are_the_engine_s(capsys):
    options = models.engine_options("align", ["--gpu-memory-utilization", "0.5", "--enforce_eager"])
    assert options == {"gpu_memory_utilization": 0.5, "enforce_eager": True}
    with pytest.raises(SystemExit, match="2"):
        models.engine_options("align", ["--no-such-option", "1"])
    assert "qwen3-asr align" in capsys.readouterr().err


# ---- serve ----

SERVE = """
import json, os, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
from qwen3_asr_vllm.cli import vllm_serve

def cmd(args):
    print(json.dumps([args.model_tag, args.port, args.max_model_len, args.mm_processor_cache_gb, {
        name: os.environ[name] for name in vllm_serve.SERVE_ENVIRONMENT}]))

ServeSubcommand.cmd = staticmethod(cmd)
sys.exit(vllm_serve.main(["--port", "8123", "some/model", "--max_model_len=4k"]))
"""


@pytest.mark.vllm
def test_serve_adds_routes_and_limits_to_vllm():
    result = python("-c", SERVE, VLLM_MAX_AUDIO_CLIP_FILESIZE_MB="7")
    assert result.returncode == 0, result.stderr
    model, port, max_model_len, cache_gb, environment = json.loads(result.stdout.splitlines()[-1])
    assert (model, port, max_model_len) == ("some/model", 8123, 4000)
    assert cache_gb == vllm_serve.SENT_AUDIO_GB
    assert environment == {**vllm_serve.SERVE_ENVIRONMENT, "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "7"}
    assert environment["VLLM_PLUGINS"] == "qwen3_asr"


# ---- doctor ----


def test_doctor_checks_everything_and_exits_1(monkeypatch, capsys):
    def broken():
        raise RuntimeError("gone. Do: pip install it")

    monkeypatch.setattr(cli, "DECODERS", {"first": broken, "second": lambda: "1.0"})
    assert cli.main(["doctor", "--decoders"]) == 1
    assert capsys.readouterr().out == (
        "PROBLEM  first: gone. Do: pip install it\nok       second: 1.0\n"
    )


def test_doctor_decodes_every_format(capsys):
    assert cli.main(["doctor", "--decoders"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(cli.DECODERS)
    assert all(line.startswith("ok") for line in lines)


@pytest.mark.vllm
def test_doctor_finds_our_model_without_a_checkpoint():
    result = python("-m", "qwen3_asr_vllm.cli", "doctor", VLLM_PLUGINS="qwen3_asr")
    lines = result.stdout.splitlines()
    assert all(line.startswith(("ok  ", "PROBLEM  ")) for line in lines)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(lines) == len(cli.INSTALLATION | cli.DECODERS)
    assert any(
        "qwen3_asr_vllm.model.transcriber.Qwen3ASRForConditionalGeneration" in line
        for line in lines
    )


# ---- words ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("transcribe a.wav --aligner x", "--aligner needs --word-timestamps"),
        ("transcribe a.wav --highlight_words", "add --word-timestamps"),
        (
            "transcribe a.wav --highlight_words --word_timestamps -f json",
            "json does not highlight words",
        ),
        ("transcribe a.wav --max_line_width 20", "--max-line-width: txt has no subtitle lines"),
        ("transcribe a.wav -o out -f txt,lrc --max_line_count 1", "--max-line-count: txt, lrc"),
        ("transcribe a.wav -o out --ray 1 --max_line_count 1", "--max-line-count: txt"),
        ("transcribe a.wav --server u --word-timestamps --aligner x", "QWEN3_ASR_ALIGNER_URL"),
        ("transcribe a.wav --diarizer x -f srt", "--diarizer needs --diarize"),
        ("transcribe a.wav --diarize", "--diarize: txt has no speakers; add -f json, srt or vtt"),
        ("transcribe a.wav -f srt --max_speakers 2", "max_speakers is given; set diarize=True"),
        (
            "transcribe a.wav -f srt --diarize --min_speakers 3 --max-speakers=2",
            "min_speakers is 3, max_speakers is 2: no number",
        ),
        ("transcribe a.wav --server u --diarize -f srt --diarizer x", "QWEN3_ASR_DIARIZER_URL"),
        ("transcribe a.wav -o out --ray 1 --diarize", "--ray finds no speakers"),
        ("align a.wav missing.txt", "missing.txt"),
        ("align a.wav a.txt -f srt,vtt", "one format"),
        ("align a.wav a.txt --highlight_words", "json does not highlight words"),
        ("align a.wav a.txt -f lrc --max_line_width 20", "lrc has no subtitle lines"),
        ("align a.wav a.txt -l Polish", "does not know Polish"),
        ("align a.wav a.txt -f srt --keep-lines --max_line_width 20", "lines of the text are kept"),
        ("align a.wav a.txt -o .", ". is a folder"),
        ("align a.wav a.txt -o a.txt/b.json", "a.txt is not a folder"),
    ],
)
def test_contradictory_word_options_exit_2(line, message, files, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("one second")
    assert cli.main(line.split()) == 2
    assert message in capsys.readouterr().err


def test_word_timestamps_load_an_aligner(model, files, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(models, "load_model", lambda name, options: given.update(options) or model)
    assert cli.main(["transcribe", files[0], "--word_timestamps", "-f", "vtt"]) == 0
    assert model.options.word_timestamps is True
    assert given == {"aligner": "Qwen/Qwen3-ForcedAligner-0.6B"}
    assert cli.main(["transcribe", files[0], "--word_timestamps", "--align_model", "mine"]) == 0
    assert given == {"aligner": "mine"}


def test_diarize_loads_a_diarizer(model, files, monkeypatch, capsys):
    given = {}
    monkeypatch.setattr(models, "load_model", lambda name, options: given.update(options) or model)
    line = ["transcribe", files[0], "-f", "srt", "--diarize"]
    assert cli.main([*line, "--min_speakers", "2", "--max_speakers", "3"]) == 0
    assert (model.options.diarize, model.options.num_speakers) == (True, None)
    assert (model.options.min_speakers, model.options.max_speakers) == (2, 3)
    assert given == {"diarizer": "pyannote/speaker-diarization-community-1"}
    assert cli.main([*line, "--diarize_model", "mine:function", "--num_speakers", "2"]) == 0
    assert given == {"diarizer": "mine:function"} and model.options.num_speakers == 2


def test_align_writes_the_times_of_the_aligner(files, tmp_path, capsys, monkeypatch):
    class FakeAligner:
        def align(self, audio, text, *, language, keep_lines):
            words = (Word("one", 0.1, 0.4), Word(" second", 0.5, 0.9))
            segments = (Segment(0.1, 0.9, text.strip(), language, words=words),)
            return Transcript(text.strip(), len(audio) / 16_000, segments)

    monkeypatch.setattr(models, "load_aligner", lambda name, options: FakeAligner())
    monkeypatch.setattr(os, "environ", dict(os.environ))
    path = tmp_path / "a.txt"
    path.write_text("one second\n")
    assert cli.main(["align", files[0], str(path), "-f", "lrc", "--highlight-words"]) == 0
    assert capsys.readouterr().out == "[00:00.10] <00:00.10> one <00:00.50> second <00:00.90>\n"
    assert cli.main(["align", files[0], str(path), "-o", str(tmp_path / "a.json")]) == 0
    (segment,) = json.loads((tmp_path / "a.json").read_text())["segments"]
    assert segment["words"][1] == {"word": " second", "start": 0.5, "end": 0.9}
    damaged = str(Path(__file__).parents[1] / "data" / "field" / "garbage_in_the_middle.mp3")
    assert cli.main(["align", damaged, str(path)]) == 0
    assert "middle.mp3: 2 damaged packets at 0:01" in capsys.readouterr().err


INTERRUPTED_IMPORT = """
import os, signal, sys
sys.path.insert(0, sys.argv.pop(1))  # whose modules press Ctrl-C as they are imported
from qwen3_asr_vllm.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("module", ["vllm", "argparse"])
def test_ctrl_c_during_imports_is_one_line(files, tmp_path, module):
    (tmp_path / f"{module}.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)\n"
    )
    result = python("-c", INTERRUPTED_IMPORT, str(tmp_path), "transcribe", files[0])
    assert (result.returncode, result.stdout) == (130, "")
    assert result.stderr == "qwen3-asr: stopped\n"


# ---- stdout ----


def shell(line, *arguments):
    """The stderr of a command line in a shell, and its exit code."""
    command = ["bash", "-c", line, "bash", sys.executable, "-c", FAKE, *arguments]
    result = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60)
    return result.returncode, result.stderr


FAKE = """
import sys
from qwen3_asr_vllm.cli import main, models
from qwen3_asr_vllm.recordings import Result
from qwen3_asr_vllm.transcript import Transcript
class Model:
    def transcribe(self, recordings, *_, **__):
        for index, recording in enumerate(recordings):
            yield Result(index, recording, transcript=Transcript("Hello.", 1.0))
models.load_model = lambda *_: Model()
sys.exit(main(sys.argv[1:]))
"""
STDOUT = {
    '"$@" >&-': "qwen3-asr: stdout is closed, and results go there; write them to a file with -o\n",
    '"$@" > /dev/full': "qwen3-asr: stdout: No space left on device\n",
    '"$@" | true; exit ${PIPESTATUS[0]}': "qwen3-asr: stdout: Broken pipe\n",
    '"$@" >&- 2>&- <&-': "",
}


@pytest.mark.parametrize("line", STDOUT)
def test_texts_lost_by_stdout_are_errors(files, line):
    assert shell(line, "transcribe", files[0]) == (1, STDOUT[line])


def test_a_closed_stdout_gets_no_output_file(files, tmp_path):
    out = tmp_path / "out"
    assert shell('"$@" >&-', "transcribe", files[0], "-o", str(out)) == (0, "")
    assert (out / "a.txt").read_text() == "Hello.\n"
