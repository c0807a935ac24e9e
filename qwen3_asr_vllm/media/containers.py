# SPDX-License-Identifier: Apache-2.0
"""The containers that recordings come in, and the media types of audio without one.

One table serves the decoders, the search of folders and the route ``/about``. Audio without a
header needs a media type or a suffix.
"""

from __future__ import annotations

from dataclasses import dataclass
from email.message import Message
from typing import NamedTuple


class Container(NamedTuple):
    """A container of audio: its name, suffixes and decoders."""

    name: str
    suffixes: str  # without dots
    libsndfile: str | None  # its name there, if libsndfile reads it
    ffmpeg: str  # the demuxer
    codec: str  # the one that files of this name mostly hold


CONTAINERS = (
    Container("wav", "wav wave rf64 w64", "WAV", "wav", "pcm_s16le"),
    Container("flac", "flac", "FLAC", "flac", "flac"),
    Container("mp3", "mp3 mpga mp2 mp1", "MP3", "mp3", "mp3float"),
    Container("ogg", "ogg oga ogv ogx spx", "OGG", "ogg", "vorbis"),
    Container("opus", "opus", "OGG", "ogg", "opus"),
    Container("aiff", "aiff aif aifc", "AIFF", "aiff", "pcm_s16be"),
    Container("au", "au snd", "AU", "au", "pcm_s16be"),
    Container("caf", "caf", "CAF", "caf", "pcm_s16be"),
    Container("m4a", "m4a m4b m4r f4a f4b", None, "mov", "aac"),
    Container("mp4", "mp4 m4v mov qt qta 3gp 3gpp 3g2 3ga", None, "mov", "aac"),
    Container("aac", "aac adts", None, "aac", "aac"),
    Container("webm", "webm weba mkv mka", None, "matroska", "opus"),
    Container("wma", "wma wmv asf", None, "asf", "wmav2"),
    Container("amr", "amr awb", None, "amr", "amrnb"),
    Container("ts", "ts mts m2t m2ts mpg mpeg m2p vob", None, "mpegts", "aac"),
    Container("avi", "avi divx", None, "avi", "mp3float"),
    Container("flv", "flv f4v", None, "flv", "aac"),
    Container("ac3", "ac3 eac3 ec3", None, "ac3", "ac3"),
    Container("dts", "dts", None, "dts", "dca"),
    Container("mxf", "mxf", None, "mxf", "pcm_s16le"),
    Container("wv", "wv", None, "wv", "wavpack"),
    Container("ape", "ape", None, "ape", "ape"),
    Container("tta", "tta", None, "tta", "tta"),
    Container("voc", "voc", "VOC", "voc", "pcm_u8"),
    Container("sph", "sph nist", "NIST", "nistsphere", "pcm_s16be"),
    Container("gsm", "gsm", None, "gsm", "gsm"),
    Container("rm", "rm ra", None, "rm", "cook"),
    Container("wtv", "wtv", None, "wtv", "mp2"),
    Container("g729", "g729", None, "g729", "g729"),
)

# How files begin that may be joined to others.
SIGNATURES = (
    *(b"RIFF", b"RF64", b"RIFX", b"FORM", b"caff", b".snd", b"fLaC", b"OggS", b"ID3", b"#!AMR"),
    bytes.fromhex("726966662e91cf11a5d628db04c10000"),  # w64
    bytes.fromhex("1a45dfa3"),  # matroska and webm
    bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c"),  # asf, wma
)


@dataclass(frozen=True)
class RawAudio:
    """The encoding of audio without a header.

    ``encoding``: "pcm_s16le" and "pcm_s16be", signed 16-bit; "pcm_mulaw" and "pcm_alaw", G.711;
    "g729". Raises ValueError for another encoding, and for no rate or number of channels.
    """

    encoding: str
    sampling_rate: int = 8_000
    num_channels: int = 1

    def __post_init__(self) -> None:
        if self.encoding not in RAW_ENCODINGS:
            raise ValueError(
                f"encoding is {self.encoding!r}; use one of {', '.join(RAW_ENCODINGS)}."
            )
        if not 1_000 <= self.sampling_rate <= 768_000:
            raise ValueError(
                f"raw audio has a rate of {self.sampling_rate} Hz; allowed are 1000 to 768000 Hz."
            )
        if not 1 <= self.num_channels <= 64:
            raise ValueError(f"raw audio has {self.num_channels} channels; allowed are 1 to 64.")


RAW_ENCODINGS = ("pcm_s16le", "pcm_s16be", "pcm_mulaw", "pcm_alaw", "g729")
RAW_ADVICE = (
    "Raw audio has no header: send it as wav, or with a content type such as "
    "audio/L16;rate=16000, audio/pcmu or audio/pcma."
)
_RAW_TYPES = {  # encoding, and its sampling rate where the type implies one
    "basic": ("pcm_mulaw", 8_000),
    "pcmu": ("pcm_mulaw", 8_000),
    "mulaw": ("pcm_mulaw", 8_000),
    "ulaw": ("pcm_mulaw", 8_000),
    "pcma": ("pcm_alaw", 8_000),
    "alaw": ("pcm_alaw", 8_000),
    "l16": ("pcm_s16be", None),  # RFC 2586: big-endian, and the rate is required
    "pcm": ("pcm_s16le", None),
    "raw": ("pcm_s16le", None),
    "g729": ("g729", 8_000),
}
_RAW_SUFFIXES = {
    ".ulaw": "pcm_mulaw",
    ".mulaw": "pcm_mulaw",
    ".ul": "pcm_mulaw",
    ".alaw": "pcm_alaw",
    ".al": "pcm_alaw",
    ".g729": "g729",
}
# What a folder is searched for: recordings, and films for their sound.
AUDIO_SUFFIXES = frozenset(
    [f".{s}" for container in CONTAINERS for s in container.suffixes.split()] + [*_RAW_SUFFIXES]
)


def raw_audio(media_type: str | None) -> RawAudio | None:
    """Read the encoding of raw audio from a content type; None for any other content type.

    >>> raw_audio("audio/L16; rate=16000; channels=2")
    RawAudio(encoding='pcm_s16be', sampling_rate=16000, num_channels=2)

    Raises ValueError where the rate is missing or is no number.
    """
    message = Message()
    message["content-type"] = media_type or ""
    kind, _, subtype = message.get_content_type().partition("/")
    known = _RAW_TYPES.get(subtype.removeprefix("x-"))
    if kind != "audio" or known is None:
        return None
    encoding, rate = known
    given = message.get_param("rate") or rate
    if given is None:
        raise ValueError(f"{media_type} states no rate; send audio/{subtype};rate=16000.")
    channels = message.get_param("channels") or 1
    if not (str(given).isdecimal() and str(channels).isdecimal()):
        raise ValueError(f"{media_type}: rate and channels are whole numbers.")
    return RawAudio(encoding, int(str(given)), int(str(channels)))


def raw_audio_of_name(name: str) -> RawAudio | None:
    """Read the encoding of raw audio from a file name: G.711 and G.729, at 8 kHz."""
    suffix = "." + name.rpartition(".")[2].lower()
    encoding = _RAW_SUFFIXES.get(suffix)
    return RawAudio(encoding) if encoding else None
