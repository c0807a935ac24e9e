# SPDX-License-Identifier: Apache-2.0
"""Speech while it is spoken, without an engine: what to ask next, and which text is final.

    samples -> Stream.push        request() -> the engine -> accept()        update() -> text

Every step asks about the whole clip so far and puts the text so far, less its last tokens, into
the answer's mouth (re-feed and roll back, as Qwen's own streaming does). It costs the same
whether a clip has lasted for ten seconds or for two minutes: the clip goes as its attention
windows of 8 s, one multimodal item each. A finished window never changes, so vLLM knows it again
by its hash, in the encoder cache and in the prefix cache; new to the engine are the unfinished
window and a few tokens of text.

      |<-- window 0 -->|<-- window 1 -->|<- 2 ->|         more samples come here
       finished, cached  finished, cached  new

Two things would change a finished window. Its last frame sees 40 samples of the next one, so it
is finished only once they are there. And the floor of a log-mel spectrogram hangs on the loudest
bin of the whole clip, so a window carries that; when it rises, all windows of the clip are new.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
import regex

from .audio import check_waveform
from .decoding import Decoding, max_new_tokens
from .geometry import HOP_LENGTH, MAX_CLIP_S, SAMPLE_RATE, Geometry
from .languages import resolve_language, separator
from .pauses import is_silent, quiet_frames
from .prompt import OutputStream, build_prompt, parse_output
from .segments import split_sentences
from .windows import GUARD_SAMPLES, GrowingClip, Tokenizer, Window

MIN_STEP_S = 0.1  # seconds
STEP_S = 2.0  # seconds of new audio for which the engine is asked again
UNFIXED_STEPS = 2  # steps of a clip that start their text afresh
UNFIXED_TOKENS = 5  # at the end of a text, which the next step decodes again
CLIP_S = 60.0  # seconds after which a clip ends at the next pause
HARD_CLIP_S = 120.0  # seconds after which it ends without one
PAUSE_S = 0.3
SILENCE_S = 5.0  # of digital silence end a clip, too

_PAUSE_SEARCH_S = 10.0  # a pause is quiet against the speech of these last seconds
_MAX_CARRIED = 200  # characters of the last sentence that go into the next clip's context


# audio --------------------------------------------------------------------------------------


# text ---------------------------------------------------------------------------------------


class Draft:
    """The text of one clip, which the model writes again at every step.

    A step continues ``prefix``: the last text less its last tokens. Text is kept, and every later
    prefix begins with it, once two successive steps agree on it and it is older than those
    tokens. Of what is kept, whole words are final, and whole characters where a language is
    written without spaces, so nothing that was given out is ever taken back.
    """

    def __init__(self, tokenizer: Tokenizer, language: str | None) -> None:
        self._tokenizer = tokenizer
        self._language = language
        self._stream = OutputStream(language=language)
        self._raw = ""  # the last answer, with its prefix
        self._kept = ""  # what all later answers begin with
        self._num_read = 0  # characters of it that the output stream has taken
        self._steps = 0
        self.prefix = ""
        self.text = ""  # final

    @property
    def tentative(self) -> str:
        """What follows the final text for now."""
        return parse_output(self._raw, language=self._language).text[len(self.text) :]

    @property
    def language(self) -> str | None:
        return self._stream.language

    def accept(self, answer: str, *, is_cut_off: bool = False) -> str:
        """Take what the model wrote after the prefix; returns the text that became final.

        An answer that was cut off, at its token limit or as a loop, is believed less: the next
        step starts from what is kept.
        """
        previous = self._raw if self._steps else None
        self._raw = self.prefix + answer.replace("\ufffd", "")
        self._steps += 1
        stable = "" if is_cut_off or not self._has_text() else self._roll_back()
        if previous is not None:
            agreed = commonprefix([previous, stable])
            self._kept = max(self._kept, agreed, key=len)
        is_fixed = self._steps >= UNFIXED_STEPS
        self.prefix = max(self._kept, stable, key=len) if is_fixed else self._kept
        return self._read(_whole_words(self._kept, start=self._num_read))

    def finish(self) -> str:
        """The rest of the text: no more is decoded."""
        delta = self._stream.push(self._raw[self._num_read :]) + self._stream.finish()
        self.text += delta
        return delta

    def _has_text(self) -> bool:
        return bool(parse_output(self._raw, language=self._language).text)

    def _read(self, end: int) -> str:
        delta = self._stream.push(self._raw[self._num_read : end])
        self._num_read = end
        self.text += delta
        return delta

    def _roll_back(self) -> str:
        """The last answer less 5 tokens, or more where that would cut a character in pieces."""
        ids = self._tokenizer.encode(self._raw, add_special_tokens=False)
        for end in range(len(ids) - UNFIXED_TOKENS, 0, -1):
            text = self._tokenizer.decode(ids[:end])
            if "\ufffd" not in text and self._raw.startswith(text):
                return text
        return ""


def _whole_words(text: str, *, start: int) -> int:
    """Where the last whole word or spaceless character of ``text`` ends, from ``start`` on.

    The very last character as a reader sees it is left out: marks may still join it.
    """
    *graphemes, _ = regex.findall(r"\X", text[start:]) or [""]
    after = text[start + sum(map(len, graphemes)) :]
    while graphemes and separator(graphemes[-1], after):
        after = graphemes.pop() + after
    return len(text) - len(after) if graphemes else start


# turns --------------------------------------------------------------------------------------


# the stream ---------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class StreamRequest:
    """A clip so far for the engine to decode, greedily."""

    prompt: str
    windows: list[Window]
    decoding: Decoding

    @property
    def engine_prompt(self) -> dict[str, Any]:
        """The request as vLLM takes it."""
        return {
            "prompt": self.prompt,
            "multi_modal_data": {"audio": self.windows},
            "multi_modal_uuids": {"audio": [window.uuid for window in self.windows]},
        }


@dataclass(frozen=True)
class Update:
    """What became final since the last update, and what may follow it for now."""

    delta: str
    tentative: str


class Stream:
    """The text of speech that comes piece by piece: one utterance, or a session of hours.

        stream.push(samples)
        while request := stream.request():
            stream.accept(engine(request))
            show(stream.update())

    A request takes all audio up to the last whole step, so an engine that falls behind is asked
    less often, never about less. After ``clip_s`` seconds a clip ends at the next pause, after
    ``max_clip_s`` anywhere, and another begins, with its last sentence for context. What is
    silent, below -66 dBFS, is not sent for its own sake.

    Raises ValueError for an unknown language or lengths that do not fit.
    """

    _is_silence: bool  # all of the clip so far

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        geometry: Geometry,
        loudest: Callable[[Window], float],
        language: str | None = None,
        context: str = "",
        step_s: float = STEP_S,
        clip_s: float = CLIP_S,
        max_clip_s: float = HARD_CLIP_S,
    ) -> None:
        if not (MIN_STEP_S <= step_s <= clip_s <= max_clip_s <= MAX_CLIP_S):
            raise ValueError(
                f"step_s, clip_s, max_clip_s are {step_s:g}, {clip_s:g}, {max_clip_s:g}; they must "
                f"rise from at least {MIN_STEP_S:g} to at most {MAX_CLIP_S} s."
            )
        self._language = resolve_language(language)
        self._context = context
        self._step, self._soft_end, self._hard_end = (
            round(seconds * SAMPLE_RATE) for seconds in (step_s, clip_s, max_clip_s)
        )
        self._new_draft = lambda: Draft(tokenizer, self._language)
        self._new_clip = lambda samples: GrowingClip(samples, geometry, loudest)
        self._is_running = self._is_finished = self._is_closing = False
        self.is_cut_off = False  # a clip's last answer was a loop or reached its token limit
        self._unread = ""  # final text that no update has told
        self._asked = self._heard_to = 0  # samples of the clip that were sent, and answered
        self._begin(np.empty(0, np.float32), context)
        self.text = ""  # all that is final
        self.languages: list[str] = []  # in the order of their first use

    def push(self, samples: np.ndarray) -> None:
        """Take more samples, float32 at 16 kHz; raises ValueError for NaN and after the end."""
        if self._is_finished:
            raise ValueError("the stream has been finished; make another for more audio.")
        if not len(samples):
            return
        check_waveform(samples)
        self._clip.append(samples)
        if self._is_silence and is_silent(samples):
            self._begin(self._clip.samples[-round(PAUSE_S * SAMPLE_RATE) :].copy(), self._carried)
        else:
            self._is_silence = False

    def finish(self) -> None:
        """There is no more audio. What ``request`` gives from now on completes the text."""
        self._is_finished = True

    def request(self) -> StreamRequest | None:
        """What to run now; None while one runs and while there is too little to ask about."""
        while not self._is_running:
            end, self._is_closing = self._next_end()
            if end is None:
                return None
            new = self._clip.samples[self._asked : end]
            if not len(new) or is_silent(new):
                if not self._is_closing:
                    return None
                self._close(end)
                continue
            return self._ask(end)
        return None

    def accept(self, answer: str, finish_reason: str | None = "stop") -> None:
        """The engine's answer to the last request, and vLLM's word for why it ended."""
        self._is_running, is_cut_off = False, finish_reason != "stop"
        self._heard_to = self._asked
        self._tell(self._draft.accept(answer, is_cut_off=is_cut_off))
        if self._is_closing:
            self.is_cut_off |= is_cut_off
            self._close(self._asked)

    def update(self) -> Update:
        """The text since the last update."""
        delta, self._unread = self._unread, ""
        tentative = self._draft.tentative
        return Update(delta, self._seam(tentative) + tentative)

    @property
    def num_waiting(self) -> int:
        """Samples that no request has taken yet."""
        return self._clip.num_samples - self._asked

    @property
    def is_done(self) -> bool:
        return self._is_finished and not self._is_running and not self._clip.num_samples

    # --- clips ----------------------------------------------------------------------------------

    def _begin(self, samples: np.ndarray, context: str) -> None:
        """A new clip with these samples."""
        self._is_silence = not len(samples) or is_silent(samples)
        self._clip = self._new_clip(samples)
        self._draft = self._new_draft()
        self._carried = context
        self._asked = self._heard_to = 0

    def _close(self, end: int) -> None:
        """Nothing more is asked about the clip; the next begins with what comes after ``end``."""
        self._is_closing = False
        self._tell(self._draft.finish())
        language = self._draft.language
        if self._draft.text and language and language not in self.languages:
            self.languages.append(language)
        sentences = split_sentences(self._draft.text)
        last = sentences[-1].strip()[-_MAX_CARRIED:] if sentences else ""
        context = "\n".join(filter(None, (self._context, last)))
        self._begin(self._clip.samples[end:], context)

    def _next_end(self) -> tuple[int | None, bool]:
        """Up to which sample to ask, if to ask at all, and whether the clip ends there."""
        clip = self._clip.samples
        if len(clip) >= self._soft_end and (cut := self._pause(clip)):
            return cut, True
        if self._is_finished:
            return (len(clip), True) if len(clip) else (None, False)
        silence = clip[max(self._asked, len(clip) - round(SILENCE_S * SAMPLE_RATE)) :]
        if len(silence) >= SILENCE_S * SAMPLE_RATE and is_silent(silence):
            return len(clip), True
        end = (len(clip) - GUARD_SAMPLES) // self._step * self._step + GUARD_SAMPLES
        return (end, False) if end > max(self._asked, GUARD_SAMPLES) else (None, False)

    def _pause(self, clip: np.ndarray) -> int | None:
        """Where the clip ends: in the widest pause that was not asked about yet, if one is there;
        at its hard end where it is quietest."""
        end = min(len(clip), self._hard_end)
        start = max(self._asked, self._soft_end - self._step)
        before = max(0, end - round(_PAUSE_SEARCH_S * SAMPLE_RATE))
        quiet = quiet_frames(clip[before:end])
        quiet[: -(-max(0, start - before) // HOP_LENGTH)] = False
        edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
        if len(edges):
            first, last = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
            if (last - first) * HOP_LENGTH >= PAUSE_S * SAMPLE_RATE or end == self._hard_end:
                return before + (first + last) // 2 * HOP_LENGTH
        return end if end == self._hard_end else None

    # --- requests and text ----------------------------------------------------------------------

    def _ask(self, end: int) -> StreamRequest:
        windows = self._clip.windows(end)
        since = self._heard_to if self._draft.prefix else 0
        prompt = build_prompt(
            context=self._carried, language=self._language, num_windows=len(windows)
        )
        self._asked, self._is_running = end, True
        return StreamRequest(
            prompt=prompt + self._draft.prefix,
            windows=windows,
            decoding=Decoding(max_new_tokens((end - since) / SAMPLE_RATE)),
        )

    def _seam(self, text: str) -> str:
        """What stands between the final text and the first of a clip's."""
        return "" if self._draft.text else separator(self.text, text)

    def _tell(self, delta: str) -> None:
        if delta:
            starts_clip = self._draft.text == delta
            delta = (separator(self.text, delta) if starts_clip else "") + delta
            self.text += delta
            self._unread += delta
