# SPDX-License-Identifier: Apache-2.0
"""Write the recordings in ``tests/data/timed``: held-out sentences, and when each word is said.

    python tests/checkpoints/timed.py        # needs espeak-ng

``words`` of a line in ``manifest.jsonl`` are rows of where a word begins in the text, and its
start and end in seconds, as espeak-ng's word events and the sounds after them have it.
"""

import json
import random
from pathlib import Path

import grammar
import numpy as np
import samples
import soundfile
import speech

FOLDER = Path(__file__).parents[1] / "data" / "timed"
CLIPS = 6  # of each language: half in voices of training
SENTENCES = 1  # of each clip
SEED = 50_000


def word_rows(utterance: speech.Utterance, *, start_s: float, position: int = 0) -> list[tuple]:
    """Where each word begins in a text, and its start and end in a recording."""
    return [
        (position + word.position, round(start_s + word.start, 3), round(start_s + word.end, 3))
        for word in samples.word_times(utterance)
    ]


def write(path: Path, waveform: np.ndarray) -> None:
    """Write a FLAC file of 12 bits, which is half the size."""
    coarse = np.round(waveform * 2048) / 2048
    soundfile.write(path, coarse, speech.SAMPLE_RATE, subtype="PCM_16")


def clip(language: str, index: int) -> tuple[np.ndarray, dict]:
    """A recording, and its line of the manifest."""
    rng = random.Random(f"{SEED} {language} {index}")
    said = []
    for text in grammar.sentences(language, count=SENTENCES, held_out=True, rng=rng):
        voice = "flite"
        while voice.startswith("flite"):
            voice = speech.pick_voice(language, rng, held_out=index % 2 == 1)
        said.append(speech.say(text, language, voice, rng))
    waveform, text, words = np.zeros(4_000, np.float32), "", []
    for utterance in said:
        start = len(waveform) / speech.SAMPLE_RATE
        text = grammar.join([text, utterance.text]) if text else utterance.text
        offset = len(text) - len(utterance.text)
        words += word_rows(utterance, start_s=start, position=offset)
        spoken = utterance.waveform.astype(np.float32)
        pause = np.zeros(rng.randrange(3_000, 12_000), np.float32)
        waveform = np.concatenate([waveform, spoken / np.abs(spoken).max() / 2, pause])
    return waveform, {"text": text, "language": language, "words": words}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    lines = []
    for language in grammar.LANGUAGES:
        for index in range(CLIPS):
            waveform, row = clip(language, index)
            name = f"{language.lower()}_{index}.flac"
            write(FOLDER / name, waveform)
            row = {"audio_filepath": name, "voices_in_training": index % 2 == 0} | row
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    (FOLDER / "manifest.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
