# SPDX-License-Identifier: Apache-2.0
"""Many recordings through one engine: order, what goes first, bounds, errors. No vLLM here."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections import deque
from concurrent.futures import wait
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.batching import Batcher
from qwen3_asr_vllm.options import TranscribeOptions
from qwen3_asr_vllm.speakers import DiarizationOutput, DiarizationRequest, SpeakerTurn
from qwen3_asr_vllm.transcription import EngineOutput, transcribe

RATE = 16_000


class CountingEngine:
    """Says how long each clip is, one clip a step, the ones that were queued first."""

    def __init__(self, *, capacity=4):
        self.capacity = capacity
        self.queue = deque()
        self.clips_s = []  # seconds of each clip, in order
        self.most = 0  # requests held at once

    def submit(self, request, deliver):
        seconds = len(request.waveform) / RATE
        if seconds > 50:
            raise ValueError("too long for the context")
        ticket = str(id(deliver))
        self.queue.append((ticket, seconds, deliver))
        self.most = max(self.most, len(self.queue))
        return ticket

    def step(self):
        _, seconds, deliver = self.queue.popleft()
        self.clips_s.append(seconds)
        deliver(EngineOutput(f"language English<asr_text>{seconds:g}", "stop"))

    def abort(self, tickets):
        self.queue = deque(entry for entry in self.queue if entry[0] not in tickets)


def tone(seconds):
    return np.full(round(seconds * RATE), 0.1, np.float32)


def load(source, *, on_warning):
    if source == "broken":
        raise ValueError("not audio")
    return tone(source)


def run(sources, engine, *, max_clip_s=60.0, **options):
    begin = partial(transcribe, options=TranscribeOptions(max_clip_s=max_clip_s))
    return Batcher(sources, engine, load=load, begin=begin, **options).results()


def outcome(result):
    return result.transcript.text if result.transcript else str(result.error)


@given(st.lists(st.sampled_from([0.5, 1, 2, 3, "broken"]), max_size=12), st.booleans())
def test_every_source_has_its_own_result(sources, in_order):
    engine = CountingEngine()
    results = list(run(sources, engine, in_order=in_order))
    if not in_order:
        results.sort(key=lambda result: result.index)
    assert [r.index for r in results] == list(range(len(sources)))
    assert [r.source for r in results] == sources
    expected = ["not audio" if s == "broken" else f"{s:g}" for s in sources]
    assert list(map(outcome, results)) == expected
    assert not engine.queue


def run_slowly(sources, engine, **options):
    """As ``run``; but before each step of the engine, all that may be read and loaded is."""
    pipeline = Batcher(sources, engine, load=load, begin=transcribe, **options)
    step = engine.step

    def step_after_loading():
        wait(pipeline._reader.coming)
        pipeline._read_ahead()
        wait(pipeline._loading)
        step()

    engine.step = step_after_loading
    return pipeline.results()


def test_the_longest_loaded_clip_goes_first():
    sources = [3, 1, 2, 5, 4, 2.5]
    engine = CountingEngine(capacity=1)
    list(run_slowly(sources, engine, num_workers=len(sources)))
    sent_at_once = engine.clips_s[:2]  # what was loaded first did not wait for the others
    rest = [seconds for seconds in sources if seconds not in sent_at_once]
    assert engine.clips_s[2:] == sorted(rest, reverse=True)


def test_the_engine_is_full_with_short_queues():
    engine = CountingEngine(capacity=8)
    list(run_slowly([1] * 100, engine, num_workers=8))
    assert 8 <= engine.most <= 14


def test_clips_return_in_order():
    (result,) = run([10], CountingEngine(capacity=2), max_clip_s=3)
    starts = [segment.start for segment in result.transcript.segments]
    assert starts == sorted(starts) and len(starts) >= 4


def test_refused_clips_fail_only_their_recording():
    engine = CountingEngine()
    results = list(run([1, 55, 2], engine))
    assert list(map(outcome, results)) == ["1", "too long for the context", "2"]


def test_endless_sources_are_read_lazily():
    read = 0

    def sources():
        nonlocal read
        while True:
            read += 1
            yield 1

    results = run_slowly(sources(), CountingEngine(), look_ahead_s=5, num_workers=2)
    assert [next(results).index for _ in range(50)] == list(range(50))
    assert read < 50 + 30
    results.close()


def test_memory_stays_flat_over_a_long_source():
    """600 recordings of 10 s are 384 MB; ten at once are held, and the transcripts are not."""
    results = run((10 for _ in range(600)), CountingEngine(), look_ahead_s=30, num_workers=2)
    tracemalloc.start()
    try:
        most = 0
        for _ in results:
            most = max(most, tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert most < 40e6


def test_closing_aborts_pending_requests():
    engine = CountingEngine()
    results = run_slowly([1] * 20, engine)
    next(results)
    next(results)
    assert engine.queue
    results.close()
    assert not engine.queue


def test_progress_grows_to_everything():
    seen = []
    list(run([10, "broken", 2], CountingEngine(), max_clip_s=3, progress=seen.append))
    assert {progress.recordings for progress in seen} == {3}
    done = [progress.seconds_done for progress in seen]
    assert done == sorted(done) and len(done) >= 5
    last = seen[-1]
    assert (last.recordings_read, last.recordings_done) == (3, 3)
    assert last.seconds_done == last.seconds_read == pytest.approx(12)


def waiting_sources(first_is_out):
    """The second waits for the result of the first."""
    yield 1
    first_is_out.wait(30)
    yield 2


@pytest.mark.parametrize("in_order", [True, False])
def test_sources_may_wait_for_results(in_order):
    first_is_out = threading.Event()
    results = run(waiting_sources(first_is_out), CountingEngine(), in_order=in_order)
    start = time.monotonic()
    assert outcome(next(results)) == "1"
    first_is_out.set()
    assert list(map(outcome, results)) == ["2"]
    assert time.monotonic() - start < 20


def test_idle_sources_delay_nothing():
    results = run(waiting_sources(threading.Event()), CountingEngine())
    start = time.monotonic()
    assert outcome(next(results)) == "1"
    results.close()
    assert time.monotonic() - start < 20


def test_source_errors_are_raised():
    def sources():
        yield 1
        raise RuntimeError("the list ended early")

    with pytest.raises(RuntimeError, match="ended early"):
        list(run(sources(), CountingEngine()))


class FullnessEngine(CountingEngine):
    """Notes how many requests it has when it is stepped."""

    def __init__(self, **options):
        super().__init__(**options)
        self.had = []

    def step(self):
        self.had.append(len(self.queue))
        super().step()


def test_engines_wait_briefly_for_full_batches(monkeypatch):
    monkeypatch.setattr("qwen3_asr_vllm.batching.QUICK_S", 60)  # this machine may be slow
    engine = FullnessEngine(capacity=16)
    list(run([1.0] * 40, engine, num_workers=2))
    assert engine.had[0] >= 16


def test_engines_wait_once_for_slow_sources():
    """A source that waits for a result is not held against each step."""
    is_decoded = threading.Event()

    def sources():
        yield 1.0
        yield 2.0
        is_decoded.wait()
        yield 3.0

    engine = FullnessEngine(capacity=16)
    for result in run(sources(), engine, in_order=False):
        if result.source == 1.0:
            is_decoded.set()
    assert sorted(engine.clips_s) == [1.0, 2.0, 3.0]


def test_loader_warnings_reach_the_transcript():
    def load(source, *, on_warning):
        on_warning(f"{source} s are missing.")
        return tone(source)

    engine = CountingEngine()
    results = Batcher([1.0, 2.0], engine, load=load, begin=transcribe).results()
    warnings = [result.transcript.warnings[0] for result in results]
    assert warnings == ["1.0 s are missing.", "2.0 s are missing."]


def test_a_slow_diarizer_bounds_what_is_loaded():
    """Clips that are decoded make no room while their recordings wait for the diarizer."""

    class Slow(CountingEngine):
        def __init__(self):
            super().__init__(capacity=100)
            self.diarizing, self.most_diarizing = deque(), 0

        def submit(self, request, deliver):
            if not isinstance(request, DiarizationRequest):
                return super().submit(request, deliver)
            self.diarizing.append(deliver)
            self.most_diarizing = max(self.most_diarizing, len(self.diarizing))
            return str(id(deliver))

        def step(self):
            if self.queue:
                return super().step()
            self.diarizing.popleft()(DiarizationOutput((SpeakerTurn(0, 1, 0),)))

    engine, seen = Slow(), []
    begin = partial(transcribe, options=TranscribeOptions(diarize=True))
    options = {"look_ahead_s": 30, "num_workers": 1, "progress": seen.append}
    results = list(Batcher([10] * 20, engine, load=load, begin=begin, **options).results())
    assert [outcome(result) for result in results] == ["10"] * 20
    assert engine.most_diarizing <= 5
    assert [p.seconds_done for p in seen] == sorted(p.seconds_done for p in seen)
    assert seen[-1].seconds_done == 200
