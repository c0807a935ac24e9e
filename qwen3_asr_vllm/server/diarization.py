# SPDX-License-Identifier: Apache-2.0
"""Speakers of a request: one in each channel of a call, or those that a diarizer finds.

A stereo call has a speaker in each channel. Any other recording, mono or a mix in stereo, goes to
the diarizer that QWEN3_ASR_DIARIZER_URL names.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from ..diarizers import MAX_VOICE_S, MIN_VOICE_S, DiarizerError
from ..geometry import SAMPLE_RATE
from ..media.blocks import ChannelError
from ..pauses import SILENT_PEAK, is_silent
from ..speakers import DiarizationOutput, DiarizationRequest
from .admission import RETRY_AFTER_S
from .bodies import decode_base64
from .diarizer_client import RemoteDiarizer
from .errors import ApiError
from .fields import VOICES
from .form import SPEAKERS, Form

MAX_LIKENESS = 0.5  # correlation of two channels with a speaker each; those of a mix have more
_BY_CHANNEL = (
    "Without a diarizer, speakers are separated by channel, one each; verbose_json has timed "
    "segments of any recording. Start the server with: qwen3-asr serve MODEL --diarizer "
    "pyannote/speaker-diarization-community-1."
)

Load = Callable[..., Any]  # loads the recording of the form: with a loader, and its options


def load_speakers(
    form: Form, load: Load, decoders: Any, *, has_diarizer: bool
) -> np.ndarray | list[np.ndarray]:
    """Return the two channels of a call, or the waveform of another recording.

    Raises ApiError where there is no diarizer for it.
    """
    if form.is_mixed and not has_diarizer:
        name = next(iter(form.speaker_counts), VOICES)
        message = f"{name}: speakers and voices are found by a diarizer. {_BY_CHANNEL}"
        raise ApiError(400, message, param=name)
    if form.is_mixed:
        _refuse_channel_names(form)
        return _mono(load, decoders)
    try:
        channels = load(decoders.load_channels, len(SPEAKERS))
    except ApiError as error:
        if not isinstance(error.__cause__, ChannelError):
            raise
        if not has_diarizer:
            message = f"{error} {_BY_CHANNEL}"
            raise ApiError(400, message, param="response_format") from error
        _refuse_channel_names(form)
        return _mono(load, decoders)
    if not has_diarizer:
        _check_channels(channels)
        return list(channels)
    if _is_call(channels):
        return list(channels)
    _refuse_channel_names(form)
    return _mixed(channels)


def _mono(load: Load, decoders: Any) -> np.ndarray:
    waveform: np.ndarray = load(decoders.load_audio)
    return waveform


def _refuse_channel_names(form: Form) -> None:
    """Raise ApiError for names without voices where no channel has them."""
    if form.known_speaker_names and not form.known_speaker_references:
        message = (
            "known_speaker_names: the recording has no channel for each speaker; send "
            f"{VOICES}, a few seconds of each voice, or no names."
        )
        raise ApiError(400, message, param="known_speaker_names")


def _check_channels(channels: Sequence[np.ndarray]) -> None:
    """Raise ApiError if both channels are the same: each holds all speakers."""
    left, right = channels
    if np.abs(left - right).max() < SILENT_PEAK:
        message = f"both channels hold the same audio. {_BY_CHANNEL}"
        raise ApiError(400, message, param="response_format")


def _is_call(channels: Sequence[np.ndarray]) -> bool:
    """Return whether each channel has speech of its own."""
    if any(map(is_silent, channels)):
        return False
    left, right = channels
    likeness = abs(float(left @ right)) / float(np.linalg.norm(left) * np.linalg.norm(right))
    return likeness <= MAX_LIKENESS


def _mixed(channels: Sequence[np.ndarray]) -> np.ndarray:
    """Return the mean of the channels that are not silent."""
    spoken = [channel for channel in channels if not is_silent(channel)] or channels[:1]
    return np.asarray(np.mean(spoken, axis=0, dtype=np.float32))


def known_speakers(form: Form, decoders: Any) -> dict[str, np.ndarray]:
    """Decode the voices of a form, each of 1 to 30 s. Raises ApiError that names a wrong one."""
    voices: dict[str, np.ndarray] = {}
    pairs = zip(form.known_speaker_names, form.known_speaker_references, strict=False)
    for number, (name, reference) in enumerate(pairs):
        try:
            voices[name] = _voice(reference, decoders)
        except (ValueError, ImportError) as error:
            message = f"{VOICES}[{number}]: {error}"
            raise ApiError(400, message, param=VOICES) from error
    return voices


def _voice(reference: str, decoders: Any) -> np.ndarray:
    """Decode one voice, from base64 with or without the head of a data URL."""
    content = reference.partition(",")[2] if reference.startswith("data:") else reference
    file = io.BytesIO(b"".join(decode_base64(content)))
    ignore: Callable[[object], None] = partial(_ignore)
    voice: np.ndarray = decoders.load_audio(file, max_duration_s=MAX_VOICE_S, on_warning=ignore)
    if len(voice) < MIN_VOICE_S * SAMPLE_RATE or is_silent(voice):
        raise ValueError(
            f"it has {len(voice) / SAMPLE_RATE:.1f} s of audio; send {MIN_VOICE_S:g} to "
            f"{MAX_VOICE_S:g} s of one voice."
        )
    return voice


def _ignore(_: object) -> None:
    pass


async def check_is_up(diarizer: RemoteDiarizer) -> None:
    """Raise ApiError if the diarizer is down."""
    if not await diarizer.is_up():
        raise no_speakers(f"the diarizer at {diarizer.url} does not answer")


async def ask(diarizer: RemoteDiarizer, request: DiarizationRequest) -> DiarizationOutput:
    """Return the turns of a recording. Raises ApiError if there are none to have."""
    try:
        output = await diarizer.answer(request)
    except DiarizerError as error:
        raise ApiError(400, str(error), param=str(error).split(maxsplit=1)[0].strip(":")) from error
    if output.error:
        raise no_speakers(output.error)
    return output


def no_speakers(reason: str) -> ApiError:
    return ApiError(
        503,
        f"speakers cannot be found now: {reason}. Retry later, or use verbose_json without them.",
        param="diarize",
        code="diarizer_unavailable",
        retry_after_s=RETRY_AFTER_S,
    )
