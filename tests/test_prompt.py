# SPDX-License-Identifier: Apache-2.0
"""The prompt byte for byte, and the answer: parsed whole, and parsed as it streams."""

import re
from dataclasses import replace
from os.path import commonprefix

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.checks import lines_run

from qwen3_asr_vllm.languages import LANGUAGES, separator
from qwen3_asr_vllm.prompt import (
    AUDIO_PLACEHOLDER,
    PUBLISHED,
    OutputStream,
    ParsedOutput,
    build_prompt,
    control_tokens,
    header_end,
    parse_output,
    sanitize_context,
    whole_tokens,
)

CONTROL_TOKENS = re.compile(r"<\|[^|]*\|>|<asr_text>")


# ---- the prompt ----


def test_prompt_keeps_the_empty_system_turn():
    assert build_prompt() == (
        "<|im_start|>system\n<|im_end|>\n"
        "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_prompt_with_context_and_forced_language():
    assert build_prompt(context="Ada Lovelace, 差分機", language="Cantonese") == (
        "<|im_start|>system\nAda Lovelace, 差分機<|im_end|>\n"
        "<|im_start|>user\n<|audio_start|><|audio_pad|><|audio_end|><|im_end|>\n"
        "<|im_start|>assistant\nlanguage Cantonese<asr_text>"
    )


@pytest.mark.parametrize("num_audios", [0, 1, 3])
def test_prompt_has_one_placeholder_per_audio(num_audios):
    prompt = build_prompt(num_audios=num_audios)
    assert prompt.count(AUDIO_PLACEHOLDER) == num_audios
    assert f"user\n{AUDIO_PLACEHOLDER * num_audios}<|im_end|>" in prompt


hostile_text = st.lists(
    st.sampled_from(["<|im_end|>", "<|", "|>", "<", "|", ">", "<asr_", "text>", "<asr_text>", "a"])
    | st.text(max_size=3)
).map("".join)


@given(hostile_text)
@example("<|im<|x|>_end|>")
@example("<asr_te<asr_text>xt>")
@example("<asr_te<|x|>xt>")
@example("<<|x|>|y|>")
def test_sanitised_context_has_no_control_token(text):
    sanitised = sanitize_context(text)
    assert not CONTROL_TOKENS.search(sanitised)
    assert sanitize_context(sanitised) == sanitised


ADDED = ("<think>", "</think>", "<tts_pad>", "<non_speech>", "<|im_end|>", "[SPK]")


class Tokenizer:
    """One whose checkpoint added a word of medicine, too."""

    all_special_tokens = ["<|im_end|>", "[SPK]"]

    def get_added_vocab(self):
        return dict.fromkeys(("<think>", "</think>", "<tts_pad>", "<non_speech>", "ibuprofen"), 1)


def test_control_tokens_are_special_or_markup():
    assert set(control_tokens(Tokenizer())) == {*ADDED}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a<think>b</think>c<tts_pad>", "abc"),
        ("<non_speech>[SPK]Ada [1] <b>", "Ada [1] <b>"),
        ("<th<think>ink>x", "think>x"),
        ("[SP[SPK]K]", "SPK]"),
        ("<<|x|>think>", "think>"),
        ("half \ud800.", "half \ufffd."),
    ],
)
def test_tokens_of_the_tokenizer_leave_the_context(text, expected):
    assert sanitize_context(text, ADDED) == expected


@given(st.lists(st.sampled_from([*ADDED, "<", "<th", "ink>", "[", "[SP", "K]", "a"])).map("".join))
def test_no_token_of_the_tokenizer_survives(text):
    sanitised = sanitize_context(text, ADDED)
    assert not any(token in sanitised for token in ADDED)
    assert sanitize_context(sanitised, ADDED) == sanitised


@given(hostile_text)
def test_context_cannot_change_the_turns(context):
    assert CONTROL_TOKENS.findall(build_prompt(context=context)) == CONTROL_TOKENS.findall(
        build_prompt()
    )


@given(hostile_text)
def test_text_without_control_tokens_is_unchanged(text):
    if not CONTROL_TOKENS.search(text):
        assert sanitize_context(text) == text


def test_only_control_tokens_are_removed():
    assert sanitize_context("a <|im_end|>b<asr_text> < c |> d") == "a b < c |> d"


@pytest.mark.parametrize(("opening", "closing"), [("<asr_te", "xt>"), ("<|a", "|>")])
def test_nested_tokens_take_two_passes(opening, closing):
    """Removing a layer per pass would stall the server."""

    def lines(depth):
        return lines_run(lambda: sanitize_context(opening * depth + closing * depth))

    assert "<" not in sanitize_context(opening * 20_000 + closing * 20_000)
    assert lines(20_000) == lines(2)


# ---- the answer ----


@pytest.mark.parametrize(
    ("raw", "language", "text"),
    [
        ("language English<asr_text>Hello.", "English", "Hello."),
        ("language None<asr_text>", None, ""),
        ("", None, ""),
        (" \n", None, ""),
        # A repeated tag or header loses no text.
        ("language Cantonese<asr_text>A。<asr_text>B", "Cantonese", "A。B"),
        ("language Cantonese<asr_text>唔係你。<asr_text>我", "Cantonese", "唔係你。我"),
        ("language English<asr_text>One.<asr_text>Two.", "English", "One. Two."),
        ("language English<asr_text><asr_text>Hello.", "English", "Hello."),
        ("language Chinese<asr_text>A language English<asr_text>B", "Chinese", "A B"),
        ("language Chinese<asr_text>你好。language English<asr_text>Hi.", "Chinese", "你好。Hi."),
        ("language English<asr_text>One.language None<asr_text>", "English", "One."),
        ("language Thai<asr_text>A language Klingon<asr_text>B", "Thai", "A language Klingon B"),
        ("language Chinese<asr_text>你好 <asr_text> 世界", "Chinese", "你好世界"),
        # A language line without a tag, a tag without a language, neither.
        ("language English\nHello", "English", "Hello"),
        ("language English\n<asr_text>Hello", "English", "Hello"),
        ("language None\n", None, ""),
        ("language None", None, ""),
        ("language English", "English", ""),
        ("<asr_text>Hello.", None, "Hello."),
        ("Hello.", None, "Hello."),
        # Text that only looks like a header.
        ("language learning is fun", None, "language learning is fun"),
        ("language English is hard", None, "language English is hard"),
        ("Language English is hard", None, "Language English is hard"),
        ("language", None, "language"),
        ("language \nHello", None, "language \nHello"),
        ("language lessons\nHello", None, "language lessons\nHello"),
        ("languages<asr_text>x", None, "languages x"),
        ("language English<asr_text>language learning", "English", "language learning"),
        ("language English<asr_text>a < b <asr_tex", "English", "a < b <asr_tex"),
        # A language that is not in the table is reported as given.
        ("language Klingon<asr_text>x", "Klingon", "x"),
        ("language zh-CN<asr_text>x", "zh-CN", "x"),
        # White space goes at both ends and stays inside.
        (" \nlanguage English<asr_text> Hello \n world. \n", "English", "Hello \n world."),
    ],
)  # fmt: skip
def test_answer_is_read_as(raw, language, text):
    assert parse_output(raw) == ParsedOutput(language, text)


@pytest.mark.parametrize(
    ("raw", "languages", "text"),
    [
        ("language English, Chinese<asr_text>hi", ("English", "Chinese"), "hi"),
        ("language English,Chinese<asr_text>hi", ("English", "Chinese"), "hi"),
        ("language Chinese、English、German<asr_text>好", ("Chinese", "English", "German"), "好"),
        ("language English / Chinese<asr_text>hi", ("English", "Chinese"), "hi"),
        ("language English & Klingon<asr_text>hi", ("English", "Klingon"), "hi"),
        ("language English,<asr_text>hi", ("English",), "hi"),
        ("language None, English<asr_text>hi", ("English",), "hi"),
        ("language English, English<asr_text>hi", ("English",), "hi"),
        ("language English, Chinese\nhi", ("English", "Chinese"), "hi"),
        ("language English, Chinese", ("English", "Chinese"), ""),
        ("language English<asr_text>a language English, Chinese<asr_text>b", ("English",), "a b"),
        ("language English, a game<asr_text>b", (), "language English, a game b"),
        ("language English, please", (), "language English, please"),
    ],
)
def test_a_header_of_several_languages_never_leaks(raw, languages, text):
    parsed = parse_output(raw)
    assert (parsed.languages, parsed.text) == (languages, text)
    stream = OutputStream()
    assert "".join(map(stream.push, raw)) + stream.finish() == text
    assert stream.languages == languages


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("Hello.", "Hello."),
        ("", ""),
        ("language learning is fun", "language learning is fun"),
        ("language English\nis hard", "language English\nis hard"),
        ("language English", "language English"),
        ("Language English is hard", "Language English is hard"),
        ("language Chinese<asr_text>Hello.", "Hello."),
        ("<asr_text>Hello.", "Hello."),
        ("One.<asr_text>Two.", "One. Two."),
    ],
)
def test_forced_languages_give_text_alone(raw, text):
    assert parse_output(raw, language="English") == ParsedOutput("English", text)


DIARIZED = replace(PUBLISHED, special_tokens=("<|spk_0|>", "<|spk_1|>", "<|im_end|>", "[S]"))
KEPT = replace(DIARIZED, keeps_special_tokens=True)


@pytest.mark.parametrize(
    ("raw", "language", "text"),
    [
        ("<|spk_0|>language English<asr_text>Hello.", "English", "Hello."),
        ("<|spk_0|> <|spk_1|>language English\nHello.", "English", "Hello."),
        ("language English<asr_text><|spk_0|>Hello.<|spk_1|>Hi.", "English", "Hello. Hi."),
        ("language English<asr_text><|spk_0|> Hello. <|spk_1|> Hi. ", "English", "Hello. Hi."),
        ("language English<asr_text>One<|spk_0|><|spk_1|> two[S]", "English", "One two"),
        ("language Chinese<asr_text>你好。<|spk_1|>再见。<|im_end|>", "Chinese", "你好。再见。"),
        ("language None<asr_text><|spk_0|>", None, ""),
        ("<|spk_0|>Hello.<|spk_1|><asr_text>Hi.", None, "Hello. Hi."),
        ("language English<asr_text>a < b <|spk", "English", "a < b <|spk"),
        ("language English<asr_text>a<|spk_7|>b [T]", "English", "a<|spk_7|>b [T]"),
    ],
)
def test_special_tokens_are_no_text(raw, language, text):
    assert parse_output(raw, protocol=DIARIZED) == ParsedOutput(language, text)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ("language English<asr_text><|spk_0|>Hello.<|spk_1|> Hi.", "<|spk_0|>Hello.<|spk_1|> Hi."),
        ("<|spk_0|>language English<asr_text>Hello.", "<|spk_0|>Hello."),
    ],
)
def test_special_tokens_may_be_kept(raw, text):
    assert parse_output(raw, protocol=KEPT) == ParsedOutput("English", text)


def test_the_header_ends_after_special_tokens():
    raw = " <|spk_0|>language English<asr_text>"
    assert header_end(f"{raw}Hello.", protocol=DIARIZED) == len(raw)


@pytest.mark.parametrize(
    ("raw", "whole"),
    [("a<|spk_0|>", "a<|spk_0|>"), ("a<|spk_0|>b<|s", "a<|spk_0|>b"), ("a[", "a"), ("a|", "a|")],
)
def test_an_incomplete_special_token_is_cut_off(raw, whole):
    assert whole_tokens(raw, DIARIZED) == whole
    assert whole_tokens(raw, PUBLISHED) == raw


raw_outputs = st.lists(
    st.sampled_from(
        [
            *("<|spk_0|>", "<|spk_1|>", "<|sp", "k_0|>", "[S]"),
            "language ",
            "language English",
            "language None<asr_text>",
            "language Klingon",
            "Chinese",
            ",",
            ", ",
        ]
        + ["<asr_text>", "<asr", "<", "l", "lang", "\n", " ", "Hello.", "你好", "。", "3", "ที่"]
    )
    | st.text(max_size=3),
    max_size=8,
).map("".join)
forced_languages = st.sampled_from([None, "English"])


@given(raw_outputs, forced_languages)
def test_parse_output_matches_the_whole_answer(raw, language):
    assert parse_output(raw, language=language) == _read_whole(raw, language)


@given(raw_outputs, forced_languages, st.data())
def test_streamed_deltas_join_to_parse_output(raw, language, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=len(raw))))
    protocol = data.draw(st.sampled_from([PUBLISHED, DIARIZED, KEPT]))
    stream = OutputStream(language=language, protocol=protocol)
    deltas = [stream.push(raw[i:j]) for i, j in zip([0, *cuts], [*cuts, len(raw)], strict=True)]
    text = "".join(deltas) + stream.finish()
    parsed = ParsedOutput(stream.language, text, stream.languages[1:])
    assert parsed == parse_output(raw, language=language, protocol=protocol)
    if protocol is DIARIZED:
        assert not any(token in text for token in ("<|spk_0|>", "[S]"))


@given(raw_outputs, forced_languages)
def test_deltas_come_as_early_as_possible(raw, language):
    """The emitted text is the common prefix of all continuations, white space aside."""
    released = OutputStream(language=language).push(raw)
    texts = [parse_output(raw + more, language=language).text for more in CONTINUATIONS]
    assert released == commonprefix(texts).rstrip()


@pytest.mark.parametrize(
    ("language", "pushes", "deltas"),
    [
        (None, ["language", " learning", " is", " fun"], ["", "", "language learning is", " fun"]),
        (None, ["Language", " English", " is"], ["Language", " English", " is"]),
        (None, ["Hello", " world"], ["Hello", " world"]),
        (None, ["language English<asr_text>", "Hi", " ", "there"], ["", "Hi", "", " there"]),
        (None, ["language English", "<asr_text>H", "i"], ["", "H", "i"]),
        (None, ["language English\nH", "i"], ["H", "i"]),
        (None, ["language <asr", "_text"], ["language", ""]),
        ("English", ["language", " learn", "ing"], ["", "language learn", "ing"]),
        ("English", ["A <asr", "_text", ">B"], ["A", "", " B"]),
        ("English", ["A <as", "ide"], ["A", " <aside"]),
    ],
)
def test_deltas_of_a_stream_are(language, pushes, deltas):
    stream = OutputStream(language=language)
    assert [stream.push(push) for push in pushes] == deltas


@pytest.mark.parametrize("name", LANGUAGES.values())
def test_repeated_headers_are_dropped_by_character(name):
    stream = OutputStream(language=name)
    deltas = map(stream.push, f"One. Two. Three. language {name}<asr_text>Four.")
    assert "".join(deltas) + stream.finish() == "One. Two. Three. Four."


def test_languages_are_known_after_the_header():
    stream = OutputStream()
    stream.push("language German")
    assert stream.language is None
    stream.push("<asr_text>")
    assert stream.language == "German"


TAGS = ["<asr_text>", *(f"language {name}<asr_text>" for name in [*LANGUAGES.values(), "None"])]
TAGS += ["language English, German<asr_text>", "language English , Thai\n", ", Thai<asr_text>"]
CONTINUATIONS = ["", "☃", *{tag[start:] + "☃" for tag in TAGS for start in range(len(tag))}]


def _read_whole(raw, language):
    """The grammar of an answer as regular expressions over all of it: the reference."""
    names = "|".join([*LANGUAGES.values(), "None"])
    text = raw.lstrip()
    comma = " *[,;/&+、，] *"
    any_name = "[A-Za-z0-9_-]+"
    header = re.match(
        rf"language (?:({any_name}(?:{comma}{any_name})*)(?:{comma})?<asr_text>"
        rf"|((?:{names})(?:{comma}(?:{names}))*)(?:\n|\Z))",
        text,
    )
    others = ()
    if header and language is None:
        named = [name for name in re.split(comma, header[1] or header[2]) if name != "None"]
        language, *others = list(dict.fromkeys(named)) or [None]
        text = text[header.end() :]
    joined = ""
    for stretch in re.split(rf"(?:language (?:{names})(?:{comma}(?:{names}))*)?<asr_text>", text):
        joined += separator(joined, stretch.strip()) + stretch.strip()
    return ParsedOutput(language, joined, tuple(others))
