# SPDX-License-Identifier: Apache-2.0
"""Train ``tests/checkpoints/asr``, a tiny Qwen3-ASR that really transcribes.

Makes a corpus of synthesized speech (``grammar.py``, ``speech.py``), a byte-level BPE, and
a model of 3.5 million parameters in the published layout (``layout.py``), all from a seed:

    apt-get install espeak-ng flite
    python tests/checkpoints/train.py --work /tmp/tiny

The checkpoint is written after every epoch. ``--work`` keeps the corpus and, so that an
interrupted run can go on, the optimizer. The decoder alone would learn the grammar and ignore
the audio for a long while; so the encoder first learns to listen by a CTC loss, in small clean
batches, and keeps that loss when the decoder joins. More epochs make it better: a finished run
goes on from ``--work`` when asked for a larger ``--epochs``.
"""

import argparse
import itertools
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import grammar
import layout
import speech
import torch
import torch.nn.functional as F
from samples import IGNORED, Batches, plan_epoch
from torch import distributed, nn
from transformers import AutoTokenizer

CHECKPOINT = Path(__file__).parent / "asr"
UTTERANCES = {"English": 12_000, "German": 9_000, "Chinese": 9_000}
NUM_SHARDS = 6  # an epoch is a sixth of the corpus
PEAK_LEARNING_RATE = 9e-4
WARMUP_STEPS = 120  # at the start and when the decoder joins
MIDDLE_CTC_WEIGHT = 0.7
REPORT_STEPS = 25
TOKEN_NOISE = 0.05  # of the answer's tokens are replaced on the input side


@dataclass(frozen=True)
class Stage:
    """What an epoch is made of; the curriculum's last stage holds on."""

    longest_group: int  # utterances joined to one sample
    clean_share: float  # of samples: not degraded
    chunks_per_batch: int  # seconds of audio, of each process
    ctc_weight: float  # beside 1 for the answer
    is_ctc_only: bool = False


NUM_CTC_EPOCHS = 12
CURRICULUM = (
    *[Stage(1, clean_share=1.0, chunks_per_batch=24, ctc_weight=1.0, is_ctc_only=True)]
    * NUM_CTC_EPOCHS,
    Stage(2, clean_share=0.9, chunks_per_batch=32, ctc_weight=0.5),
    Stage(3, clean_share=0.7, chunks_per_batch=40, ctc_weight=0.4),
    Stage(8, clean_share=0.7, chunks_per_batch=40, ctc_weight=0.3),
    Stage(16, clean_share=0.7, chunks_per_batch=48, ctc_weight=0.2),
)


class Trainee(nn.Module):
    """The model and two CTC heads, which are dropped afterwards.

    One reads the projected audio. The encoder's positions restart every second, so it cannot
    tell the order of distant sounds; the other head reads the audio's places half way through
    the decoder, which can.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model = layout.new_model()
        width, num_classes = layout.TEXT_CONFIG["hidden_size"], layout.VOCAB_SIZE + 1
        self.ctc_head = nn.Linear(width, num_classes)
        self.middle_ctc_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, num_classes))
        tower = self.model.model.audio_tower
        for part in (tower, self.model.model.multi_modal_projector):
            part.apply(initialise)
        for convolution in (tower.conv2d1, tower.conv2d2, tower.conv2d3):
            convolution.to(memory_format=torch.channels_last)  # 1.5 times as fast on a CPU

    def forward(self, batch: dict[str, torch.Tensor], *, is_ctc_only: bool) -> list[torch.Tensor]:
        """CTC loss per spoken token; unless told otherwise the other's, and that of the answer."""
        audio = self.model.model.get_audio_features(
            batch["input_features"], batch["input_features_mask"]
        ).pooler_output
        losses = [ctc_loss(self.ctc_head(audio), batch)]
        return losses if is_ctc_only else [*losses, *self.decoder_losses(audio, batch)]

    def decoder_losses(
        self, audio: torch.Tensor, batch: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """CTC loss half way up, cross-entropy of the answer's tokens at the top."""
        model, labels = self.model.model, batch["labels"][:, 1:]
        input_ids = noisy(batch["input_ids"], batch["labels"])
        is_audio = input_ids == layout.TOKEN_IDS["<|audio_pad|>"]
        embeds = model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(is_audio.unsqueeze(-1), audio.to(embeds.dtype))
        output = model.language_model(
            inputs_embeds=embeds, use_cache=False, output_hidden_states=True
        )
        middle = output.hidden_states[layout.TEXT_CONFIG["num_hidden_layers"] // 2][is_audio]
        is_answer = labels != IGNORED
        logits = self.model.lm_head(output.last_hidden_state[:, :-1][is_answer]).float()
        answer_loss = F.cross_entropy(logits, labels[is_answer])
        return ctc_loss(self.middle_ctc_head(middle), batch), answer_loss


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
    epoch: int = 0
    step: int = 0

    def save(self, path: Path) -> None:
        state = {"trainee": self.trainee.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {"epoch": self.epoch, "step": self.step}, path)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.trainee.load_state_dict(state["trainee"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.step = state["epoch"], state["step"]


def learning_rate(epoch: float, stage_step: int, num_epochs: int) -> float:
    """Linear warm-up, level while CTC is alone, then a cosine to 1 %; ``epoch`` has a fraction."""
    progress = (epoch - NUM_CTC_EPOCHS) / max(1, num_epochs - NUM_CTC_EPOCHS)
    decay = 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, progress))))
    return PEAK_LEARNING_RATE * min(1.0, (stage_step + 1) / WARMUP_STEPS) * decay


def make_optimizer(trainee: Trainee) -> torch.optim.Optimizer:
    parameters = list(trainee.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


def train_epoch(
    run: Run,
    stage: Stage,
    batches: torch.utils.data.DataLoader,
    *,
    num_samples: int,
    num_epochs: int,
) -> None:
    """One pass over this process's batches, in step with the others; rank 0 reports."""
    run.trainee.train()
    device = next(run.trainee.parameters()).device
    is_new = run.epoch in (0, NUM_CTC_EPOCHS)
    totals, start, num_seen, remaining = torch.zeros(3), time.monotonic(), 0, iter(batches)
    for epoch_step in itertools.count():
        epoch = run.epoch + num_seen / num_samples
        for group in run.optimizer.param_groups:
            stage_step = epoch_step if is_new else WARMUP_STEPS
            group["lr"] = learning_rate(epoch, stage_step, num_epochs)
        batch = next(remaining, None)
        if batch is not None:
            batch = {name: tensor.to(device) for name, tensor in batch.items()}
            with torch.autocast(device.type, torch.bfloat16):
                losses = run.trainee(batch, is_ctc_only=stage.is_ctc_only)
            weights = (stage.ctc_weight, MIDDLE_CTC_WEIGHT, 1.0)[: len(losses)]
            sum(w * loss for w, loss in zip(weights, losses, strict=True)).backward()
            totals[: len(losses)] += torch.stack(losses).detach().cpu()
            num_seen += len(batch["input_ids"])
        if not average_gradients(run.trainee, has_batch=batch is not None):
            break
        nn.utils.clip_grad_norm_(run.trainee.parameters(), 1.0)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        if (epoch_step + 1) % REPORT_STEPS == 0 and distributed.get_rank() == 0:
            report = {"step": run.step, "epoch": epoch, "epoch_s": time.monotonic() - start}
            report |= dict(
                zip(("ctc", "middle_ctc", "answer"), (totals / REPORT_STEPS).tolist(), strict=True)
            )
            print(json.dumps({k: round(v, 3) for k, v in report.items()}), flush=True)
            totals.zero_()
    run.epoch += 1


def average_gradients(trainee: Trainee, *, has_batch: bool) -> bool:
    """Average over the processes that still had a batch; False once none had."""
    parameters = list(trainee.parameters())
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([part.reshape(-1) for part in parts] + [parts[0].new_tensor([has_batch])])
    distributed.all_reduce(flat)
    num_batches = flat[-1].item()
    totals = flat[:-1].split([p.numel() for p in parameters])
    for parameter, total in zip(parameters, totals, strict=True):
        parameter.grad = total.view_as(parameter) / max(1.0, num_batches)
    return num_batches > 0


def make_corpus(folder: Path, *, seed: int, num_processes: int) -> list[speech.Utterance]:
    """The training speech, synthesized once and kept in ``folder``."""
    if not (folder / "corpus.jsonl").exists():
        rng = random.Random(seed)
        texts = [
            (text, language)
            for language, count in UTTERANCES.items()
            for text in grammar.sentences(language, count=count, held_out=False, rng=rng)
        ]
        rng.shuffle(texts)
        utterances = speech.say_all(
            texts, held_out_voices=False, seed=seed, num_processes=num_processes
        )
        speech.save_corpus(utterances, folder)
    return speech.load_corpus(folder)


def tokenizer_texts(corpus: list[speech.Utterance]) -> list[str]:
    """What the BPE learns from: answers, prompt words, and the second spellings."""
    texts = [f"language {u.language}\n{u.text}" for u in corpus]
    texts += ["system\nuser\nassistant\nlanguage None\nNames: Keywords: "] * 1000
    for language, pairs in grammar.SPELLINGS.items():
        texts += [f"language {language}\n{', '.join(pairs.values())}"] * 200
    return texts


def train(rank: int, options: argparse.Namespace) -> None:
    """Train in one of ``options.processes`` processes, each with a share of the samples."""
    work, num_processes = options.work, options.processes
    store = f"tcp://localhost:{options.port}"
    distributed.init_process_group("gloo", store, rank=rank, world_size=num_processes)
    torch.manual_seed(options.seed)
    if options.device == "cpu":
        torch.set_num_threads(1)
    corpus = speech.load_corpus(work / "corpus")
    tokenizer = AutoTokenizer.from_pretrained(work / "tokenizer")
    trainee = Trainee().to(options.device)
    run = Run(trainee, make_optimizer(trainee))
    if (work / "run.pt").exists():
        run.load(work / "run.pt")
    while run.epoch < options.epochs:
        stage = CURRICULUM[min(run.epoch, len(CURRICULUM) - 1)]
        plans = plan_epoch(
            corpus[run.epoch % NUM_SHARDS :: NUM_SHARDS],
            longest_group=stage.longest_group,
            clean_share=stage.clean_share,
            seed=options.seed + run.epoch,
        )[rank::num_processes]
        torch.manual_seed(1000 * run.epoch + rank)  # of the noise on the answers
        batches = torch.utils.data.DataLoader(
            Batches(plans, tokenizer, chunks_per_batch=stage.chunks_per_batch),
            batch_size=None,
            num_workers=1,
            prefetch_factor=16,
        )
        train_epoch(run, stage, batches, num_samples=len(plans), num_epochs=options.epochs)
        if rank == 0:
            run.save(work / "run.pt")
            layout.save_checkpoint(
                trainee.model, work / "tokenizer", CHECKPOINT, list(grammar.LANGUAGES)
            )
        distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="corpus and optimizer go here")
    parser.add_argument("--epochs", type=int, default=36)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2, help="on a CPU, one per core")
    parser.add_argument("--port", type=int, default=29_500, help="where the processes meet")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    corpus = make_corpus(
        options.work / "corpus", seed=options.seed, num_processes=options.processes
    )
    if not (options.work / "tokenizer").exists():
        layout.train_tokenizer(tokenizer_texts(corpus), options.work / "tokenizer")
    torch.multiprocessing.spawn(train, (options,), nprocs=options.processes)


if __name__ == "__main__":
    main()
