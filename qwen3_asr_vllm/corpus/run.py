# SPDX-License-Identifier: Apache-2.0
"""A corpus from its sources to its outputs, as ``qwen3-asr transcribe`` runs it.

    sources -> recordings -> without those that are done -> model -> DIR/NAME.txt, manifest.jsonl

A run that was stopped continues where it stopped; a recording that fails does not stop the others.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from ..formats import FORMATS, rounded
from ..options import TranscribeOptions, merge_options
from ..recordings import Progress, Recording, Result
from ..transcript import Transcript
from .outputs import Output, OutputFolder, OutputManifest
from .sources import Report, find_recordings

Formats: TypeAlias = Mapping[str, Callable[[Transcript], str]]  # by suffix
OnTranscript: TypeAlias = Callable[[Recording, Transcript], object]

_logger = logging.getLogger(__name__)


class Transcribe(Protocol):
    """A model's ``transcribe``, with its options."""

    def __call__(self, recordings: list[Recording], *, in_order: bool) -> Iterator[Result]: ...


@dataclass(frozen=True)
class Summary:
    """The outcome of a run."""

    num_done: int
    num_skipped: int  # recordings that an earlier run finished
    failed: tuple[tuple[str, str], ...]  # recordings without a transcript, each with its error


def run(
    sources: Iterable[str],
    model: Any,
    options: TranscribeOptions | None = None,
    *,
    output_dir: str | os.PathLike[str] | None = None,
    formats: Iterable[str] = ("txt",),
    manifest_out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    report: Report = _logger.warning,
    progress: Callable[[Progress], None] | None = None,
    on_transcript: OnTranscript | None = None,
    **fields: Any,
) -> Summary:
    """Transcribe a corpus into files, and skip the recordings that an earlier run finished.

        from qwen3_asr_vllm import Qwen3ASR
        from qwen3_asr_vllm.corpus.run import run

        if __name__ == "__main__":
            model = Qwen3ASR("Qwen/Qwen3-ASR-1.7B")
            summary = run(["recordings/"], model, output_dir="out", formats=["srt"], language="en")

    ``sources`` are those of ``find_recordings``. ``model`` is a ``Qwen3ASR``, a ``Client``, or a
    function that returns one, which is called only if recordings are left to transcribe.
    ``options`` are ``TranscribeOptions``; its fields are keywords too, which override them.
    ``formats`` are names such as "srt". ``report`` is called with each error and warning,
    ``on_transcript`` with each transcript, in order if there are no outputs.

    Raises TypeError for an unknown option, ValueError for sources and outputs that cannot be used,
    OutputInUseError if another run writes there, OSError for a full disk and for an engine or
    server that died.
    """

    options = merge_options(options, fields)

    def load() -> Transcribe:
        loaded = model() if callable(model) else model
        return partial(loaded.transcribe, options=options, progress=progress)

    with open_corpus(
        sources,
        output_dir=None if output_dir is None else Path(output_dir),
        formats={name.replace("_", "."): FORMATS[name] for name in formats},
        manifest_out=None if manifest_out is None else Path(manifest_out),
        overwrite=overwrite,
        report=report,
    ) as corpus:
        return corpus.transcribe(load, on_transcript=on_transcript)


@contextmanager
def open_corpus(
    sources: Iterable[str],
    *,
    output_dir: Path | None,
    formats: Formats,
    manifest_out: Path | None,
    overwrite: bool,
    report: Report,
) -> Iterator[Corpus]:
    """Find the recordings and lock the outputs. Raises the same errors as ``run``."""
    sources = list(sources)
    with ExitStack() as stack:
        recordings = find_recordings(sources, report=report)
        outputs: list[Output] = []
        if output_dir:
            stack.enter_context(OutputFolder.lock(output_dir))
            outputs.append(OutputFolder(output_dir, formats, overwrite=overwrite))
        if manifest_out:
            _check_not_read(manifest_out, sources)
            stack.enter_context(OutputManifest.lock(manifest_out))
            outputs.append(OutputManifest(manifest_out, overwrite=overwrite))
        for output in outputs:
            output.check_apart(recordings)
        is_done = [
            bool(outputs) and not overwrite and all(output.is_done(recording) for output in outputs)
            for recording in recordings
        ]
        todo = [recording for recording, done in zip(recordings, is_done, strict=True) if not done]
        yield Corpus(recordings, todo, outputs, report)


def _check_not_read(manifest_out: Path, sources: Iterable[str]) -> None:
    if manifest_out.is_file() and any(
        os.path.isfile(source) and manifest_out.samefile(source) for source in sources
    ):
        raise ValueError(f"{manifest_out} is a source of this run; write to another file")


@dataclass
class Corpus:
    """Recordings and the outputs that are locked for them."""

    recordings: list[Recording]
    todo: list[Recording]  # recordings that no earlier run finished
    outputs: list[Output]
    report: Report
    _failed: list[tuple[str, str]] = field(default_factory=list)

    @property
    def num_skipped(self) -> int:
        return len(self.recordings) - len(self.todo)

    def transcribe(
        self,
        load: Callable[[], Transcribe],
        *,
        on_transcript: OnTranscript | None = None,
    ) -> Summary:
        """Transcribe the recordings of ``todo``; ``load`` is called only if there are any."""
        if found := [recording for recording in self.todo if self._can_be_done(recording)]:
            for result in load()(found, in_order=not self.outputs):
                self._take(result, on_transcript)
        for output in self.outputs:
            output.finish(self.recordings)
        num_done = len(self.todo) - len(self._failed)
        return Summary(num_done, self.num_skipped, tuple(self._failed))

    def _can_be_done(self, recording: Recording) -> bool:
        try:
            recording.check()
            for output in self.outputs:
                output.check(recording)
        except (OSError, ValueError) as error:
            self._fail(recording, error)
            return False
        return True

    def _take(self, result: Result, on_transcript: OnTranscript | None) -> None:
        """Write one transcript, or record its error."""
        recording: Recording = result.source
        if result.transcript is None:
            self._fail(recording, result.error)
            return
        transcript = rounded(result.transcript)
        try:
            for output in self.outputs:
                output.write(recording, transcript)
        except ValueError as error:
            self._fail(recording, error)
            return
        if on_transcript:
            on_transcript(recording, transcript)
        for warning in transcript.warnings:
            self.report(f"{recording}: {warning}")

    def _fail(self, recording: Recording, error: Exception | None) -> None:
        self.report(str(error))
        self._failed.append((str(recording), str(error)))
