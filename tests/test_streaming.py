# SPDX-License-Identifier: Apache-2.0
"""Streams without an engine: windows against whole clips, and laws of text that only grows."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import regex
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from support.audio import DATA, HOSTILE, noise, poisoned

from qwen3_asr_vllm import streaming
from qwen3_asr_vllm.drafts import Draft
from qwen3_asr_vllm.geometry import SAMPLE_RATE, Geometry, num_frames
from qwen3_asr_vllm.pauses import is_silent
from qwen3_asr_vllm.prompt import PUBLISHED, parse_output
from qwen3_asr_vllm.streaming import Stream, Update
from qwen3_asr_vllm.transcript import Token
from qwen3_asr_vllm.windows import GrowingClip, Window

GEOMETRY = Geometry()
STEP = 2 * SAMPLE_RATE


# ---- windows ----


@cache
def speech() -> np.ndarray:
    """88 s of real speech; its loudest moment is late, so the floor of early windows moves."""
    samples, rate = soundfile.read(DATA / "three_languages.flac", dtype="float32")
    assert rate == SAMPLE_RATE
    return samples


@cache
def front_end():
    from qwen3_asr_vllm.model.log_mel import LogMel

    return LogMel(128)


def loudest(window: Window) -> float:
    return front_end().loudest(window.samples, GEOMETRY, has_context=window.has_context)


def clip_of(samples) -> GrowingClip:
    return GrowingClip(samples, GEOMETRY, loudest)


def features(windows: list[Window]):
    """(128, frames) of all windows, transformed in one batch as the worker does."""
    import torch

    from qwen3_asr_vllm.model.log_mel import cut_chunks

    chunks = [cut_chunks(w.samples, GEOMETRY, has_context=w.has_context) for w in windows]
    by_window = [GEOMETRY.frames_by_chunk(w.num_frames) for w in windows]
    packed = front_end()(
        torch.from_numpy(np.concatenate(chunks)),
        torch.tensor([n for frames in by_window for n in frames]),
        torch.tensor([i for i, frames in enumerate(by_window) for _ in frames]),
        num_clips=len(windows),
        chunks_at_once=500,
        peaks=torch.tensor([w.peak for w in windows]),
    )
    parts = packed.split([len(part) for part in chunks])
    return torch.cat(
        [
            part.transpose(0, 1).flatten(1)[:, : sum(frames)]
            for part, frames in zip(parts, by_window, strict=True)
        ],
        dim=1,
    )


def whole(samples) -> Window:
    return Window(samples, has_context=False, peak=-math.inf)


# Around the edges of windows and chunks, of the 40 samples that finish a window, and of frames.
EDGES = [base + d for base in (128_000, 256_000, 640_000) for d in (-1, 0, 39, 40, 41, 159, 160)]


@pytest.mark.parametrize("num_samples", [100, 8_000, 16_000, 16_161, *EDGES, 1_000_003])
def test_window_features_equal_those_of_clips(num_samples):
    import torch

    clip = speech()[:num_samples]
    windows = clip_of(clip).windows(num_samples)
    assert sum(w.num_frames for w in windows) == num_frames(num_samples)
    assert torch.equal(features(windows), features([whole(clip)]))


def test_features_stay_equal_while_the_clip_grows():
    import torch

    clip = clip_of(np.empty(0, np.float32))
    rng = np.random.default_rng(0)
    while clip.num_samples < 48 * SAMPLE_RATE:
        n = clip.num_samples
        clip.append(speech()[n : n + int(rng.integers(1, 50_000))])
        windows = clip.windows(clip.num_samples)
        assert torch.equal(features(windows), features([whole(speech()[: clip.num_samples])]))


def test_finished_windows_are_reused_until_louder():
    quiet, loud = noise(17) / 4, noise(1, seed=1)
    clip = clip_of(np.concatenate([noise(8), quiet]))
    before, later = ([w.uuid for w in clip.windows(n)] for n in (17 * 16_000, 24 * 16_000))
    assert before[:2] == later[:2]
    assert before[2] != later[2]  # it was not finished
    clip.append(4 * loud)
    louder = [w.uuid for w in clip.windows(clip.num_samples)]
    assert not set(louder) & {*before, *later}


def test_windows_that_differ_have_other_names():
    samples = noise(8.2)
    names = {
        whole(samples).uuid,
        whole(samples * np.float32(0.999)).uuid,
        whole(samples[:-1]).uuid,
        Window(samples, has_context=True, peak=-math.inf).uuid,
        Window(samples, has_context=False, peak=1.0).uuid,
    }
    assert len(names) == 5


def test_streams_encode_audio_almost_once():
    """300 s of audio in windows that were not there before, against 3,660 s of re-feeding."""
    clip = clip_of(np.resize(speech(), 120 * SAMPLE_RATE + 40))
    known: set[str] = set()
    encoded = refed = 0
    peaks = set()
    for end in range(STEP + 40, clip.num_samples + 1, STEP):
        windows = clip.windows(end)
        encoded += sum(w.num_frames for w in windows if w.uuid not in known)
        refed += num_frames(end)
        known |= {w.uuid for w in windows}
        peaks.add(windows[0].peak)
    assert refed == 366_000
    louder = 12_000 * (len(peaks) - 1)  # each new peak may cost all windows once
    assert 30_000 <= encoded <= 30_000 + louder
    assert refed / encoded > 6


# ---- text ----


class Bytes:
    """A tokenizer whose tokens are bytes: nearly every cut is inside a character."""

    def encode(self, text, *, add_special_tokens):
        assert not add_special_tokens
        return list(text.encode())

    def decode(self, token_ids):
        return bytes(token_ids).decode(errors="replace")


SCRIPTS = [
    "The quick brown fox, twice. ",
    "مرحبا بالعالم، كيف حالُكَ اليوم؟ ",
    "สวัสดีครับ ผมกำลังพูดอยู่ที่นี่",
    "你好，世界。今天天气很好！",
    "こんにちは、世界。がぎぐ",
    "한국어 문장입니다. ",
    "नमस्ते दुनिया, क्षत्रिय ",
    "👩‍👩‍👧 🇩🇪🇫🇷 e\u0301a\u0308 ",
    "language English<asr_text>",
    "language None<asr_text>",
    "<asr_text>",
    "\ufffd",
    "<|spk_0|>Yes.<|spk_1|> No.",
]
DIARIZED = replace(PUBLISHED, special_tokens=("<|spk_0|>", "<|spk_1|>"))
protocols = st.sampled_from([PUBLISHED, DIARIZED, replace(DIARIZED, keeps_special_tokens=True)])
answers = st.lists(
    st.sampled_from(SCRIPTS).flatmap(
        lambda s: st.integers(0, len(s)).flatmap(
            lambda i: st.integers(i, len(s)).map(lambda j: s[i:j])
        )
    ),
    max_size=4,
).map("".join)


def boundaries(text):
    ends = np.cumsum([len(g) for g in regex.findall(r"\X", text)]).tolist()
    return {0, *ends}


@given(
    st.lists(st.tuples(answers, st.booleans()), max_size=8),
    st.sampled_from([None, "Thai"]),
    protocols,
)
def test_final_text_never_changes(steps, language, protocol):
    """Whatever the model writes, the deltas join to how its last answer reads as a whole."""
    draft = Draft(Bytes(), language, protocol)
    deltas, raw = [], ""
    for answer, is_cut_off in steps:
        raw = draft.prefix + answer.replace("\ufffd", "")
        deltas.append(draft.accept(answer, is_cut_off=is_cut_off))
        parsed = parse_output(raw, language=language, protocol=protocol)
        assert parsed.text == draft.text + draft.tentative
    deltas.append(draft.finish())
    text = "".join(deltas)
    assert text == parse_output(raw, language=language, protocol=protocol).text == draft.text
    assert "\ufffd" not in text
    ends = set(np.cumsum([len(d) for d in deltas]).tolist())
    assert ends <= boundaries(text)


def steps_of(text, sizes):
    """Answers of a model that finds more of the text at every step, after its prefix."""
    draft = Draft(Bytes(), None)
    deltas = []
    for size in sizes:
        raw = f"language English<asr_text>{text[:size]}"
        assert raw.startswith(draft.prefix)
        deltas.append(draft.accept(raw[len(draft.prefix) :]))
    return draft, deltas


def test_a_prefix_holds_whole_special_tokens():
    """Two steps that differ in a speaker agree on half of its token, which no model wrote."""
    draft = Draft(Bytes(), "English", DIARIZED)
    for speaker in (0, 1):
        draft.accept(draft.prefix + f"Yes.<|spk_{speaker}|>No, thanks, not today. Goodbye.")
    draft.accept("", is_cut_off=True)
    assert draft.prefix == "Yes."


def test_words_are_final_after_two_steps():
    text = "one two three four five six seven"
    draft, deltas = steps_of(text, [9, 20, 33])
    assert deltas == ["", "one two", " three four"]  # the answers agreed on "t" and on "f", too
    assert draft.tentative == " five six seven"
    assert draft.finish() == " five six seven"


@pytest.mark.parametrize("text", ["你好世界今天天气很好我们出去走走", "สวัสดีครับผมกำลังพูดอยู่ที่นี่ครับ"])
def test_spaceless_languages_wait_for_no_space(text):
    draft, _ = steps_of(text, [8, 12, len(text)])
    assert len(draft.text) >= 4


def test_prefixes_start_at_the_third_step():
    draft = Draft(Bytes(), None)
    draft.accept("language English<asr_text>One")
    assert draft.prefix == ""
    draft.accept("language English<asr_text>Wonderful day")
    assert draft.prefix == "language English<asr_text>Wonderfu"
    assert draft.text == ""


def test_silence_leaves_no_prefix():
    draft = Draft(Bytes(), None)
    for _ in range(3):
        assert draft.accept("language None<asr_text>") == ""
        assert draft.prefix == ""


def test_truncated_answers_are_not_continued():
    draft = Draft(Bytes(), "English")
    for _ in range(3):
        draft.accept("I see. I see. I see. I see.", is_cut_off=True)
    assert (draft.prefix, draft.text) == ("", "")


# ---- streams ----

WORD_S = 1.0  # 0.6 s of a tone whose loudness is the word's number, 0.4 s of nothing


def said(numbers):
    """A recording that says "W0. W1. ..." for an engine that reads loudness."""
    word = np.zeros(round(WORD_S * SAMPLE_RATE), np.float32)
    word[1_600:11_200] = 1
    return np.concatenate([word * np.float32((20 + n) / 1000) for n in numbers])


class Engine:
    """Answers with the words of all windows of a request, less the prefix of its prompt."""

    def __init__(self):
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        head, prefix = request.prompt.split("<|im_start|>assistant\n")
        answer = f"language English<asr_text>{self.text_of(request.windows)}"
        assert answer.startswith(prefix)
        assert head.count("<|audio_pad|>") == len(request.windows)
        return answer[len(prefix) :]

    def text_of(self, windows):
        clip = np.zeros(len(windows) * GEOMETRY.window_samples + 40, np.float32)
        for i, window in enumerate(windows):
            samples = window.samples[200 * window.has_context :]
            clip[i * GEOMETRY.window_samples :][: len(samples)] = samples
        edges = np.flatnonzero(np.diff(clip > 0, prepend=False, append=False)).reshape(-1, 2)
        levels = [clip[start] for start, end in edges if end - start > 9_000]
        return " ".join(f"W{round(1000 * float(level)) - 20}." for level in levels)


def stream_of(**options):
    parts = {"tokenizer": Bytes(), "geometry": GEOMETRY, "loudest": lambda window: 0.0}
    return Stream(**parts | options)


def run(stream, samples, sizes, engine):
    """All updates of a stream that is given the samples in pieces of these sizes."""
    updates, start = [], 0
    sizes = iter(sizes)
    while start < len(samples):
        size = next(sizes)
        stream.push(samples[start : start + size])
        start += size
        if start >= len(samples):
            stream.finish()
        while request := stream.request():
            assert stream.request() is None  # one at a time
            stream.accept(engine(request))
            updates.append(stream.update())
    updates.append(stream.update())
    return updates


def test_changed_options_decode_again():
    stream = stream_of(step_s=1)
    stream.push(speech()[: 2 * SAMPLE_RATE + 40])
    request = stream.request()
    with pytest.raises(RuntimeError, match="accept"):
        stream.configure(language="de")
    stream.accept("language English<asr_text>Hello there")
    assert stream.request() is None
    stream.configure(language="de", step_s=1)
    stream.finish()
    request = stream.request()
    assert request.prompt.endswith("language German<asr_text>")
    stream.accept("Hallo.")
    assert (stream.text, stream.languages, stream.is_done) == ("Hallo.", ["German"], True)


def test_foreign_outputs_are_decoded_again():
    stream = stream_of(step_s=1, languages=["de", "fr"])
    stream.push(speech()[: 2 * SAMPLE_RATE])
    stream.finish()
    request = stream.request()
    assert request.decoding.scored_languages == ("None", "German", "French")
    stream.accept(
        "language English<asr_text>Hi.", language_logprobs={"German": -3.0, "French": -2.0}
    )
    request = stream.request()
    assert request.prompt.endswith("language French<asr_text>")
    assert request.decoding.scored_languages == ()
    stream.accept("Salut.")
    assert (stream.text, stream.languages) == ("Salut.", ["French"])


SPOKEN = "<|spk_0|>One. <|spk_1|>Two. Three. <|spk_0|>Four. Five. Six."


@pytest.mark.parametrize("skip", [True, False])
def test_streams_keep_special_tokens_on_request(skip):
    stream = stream_of(protocol=DIARIZED, skip_special_tokens=skip, clip_s=6, language="en")

    def engine(request):
        prefix = request.prompt.rpartition("<asr_text>")[2]
        assert "<|spk" not in request.prompt.removesuffix(prefix)
        return SPOKEN.removeprefix(prefix)

    updates = run(stream, said(range(12)), repeated([STEP]), engine)
    once = "One. Two. Three. Four. Five. Six." if skip else SPOKEN
    num_clips = stream.text.count("Six.")
    assert num_clips > 1 and stream.text == " ".join([once] * num_clips)
    assert "".join(u.delta for u in updates) == stream.text


def test_a_stream_may_begin_to_keep_special_tokens():
    stream = stream_of(protocol=DIARIZED, step_s=1, language="en")
    stream.push(said(range(2)))
    assert stream.request()
    stream.accept("<|spk_0|>Yes.")
    assert stream.update() == Update("", "Yes.")
    stream.configure(language="en", step_s=1, skip_special_tokens=False)
    stream.finish()
    assert stream.request()
    stream.accept("<|spk_0|>Yes.")
    assert stream.text == "<|spk_0|>Yes."


def repeated(sizes):
    while True:
        yield from sizes


@settings(max_examples=40)
@given(
    sizes=st.lists(st.integers(160, 100_000), min_size=1, max_size=5),
    num_words=st.integers(1, 50),
    clip_s=st.integers(4, 20),
    spare_s=st.integers(0, 20),
)
def test_every_word_is_emitted_once(sizes, num_words, clip_s, spare_s):
    stream = stream_of(clip_s=clip_s, max_clip_s=clip_s + spare_s)
    updates = run(stream, said(range(num_words)), repeated(sizes), Engine())
    expected = " ".join(f"W{n}." for n in range(num_words))
    assert stream.text == "".join(u.delta for u in updates) == expected
    assert updates[-1].tentative == ""
    assert stream.is_done
    assert stream.languages == ["English"]


def test_every_step_shows_the_whole_text():
    stream, engine = stream_of(), Engine()
    final = ""
    for update in run(stream, said(range(30)), repeated([STEP]), engine)[:-1]:
        final += update.delta
        text = engine.text_of(engine.requests.pop(0).windows)
        assert text.startswith(final)
        assert final + update.tentative == text


def test_steps_stand_40_samples_behind():
    engine = Engine()
    run(stream_of(), said(range(17)), repeated([1_000]), engine)
    lengths = [sum(w.num_frames for w in request.windows) for request in engine.requests]
    assert lengths == [200, 400, 600, 800, 1000, 1200, 1400, 1600, 1700]
    assert [len(r.windows) for r in engine.requests] == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_slow_engines_get_fewer_larger_steps():
    stream, engine = stream_of(), Engine()
    stream.push(said(range(31)))
    stream.finish()
    while request := stream.request():
        stream.accept(engine(request))
    assert stream.text.split() == [f"W{n}." for n in range(31)]
    assert len(engine.requests) == 1


def test_a_pause_is_decoded_at_once():
    stream, engine = stream_of(wants_completeness=True), Engine()
    stream.push(said(range(3))[:-4_800])
    stream.accept(engine(stream.request()))  # of the first 2 s
    assert stream.request() is None
    request = stream.request(is_paused=True)
    assert request.decoding.wants_logprobs
    stream.accept(engine(request), tokens=[Token(1, "W2.", math.log(0.9)), Token(2, "", 0.0)])
    assert stream.update().tentative.endswith("W2.")
    assert stream.completeness == pytest.approx(0.9)
    assert stream.request(is_paused=True) is None
    stream.finish()
    assert stream.request() is None  # all is decoded
    assert (stream.text, stream.is_done, stream.tokens) == ("W0. W1. W2.", True, [])


def test_new_clips_carry_the_last_sentence():
    engine = Engine()
    stream = stream_of(clip_s=10, max_clip_s=20, context="Ada")
    run(stream, said(range(30)), repeated([STEP]), engine)
    systems = [r.prompt.split("<|im_end|>")[0].split("system\n")[1] for r in engine.requests]
    assert list(dict.fromkeys(systems))[:2] == ["Ada", "Ada\nW8."]


def test_a_forced_language_opens_every_answer():
    stream = stream_of(language="de")
    stream.push(said(range(3)))
    request = stream.request()
    assert request.prompt.endswith("<|im_start|>assistant\nlanguage German<asr_text>")


def test_silence_is_dropped():
    stream, engine = stream_of(), Engine()
    minute = np.zeros(60 * SAMPLE_RATE, np.float32)
    updates = run(stream, np.concatenate([minute, said([1, 2, 3])]), repeated([STEP]), engine)
    stream = stream_of()
    samples = np.concatenate([said([1, 2, 3]), *[minute] * 10, said([4])])
    updates = run(stream, samples, repeated([STEP]), engine)
    assert "".join(u.delta for u in updates) == "W1. W2. W3. W4."
    assert len(engine.requests) <= 8
    assert max(sum(w.num_frames for w in r.windows) for r in engine.requests) <= 500


def test_silence_is_searched_once(monkeypatch):
    """Ten minutes in pieces of 20 ms, before the first request."""
    looked_at = []
    monkeypatch.setattr(streaming, "is_silent", lambda w: looked_at.append(len(w)) or is_silent(w))
    stream, samples = stream_of(), np.full(600 * SAMPLE_RATE, 0.1, np.float32)
    for start in range(0, len(samples), 320):
        stream.push(samples[start : start + 320])
    assert stream.num_waiting == len(samples)
    assert sum(looked_at) <= len(samples)


def test_unrequested_audio_waits():
    stream = stream_of(clip_s=60, max_clip_s=60)
    stream.push(np.full(600 * SAMPLE_RATE, 0.1, np.float32))
    assert stream.request() and 540 <= stream.num_waiting / SAMPLE_RATE < 542  # it cut near 60 s


def test_nothing_at_all_is_no_text():
    stream = stream_of()
    stream.finish()
    assert stream.request() is None
    assert stream.update() == Update("", "")
    with pytest.raises(ValueError, match="finished"):
        stream.push(np.ones(1, np.float32))


def test_wrong_lengths_and_languages_are_refused():
    with pytest.raises(ValueError, match="rise"):
        stream_of(step_s=3, clip_s=2)
    with pytest.raises(ValueError, match="klingon"):
        stream_of(language="klingon")
    for value in HOSTILE:
        with pytest.raises(ValueError) as error:
            stream_of().push(poisoned(np.zeros(1_600, np.float32), value))
        assert f"{value:g} at 0.050 s" in str(error.value)
