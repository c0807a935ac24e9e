# SPDX-License-Identifier: Apache-2.0
"""Keeps one engine full with many recordings, and returns results in order.

    sources -> load (threads, ahead) -> waiting (longest first) -> engine (full) -> results

Sources may be endless: read-ahead is bounded in seconds of audio and in number, so memory stays
flat. A recording that fails gives a result with an error. This module does not know vLLM: an engine
takes requests, and delivers their outputs while it is stepped.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, Protocol

import numpy as np

from .geometry import SAMPLE_RATE
from .recordings import Progress, Result, SourceReader
from .rounds import Steps, Transcription, with_warnings
from .speakers import DiarizationRequest
from .transcript import Transcript
from .transcription import EngineOutput, EngineRequest

LOOK_AHEAD_S = 2 * 3600  # seconds of audio that are loaded ahead of the engine: 460 MB
MAX_OUTSTANDING = 4096  # recordings between the source and the caller
NUM_WORKERS = min(8, os.cpu_count() or 1)
QUICK_S = 0.005  # seconds that an engine below capacity waits for loading recordings
_LEAST_LOAD = 1.25  # lower bound of requests in the engine, relative to its capacity
_MOST_LOAD = 1.75  # upper bound of requests in the engine, relative to its capacity


class Engine(Protocol):
    """Decodes requests."""

    capacity: int  # requests that it decodes at once

    def submit(self, request: EngineRequest, deliver: Callable[[EngineOutput], None]) -> str:
        """Queue a request and return its id; its output is delivered during a later step."""

    def step(self) -> None:
        """Run the engine's next step and deliver the outputs that it finished."""

    def abort(self, request_ids: list[str]) -> None: ...


@dataclass
class _Job:
    """A recording that is being transcribed."""

    index: int
    source: Any
    seconds: float
    steps: Steps[Transcript]
    unsent: deque[int] = field(default_factory=deque)  # indices into steps.requests
    outputs: dict[int, EngineOutput] = field(default_factory=dict)
    request_ids: set[str] = field(default_factory=set)  # requests in the engine
    seconds_done: float = 0.0
    is_first_round: bool = True
    is_ahead: bool = True  # whether its seconds count as loaded ahead of the engine


class Batcher:
    """One run over ``sources``; ``results()`` drives it.

    ``load`` returns the waveform of a source, in a worker thread, and passes a sentence for each
    unreadable part to its ``on_warning``; ``begin`` returns its transcription. Sources are read
    in a thread of their own.
    """

    def __init__(
        self,
        sources: Iterable[Any],
        engine: Engine,
        *,
        load: Callable[..., np.ndarray],
        begin: Callable[[np.ndarray], Transcription],
        in_order: bool = True,
        progress: Callable[[Progress], None] | None = None,
        look_ahead_s: float = LOOK_AHEAD_S,
        num_workers: int = NUM_WORKERS,
    ) -> None:
        self._reader, self._engine = SourceReader(sources), engine
        self._load, self._begin = load, begin
        self._in_order, self._progress = in_order, progress
        self._look_ahead_s, self._num_workers = look_ahead_s, num_workers
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="load-audio")
        self._loading: dict[Future[tuple[float, Steps[Transcript]]], tuple[int, Any]] = {}
        self._slow: set[Future[Any]] = set()  # futures that were waited for once
        self._waiting: list[tuple[int, float, int, _Job]] = []  # heap of jobs with unsent requests
        self._waiting_s = 0.0
        self._jobs: dict[int, _Job] = {}  # loaded and not done
        self._num_in_engine = 0
        self._finished: dict[int, Result] = {}  # results that were not yielded yet
        self._next_index = 0
        self._num_read = self._num_done = self._num_outstanding = 0
        self._seconds_read = self._seconds_done = 0.0

    def results(self) -> Iterator[Result]:
        """Yield the result of each recording, in the order of the sources or as they finish.

        Closing the iterator aborts the requests in the engine.
        """
        try:
            while True:
                self._read_ahead()
                self._collect_loaded()
                self._fill_engine()
                yield from self._hand_out()
                if self._num_in_engine:
                    if not self._wait_for_more():
                        self._engine.step()
                elif coming := self._coming:
                    wait(coming, return_when=FIRST_COMPLETED)
                elif self._reader.is_at_end and not self._finished:
                    return
        finally:
            self._reader.close()
            self._pool.shutdown(wait=False, cancel_futures=True)
            left = [ticket for job in self._jobs.values() for ticket in job.request_ids]
            if left:
                self._engine.abort(left)

    @property
    def _coming(self) -> set[Future[Any]]:
        return {*self._loading, *self._reader.coming}

    def _wait_for_more(self) -> bool:
        """Wait briefly for a recording if the engine is below capacity; return whether one came.

        A step of half a batch costs nearly as much as a full one. A slow source is waited for once.
        """
        if self._num_in_engine >= self._engine.capacity:
            return False
        self._read_ahead()
        coming = self._coming
        quick = coming - self._slow
        done = wait(quick, QUICK_S, FIRST_COMPLETED).done if quick else set()
        self._slow &= coming
        if not done:
            self._slow |= quick
        return bool(done)

    def _read_ahead(self) -> None:
        while not self._reader.is_at_end and self._has_room():
            self._reader.ask()
        for item in self._reader.take():
            self._loading[self._pool.submit(self._start, item[1])] = item
            self._num_outstanding += 1

    def _has_room(self) -> bool:
        """Return whether another recording, of the mean duration so far, may be loaded."""
        num_coming = len(self._reader.coming) + len(self._loading)
        mean_s = self._seconds_read / max(self._num_read, 1)
        most_coming = 2 * self._num_workers if self._num_read else self._num_workers
        return (
            num_coming < most_coming
            and self._waiting_s + num_coming * mean_s < self._look_ahead_s
            and self._num_outstanding + len(self._reader.coming) < MAX_OUTSTANDING
        )

    def _start(self, source: Any) -> tuple[float, Steps[Transcript]]:
        """Decode and cut a recording. Runs in a worker."""
        warnings: list[str] = []
        waveform = self._load(source, on_warning=warnings.append)
        transcription = with_warnings(self._begin(waveform), warnings)
        return len(waveform) / SAMPLE_RATE, Steps(transcription)

    def _collect_loaded(self) -> None:
        for future in [future for future in self._loading if future.done()]:
            index, source = self._loading.pop(future)
            self._num_read += 1
            try:
                seconds, steps = future.result()
            except Exception as error:  # a recording that fails is a result, too
                self._finish(Result(index, source, error=error))
                continue
            self._seconds_read += seconds
            self._jobs[index] = job = _Job(index, source, seconds, steps)
            self._waiting_s += seconds
            self._continue(job)

    def _continue(self, job: _Job) -> None:
        """Queue the pending requests of a recording, or finish it."""
        if not job.steps.requests:
            self._end(job, transcript=job.steps.result)
            return
        job.outputs.clear()
        job.unsent.extend(range(len(job.steps.requests)))
        # A later round goes first: its recording leaves memory after it.
        heappush(self._waiting, (int(job.is_first_round), -job.seconds, job.index, job))

    def _leave_queue(self, job: _Job) -> None:
        """Make room for another recording to be loaded."""
        if job.is_ahead and job.index in self._jobs:
            job.is_ahead = False
            self._waiting_s -= job.seconds

    def _end(self, job: _Job, **outcome: Any) -> None:
        self._leave_queue(job)
        self._seconds_done += job.seconds - job.seconds_done
        del self._jobs[job.index]
        self._finish(Result(job.index, job.source, **outcome))

    def _finish(self, result: Result) -> None:
        self._finished[result.index] = result
        self._num_done += 1
        self._report()

    def _fill_engine(self) -> None:
        """Submit several at once: the first after a step costs twice, due to cold CPU caches."""
        capacity = self._engine.capacity
        if self._num_in_engine >= capacity * _LEAST_LOAD:
            return
        while self._waiting and self._num_in_engine < capacity * _MOST_LOAD:
            job = self._waiting[0][-1]
            if job.unsent:
                self._send(job, job.unsent.popleft())
            if not job.unsent:
                heappop(self._waiting)
                job.is_first_round = False
                # A slow diarizer holds recordings, which must not fill the memory.
                if not any(isinstance(r, DiarizationRequest) for r in job.steps.requests):
                    self._leave_queue(job)

    def _send(self, job: _Job, place: int) -> None:
        request = job.steps.requests[place]

        def deliver(output: EngineOutput) -> None:
            job.request_ids.discard(request_id)
            self._num_in_engine -= 1
            self._take_output(job, place, output)

        try:
            request_id = self._engine.submit(request, deliver)
        except ValueError as error:  # such as a clip that is too long for the engine's context
            self._fail(job, error)
        else:
            job.request_ids.add(request_id)
            self._num_in_engine += 1

    def _fail(self, job: _Job, error: Exception) -> None:
        job.unsent.clear()
        self._engine.abort(list(job.request_ids))
        self._num_in_engine -= len(job.request_ids)
        job.request_ids.clear()
        self._end(job, error=error)

    def _take_output(self, job: _Job, place: int, output: EngineOutput) -> None:
        requests = job.steps.requests
        job.outputs[place] = output
        if not isinstance(requests[place], DiarizationRequest):  # the clips count
            self._count(job, len(requests[place].waveform) / SAMPLE_RATE)
        if len(job.outputs) < len(requests):
            return
        self._leave_queue(job)
        try:
            job.steps.send([job.outputs[i] for i in range(len(requests))])
        except Exception as error:
            self._end(job, error=error)
        else:
            self._continue(job)

    def _count(self, job: _Job, seconds: float) -> None:
        """Count a finished clip. A clip that is decoded again does not count twice."""
        seconds = min(seconds, job.seconds - job.seconds_done)
        job.seconds_done += seconds
        self._seconds_done += seconds
        self._report()

    def _report(self) -> None:
        if self._progress:
            recordings = self._num_read, self._num_done
            seconds = self._seconds_read, self._seconds_done
            self._progress(Progress(*recordings, *seconds, self._reader.size))

    def _hand_out(self) -> Iterator[Result]:
        if not self._in_order:
            for index in list(self._finished):
                self._num_outstanding -= 1
                yield self._finished.pop(index)
        while self._next_index in self._finished:
            self._num_outstanding -= 1
            yield self._finished.pop(self._next_index)
            self._next_index += 1
