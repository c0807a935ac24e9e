# SPDX-License-Identifier: Apache-2.0
"""Languages that a checkpoint declares, by each route: with a fake engine, then with the real one.

The tiny checkpoint learned no Hebrew: these tests show that requests, prompts and responses follow
the table, not that the text is right.
"""

from __future__ import annotations

import base64
import urllib.request
from json import loads

import numpy as np
import pytest
import soundfile
from support.audio import HELLO
from support.checkpoints import CHECKPOINT
from support.clients import error, events
from support.fake_engine import FakeEngine

from qwen3_asr_vllm.languages import LANGUAGES, checkpoint_languages

KNOWN = checkpoint_languages(["Haitian Creole"], "he=Hebrew,lo=Lao,zz=Elbonian")
SPELLINGS = ["he", "heb", "Hebrew", "he-IL", "עברית"]


@pytest.mark.parametrize("language", SPELLINGS)
@pytest.mark.parametrize("field", ["language", "languages[]"])
def test_a_declared_language_is_forced(serve, field, language):
    engine = FakeEngine("שלום.")
    response = serve(engine, languages=KNOWN)(**{field: language})
    assert response.json()["languages"] == [{"code": "he"}]
    assert engine.asked[0][0]["prompt"].endswith("assistant\nlanguage Hebrew<asr_text>")


@pytest.mark.parametrize(
    ("name", "code"), [("Haitian Creole", "ht"), ("Hebrew", "he"), ("Elbonian", "zz")]
)
@pytest.mark.parametrize("tag", ["<asr_text>", "\n"])
def test_a_declared_language_is_detected(serve, name, code, tag):
    """The code is that of the declaration; a header of several words is no text."""
    post = serve(FakeEngine(f"language {name}{tag}Bonjou."), languages=KNOWN)
    document = post().json()
    assert (document["text"], document["languages"]) == ("Bonjou.", [{"code": code}])
    assert post(response_format="verbose_json").json()["language"] == name.lower()
    *deltas, _, done = events(post(stream=True))
    assert "".join(delta["delta"] for delta in deltas) == done["text"] == "Bonjou."
    assert done["languages"] == [{"code": code}]


def test_a_repeated_header_is_no_text(serve):
    raw = "language Haitian Creole<asr_text>Bonjou.language Haitian Creole<asr_text>Mèsi."
    assert serve(FakeEngine(raw), languages=KNOWN)().json()["text"] == "Bonjou. Mèsi."


def test_candidates_may_be_declared_languages(serve):
    engine = FakeEngine("language English<asr_text>Shalom.", "שלום.")
    response = serve(engine, languages=KNOWN)(languages="he,ht")
    assert response.json()["text"] == "שלום."
    assert "language H" in engine.asked[1][0]["prompt"]


@pytest.mark.parametrize("field", ["language", "languages"])
def test_an_undeclared_language_is_refused_with_advice(serve, field):
    body = error(serve(FakeEngine("Hi."), languages=KNOWN)(**{field: "sw"}), 400)
    assert body["param"] == field
    for part in ("'sw'", "QWEN3_ASR_LANGUAGES=sw=Swahili", "he Hebrew", "zh Chinese"):
        assert part in body["message"]


def test_a_session_may_name_declared_languages():
    from qwen3_asr_vllm.server.session_config import Config, EventError

    def update(**transcription):
        changes = {"audio": {"input": {"transcription": transcription}}}
        return Config().updated(changes, KNOWN).stream_options

    assert update(language="he-IL")["language"] == "he-IL"
    assert update(languages=["heb", "ht"])["languages"] == ["heb", "ht"]
    for changes in ({"language": "sw"}, {"languages": ["he", "sw"]}):
        with pytest.raises(EventError, match="QWEN3_ASR_LANGUAGES=sw=Swahili"):
            update(**changes)
    with pytest.raises(EventError, match="transcription"):
        update(language="he", languages=["ht", "he"])


# ---- the real engine ----


@pytest.mark.vllm
@pytest.mark.parametrize("language", SPELLINGS)
def test_the_server_forces_a_declared_language(client, language):
    made = client.audio.transcriptions.create(
        model=str(CHECKPOINT), file=HELLO, language=language, response_format="verbose_json"
    )
    assert made.language == "hebrew"
    assert {segment.language for segment in made.segments} == {"Hebrew"}


@pytest.mark.vllm
def test_the_server_lists_a_declared_language(server):
    about = loads(urllib.request.urlopen(f"{server.url}/about").read())
    assert about["languages"] == {**LANGUAGES, "he": "Hebrew"}


@pytest.mark.vllm
def test_a_session_forces_a_declared_language(client):
    samples, _ = soundfile.read(HELLO, dtype="int16")
    transcription = {"language": "he-IL"}
    wanted = {"format": {"type": "audio/pcm", "rate": 16_000}, "turn_detection": None}
    with client.realtime.connect(extra_query={"intent": "transcription"}) as connection:
        audio = {"input": wanted | {"transcription": transcription}}
        connection.session.update(session={"type": "transcription", "audio": audio})
        speech = base64.b64encode(np.ascontiguousarray(samples, "<i2").tobytes()).decode()
        connection.input_audio_buffer.append(audio=speech)
        connection.input_audio_buffer.commit()
        for event in connection:
            assert event.type != "error", event
            if event.type.endswith("transcription.completed"):
                assert [language.code for language in event.languages] == ["he"]
                return
