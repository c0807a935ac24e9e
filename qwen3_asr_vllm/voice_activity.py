# SPDX-License-Identifier: Apache-2.0
"""Voice activity: where speech starts and ends, by Silero VAD or by loudness.

    samples -> frames -> speech or not, for each -> turns

Silero's network tells speech from music, fans and traffic; it needs the packages silero-vad, for
its weights, and onnxruntime. Without them, whatever is louder than the background is speech.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from .geometry import HOP_LENGTH, SAMPLE_RATE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Turn:
    """The start or end of speech, in samples since the first.

    In a pause, speech ends for now and may start again: the turn goes on.
    """

    is_speech: bool
    sample: int
    is_pause: bool = False


def voice_activity(
    *, threshold: float = 0.5, silence_ms: int = 500, pause_ms: int | None = None
) -> VoiceActivity:
    """Return a detector of turns: Silero's network, or by loudness where it is not installed.

    ``threshold`` is from 0 to 1: how sure the detector is that a frame is speech. ``silence_ms``
    is how long a pause ends a turn; pauses of ``pause_ms`` are reported before that.
    """
    kind = LoudnessActivity if _network() is None else NeuralActivity
    return kind(threshold=threshold, silence_ms=silence_ms, pause_ms=pause_ms)


def speech_frames(waveform: np.ndarray, *, threshold: float = 0.5) -> np.ndarray | None:
    """Mark the whole 10 ms frames that are speech, shape (len(waveform) // 160,), bool.

    None where Silero's network is not installed.
    """
    if _network() is None:
        return None
    padding = -len(waveform) % FRAME
    frames = np.pad(waveform, (0, padding)).reshape(-1, FRAME)
    is_speech = SpeechNetwork().probabilities(frames) >= threshold
    middles = np.arange(len(waveform) // HOP_LENGTH) * HOP_LENGTH + HOP_LENGTH // 2
    return np.asarray(is_speech[middles // FRAME])


class VoiceActivity(ABC):
    """Finds turns in the frames of a stream."""

    frame_length: ClassVar[int]  # samples
    num_onset_frames: ClassVar[int]  # frames of speech that start a turn

    def __init__(self, *, silence_ms: int, pause_ms: int | None) -> None:
        self.silence_ms = silence_ms  # of the pause that ends a turn; may change in a pause
        self._pause = self._frames(pause_ms) if pause_ms else None
        self._rest = np.empty(0, np.float32)
        self._frame = 0
        self.enter(is_speech=False)

    def enter(self, *, is_speech: bool) -> None:
        """Continue in a turn, or outside of one."""
        self.is_speech, self._is_paused = is_speech, False
        self._run = 0  # consecutive frames that contradict the current state

    @property
    def onset_ms(self) -> int:
        """The time from the start of speech to its detection in milliseconds."""
        return (self.num_onset_frames + 1) * self.frame_length * 1000 // SAMPLE_RATE

    def push(self, samples: np.ndarray) -> Iterator[Turn]:
        """Yield the turns in these samples, float32 at 16 kHz."""
        samples = np.concatenate([self._rest, samples])
        length = self.frame_length
        frames = samples[: len(samples) // length * length].reshape(-1, length)
        self._rest = samples[frames.size :]
        for is_speech in self._judge(frames):
            self._frame += 1
            if is_speech == self.is_speech:
                yield from self._resume()
                continue
            self._run += 1
            if self.is_speech and self._run == self._pause:
                self._is_paused = True
                yield Turn(False, self._frame * length, is_pause=True)
            silence = self._frames(self.silence_ms)
            if self._run >= (silence if self.is_speech else self.num_onset_frames):
                yield self._turn()

    @abstractmethod
    def _judge(self, frames: np.ndarray) -> Iterator[bool]:
        """Yield whether each frame, of shape (frames, frame_length), is speech."""

    def _turn(self) -> Turn:
        back = 0 if self.is_speech else self._run + 1  # speech started before it was detected
        self.enter(is_speech=not self.is_speech)
        return Turn(self.is_speech, max(0, self._frame - back) * self.frame_length)

    def _resume(self) -> Iterator[Turn]:
        if self._is_paused:
            yield Turn(True, (self._frame - 1) * self.frame_length, is_pause=True)
        self._run, self._is_paused = 0, False

    def _frames(self, milliseconds: int) -> int:
        return max(1, milliseconds * SAMPLE_RATE // 1000 // self.frame_length)


# ---- Silero VAD ----

FRAME = 512  # samples that the network judges at once: 32 ms
CONTEXT = 64  # samples before them that it sees too
MAX_FRAMES = 512  # of one call, which bounds its memory
HYSTERESIS = 0.15  # speech goes on at probabilities so far below the threshold


class NeuralActivity(VoiceActivity):
    """Speech starts at frames of a probability of at least ``threshold``.

    It ends once ``silence_ms`` lie 0.15 below that.
    """

    frame_length, num_onset_frames = FRAME, 2

    def __init__(
        self, *, threshold: float = 0.5, silence_ms: int = 500, pause_ms: int | None = None
    ) -> None:
        super().__init__(silence_ms=silence_ms, pause_ms=pause_ms)
        self._network = SpeechNetwork()
        self._threshold = threshold

    def _judge(self, frames: np.ndarray) -> Iterator[bool]:
        for probability in self._network.probabilities(frames).tolist():
            hysteresis = HYSTERESIS if self.is_speech else 0.0
            yield probability >= max(self._threshold - hysteresis, 0.01)


class SpeechNetwork:
    """Silero's network on one stream: what it remembers goes from call to call."""

    def __init__(self) -> None:
        self._context = np.zeros(CONTEXT, np.float32)
        self._hidden = self._cell = np.zeros((1, 1, 128), np.float32)

    def probabilities(self, frames: np.ndarray) -> np.ndarray:
        """Return the probability of speech of each frame.

        Takes the next frames of the stream, (frames, 512) float32 at 16 kHz; returns (frames,).
        """
        blocks = range(0, len(frames), MAX_FRAMES)
        found = [self._call(frames[start : start + MAX_FRAMES]) for start in blocks]
        return np.concatenate(found) if found else np.empty(0, np.float32)

    def _call(self, frames: np.ndarray) -> np.ndarray:
        contexts = np.concatenate([self._context[None], frames[:-1, -CONTEXT:]])
        self._context = frames[-1, -CONTEXT:].copy()
        inputs = {
            "input": np.concatenate([contexts, frames], axis=1),
            "h": self._hidden,
            "c": self._cell,
        }
        network = _network()
        assert network is not None
        found, self._hidden, self._cell = network.run(["speech_probs", "hn", "cn"], inputs)
        return np.asarray(found).reshape(-1)


@cache
def _network() -> Any | None:
    """Load the network; None, and one log line, where its packages are not installed."""
    package = find_spec("silero_vad")  # is not imported, since that sets torch's threads to one
    try:
        import onnxruntime
    except ImportError:
        onnxruntime = None
    if package is None or package.submodule_search_locations is None or onnxruntime is None:
        logger.warning(
            "Speech is detected by its loudness, so music and noise count as speech. For a neural "
            "detector: pip install silero-vad onnxruntime"
        )
        return None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    weights = Path(package.submodule_search_locations[0], "data", "silero_vad_16k_sequence.onnx")
    return onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"])


# ---- loudness ----


class LoudnessActivity(VoiceActivity):
    """Separates speech from background by loudness over 50 ms.

    Speech starts 4 + 12 * ``threshold`` dB above the background (10 dB at 0.5), and at no less
    than -60 + 10 * ``threshold`` dBFS; it ends once ``silence_ms`` lie 4 dB below that. The
    background is the quietest moment of the last 5 s, from -70 to -30 dBFS, and -50 at first.
    """

    frame_length, num_onset_frames = HOP_LENGTH, 3
    _SMOOTH, _BLOCK, _HYSTERESIS_DB = 5, 10, 4.0  # frames, frames, dB

    def __init__(
        self, *, threshold: float = 0.5, silence_ms: int = 500, pause_ms: int | None = None
    ) -> None:
        super().__init__(silence_ms=silence_ms, pause_ms=pause_ms)
        self._margin = 4 + 12 * threshold
        self._least = -60 + 10 * threshold
        self._powers: deque[float] = deque(maxlen=self._SMOOTH)
        self._minima: deque[float] = deque([-50.0] * 50, maxlen=50)  # dBFS, of 100 ms each
        self._minimum = math.inf

    def _judge(self, frames: np.ndarray) -> Iterator[bool]:
        powers = np.einsum("ij,ij->i", frames, frames) / self.frame_length
        for number, power in enumerate(powers.tolist(), self._frame + 1):
            self._powers.append(power)
            level = 10 * math.log10(max(sum(self._powers) / len(self._powers), 1e-10))
            limit = max(self._background(level, number) + self._margin, self._least)
            yield level >= limit - self._HYSTERESIS_DB if self.is_speech else level > limit

    def _background(self, level: float, number: int) -> float:
        """Return the quietest level of the last 5 s in dBFS, including that of this frame."""
        self._minimum = min(self._minimum, level)
        if number % self._BLOCK == 0:
            self._minima.append(self._minimum)
            self._minimum = math.inf
        return min(max(min(*self._minima, self._minimum), -70.0), -30.0)
