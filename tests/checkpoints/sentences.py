# SPDX-License-Identifier: Apache-2.0
"""Write the recordings of ``qwen3-asr doctor --model``: sentences, and when each word is said.

    python tests/checkpoints/sentences.py        # needs espeak-ng

Without numbers and times of day, which models write in several ways.
"""

import json
import random
from pathlib import Path

import numpy as np
import speech
import timed

FOLDER = Path(__file__).parents[2] / "qwen3_asr_vllm" / "cli" / "speech"
SENTENCES = {
    "English": (
        "On Wednesday evening I go to the museum with Maria Miller.",
        "Please call Laura Brown on Friday.",
        "Maria Reed and Laura Brown drink milk.",
        "Where is the hospital?",
    ),
    "German": (
        "Am Samstag Nachmittag lernt Maria Meier mit Peter Müller.",
        "Das Wetter in Hamburg ist heute windig.",
        "Katrin Schmidt wohnt in Köln.",
        "Mögen Sie Brot und Käse?",
    ),
    "Chinese": (
        "星期三下午我和王芳去医院。",
        "广州今天天气很热。",
        "小红和老师喝牛奶。",
        "我叫李明。",
    ),
}
VOICES = {
    "English": "espeak:en-us+f2",
    "German": "espeak:de+m3",
    "Chinese": "espeak:cmn-latn-pinyin+f2",
}
SEED = 90_000
MARGIN = 4_000  # samples of silence before and after


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    rows = []
    for language, texts in SENTENCES.items():
        for index, text in enumerate(texts):
            rng = random.Random(f"{SEED} {language} {index}")
            utterance = speech.say(text, language, VOICES[language], rng)
            spoken = utterance.waveform.astype(np.float32)
            waveform = np.pad(spoken / np.abs(spoken).max() / 2, MARGIN)
            file = f"{language.lower()}_{index}.flac"
            timed.write(FOLDER / file, waveform)
            words = timed.word_rows(utterance, start_s=MARGIN / speech.SAMPLE_RATE)
            rows.append({"file": file, "text": text, "language": language, "words": words})
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (FOLDER / "sentences.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
