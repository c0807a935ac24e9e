# SPDX-License-Identifier: Apache-2.0
"""The rows of a manifest: JSON, JSONL, CSV, TSV, or a list of paths, one to a line.

    bytes -> text (UTF-8, or UTF-16 and UTF-32 with a byte order mark) -> rows, each with its line

TSV has no quotes, as in Common Voice. CSV has the quotes of RFC 4180, strictly: a quote that never
closes would swallow the rows after it. An unreadable row is yielded as its error, so that it hides
no other row.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any, TypeAlias

from ..media.containers import AUDIO_SUFFIXES

PATH_FIELDS = ("audio_filepath", "file_name", "audio", "path")  # the first that a row has counts
DELIMITERS = {".csv": ",", ".tsv": "\t"}
MANIFEST_SUFFIXES = (".jsonl", ".json", *DELIMITERS, ".txt", ".lst", ".list")

_ANY_DELIMITER = ",;\t|"
_ENCODINGS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",  # before UTF-16, whose mark is a prefix of this one
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_SPACE = re.compile(r"\s*")
_NEEDS_PATH = f"names no audio; one of {', '.join(PATH_FIELDS)} must be a path."

Row: TypeAlias = tuple[int, Mapping[str, Any] | ValueError]  # line; fields or an error


def read_rows(path: Path) -> Iterator[Row]:
    """Return the rows of a manifest. Raises ValueError, OSError for an unreadable file."""
    text = decode_text(path.read_bytes())
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return _json_rows(text)
    return _table_rows(text, DELIMITERS[suffix]) if suffix in DELIMITERS else _list_rows(text)


def decode_text(data: bytes) -> str:
    """Return the text of a file without byte order marks, with LF as line ends.

    Raises ValueError, with the line, for bytes that are neither UTF-8 nor marked UTF-16 or UTF-32.
    """
    encoding = next((name for mark, name in _ENCODINGS.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"line {line} is not {encoding.upper()}; save it as UTF-8.") from error
    if 4 * text.count("\0") > len(text) > 0:
        raise ValueError("UTF-16 without a byte order mark, or no text; save it as UTF-8.")
    return text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")


def _list_rows(text: str) -> Iterator[Row]:
    for line, content in enumerate(
        text.split("\n"), 1
    ):  # str.splitlines() would also split at U+2028
        if path := content.strip():
            yield line, {"audio_filepath": path}


# JSON ---------------------------------------------------------------------------------------


def _json_rows(text: str) -> Iterator[Row]:
    """Yield the rows of JSON lines, of a list of objects, or of an object with such a list."""
    values = list(_json_values(text))
    is_one = len(values) == 1
    for line, value in values:
        entries = _entries(value) if is_one else None
        if entries is None:
            yield line, _json_row(value)
            continue
        for number, entry in enumerate(entries, 1):
            row = _json_row(entry)
            is_wrong = isinstance(row, ValueError)
            yield line, ValueError(f"entry {number} {row}") if is_wrong else row


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    """Yield each value with its line. After invalid JSON, reading continues on the next line."""
    decoder, line, counted = json.JSONDecoder(), 1, 0
    while (position := _end_of_space(text, counted)) < len(text):
        line += text.count("\n", counted, position)
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            value, end = ValueError(f"not JSON ({error})."), text.find("\n", position)
        yield line, value
        if end < 0:
            return
        line += text.count("\n", position, end)
        counted = end


def _end_of_space(text: str, start: int) -> int:
    space = _SPACE.match(text, start)
    return space.end() if space else start


def _entries(value: Any) -> list[Any] | None:
    """Return the rows within the only value of a file; None if the value is a row itself."""
    if isinstance(value, dict) and not any(map(value.get, PATH_FIELDS)):
        lists = [inner for inner in value.values() if isinstance(inner, list)]
        return lists[0] if len(lists) == 1 else None
    return value if isinstance(value, list) else None


def _json_row(value: Any) -> Mapping[str, Any] | ValueError:
    if isinstance(value, dict | ValueError):
        return value
    return {"audio_filepath": value} if isinstance(value, str) else ValueError(_NEEDS_PATH)


# tables -------------------------------------------------------------------------------------


def _table_rows(text: str, usual: str) -> Iterator[Row]:
    """Yield rows with the names of the first line. Raises ValueError if none is a path's."""
    first = next(filter(str.strip, text.split("\n")), "")
    if not first:
        return
    delimiter = _delimiter(first, usual)
    records = _unquoted(text) if delimiter == "\t" else _quoted(text, delimiter)
    names: list[str] = []
    for line, record in records:
        if isinstance(record, ValueError):
            yield line, record
        elif not any(map(str.strip, record)):
            continue  # an empty row, as at the end of spreadsheets
        elif not names:
            names = [name.strip() for name in record]
            if twice := [name for name in names if name and names.count(name) > 1]:
                raise ValueError(f"the first line names a column {twice[0]!r} twice.")
        elif len(record) != len(names):
            message = f"has {len(record)} columns, and the first line {len(names)}."
            yield line, ValueError(message)
        else:
            yield line, dict(zip(names, record, strict=True))


def _delimiter(first: str, usual: str) -> str:
    """Return the delimiter that gives the first line a column of paths."""
    for delimiter in dict.fromkeys(usual + _ANY_DELIMITER):
        is_tab = delimiter == "\t"
        names = first.split("\t") if is_tab else next(csv.reader([first], delimiter=delimiter))
        if not set(PATH_FIELDS).isdisjoint(name.strip() for name in names):
            return delimiter
    raise ValueError(
        f"the first line names no column of paths ({first[:100]!r}); one must be called "
        f"{', '.join(PATH_FIELDS[:-1])} or {PATH_FIELDS[-1]}."
    )


def _unquoted(text: str) -> Iterator[tuple[int, list[str]]]:
    for line, content in enumerate(text.split("\n"), 1):
        yield line, content.split("\t")


def _quoted(text: str, delimiter: str) -> Iterator[tuple[int, list[str] | ValueError]]:
    reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            lines = f" in lines {line} to {reader.line_num}" if reader.line_num > line else ""
            advice = 'a field that opens with " must close with it, and double those inside'
            yield line, ValueError(f"not CSV{lines} ({error}); {advice}.")
            continue
        if reader.line_num > line and _holds_rows(record, delimiter):
            message = f"a field in quotes extends to line {reader.line_num}, over whole rows"
            yield line, ValueError(f"{message}; double the quotes inside of fields.")
        else:
            yield line, record


def _holds_rows(record: list[str], delimiter: str) -> bool:
    """Return whether a field holds whole rows, which an unbalanced quote swallowed."""
    lines = (line for field in record if "\n" in field for line in field.split("\n"))
    cells = (cell for line in lines for cell in line.split(delimiter))
    return any(PurePath(cell.strip('"')).suffix.lower() in AUDIO_SUFFIXES for cell in cells)
