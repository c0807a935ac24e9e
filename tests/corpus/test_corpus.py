# SPDX-License-Identifier: Apache-2.0
"""Which recordings a corpus has, where results go, and that no name leads elsewhere."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm import audio
from qwen3_asr_vllm.corpus.outputs import OutputFolder, OutputManifest, write_whole
from qwen3_asr_vllm.corpus.run import Summary, run
from qwen3_asr_vllm.corpus.sources import find_recordings, mirrored_name
from qwen3_asr_vllm.formats import FORMATS
from qwen3_asr_vllm.recordings import Loader, Recording, Result, fetch, load_recording
from qwen3_asr_vllm.transcript import Transcript

TRANSCRIPT = Transcript("Hello.", 1.0)


def names(sources):
    return [(r.source, r.name) for r in find_recordings(map(str, sources))]


def write_lines(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


# ---- sources ----


def test_folders_keep_their_structure(tmp_path):
    for name in ("b.MP3", "a.wav", "._a.wav", "notes.txt", "deep/er/c.webm"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = names([tmp_path])
    assert [name for _, name in found] == ["a", "b", "deep/er/c"]
    assert names([tmp_path / "**" / "*.w*"]) == [found[0], found[2]]
    assert names([tmp_path / "deep" / "er" / "c.webm"]) == [(found[2][0], "c")]


def test_empty_folders_and_globs_are_refused(tmp_path):
    for source in (tmp_path, tmp_path / "*.wav"):
        with pytest.raises(ValueError, match="no recordings found"):
            names([source])


def scan(*sources):
    """The names that are found, and what is reported as left out."""
    reports = []
    found = find_recordings(map(str, sources), report=reports.append)
    return [recording.name for recording in found], reports


def test_skipped_files_of_a_scan_are_named(tmp_path):
    for name in ("a.wav", "a.jpg", "b.JPG", "c.txt", "README", "._a.wav", ".DS_Store", "d.mts"):
        (tmp_path / name).touch()
    os.mkfifo(tmp_path / "pipe.wav")
    found, reports = scan(tmp_path)
    assert found == ["a", "d"]
    left_out = ".jpg (2), .txt (1), .wav that is not a file (1), hidden .wav (1), no suffix (1)"
    assert sorted(reports[0].partition("not audio: ")[2].split(", ")) == left_out.split(", ")
    assert reports[0].startswith(f"{tmp_path}: 6 files are not audio")
    found, reports = scan(tmp_path / "*")
    assert len(found) == 6 and reports == [
        f"{tmp_path}/*: {tmp_path}/pipe.wav is not a file (1 of these)"
    ]


def test_folders_of_a_glob_are_named(tmp_path):
    (tmp_path / "a.wav").touch()
    (tmp_path / "talks").mkdir()
    found, reports = scan(tmp_path / "*")
    assert found == ["a"]
    assert reports[0].endswith(
        f"1 folder not searched, such as {tmp_path}/talks; add /** to search them"
    )


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    real = os.scandir
    (tmp_path / "secret").mkdir()
    (tmp_path / "a.wav").touch()
    monkeypatch.setattr(os, "scandir", scandir)
    found, (reports,) = scan(tmp_path)
    assert found == ["a"] and "not searched" in reports and "secret" in reports


def test_linked_folders_are_searched_once(tmp_path):
    corpus, elsewhere = tmp_path / "corpus", tmp_path / "elsewhere"
    (corpus / "real").mkdir(parents=True)
    elsewhere.mkdir()
    for path in (corpus / "real/a.wav", elsewhere / "b.wav"):
        path.touch()
    (corpus / "an_alias").symlink_to(corpus / "real")
    (corpus / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(corpus)
    assert scan(corpus) == (["link/b", "real/a"], [])


@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "device"])
def test_a_manifest_names_files_only(tmp_path, kind):
    path = tmp_path / "x.wav"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    else:
        path.symlink_to("/dev/zero")
    manifest = write_lines(tmp_path / "m.txt", "x.wav")
    (recording,) = find_recordings([str(manifest)])
    assert "not a file" in recording.problem or "no file" in recording.problem
    with pytest.raises(FileNotFoundError, match="x.wav: a (folder|pipe)"):
        recording.load()


def test_urls_are_http_only():
    assert names(["https://h.test/a/My%20talk.mp3?x=1"]) == [
        ("https://h.test/a/My%20talk.mp3?x=1", "My talk")
    ]
    for url in ("file:///etc/passwd", "ftp://h.test/a.wav"):
        with pytest.raises(ValueError, match="use http, https, or a path"):
            names([url])
        with pytest.raises(ValueError, match="use http, https, or a path"):
            fetch(url)


MANIFESTS = {
    "nemo.jsonl": '{"audio_filepath": "x/a.wav", "text": "Hi", "duration": 3}\n\n'
    '{"audio_filepath": "x/b.wav"}\n',
    "metadata.jsonl": '{"file_name": "x/a.wav", "transcription": "Hi"}\n{"file_name": "x/b.wav"}\n',
    "metadata.csv": 'file_name,transcription\nx/a.wav,"Hi, you"\nx/b.wav,\n',
    "validated.tsv": "path\tsentence\nx/a.wav\tHi\nx/b.wav\t\n",
    "list.txt": "\ufeffx/a.wav\r\nx/b.wav\r\n",
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_names_recordings_beside_itself(tmp_path, name):
    (tmp_path / name).write_text(MANIFESTS[name], encoding="utf-8")
    expected = [(str(tmp_path / f"x/{n}.wav"), f"x/{n}") for n in "ab"]
    assert names([tmp_path / name]) == expected


def test_a_manifest_row_may_be_a_part(tmp_path):
    samples = np.linspace(-0.5, 0.5, 32_000, dtype=np.float32)
    soundfile.write(tmp_path / "long.wav", samples, 16_000, subtype="FLOAT")
    rows = [{"audio_filepath": "long.wav", "offset": o, "duration": 0.5} for o in (0, 1.25, 7)]
    path = write_lines(tmp_path / "parts.jsonl", *map(json.dumps, rows))
    first, second, beyond = find_recordings([str(path)])
    assert [r.name for r in (first, second)] == ["long_0.000", "long_1.250"]
    assert np.array_equal(first.load(), samples[:8000])
    assert np.array_equal(second.load(), samples[20_000:28_000])
    with pytest.raises(ValueError, match="lasts 2.0 s; there is none at .* 7 s"):
        beyond.load()


@pytest.fixture
def decoded(monkeypatch):
    """How often each file was decoded."""
    times = Counter()

    def load_audio(source, **options):
        times[source] += 1
        return real(source, **options)

    real = audio.load_audio
    monkeypatch.setattr(audio, "load_audio", load_audio)
    return times


def test_consecutive_parts_decode_their_recording_once(tmp_path, decoded):
    """Four recordings of 50 s, in a hundred parts each; eight threads load these in turn."""
    samples = np.linspace(-0.5, 0.5, 50 * 16_000, dtype=np.float32)
    paths = [str(tmp_path / f"{name}.wav") for name in "abcd"]
    for path in paths:
        soundfile.write(path, samples, 16_000, subtype="FLOAT")
    parts = [Recording(p, p, offset_s=0.5 * i, duration_s=0.5) for p in paths for i in range(100)]
    loader = Loader()
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(loader, parts))
    assert np.array_equal(np.concatenate(loaded), np.tile(samples, 4))
    assert decoded == dict.fromkeys(paths, 1)
    assert len(loader._wholes) == 2  # and the others are forgotten


def test_failed_decodes_are_retried_for_later_parts(tmp_path):
    path = tmp_path / "a.wav"
    load, part = Loader(), Recording(str(path), "a", duration_s=1.0)
    with pytest.raises(FileNotFoundError, match="a.wav"):
        load(part)
    soundfile.write(path, np.zeros(32_000), 16_000)
    assert load(part).shape == (16_000,)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio_filepath": "a.wav"}\n{"text": "Hi"}\n', ":2: names no audio"),
        ('{"audio_filepath": "a.wav"\n', ":1: not JSON"),
        ("5\n", ":1: names no audio"),
        ('{"audio_filepath": "a.wav", "offset": "soon"}\n', "offset is 'soon'"),
        ('{"audio_filepath": "file:///etc/passwd"}\n', "cannot open file URLs"),
    ],
)
def test_a_broken_manifest_names_its_line(tmp_path, content, message):
    (tmp_path / "m.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        names([tmp_path / "m.jsonl"])


def test_only_colliding_output_names_are_refused(tmp_path):
    same = find_recordings(["one/a.wav", "two/a.mp3"])
    verbose = find_recordings(["one/a.wav", "one/a.verbose.wav"])
    out = OutputFolder(tmp_path, {name: str for name in ("json", "verbose.json")})
    for recordings, name in (same, "a.json"), (verbose, "a.verbose.json"):
        with pytest.raises(ValueError, match=f"one/a.wav and .* would both be .*/{name}; trans"):
            out.check_apart(recordings)
    OutputFolder(tmp_path, {"json": str}).check_apart(verbose)
    manifest = OutputManifest(tmp_path / "out.jsonl")
    manifest.check_apart(same)
    with pytest.raises(ValueError, match="one/a.wav and one/a.wav would both be .* one line"):
        manifest.check_apart(find_recordings(["one/a.wav", "one/a.wav"]))


@pytest.mark.parametrize("duration", [-1, "00:03:20", None])
def test_unused_durations_are_not_read(tmp_path, duration):
    row = {"audio_filepath": "a.wav", "duration": duration}
    path = write_lines(tmp_path / "m.jsonl", json.dumps(row))
    (recording,) = find_recordings([str(path)])
    assert recording.row == row and not recording.is_part


@pytest.mark.parametrize(("name", "content"), [("m.jsonl", "\n"), ("m.csv", "path\n")])
def test_an_empty_manifest_is_refused(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{name}: no recordings found"):
        names([tmp_path / name])


class Files(http.server.BaseHTTPRequestHandler):
    """Has hello.flac, whole, and cut off in two ways."""

    def do_GET(self):
        content = self.server.content
        cut = {
            "/length.flac": {"Content-Length": str(2 * len(content))},
            "/chunk.flac": {"Transfer-Encoding": "chunked"},
        }
        if self.path.startswith("/to-file"):
            self.answer(302, b"", {"Location": "file:///etc/hostname"})
        elif self.path == "/hello.flac" or self.path in cut:
            size = b"%x\r\n" % (2 * len(content)) if self.path == "/chunk.flac" else b""
            self.answer(200, size + content, cut.get(self.path, {}))
        else:
            self.answer(404, b"", {})

    def answer(self, status, body, headers):
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def web(tmp_path):
    soundfile.write(tmp_path / "hello.flac", np.zeros(16_000), 16_000)
    server = http.server.HTTPServer(("127.0.0.1", 0), Files)
    server.content = (tmp_path / "hello.flac").read_bytes()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_bad_url_is_named(web):
    assert load_recording(f"{web}/hello.flac").shape == (16_000,)
    with pytest.raises(OSError, match="none.flac.*404"):
        load_recording(f"{web}/none.flac")
    with pytest.raises(OSError, match="to-file"):
        load_recording(f"{web}/to-file.wav")


@pytest.mark.parametrize("name", ["length.flac", "chunk.flac"])
def test_a_cut_off_download_is_an_error(web, name):
    with pytest.raises(OSError, match=name):
        load_recording(f"{web}/{name}")


# ---- outputs ----


@given(st.text(alphabet="./\\ab\0é ", max_size=20))
def test_a_mirrored_name_stays_below(tmp_path_factory, text):
    folder = tmp_path_factory.getbasetemp() / "out"
    path = (folder / f"{mirrored_name(text)}.txt").resolve()
    assert path.is_relative_to(folder.resolve()) and path != folder


def test_manifest_names_stay_in_the_output_folder(tmp_path):
    rows = ["../../escaped.wav", "/etc/absolute.wav", "x/../../../up.wav"]
    (tmp_path / "in").mkdir()
    path = write_lines(tmp_path / "in" / "m.txt", *rows)
    out = OutputFolder(tmp_path / "out", {"txt": FORMATS["txt"]})
    for recording in find_recordings([str(path)]):
        out.write(recording, TRANSCRIPT)
    written = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.txt"))
    assert written == ["in/m.txt", "out/escaped.txt", "out/etc/absolute.txt", "out/x/up.txt"]


def test_links_stay_in_the_output_folder(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "sub").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "out" / ".a.txt.part").symlink_to(tmp_path / "victim")
    out = OutputFolder(tmp_path / "out", {"txt": FORMATS["txt"]})
    with pytest.raises(ValueError, match="through a link"):
        out.write(Recording("b.wav", "sub/b"), TRANSCRIPT)
    out.write(Recording("a.wav", "a"), TRANSCRIPT)
    assert (tmp_path / "victim").read_text() == "precious"
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_whole(tmp_path / "a.txt", "Hello.\n")
    with pytest.raises(UnicodeEncodeError):
        write_whole(tmp_path / "a.txt", "half a character: \ud800")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "Hello.\n"
    (tmp_path / "b.txt").mkdir()
    with pytest.raises(OSError, match="b.txt"):
        write_whole(tmp_path / "b.txt", "Hello.\n")
    assert not list(tmp_path.glob(".*"))


def test_files_are_renamed_after_the_disk_sync(tmp_path, monkeypatch):
    path, on_disk = tmp_path / "a.txt", []

    def fsync(fd):
        real(fd)
        assert not path.exists()
        on_disk.append(Path(f"/proc/self/fd/{fd}").read_bytes())

    real = os.fsync
    monkeypatch.setattr(os, "fsync", fsync)
    write_whole(path, "Hello.\n")
    assert on_disk == [path.read_bytes()] == [b"Hello.\n"]


def test_files_written_by_several_runs_are_whole(tmp_path):
    path, texts = tmp_path / "a.txt", [letter * 100_000 for letter in "abcd"]
    write_whole(path, texts[0])
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(write_whole, path, text) for text in 10 * texts]
        while not all(run.done() for run in runs):
            assert path.read_text() in texts
        assert [run.result() for run in runs] == [None] * 40
    assert os.listdir(tmp_path) == ["a.txt"]


def test_done_means_all_formats_are_written(tmp_path):
    out = OutputFolder(tmp_path, {"txt": FORMATS["txt"], "srt": FORMATS["srt"]})
    recording = Recording("a.wav", "x/a")
    assert not out.is_done(recording)
    write_whole(tmp_path / "x/a.txt", "Hello.\n")
    assert not out.is_done(recording)
    out.write(recording, TRANSCRIPT)
    assert out.is_done(recording)
    assert {p.name for p in (tmp_path / "x").iterdir()} == {"a.txt", "a.srt"}


def test_manifest_lines_may_hold_other_separators(tmp_path):
    path, text = tmp_path / "a.jsonl", "a\u2028b\u2029c\x85d"
    row = json.dumps({"audio_filepath": "a.wav", "text": text}, ensure_ascii=False)
    path.write_text(f"{row}\r\n{row.replace('a.wav', 'b.wav')}", encoding="utf-8")
    assert [found.row["text"] for found in find_recordings([str(path)])] == [text, text]


def test_a_manifest_survives_a_torn_line(tmp_path):
    rows = [{"audio_filepath": f"{n}.wav", "text": n} for n in "abc"]
    recordings = [Recording(f"/data/{row['audio_filepath']}", row["text"], row) for row in rows]
    path = tmp_path / "out.jsonl"
    OutputManifest(path).write(recordings[2], TRANSCRIPT)
    with path.open("a") as file:
        file.write('{"audio_filepath": "a.w')  # killed while it wrote
    manifest = OutputManifest(path)
    assert [manifest.is_done(recording) for recording in recordings] == [False, False, True]
    for recording in recordings[:2]:
        manifest.write(recording, TRANSCRIPT)
    manifest.finish(recordings)
    written = [json.loads(line) for line in path.read_text().splitlines()]
    measured = {"duration": 1.0, "pred_text": "Hello.", "pred_lang": None}
    assert written == [r.row | measured | {"audio_source": r.source} for r in recordings]


@pytest.mark.parametrize("end", ["", "\n", '\n{"audio_filepath": "c'])
def test_a_last_line_without_newline_is_kept(tmp_path, end):
    rows = [{"audio_filepath": f"/{n}.wav", "pred_text": n} for n in "ab"]
    path = tmp_path / "out.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + end)
    manifest = OutputManifest(path)
    manifest.write(Recording("/c.wav", "c"), TRANSCRIPT)
    manifest.finish([])
    read = [json.loads(line)["pred_text"] for line in path.read_text().splitlines()]
    assert read == ["a", "b", "Hello."]


def test_a_linked_manifest_stays_a_link(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    (tmp_path / "real.jsonl").touch()
    manifest = OutputManifest(tmp_path / "link.jsonl")
    manifest.write(Recording("/c.wav", "c"), TRANSCRIPT)
    manifest.finish([])
    assert (tmp_path / "link.jsonl").is_symlink()
    assert "Hello." in (tmp_path / "real.jsonl").read_text()


class FakeModel:
    def transcribe(self, recordings, options, *, in_order, progress):
        for index, recording in enumerate(recordings):
            text = f"Hello in {options.language}."
            yield Result(index, recording, transcript=Transcript(text, 1.0))


def test_python_runs_a_corpus_like_the_command(tmp_path):
    for name in ("a.wav", "b/c.wav"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).touch()
    reports, out = [], tmp_path / "out"
    arguments = {"output_dir": out, "formats": ["txt"], "report": reports.append, "language": "en"}
    sources = [str(tmp_path / "in"), "gone.wav"]
    gone = ("gone.wav", "gone.wav: no such file, folder or manifest")
    assert run(sources, FakeModel(), **arguments) == Summary(2, 0, (gone,))
    assert (out / "b/c.txt").read_text() == "Hello in en.\n"
    (out / "a.txt").unlink()
    assert run(sources, FakeModel, **arguments) == Summary(1, 1, (gone,))
    assert run(sources[:1], None, **arguments) == Summary(0, 2, ())  # needs no model
    assert reports == [gone[1]] * 2


def test_run_rejects_unknown_options(tmp_path):
    with pytest.raises(TypeError, match="unknown option 'lang'; the options are language, "):
        run([str(tmp_path)], FakeModel(), lang="de")


def test_transcripts_without_outputs_come_in_order(tmp_path):
    (tmp_path / "a.wav").touch()
    read = []
    run([str(tmp_path)], FakeModel(), on_transcript=lambda *pair: read.append(pair), language="de")
    assert [(recording.name, transcript.text) for recording, transcript in read] == [
        ("a", "Hello in de.")
    ]


def test_other_files_are_not_overwritten(tmp_path):
    path = write_lines(tmp_path / "thesis.md", "# Chapter one")
    with pytest.raises(ValueError, match="thesis.md:1 is no line of an output manifest"):
        OutputManifest(path)
    assert path.read_text() == "# Chapter one\n"
