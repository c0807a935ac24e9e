# SPDX-License-Identifier: Apache-2.0
"""The transcription route on a fake engine, and a client of the one server."""

from __future__ import annotations

from dataclasses import replace

import openai
import pytest
from support.audio import HELLO, noise, wav
from support.checkpoints import CHECKPOINT
from support.clients import ROUTE
from support.fake_engine import ENGLISH, FakeEngine, protocol

from qwen3_asr_vllm.languages import LANGUAGES

SECOND = wav(noise(1.0))


@pytest.fixture
def serve():
    """Start the route on an engine; returns a function that posts a form to it."""
    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from qwen3_asr_vllm.server.plugin import EndpointPlugin
    from qwen3_asr_vllm.server.state import ServerState
    from qwen3_asr_vllm.server.transcriptions import Transcriber

    def start(engine, *, max_clip_s=60.0, languages=LANGUAGES):
        app = FastAPI()
        EndpointPlugin().attach_router(app)
        models = OpenAIServingModels(engine, [BaseModelPath("asr", "asr"), BaseModelPath("b", "b")])
        options = {"max_clip_s": max_clip_s, "protocol": replace(protocol(), languages=languages)}
        transcriber = Transcriber(engine, models, **options)
        app.state.qwen3_asr = ServerState(transcriber)
        client = TestClient(app, raise_server_exceptions=False)

        def post(file=SECOND, **fields):
            return client.post(ROUTE, files={"file": file} if file else {}, data=fields)

        post.client = client
        return post

    return start


@pytest.fixture
def post(serve):
    return serve(FakeEngine(f"{ENGLISH}Good morning."))


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client of the one server."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def hello(client):
    """The one server's answer for ``HELLO``, as JSON."""
    return client.audio.transcriptions.create(model=str(CHECKPOINT), file=HELLO)
