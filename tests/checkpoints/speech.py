# SPDX-License-Identifier: Apache-2.0
"""Speech from text: espeak-ng (called in process, so that it tells times) and flite.

Every utterance is mono 16 kHz int16. ``TRAIN_VOICES`` are used in training,
``HELD_OUT_VOICES`` only in evaluation. A voice is ``engine:name``; an espeak-ng name
is ``accent+variant``.
"""

import ctypes
import json
import random
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import soundfile
import soxr

SAMPLE_RATE = 16_000  # samples per second
RATE, PITCH = 1, 3  # espeak-ng's parameter numbers
WORD_EVENT, PHONEME_EVENT = 1, 7
SPEAKING_RATE = {"English": (135, 195), "German": (135, 195), "Chinese": (160, 230)}  # words/min
FLITE_SHARE = 0.3  # of English

ACCENTS = {
    "English": ["en-us", "en-us", "en", "en-gb-x-rp"],
    "German": ["de"],
    "Chinese": ["cmn-latn-pinyin"],
}
TRAIN_VARIANTS = (
    "m1 m2 m3 m4 m6 m7 m8 f1 f2 f3 f5 Alex Alicia Andrea Denis Diogo Gene Henrique Hugo Lee Marco "
    "Mario Mike Nguyen RicishayMax Storm Tweaky adam anika antonio aunty belinda benjamin boris "
    "caleb david ed edward grandma grandpa gustave iven iven3 john kaukovalta klatt klatt2 klatt4 "
    "marcelo max michel miguel norbert pablo paul pedro quincy rob robert sandro shelby steph "
    "steph3 travis victor"
).split()
HELD_OUT_VARIANTS = "f4 m5 Andy Annie Jacky Michael linda zac".split()
TRAIN_FLITE = ["awb", "slt", "slt", "kal16", "kal"]
HELD_OUT_FLITE = ["rms"]


@dataclass(frozen=True)
class Utterance:
    """One spoken sentence.

    ``words`` holds (first character, start in seconds) of each word, if the engine tells;
    ``phones`` (name, start in seconds) of each sound, the empty name for silence.
    """

    text: str
    language: str
    voice: str
    waveform: np.ndarray
    phones: tuple[tuple[str, float], ...]
    words: tuple[tuple[int, float], ...] = ()


class _EspeakEvent(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),  # characters, from 1
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # milliseconds
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
)


class Espeak:
    """libespeak-ng, synchronous: returns a waveform and the times of phonemes and words."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL("libespeak-ng.so.1")
        self._sample_rate = self._library.espeak_Initialize(2, 0, None, 1)  # phonemes
        self._chunks: list[np.ndarray] = []
        self._phones: list[tuple[str, float]] = []
        self._words: list[tuple[int, float]] = []
        self._callback = _CALLBACK(self._receive)  # kept alive: the library holds a bare pointer
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples, num_samples: int, events) -> int:  # noqa: ANN001
        if num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        index = 0
        while events[index].type:
            event = events[index]
            time = event.audio_position / 1000
            if event.type == WORD_EVENT and event.text_position:  # a pause has position 0
                self._words.append((event.text_position - 1, time))
            if event.type == PHONEME_EVENT:
                self._phones.append(("" if event.id.startswith(b"_") else event.id.decode(), time))
            index += 1
        return 0

    def __call__(
        self, text: str, voice: str, *, rate: int, pitch: int
    ) -> tuple[np.ndarray, list[tuple[str, float]], list[tuple[int, float]]]:
        self._chunks, self._phones, self._words = [], [], []
        if self._library.espeak_SetVoiceByName(voice.encode()):
            raise ValueError(f"espeak-ng has no voice {voice!r}; see `espeak-ng --voices`.")
        self._library.espeak_SetParameter(RATE, rate, 0)
        self._library.espeak_SetParameter(PITCH, pitch, 0)
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, 1, None, None)
        waveform = soxr.resample(np.concatenate(self._chunks), self._sample_rate, SAMPLE_RATE)
        return waveform, self._phones, self._words


@cache
def espeak() -> Espeak:
    return Espeak()


def flite(
    text: str, voice: str, *, stretch: float, pitch: float
) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Speech of flite and its phonemes, ``stretch`` times as long as its ordinary speech."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = ["flite", "-voice", voice, "--setf", f"duration_stretch={stretch:.2f}"]
        if voice.startswith("kal"):
            command += ["--setf", f"int_f0_target_mean={pitch:.0f}"]
        command += ["-psdur", "-t", text, "-o", wav.name]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        waveform, sample_rate = soundfile.read(wav.name, dtype="int16")
    phones, start = [], 0.0
    for entry in printed.split():
        name, _, end = entry.rpartition(":")
        phones.append(("" if name == "pau" else name, start))
        start = float(end)
    return soxr.resample(waveform, sample_rate, SAMPLE_RATE), phones


def say(text: str, language: str, voice: str, rng: random.Random) -> Utterance:
    """Speak ``text`` at a random speed and pitch."""
    engine, name = voice.split(":")
    words: list[tuple[int, float]] = []
    if engine == "flite":
        stretch, pitch = rng.uniform(0.85, 1.25), rng.uniform(75, 140)
        waveform, phones = flite(text, name, stretch=stretch, pitch=pitch)
    else:
        rate, pitch = rng.randint(*SPEAKING_RATE[language]), rng.randint(30, 70)
        waveform, phones, words = espeak()(text, name, rate=rate, pitch=pitch)
    named = tuple((f"{engine} {language} {phone}" if phone else "", at) for phone, at in phones)
    return Utterance(text, language, voice, waveform, named, tuple(words))


def pick_voice(language: str, rng: random.Random, *, held_out: bool) -> str:
    if language == "English" and rng.random() < FLITE_SHARE:
        return "flite:" + rng.choice(HELD_OUT_FLITE if held_out else TRAIN_FLITE)
    variant = rng.choice(HELD_OUT_VARIANTS if held_out else TRAIN_VARIANTS)
    return f"espeak:{rng.choice(ACCENTS[language])}+{variant}"


def _say_part(part: tuple[list[tuple[str, str]], bool, int]) -> list[Utterance]:
    texts, held_out, seed = part
    rng = random.Random(seed)
    return [
        say(text, language, pick_voice(language, rng, held_out=held_out), rng)
        for text, language in texts
    ]


def say_all(
    texts: list[tuple[str, str]], *, held_out_voices: bool, seed: int, num_processes: int
) -> list[Utterance]:
    """Speak (text, language) pairs in random voices, in parallel; same seed, same voices."""
    parts = [texts[start : start + 500] for start in range(0, len(texts), 500)]
    jobs = [(part, held_out_voices, seed + index) for index, part in enumerate(parts)]
    with ProcessPoolExecutor(num_processes) as pool:
        return [utterance for part in pool.map(_say_part, jobs) for utterance in part]


def save_corpus(utterances: list[Utterance], folder: Path) -> None:
    """Write ``audio.npy`` (all samples end to end) and ``corpus.jsonl`` (one line each)."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "audio.npy", np.concatenate([u.waveform for u in utterances]))
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as lines:
        for utterance in utterances:
            entry = asdict(utterance) | {"waveform": len(utterance.waveform)}
            lines.write(json.dumps(entry, ensure_ascii=False) + "\n")


def load_corpus(folder: Path) -> list[Utterance]:
    """Read a corpus back; the samples stay on disk until used."""
    samples = np.load(folder / "audio.npy", mmap_mode="r")
    utterances, start = [], 0
    for line in open(folder / "corpus.jsonl", encoding="utf-8"):
        entry = json.loads(line)
        end = start + entry["waveform"]
        utterances.append(Utterance(**entry | {"waveform": samples[start:end]}))
        start = end
    return utterances
