# SPDX-License-Identifier: Apache-2.0
"""Train ``tests/checkpoints/aligner``, a tiny forced aligner, from the weights of the transcriber.

    python tests/checkpoints/train_aligner.py --work /tmp/tiny     # after train.py

It is trained on espeak-ng alone, which reports the time of each word (in Chinese each character).
The times are learned as the published aligner gives them: at the two ``<timestamp>`` behind a word,
the class of its start and of its end. Two further losses teach it to look there: an attention
head in each of two layers is led to the audio of the word, and to its first and last token.
"""

import argparse
import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import layout
import samples
import speech
import torch
import torch.nn.functional as F
import train
from samples import NOWHERE, Sample
from transformers import AutoTokenizer, PreTrainedTokenizerBase

CHECKPOINT = Path(__file__).parent / "aligner"
CURRICULUM = (
    train.Stage(0.0, longest_group=8, chunks_per_batch=36),
    train.Stage(0.3, longest_group=16, chunks_per_batch=36),
)
BLUR = 0.7  # standard deviation of the wanted classes, in classes
UNTIMED = -1.0
UNIT = re.compile(r"[\u4e00-\u9fff]|[^\W\u4e00-\u9fff][^\W\u4e00-\u9fff']*(?:'\w+)?")


class Aligner(train.Trainee):
    """The model with its head for times, and the heads for its further losses."""

    def __init__(self, num_phones: int) -> None:
        super().__init__(num_phones, is_aligner=True)
        self.model.score.weight.data.copy_(class_waves())

    def decoder_losses(
        self, audio: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The times', and those that say where to look."""
        is_audio = batch["input_ids"] == layout.TOKEN_IDS["<|audio_pad|>"]
        hidden = self.decode(audio, batch["input_ids"])
        decoder = self.model.model.language_model
        word = train.place_loss(decoder, 1, hidden[1], batch["word_spans"])
        edge = train.place_loss(decoder, 2, hidden[2], batch["edge_spans"])
        is_timed = batch["times"] != UNTIMED
        return {
            "second": self.second_loss(hidden[2], is_audio),
            "place": word + edge,
            "time": time_loss(self.model.score(hidden[-1][is_timed]), batch["times"][is_timed]),
        }


def class_waves() -> torch.Tensor:
    """Rows to begin with, (classes, width): sines of the time, so that near times are alike."""
    width = layout.TEXT_CONFIG["hidden_size"]
    periods = torch.logspace(math.log10(4), math.log10(4 * layout.NUM_CLASSES), width // 2)
    angles = 2 * math.pi * torch.arange(layout.NUM_CLASSES)[:, None] / periods
    return 0.1 * torch.cat([angles.sin(), angles.cos()], 1)


def time_loss(logits: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with classes that blur over a time, in classes."""
    classes = torch.arange(layout.NUM_CLASSES, device=times.device)
    wanted = (-0.5 * ((classes - times[:, None]) / BLUR) ** 2).softmax(-1)
    return F.cross_entropy(logits.float(), wanted, reduction="sum") / max(1, len(times))


def units(sample: Sample) -> list[tuple[str, float, float]]:
    """The words of a sample, letters and digits only, with start and end in seconds.

    espeak-ng says some pairs ("es ist") as one word: between those no time is known.
    """
    found = []
    for index, word in enumerate(sample.words):
        end = next((later.position for later in sample.words[index + 1 :]), len(sample.text))
        texts = UNIT.findall(sample.text[word.position : end])
        for place, text in enumerate(texts):
            start = word.start if place == 0 else UNTIMED
            found.append((text, start, word.end if place == len(texts) - 1 else UNTIMED))
    return found


def make_row(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> tuple[torch.Tensor, ...]:
    """Tokens, the position of each token's word and of its edge, and its time in classes."""
    num_audio = samples.num_audio_tokens(sample.features.shape[1])
    names = ["<|audio_start|>", *["<|audio_pad|>"] * num_audio, "<|audio_end|>"]
    ids = tokenizer.convert_tokens_to_ids(names)
    word_spans, edge_spans, times = ([value] * len(ids) for value in (NOWHERE, NOWHERE, UNTIMED))
    for text, *edges in units(sample):
        tokens = tokenizer.encode(text)
        places = [1 + samples.token_at(edge) for edge in edges if edge != UNTIMED]
        spans = [NOWHERE if edge == UNTIMED else (places[0], places[-1] + 1) for edge in edges]
        ids += [*tokens, *[layout.TOKEN_IDS["<timestamp>"]] * 2]
        inside = [NOWHERE] * len(tokens) if len(places) < 2 else [spans[0]] * len(tokens)
        word_spans += inside + spans
        edge_spans += inside
        for edge in edges:
            place = 1 + samples.token_at(max(0.0, edge))
            edge_spans.append(NOWHERE if edge == UNTIMED else (place, place + 1))
            times.append(UNTIMED if edge == UNTIMED else edge * 1000 / layout.CLASS_MS)
        times[-2:-2] = [UNTIMED] * len(tokens)
    return tuple(map(torch.tensor, (ids, word_spans, edge_spans, times)))


def collate(
    chosen: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, phone_ids: dict[str, int]
) -> dict:
    """A batch as ``samples.collate`` makes it, but of rows for the aligner."""
    features, frame_mask = samples.pad_features([sample.features for sample in chosen])
    columns = zip(*(make_row(sample, tokenizer) for sample in chosen), strict=True)
    pad = torch.nn.utils.rnn.pad_sequence
    padding = (tokenizer.pad_token_id, 0, 0, UNTIMED)
    names = ("input_ids", "word_spans", "edge_spans", "times")
    padded = (pad(rows, True, value) for rows, value in zip(columns, padding, strict=True))
    return dict(zip(names, padded, strict=True)) | {
        "input_features": features,
        "input_features_mask": frame_mask,
        "phones": torch.cat([samples.frame_phones(sample, phone_ids) for sample in chosen]),
    }


def train_aligner(rank: int, options: argparse.Namespace) -> None:
    """Train in one of ``options.processes`` processes, each with a share of the samples."""
    train.join_processes(rank, options)
    corpus = speech.load_corpus(options.work / "corpus")
    phone_ids = train.number_phones(corpus)
    aligner = Aligner(len(phone_ids)).to(options.device)
    run = train.Run(aligner, train.make_optimizer(aligner), budget=60 * options.minutes)
    state = options.work / f"{CHECKPOINT.name}.pt"
    if state.exists():
        run.load(state)
    else:
        learned = torch.load(options.work / f"{train.CHECKPOINT.name}.pt", weights_only=True)
        missing, _ = aligner.load_state_dict(learned["trainee"], strict=False)
        assert missing == ["model.score.weight"], missing
    tokenizer = AutoTokenizer.from_pretrained(options.work / "tokenizer")
    timed = [utterance for utterance in corpus if utterance.words]
    batch = partial(collate, tokenizer=tokenizer, phone_ids=phone_ids)
    train.run_curriculum(run, CURRICULUM, timed, batch, options=options, folder=CHECKPOINT)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    train.add_options(parser, minutes=18)
    options = parser.parse_args()
    torch.multiprocessing.spawn(train_aligner, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
