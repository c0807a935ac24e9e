# SPDX-License-Identifier: Apache-2.0
"""How well does ``tests/checkpoints/aligner`` time words? Prints a table.

    python tests/checkpoints/evaluate_aligner.py

transformers' own model times held-out sentences in unseen voices, alone and joined to
clips of up to 40 s. ``error_ms`` is the mean distance of starts and ends from espeak-ng's word
events, without any repair of the order; ``far`` the percentage of those more than 0.5 s off.
"""

import argparse
import random
from pathlib import Path

import grammar
import layout
import numpy as np
import samples
import speech
import torch
import train_aligner
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

SEED = 30_000


def make_clips(language: str, *, count: int, longest: int, held_out_voices: bool) -> list:
    """Samples of one to ``longest`` held-out sentences."""
    rng = random.Random(f"{SEED} {language} {longest} {held_out_voices}")
    clips = []
    for index in range(count):
        texts = grammar.sentences(language, count=rng.randint(1, longest), held_out=True, rng=rng)
        said = []
        for text in texts:
            voice = "flite"
            while voice.startswith("flite"):
                voice = speech.pick_voice(language, rng, held_out=held_out_voices)
            said.append(speech.say(text, language, voice, rng))
        clips.append(samples.realise(samples.Plan(tuple(said), is_clean=True, seed=SEED + index)))
    return clips


@torch.inference_mode()
def errors_ms(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sample: samples.Sample
) -> np.ndarray:
    """How far each start and end is from the truth."""
    ids, _, _, times = train_aligner.make_row(sample, tokenizer)
    mel, mask = samples.pad_features([sample.features])
    logits = model(input_ids=ids[None], input_features=mel, input_features_mask=mask).logits[0]
    is_timed = times != train_aligner.UNTIMED
    classes = logits[is_timed].argmax(-1)
    return ((classes - times[is_timed]).abs() * layout.CLASS_MS).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=train_aligner.CHECKPOINT)
    parser.add_argument("--count", type=int, default=60, help="clips in each set")
    options = parser.parse_args()
    model = layout.load_checkpoint(options.checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    for longest, count in ((1, options.count), (12, options.count // 3)):
        for language in grammar.LANGUAGES:
            for held_out_voices in (False, True):
                clips = make_clips(
                    language, count=count, longest=longest, held_out_voices=held_out_voices
                )
                errors = np.concatenate([errors_ms(model, tokenizer, clip) for clip in clips])
                print(
                    f"{longest:2} sentences  {language:8}  unheard voices {held_out_voices!s:5}  "
                    f"times {len(errors):5}  error_ms {errors.mean():6.1f}  "
                    f"far {100 * (errors > 500).mean():.2f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
