# SPDX-License-Identifier: Apache-2.0
"""The language table against langcodes (CLDR) and transformers, and the seams between scripts."""

import pickle
import re
import unicodedata
from functools import cache, reduce
from itertools import product
from string import ascii_lowercase

import langcodes
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_asr_vllm.languages import (
    ALIGNER_LANGUAGES,
    LANGUAGES,
    SPACELESS_CODES,
    checkpoint_languages,
    is_spaceless,
    read_languages,
    resolve_language,
    separator,
)

codes = pytest.mark.parametrize("code", LANGUAGES)


def test_table_is_the_one_of_transformers():
    from transformers.models.qwen3_asr import processing_qwen3_asr as reference

    assert LANGUAGES == reference.LANGUAGE_CODE_TO_NAME
    assert ALIGNER_LANGUAGES == reference.FORCED_ALIGNER_LANGUAGES


@codes
def test_code_and_name_agree_with_cldr(code):
    assert langcodes.Language.get(code).language_name() == LANGUAGES[code]
    assert langcodes.find(LANGUAGES[code]).language == code


@codes
def test_code_and_name_lead_to_each_other(code):
    assert LANGUAGES.resolve(code) == LANGUAGES[code]
    assert LANGUAGES.code(LANGUAGES[code]) == code


@codes
@pytest.mark.parametrize("variant", ["T", "B"])
def test_three_letter_codes_are_iso_639(code, variant):
    alpha3 = langcodes.Language.get(code).to_alpha3(variant=variant)
    assert LANGUAGES.resolve(alpha3) == LANGUAGES[code]


def test_two_letter_codes_are_those_of_cldr():
    for code in map("".join, product(ascii_lowercase, repeat=2)):
        expected = LANGUAGES.get(langcodes.standardize_tag(code))
        assert _resolved_or_none(code) == expected, code


@pytest.mark.parametrize("code", ["cmn", "arb", "zsm", "pes"])
def test_standard_varieties_resolve_to_their_macrolanguage(code):
    assert LANGUAGES.resolve(code) == LANGUAGES[langcodes.standardize_tag(code, macro=True)]


@codes
def test_full_tags_resolve(code):
    tag = langcodes.Language.get(code).maximize().to_tag()  # such as fil-Latn-PH
    assert LANGUAGES.resolve(tag) == LANGUAGES[code]
    assert LANGUAGES.resolve(tag.replace("-", "_").upper()) == LANGUAGES[code]


@given(st.sampled_from(list(LANGUAGES.items())), st.data())
def test_case_and_surrounding_space_do_not_matter(language, data):
    code, name = language
    given_as = data.draw(st.sampled_from([code, name, f"{code}-419", f"{code}_US"]))
    flips = data.draw(st.lists(st.booleans(), min_size=len(given_as), max_size=len(given_as)))
    mixed = "".join(c.swapcase() if flip else c for c, flip in zip(given_as, flips, strict=True))
    assert LANGUAGES.resolve(f" {mixed}\n") == name


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("zh-CN", "Chinese"),
        ("zh-TW", "Chinese"),
        ("zh-Hant", "Chinese"),
        ("zh-Hant-TW", "Chinese"),
        ("cmn-Hans-CN", "Chinese"),
        ("zh-cmn", "Chinese"),
        ("cmn-HK", "Chinese"),
        ("Mandarin", "Chinese"),
        ("zh-HK", "Cantonese"),
        ("zh_hk", "Cantonese"),
        ("zh-MO", "Cantonese"),
        ("zh-Hant-HK", "Cantonese"),
        ("zh-yue", "Cantonese"),
        ("yue-CN", "Cantonese"),
        ("en-HK", "English"),
        ("tl", "Filipino"),
        ("fil-PH", "Filipino"),
        ("Tagalog", "Filipino"),
        ("Farsi", "Persian"),
        ("es-419", "Spanish"),
    ],
)
def test_other_ways_to_say_it(language, name):
    assert LANGUAGES.resolve(language) == name


@codes
def test_languages_are_known_by_native_names(code):
    own = langcodes.Language.get(code).autonym()
    assert LANGUAGES.resolve(own) == LANGUAGES.resolve(own.upper()) == LANGUAGES[code]
    assert LANGUAGES.resolve(unicodedata.normalize("NFD", own)) == LANGUAGES[code]


@pytest.mark.parametrize(
    ("language", "name"),
    [
        ("Nederlands", "Dutch"),
        ("DEUTSCH", "German"),
        ("francais", "French"),
        ("Espanol", "Spanish"),
        ("Castellano", "Spanish"),
        ("Turkce", "Turkish"),
        ("tieng viet", "Vietnamese"),
        ("Bahasa Melayu", "Malay"),
        ("普通话", "Chinese"),
        ("廣東話", "Cantonese"),
        ("Mandarin Chinese", "Chinese"),
        ("Chinese (Simplified)", "Chinese"),
        ("Chinese (Cantonese)", "Cantonese"),
        ("English (US)", "English"),
        ("Portuguese (Brazil)", "Portuguese"),
    ],
)
def test_names_are_known_with_and_without_accents(language, name):
    assert LANGUAGES.resolve(language) == name


@pytest.mark.parametrize("language", [None, "", "  ", "auto", "AUTO", " Auto "])
def test_nothing_and_auto_ask_for_detection(language):
    assert LANGUAGES.resolve(language) is None


@pytest.mark.parametrize(
    "language",
    ["null", "None", "none", "undefined", "detect", "auto-detect", "auto_detect", "und", "multi"],
)
def test_empty_languages_ask_for_detection(language):
    assert LANGUAGES.resolve(language) is None


FINE_TUNE = checkpoint_languages(["English", "Hebrew", "Haitian Creole"], "ur=Urdu,ckb=Sorani")


@pytest.mark.parametrize(
    ("language", "name"),
    [
        *((given, "Hebrew") for given in ("he", "HE", "heb", "iw", "he-IL", "he_il", "עברית")),
        *((given, "Urdu") for given in ("ur", "urd", "ur-PK", "اردو")),
        *((given, "Sorani") for given in ("ckb", "sorani", "Central Kurdish", "ckb-IQ")),
        *((given, "Haitian Creole") for given in ("ht", "hat", "haitian creole")),
        *(("German", "German"), ("zh-HK", "Cantonese"), ("auto", None)),
    ],
)
def test_declared_languages_resolve_like_the_published(language, name):
    assert FINE_TUNE.resolve(language) == name


def test_declared_languages_have_their_codes():
    codes = {FINE_TUNE.code(name): name for name in ("Hebrew", "Urdu", "Sorani", "Haitian Creole")}
    assert FINE_TUNE == {**LANGUAGES, **codes}
    assert sorted(codes) == ["ckb", "he", "ht", "ur"]
    assert list(FINE_TUNE.values()) == sorted(FINE_TUNE.values())


def test_an_undeclared_language_is_refused():
    with pytest.raises(ValueError, match="declare Swahili with QWEN3_ASR_LANGUAGES=sw=Swahili"):
        FINE_TUNE.resolve("sw")
    with pytest.raises(ValueError, match="he Hebrew, .*ckb Sorani"):
        FINE_TUNE.resolve("swh-KE")


def test_the_environment_declares_languages(monkeypatch):
    monkeypatch.setenv("QWEN3_ASR_LANGUAGES", "he=Hebrew, ur=Urdu")
    declared = checkpoint_languages([], {"yo": "Yoruba"})
    assert set(declared) - set(LANGUAGES) == {"he", "ur", "yo"}
    assert checkpoint_languages(["English"]).resolve("he-IL") == "Hebrew"
    assert set(LANGUAGES) == set(checkpoint_languages()) - {"he", "ur"}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("", {}),
        ("he", {"he": "Hebrew"}),
        ("Hebrew", {"he": "Hebrew"}),
        ("heb=Ivrit", {"he": "Ivrit"}),
        ("zz=Elbonian", {"zz": "Elbonian"}),
        ("pt-BR=Brazilian Portuguese", {"pt-BR": "Brazilian Portuguese"}),
        ({"he": "Hebrew", "ur": "Urdu"}, {"he": "Hebrew", "ur": "Urdu"}),
    ],
)
def test_declarations_are_read(given, expected):
    assert read_languages(given, "languages") == expected


@pytest.mark.parametrize(
    "given",
    [
        "he:Hebrew",
        "Elbonian",
        "=Hebrew",
        "he=He<|im_end|>",
        "x y=Foo",
        "he=None",
        "he=A\nB",
        "he=auto",
    ],
)
def test_a_wrong_declaration_is_named(given, monkeypatch):
    monkeypatch.setenv("QWEN3_ASR_LANGUAGES", given)
    expected = re.escape(f"QWEN3_ASR_LANGUAGES has {given!r}; give code=Name")
    with pytest.raises(ValueError, match=expected):
        checkpoint_languages()


@pytest.mark.parametrize("names", ["Hebrew", [5], ["<asr_text>"], {"he": "Hebrew"}])
def test_a_config_must_list_names(names):
    with pytest.raises(ValueError, match="support_languages"):
        checkpoint_languages(names)


def test_a_config_may_name_codeless_languages():
    declared = checkpoint_languages(["Elbonian"])
    assert declared.resolve("elbonian") == declared.code("Elbonian") == "Elbonian"
    assert declared.resolve("Deutsch") == "German"


def test_any_language_has_an_english_name():
    assert [*map(resolve_language, ("sw", "deu", "עברית", None))] == [
        *("Swahili", "German", "Hebrew", None)
    ]
    with pytest.raises(ValueError, match="unsupported language 'Englishman'"):
        resolve_language("Englishman")


def test_spaceless_languages_are_those_of_their_scripts():
    scripts = {"Hans", "Hant", "Jpan", "Thai", "Laoo", "Khmr", "Mymr", "Tibt"}
    scripts |= {"Lana", "Talu", "Tavt", "Tale"}
    for code in SPACELESS_CODES:
        assert langcodes.Language.get(code).maximize().script in scripts, code
    assert [*map(is_spaceless, ("Lao", "Burmese", "Japanese", "Hebrew", "Korean"))] == [
        *(True, True, True, False, False)
    ]


def test_a_table_is_one_value():
    again = checkpoint_languages(["Hebrew", "Haitian Creole"], "ur=Urdu,ckb=Sorani")
    assert again == FINE_TUNE and hash(again) == hash(FINE_TUNE)
    assert pickle.loads(pickle.dumps(FINE_TUNE)) == FINE_TUNE


def test_long_languages_are_cut_in_messages():
    with pytest.raises(ValueError) as error:
        LANGUAGES.resolve("x" * 1_000_000)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "language",
    ["he", "sw", "Klingon", "Hebrew (Israel)", "English<asr_text>", "it-is-not-one", "en US", "-"],
)
def test_unsupported_languages_get_the_list(language):
    with pytest.raises(ValueError) as error:
        LANGUAGES.resolve(language)
    assert repr(language) in str(error.value)
    for code, name in LANGUAGES.items():
        assert f"{code} {name}" in str(error.value)


def test_a_codeless_name_is_its_own():
    assert (LANGUAGES.code("Klingon"), LANGUAGES.code("Elbonian")) == ("tlh", "Elbonian")


@pytest.mark.parametrize("script", ["ARABIC", "CYRILLIC", "DEVANAGARI", "GREEK", "HANGUL", "LATIN"])
def test_spaced_scripts_are_joined_with_spaces(script):
    for letter in _letters(script):
        assert separator(letter, letter) == " ", unicodedata.name(letter)


@pytest.mark.parametrize(
    "script",
    [
        *("BOPOMOFO", "CJK", "FULLWIDTH", "HALFWIDTH KATAKANA", "HIRAGANA", "KATAKANA", "THAI"),
        *("LAO", "KHMER", "MYANMAR", "TIBETAN", "TAI LE", "NEW TAI LUE", "TAI THAM", "TAI VIET"),
    ],
)
def test_spaceless_scripts_are_joined_without_spaces(script):
    for letter in _letters(script):
        assert separator(letter, letter) == "", unicodedata.name(letter)


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("Hello.", "World", " "),
        ("안녕하세요.", "반갑습니다", " "),
        ("नमस्ते", "दुनिया", " "),
        ("你好", "世界", ""),
        ("你好。", "世界", ""),
        ("你好,", "世界", ""),
        ("こんにちは", "世界", ""),
        ("สวัสดี", "ครับ", ""),
        ("ที่", "Bangkok", " "),
        ("我喜欢", "Python", " "),
        ("Python", "很好", " "),
        ("你好。", "Hello", ""),
        ("Hello", "（笑）", ""),
        ("Wait…", "what", " "),
        ("共", "3个", ""),
        ("共 3", "个", ""),
        ("page 3", "of 4", " "),
        ("3", "4", " "),
        ("3", "个", ""),
        ("Hello ", "World", ""),
        ("Hello", "\nWorld", ""),
        ("", "World", ""),
        ("Hello", "", ""),
    ],
)
def test_separator_follows_the_script_at_the_seam(left, right, expected):
    assert separator(left, right) == expected


@given(st.text(), st.text(min_size=1))
def test_separators_need_one_character(left, right):
    assert separator(left, right) == separator(left, right[0])


def join_texts(texts):
    """Texts of clips, each of which may begin and end with white space."""
    return reduce(
        lambda left, right: left + separator(left, right) + right, map(str.strip, texts), ""
    )


@pytest.mark.parametrize(
    ("texts", "joined"),
    [
        (["Hello.", "World."], "Hello. World."),
        (["Hello. ", " World."], "Hello. World."),
        (["Hello.", "", " \n", "World."], "Hello. World."),
        (["你好。", "世界。"], "你好。世界。"),
        (["今天有", "3", "个"], "今天有3个"),
        (["Hello.", "你好。", "안녕", "하세요"], "Hello. 你好。안녕 하세요"),
        (["", ""], ""),
        ([], ""),
    ],
)
def test_texts_join_by_their_script(texts, joined):
    assert join_texts(texts) == joined


texts = st.lists(st.text("ab .3,你好。ไทย한\n"))


@given(texts)
def test_joining_adds_and_drops_white_space_only(texts):
    assert "".join(join_texts(texts).split()) == "".join("".join(texts).split())


@given(st.lists(st.text("ab .3,한\n")))
def test_joining_never_merges_words(texts):
    assert join_texts(texts).split() == " ".join(texts).split()


@given(st.lists(st.text("你好。，ไทยかな\n ").map(str.strip)))
def test_joining_spaceless_scripts_adds_nothing(texts):
    assert join_texts(texts) == "".join(texts)


@given(texts, texts)
def test_joining_may_be_done_in_steps(first, second):
    assert join_texts([join_texts(first), *second]) == join_texts([*first, *second])


def _resolved_or_none(language):
    try:
        return LANGUAGES.resolve(language)
    except ValueError:
        return None


@cache
def _named_letters():
    return [(c, unicodedata.name(c, "")) for c in map(chr, range(0x110000)) if c.isalpha()]


def _letters(script):
    """Every letter that Unicode names after ``script``, one at least."""
    found = [letter for letter, name in _named_letters() if name.startswith(script)]
    assert found
    return found
