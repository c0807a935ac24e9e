# SPDX-License-Identifier: Apache-2.0
"""Streaming transcription without an engine: which request comes next, which text is final.

    samples -> Stream.push        request() -> engine -> accept()        update() -> text

Each step decodes the whole clip so far; its prompt ends with the text so far, less the last
tokens (re-feed and roll back, as Qwen's own streaming does). A step costs the same after ten
seconds and after two minutes, because the clip is sent as its attention windows of 8 s, one
multimodal item each. A finished window never changes, so vLLM finds it by its hash in the encoder
cache and the prefix cache. Only the unfinished window and a few tokens of text are new.

      |<-- window 0 -->|<-- window 1 -->|<- 2 ->|         new samples are appended here
       finished, cached  finished, cached  new

Two things would change a finished window. Its last frame sees 40 samples of the next window, so a
window is finished once they exist. And the floor of the log-mel spectrogram depends on the
loudest bin of the clip, so a window carries it; when it rises, all windows of the clip are new.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from .decoding import Decoding, likeliest_language, max_new_tokens
from .drafts import Draft
from .geometry import HOP_LENGTH, MAX_CLIP_S, SAMPLE_RATE, Geometry
from .languages import separator
from .pauses import is_silent, quiet_frames
from .peaks import check_waveform
from .prompt import (
    PUBLISHED,
    TextProtocol,
    build_prompt,
    sanitize_context,
)
from .segments import split_sentences
from .transcript import Token
from .windows import GUARD_SAMPLES, GrowingClip, Tokenizer, Window

MIN_STEP_S = 0.1  # shortest step in seconds
STEP_S = 2.0  # seconds of new audio per step
CLIP_S = 60.0  # seconds after which a clip ends at the next pause
HARD_CLIP_S = 120.0  # seconds after which a clip ends without a pause
PAUSE_S = 0.3  # shortest pause in seconds that ends a clip
SILENCE_S = 5.0  # seconds of digital silence that end a clip

_PAUSE_SEARCH_S = 10.0  # seconds of speech that a pause is compared with
_MAX_CARRIED = 200  # characters of the last sentence in the next clip's context


@dataclass(frozen=True, eq=False)
class StreamRequest:
    """A clip so far, for the engine to decode greedily."""

    prompt: str
    windows: list[Window]
    decoding: Decoding

    @property
    def engine_prompt(self) -> dict[str, Any]:
        """The request in vLLM's terms."""
        return {
            "prompt": self.prompt,
            "multi_modal_data": {"audio": self.windows},
            "multi_modal_uuids": {"audio": [window.uuid for window in self.windows]},
        }


@dataclass(frozen=True)
class Update:
    """The text that became final since the last update, and what follows it for now."""

    delta: str
    tentative: str
    tokens: tuple[Token, ...] = ()  # of the delta, where they are wanted
    language: str | None = field(default=None, compare=False)  # the last one named


@dataclass(frozen=True)
class _Cuts:
    """Where a clip is decoded to and where it ends, in samples."""

    step: int
    soft_end: int
    hard_end: int

    def next_end(
        self, clip: np.ndarray, *, sent: int, is_finished: bool, is_paused: bool
    ) -> tuple[int | None, bool]:
        """Return the last sample to decode (None: none yet), and whether the clip ends there."""
        if len(clip) >= self.soft_end:
            start = max(sent, self.soft_end - self.step)
            if cut := _pause(clip, start=start, hard_end=self.hard_end):
                return cut, True
        if is_finished:
            return (len(clip), True) if len(clip) else (None, False)
        silence = clip[max(sent, len(clip) - round(SILENCE_S * SAMPLE_RATE)) :]
        if len(silence) >= SILENCE_S * SAMPLE_RATE and is_silent(silence):
            return len(clip), True
        if is_paused:
            return (len(clip), False) if len(clip) > sent else (None, False)
        end = (len(clip) - GUARD_SAMPLES) // self.step * self.step + GUARD_SAMPLES
        return (end, False) if end > max(sent, GUARD_SAMPLES) else (None, False)


@dataclass(frozen=True)
class _Options:
    """Options that decide the text of a stream; ``candidates`` are languages to detect one of."""

    protocol: TextProtocol
    language: str | None
    candidates: tuple[str, ...]
    context: str


def _options(
    protocol: TextProtocol,
    language: str | None,
    languages: Sequence[str],
    context: str,
    *,
    skip_special_tokens: bool,
) -> _Options:
    """Return the options with the names of languages. Raises ValueError for an unknown one."""
    resolve = protocol.languages.resolve
    names = tuple(dict.fromkeys(filter(None, map(resolve, languages))))
    forced = resolve(language) or (names[0] if len(names) == 1 else None)
    protocol = replace(protocol, keeps_special_tokens=not skip_special_tokens)
    return _Options(protocol, forced, () if forced else names, context)


class Stream:
    """The text of incremental speech: one utterance, or a session of hours.

        stream.push(samples)
        while request := stream.request():
            stream.accept(engine(request))
            show(stream.update())

    A request takes all audio up to the last whole step, so an engine that falls behind gets fewer
    requests, and no audio is skipped. After ``clip_s`` seconds a clip ends at the next pause, after
    ``max_clip_s`` anywhere; the next clip has its last sentence as context. Silence below
    -66 dBFS alone causes no request. ``languages`` are the candidates for detection. With
    ``wants_logprobs``, updates have the tokens that the engine gave to ``accept``. With
    ``wants_completeness``, the attribute ``completeness`` follows the last output. Without
    ``skip_special_tokens`` the text has the checkpoint's special tokens.

    Raises ValueError for an unknown language or lengths that do not fit.
    """

    _draft: Draft
    _is_silence: bool  # whether all of the clip so far is silent

    def __init__(
        self,
        *,
        tokenizer: Tokenizer,
        geometry: Geometry,
        loudest: Callable[[Window], float],
        protocol: TextProtocol = PUBLISHED,
        language: str | None = None,
        languages: Sequence[str] = (),
        context: str = "",
        wants_logprobs: bool = False,
        wants_completeness: bool = False,
        skip_special_tokens: bool = True,
        step_s: float = STEP_S,
        clip_s: float = CLIP_S,
        max_clip_s: float = HARD_CLIP_S,
    ) -> None:
        if not (MIN_STEP_S <= step_s <= clip_s <= max_clip_s <= MAX_CLIP_S):
            raise ValueError(
                f"step_s, clip_s, max_clip_s are {step_s:g}, {clip_s:g}, {max_clip_s:g}; they must "
                f"rise from at least {MIN_STEP_S:g} to at most {MAX_CLIP_S} s."
            )
        self._options = _options(
            protocol, language, languages, context, skip_special_tokens=skip_special_tokens
        )
        self._wants_logprobs, self._wants_completeness = wants_logprobs, wants_completeness
        self._cuts = _Cuts(*(round(s * SAMPLE_RATE) for s in (step_s, clip_s, max_clip_s)))
        self._new_draft = lambda: Draft(tokenizer, self._options.language, self._options.protocol)
        self._new_clip = lambda samples: GrowingClip(samples, geometry, loudest)
        self._is_running = self._is_finished = self._is_closing = False
        self._is_outdated = False  # whether the draft is of other options, and nothing may be new
        self.completeness = 0.0  # probability that the text is that of a complete utterance
        self.is_cut_off = False  # whether a clip ended in a loop or at its token limit
        self._unread = ""  # final text that is in no update yet
        self._unread_tokens: list[Token] = []
        self._last_sentence = ""  # of the clip before
        self._sent = self._decoded = 0  # samples of the clip that were sent, and decoded
        self._begin(np.empty(0, np.float32))
        self.text = ""  # all final text
        self.tokens: list[Token] = []  # of all final text, where they are wanted
        self.languages: list[str] = []  # in order of first use

    def configure(
        self,
        *,
        language: str | None = None,
        languages: Sequence[str] = (),
        context: str = "",
        wants_logprobs: bool = False,
        wants_completeness: bool = False,
        skip_special_tokens: bool = True,
        step_s: float = STEP_S,
    ) -> None:
        """Change the options between two requests. Final text stays; the rest is decoded again.

        Raises ValueError for an unknown language, and RuntimeError while a request runs.
        """
        if self._is_running:
            raise RuntimeError("a request runs; pass its output to accept() before configure().")
        before, protocol = self._options, self._options.protocol
        self._options = _options(
            protocol, language, languages, context, skip_special_tokens=skip_special_tokens
        )
        self._wants_logprobs, self._wants_completeness = wants_logprobs, wants_completeness
        self._cuts = replace(self._cuts, step=round(step_s * SAMPLE_RATE))
        if before != self._options:
            self._restart(self._options.language)

    def push(self, samples: np.ndarray) -> None:
        """Append samples, float32 at 16 kHz.

        Raises ValueError for NaN and samples beyond ``peaks.MAX_PEAK``, and after ``finish``.
        """
        if self._is_finished:
            raise ValueError("the stream is finished; create another one for more audio.")
        if not len(samples):
            return
        check_waveform(samples)
        self._clip.append(samples)
        if self._is_silence and is_silent(samples):
            self._begin(self._clip.samples[-round(PAUSE_S * SAMPLE_RATE) :].copy())
        else:
            self._is_silence = False

    def finish(self) -> None:
        """End the audio. The remaining requests complete the text."""
        self._is_finished = True

    def request(self, *, is_paused: bool = False) -> StreamRequest | None:
        """Return the next request; None while one runs, or while there is too little audio.

        In a pause, it takes all audio so far at once, also within a step.
        """
        while not self._is_running:
            clip, sent, is_finished = self._clip.samples, self._sent, self._is_finished
            end, self._is_closing = self._cuts.next_end(
                clip, sent=sent, is_finished=is_finished, is_paused=is_paused
            )
            if end is None:
                return None
            new = clip[sent:end]
            if not self._is_outdated and (not len(new) or is_silent(new)):
                if not self._is_closing:
                    return None
                self._close(end)
                continue
            return self._ask(end)
        return None

    def accept(
        self,
        output: str,
        finish_reason: str | None = "stop",
        *,
        tokens: Sequence[Token] = (),
        language_logprobs: Mapping[str, float] | None = None,
    ) -> None:
        """Take the engine's output for the last request, and vLLM's finish reason.

        ``tokens`` and ``language_logprobs`` are those that the request's ``decoding`` wants.
        """
        self._is_running, is_cut_off = False, finish_reason != "stop"
        if self._draft.is_in_another_language(output, self._options.candidates):
            self._is_closing = False
            self._restart(likeliest_language(self._options.candidates, language_logprobs or {}))
            return
        self._decoded = self._sent
        own_tokens = tokens if self._wants_logprobs else ()
        self._emit(self._draft.accept(output, is_cut_off=is_cut_off, tokens=own_tokens))
        self.completeness = 0.0 if is_cut_off else self._draft.completeness(tokens)
        if self._is_closing:
            self.is_cut_off |= is_cut_off
            self._close(self._sent)

    def update(self) -> Update:
        """Return the text since the last update."""
        delta, self._unread = self._unread, ""
        tokens, self._unread_tokens = self._unread_tokens, []
        tentative = self._draft.tentative
        language = next(iter([*self._draft.languages, *self.languages[::-1]]), None)
        return Update(delta, self._seam(tentative) + tentative, tuple(tokens), language)

    @property
    def codes(self) -> list[str]:
        """The codes of the languages."""
        return list(map(self._options.protocol.languages.code, self.languages))

    @property
    def num_waiting(self) -> int:
        """Samples that are in no request yet."""
        return self._clip.num_samples - self._sent

    @property
    def is_done(self) -> bool:
        return self._is_finished and not self._is_running and not self._clip.num_samples

    # --- clips ----------------------------------------------------------------------------------

    def _restart(self, language: str | None) -> None:
        """Decode the clip again in a language, after its final text."""
        self._draft = self._draft.restarted(language, self._options.protocol)
        self._sent = self._decoded
        self._is_outdated = self._decoded > 0

    def _begin(self, samples: np.ndarray) -> None:
        """Start a clip with these samples."""
        self._is_silence = not len(samples) or is_silent(samples)
        self._clip = self._new_clip(samples)
        self._draft = self._new_draft()
        self._sent = self._decoded = 0
        self._is_outdated = False

    def _close(self, end: int) -> None:
        """End the clip; the next one starts with the samples after ``end``."""
        self._is_closing = False
        self._emit(self._draft.finish())
        if self._draft.text:
            self.languages = list(dict.fromkeys([*self.languages, *self._draft.languages]))
        sentences = split_sentences(self._draft.text)
        control_tokens = self._options.protocol.control_tokens
        last = sanitize_context(sentences[-1] if sentences else "", control_tokens)
        self._last_sentence = last.strip()[-_MAX_CARRIED:]
        self._begin(self._clip.samples[end:])

    # --- requests and text ----------------------------------------------------------------------

    def _ask(self, end: int) -> StreamRequest:
        windows = self._clip.windows(end)
        since = self._decoded if self._draft.prefix and not self._is_outdated else 0
        language, prefix = self._draft.forced_language, self._draft.prefix
        options, protocol = self._options, self._options.protocol
        context = "\n".join(filter(None, (options.context, self._last_sentence)))
        prompt = build_prompt(
            context=context, language=language, num_windows=len(windows), protocol=protocol
        )
        names = ("None", *options.candidates) if not language and not prefix else ()
        self._sent, self._is_running, self._is_outdated = end, True, False
        return StreamRequest(
            prompt=prompt + prefix,
            windows=windows,
            decoding=Decoding(
                max_new_tokens((end - since) / SAMPLE_RATE),
                wants_logprobs=self._wants_logprobs or self._wants_completeness,
                scored_languages=names if options.candidates else (),
                special_tokens=protocol.special_tokens,
            ),
        )

    def _seam(self, text: str) -> str:
        """Return the separator between the final text and the first text of a clip."""
        return "" if self._draft.text else separator(self.text, text)

    def _emit(self, delta: str) -> None:
        if delta:
            starts_clip = self._draft.text == delta
            seam = separator(self.text, delta) if starts_clip else ""
            delta = seam + delta
            self.text += delta
            self._unread += delta
            if self._wants_logprobs:
                tokens = self._draft.new_tokens()
                if tokens:  # joined, they are the text
                    tokens[0] = replace(tokens[0], text=seam + tokens[0].text)
                self.tokens += tokens
                self._unread_tokens += tokens


def _pause(clip: np.ndarray, *, start: int, hard_end: int) -> int | None:
    """Return where the clip ends: in the widest pause after ``start``, else at its hard end."""
    end = min(len(clip), hard_end)
    before = max(0, end - round(_PAUSE_SEARCH_S * SAMPLE_RATE))
    quiet = quiet_frames(clip[before:end])
    quiet[: -(-max(0, start - before) // HOP_LENGTH)] = False
    edges = np.flatnonzero(np.diff(quiet, prepend=False, append=False)).reshape(-1, 2)
    if len(edges):
        first, last = edges[np.argmax(edges[:, 1] - edges[:, 0])].tolist()
        if (last - first) * HOP_LENGTH >= PAUSE_S * SAMPLE_RATE or end == hard_end:
            return before + (first + last) // 2 * HOP_LENGTH
    return end if end == hard_end else None
