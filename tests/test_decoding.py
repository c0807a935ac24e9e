# SPDX-License-Identifier: Apache-2.0
"""The token budget, loops, leaks, and which tokens wrote a text: laws, without a model."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from qwen3_asr_vllm.decoding import (
    completeness,
    is_leak,
    is_loop,
    language_probability,
    max_new_tokens,
    may_leak,
    place_tokens,
    settled_length,
    word_probabilities,
)
from qwen3_asr_vllm.geometry import MAX_CLIP_S
from qwen3_asr_vllm.prompt import PUBLISHED, parse_output
from qwen3_asr_vllm.transcript import Token


@given(st.floats(0, MAX_CLIP_S))
def test_budgets_cover_the_costliest_script(clip_s):
    assert max_new_tokens(clip_s) >= 32 + 20 * clip_s


@given(st.floats(0, MAX_CLIP_S), st.floats(0, MAX_CLIP_S))
def test_a_longer_clip_never_gets_fewer_tokens(a, b):
    assert (max_new_tokens(a) <= max_new_tokens(b)) or a > b


def test_the_longest_clip_leaves_the_context_room():
    audio_tokens, max_position_embeddings = 13 * MAX_CLIP_S, 65_536
    assert audio_tokens + max_new_tokens(MAX_CLIP_S) < max_position_embeddings - 10_000


# ---- loops ----

short = st.text("ab .,是", max_size=12)  # few letters, so that runs are frequent


@given(short, short.filter(str.strip), st.integers(5, 9), st.integers(0, 12))
def test_runs_keep_three_copies(before, unit, copies, partial):
    text = (before + unit * copies + unit[:partial]).strip()
    kept = text[: settled_length(text)]
    assert text.startswith(kept)
    assert len(kept) < len(before) + 4 * len(unit)


@given(st.text("ab .", max_size=60))
def test_a_text_without_a_run_stays_whole(text):
    """The plain definition: no period of which the end holds more than three copies."""
    periods = range(1, len(text))
    ends = ((period, text[-3 * period - 1 :]) for period in periods if len(text) > 3 * period)
    if not any(end[period:] == end[:-period] for period, end in ends):
        assert settled_length(text) == len(text.rstrip())


def test_runs_are_cut_between_words():
    for text, kept in [
        ("Round" + " and round" * 12, "Round and round and round and round"),
        ("Nein" + ", nein" * 12, "Nein, nein, nein, nein,"),
        ("好" + "哈哈" * 12, "好哈哈哈"),
    ]:
        assert text[: settled_length(text)] == kept


@given(short, short, st.integers(2, 9), short)
def test_settled_text_never_changes(before, unit, copies, after):
    text = before + unit * copies + after
    settled = [settled_length(text[:length]) for length in range(len(text) + 1)]
    if settled[-1] < len(text.rstrip()):  # it ends in a run, which may be a loop
        assert max(settled) <= settled[-1]


def test_loops_are_detected_by_engine_or_budget():
    assert is_loop("anything", "repetition")
    assert is_loop("We will meet again. " * 20, "length")
    assert not is_loop("We will meet again. " * 20, "stop")
    assert not is_loop("One hundred thousand is 100000", "length")
    assert not is_loop("", "length")


# ---- leaks ----

WORDS = ["Ada", "Grace Hopper", "Łódź", "李明", "O'Neill", "co-op"]
lists = st.lists(st.sampled_from(WORDS), min_size=3, unique=True)
separators = st.sampled_from([", ", ",", "\n", "; ", "、"])


@given(lists, separators, separators, st.sampled_from(["", ".", "!"]), st.data())
def test_repeated_lists_leak_in_any_punctuation(items, given_by, said_by, end, data):
    start = data.draw(st.integers(0, len(items) - 3))
    stop = data.draw(st.integers(start + 3, len(items)))
    text = said_by.join(items[start:stop]).upper() + end
    context = given_by.join(items)
    assert is_leak(text, context)
    assert all(may_leak(text[:length], context) for length in range(len(text) + 1))


@given(lists, st.integers(0, 5))
def test_a_keyword_or_two_are_speech(items, start):
    for said in (items[start : start + 1], items[start : start + 2]):
        assume(len(said) < len(items))
        assert not is_leak(", ".join(said), ", ".join(items))


@pytest.mark.parametrize(
    "said", ["Ada and Grace Hopper, Lodz", "I met Ada, Grace Hopper, Łódź.", "Ada, Łódź, Ada"]
)
def test_a_sentence_with_keywords_is_speech(said):
    assert not is_leak(said, "Ada, Grace Hopper, Łódź")


def test_only_long_repeated_prompts_are_leaks():
    prompt = "A lecture on the history of computing machinery."
    assert is_leak(prompt.lower(), prompt)
    assert not is_leak("A lecture on the history.", prompt)
    assert not is_leak("Ada", "Ada")
    assert not is_leak("", "Ada, Grace, Joan") and not is_leak("Hello", "")


# ---- tokens ----


def cut(text, cuts):
    """Tokens that make a text, each with its number as its id."""
    at = sorted({0, len(text), *(c % (len(text) + 1) for c in cuts)})
    pieces = [text[a:b] for a, b in zip(at, at[1:], strict=False)]
    return [Token(i, piece, -float(i)) for i, piece in enumerate(pieces)]


ANSWERS = [
    "language English<asr_text>Hello there. Hello again.",
    "language Chinese<asr_text>你好，世界。",
    "language English\n Hello there.",
    "no header at all",
    "language None<asr_text>",
]


@pytest.mark.parametrize("answer", ANSWERS)
@given(st.lists(st.integers(0, 99)))
def test_tokens_are_placed_where_they_wrote(answer, cuts):
    text = parse_output(answer).text
    placed = place_tokens(cut(answer, cuts), text)
    starts = [start for start, _ in placed]
    assert starts == sorted(starts)
    assert "".join(token.text for _, token in placed).endswith(text)
    for start, token in placed[1:]:
        assert text[start:].startswith(token.text)


def test_special_tokens_wrote_no_text():
    raw = ["<|s|>", "language", " English", "<asr_text>", "<|s|>", "So.", "<|s|>", "Yes", "."]
    tokens = [Token(i, text, -1.0 * i) for i, text in enumerate(raw)]
    protocol = replace(PUBLISHED, special_tokens=("<|s|>",))
    text = parse_output("".join(raw), protocol=protocol).text
    assert text == "So. Yes."
    placed = place_tokens(tokens, text, protocol=protocol)
    assert [(start, token.text) for start, token in placed] == [(0, "So."), (3, "Yes"), (7, ".")]
    assert language_probability(tokens, protocol) == pytest.approx(math.exp(-2))
    kept = replace(protocol, keeps_special_tokens=True)
    text = parse_output("".join(raw[1:]), protocol=kept).text
    placed = place_tokens(tokens[1:], text, protocol=kept)
    assert "".join(token.text for _, token in placed) == text == "<|s|>So.<|s|>Yes."


def test_tags_and_seams_have_no_token():
    raw = ["One", "<asr_text>", "two", "<|im_end|>"]
    tokens = [Token(i, text, 0.0) for i, text in enumerate(raw)]
    text = parse_output("".join(raw[:3]), language="English").text
    assert text == "One two"
    placed = place_tokens(tokens, text, language="English")
    assert [(start, token.text) for start, token in placed] == [(0, "One"), (3, "two")]


def test_partial_characters_share_their_position():
    tokens = [Token(i, text, 0.0) for i, text in enumerate(["你", "", "", "好", "", ""])]
    placed = place_tokens(tokens, "你好", language="Chinese")
    assert [(start, token.id) for start, token in placed] == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_language_probabilities_cover_the_whole_name():
    raw = [("language", -0.5), (" C", -1.0), ("antonese", -2.0), ("<asr_text>", -4.0), ("早", -8.0)]
    tokens = [Token(i, text, logprob) for i, (text, logprob) in enumerate(raw)]
    assert language_probability(tokens) == pytest.approx(math.exp(-3))
    assert language_probability(tokens[4:]) is None


# ---- probabilities of words ----


@pytest.mark.parametrize(
    ("tokens", "words", "expected"),
    [
        ([("Good", 0.9), (" mor", 0.4), ("ning", 0.1), (".", 0.01)], ["Good", " morning."], None),
        ([("你好", 0.3), ("吗", 0.8)], ["你", "好", "吗"], [0.3, 0.3, 0.8]),
        ([("", 0.1), ("", 0.1), ("李", 1.0), ("明", 0.5)], ["李", "明"], [0.01 ** (1 / 3), 0.5]),
        ([("Hi", 0.5), ("!", 0.9), (' "', 0.1), ("Anna", 0.2)], ["Hi!", ' "Anna'], [0.5, 0.2]),
        ([("हिन्", 0.4), ("दी", 0.9)], ["हिन्दी"], [0.6]),
        ([("Yes", 0.5), (" ...", 0.7)], ["Yes", " ..."], [0.5, 0.7]),
        ([("no", 0.5), (" no", 0.5), (" no", 0.1)], ["no", " no"], [0.5, 0.5]),  # a loop, cut
        ([("language German", 0.1), ("<asr_text>", 0.2), ("Ja", 0.6)], ["Ja"], [0.6]),
        ([], ["Ja"], [None]),
    ],
)
def test_words_have_the_mean_of_their_tokens(tokens, words, expected):
    written = [Token(0, text, math.log(chance)) for text, chance in tokens]
    found = list(word_probabilities(words, place_tokens(written, "".join(words))))
    assert found == pytest.approx(expected or [0.9, 0.2])


PIECES = st.sampled_from(["你", "好", "a", "b ", " c", ".", "", " -"])


@given(st.lists(PIECES, max_size=12), st.sets(st.integers(1, 20), max_size=4))
def test_any_words_of_a_text_have_probabilities(pieces, cuts):
    text = "".join(pieces).strip()
    placed = place_tokens([Token(0, piece, -0.5) for piece in pieces], text)
    ends = [*sorted(cut for cut in cuts if cut < len(text)), len(text)]
    words = [text[a:b] for a, b in pairwise([0, *ends]) if text]
    for probability in word_probabilities(words, placed):
        assert probability == pytest.approx(math.exp(-0.5))


# ---- complete or not ----


def scored(*pieces):
    return [Token(0, text, math.log(probability)) for text, probability in pieces]


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("I go.", scored(("I go", 0.9), (".", 0.8), ("<|im_end|>", 1.0)), 0.8),
        ('He said "Go."', scored(('."', 0.7), ("<|im_end|>", 1.0)), 0.7),
        ("你好吗？", scored(("？", 0.6), ("<|im_end|>", 0.9)), 0.6),
        ("I go to", scored(("I go to", 0.9), ("<|im_end|>", 0.95)), 0.05),
        ("I go, ", scored((",", 0.9), ("<|im_end|>", 0.9)), 0.1),
        ("I go...", scored(("...", 0.9), ("<|im_end|>", 0.9)), 0.1),
        ("I go.", [], 1.0),
        ("I go", [], 0.0),
        ("", scored(("<|im_end|>", 0.9)), 0.0),
    ],
)
def test_a_full_stop_makes_a_text_complete(text, tokens, expected):
    assert completeness(text.strip(), tokens, ["English"]) == pytest.approx(expected)


def test_thai_texts_need_no_full_stop():
    assert completeness("สวัสดีครับ", scored(("ครับ", 0.9), ("<|im_end|>", 0.9)), ["Thai"]) == 0.5
