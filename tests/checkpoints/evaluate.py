# SPDX-License-Identifier: Apache-2.0
"""How well does ``tests/checkpoints/asr`` transcribe? Prints a table and, last, one JSON line.

    python tests/checkpoints/evaluate.py

transformers' own model answers held-out sentences, greedily. ``error`` is the WER (English,
German) or CER (Chinese) in percent, without case and punctuation; ``language`` the percentage
of clips whose language is named right; ``exact`` of those right to the letter. Sets: sentences
in the voices of training and in others, ~30 s clips, sentences cut between two words, names whose
spelling the context decides, and clips without speech, where an answer is exact if it is empty.
"""

import argparse
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grammar
import heldout
import jiwer
import layout
import samples
import torch
from transformers import AutoTokenizer

CHECKPOINT = Path(__file__).parent / "asr"
BATCH_SIZE = 20
MAX_NEW_TOKENS = 400


class Transcriber:
    """A checkpoint in transformers' model, decoding greedily or as ``generation`` says."""

    def __init__(self, folder: Path, **generation: Any) -> None:
        self._generation = generation
        self._model = layout.load_checkpoint(folder)
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def __call__(self, clips: list[heldout.Clip]) -> list[tuple[str | None, str]]:
        """(language, text) of each clip."""
        order = sorted(range(len(clips)), key=lambda index: len(clips[index].waveform))
        answers: dict[int, tuple[str | None, str]] = {}
        for start in range(0, len(order), BATCH_SIZE):
            chosen = order[start : start + BATCH_SIZE]
            outputs = self._generate([clips[index] for index in chosen])
            answers.update(zip(chosen, map(parse, outputs), strict=True))
        return [answers[index] for index in range(len(clips))]

    @torch.inference_mode()
    def _generate(self, clips: list[heldout.Clip]) -> list[str]:
        features = [samples.log_mel(clip.waveform) for clip in clips]
        prompts = [
            samples.prompt_tokens(clip.context, mel.shape[1], None, self._tokenizer)
            for clip, mel in zip(clips, features, strict=True)
        ]
        longest = max(map(len, prompts))
        padding = [[self._tokenizer.pad_token_id] * (longest - len(ids)) for ids in prompts]
        input_ids = torch.tensor([pad + ids for pad, ids in zip(padding, prompts, strict=True)])
        mask = torch.tensor([[0] * len(pad) + [1] * (longest - len(pad)) for pad in padding])
        mel, frame_mask = samples.pad_features(features)
        output = self._model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            input_features=mel,
            input_features_mask=frame_mask,
            max_new_tokens=MAX_NEW_TOKENS,
            do_sample=False,
            eos_token_id=layout.generation_config()["eos_token_id"],
            pad_token_id=self._tokenizer.pad_token_id,
            **self._generation,
        )
        return self._tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)


def parse(output: str) -> tuple[str | None, str]:
    """Language and text of ``language X<asr_text>text``."""
    head, _, text = output.partition("<asr_text>")
    language = head.removeprefix("language ").strip()
    return (None if language == "None" else language), text


def normalise(text: str) -> str:
    """Lower case, letters, digits and single spaces."""
    kept = "".join(c if unicodedata.category(c)[0] in "LN" else " " for c in text.casefold())
    return " ".join(kept.split())


def error_rate(references: list[str], answers: list[str], language: str | None) -> float:
    """WER, or CER for Chinese, in percent."""
    references, answers = [[normalise(t) for t in texts] for texts in (references, answers)]
    if language == "Chinese":
        references, answers = [[t.replace(" ", "") for t in ts] for ts in (references, answers)]
        return 100 * jiwer.cer(references, answers)
    return 100 * jiwer.wer(references, answers)


def clip_sets(count: int) -> Iterator[tuple[str, str, list[heldout.Clip]]]:
    """(name, language, clips) of everything measured."""
    for language in grammar.LANGUAGES:
        for held_out_voices in (False, True):
            name = "other espeak-ng voices" if held_out_voices else "training voices"
            engine = "espeak" if held_out_voices else ""
            clips = heldout.spoken_clips(
                language, count=count, held_out_voices=held_out_voices, engine=engine
            )
            yield name, language, clips
    clips = heldout.spoken_clips("English", count=count, held_out_voices=True, engine="flite")
    yield "another flite voice", "English", clips
    for language in grammar.LANGUAGES:
        yield "30 s", language, heldout.long_clips(language, count=max(8, count // 10))
        yield "unfinished", language, heldout.unfinished_clips(language, count=count // 2)
        yield "spelling from context", language, heldout.spelling_clips(language, count=count // 2)
    yield "no speech", "None", heldout.speechless_clips(count)


def measure(transcribe: Transcriber, clips: list[heldout.Clip]) -> dict[str, float]:
    """Percentages, and the first wrong answers for the reader."""
    answers = transcribe(clips)
    texts = [text for _, text in answers]
    percent = 100 / len(clips)
    result = {
        "clips": len(clips),
        "minutes": round(sum(len(clip.waveform) for clip in clips) / 16_000 / 60, 1),
        "language": percent * sum(a[0] == c.language for a, c in zip(answers, clips, strict=True)),
        "exact": percent * sum(a == c.text for a, c in zip(texts, clips, strict=True)),
    }
    if clips[0].language:
        references = [clip.text for clip in clips]
        result["error"] = error_rate(references, texts, clips[0].language)
    return {key: round(value, 2) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--count", type=int, default=200, help="sentences in each set")
    options = parser.parse_args()
    transcribe = Transcriber(options.checkpoint)
    results = []
    for name, language, clips in clip_sets(options.count):
        results.append({"set": name, "spoken": language} | measure(transcribe, clips))
        print("  ".join(f"{key} {value}" for key, value in results[-1].items()), flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
