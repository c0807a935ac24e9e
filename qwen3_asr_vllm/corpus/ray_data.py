# SPDX-License-Identifier: Apache-2.0
"""Transcribe a corpus on many machines with Ray Data, one engine per actor.

    manifest -> batches -> actors with an engine each -> FOLDER/shard-*.jsonl

Ray starts the actors, distributes batches, and restarts a killed actor with its batch. A shard
appears complete or not at all and has the name of its batch, so a repeated batch overwrites its own
shard. Recordings in the shards of an earlier run are skipped. Sources and FOLDER must be the same
on all machines: a shared file system, or URLs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine import EngineDiedError, share_gpu
from ..formats import rounded
from ..options import TranscribeOptions, merge_options
from ..recordings import Progress, Recording, Result, is_url
from .outputs import OutputFolder, OutputManifest, check_apart, output_line, write_whole
from .sources import Report, find_recordings

BATCH_SIZE = 256  # recordings per batch; an engine runs empty at the end of each batch
SHARDS = "shard-*.jsonl"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """The outcome of a run. ``failed`` has the error of each recording without a transcript."""

    num_done: int
    num_skipped: int  # recordings that an earlier run finished
    seconds: float  # seconds of audio that this run transcribed
    failed: dict[str, str]


def transcribe_on_ray(
    sources: Iterable[str],
    folder: Path,
    *,
    model: str,
    num_workers: int,
    batch_size: int = BATCH_SIZE,
    num_gpus: float = 1,
    engine_options: dict[str, Any] | None = None,
    progress: Callable[[Progress], None] | None = None,
    report: Report = _logger.warning,
    options: TranscribeOptions | None = None,
    **fields: Any,
) -> Summary:
    """Transcribe a corpus into JSONL shards in ``folder``, with ``num_workers`` engines.

    ``sources`` are those of ``find_recordings``; each row of a shard is that of the manifest with
    pred_text. ``num_gpus`` is the number of GPUs per engine, 0 for CPU engines, 0.5 for two engines
    on each GPU; ``engine_options`` are those of ``vllm.LLM``, and ``gpu_memory_utilization`` is for
    all engines of a GPU. ``options`` are ``TranscribeOptions``; its fields are keywords too, which
    override them. ``progress`` is called after each batch. Joins the cluster of ``ray.init``
    or $RAY_ADDRESS, else starts Ray on this machine.

    Raises TypeError for an unknown option, ImportError if Ray is not installed, ValueError for
    sources without recordings, OutputInUseError if another run writes there.
    """
    options = merge_options(options, fields)
    with OutputFolder.lock(folder):
        recordings = find_recordings(map(_absolute, sources), report=report)
        check_apart((recording.key, recording) for recording in recordings)
        done = set(done_keys(folder))
        todo = [recording for recording in recordings if done.isdisjoint(recording.keys)]
        model_path = os.path.abspath(model) if os.path.isdir(model) else model
        failed: dict[str, str] = {}
        seconds, num_done, num_outcomes = 0.0, 0, 0
        for outcomes in _batches_done(
            todo,
            batch_size=batch_size,
            num_workers=min(num_workers, -(-len(todo) // batch_size)),
            num_gpus=num_gpus,
            worker={"folder": str(folder.absolute()), "model": model_path, "options": options}
            | {"engine_options": share_gpu(engine_options or {}, num_gpus)},
        ):
            failed |= {x["source"]: x["error"] for x in outcomes if x["error"]}
            seconds += sum(x["seconds"] for x in outcomes)
            num_done += sum(not x["error"] for x in outcomes)
            num_outcomes += len(outcomes)
            if progress:
                progress(Progress(num_outcomes, num_outcomes, seconds, seconds, len(todo)))
        return Summary(num_done, len(recordings) - len(todo), seconds, failed)


def _absolute(source: str) -> str:
    """Return an absolute path or a URL for workers. Raises ValueError for standard input."""
    if source == "-":
        raise ValueError("workers on Ray cannot read standard input; write it to a file.")
    return source if is_url(source) else os.path.abspath(source)


def done_keys(folder: Path) -> Iterator[tuple[str, float]]:
    """Yield the keys of the recordings in the shards of a folder."""
    for shard in sorted(folder.glob(SHARDS)):
        yield from OutputManifest(shard).keys()


def _batches_done(
    todo: list[Recording],
    *,
    batch_size: int,
    num_workers: int,
    num_gpus: float,
    worker: dict[str, Any],
) -> Iterator[list[dict[str, Any]]]:
    """Yield the outcomes of each finished batch."""
    if not todo:
        return
    ray = _ray()
    batches = [todo[start : start + batch_size] for start in range(0, len(todo), batch_size)]
    items = [{"batch": json.dumps([asdict(r) for r in batch])} for batch in batches]
    data = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_gpus=num_gpus,
        fn_constructor_kwargs=worker,
    )
    for row in data.iter_rows():
        yield json.loads(row["outcomes"])


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no usage statistics
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError("Ray is not installed: pip install 'ray[data]'") from error
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False)
    return ray


class Worker:
    """An actor with an engine, which transcribes batches."""

    def __init__(
        self,
        *,
        model: str,
        folder: str,
        engine_options: dict[str, Any],
        options: TranscribeOptions,
    ) -> None:
        from ..offline import Qwen3ASR

        self._model = Qwen3ASR(model, **engine_options)
        self._folder, self._options = Path(folder), options

    def __call__(self, rows: dict[str, Any]) -> dict[str, list[str]]:
        return {"outcomes": [json.dumps(self._transcribe(batch)) for batch in rows["batch"]]}

    def _transcribe(self, batch: str) -> list[dict[str, Any]]:
        recordings = [Recording(**fields) for fields in json.loads(batch)]
        try:
            results = list(self._model.transcribe(recordings, self._options))
        except EngineDiedError:
            os._exit(1)  # Ray starts another worker with the same batch
        lines, outcomes = zip(*map(_line_and_outcome, results), strict=True)
        name = hashlib.sha256(batch.encode()).hexdigest()[:16]
        if text := "".join(lines):
            write_whole(self._folder / f"shard-{name}.jsonl", text)
        return list(outcomes)


def _line_and_outcome(result: Result) -> tuple[str, dict[str, Any]]:
    """Return the line of a shard, empty for an error, and the outcome for the summary."""
    line, seconds, error = "", 0.0, result.error
    if result.transcript is not None:
        try:
            line = output_line(result.source, rounded(result.transcript))
            seconds = result.transcript.duration
        except ValueError as unwritable:
            error = unwritable
    outcome = {"source": str(result.source), "seconds": seconds}
    return line, outcome | {"error": str(error) if error else None}
