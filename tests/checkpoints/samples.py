# SPDX-License-Identifier: Apache-2.0
"""Training samples: utterances joined, degraded and put behind the model's prompt.

An epoch is planned first (which utterances go together, seeds, batches of like length) and
realised batch by batch, so that every epoch hears other noise, speed, gaps and contexts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import grammar
import numpy as np
import torch
from speech import SAMPLE_RATE, Utterance
from transformers import PreTrainedTokenizerBase
from transformers.audio_utils import mel_filter_bank

N_FFT, HOP_LENGTH, NUM_MEL_BINS = 400, 160, 128
CHUNK_FRAMES, TOKENS_PER_CHUNK = 100, 13
MIN_SAMPLES = SAMPLE_RATE // 2
MAX_CLIP_S = 40.0
SORTED_TOGETHER = 384  # samples

NONE_SHARE = 0.07  # of degraded samples: silence or noise alone
MIXED_SHARE = 0.2  # of joined samples: more than one language
TRUNCATED_SHARE = 0.15  # cut after a word, as in a stream
CONTEXT_SHARE = 0.35
FORCED_SHARE = 0.2  # language given in the prompt

PROMPT = "<|im_start|>system\n{context}<|im_end|>\n<|im_start|>user\n<|audio_start|>"
AFTER_AUDIO = "<|audio_end|><|im_end|>\n<|im_start|>assistant\n"
IGNORED = -100

MEL_FILTERS = torch.from_numpy(
    mel_filter_bank(
        num_frequency_bins=N_FFT // 2 + 1,
        num_mel_filters=NUM_MEL_BINS,
        min_frequency=0.0,
        max_frequency=8000.0,
        sampling_rate=SAMPLE_RATE,
        norm="slaney",
        mel_scale="slaney",
    )
).float()


@dataclass(frozen=True)
class Sample:
    """One clip with its prompt: what the model hears, is told, and should answer."""

    features: torch.Tensor  # (128, frames)
    text: str
    language: str  # "None" without speech
    context: str
    spoken: str  # the text in its first spellings, for CTC
    is_forced: bool


@dataclass(frozen=True)
class Plan:
    """What goes into a sample; empty ``utterances`` means no speech."""

    utterances: tuple[Utterance, ...]
    is_clean: bool
    seed: int


def log_mel(waveform: np.ndarray, shape: torch.Tensor | None = None) -> torch.Tensor:
    """Whisper's log-mel, (128, samples // 160); ``shape`` scales the power of each mel bin."""
    padded = np.pad(waveform, (0, max(0, MIN_SAMPLES - len(waveform))))
    stft = torch.stft(
        torch.from_numpy(padded.astype(np.float32)),
        N_FFT,
        HOP_LENGTH,
        window=torch.hann_window(N_FFT),
        return_complex=True,
    )
    mel = MEL_FILTERS.T @ stft[:, :-1].abs().square()
    if shape is not None:
        mel = mel * shape[:, None]
    log = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


def num_audio_tokens(num_frames: int) -> int:
    whole, rest = divmod(num_frames, CHUNK_FRAMES)
    return whole * TOKENS_PER_CHUNK + -(-rest // 8)


# --- what is heard


@cache
def noise_bank() -> list[np.ndarray]:
    """White, pink and brown noise, 16 s of each, peak 1."""
    spectrum = np.fft.rfft(np.random.default_rng(0).standard_normal(16 * SAMPLE_RATE))
    ramp = np.arange(1, len(spectrum) + 1)
    sounds = [np.fft.irfft(spectrum / ramp**slope) for slope in (0.0, 0.5, 1.0)]
    return [(sound / np.abs(sound).max()).astype(np.float32) for sound in sounds]


def noise(num_samples: int, rng: np.random.Generator) -> np.ndarray:
    """White, pink or brown noise, a hum, clicks, or nothing at all; peak about 1."""
    kind = rng.integers(6)
    if kind < 3:
        sound = np.roll(noise_bank()[kind], rng.integers(16 * SAMPLE_RATE))
        return np.resize(sound, num_samples)
    if kind == 3:
        time = np.arange(num_samples, dtype=np.float32) / SAMPLE_RATE
        return np.sin(2 * np.pi * rng.uniform(50, 1000) * time) * np.float32(0.7)
    if kind == 4:
        return (rng.random(num_samples, dtype=np.float32) < 0.001).astype(np.float32)
    return np.zeros(num_samples, np.float32)


def change_speed(waveform: np.ndarray, factor: float) -> np.ndarray:
    """Resample: ``factor`` above 1 is faster and higher."""
    positions = np.arange(0, len(waveform) - 1, factor)
    return np.interp(positions, np.arange(len(waveform)), waveform).astype(np.float32)


def truncated(utterance: Utterance, rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """The start of an utterance, cut between two words, and the words it holds."""
    word = int(rng.integers(1, len(utterance.words)))
    position, start = utterance.words[word]
    end = int((start + rng.uniform(-0.03, 0.08)) * SAMPLE_RATE)
    return utterance.waveform[:end], utterance.text[:position].rstrip(" ,，")


def gap(rng: np.random.Generator, *, longest: float) -> np.ndarray:
    """Silence: mostly short, in one case of ten up to ``longest`` seconds."""
    seconds = rng.uniform(0, longest if rng.random() < 0.1 else min(longest, 0.5))
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def speech(utterances: Sequence[Utterance], rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """Utterances joined with pauses, the last one sometimes cut, and what they say."""
    pieces, texts = [gap(rng, longest=3.0)], []
    for utterance in utterances:
        waveform, text, is_last = utterance.waveform, utterance.text, utterance is utterances[-1]
        is_cut = is_last and len(utterance.words) > 2 and rng.random() < TRUNCATED_SHARE
        if is_cut:
            waveform, text = truncated(utterance, rng)
        waveform = change_speed(waveform.astype(np.float32), rng.uniform(0.87, 1.15))
        waveform *= rng.uniform(0.5, 1.0) / max(1.0, float(np.abs(waveform).max()))
        pause = gap(rng, longest=0.15 if is_cut else 2.0)
        pieces += [waveform, pause if is_last else np.append(pause, np.zeros(2400, np.float32))]
        texts.append(text)
    return np.concatenate(pieces), grammar.join(texts)


def equaliser(rng: np.random.Generator) -> torch.Tensor:
    """A random smooth colouring of the mel bins, sometimes with nothing above 4 kHz."""
    knots = rng.uniform(-0.8, 0.8, 6) * (rng.random() < 0.6)
    shape = 10 ** np.interp(np.linspace(0, 5, NUM_MEL_BINS), np.arange(6), knots)
    if rng.random() < 0.08:
        shape[rng.integers(88, 98) :] *= 1e-9
    return torch.from_numpy(shape).float()


def mask_bands(features: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """SpecAugment: hide bands of mel bins and of frames behind the clip's mean."""
    mean = features.mean()
    for _ in range(rng.integers(0, 3)):
        start, width = rng.integers(0, NUM_MEL_BINS - 16), rng.integers(1, 16)
        features[start : start + width] = mean
    num_frames = features.shape[1]
    for _ in range(rng.integers(0, 1 + max(1, num_frames // 120))):
        start, width = rng.integers(0, num_frames), rng.integers(1, 12)
        features[:, start : start + width] = mean
    return features


# --- what is told


def pick_spellings(text: str, language: str, rng: random.Random) -> tuple[str, list[str]]:
    """Give some names their second spelling; returns the text and the names to mention."""
    mentioned = []
    for first, second in grammar.SPELLINGS[language].items():
        if first not in text:
            continue
        if rng.random() < 0.6:
            text = text.replace(first, second)
            mentioned.append(second)
        elif rng.random() < 0.5:
            mentioned.append(first)
    return text, mentioned


def distractors(text: str, language: str, rng: random.Random) -> list[str]:
    """Names and places that may or may not be said, never the rival of a spelling in use."""
    slots = grammar.SLOTS[language]
    words = [
        word for name in slots if name in NAME_SLOTS for word in slots[name] if "{" not in word
    ]
    pairs = grammar.SPELLINGS[language]
    words = [pairs[word] if word in pairs and rng.random() < 0.5 else word for word in words]
    rivals = {*pairs, *pairs.values()}
    chosen = rng.sample(words, rng.randint(0, 5))
    return [word for word in chosen if word not in rivals or first_spelling(word) not in text]


NAME_SLOTS = ("first", "last", "person", "city", "place", "food")


def first_spelling(word: str) -> str:
    """The first spelling of a name given in either."""
    for pairs in grammar.SPELLINGS.values():
        for first, second in pairs.items():
            word = first if word == second else word
    return word


def make_context(spoken: str, language: str, rng: random.Random) -> tuple[str, str]:
    """A list of keywords, and the text in the spelling that list asks for."""
    text, mentioned = pick_spellings(spoken, language, rng)
    words = mentioned + distractors(spoken, language, rng)
    rng.shuffle(words)
    separator = rng.choice([", ", " ", "\n", "、" if language == "Chinese" else "; "])
    heading = rng.choice(["", "", "", "Names: ", "Keywords: "])
    return text, heading + separator.join(words) if words else ""


# --- samples


def realise(plan: Plan) -> Sample:
    """Synthesize the clip of a plan and decide its prompt."""
    rng, choose = np.random.default_rng(plan.seed), random.Random(plan.seed)
    spoken, language, context = "", "None", ""
    if plan.utterances:
        waveform, spoken = speech(plan.utterances, rng)
        language = plan.utterances[0].language
    else:
        seconds = choose.choice([choose.uniform(0.2, 3), choose.uniform(3, 15)])
        waveform = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
    text = spoken
    if choose.random() < CONTEXT_SHARE:
        text, context = make_context(spoken, language, choose) if spoken else ("", "Anna, Berlin")
    if not spoken or (not plan.is_clean and rng.random() < 0.75):
        waveform = waveform + noise(len(waveform), rng) * 10 ** rng.uniform(-2.5, -0.9)
    waveform = waveform * 10 ** rng.uniform(-1.3, 0)
    features = log_mel(waveform, None if plan.is_clean else equaliser(rng))
    if not plan.is_clean:
        features = mask_bands(features, rng)
    return Sample(features, text, language, context, spoken, choose.random() < FORCED_SHARE)


def plan_epoch(
    corpus: Sequence[Utterance], *, longest_group: int, clean_share: float, seed: int
) -> list[Plan]:
    """Every utterance once, alone or with others, and clips without speech, shuffled."""
    rng = random.Random(seed)
    groups = list(_group(corpus, longest_group, rng))
    groups += [()] * int(NONE_SHARE * (1 - clean_share) * len(groups))
    rng.shuffle(groups)
    return [
        Plan(group, bool(group) and rng.random() < clean_share, rng.getrandbits(32))
        for group in groups
    ]


def _group(
    corpus: Sequence[Utterance], longest: int, rng: random.Random
) -> Iterator[tuple[Utterance, ...]]:
    queues = {language: [] for language in grammar.LANGUAGES}
    for utterance in rng.sample(corpus, len(corpus)):
        queues[utterance.language].append(utterance)
    while any(queues.values()):
        size = rng.choices([1, rng.randint(2, 3), rng.randint(4, 8), 16], [70, 18, 8, 4])[0]
        language = rng.choices(list(queues), [len(queue) for queue in queues.values()])[0]
        is_mixed = rng.random() < MIXED_SHARE
        group: list[Utterance] = []
        seconds = 0.5
        while len(group) < min(size, longest) and seconds < MAX_CLIP_S - 6:
            left = [name for name in queues if queues[name]] if is_mixed else [language]
            if not left or not queues[language := rng.choice(left)]:
                break
            group.append(queues[language].pop())
            seconds += len(group[-1].waveform) / SAMPLE_RATE + 0.5
        if group:
            yield tuple(group)


# --- batches


def pad_features(features: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-mels as one batch of whole chunks, (batch, 128, frames), and which frames are real."""
    width = -(-max(mel.shape[1] for mel in features) // CHUNK_FRAMES) * CHUNK_FRAMES
    batch = torch.zeros(len(features), NUM_MEL_BINS, width)
    mask = torch.zeros(len(features), width, dtype=torch.long)
    for index, mel in enumerate(features):
        batch[index, :, : mel.shape[1]] = mel
        mask[index, : mel.shape[1]] = 1
    return batch, mask


def collate(samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase) -> dict:
    """Pad to a batch: right-padded token rows (causal attention then needs no mask)."""
    features, frame_mask = pad_features([sample.features for sample in samples])
    rows = [_tokens(sample, tokenizer) for sample in samples]
    spoken = [torch.tensor(tokenizer.encode(s.spoken), dtype=torch.long) for s in samples]
    num_audio = [num_audio_tokens(sample.features.shape[1]) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_features": features,
        "input_features_mask": frame_mask,
        "input_ids": pad([ids for ids, _ in rows], True, tokenizer.pad_token_id),
        "labels": pad([labels for _, labels in rows], True, IGNORED),
        "audio_lengths": torch.tensor(num_audio),
        "spoken": torch.cat(spoken),
        "spoken_lengths": torch.tensor([len(ids) for ids in spoken]),
    }


def prompt_tokens(
    context: str, num_frames: int, language: str | None, tokenizer: PreTrainedTokenizerBase
) -> list[int]:
    """The prompt with its audio placeholders; ``language`` forces one."""
    audio = [tokenizer.convert_tokens_to_ids("<|audio_pad|>")] * num_audio_tokens(num_frames)
    forced = f"language {language}<asr_text>" if language else ""
    return (
        tokenizer.encode(PROMPT.format(context=context))
        + audio
        + tokenizer.encode(AFTER_AUDIO + forced)
    )


def _tokens(
    sample: Sample, tokenizer: PreTrainedTokenizerBase
) -> tuple[torch.Tensor, torch.Tensor]:
    forced = None
    answer = f"language {sample.language}<asr_text>{sample.text}<|im_end|>"
    if sample.is_forced:
        forced = "English" if sample.language == "None" else sample.language
        answer = f"{sample.text}<|im_end|>"
    num_frames = sample.features.shape[1]
    prompt = prompt_tokens(sample.context, num_frames, forced, tokenizer)
    target = tokenizer.encode(answer)
    return torch.tensor(prompt + target), torch.tensor([IGNORED] * len(prompt) + target)


class Batches(torch.utils.data.IterableDataset):
    """The samples of one epoch, realised as they are needed, in batches of like length."""

    def __init__(
        self, plans: list[Plan], tokenizer: PreTrainedTokenizerBase, *, chunks_per_batch: int
    ) -> None:
        self._plans, self._tokenizer, self._chunks = plans, tokenizer, chunks_per_batch

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        plans = self._plans[worker.id :: worker.num_workers] if worker else self._plans
        for start in range(0, len(plans), SORTED_TOGETHER):
            samples = [realise(plan) for plan in plans[start : start + SORTED_TOGETHER]]
            samples.sort(key=lambda sample: sample.features.shape[1])
            batches = _cut(samples, self._chunks)
            random.Random(start).shuffle(batches)
            yield from (collate(batch, self._tokenizer) for batch in batches)


def _cut(samples: list[Sample], chunks_per_batch: int) -> list[list[Sample]]:
    """Batches of at most so many chunks, with their padding; ``samples`` come by length."""
    batches: list[list[Sample]] = [[]]
    for sample in samples:
        num_chunks = -(-sample.features.shape[1] // CHUNK_FRAMES)
        if batches[-1] and (len(batches[-1]) + 1) * num_chunks > chunks_per_batch:
            batches.append([])
        batches[-1].append(sample)
    return batches
