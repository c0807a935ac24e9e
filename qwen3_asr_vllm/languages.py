# SPDX-License-Identifier: Apache-2.0
"""The 30 languages: their names and codes, and which of them are written without spaces.

The model knows a language by its English name ("Chinese"), clients by whatever they
have: ``zh``, ``ZH``, ``zh-CN``, ``zho``, ``mandarin``, ``中文``. ``resolve_language`` turns all of
these into the name; everything behind it handles names only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from itertools import accumulate
from unicodedata import category, east_asian_width, normalize

from .checks import check_string

LANGUAGES: Mapping[str, str] = {
    "ar": "Arabic",
    "yue": "Cantonese",
    "zh": "Chinese",
    "cs": "Czech",
    "da": "Danish",
    "nl": "Dutch",
    "en": "English",
    "fil": "Filipino",
    "fi": "Finnish",
    "fr": "French",
    "de": "German",
    "el": "Greek",
    "hi": "Hindi",
    "hu": "Hungarian",
    "id": "Indonesian",
    "it": "Italian",
    "ja": "Japanese",
    "ko": "Korean",
    "mk": "Macedonian",
    "ms": "Malay",
    "fa": "Persian",
    "pl": "Polish",
    "pt": "Portuguese",
    "ro": "Romanian",
    "ru": "Russian",
    "es": "Spanish",
    "sv": "Swedish",
    "th": "Thai",
    "tr": "Turkish",
    "vi": "Vietnamese",
}

# What the forced aligner can time.
ALIGNER_LANGUAGES = frozenset(
    LANGUAGES[code] for code in ("yue", "zh", "en", "fr", "de", "it", "ja", "ko", "pt", "ru", "es")
)

# Written without spaces between words.
SPACELESS_LANGUAGES = frozenset(LANGUAGES[code] for code in ("yue", "zh", "ja", "th"))

# ISO 639-2 and 639-3, retired codes, and other English names.
_ALIASES = {
    "ar": "ara arb",
    "zh": "zho chi cmn mandarin",
    "cs": "ces cze",
    "da": "dan",
    "nl": "nld dut",
    "en": "eng",
    "fil": "tl tgl tagalog",
    "fi": "fin",
    "fr": "fra fre",
    "de": "deu ger",
    "el": "ell gre",
    "hi": "hin",
    "hu": "hun",
    "id": "ind in",
    "it": "ita",
    "ja": "jpn",
    "ko": "kor",
    "mk": "mkd mac",
    "ms": "msa may zsm",
    "fa": "fas per pes farsi",
    "pl": "pol",
    "pt": "por",
    "ro": "ron rum mo",
    "ru": "rus",
    "es": "spa",
    "sv": "swe",
    "th": "tha",
    "tr": "tur",
    "vi": "vie",
}

# Each language's name in itself, as CLDR has it, and other spellings of that.
_NATIVE_NAMES = {
    "ar": "العربية, عربي, عربية",
    "yue": "粵語, 粤语, 廣東話, 广东话, chinese (cantonese), chinese (hong kong)",
    "zh": "中文, 汉语, 漢語, 普通话, 普通話, 国语, 國語, 华语, 華語, 简体中文, 繁體中文, "
    "mandarin chinese, simplified chinese, traditional chinese",
    "cs": "čeština, česky, český",
    "da": "dansk",
    "nl": "nederlands, vlaams, flemish",
    "en": "american english, british english",
    "fil": "wikang filipino",
    "fi": "suomi",
    "fr": "français",
    "de": "deutsch",
    "el": "ελληνικά",
    "hi": "हिन्दी, हिंदी",
    "hu": "magyar",
    "id": "bahasa indonesia",
    "it": "italiano",
    "ja": "日本語, 日本语",
    "ko": "한국어, 한국말, 조선말",
    "mk": "македонски",
    "ms": "bahasa malaysia, bahasa melayu, melayu",
    "fa": "فارسی",
    "pl": "polski",
    "pt": "português, brazilian portuguese, português brasileiro",
    "ro": "română, moldavian",
    "ru": "русский, русский язык",
    "es": "español, castellano, castilian",
    "sv": "svenska",
    "th": "ไทย, ภาษาไทย",
    "tr": "türkçe",
    "vi": "tiếng việt",
}

# What clients send who do not know the language.
_UNKNOWN = frozenset(
    "auto autodetect auto-detect automatic detect multi multilingual none null nil undefined "
    "unknown und mul".split()
)

_CODE_BY_NAME = {name: code for code, name in LANGUAGES.items()}


def _fold(text: str) -> str:
    """Normalize a name: no case, accents or surrounding space, which clients vary."""
    folded = normalize("NFKD", text.strip().casefold().replace("_", "-"))
    return "".join(char for char in folded if category(char) != "Mn")


_CODE_BY_ALIAS = {
    _fold(alias): code
    for code, name in LANGUAGES.items()
    for alias in (code, name, *_ALIASES.get(code, "").split(), *_NATIVE_NAMES[code].split(", "))
}

_REGION = re.compile(r" ?\([^()]*\)$")  # English (US)

# BCP 47 as far as clients use it: language, extended language, script, region.
_TAG = re.compile(r"([a-z]{2,3})(?:-([a-z]{3}))?(?:-[a-z]{4})?(?:-([a-z]{2}|[0-9]{3}))?")

# Letters of Thai, Chinese and Japanese. Korean, in between, is written with spaces.
_SPACELESS = re.compile(
    "[\u0e00-\u0e7f"  # Thai
    "\u2e80-\u312f\u31a0-\u31ff"  # radicals, kana, bopomofo
    "\U0001aff0-\U0001b16f"  # rare kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\uff00-\uff9f]+"  # full-width forms, half-width katakana
)
_WIDE_PUNCTUATION = "、。，．！？：；「」『』（）《》〈〉【】"


def resolve_language(language: str | None) -> str | None:
    """Return the model's name of a language given by code, name or tag, in any case.

    The name may be English or its own ("Deutsch"). None, "", "auto" and what programs write for
    nothing ("null", "undefined") give None: the model is to detect it. A region does not matter,
    except that the Chinese of Hong Kong and Macau is Cantonese.

    Raises ValueError, listing what is supported, for another string, TypeError for another type.
    """
    wanted = _fold(check_string("language", language or ""))
    if not wanted or wanted in _UNKNOWN:
        return None
    name = _REGION.sub("", wanted)
    code = _CODE_BY_ALIAS.get(wanted) or _CODE_BY_ALIAS.get(name) or _code_of_tag(wanted)
    if code is None:
        supported = ", ".join(f"{code} {name}" for code, name in LANGUAGES.items())
        raise ValueError(
            f"unsupported language {str(language)[:80]!r}; pass 'auto' to detect it, "
            f"or the code or name of one of: {supported}"
        )
    return LANGUAGES[code]


def language_code(name: str) -> str | None:
    """Return the code of a language by the model's name: "zh" for "Chinese"."""
    return _CODE_BY_NAME.get(name)


def separator(left: str, right: str) -> str:
    """Return the separator of two stretches of text: a space or nothing.

    Nothing where both sides are written without spaces, next to full-width punctuation,
    and where there is a space already. Digits and punctuation take the side of the
    letters before them. Of ``right`` only the first character counts, so a stream can
    be joined before it is complete.
    """
    if not left or not right:
        return ""
    seam = left[-1] + right[0]
    if any(char.isspace() or char in _WIDE_PUNCTUATION for char in seam):
        return ""
    last_letter = next(filter(str.isalpha, reversed(left)), "")
    first_letter = right[0] if right[0].isalpha() else ""
    return "" if _SPACELESS.fullmatch(last_letter + first_letter) else " "


def _code_of_tag(tag: str) -> str | None:
    match = _TAG.fullmatch(tag)
    if match is None:
        return None
    language, extended, region = match.groups()
    code = _CODE_BY_ALIAS.get(language)
    if code == "zh" and language != "cmn" and (extended == "yue" or region in ("hk", "mo")):
        return "yue"
    return code


def display_width(text: str) -> int:
    """Count the columns of a text: two for a full-width character, none for a combining one."""
    return sum(map(columns, text))


@cache
def columns(char: str) -> int:
    if category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if east_asian_width(char) in "WF" else 1


def nearest_middle(parts: Sequence[str], cuts: Iterable[int]) -> int:
    """Return the cut, an index into the parts, whose sides are most equal in width."""
    widths = [0, *accumulate(map(display_width, parts))]
    return min(cuts, key=lambda cut: abs(2 * widths[cut] - widths[-1]))
