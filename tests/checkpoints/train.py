# SPDX-License-Identifier: Apache-2.0
"""Train ``tests/checkpoints/asr``, a tiny Qwen3-ASR that really transcribes.

Makes a corpus of synthesized speech (``grammar.py``, ``speech.py``), a byte-level BPE, and
a model of 3.5 million parameters in the published layout (``layout.py``), all from a seed:

    apt-get install espeak-ng flite
    python tests/checkpoints/train.py --work /tmp/tiny

The checkpoint is written after every epoch. ``--work`` keeps the corpus and, so that an
interrupted run can go on, the optimizer. The schedule fits into ``--minutes``; ``--start
tests/checkpoints/asr`` goes on from the weights that ship, for as many more.

The decoder alone would learn the grammar and ignore the audio for a long while. The
synthesizers tell what is said when, and that helps: the encoder learns the phone in every
20 ms, first alone; in the decoder, one attention head of the second layer is led to the audio
of the token just written, one of the third to that of the token to come.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import grammar
import layout
import speech
import torch
import torch.nn.functional as F
from samples import IGNORED, SLOTS_PER_TOKEN, TOKENS_PER_CHUNK, Batches, Sample, collate, plan_epoch
from torch import distributed, nn
from transformers import AttentionInterface, AutoTokenizer
from transformers.models.qwen3.modeling_qwen3 import rotate_half

CHECKPOINT = Path(__file__).parent / "asr"
UTTERANCES = {"English": 12_000, "German": 9_000, "Chinese": 9_000}
NAMED_SHARE = 0.35  # of sentences: with a name of two spellings
NUM_SHARDS = 6  # an epoch is a sixth of the corpus
PEAK_LEARNING_RATE = 7e-4
WARMUP_STEPS = 120  # at the start and when the decoder joins
REPORT_STEPS = 25
TOKEN_NOISE = 0.05  # of the answer's tokens are replaced on the input side


@dataclass(frozen=True)
class Stage:
    """The samples of an epoch."""

    start: float  # fraction of the run
    longest_group: int  # utterances joined to one sample
    chunks_per_batch: int  # seconds of audio, of each process
    has_decoder: bool = True


CURRICULUM = (
    Stage(0.0, longest_group=3, chunks_per_batch=40, has_decoder=False),
    Stage(0.1, longest_group=3, chunks_per_batch=40),
    Stage(0.2, longest_group=8, chunks_per_batch=40),
    Stage(0.33, longest_group=16, chunks_per_batch=36),
)
CLEAN_SHARE = 0.7  # of samples: not degraded
LOSS_WEIGHTS = {
    "frames": 0.3,
    "ctc": 0.5,
    "second": 0.2,
    "place": 0.3,
    "answer": 1.0,
    "time": 1.0,
}
NUM_SECONDS = 48  # distinct classes


class Trainee(nn.Module):
    """The model, with heads for its further losses, which are dropped afterwards."""

    def __init__(self, num_phones: int, *, is_aligner: bool = False) -> None:
        super().__init__()
        self.model = layout.new_model(is_aligner=is_aligner)
        self.model.set_attn_implementation("plain")
        width = layout.TEXT_CONFIG["hidden_size"]
        self.phone_head = nn.Linear(width, SLOTS_PER_TOKEN * num_phones)
        self.ctc_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, layout.VOCAB_SIZE + 1))
        self.second_head = nn.Linear(width, NUM_SECONDS)
        tower = self.model.model.audio_tower
        for part in (tower, self.model.model.multi_modal_projector):
            part.apply(initialise)
        for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
            convolution.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def forward(
        self, batch: dict[str, torch.Tensor], *, has_decoder: bool
    ) -> dict[str, torch.Tensor]:
        """Losses by name; those of the decoder only where it takes part."""
        audio = self.model.model.get_audio_features(
            batch["input_features"], batch["input_features_mask"]
        ).pooler_output
        losses = {"frames": self.frame_loss(audio, batch["phones"])}
        return losses | self.decoder_losses(audio, batch) if has_decoder else losses

    def frame_loss(self, audio: torch.Tensor, phones: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the phone in each 20 ms."""
        logits = self.phone_head(audio).float().view(phones.numel(), -1)
        return F.cross_entropy(logits, phones.flatten(), ignore_index=IGNORED)

    def decoder_losses(
        self, audio: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Two losses on the audio's places half way up, two guided heads, the answer's tokens."""
        labels, spans = batch["labels"][:, 1:], batch["spans"]
        input_ids = noisy(batch["input_ids"], batch["labels"])
        is_audio = input_ids == layout.TOKEN_IDS["<|audio_pad|>"]
        hidden = self.decode(audio, input_ids)
        is_answer = labels != IGNORED
        logits = self.model.lm_head(hidden[-1][:, :-1][is_answer]).float()
        decoder = self.model.model.language_model
        said = place_loss(decoder, 1, hidden[1], spans)
        coming = place_loss(decoder, 2, hidden[2][:, :-1], spans[:, 1:])
        return {
            "ctc": ctc_loss(self.ctc_head(hidden[2][is_audio]), batch),
            "second": self.second_loss(hidden[2], is_audio),
            "place": said + coming,
            "answer": F.cross_entropy(logits, labels[is_answer]),
        }

    def decode(self, audio: torch.Tensor, input_ids: torch.Tensor) -> Sequence[torch.Tensor]:
        """The input of each layer of the decoder, and last its output."""
        is_audio = input_ids == layout.TOKEN_IDS["<|audio_pad|>"]
        embeds = self.model.model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(is_audio.unsqueeze(-1), audio.to(embeds.dtype))
        decoder = self.model.model.language_model
        return decoder(
            inputs_embeds=embeds, use_cache=False, output_hidden_states=True
        ).hidden_states

    def second_loss(self, hidden: torch.Tensor, is_audio: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the second of the clip in which each of the audio's places lies."""
        seconds = (is_audio.cumsum(1) - 1)[is_audio] // TOKENS_PER_CHUNK
        logits = self.second_head(hidden[is_audio]).float()
        return F.cross_entropy(logits, seconds.clamp(max=NUM_SECONDS - 1))


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention in plain operations: on a CPU in bfloat16 faster than PyTorch's fused kernel."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query * scaling) @ key.transpose(2, 3)
    if module.is_causal:
        size = scores.shape[-1]
        scores = scores + torch.full((size, size), -1e4, dtype=scores.dtype).triu(1)
    return (scores.softmax(-1) @ value).transpose(1, 2), None


def place_loss(
    decoder: nn.Module, layer: int, hidden: torch.Tensor, spans: torch.Tensor
) -> torch.Tensor:
    """How little the first head of a layer attends to the audio of a word; mean of -log.

    ``hidden`` (batch, tokens, width) goes into the layer; ``spans`` (batch, tokens, 2) says
    where the row holds that audio, (0, 0) where no matter.
    """
    which = (spans[..., 1] > 0).nonzero(as_tuple=True)
    if not len(which[0]):
        return hidden.new_zeros(())
    attention, width = decoder.layers[layer].self_attn, layout.TEXT_CONFIG["head_dim"]
    hidden = decoder.layers[layer].input_layernorm(hidden)
    places = torch.arange(hidden.shape[1], device=hidden.device)
    cos, sin = decoder.rotary_emb(hidden, places[None])
    query = attention.q_norm(F.linear(hidden, attention.q_proj.weight[:width]))
    key = attention.k_norm(F.linear(hidden, attention.k_proj.weight[:width]))
    query, key = (x * cos + rotate_half(x) * sin for x in (query, key))
    first_answer = int(which[1].min())
    scores = (query[:, first_answer:] @ key.transpose(1, 2)).float() * width**-0.5
    scores = scores[which[0], which[1] - first_answer]  # (words' tokens, tokens)
    start, end = spans[which].unsqueeze(-1).unbind(1)
    is_there = (places >= start) & (places < end)
    log_sum = scores.masked_fill(places > which[1][:, None], -math.inf).logsumexp(-1)
    return (log_sum - scores.masked_fill(~is_there, -math.inf).logsumexp(-1)).mean()


def ctc_loss(logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Per spoken token; ``logits`` of all clips end to end, the last class is the blank."""
    lengths, is_spoken = batch["audio_lengths"], batch["spoken_lengths"] > 0
    log_probs = logits.float().log_softmax(-1)
    loss = F.ctc_loss(
        nn.utils.rnn.pad_sequence(log_probs.split(lengths.tolist())),  # (time, batch, classes)
        batch["spoken"],
        lengths,
        batch["spoken_lengths"],
        blank=layout.VOCAB_SIZE,
        reduction="none",
        zero_infinity=True,
    )
    return (loss * is_spoken).sum() / max(1, len(batch["spoken"]))


def initialise(module: nn.Module) -> None:
    """Keep the size of activations: with weights of 0.02 the positions would drown the sound."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def noisy(input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Replace some answer tokens, so that the decoder cannot lean on them alone."""
    hit = (labels != IGNORED) & (torch.rand(labels.shape, device=labels.device) < TOKEN_NOISE)
    hit &= labels < layout.NUM_BPE_TOKENS
    return torch.where(hit, torch.randint_like(input_ids, layout.NUM_BPE_TOKENS), input_ids)


@dataclass
class Run:
    """Everything a run needs to go on from the end of an epoch."""

    trainee: Trainee
    optimizer: torch.optim.Optimizer
    budget: float  # seconds
    seconds: float = 0.0  # spent training
    epoch: int = 0
    step: int = 0
    decoder_step: int = 0  # those with the decoder

    def save(self, path: Path) -> None:
        state = {"trainee": self.trainee.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {name: getattr(self, name) for name in COUNTERS}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.trainee.load_state_dict(state["trainee"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in COUNTERS:
            setattr(self, name, state[name])

    @property
    def progress(self) -> float:
        return min(1.0, self.seconds / self.budget)

    def learning_rate(self) -> float:
        """One cosine to zero, with a linear warm-up at the start and when the decoder joins."""
        warm = min(1.0, ((self.decoder_step or self.step) + 1) / WARMUP_STEPS)
        return PEAK_LEARNING_RATE * warm * 0.5 * (1 + math.cos(math.pi * self.progress))


COUNTERS = ("seconds", "epoch", "step", "decoder_step")


def make_optimizer(trainee: Trainee) -> torch.optim.Optimizer:
    parameters = list(trainee.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train_epoch(run: Run, stage: Stage, batches: Iterable[dict], *, end: float) -> None:
    """One pass over this process's batches, in step with the others, but not past ``end``."""
    run.trainee.train()
    device = next(run.trainee.parameters()).device
    totals, start, remaining = Counter(), time.monotonic() - run.seconds, iter(batches)
    while run.progress < end:
        for group in run.optimizer.param_groups:
            group["lr"] = run.learning_rate()
        batch = next(remaining, None)
        if batch is not None:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                losses = run.trainee(batch, has_decoder=stage.has_decoder)
            sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items()).backward()
            totals.update({name: loss.item() for name, loss in losses.items()})
        seconds = time.monotonic() - start
        num_batches, run.seconds = average(run.trainee, seconds, has_batch=batch is not None)
        if not num_batches:
            break
        nn.utils.clip_grad_norm_(run.trainee.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        run.decoder_step += stage.has_decoder
        if run.step % REPORT_STEPS == 0 and distributed.get_rank() == 0:
            report = {"step": run.step, "epoch": run.epoch, "seconds": run.seconds}
            report |= {name: total / REPORT_STEPS for name, total in totals.items()}
            print(json.dumps({k: round(v, 3) for k, v in report.items()}), flush=True)
            totals.clear()
    run.epoch += 1


def average(trainee: Trainee, seconds: float, *, has_batch: bool) -> tuple[int, float]:
    """Average gradients over the processes that still had a batch, and the time over all.

    Returns how many those are, and the time. All processes then agree on the learning rate.
    """
    parameters = list(trainee.parameters())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    tail = parts[0].new_tensor([has_batch, seconds])
    flat = torch.cat([*(part.reshape(-1) for part in parts), tail])
    distributed.all_reduce(flat)
    num_batches = int(flat[-2])
    totals = flat[:-2].split([p.numel() for p in parameters])
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total.view_as(parameter) / max(1, num_batches)
    return num_batches, flat[-1].item() / distributed.get_world_size()


def make_corpus(folder: Path, *, seed: int, num_processes: int) -> list[speech.Utterance]:
    """The training speech, synthesized once and kept in ``folder``."""
    if not (folder / "corpus.jsonl").exists():
        rng = random.Random(seed)
        texts = [
            (text, language)
            for language, count in UTTERANCES.items()
            for text in grammar.sentences(
                language, count=count, held_out=False, rng=rng, named_share=NAMED_SHARE
            )
        ]
        rng.shuffle(texts)
        utterances = speech.say_all(
            texts, held_out_voices=False, seed=seed, num_processes=num_processes
        )
        speech.save_corpus(utterances, folder)
    return speech.load_corpus(folder)


def tokenizer_texts(corpus: list[speech.Utterance]) -> list[str]:
    """Training text of the BPE: answers, prompt words, and the second spellings."""
    texts = [f"language {u.language}\n{u.text}" for u in corpus]
    texts += ["system\nuser\nassistant\nlanguage None\nNames: Keywords: "] * 1000
    for language, pairs in grammar.SPELLINGS.items():
        texts += [f"language {language}\n{', '.join(pairs.values())}"] * 200
    return texts


def join_processes(rank: int, options: argparse.Namespace) -> None:
    """Meet the other processes; each has one thread on a CPU."""
    store = f"tcp://localhost:{options.port}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=options.processes)
    torch.manual_seed(options.seed)
    if options.device == "cpu":
        torch.set_num_threads(1)


def number_phones(corpus: list[speech.Utterance]) -> dict[str, int]:
    names = sorted({name for utterance in corpus for name, _ in utterance.phones})
    return {name: index for index, name in enumerate(names)}


def run_curriculum(
    run: Run,
    curriculum: Sequence[Stage],
    corpus: list[speech.Utterance],
    collate: Callable[[list[Sample]], dict],
    *,
    options: argparse.Namespace,
    folder: Path,
) -> None:
    """Train until the time is up; write ``folder`` and the state of the run after each epoch."""
    rank = distributed.get_rank()
    ends = [*(stage.start for stage in curriculum[1:]), 1.0]
    while run.progress < 1.0:
        index = sum(stage.start <= run.progress for stage in curriculum) - 1
        plans = plan_epoch(
            corpus[run.epoch % NUM_SHARDS :: NUM_SHARDS],
            longest_group=curriculum[index].longest_group,
            clean_share=CLEAN_SHARE,
            seed=options.seed + run.epoch,
        )[rank :: options.processes]
        torch.manual_seed(1000 * run.epoch + rank)  # of the noise on the answers
        chunks_per_batch = curriculum[index].chunks_per_batch
        batches = torch.utils.data.DataLoader(
            Batches(plans, collate, chunks_per_batch=chunks_per_batch),
            batch_size=None,
            num_workers=1,
            prefetch_factor=16,
        )
        train_epoch(run, curriculum[index], batches, end=ends[index])
        if rank == 0:
            run.save(options.work / f"{folder.name}.pt")
            layout.save_checkpoint(
                run.trainee.model, options.work / "tokenizer", folder, grammar.LANGUAGES
            )
        distributed.barrier()


def train(rank: int, options: argparse.Namespace) -> None:
    """Train in one of ``options.processes`` processes, each with a share of the samples."""
    join_processes(rank, options)
    corpus = speech.load_corpus(options.work / "corpus")
    phone_ids = number_phones(corpus)
    trainee = Trainee(len(phone_ids)).to(options.device)
    run = Run(trainee, make_optimizer(trainee), budget=60 * options.minutes)
    state, curriculum = options.work / f"{CHECKPOINT.name}.pt", CURRICULUM
    if options.start:
        curriculum = (replace(CURRICULUM[-1], start=0.0),)
        trainee.model.load_state_dict(layout.load_checkpoint(options.start).state_dict())
    if state.exists():
        run.load(state)
    tokenizer = AutoTokenizer.from_pretrained(options.work / "tokenizer")
    batch = partial(collate, tokenizer=tokenizer, phone_ids=phone_ids)
    run_curriculum(run, curriculum, corpus, batch, options=options, folder=CHECKPOINT)


def add_options(parser: argparse.ArgumentParser, *, minutes: float) -> None:
    parser.add_argument("--work", type=Path, required=True, help="corpus and optimizer go here")
    parser.add_argument("--minutes", type=float, default=minutes, help="the schedule fits in these")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="on a CPU, one per core")
    parser.add_argument("--port", type=int, default=29_500, help="where the processes meet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


AttentionInterface.register("plain", plain_attention)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser, minutes=78)
    parser.add_argument("--start", type=Path, help="go on from this checkpoint's weights")
    options = parser.parse_args()
    corpus = make_corpus(
        options.work / "corpus", seed=options.seed, num_processes=options.processes
    )
    if not (options.work / "tokenizer").exists():
        layout.train_tokenizer(tokenizer_texts(corpus), options.work / "tokenizer")
    torch.multiprocessing.spawn(train, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
