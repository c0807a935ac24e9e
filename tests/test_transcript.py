# SPDX-License-Identifier: Apache-2.0
"""Sentences, subtitles, and the formats that other programs read."""

import io
import json
import re
import unicodedata
from dataclasses import replace
from itertools import pairwise

import pytest
import srt
import webvtt
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.audio import (
    TranscriptionDiarized,
    TranscriptionTextSegmentEvent,
    TranscriptionVerbose,
)

from qwen3_asr_vllm.formats import FORMATS, RESPONSE_FORMATS, SUBTITLES, read_verbose_json
from qwen3_asr_vllm.segments import split_sentences
from qwen3_asr_vllm.transcript import Segment, Transcript, Word

MIXED = Transcript(
    text="Hello world. 你好。",
    duration=6.5,
    segments=(
        Segment(0.0, 2.5, "Hello world.", "English", avg_logprob=-0.25),
        Segment(4.0, 6.5, " 你好。", "Chinese", words=(Word("你", 4.1, 4.4), Word("好", 4.4, 4.7))),
    ),
    warnings=("clip at 4.0 s reached its token limit",),
)
SILENT = Transcript(text="", duration=1.0)


# ---- sentences ----

SENTENCES = [
    ["Hello world.", " How are you?", " Fine!"],
    ["Dr. Smith of St. Ives met J. S. Bach at 3.5 knots.", " So?"],
    ["Am 3. Oktober, z. B. um 12. Uhr, war es kalt.", " Ja."],
    ["Well... you know, e.g. this.", " The end"],
    ['"Stop!"', " He left.", " (Twice.)", " Then she came"],
    ["你好。", "今天3.5度，很热！", "“是吗？”", "对"],
    ["네.", " 알겠습니다.", " 안녕히 가세요!"],
    ["هل أنت هنا؟", " نعم."],
    ["यह अच्छा है।", " हाँ।"],
    ["no marks at all"],
    [],
]


@pytest.mark.parametrize("sentences", SENTENCES, ids=lambda s: s[0] if s else "nothing")
def test_sentences_end_at_their_marks(sentences):
    assert split_sentences("".join(sentences)) == sentences


def test_long_sentences_are_cut_at_commas():
    half = "one two three four five six seven eight nine ten eleven twelve thirteen,"
    assert split_sentences(f"{half} {half} end.") == [half, f" {half} end."]
    assert split_sentences(f"{'很' * 40}，{'好' * 40}。") == ["很" * 40 + "，", "好" * 40 + "。"]
    assert len(split_sentences("ภาษาไทย ไม่มีจุด " * 30)) > 2
    assert len(split_sentences("word " * 60)) == 1


@given(st.lists(st.sampled_from('Yes No, 3 . ! … , 。 ， 好 ไทย \n " ) Mr. z'.split(" "))))
def test_sentences_are_the_text(parts):
    text = "".join(parts).strip()
    sentences = split_sentences(text)
    assert "".join(sentences) == text
    assert all(sentence.strip() for sentence in sentences)


# ---- transcripts ----


def test_languages_are_listed_by_first_use():
    languages = ["Chinese", None, "English", "Chinese"]
    segments = tuple(Segment(i, i + 1, "x", language) for i, language in enumerate(languages))
    transcript = Transcript("x x x x", 4.0, segments)
    assert transcript.languages == ("Chinese", "English")
    assert transcript.language == "Chinese"


def test_silence_has_no_language():
    assert SILENT.languages == ()
    assert SILENT.language is None


def test_txt_is_the_text_and_a_newline():
    assert FORMATS["txt"](MIXED) == "Hello world. 你好。\n"


def test_json_holds_only_measured_values():
    assert json.loads(FORMATS["json"](MIXED)) == {
        "text": "Hello world. 你好。",
        "language": "English",
        "languages": ["English", "Chinese"],
        "duration": 6.5,
        "segments": [
            {
                "start": 0.0,
                "end": 2.5,
                "text": "Hello world.",
                "language": "English",
                "avg_logprob": -0.25,
            },
            {
                "start": 4.0,
                "end": 6.5,
                "text": " 你好。",
                "language": "Chinese",
                "words": [
                    {"word": "你", "start": 4.1, "end": 4.4},
                    {"word": "好", "start": 4.4, "end": 4.7},
                ],
            },
        ],
        "warnings": ["clip at 4.0 s reached its token limit"],
    }


def test_json_has_the_same_keys_for_silence():
    silent, mixed = (json.loads(FORMATS["json"](t)) for t in (SILENT, MIXED))
    assert list(silent) == list(mixed)
    assert silent["language"] is None


def test_json_is_readable_text():
    transcript = Transcript("你好", 2 / 3, (Segment(1 / 3, 2 / 3, "你好"),))
    assert '"text": "你好"' in FORMATS["json"](transcript)
    assert '"start": 0.333' in FORMATS["json"](transcript)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_ends_with_one_newline(name):
    assert FORMATS[name](MIXED).endswith("\n")
    assert not FORMATS[name](MIXED).endswith("\n\n")


# ---- OpenAI's ----


def test_verbose_json_is_openai_s():
    document = json.loads(FORMATS["verbose_json"](MIXED))
    assert document["task"] == "transcribe"
    assert document["languages"] == [{"code": "en"}, {"code": "zh"}]
    parsed = TranscriptionVerbose.model_validate(document)  # refuses null and what is missing
    assert (parsed.language, parsed.duration, parsed.usage.seconds) == ("english", 6.5, 6.5)
    assert parsed.text == "".join(segment.text for segment in parsed.segments)
    assert [word.word for word in parsed.words] == ["你", "好"]
    hello, ni_hao = parsed.segments
    assert (hello.id, hello.seek, hello.start, hello.end) == (0, 0, 0.0, 2.5)
    assert (ni_hao.id, ni_hao.seek, ni_hao.start, ni_hao.end) == (1, 400, 4.0, 6.5)
    assert (hello.avg_logprob, hello.temperature, hello.tokens) == (-0.25, 0.0, [])


def test_verbose_json_lists_unmeasured_values():
    measured = Segment(0, 1, "x", avg_logprob=-0.5, no_speech_prob=0.0)
    assert json.loads(FORMATS["verbose_json"](MIXED))["unmeasured"] == [
        "avg_logprob",
        "no_speech_prob",
    ]
    assert "unmeasured" not in json.loads(FORMATS["verbose_json"](Transcript("x", 1, (measured,))))


def test_verbose_json_of_silence_is_valid():
    document = json.loads(FORMATS["verbose_json"](SILENT))
    assert TranscriptionVerbose.model_validate(document).segments == []
    assert (document["text"], document["language"], document["languages"]) == ("", "", [])


def test_a_loop_compresses_well():
    transcript = Transcript("", 2, (Segment(0, 1, "and then " * 40), Segment(1, 2, "Hello world.")))
    loop, hello = json.loads(FORMATS["verbose_json"](transcript))["segments"]
    assert loop["compression_ratio"] > 2.4 > hello["compression_ratio"]


# ---- tables ----


def test_tsv_is_whisper_s():
    assert FORMATS["tsv"](MIXED) == "start\tend\ttext\n0\t2500\tHello world.\n4000\t6500\t你好。\n"


def test_tsv_and_lrc_have_segment_lines():
    transcript = Transcript("", 4000, (Segment(3599.999, 3601.25, "a\tb\n c "),))
    assert FORMATS["tsv"](transcript).splitlines()[1] == "3599999\t3601250\ta b c"
    assert FORMATS["lrc"](transcript) == "[60:00.00]a b c\n"


# ---- subtitles ----

FILM = Transcript(
    "",
    4000.0,
    (
        Segment(0.5, 1.0, "Hi."),
        Segment(
            2.0,
            12.0,
            " This sentence is too long for one subtitle of two lines, so it is cut near its "
            "middle, at a comma.",
        ),
        Segment(12.0, 16.0, "今天下午我们在北京的一个很大的图书馆里，讨论了“语音识别”的问题。"),
        Segment(3661.25, 3664.0, " if (a < b && b > c) --> stop\n\n2\n"),
    ),
)
SRT = """\
1
00:00:00,500 --> 00:00:01,500
Hi.

2
00:00:02,000 --> 00:00:07,714
This sentence is too long for
one subtitle of two lines,

3
00:00:07,714 --> 00:00:12,000
so it is cut near its middle, at a comma.

4
00:00:12,000 --> 00:00:16,000
今天下午我们在北京的一个很大的图
书馆里，讨论了“语音识别”的问题。

5
01:01:01,250 --> 01:01:04,000
if (a < b && b > c) → stop 2
"""


def test_srt_of_a_golden_transcript():
    assert FORMATS["srt"](FILM) == SRT


def test_vtt_of_a_golden_transcript():
    lines = SRT.replace("<", "&lt;").replace("&&", "&amp;&amp;").replace("b > c", "b &gt; c")
    lines = lines.replace("→", "--&gt;").replace(",500", ".500").splitlines()
    lines = [line.replace(",", ".") if "-->" in line else line for line in lines]
    cues = "\n".join(line for line in lines if not line.isdecimal())
    assert FORMATS["vtt"](FILM) == f"WEBVTT\n\n{cues}\n"


@pytest.mark.parametrize("wrong", [{"max_line_width": 1}, {"max_line_count": 0}])
@pytest.mark.parametrize("name", SUBTITLES)
def test_a_layout_without_room_is_refused(name, wrong):
    with pytest.raises(ValueError, match="no text fits"):
        FORMATS[name](FILM, **wrong)


@pytest.mark.parametrize("name", SUBTITLES)
def test_subtitles_of_silence_are_valid(name):
    assert parse(name, FORMATS[name](SILENT)) == []


def parse(name: str, document: str) -> list[tuple[float, float, str]]:
    """(start, end, text) of each cue, by an independent parser."""
    if name == "srt":
        cues = srt.parse(document)
        return [(c.start.total_seconds(), c.end.total_seconds(), c.content) for c in cues]
    cues = webvtt.from_buffer(io.StringIO(document))
    return [(seconds(c.start), seconds(c.end), c.raw_text) for c in cues]


def seconds(clock: str) -> float:
    hours, minutes, rest = clock.split(":")
    return 3600 * int(hours) + 60 * int(minutes) + float(rest)


def columns(line: str) -> int:
    """The columns of a line in a terminal."""
    shown = [char for char in line if unicodedata.category(char) not in ("Mn", "Me", "Cf")]
    return len(shown) + sum(unicodedata.east_asian_width(char) in ("W", "F") for char in shown)


def unescaped(name: str, text: str) -> str:
    if name == "srt":
        return text
    return text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")


words = st.sampled_from(
    ["-->", "<b>", "&amp;", "&", "1", "00:00:01,000 --> 00:00:02,000", "\n\n", "\r\n", "NOTE x"]
    + [
        "WEBVTT",
        "\u2028",
        "今天，",
        "“语音识别”。",
        "カラオケー",
        "안녕하세요",
        "สวัสดี",
        "Hello,",
        "i\u0301",
    ]
    + ["Donaudampfschifffahrtselektrizitätenhauptbetriebswerkbauunterbeamtengesellschaft"]
)
spoken = st.lists(
    words | st.text(st.characters(exclude_categories=["C"], exclude_characters="→"))
).map(" ".join)


@st.composite
def transcripts(draw):
    lengths = draw(st.lists(st.floats(0.001, 30), max_size=5))
    segments, end = [], 0.0
    for length in lengths:
        start = end + draw(st.sampled_from([0.0, 0.3, 5.0]))
        end = start + length
        segments.append(Segment(start, end, draw(spoken)))
    return Transcript("", end, tuple(segments))


@settings(deadline=None)
@given(transcripts(), st.integers(2, 60), st.integers(1, 3))
@pytest.mark.parametrize("name", SUBTITLES)
def test_every_cue_fits_and_nothing_is_lost(name, transcript, width, count):
    document = FORMATS[name](transcript, max_line_width=width, max_line_count=count)
    cues = parse(name, document)
    texts = [unescaped(name, text) for _, _, text in cues]
    said = "".join(segment.text for segment in transcript.segments)
    assert "".join("".join(texts).split()).replace("→", "-->") == "".join(said.split())
    assert document.count("-->") == len(cues)
    for text in texts:
        assert len(text.split("\n")) <= count
        assert all(line.strip() and columns(line) <= width for line in text.split("\n"))


@settings(deadline=None)
@given(transcripts())
@pytest.mark.parametrize("name", SUBTITLES)
def test_cues_are_ordered_and_readable(name, transcript):
    cues = parse(name, FORMATS[name](transcript))
    starts, ends = [start for start, _, _ in cues], [end for _, end, _ in cues]
    assert all(0 < end - start <= 7.001 for start, end, _ in cues)
    assert all(end <= start for end, start in zip(ends, starts[1:], strict=False))
    for start, end, following in zip(
        starts, ends, [*starts[1:], transcript.duration], strict=False
    ):
        assert end - start >= min(1.0, following - start) - 0.002
    assert not ends or ends[-1] <= transcript.duration + 0.001 * len(cues)


# ---- words ----

SONG = Transcript(
    "Twinkle, twinkle! 小星。",
    6.0,
    (
        Segment(
            1.0,
            2.5,
            "Twinkle, twinkle!",
            "English",
            words=(Word("Twinkle,", 1.0, 1.5), Word(" twinkle!", 1.75, 2.5)),
        ),
        Segment(3, 4, " 小星。", "Chinese", words=(Word(" 小", 3, 3.5), Word("星。", 3.5, 4))),
    ),
)


def test_karaoke_underlines_each_spoken_word():
    assert parse("srt", FORMATS["srt"](SONG, highlight_words=True)) == [
        (1.0, 1.5, "<u>Twinkle,</u> twinkle!"),
        (1.5, 1.75, "Twinkle, twinkle!"),
        (1.75, 2.5, "Twinkle, <u>twinkle!</u>"),
        (3.0, 3.5, "<u>小</u>星。"),
        (3.5, 4.0, "小<u>星。</u>"),
    ]


def test_karaoke_lyrics_time_each_word():
    assert FORMATS["lrc"](SONG, highlight_words=True) == (
        "[00:01.00] <00:01.00> Twinkle, <00:01.75> twinkle! <00:02.50>\n"
        "[00:03.00] <00:03.00> 小 <00:03.50> 星。 <00:04.00>\n"
    )


def test_cut_segments_follow_their_words():
    times = [(0.5 * i + 4 * (i > 2), 0.5 * i + 4 * (i > 2) + 0.4) for i in range(6)]
    words = tuple(Word(f" word{i}", *span) for i, span in enumerate(times))
    segment = Segment(0, words[-1].end, "".join(word.word for word in words), words=words)
    document = FORMATS["srt"](Transcript("", 9.0, (segment,)), max_line_width=20, max_line_count=1)
    assert parse("srt", document) == [
        (0, 1.4, "word0 word1 word2"),
        (5.5, 6.9, "word3 word4 word5"),
    ]


@st.composite
def sung(draw):
    """Transcripts whose segments are words with times, of texts as hard as any."""
    segments, time = [], 0.0
    for text in draw(st.lists(spoken.filter(str.strip), max_size=4)):
        words = []
        for piece in re.findall(r"\s*\S+\s*$|\s*\S+", text):
            start = time + draw(st.sampled_from([0.0, 0.0, 0.2, 3.0]))
            time = start + draw(st.floats(0.001, 2))
            words.append(Word(piece, start, time))
        segments.append(Segment(words[0].start, time, text, words=tuple(words)))
    return Transcript("", time, tuple(segments))


@given(sung(), st.integers(2, 40))
@pytest.mark.parametrize("name", SUBTITLES)
def test_karaoke_only_adds_marks(name, transcript, width):
    """Marks change no text at any time, and mark one word at most."""
    plain = parse(name, FORMATS[name](transcript, max_line_width=width))
    cues = parse(name, FORMATS[name](transcript, max_line_width=width, highlight_words=True))
    assert all(end <= start for (_, end, _), (start, _, _) in pairwise(cues))
    merged = []
    for start, end, text in cues:
        assert text.count("<u>") == text.count("</u>") <= 1
        text = text.replace("<u>", "").replace("</u>", "")
        if (
            merged
            and merged[-1][1] == start
            and merged[-1][2] == text
            and (start, text) not in {(begin, said) for begin, _, said in plain}
        ):
            start = merged.pop()[0]
        merged.append((start, end, text))
    assert merged == plain


def test_words_survive_verbose_json():
    document = json.loads(FORMATS["verbose_json"](SONG))
    assert [word["word"] for word in document["words"]] == ["Twinkle,", " twinkle!", " 小", "星。"]
    assert read_verbose_json(document).segments == tuple(
        replace(segment, avg_logprob=None) for segment in SONG.segments
    )


@pytest.mark.parametrize("name", FORMATS)
def test_a_transcript_writes_every_format(name, tmp_path):
    transcript = Transcript("Hello.", 1.0, (Segment(0.0, 1.0, "Hello."),))
    assert transcript.to(name) == FORMATS[name](transcript)
    transcript.write(path := tmp_path / f"a.{name}")
    assert path.read_text("utf-8") == FORMATS[name](transcript)


def test_unknown_formats_get_the_list(tmp_path):
    transcript = Transcript("Hello.", 1.0)
    with pytest.raises(ValueError, match=r"'.doc'; use one of txt, json, srt"):
        transcript.write(tmp_path / "a.doc")


# ---- speakers ----

TALK = Transcript(
    "Hi, all. Hello! Who?",
    9.0,
    (
        Segment(0.0, 2.0, "Hi, all.", words=(Word("Hi,", 0, 1, speaker="A"),), speaker="A"),
        Segment(2.0, 4.0, " Hello!", speaker="R&D -->", other_speakers=("A",)),
        Segment(5.0, 6.0, " Who?"),
    ),
)


def test_subtitles_name_their_speakers():
    assert "\n[A]: Hi, all.\n" in FORMATS["srt"](TALK)
    assert "\n[R&D →]: Hello!\n" in FORMATS["srt"](TALK) and "\nWho?\n" in FORMATS["srt"](TALK)
    assert "\n<v A>Hi, all.\n" in FORMATS["vtt"](TALK)
    assert "\n<v R&amp;D --&gt;>Hello!\n" in FORMATS["vtt"](TALK)


def test_parsers_read_named_subtitles():
    assert [cue.content for cue in srt.parse(FORMATS["srt"](TALK))][0] == "[A]: Hi, all."
    cues = webvtt.from_string(FORMATS["vtt"](TALK))
    assert [(cue.voice, cue.text) for cue in cues][0] == ("A", "Hi, all.")


def test_lines_leave_room_for_speakers():
    text = " ".join(["word"] * 12)
    transcript = Transcript(text, 9.0, (Segment(0.0, 6.0, text, speaker="Ada"),))
    for width in (20, 42):
        lines = FORMATS["srt"](transcript, max_line_width=width).splitlines()
        shown = [line for line in lines if "word" in line]
        assert max(map(len, shown)) <= width and any(x.startswith("[Ada]: ") for x in shown)


def test_every_cue_of_a_segment_is_named():
    words = tuple(Word(f" w{i}", i, i + 1) for i in range(20))
    text = "".join(word.word for word in words)
    transcript = Transcript(text, 20.0, (Segment(0, 20, text, words=words, speaker="B"),))
    for highlight in (False, True):
        cues = FORMATS["srt"](transcript, highlight_words=highlight).split("\n\n")
        assert len(cues) > 2 and all("\n[B]: " in cue for cue in cues)


def test_speakers_survive_verbose_json():
    document = json.loads(FORMATS["verbose_json"](TALK))
    assert [s.get("speaker") for s in document["segments"]] == ["A", "R&D -->", None]
    assert document["words"][0]["speaker"] == "A"
    read = read_verbose_json(document).segments
    assert [(s.speaker, s.other_speakers) for s in read] == [
        ("A", None),
        ("R&D -->", ("A",)),
        (None, None),
    ]


def test_json_has_the_speakers():
    first, second, third = json.loads(FORMATS["json"](TALK))["segments"]
    assert (first["speaker"], first["words"][0]["speaker"]) == ("A", "A")
    assert second["other_speakers"] == ["A"] and "speaker" not in third


def test_diarized_json_is_openai_s():
    document = json.loads(RESPONSE_FORMATS["diarized_json"](TALK))
    read = TranscriptionDiarized.model_validate(document)
    assert [s.speaker for s in read.segments] == ["A", "R&D -->", "unknown"]
    for segment in document["segments"]:
        TranscriptionTextSegmentEvent.model_validate(segment)
