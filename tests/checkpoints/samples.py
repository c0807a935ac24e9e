# SPDX-License-Identifier: Apache-2.0
"""Training samples: utterances joined, degraded and put behind the model's prompt.

An epoch is planned first (which utterances go together, seeds, batches of like length) and
realised batch by batch, so that every epoch has other noise, speed, gaps and contexts.
"""

import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
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
SORTED_TOGETHER = 192  # samples

NONE_SHARE = 0.07  # of degraded samples: silence or noise alone
MIXED_SHARE = 0.2  # of joined samples: more than one language
TRUNCATED_SHARE = 0.2  # cut after a word, as in a stream
CONTEXT_SHARE = 0.35
SPELLING_CONTEXT_SHARE = 0.6  # where a name of two spellings is said
FORCED_SHARE = 0.2  # language given in the prompt

PROMPT = "<|im_start|>system\n{context}<|im_end|>\n<|im_start|>user\n<|audio_start|>"
AFTER_AUDIO = "<|audio_end|><|im_end|>\n<|im_start|>assistant\n"
IGNORED = -100
NOWHERE = (0, 0)
SLOTS_PER_TOKEN = 4  # of 20 ms; the last token of a chunk has but two

WINDOW = torch.hann_window(N_FFT)
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
class Word:
    """Where a word begins in the text, and when it is said, in seconds."""

    position: int
    start: float
    end: float

    @property
    def is_timed(self) -> bool:
        """False for engines that do not tell: it then stands for all words up to the next."""
        return self.end > 0


@dataclass(frozen=True)
class Speech:
    """A recording, what it says and when."""

    waveform: np.ndarray
    text: str
    words: list[Word]
    phones: list[tuple[str, float]]  # (name, start in seconds); the empty name is silence


@dataclass(frozen=True)
class Sample:
    """One clip with its prompt and the expected answer."""

    features: torch.Tensor  # (128, frames)
    text: str
    language: str  # "None" without speech
    context: str
    words: list[Word]  # of ``text``
    phones: list[tuple[str, float]]
    is_forced: bool


@dataclass(frozen=True)
class Plan:
    """The content of a sample; empty ``utterances`` means no speech."""

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
        window=WINDOW,
        return_complex=True,
    )[:, :-1]
    mel = MEL_FILTERS.T @ (stft.real.square() + stft.imag.square())
    if shape is not None:
        mel = mel * shape[:, None]
    log = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.max() - 8.0) + 4.0) / 4.0


def num_audio_tokens(num_frames: int) -> int:
    whole, rest = divmod(num_frames, CHUNK_FRAMES)
    return whole * TOKENS_PER_CHUNK + -(-rest // 8)


# --- audio


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


def word_times(utterance: Utterance) -> list[Word]:
    """Each word from its event to the end of its last sound before the next one's."""
    if not utterance.words:
        return [Word(0, 0.0, 0.0)]
    last = len(utterance.waveform) / SAMPLE_RATE
    ends = [start for _, start in utterance.phones[1:]] + [last]
    sounds = [(at, end) for (name, at), end in zip(utterance.phones, ends, strict=True) if name]
    nexts = [start for _, start in utterance.words[1:]] + [last]
    words = []
    for (position, start), limit in zip(utterance.words, nexts, strict=True):
        end = max([end for at, end in sounds if start <= at < limit], default=limit)
        words.append(Word(position, start, min(end, limit)))
    return words


def as_speech(utterance: Utterance, rng: np.random.Generator, *, is_cut: bool) -> Speech:
    """An utterance at another speed, or its start, cut between two words."""
    waveform, text, words = utterance.waveform, utterance.text, word_times(utterance)
    if is_cut:
        cut = words[int(rng.integers(1, len(words)))]
        waveform = waveform[: int((cut.start + rng.uniform(-0.03, 0.1)) * SAMPLE_RATE)]
        text = text[: cut.position].rstrip(" ,，")
        words = words[: words.index(cut)]
    factor = rng.uniform(0.87, 1.15)
    waveform = change_speed(waveform.astype(np.float32), factor)
    waveform *= rng.uniform(0.5, 1.0) / max(1.0, float(np.abs(waveform).max()))
    words = [Word(word.position, word.start / factor, word.end / factor) for word in words]
    return Speech(waveform, text, words, [(name, at / factor) for name, at in utterance.phones])


def gap(rng: np.random.Generator, *, longest: float) -> np.ndarray:
    """Silence: mostly short, in one case of ten up to ``longest`` seconds."""
    seconds = rng.uniform(0, longest if rng.random() < 0.1 else min(longest, 0.5))
    return np.zeros(int(seconds * SAMPLE_RATE), np.float32)


def join_speech(utterances: Sequence[Utterance], rng: np.random.Generator) -> Speech:
    """Utterances joined with pauses, the last one sometimes cut."""
    pieces, text, words, phones = [gap(rng, longest=3.0)], "", [], [("", 0.0)]
    num_samples = len(pieces[0])
    for utterance in utterances:
        is_last = utterance is utterances[-1]
        is_cut = is_last and len(utterance.words) > 2 and rng.random() < TRUNCATED_SHARE
        said = as_speech(utterance, rng, is_cut=is_cut)
        pause = gap(rng, longest=0.15 if is_cut else 2.0)
        if not is_last:
            pause = np.append(pause, np.zeros(2400, np.float32))
        text = grammar.join([text, said.text]) if text else said.text
        position, time = len(text) - len(said.text), num_samples / SAMPLE_RATE
        words += [
            Word(w.position + position, w.start + time, w.end + time)
            if w.is_timed
            else Word(position, 0.0, 0.0)
            for w in said.words
        ]
        end = len(said.waveform) / SAMPLE_RATE
        phones += [(name, at + time) for name, at in said.phones if at < end]
        phones.append(("", time + end))
        pieces += [said.waveform, pause]
        num_samples += len(said.waveform) + len(pause)
    return Speech(np.concatenate(pieces), text, words, phones)


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


# --- context


def respell(text: str, words: list[Word], first: str, second: str) -> tuple[str, list[Word]]:
    """Write a name in its other spelling; the words behind it move."""
    start = text.find(first)
    while start >= 0:
        text = text[:start] + second + text[start + len(first) :]
        shift = len(second) - len(first)
        words = [
            replace(word, position=word.position + shift * (word.position > start))
            for word in words
        ]
        start = text.find(first, start + len(second))
    return text, words


def pick_spellings(
    text: str, words: list[Word], language: str, rng: random.Random
) -> tuple[str, list[Word], list[str]]:
    """Give some names their second spelling; returns text and words, and names to mention."""
    mentioned = []
    for first, second in grammar.SPELLINGS[language].items():
        if first not in text:
            continue
        if rng.random() < 0.6:
            text, words = respell(text, words, first, second)
            mentioned.append(second)
        elif rng.random() < 0.5:
            mentioned.append(first)
    return text, words, mentioned


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


def make_context(said: Speech, language: str, rng: random.Random) -> tuple[str, list[Word], str]:
    """Text and words in the spelling that a list of keywords asks for, and that list."""
    text, words, mentioned = pick_spellings(said.text, said.words, language, rng)
    keywords = mentioned + distractors(said.text, language, rng)
    rng.shuffle(keywords)
    separator = rng.choice([", ", ", ", " ", "\n", "、" if language == "Chinese" else "; "])
    heading = rng.choice(["", "", "", "Names: ", "Keywords: "])
    return text, words, heading + separator.join(keywords) if keywords else ""


# --- samples


def realise(plan: Plan) -> Sample:
    """Synthesize the clip of a plan and decide its prompt."""
    rng, choose = np.random.default_rng(plan.seed), random.Random(plan.seed)
    if plan.utterances:
        said = join_speech(plan.utterances, rng)
        language = plan.utterances[0].language
    else:
        seconds = choose.choice([choose.uniform(0.2, 3), choose.uniform(3, 15)])
        silence = np.zeros(int(seconds * SAMPLE_RATE), np.float32)
        said, language = Speech(silence, "", [], [("", 0.0)]), "None"
    text, words, context = said.text, said.words, ""
    is_named = bool(text) and grammar.has_spellings(text, language)
    if choose.random() < (SPELLING_CONTEXT_SHARE if is_named else CONTEXT_SHARE):
        if text:
            text, words, context = make_context(said, language, choose)
        else:
            context = "Anna, Berlin"
    waveform = said.waveform
    if not text or (not plan.is_clean and rng.random() < 0.75):
        waveform = waveform + noise(len(waveform), rng) * 10 ** rng.uniform(-2.8, -1.1)
    waveform = waveform * 10 ** rng.uniform(-1.3, 0)
    features = log_mel(waveform, None if plan.is_clean else equaliser(rng))
    if not plan.is_clean:
        features = mask_bands(features, rng)
    is_forced = choose.random() < FORCED_SHARE
    return Sample(features, text, language, context, words, said.phones, is_forced)


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


def frame_phones(sample: Sample, phone_ids: dict[str, int]) -> torch.Tensor:
    """The phone in each 20 ms of each audio token, (tokens, 4)."""
    num_frames = sample.features.shape[1]
    num_chunks = -(-num_frames // CHUNK_FRAMES)
    middles = 0.02 * np.arange(-(-num_frames // 2)) + 0.005  # frames are centred on n * 10 ms
    indices = np.searchsorted([at for _, at in sample.phones], middles, side="right") - 1
    ids = np.array([phone_ids[name] for name, _ in sample.phones])[indices]
    slots = np.full((num_chunks, TOKENS_PER_CHUNK * SLOTS_PER_TOKEN), IGNORED)
    per_chunk = CHUNK_FRAMES // 2
    padded = np.pad(ids, (0, num_chunks * per_chunk - len(ids)), constant_values=IGNORED)
    slots[:, :per_chunk] = padded.reshape(num_chunks, per_chunk)
    tokens = torch.from_numpy(slots).reshape(-1, SLOTS_PER_TOKEN)
    return tokens[: num_audio_tokens(num_frames)]


def token_at(seconds: float) -> int:
    """The audio token in which a time lies."""
    chunk, frame = divmod(int(seconds * 100), CHUNK_FRAMES)
    return TOKENS_PER_CHUNK * chunk + frame // 8


def word_spans(sample: Sample, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The audio tokens (first, one past the last) of the word that each text token ends in."""
    positions = [word.position for word in sample.words]
    spans = []
    for _, end in offsets:
        word = sample.words[max(0, bisect_right(positions, end - 1) - 1)]
        span = (token_at(word.start), token_at(word.end) + 1)
        spans.append(span if word.is_timed else NOWHERE)
    return spans


def collate(
    samples: Sequence[Sample], tokenizer: PreTrainedTokenizerBase, phone_ids: dict[str, int]
) -> dict:
    """Pad to a batch: right-padded token rows (causal attention then needs no mask)."""
    features, frame_mask = pad_features([sample.features for sample in samples])
    rows = [_tokens(sample, tokenizer) for sample in samples]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_features": features,
        "input_features_mask": frame_mask,
        "input_ids": pad([row.input_ids for row in rows], True, tokenizer.pad_token_id),
        "labels": pad([row.labels for row in rows], True, IGNORED),
        "spans": pad([row.spans for row in rows], True, 0),
        "phones": torch.cat([frame_phones(sample, phone_ids) for sample in samples]),
        "audio_lengths": torch.tensor([num_audio_tokens(s.features.shape[1]) for s in samples]),
        "spoken": torch.cat([row.text_ids for row in rows]),
        "spoken_lengths": torch.tensor([len(row.text_ids) for row in rows]),
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


@dataclass(frozen=True)
class Row:
    """The tokens of a sample; ``labels`` and ``spans`` of all but the answer are void."""

    input_ids: torch.Tensor
    labels: torch.Tensor
    spans: torch.Tensor  # (tokens, 2): where in the row the audio of a token's word stands
    text_ids: torch.Tensor


def _tokens(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Row:
    forced, head = None, f"language {sample.language}<asr_text>"
    if sample.is_forced:
        forced, head = "English" if sample.language == "None" else sample.language, ""
    prompt = prompt_tokens(sample.context, sample.features.shape[1], forced, tokenizer)
    text = tokenizer(sample.text, return_offsets_mapping=True)
    text_ids, prompt = text["input_ids"], prompt + tokenizer.encode(head)
    labels = [IGNORED] * (len(prompt) - len(tokenizer.encode(head)))
    labels += tokenizer.encode(head) + text_ids + [tokenizer.eos_token_id]
    spans = torch.tensor(
        [NOWHERE] * len(prompt) + word_spans(sample, text["offset_mapping"]) + [NOWHERE]
    )
    first_audio = prompt.index(tokenizer.convert_tokens_to_ids("<|audio_pad|>"))
    return Row(
        input_ids=torch.tensor([*prompt, *text_ids, tokenizer.eos_token_id]),
        labels=torch.tensor(labels),
        spans=torch.where(spans[:, 1:] > 0, spans + first_audio, spans),
        text_ids=torch.tensor(text_ids, dtype=torch.long),
    )


class Batches(torch.utils.data.IterableDataset):
    """The samples of one epoch, realised as they are needed, in batches of like length."""

    def __init__(
        self,
        plans: list[Plan],
        collate: Callable[[Sequence[Sample]], dict],
        *,
        chunks_per_batch: int,
    ) -> None:
        self._plans, self._collate, self._chunks = plans, collate, chunks_per_batch

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        plans = self._plans[worker.id :: worker.num_workers] if worker else self._plans
        for start in range(0, len(plans), SORTED_TOGETHER):
            samples = [realise(plan) for plan in plans[start : start + SORTED_TOGETHER]]
            samples.sort(key=lambda sample: sample.features.shape[1])
            batches = _cut(samples, self._chunks)
            random.Random(start).shuffle(batches)
            yield from map(self._collate, batches)


def _cut(samples: list[Sample], chunks_per_batch: int) -> list[list[Sample]]:
    """Batches of at most so many chunks, with their padding; ``samples`` come by length."""
    batches: list[list[Sample]] = [[]]
    for sample in samples:
        num_chunks = -(-sample.features.shape[1] // CHUNK_FRAMES)
        if batches[-1] and (len(batches[-1]) + 1) * num_chunks > chunks_per_batch:
            batches.append([])
        batches[-1].append(sample)
    return batches
