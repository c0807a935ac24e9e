# SPDX-License-Identifier: Apache-2.0
"""The recordings of a corpus: files, folders, globs, URLs, standard input, and manifests.

Every omission is reported: other files of a folder are counted by suffix, and a manifest with
unreadable rows is rejected, with an error for each of them. A name may have composed accents (NFC)
or decomposed ones (NFD, as on macOS): both find the same file.
"""

from __future__ import annotations

import glob
import logging
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias
from unicodedata import normalize
from urllib.parse import unquote, urlsplit

from ..media.containers import AUDIO_SUFFIXES
from ..recordings import Recording, is_url
from .manifests import MANIFEST_SUFFIXES, PATH_FIELDS, read_rows

MAX_SECONDS = 1e9  # upper bound of an offset: 30 years
MAX_PROBLEMS = 20  # upper bound of unreadable rows that one message lists

Report: TypeAlias = Callable[[str], object]

_logger = logging.getLogger(__name__)


def find_recordings(sources: Iterable[str], *, report: Report = _logger.warning) -> list[Recording]:
    """Return all recordings of files, folders, globs, URLs, manifests, and "-".

    ``report`` is called with a message about the files that a folder or glob leaves out.

    Raises one ValueError for all sources without recordings and all unreadable manifests.
    """
    recordings: list[Recording] = []
    problems: list[str] = []
    for source in sources:
        try:
            recordings += _find(source, report)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    return recordings


def _find(source: str, report: Report) -> list[Recording]:
    if source == "-":
        return [Recording("-", "stdin")]
    if is_url(source):
        name = PurePosixPath(unquote(urlsplit(source).path)).name
        return [Recording(source, mirrored_name(name))]
    source = spelled_as_on_disk(source)
    path = Path(source)
    if os.path.isdir(path):  # returns False for a name that is too long, for which is_dir() raises
        return _below(path, source, sorted(_audio_files(path, report)))
    if path.suffix.lower() in MANIFEST_SUFFIXES and os.path.isfile(path):
        return read_manifest(path)
    if glob.has_magic(source) and not os.path.exists(path):
        return _below(_fixed_part(path), source, _matches(source, report))
    return [Recording(source, mirrored_name(path.name))]


def spelled_as_on_disk(path: str, folder: str | Path = "") -> str:
    """Return a path below ``folder`` with the accents of the files on disk, in NFC or NFD."""
    if path.isascii() or os.path.lexists(os.path.join(folder, path)):
        return path
    found = ""
    for part in PurePosixPath(path).parts:
        spellings = (os.path.join(found, normalize(form, part)) for form in ("NFC", "NFD"))
        on_disk = (name for name in spellings if os.path.lexists(os.path.join(folder, name)))
        found = next(on_disk, os.path.join(found, part))
    return found


# folders ------------------------------------------------------------------------------------


def _audio_files(folder: Path, report: Report) -> Iterator[Path]:
    """Yield the files below a folder that have a suffix of audio; report all others."""
    others: Counter[str] = Counter()
    for path in _files(folder, report):
        suffix = path.suffix.lower()
        is_hidden = path.name.startswith(".")  # macOS puts ._a.mp3 by a.mp3
        if suffix not in AUDIO_SUFFIXES:
            others[suffix or "no suffix"] += not is_hidden
        elif is_hidden:
            others[f"hidden {suffix}"] += 1
        elif _is_special(path):
            others[f"{suffix} that is not a file"] += 1
        else:
            yield path
    if others := +others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in others.most_common())
        report(f"{folder}: {_count(others.total(), 'file is', 'files are')} not audio: {kinds}")


def _files(folder: Path, report: Report) -> Iterator[Path]:
    """Yield all files below a folder once; those in linked folders come last."""
    seen: set[tuple[int, int]] = set()
    folders = [str(folder)]
    for start in folders:
        for place, inner, names in os.walk(start, onerror=lambda e: report(f"not searched: {e}")):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:  # a link to a folder that was searched
                inner.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            links = (os.path.join(place, name) for name in sorted(inner))
            folders += filter(os.path.islink, links)  # os.walk does not follow links
            yield from (Path(place, name) for name in names)


def _matches(pattern: str, report: Report) -> list[Path]:
    """Return the files that a glob matches; report folders, pipes and devices."""
    found = sorted(map(Path, glob.glob(pattern, recursive=True)))
    folders = [] if "**" in pattern else [path for path in found if path.is_dir()]
    if folders:
        count = _count(len(folders), "folder", "folders")
        report(f"{pattern}: {count} not searched, such as {folders[0]}; add /** to search them")
    if special := [path for path in found if not path.is_dir() and _is_special(path)]:
        report(f"{pattern}: {special[0]} is not a file ({len(special)} of these)")
    return [path for path in found if not path.is_dir() and not _is_special(path)]


def _is_special(path: Path) -> bool:
    """Return whether this is a pipe, socket or device, which may never end."""
    try:
        mode = path.stat().st_mode
    except OSError:  # such as a broken link: opening it gives the reason
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _fixed_part(pattern: Path) -> Path:
    """Return the folder that contains all matches of a glob."""
    parents = [parent for parent in pattern.parents if not glob.has_magic(str(parent))]
    return parents[0]


def _below(folder: Path, source: str, files: list[Path]) -> list[Recording]:
    if not files:
        raise ValueError(f"{source}: no recordings found.")
    return [Recording(str(file), mirrored_name(file.relative_to(folder))) for file in files]


def mirrored_name(path: str | PurePosixPath | Path) -> str:
    """Return a relative path without suffix and without "..".

    >>> mirrored_name("../data/talks/monday.v2.mp3")
    'data/talks/monday.v2'
    """
    pure = PurePosixPath(str(path).replace("\\", "/").replace("\0", ""))
    parts = [part for part in pure.parts if part not in ("/", "//", "..")]
    if not parts:
        return "recording"
    return str(PurePosixPath(*parts).with_suffix(""))


# manifests ----------------------------------------------------------------------------------


def read_manifest(path: Path) -> list[Recording]:
    """Return the recordings of a manifest; its relative paths start at its folder.

    Raises ValueError for unreadable rows and rows that name no audio, with the file and line of
    each, and for a manifest without rows.
    """
    recordings: list[Recording] = []
    problems: list[str] = []
    try:
        for line, row in read_rows(path):
            try:
                recordings.append(_of_row(path.parent, row))
            except ValueError as error:
                problems.append(f"{path}:{line}: {error}")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if len(problems) > MAX_PROBLEMS:
        problems[MAX_PROBLEMS:] = [f"{path}: {len(problems) - MAX_PROBLEMS} more rows like these"]
    if problems:
        raise ValueError("\n".join(problems))
    if not recordings:
        raise ValueError(f"{path}: no recordings found.")
    return recordings


def _of_row(folder: Path, row: Mapping[str, Any] | ValueError) -> Recording:
    if isinstance(row, ValueError):
        raise row
    audio = next((row[name] for name in PATH_FIELDS if row.get(name)), None)
    if not isinstance(audio, str):
        raise ValueError(f"names no audio; one of {', '.join(PATH_FIELDS)} must be a path.")
    audio.encode()  # raises for half a surrogate pair
    if "\0" in audio:
        raise ValueError("the path holds a NUL character, as UTF-16 read as UTF-8 does.")
    offset = _seconds(row, "offset")
    if is_url(audio):
        source, parts = audio, urlsplit(audio)
        name = mirrored_name(unquote(parts.netloc + parts.path))
    else:
        audio = spelled_as_on_disk(audio, folder)
        source, name = str(folder / audio), mirrored_name(audio)
    return Recording(
        source,
        name if offset is None else f"{name}_{offset:.3f}",
        row,
        offset_s=offset or 0.0,
        # NeMo states a duration in every row; without an offset it is that of the file.
        duration_s=None if offset is None else _seconds(row, "duration"),
    )


def _seconds(row: Mapping[str, Any], name: str) -> float | None:
    if (given := row.get(name)) in (None, ""):
        return None
    try:
        if 0 <= (seconds := float(given)) < MAX_SECONDS:
            return seconds
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(f"{name} is {str(given)[:100]!r}; it must be seconds, from 0.")
