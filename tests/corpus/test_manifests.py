# SPDX-License-Identifier: Apache-2.0
"""Manifests as the field writes them: every row is read, or is an error with its line."""

from __future__ import annotations

import json
import unicodedata

import pytest

from qwen3_asr_vllm.corpus.sources import find_recordings

ROWS = [{"path": f"{n}.wav", "text": f"{n} é"} for n in "ab"]


def rows_of(path, content, encoding="utf-8"):
    path.write_bytes(content.encode(encoding))
    return [dict(recording.row) for recording in find_recordings([str(path)])]


QUOTES = (  # Common Voice: sentences with quotes
    "client_id\tpath\tsentence\tlocale\n"
    '1\ta.wav\t"Hello there he said\ten\n'
    "2\tb.wav\tThe second\ten\n"
    '3\tc.wav\t"Das dritte\tde\n'
    '4\td.wav\tthe ""fourth" and\ten\n'
)


def test_quotes_in_tsv_swallow_no_row(tmp_path):
    rows = rows_of(tmp_path / "validated.tsv", QUOTES)
    assert [row["path"] for row in rows] == ["a.wav", "b.wav", "c.wav", "d.wav"]
    assert rows[0]["sentence"] == '"Hello there he said'
    assert rows[3]["sentence"] == 'the ""fourth" and'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('path,text\na.wav,"open\nb.wav,second\n', 2),  # never closes
        ('path,text\na.wav,one\nb.wav,"two\nc.wav,"three\n', 3),  # closes inside of a field
        ('path,text\na.wav,"one\nb.wav,two"\nc.wav,three\n', 2),  # closes at the end of one
        ('text,path\n"one,a.wav\ntwo",b.wav\n', 2),
    ],
)
def test_an_unbalanced_quote_in_csv_is_refused(tmp_path, content, line):
    with pytest.raises(ValueError, match=f"m.csv:{line}: .*(not CSV|over whole rows)"):
        rows_of(tmp_path / "m.csv", content)


def test_quoted_csv_fields_may_span_lines(tmp_path):
    rows = rows_of(tmp_path / "m.csv", 'path,text\r\na.wav,"one, ""two""\r\nthree"\r\nb.wav,\r\n')
    assert rows == [
        {"path": "a.wav", "text": 'one, "two"\nthree'},
        {"path": "b.wav", "text": ""},
    ]


@pytest.mark.parametrize(
    ("name", "content", "lines"),
    [
        ("m.tsv", "path\ttext\na.wav\nb.wav\tB\nc.wav\tC\tc\n\tD\n", (2, 4, 5)),
        ("m.csv", f"path,text\na.wav\nb.wav,{'x' * 200_000}\nc.wav,C\nd\0.wav,D\n", (2, 3, 5)),
        ("m.jsonl", '{"path": "a.wav"}\n{"path": "b.wa\n5\n{"path": "c.wav"}\n{}\n', (2, 3, 5)),
        ("m.txt", "a.wav\nb\0.wav\n", (2,)),
    ],
)
def test_every_unreadable_row_is_named(tmp_path, name, content, lines):
    with pytest.raises(ValueError) as error:
        rows_of(tmp_path / name, content)
    messages = str(error.value).splitlines()
    assert [line.split(": ")[0] for line in messages] == [f"{tmp_path}/{name}:{n}" for n in lines]


def test_many_wrong_rows_make_a_short_message(tmp_path):
    with pytest.raises(ValueError, match=r"m.jsonl: 980 more rows like these$"):
        rows_of(tmp_path / "m.jsonl", "{}\n" * 1000)


def test_two_broken_manifests_are_both_named(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("nothing\n1\n")
    with pytest.raises(ValueError, match=r"a.csv: (.|\n)*b.csv: the first line names no column"):
        find_recordings([str(tmp_path / "a.csv"), str(tmp_path / "b.csv")])


TABLE = "path{0}text\na.wav{0}a é\nb.wav{0}b é\n"
JSON = {
    "array": json.dumps(ROWS),
    "pretty array": json.dumps(ROWS, indent=2),
    "pretty objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "object with a list": json.dumps({"version": 1, "data": ROWS}, indent=1),
    "JSONL": "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom", "utf-32"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        *[("m.csv", TABLE.format(delimiter)) for delimiter in ",;\t|"],
        *[("m.tsv", TABLE.format(delimiter)) for delimiter in "\t;"],
        *[(f"m.{suffix}", content) for suffix in ("json", "jsonl") for content in JSON.values()],
    ],
)
def test_shapes_and_encodings_are_read_alike(tmp_path, name, content, encoding):
    if encoding == "utf-16-be-bom":
        content, encoding = f"\ufeff{content}", "utf-16-be"
    assert rows_of(tmp_path / name, content, encoding) == ROWS


@pytest.mark.parametrize("content", ['["a.wav", "b.wav"]', '{"files": ["a.wav", "b.wav"]}'])
def test_a_json_list_of_paths_is_read(tmp_path, content):
    rows = rows_of(tmp_path / "m.json", content)
    assert [row["audio_filepath"] for row in rows] == ["a.wav", "b.wav"]


def test_marks_inside_joined_files_are_dropped(tmp_path):
    rows = rows_of(tmp_path / "m.txt", "\ufeffa.wav\n\ufeffb.wav\n")
    assert [row["audio_filepath"] for row in rows] == ["a.wav", "b.wav"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\na.wav\n".encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("path\na.wav\nb\xe9.wav\n".encode("latin-1"), "line 3 is not UTF-8; save it as UTF-8"),
        (b"a.wav,Hello\n", "the first line names no column of paths"),
        (b"path,text,path\na.wav,A,b.wav\n", "'path' twice"),
    ],
)
def test_other_shapes_are_named(tmp_path, content, message):
    (tmp_path / "m.csv").write_bytes(content)
    with pytest.raises(ValueError, match=f"m.csv: .*{message}"):
        find_recordings([str(tmp_path / "m.csv")])


@pytest.mark.parametrize("written", ["NFC", "NFD"])
@pytest.mark.parametrize("on_disk", [("NFC", "NFC"), ("NFD", "NFD"), ("NFC", "NFD")])
def test_composed_and_decomposed_names_find_one_file(tmp_path, monkeypatch, written, on_disk):
    folder, file = map(unicodedata.normalize, on_disk, ("Café", "Übung"))
    (tmp_path / folder).mkdir()
    (tmp_path / folder / f"{file}.wav").touch()
    name = unicodedata.normalize(written, "Café/Übung.wav")
    (tmp_path / "m.txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    for source in ("m.txt", name, str(tmp_path / name)):
        (recording,) = find_recordings([source])
        assert recording.problem is None
    (recording,) = find_recordings(["m.txt"])
    assert recording.name == f"{folder}/{file}"
