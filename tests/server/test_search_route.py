# SPDX-License-Identifier: Apache-2.0
"""Beam search on the route: with an engine that scores a text, and on the one server."""

from __future__ import annotations

import pytest
from support.audio import HELLO
from support.checkpoints import CHECKPOINT
from support.clients import error, events
from support.fake_engine import ENGLISH, PROMPT, ScoringEngine

pytestmark = pytest.mark.vllm

SEARCH = {"use_beam_search": True, "n": 4, "length_penalty": 0.7}


def searching(serve, text=f"{ENGLISH}Good morning.", **generation_config):
    engine = ScoringEngine(text, **generation_config)
    return engine, serve(engine)


def test_a_search_answers_with_its_best_text(serve):
    engine, post = searching(serve)
    response = post(**SEARCH, **{"include[]": "logprobs", "response_format": "verbose_json"})
    body = response.json()
    assert (body["text"], body["language"]) == ("Good morning.", "english")
    assert "".join(token["token"] for token in body["logprobs"]) == "Good morning."
    assert body["segments"][0]["avg_logprob"] == -0.01
    assert 0 < body["segments"][0]["no_speech_prob"] < 0.01
    prompts = [prompt for prompt, _, _ in engine.asked]
    assert {prompt["mm_hashes"]["audio"][0] for prompt in prompts} == {"clip"}
    assert len(prompts) < 2 * len(engine.written)


def test_a_streamed_search_comes_whole_with_a_warning(serve):
    _, post = searching(serve)
    *deltas, last, done = events(post(stream=True, **SEARCH))
    assert [event["delta"] for event in (*deltas, last)] == ["Good morning.", ""]
    assert done["text"] == "Good morning." and "beam search" in done["warnings"][0]
    assert done["usage"]["input_tokens"] == len(PROMPT)


@pytest.mark.parametrize(
    ("fields", "is_search"),
    [({}, True), ({"use_beam_search": "false"}, False), ({"temperature": "0.7"}, False)],
)
def test_the_checkpoint_may_search_by_default(serve, fields, is_search):
    engine, post = searching(serve, num_beams=3)
    assert post(**fields).status_code == 200
    assert (engine.asked[0][1].logprobs == 3 + 2) == is_search


def test_a_looping_search_is_decoded_again(serve):
    engine, post = searching(serve, f"{ENGLISH}{'ha ' * 60}")
    body = post(**SEARCH).json()
    assert body["text"] == "ha ha ha ha" and "repetition loop" in body["warnings"][0]
    assert engine.asked[-1][1].repetition_penalty > 1


def test_a_searched_candidate_is_forced(serve):
    engine, post = searching(serve, f"{ENGLISH}Good morning.")
    body = post(**SEARCH, **{"languages[]": ["de", "zh"]}).json()
    assert body["language"] in ("de", "zh")


def test_an_engine_that_fails_fails_the_search(serve):
    class Failing(ScoringEngine):
        async def generate(self, *args, **options):
            async for output in super().generate(*args, **options):
                output.outputs[0].finish_reason = "abort" if len(self.asked) > 2 else "stop"
                yield output

    assert error(serve(Failing(f"{ENGLISH}Good morning."))(**SEARCH), 503)["code"] == "stopping"


# --- on the one server ----


@pytest.fixture(scope="module")
def search(client):
    """Transcribe ``HELLO`` with a beam search."""

    def create(**fields):
        return client.audio.transcriptions.create(
            model=str(CHECKPOINT), file=HELLO, extra_body=SEARCH, **fields
        )

    return create


def test_a_search_has_segments_and_logprobs(search, hello):
    body = search(response_format="verbose_json", include=["logprobs"])
    assert body.text == hello.text
    assert all(segment.avg_logprob < 0 < 1 - segment.no_speech_prob for segment in body.segments)
    assert "".join(token["token"] for token in body.logprobs) == body.text


def test_a_streamed_search_comes_whole(search, hello):
    *deltas, done = search(stream=True)
    assert [event.delta for event in deltas if event.delta] == [hello.text]
    assert done.text == hello.text and "beam search" in done.warnings[0]
