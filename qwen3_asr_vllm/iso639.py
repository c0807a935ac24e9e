# SPDX-License-Identifier: Apache-2.0
"""Codes and names of all languages of ISO 639, from langcodes, which is imported at first use.

"he", "heb", "iw", "Hebrew", "עברית", "he-IL"  ->  codes_of()  ->  ("he",) or ("he-IL", "he")
"""

from __future__ import annotations

import re
from functools import lru_cache
from unicodedata import category, normalize

MAX_LANGUAGE = 100  # characters of a tag or name that is looked up

_REGION = re.compile(r" ?\([^()]*\)$")  # English (US)


def fold(text: str) -> str:
    """Normalize a name: no case, accents or surrounding space, which clients vary."""
    folded = normalize("NFKD", text.strip().casefold().replace("_", "-"))
    return "".join(char for char in folded if category(char) != "Mn")


# Names that langcodes does not know.
_OTHER_NAMES = {
    fold(name): code
    for code, names in {
        "yue": "廣東話, chinese (cantonese), chinese (hong kong)",
        "zh": "汉语, 漢語, 普通話, 国语, 國語, 华语, 華語",
        "cs": "česky, český",
        "fil": "wikang filipino",
        "ja": "日本语",
        "ko": "한국말, 조선말",
        "ms": "bahasa melayu",
        "es": "castellano",
        "th": "ภาษาไทย",
    }.items()
    for name in names.split(", ")
}


@lru_cache(maxsize=1024)
def codes_of(text: str) -> tuple[str, ...]:
    """Return the codes of a language given by tag or by name, the most exact first.

    A standard variety has the code of its macrolanguage, too: "cmn" gives cmn and zh. The Chinese
    of Hong Kong and Macau is Cantonese: "zh-HK" gives zh-HK, yue and zh. Empty for no language.
    """
    from langcodes import Language, standardize_tag

    tag = _tag(text)
    if tag is None:
        return ()
    language = Language.get(tag)
    is_cantonese = language.language == "zh" and language.territory in ("HK", "MO")
    code = language.language or tag
    codes = (tag, *(["yue"] if is_cantonese else []), code, standardize_tag(code, macro=True))
    return tuple(dict.fromkeys(codes))


def is_code(text: str) -> bool:
    """Return whether a text is a BCP 47 tag, of a language that exists."""
    import langcodes

    return langcodes.tag_is_valid(text.strip().replace("_", "-"))


def english_name(code: str) -> str | None:
    """Return the English name of a language; None for a code that has none."""
    from langcodes import Language

    name = Language.get(code).language_name() if is_code(code) else "Unknown language"
    return None if name.startswith("Unknown language") else name


def own_name(code: str) -> str:
    """Return the name of a language in itself."""
    from langcodes import Language

    return Language.get(code).autonym() if is_code(code) else code


def _tag(text: str) -> str | None:
    """Return the BCP 47 tag of a language; None for no language."""
    from langcodes import standardize_tag

    text = text.encode(errors="replace").decode()  # halves of surrogate pairs
    text = normalize("NFC", text.strip().replace("_", "-"))
    if not text or len(text) > MAX_LANGUAGE:
        return None
    if is_code(text):
        return standardize_tag(text)
    names = (text, _REGION.sub("", text))
    codes = (code for name in names if (code := _OTHER_NAMES.get(fold(name)) or _code_named(name)))
    code = next(codes, None)
    return code and standardize_tag(code)


def _code_named(name: str) -> str | None:
    """Return the code of a language by its exact name: in English, else in any language."""
    from language_data import names

    for language in ("en", "und"):
        code: str | None = names.name_to_code("language", name, language)
        # by itself it accepts any word that begins with a name, such as "Englishman"
        if names.normalize_name(name) in names.TRIES[f"{language}/name_to_language"]:
            return code
    return None
