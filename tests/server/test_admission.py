# SPDX-License-Identifier: Apache-2.0
"""Admission respects its limits and frees every reservation."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Barrier

import pytest

from qwen3_asr_vllm.server.admission import Admission, Busy


def test_no_more_recordings_than_places():
    admission = Admission(max_recordings=2)
    with admission.reserve(), admission.reserve():
        with pytest.raises(Busy, match="2 recordings; try again in"), admission.reserve():
            pass
    with admission.reserve():
        assert admission.num_recordings == 1


def test_too_much_audio_is_refused():
    admission = Admission(max_audio_s=100)
    with admission.reserve() as first, ExitStack() as stack:
        first.hold(60)
        second = stack.enter_context(admission.reserve())
        second.hold(40)
        with pytest.raises(Busy, match="100 s of audio"):
            second.hold(41)
        with pytest.raises(Busy, match="100 s of audio"), admission.reserve():
            pass
        first.hold(10)  # a recording may shrink at any time
        second.hold(90)
    assert (admission.num_recordings, admission.audio_s) == (0, 0)


def test_abandoned_decoding_threads_hold_nothing():
    admission = Admission()
    with admission.reserve() as reservation:
        reservation.hold(90)
    with pytest.raises(RuntimeError, match="released"):
        reservation.hold(120)
    assert (admission.num_recordings, admission.audio_s) == (0, 0)


def test_concurrent_holds_respect_the_limits():
    admission = Admission(max_recordings=5, max_audio_s=50)
    all_have_asked = Barrier(16)  # who has a place keeps it until then
    seen = []

    def one(seed):
        rng = random.Random(seed)
        try:
            with ExitStack() as stack:
                try:
                    reservation = stack.enter_context(admission.reserve())
                finally:
                    all_have_asked.wait()
                for _ in range(20):
                    reservation.hold(rng.uniform(0, 30))
                    time.sleep(1e-4)  # lets another thread in
                    seen.append((admission.num_recordings, admission.audio_s))
        except Busy:
            return "busy"
        return "held"

    with ThreadPoolExecutor(16) as pool:
        outcomes = set(pool.map(one, range(25 * 16)))
    assert outcomes == {"busy", "held"}
    assert max(num for num, _ in seen) <= 5 and max(held for _, held in seen) <= 50
    assert (admission.num_recordings, round(admission.audio_s, 6)) == (0, 0)
