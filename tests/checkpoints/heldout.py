# SPDX-License-Identifier: Apache-2.0
"""Recordings to evaluate on: sentences, and for one half voices, that training never used.

Run as a script, it writes the small set and the demo recordings that ship in ``tests/data``:

    python tests/checkpoints/heldout.py
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import grammar
import numpy as np
import samples
import soundfile
import speech

DATA = Path(__file__).parents[1] / "data"
SEED = 20_000  # apart from the seeds of training
SHIPPED_PER_LANGUAGE = 24  # half of them in held-out voices
SHIPPED_WITHOUT_SPEECH = 6
PEAK = 0.6


@dataclass(frozen=True)
class Clip:
    """A recording and what a perfect model answers; ``language`` is None without speech."""

    waveform: np.ndarray  # float32, 16 kHz
    text: str
    language: str | None
    voice: str
    context: str = ""


def _clip(utterance: speech.Utterance, rng: random.Random) -> Clip:
    """An utterance with up to 0.4 s of silence on both sides and faint noise."""
    before, after = (rng.randint(0, int(0.4 * speech.SAMPLE_RATE)) for _ in range(2))
    waveform = utterance.waveform.astype(np.float32)
    waveform = np.pad(waveform * (PEAK / np.abs(waveform).max()), (before, after))
    hiss = np.random.default_rng(len(waveform)).standard_normal(len(waveform)) * 2e-4
    noisy = (waveform + hiss).astype(np.float32)
    return Clip(noisy, utterance.text, utterance.language, utterance.voice)


def spoken_clips(
    language: str, *, count: int, held_out_voices: bool, engine: str = ""
) -> list[Clip]:
    """Held-out sentences of one language in random voices (of one ``engine``, if given)."""
    rng = random.Random(f"{SEED} {language} {held_out_voices} {engine}")
    clips = []
    for text in grammar.sentences(language, count=count, held_out=True, rng=rng):
        voice = speech.pick_voice(language, rng, held_out=held_out_voices)
        while not voice.startswith(engine):
            voice = speech.pick_voice(language, rng, held_out=held_out_voices)
        clips.append(_clip(speech.say(text, language, voice, rng), rng))
    return clips


def speechless_clips(count: int) -> list[Clip]:
    """Digital silence and noises from 0.3 s to 12 s."""
    rng = np.random.default_rng(SEED)
    clips = []
    for index in range(count):
        sound = samples.noise(int(rng.uniform(0.3, 12) * speech.SAMPLE_RATE), rng)
        loud = 0.0 if index % 4 == 0 else 10 ** rng.uniform(-3, -0.7)
        voice = "silence" if index % 4 == 0 else "noise"
        clips.append(Clip((sound * loud).astype(np.float32), "", None, voice))
    return clips


def join(clips: list[Clip], *, gap_s: float) -> Clip:
    """Clips one after the other; the language is the first one's."""
    gap = np.zeros(int(gap_s * speech.SAMPLE_RATE), np.float32)
    waveform = np.concatenate([piece for clip in clips for piece in (clip.waveform, gap)])
    text = grammar.join([clip.text for clip in clips])
    return Clip(waveform, text, clips[0].language, clips[0].voice)


def long_clips(language: str, *, count: int) -> list[Clip]:
    """About 30 s each: a dozen sentences joined, in espeak-ng voices, for one half unheard."""
    clips = []
    for held_out_voices in (False, True):
        spoken = spoken_clips(
            language, count=6 * count, held_out_voices=held_out_voices, engine="espeak"
        )
        clips += [join(spoken[start : start + 12], gap_s=0.4) for start in range(0, 6 * count, 12)]
    return clips


def unfinished_clips(language: str, *, count: int) -> list[Clip]:
    """Held-out sentences cut between two words, as a stream receives them."""
    rng = random.Random(f"{SEED} unfinished {language}")
    clips = []
    while len(clips) < count:
        text = grammar.sentences(language, count=1, held_out=True, rng=rng)[0]
        voice = speech.pick_voice(language, rng, held_out=False)
        utterance = speech.say(text, language, voice, rng)
        if utterance.words:
            said = samples.as_speech(utterance, np.random.default_rng(len(clips)), is_cut=True)
            clips.append(Clip(said.waveform * PEAK, said.text, language, voice))
    return clips


def spelling_clips(language: str, *, count: int) -> list[Clip]:
    """Sentences with a name of two spellings, whose second spelling is in the context."""
    rng = random.Random(f"{SEED} spelling {language}")
    pairs, clips = grammar.SPELLINGS[language], []
    while len(clips) < count:
        text = grammar.sentences(language, count=1, held_out=True, rng=rng)[0]
        names = [name for name in pairs if name in text]
        if len(names) != 1:
            continue
        voice = speech.pick_voice(language, rng, held_out=False)
        clip = _clip(speech.say(text, language, voice, rng), rng)
        words = [pairs[names[0]], *samples.distractors(text, language, rng)]
        rng.shuffle(words)
        answer = text.replace(names[0], pairs[names[0]])
        clips.append(Clip(clip.waveform, answer, language, voice, ", ".join(words)))
    return clips


# --- the recordings that ship


def write_flac(path: Path, clip: Clip) -> None:
    """16-bit FLAC whose samples hold 12 bits, which halves the file."""
    coarse = np.round(clip.waveform * 2048) / 2048
    soundfile.write(path, coarse, speech.SAMPLE_RATE, subtype="PCM_16")


def write_heldout(folder: Path) -> None:
    """The shipped set: FLAC files and ``manifest.jsonl``."""
    folder.mkdir(parents=True, exist_ok=True)
    half = SHIPPED_PER_LANGUAGE // 2
    clips = speechless_clips(SHIPPED_WITHOUT_SPEECH)
    for language in grammar.LANGUAGES:
        for held_out_voices in (False, True):
            clips += spoken_clips(
                language, count=half, held_out_voices=held_out_voices, engine="espeak"
            )
    lines = []
    for index, clip in enumerate(clips):
        name = f"{(clip.language or 'none').lower()}_{index:02}.flac"
        write_flac(folder / name, clip)
        entry = {
            "audio_filepath": name,
            "text": clip.text,
            "language": clip.language,
            "voice": clip.voice,
            "voice_in_training": is_heard_in_training(clip.voice) if clip.language else None,
            "duration": round(len(clip.waveform) / speech.SAMPLE_RATE, 3),
        }
        lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
    (folder / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")


def is_heard_in_training(voice: str) -> bool:
    engine, name = voice.split(":")
    if engine == "flite":
        return name not in speech.HELD_OUT_FLITE
    return name.split("+")[1] not in speech.HELD_OUT_VARIANTS


def write_demo(path: Path, parts: list[tuple[str, list[str]]], *, gap_s: float) -> None:
    """One recording of (voice, sentences) parts, and its transcript beside it."""
    rng = random.Random(SEED)
    clips = []
    for voice, texts in parts:
        language = next(name for name in grammar.LANGUAGES if _speaks(voice, name))
        for text in texts:
            if not grammar.is_held_out(text, language):
                raise ValueError(f"{text!r} is in the training set; choose a held-out sentence.")
            clips.append(_clip(speech.say(text, language, voice, rng), rng))
    recording = join(clips, gap_s=gap_s)
    write_flac(path, recording)
    path.with_suffix(".txt").write_text(recording.text + "\n", encoding="utf-8")


def _speaks(voice: str, language: str) -> bool:
    engine, name = voice.split(":")
    if engine == "flite":
        return language == "English"
    return name.split("+")[0] in speech.ACCENTS[language]


HELLO = [
    "The train to London leaves at half past nine.",
    "We will meet Catherine at half past five.",
    "Please call Maria Miller on Friday.",
]
ENGLISH = [
    "On Wednesday evening I go to the museum with Stephen.",
    "The train from Dublin arrives at quarter to eleven.",
    "I would like thirty three tickets, please.",
    "The museum opens at quarter to nine.",
    "My phone number is nine four zero four five.",
    "Maria Reed and Laura Brown drink milk.",
    "There are fifty one cups of coffee on the table.",
    "The table costs twenty four dollars.",
]
GERMAN = [
    "Am Samstag Nachmittag lernt Maria Meier mit Peter Müller.",
    "Der Zug nach Wien fährt um acht Uhr dreißig.",
    "Das Wetter in Hamburg ist heute windig.",
    "Bitte rufen Sie Katrin Meier am Samstag an.",
    "Auf dem Tisch sind siebzehn Tassen Kaffee.",
    "Sophie Schmidt wohnt in Köln.",
    "Der Tisch kostet neunzig Euro.",
    "Wir treffen Walter Fischer um ein Uhr fünfzehn.",
]
CHINESE = [
    "星期三下午我和王芳去医院。",
    "从北京来的火车五点到。",
    "我要三十七个苹果，谢谢。",
    "广州今天天气很热。",
    "桌子上有八十九本书。",
    "小红和老师喝牛奶。",
    "去天津的火车八点开。",
    "我的电话是八零四零六。",
]


def main() -> None:
    write_heldout(DATA / "heldout")
    write_demo(DATA / "hello.flac", [("flite:slt", HELLO)], gap_s=0.3)
    parts = [
        ("flite:awb", ENGLISH),
        ("espeak:de+f2", GERMAN),
        ("espeak:cmn-latn-pinyin+m3", CHINESE),
    ]
    write_demo(DATA / "three_languages.flac", parts, gap_s=0.8)


if __name__ == "__main__":
    main()
