# SPDX-License-Identifier: Apache-2.0
"""Languages of a checkpoint: their names and codes, and which are written without spaces.

The model knows a language by its English name ("Chinese"), clients by whatever they
have: ``zh``, ``ZH``, ``zh-CN``, ``zho``, ``mandarin``, ``中文``. ``Languages.resolve`` turns all of
these into the name; everything behind it handles names only.

``LANGUAGES`` are the 30 of the published checkpoints. ``checkpoint_languages`` adds those that a
fine-tune names in its config, and those that its user declares.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import accumulate
from unicodedata import category, east_asian_width

from .checks import check_string
from .iso639 import MAX_LANGUAGE, codes_of, english_name, fold, is_code, own_name

VARIABLE = "QWEN3_ASR_LANGUAGES"  # declares languages in the environment: he=Hebrew,ur=Urdu

# What clients send who do not know the language.
_UNKNOWN = frozenset(
    "auto autodetect auto-detect automatic detect multi multilingual none null nil undefined "
    "unknown und mul zxx".split()
)
_CODE = re.compile(r"[A-Za-z]{1,8}(?:-[A-Za-z0-9]{1,8})*")  # a BCP 47 tag
_NAME = re.compile(r"[^\W\d_](?:[\w '’()-]{0,60}[\w)])?")  # no mark that ends a name in a header


class Languages(Mapping[str, str]):
    """An immutable table of languages: their names by code."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = dict(names)
        self._codes = {name: code for code, name in names.items()}
        self._spelled = {fold(text): code for code in names for text in (code, names[code])}

    def __getitem__(self, code: str) -> str:
        return self._names[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __hash__(self) -> int:
        return hash(tuple(self._names.items()))

    def __repr__(self) -> str:
        return f"Languages({self._names})"

    def resolve(self, language: str | None) -> str | None:
        """Return the model's name of a language given by code, name or tag, in any case.

        The name may be in any language ("Deutsch"). None, "", "auto" and what programs write for
        nothing ("null", "undefined") give None: the model is to detect it. A region does not
        matter, except that the Chinese of Hong Kong and Macau is Cantonese.

        Raises ValueError, which lists what is supported and says how to declare more, for another
        string, TypeError for another type.
        """
        given = check_string("language", language or "")
        wanted = fold(given[:MAX_LANGUAGE])
        if not wanted or wanted in _UNKNOWN:
            return None
        code = self._spelled.get(wanted) or self._listed(given) or self._own_names.get(wanted)
        if code is None or len(given) > MAX_LANGUAGE:
            raise ValueError(self._unsupported(given))
        return self[code]

    def code(self, name: str) -> str:
        """Return the code of a language by its name, or the name where it has none."""
        return self._codes.get(name) or next(iter(codes_of(name)), name)

    def extended(self, names: Mapping[str, str]) -> Languages:
        """Return a table with more languages, in the order of their names."""
        merged = sorted({**self, **names}.items(), key=lambda item: item[1])
        return Languages(dict(merged)) if names else self

    def _listed(self, given: str) -> str | None:
        """Return the code in this table of a language of ISO 639."""
        codes = codes_of(given)
        by_name = (self._codes.get(english_name(code) or "") for code in codes)
        return next((code for code in (*codes, *by_name) if code in self), None)

    @cached_property
    def _own_names(self) -> dict[str, str]:
        return {fold(own_name(code)): code for code in self}

    def _unsupported(self, given: str) -> str:
        code = next(iter(codes_of(given)), "")
        name = code and english_name(code)
        example = f"{name} with {VARIABLE}={code}={name}" if name else f"it with {VARIABLE}"
        supported = ", ".join(f"{code} {name}" for code, name in self.items())
        return (
            f"unsupported language {given[:80]!r}; declare {example} if the checkpoint was trained "
            "on it, or pass 'auto' to detect the language, or the code or name of one of: "
            f"{supported}"
        )


_PUBLISHED = {
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

LANGUAGES = Languages(_PUBLISHED)

# What the forced aligner can time.
ALIGNER_LANGUAGES = frozenset(
    LANGUAGES[code] for code in ("yue", "zh", "en", "fr", "de", "it", "ja", "ko", "pt", "ru", "es")
)

# Codes of languages written without spaces between words: in Han, kana, Thai, Lao, Khmer, Burmese,
# Tibetan, and scripts near these.
SPACELESS_CODES = frozenset(
    "zh yue cmn wuu nan hak gan hsn lzh ja th tts nod lo km my shn mnw kht khb blt tdd bo "
    "dz".split()
)


def resolve_language(language: str | None) -> str | None:
    """Return the English name of any language of ISO 639; see ``Languages.resolve``."""
    text = check_string("language", language or "")
    try:
        return LANGUAGES.resolve(text)
    except ValueError:
        name = next(map(english_name, codes_of(text)), None)
        if name is None:
            raise
        return name


def is_spaceless(name: str) -> bool:
    """Return whether a language is written without spaces between words."""
    return LANGUAGES.code(name).partition("-")[0] in SPACELESS_CODES


# declared languages -------------------------------------------------------------------------


def checkpoint_languages(
    support_languages: object = None, declared: str | Mapping[str, str] = ""
) -> Languages:
    """Return the languages of a checkpoint: the published ones and those declared.

    ``support_languages`` is the field of its config, a list of names. ``declared`` are more of
    them, beside those of QWEN3_ASR_LANGUAGES; see ``read_languages``.

    Raises ValueError, which names the field or variable, for what is no language.
    """
    known = LANGUAGES.extended(_supported(support_languages))
    known = known.extended(read_languages(os.environ.get(VARIABLE, ""), VARIABLE))
    return known.extended(read_languages(declared, "languages"))


def read_languages(given: str | Mapping[str, str], source: str) -> dict[str, str]:
    """Read "he=Hebrew,ur=Urdu", or a mapping, as names by code; "he" or "Hebrew" alone suffices.

    Raises ValueError, which names the ``source`` and the wrong item.
    """
    if isinstance(given, Mapping):
        pairs = [f"{code}={name}" for code, name in given.items()]
    else:
        pairs = check_string(source, given).split(",")
    return dict(_declared(pair, source) for pair in pairs if pair.strip())


def _declared(pair: str, source: str) -> tuple[str, str]:
    """Return the code and name of an item such as "he=Hebrew"."""
    given, _, name = map(str.strip, pair.partition("="))
    code, own = _named(given)
    name = name or own
    is_known = bool(name and codes_of(given)) or bool(_CODE.fullmatch(given) and "=" in pair)
    if not is_known or not _is_name(name):
        raise ValueError(f"{source} has {pair[:80]!r}; give code=Name, such as he=Hebrew,ur=Urdu.")
    return code, name


def _supported(names: object) -> dict[str, str]:
    """Return the languages that a config names besides the published ones."""
    if not isinstance(names, (list, tuple, type(None))):
        raise ValueError(f"support_languages is {names!r:.80}; the config must list names.")
    for name in names or ():
        if not isinstance(name, str) or not _is_name(name):
            raise ValueError(f"support_languages has {name!r:.80}; give names such as Hebrew.")
    pairs = map(_named, names or ())
    return {code: name for code, name in pairs if code not in LANGUAGES}


def _named(text: str) -> tuple[str, str]:
    """Return code and name of a language given by either; a name without a code is its own."""
    code = next(iter(codes_of(text)), text)
    return code, (LANGUAGES.get(code) or english_name(code) or "") if is_code(text) else text


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and fold(text) not in _UNKNOWN


# text without spaces ------------------------------------------------------------------------

# Letters of South-East Asia, Tibet, China and Japan. Korean, in between, is written with spaces.
_SPACELESS = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f"  # Thai, Lao; Tibetan; Burmese
    "\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf"  # Khmer; Tai Le, New Tai Lue; Tai Tham
    "\ua9e0-\ua9ff\uaa60-\uaadf"  # Shan, Mon, Tai Viet
    "\u2e80-\u312f\u31a0-\u31ff"  # radicals, kana, bopomofo
    "\U0001aff0-\U0001b16f"  # rare kana
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # Han
    "\uff00-\uff9f]+"  # full-width forms, half-width katakana
)
_WIDE_PUNCTUATION = "、。，．！？：；「」『』（）《》〈〉【】"


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
