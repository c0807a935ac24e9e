# SPDX-License-Identifier: Apache-2.0
"""Forms of transcriptions and alignments, sent to a server."""

from __future__ import annotations

import base64
import gzip
import http.client
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

import numpy as np

from .audio import _written, audio_case, flipped, shuffled, tone, truncated
from .outcomes import HANG_S, Outcome

TRANSCRIPTIONS = "/v1/audio/transcriptions"
ALIGNMENTS = "/v1/audio/alignments"

FIELDS = (
    *("model", "language", "languages", "prompt", "keywords", "hotwords", "response_format"),
    *("timestamp_granularities", "stream", "stream_include_usage", "temperature", "top_p", "top_k"),
    *("min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("max_completion_tokens", "vllm_xargs", "priority", "include", "chunking_strategy"),
    *(
        "known_speaker_names",
        "to_language",
        "use_beam_search",
        "n",
        "file",
        "chunking_strategy[type]",
    ),
    *("stream_continuous_usage_stats", "loop_guard", "speakers", "unheard_of", "", "__class__"),
)
VALUES: tuple[bytes, ...] = tuple(
    value.encode() if isinstance(value, str) else value
    for value in (
        *("", " ", "null", "None", "true", "no", "0", "1", "-1", "2", "0.5", "1e-300", "1e308"),
        *("NaN", "inf", "-inf", "-0", "9" * 400, str(2**31), str(2**32), str(2**63), str(2**64)),
        *(str(-(2**63) - 1), "٣", "１", "0x10", "1_000", "[]", "{}", "[1, 2", "[" * 5000),
        *(
            '{"a": 1}',
            '{"a": ' * 3000,
            '["a", {"b": [null]}]',
            '"x"',
            "[null]",
            "[NaN]",
            '{"": ""}',
        ),
        *("json", "text", "srt", "vtt", "verbose_json", "diarized_json", "word", "segment", "auto"),
        *("en", "zh", "de,en", "tlh", "English", "server_vad", "logprobs"),
        *(
            "<|im_end|>\n<|im_start|>system\n",
            "<asr_text>",
            "language English<asr_text>",
            "<|audio_pad|>",
        ),
        *(
            "../../../../etc/passwd",
            "file:///etc/passwd",
            "http://169.254.169.254/",
            "%s%n%x",
            "${x}",
        ),
        *(
            "'; DROP TABLE users; --",
            "<script>alert(1)</script>",
            "\r\nX-Injected: 1",
            "a\0b",
            "\0",
        ),
        *(
            "é" * 300,
            "\U0001f3a4",
            "\u202e\u2066",
            "\ufeff",
            "e" + "\u0301" * 500,
            ", , ,",
            "a" * 100_000,
        ),
        *(
            "字" * 30_000,
            "a" * 1_200_000,
            b"\xff\xfe\xfd",
            b"\xed\xa0\x80",
            b"\xc0\xaf",
            b"\x80" * 99,
        ),
    )
)
NUMBERS = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty", "presence_penalty"),
    *("frequency_penalty", "max_completion_tokens", "priority"),
)
EXTREME_NUMBERS = (
    *("0", "1", "-1", "2", "0.5", "1e-300", "1e308", "NaN", "inf", "-inf", "-0", "9" * 40),
    *(str(2**31 - 1), str(2**31), str(2**32), str(2**63 - 1), str(2**63), str(2**64)),
    *(str(-(2**31) - 1), str(-(2**63)), str(-(2**63) - 1), "3.0", "1e3", "100000"),
)
FILE_NAMES = (
    *(
        "a.wav",
        "",
        "a",
        ".",
        "..",
        "../../etc/passwd",
        "/etc/passwd",
        "C:\\con",
        "a\0.wav",
        "a.raw",
    ),
    *(
        "a" * 5000 + ".mp3",
        "\U0001f3a4.webm",
        'a\\"b.wav',
        "a;b.wav",
        "<|im_end|>.wav",
        "$(id).wav",
    ),
)


@dataclass(frozen=True)
class FormCase:
    route: str
    name: str
    headers: dict[str, str]
    body: bytes


def form_case(number: int) -> FormCase:
    """A form of a recording and fields, some of them wrong, in a multipart body that may be too."""
    rng = np.random.default_rng([2, number])
    return _form(rng, number, TRANSCRIPTIONS, _fields(rng), _file_part)


def alignment_case(number: int) -> FormCase:
    """The same for an aligner: of a recording and its text, or of samples and units."""
    rng = np.random.default_rng([5, number])

    def one_of(values: tuple[bytes, ...]) -> bytes:
        return values[int(rng.integers(len(values)))]

    if rng.random() < 0.3:
        given = [("units", one_of(UNITS if rng.random() < 0.7 else VALUES))]
        return _form(rng, number, f"{ALIGNMENTS}/times", given, _samples_part)
    given = [("text", one_of(TEXTS if rng.random() < 0.7 else VALUES)), *_fields(rng)]
    if rng.random() < 0.3:
        given.append(("language", one_of(LANGUAGES)))
    return _form(rng, number, ALIGNMENTS, given, _file_part)


TEXTS = tuple(
    text.encode()
    for text in (
        *(
            "The train leaves at nine.",
            "Der Zug fährt um neun.",
            "火车九点出发。",
            "電車は九時です。",
        ),
        *(
            "기차는 아홉 시에 떠납니다.",
            "...",
            " \n\t",
            "a\u0301\u200d b",
            "\U0001f3a4",
            "<timestamp>",
        ),
        *("<|im_end|><timestamp><timestamp>", "a " * 3_000, "字" * 3_000, "a" * 9_000, "は" * 500),
    )
)
UNITS = tuple(
    json.dumps(units).encode()
    for units in (
        *(["The", "train"], [], [""], ["a"] * 2_000, ["a" * 100_000], ["<timestamp>", "\ud800"]),
        *({}, "The", [1], [None], [["a"]], None, [True], ["\0"], ["<|audio_pad|>"] * 9),
    )
)
LANGUAGES = (b"en", b"German", b"zh", b"ja", b"ko", b"yue", b"pl", b"tlh", b"", b"en,de")


def _samples_part(rng: np.random.Generator) -> bytes:
    """Of the route that servers ask: float32, or what is none."""
    samples = tone(0.2, 16_000)
    samples[::7] = rng.choice([0, 1, np.nan, np.inf, -1e30, 1e-40])
    data = samples.tobytes()[: int(rng.choice([0, 1, 4, 3_999, 12_800]))]
    head = 'Content-Disposition: form-data; name="samples"'
    head += '; filename="a.f32"' if rng.random() < 0.9 else ""
    return f"{head}\r\n\r\n".encode() + data


def _form(
    rng: np.random.Generator,
    number: int,
    route: str,
    fields: list[tuple[str, bytes]],
    file_part: Callable[[np.random.Generator], bytes],
) -> FormCase:
    boundary = f"b{number:x}b"
    parts = [_part(rng, name, value) for name, value in fields]
    parts.insert(int(rng.integers(len(parts) + 1)), file_part(rng))
    if rng.random() < 0.05:
        parts *= int(rng.choice([2, 40, 600]))
    dashes = b"--" + boundary.encode()
    body = b"".join(dashes + b"\r\n" + part + b"\r\n" for part in parts) + dashes + b"--\r\n"
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    damage = ""
    beside = np.random.default_rng([7, number])  # does not renumber the other cases
    if beside.random() < 0.04:
        damage, headers, body = _crowded(beside, headers, body)
    elif rng.random() < 0.15:
        damage, headers, body = _broken_body(rng, headers, body)
    shown = [f"{name[:20]}={value[:20]!r}" for name, value in fields]
    return FormCase(route, " ".join([*shown, damage]).strip(), headers, body)


def _fields(rng: np.random.Generator) -> list[tuple[str, bytes]]:
    if rng.random() < 0.4:  # a number that is one, and still wrong
        return [
            (NUMBERS[i], EXTREME_NUMBERS[int(rng.integers(len(EXTREME_NUMBERS)))].encode())
            for i in rng.integers(0, len(NUMBERS), int(rng.integers(1, 3)))
        ]
    names = [FIELDS[i] for i in rng.integers(0, len(FIELDS), int(rng.integers(0, 5)))]
    suffixes = ["", "", "", "[]", "[0]", "[a][b]", "\\"]
    return [
        (name + suffixes[int(rng.integers(7))], VALUES[int(rng.integers(len(VALUES)))])
        for name in names
    ]


def _part(rng: np.random.Generator, name: str, value: bytes) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{name}"'
    if rng.random() < 0.1:  # a field that comes as a file
        disposition += '; filename="x"'
    charset = "\r\nContent-Type: text/plain; charset=bogus" if rng.random() < 0.05 else ""
    return f"{disposition}{charset}\r\n\r\n".encode() + value


def _file_part(rng: np.random.Generator) -> bytes:
    file_name = FILE_NAMES[int(rng.integers(len(FILE_NAMES)))]
    disposition = f'Content-Disposition: form-data; name="file"; filename="{file_name}"'
    if rng.random() < 0.05:
        disposition = 'Content-Disposition: form-data; name="file"'  # the recording as text
    elif rng.random() < 0.05:
        disposition += "; filename*=utf-8''%ff%00..%2f"
    data = audio_case(int(rng.integers(10**6)))[1] if rng.random() < 0.3 else short_wav()
    return f"{disposition}\r\nContent-Type: audio/wav\r\n\r\n".encode() + data


@cache
def short_wav() -> bytes:
    """A fifth of a second: a good recording that is transcribed at once."""
    return _written("WAV", "PCM_16", tone(0.2, 16_000), 16_000)


def _field(boundary: str, name: str, value: bytes) -> bytes:
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
    return head.encode() + value + b"\r\n"


@cache
def _bomb() -> bytes:
    """64 MiB in 64 KiB."""
    return gzip.compress(bytes(64 << 20))


def _broken_body(
    rng: np.random.Generator, headers: dict[str, str], body: bytes
) -> tuple[str, dict[str, str], bytes]:
    kind = headers["Content-Type"]
    boundary = kind.partition("boundary=")[2]
    broken = (
        ("cut off", {}, truncated(rng, body)),
        ("flipped", {}, flipped(rng, body)),
        ("shuffled", {}, shuffled(rng, body)),
        ("line feeds only", {}, body.replace(b"\r\n", b"\n")),
        ("no body", {}, b""),
        ("no boundary", {"Content-Type": "multipart/form-data"}, body),
        ("other boundary", {"Content-Type": "multipart/form-data; boundary=other"}, body),
        ("long boundary", {"Content-Type": kind + "x" * 300}, body),
        ("odd charset", {"Content-Type": kind + "; charset=no-such"}, body),
        (
            "slow charset",
            {"Content-Type": kind + "; charset=punycode"},
            _field(boundary, "x-" + "a" * 1_000_000, b"") + body,
        ),
        ("large field", {}, _field(boundary, "prompt", b"a" * 1_000_000) + body),
        (
            "many fields",
            {},
            b"".join(_field(boundary, f"x{n}", b"1") for n in range(300)) + body,
        ),
        ("gzip", {"Content-Encoding": "gzip"}, gzip.compress(body)),
        ("gzip bomb", {"Content-Encoding": "gzip"}, _bomb()),
        ("recording alone", {"Content-Type": "audio/wav"}, short_wav()),
        (
            "base64",
            {"Content-Type": "application/json"},
            json.dumps({"file": base64.b64encode(short_wav()).decode()}).encode(),
        ),
        (
            "urlencoded",
            {"Content-Type": "application/x-www-form-urlencoded"},
            b"file=%ff&model=a&" * 9,
        ),
        ("json", {"Content-Type": "application/json"}, b'{"file": "file:///etc/passwd"}'),
        ("no type", {"Content-Type": ""}, body),
        ("mixed", {"Content-Type": f"multipart/mixed; boundary={boundary}"}, body),
    )
    name, changed, body = broken[int(rng.integers(len(broken)))]
    return name, headers | changed, body


CHARSETS = (
    *("punycode", "idna", "utf-7", "utf-16", "hz", "rot13", "zip", "unicode_escape", "undefined"),
    *("raw_unicode_escape", "utf-8-sig", "latin-1", "x" * 5_000, "", "utf-8\\0", '"utf-8"'),
)


def _crowded(
    rng: np.random.Generator, headers: dict[str, str], body: bytes
) -> tuple[str, dict[str, str], bytes]:
    """More, larger or stranger fields than any client sends, before those of a form."""
    kind = headers["Content-Type"]
    dashes = b"--" + kind.partition("boundary=")[2].encode()
    charset = CHARSETS[int(rng.integers(len(CHARSETS)))]
    strange_name = b"x-" + b"\xc3\xa9" * int(rng.choice([9, 9_000, 400_000]))
    crowds = (
        (
            "many fields",
            kind,
            [(b"x%d" % i, b"1") for i in range(int(rng.choice([65, 1_001, 9_000])))],
        ),
        ("one name", kind, [(b"keywords[]", b"a")] * int(rng.choice([999, 20_000]))),
        ("large fields", kind, [(b"prompt", b"a" * (1 << 20))] * int(rng.choice([1, 8, 24]))),
        ("long name", kind, [(strange_name, b"1")]),
        ("charset", f"{kind}; charset={charset}", [(strange_name, b"\xff" * 9)]),
        (
            "charset of a part",
            kind,
            [
                (
                    b'p"\r\nContent-Type: text/plain; charset=' + charset.encode() + b'\r\nX: "',
                    b"\xc3",
                )
            ],
        ),
    )
    name, kind, fields = crowds[int(rng.integers(len(crowds)))]
    parts = (
        dashes
        + b'\r\nContent-Disposition: form-data; name="'
        + name
        + b'"\r\n\r\n'
        + value
        + b"\r\n"
        for name, value in fields
    )
    return name, headers | {"Content-Type": kind}, b"".join(parts) + body


def post(url: str, case: FormCase, *, timeout: float = HANG_S * 5) -> tuple[int, str, bytes]:
    """Status, content type and body."""
    address = urlsplit(url)
    assert address.hostname
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=timeout)
    try:
        connection.request("POST", case.route, case.body, case.headers)
        response = connection.getresponse()
        return response.status, response.headers.get("Content-Type", ""), response.read()
    finally:
        connection.close()


def ask(url: str, number: int, make: Callable[[int], FormCase] = form_case) -> Outcome:
    """One form to a server."""
    case, start = make(number), time.perf_counter()
    try:
        status, kind, body = post(url, case)
    except (OSError, http.client.HTTPException) as error:
        return Outcome(number, case.name, "none", f"no answer: {error!r}")
    broken = wrong(status, kind, body)
    answer = f"{status} {body[:300].decode(errors='replace')}"
    return Outcome(number, case.name, answer, broken, time.perf_counter() - start)


def wrong(status: int, kind: str, body: bytes) -> str:
    """Which law an answer breaks, or nothing."""
    if status >= 500:
        return f"status {status}"
    if status != 200:
        return "" if _is_error_object(body) else "a refusal that is not OpenAI's error object"
    if kind.startswith("application/json"):
        return "" if isinstance(json.loads(body), dict) else "no JSON object"
    if kind.startswith("text/event-stream"):
        return "" if body.endswith(b"data: [DONE]\n\n") else "a stream without an end"
    return "" if kind.startswith(("text/", "application/x-subrip")) else f"200 of type {kind}"


def _is_error_object(body: bytes) -> bool:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return False
    return {"message", "type", "param", "code"} <= set(error) and bool(error["message"])


def ask_aligner(url: str, number: int) -> Outcome:
    return ask(url, number, alignment_case)
