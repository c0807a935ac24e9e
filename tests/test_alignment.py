# SPDX-License-Identifier: Apache-2.0
"""Words, prompts and times around the forced aligner, with an oracle in the place of its engine."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checks import lines_run

from qwen3_asr_vllm import units as text_units
from qwen3_asr_vllm.alignment import AlignmentOutput, align, repair
from qwen3_asr_vllm.formats import rounded
from qwen3_asr_vllm.geometry import SAMPLE_RATE
from qwen3_asr_vllm.options import TranscribeOptions
from qwen3_asr_vllm.transcription import EngineOutput, transcribe
from qwen3_asr_vllm.units import AlignmentError, split_units

# Any text, rich in what units and punctuation are made of.
TEXTS = st.text(
    st.sampled_from("aé'9 -–.,?!:;\"“”«»„()\n\u3000。，、“”中文字かナ한국a\u0301😀")
    | st.characters()
)


class Oracle:
    """Knows the time of each unit of a recording, but sees only the audio of its request.

    The recording's samples count up, so a window tells where it is; units are numbered. What is
    not said in the window ends up at its end, or, with ``stuck_at``, nothing past that many
    seconds is distinguished, as with real aligners past 270 s.
    """

    def __init__(self, spans, *, stuck_at=float("inf")):
        self.spans, self.stuck_at = spans, stuck_at
        self.windows = []

    def __call__(self, request):
        start, seconds = int(request.waveform[0]) / SAMPLE_RATE, len(request.waveform) / SAMPLE_RATE
        self.windows.append((start, start + seconds))
        times = [time for unit in request.units for time in self.spans[int(unit)]]
        seen = (max(0, min(time - start, seconds, self.stuck_at)) for time in times)
        return AlignmentOutput([round(time * 1000 / 80) * 80 for time in seen])


def nothing(request):
    return AlignmentOutput([0] * 2 * len(request.units))


def counting(seconds):
    return np.arange(seconds * SAMPLE_RATE, dtype=np.float64)


def drive(generator, engine):
    requests = next(generator)
    while True:
        try:
            requests = generator.send([engine(request) for request in requests])
        except StopIteration as stop:
            return stop.value


def run(seconds, text, engine, **options):
    generator = align(counting(seconds), text, **options)
    try:
        return drive(generator, engine)
    except StopIteration as stop:  # it asked nothing
        return stop.value


def units(text, language=None):
    return [unit.spoken for unit in split_units(text, language)]


# units --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Hello, world!", ["Hello", "world"]),
        ("It's 3.5 % – isn't it?", ["It's", "35", "isn't", "it"]),
        ("„Grüß Gott“, sagte er.", ["Grüß", "Gott", "sagte", "er"]),
        ("well-known", ["wellknown"]),
        ("我用iPhone 15。", ["我", "用", "iPhone", "15"]),
        ("Это — дом…", ["Это", "дом"]),
        ("cafe\u0301 😀 ❤\ufe0f", ["café"]),
        ("… – ! ' ''", []),
    ],
)
def test_units_are_words_and_chinese_characters(text, expected):
    assert units(text) == expected


def test_japanese_is_cut_by_nagisa():
    nagisa = pytest.importorskip("nagisa")
    text = "今日は、天気がいいですね。ｶﾞｷ　ＡＢＣ"
    assert (
        units(text)
        == [w for w in nagisa.tagging(text).words if w not in "、。\u3000"]
        == [*("今日", "は", "天気", "が", "いい", "です", "ね", "ガキ", "ABC")]
    )


@pytest.mark.parametrize("text", ["卡尔・马克思", "啊ー", "卡尔·马克思"])
def test_marks_that_chinese_shares_make_no_japanese(monkeypatch, text):
    monkeypatch.setitem(sys.modules, "nagisa", None)
    assert units(text) == [char for char in text if char not in "・·"]


def test_japanese_without_nagisa_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "nagisa", None)
    with pytest.raises(ImportError, match=r"pip install 'qwen3-asr-vllm\[ja\]'"):
        next(align(np.zeros(16_000), "今日は"))


KOREAN = "대한민국은 민주공화국이다. '나는' 학교에서, 친구를 만났다 학교 가"


@pytest.fixture
def korean(monkeypatch, tmp_path):
    path = tmp_path / "korean"
    path.write_text("대한 10 x\n대한민국 10 x\n민주공화국 10 x\n학교 10 x\n친구 10 x\n\n만 10 x\n")
    monkeypatch.setenv("QWEN3_ASR_KOREAN_DICT", str(path))
    text_units.korean_dictionary.cache_clear()
    yield text_units.korean_dictionary()
    text_units.korean_dictionary.cache_clear()


def test_korean_is_cut_before_its_endings(korean):
    assert units(KOREAN)[:4] == ["대한민국", "은", "민주공화국", "이다"]


@given(st.lists(st.text("대한민국은학교에서만.,' ", max_size=12)).map(" ".join))
def test_korean_is_cut_as_by_soynlp(text):
    tokenizer = pytest.importorskip("soynlp.tokenizer")
    known = {"대한", "대한민국", "학교", "에서", "민국은", "은학교."}
    expected = tokenizer.LTokenizer(scores=dict.fromkeys(known, 1.0)).tokenize(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_units, "korean_dictionary", lambda: known)
        cut = [text[start:end] for start, end in text_units._cut_korean(text)]
    assert cut == expected


@pytest.fixture
def no_korean(monkeypatch):
    monkeypatch.delenv("QWEN3_ASR_KOREAN_DICT", raising=False)
    monkeypatch.setattr(text_units, "find_spec", lambda name: None)
    text_units.korean_dictionary.cache_clear()
    yield
    text_units.korean_dictionary.cache_clear()


def engine_for(text):
    """An engine that detects this, in Korean, with arbitrary times."""
    return lambda r: nothing(r) if hasattr(r, "units") else EngineOutput(f"language {text}")


@pytest.mark.parametrize("language", ["Korean", None])
def test_korean_without_dictionary_splits_at_spaces(no_korean, language):
    text = "나는 학교에서, 친구를"
    transcript = run(5, text, nothing, language=language)
    assert [word.word for word in transcript.words] == ["나는", " 학교에서,", " 친구를"]
    (warning,) = transcript.warnings
    for advice in ("pip install --no-deps qwen-asr", "QWEN3_ASR_KOREAN_DICT"):
        assert advice in warning
    answer = engine_for(f"Korean<asr_text>{text}")
    clip = drive(transcribe(counting(5), TranscribeOptions(word_timestamps=True)), answer)
    assert clip.warnings == (f"0.0-5.0 s: {warning}",) and len(clip.words) == 3


def test_no_other_cutting_needs_to_be_said(korean):
    for text in (KOREAN, "Guten Tag.", "你好"):
        assert run(5, text, nothing).warnings == ()


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_an_unreadable_dictionary_costs_only_words(no_korean, monkeypatch, tmp_path, content):
    path = tmp_path / "korean"
    if content:
        path.write_bytes(content)
    monkeypatch.setenv("QWEN3_ASR_KOREAN_DICT", str(path))
    with pytest.raises(AlignmentError, match=f"{path} cannot be read .*QWEN3_ASR_KOREAN_DICT"):
        run(5, "친구를", nothing)
    answer = engine_for("Korean<asr_text>친구를")
    transcript = drive(transcribe(counting(5), TranscribeOptions(word_timestamps=True)), answer)
    assert transcript.text == "친구를" and "no words are timed" in transcript.warnings[0]


# words --------------------------------------------------------------------------------------


@given(TEXTS)
def test_words_tile_the_text(text):
    transcript = run(30, text, nothing, language="German")
    words = transcript.words
    assert transcript.text == text.strip()
    assert "".join(s.text for s in transcript.segments) == "".join(w.word for w in words)
    assert "".join(w.word for w in words) == (text.strip() if units(text, "German") else "")
    assert len(words) == len(units(text, "German"))


@pytest.mark.parametrize(
    "words",
    [
        ["Hello,", " world!"],
        ["He", " said:", ' "Hello', ' there."', ' "Why', ' not?"'],
        ["Il", " dit :", " « Bonjour", " Marie »."],
        ["Sie", " sagte", " »Hallo«", " und", " (leise)", " „tschüss“."],
        ["他", "说：", "“你", "好”，", "我", "说。"],
        ["One –", " two …", " three."],
        ["Ça", " va ?", " Oui !"],
    ],
)
def test_punctuation_stays_with_its_word(words):
    transcript = run(9, "".join(words), nothing)
    assert [word.word for word in transcript.words] == words


def test_segments_are_sentences():
    oracle = lambda r: AlignmentOutput([400, 800, 800, 1600, 3200, 4000])  # noqa: E731
    first, second = run(9, "Guten Tag. Hallo!", oracle, language="German").segments
    assert (first.text, first.start, first.end) == ("Guten Tag.", 0.4, 1.6)
    assert (second.text, second.start, second.end) == (" Hallo!", 3.2, 4.0)
    assert [(w.word, w.start, w.end) for w in first.words] == [
        ("Guten", 0.4, 0.8),
        (" Tag.", 0.8, 1.6),
    ]
    assert first.language == "German"


def test_the_prompt_is_bare():
    [request] = next(align(np.zeros(32_000), "Guten Tag. <timestamp>"))
    assert request.prompt == (
        "<|audio_start|><|audio_pad|><|audio_end|>Guten<timestamp><timestamp>"
        "Tag<timestamp><timestamp>timestamp<timestamp><timestamp>"
    )
    assert len(request.waveform) == 32_000


def test_unalignable_languages_are_refused():
    with pytest.raises(ValueError, match="does not know Polish.*de German"):
        next(align(np.zeros(16_000), "dzień dobry", language="Polish"))


def test_times_must_match_the_words():
    with pytest.raises(AlignmentError, match="3 times for 2 words.*tokenizer"):
        run(5, "a b", lambda request: AlignmentOutput([1, 2, 3]))


# times --------------------------------------------------------------------------------------


def slow_repair(times):
    """By definition: every subsequence's length, then the rule of qwen-asr for what is left out."""
    best = []  # of the longest that ends here: (its length, its indices)
    for i, time in enumerate(times):
        before = [best[j] for j in range(i) if times[j] <= time]
        longest = max((length for length, _ in before), default=0)
        chain = next((chain for length, chain in before if length == longest), [])
        best.append((longest + 1, [*chain, i]))
    most = max(length for length, _ in best)
    kept = next(chain for length, chain in best if length == most)
    repaired = []
    for i, time in enumerate(times):
        if i in kept:
            repaired.append(time)
            continue
        left = max((k for k in kept if k < i), default=None)
        right = min((k for k in kept if k > i), default=None)
        if left is None or right is None:
            repaired.append(times[right if left is None else left])
        elif right - left > 3:
            step = (times[right] - times[left]) / (right - left)
            repaired.append(int(times[left] + step * (i - left)))
        else:
            repaired.append(times[left if i - left <= right - i else right])
    return repaired


@given(st.lists(st.integers(0, 30).map(lambda c: c * 80), min_size=1, max_size=60))
def test_repair_is_that_of_qwen_asr(times):
    repaired = repair(times)
    assert repaired == slow_repair(times)
    assert repaired == sorted(repaired)
    assert repair(repaired) == repaired


@pytest.mark.parametrize(
    "times",
    [
        lambda n: np.random.default_rng(0).integers(0, 2250, n),
        np.arange,
        lambda n: -np.arange(n),
        np.zeros,
    ],
    ids=["random", "rising", "falling", "equal"],
)
def test_repair_costs_grow_linearly(times):
    def cost(n):
        return lines_run(lambda: repair(times(n).tolist()))

    assert cost(8000) < 2.2 * cost(4000)


def assert_ordered(transcript):
    """Also when its times are written, to the millisecond."""
    for written in (transcript, rounded(transcript)):
        end = 0.0
        for segment in written.segments:
            assert (segment.start, segment.end) == (segment.words[0].start, segment.words[-1].end)
            for word in segment.words:
                assert end <= word.start < word.end <= written.duration
                end = word.end


@given(st.data())
def test_words_have_positive_ordered_durations(data):
    """Whatever the model answers, however often it is asked."""
    count, seconds = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    classes = st.integers(0, 120) | st.just(50)

    def answer(request):
        number = 2 * len(request.units)
        drawn = data.draw(st.lists(classes, min_size=number, max_size=number))
        return AlignmentOutput([80 * time for time in drawn])

    transcript = run(seconds, " ".join(map(str, range(count))), answer)
    assert len(transcript.words) == count
    assert_ordered(transcript)


@given(st.integers(0, 10**6), st.integers(100, 300), st.integers(1, 3))
def test_crowded_words_last_a_millisecond(seed, count, last):
    random = np.random.default_rng(seed)

    def answer(request):
        return AlignmentOutput((80 * random.integers(0, last + 1, 2 * len(request.units))).tolist())

    assert_ordered(run(1, " ".join(map(str, range(count))), answer))


def test_empty_first_words_spare_the_last():
    times = AlignmentOutput([0, 0, 0, 0, 80, 0, 80, 160])
    assert_ordered(run(5, "a b c d", lambda request: times))


def said(count, *, first=1.0, pace=0.4):
    return [(first + i * pace, first + (i + 0.75) * pace) for i in range(count)]


def furthest(words, spans):
    return max(
        abs(time - expected)
        for word, span in zip(words, spans, strict=True)
        for time, expected in zip((word.start, word.end), span, strict=True)
    )


def test_piled_up_words_are_aligned_again():
    spans = said(400)  # up to 161 s
    oracle = Oracle(spans, stuck_at=90)
    transcript = run(170, " ".join(map(str, range(400))), oracle)
    assert furthest(transcript.words, spans) < 0.13
    assert len(oracle.windows) == 2
    assert_ordered(transcript)


@pytest.mark.parametrize("pause", [0, 250])
def test_a_long_recording_goes_by_windows(pause):
    """With a pause longer than a window, too, in which none of the words are said."""
    spans = [(s + pause * (i > 300), e + pause * (i > 300)) for i, (s, e) in enumerate(said(1500))]
    oracle = Oracle(spans)
    transcript = run(610 + pause, " ".join(map(str, range(1500))), oracle)
    assert furthest(transcript.words, spans) < 0.13
    assert all(end - start < 180.001 for start, end in oracle.windows)
    assert_ordered(transcript)


@pytest.mark.parametrize("is_found_again", [True, False])
def test_piled_up_words_cost_no_others(is_found_again):
    """Five at 50 s, distinct or not when they are aligned by themselves."""
    spans = said(1400)
    pile = range(120, 125)
    oracle = Oracle(spans)

    def stumbling(request):
        if is_found_again and len(request.units) <= len(pile):
            return oracle(request)
        times = [(spans[120][0],) * 2 if i in pile else s for i, s in enumerate(spans)]
        return Oracle(times)(request)

    transcript = run(600, " ".join(map(str, range(1400))), stumbling)
    kept = [i for i in range(1400) if is_found_again or i not in range(119, 126)]
    assert furthest([transcript.words[i] for i in kept], [spans[i] for i in kept]) < 0.13
    assert_ordered(transcript)


def test_excess_words_stay_inside_the_recording():
    """Times at the end of each window, as aligners give for words that they cannot find."""
    ends = lambda r: AlignmentOutput([1000 * len(r.waveform) / 16_000 - 6000] * 2 * len(r.units))  # noqa: E731
    assert_ordered(run(400, " ".join(map(str, range(50))), ends))
    last = lambda r: AlignmentOutput([174_000, 174_000] * len(r.units))  # noqa: E731
    assert_ordered(run(181, "a b", last))
