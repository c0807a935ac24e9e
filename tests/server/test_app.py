# SPDX-License-Identifier: Apache-2.0
"""The plugin in vLLM's own app: its config, renderer, middleware and handlers; a fake engine."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace

import pytest
from support.audio import noise, wav
from support.checkpoints import CHECKPOINT
from support.clients import ROUTE, error
from support.fake_engine import FakeEngine

from qwen3_asr_vllm.languages import LANGUAGES

SECOND = wav(noise(1.0))


@pytest.fixture(scope="module")
def app():
    """The app of ``vllm serve`` with aliases and a key; its engine answers "Hi."."""
    from fastapi.testclient import TestClient
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.renderers import renderer_from_config
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = f"--model {CHECKPOINT} --served-model-name asr whisper-1 --api-key secret"
    args = make_arg_parser(FlexibleArgumentParser()).parse_args(options.split())
    engine = FakeEngine("language English<asr_text>Hi.")
    engine.vllm_config = AsyncEngineArgs.from_cli_args(args).create_engine_config()
    engine.model_config = engine.vllm_config.model_config
    engine.renderer = renderer_from_config(engine.vllm_config)
    tasks = ("generate", "transcription")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_PLUGINS", "qwen3_asr")
        app = build_app(args, tasks)
    asyncio.run(init_app_state(engine, app.state, args, tasks))
    client = TestClient(app, headers={"Authorization": "Bearer secret"})
    return SimpleNamespace(engine=engine, client=client)


def ask(app, file=SECOND, **fields):
    return app.client.post(ROUTE, files={"file": file}, data=fields)


def test_vllm_uses_our_routes_and_renders_prompts(app):
    assert ask(app, model="asr", prompt="Ada").json()["languages"] == [{"code": "en"}]
    prompt, params, _ = app.engine.asked[-1]
    audio = app.engine.model_config.hf_config.thinker_config.audio_token_id
    assert prompt["prompt_token_ids"].count(audio) == 13
    assert params.temperature == 0


@pytest.mark.parametrize("model", ["asr", "whisper-1", ""])
def test_aliases_are_served(app, model):
    assert ask(app, model=model).json()["text"] == "Hi."


def test_foreign_origins_open_no_session(app):
    assert not app.client.app.state.qwen3_asr.realtime.allows("https://evil.test", "localhost")


def without_key(app, method, path, **options):
    headers = {"Authorization": "Bearer no"} | options.pop("headers", {})
    return app.client.request(method, path, headers=headers, **options)


OPEN = {"/", "/about", "/health", "/ping", "/metrics"}


def paths(app):
    """Every path of the server, with something in the place of its parameters."""
    for route in app.client.app.routes:
        for method in sorted(getattr(route, "methods", None) or ["GET"]):
            yield method, re.sub(r"{.*?}", "x", route.path)


def test_all_but_a_few_routes_need_keys(app):
    closed = [(method, path) for method, path in paths(app) if path not in OPEN]
    wanted = "/pooling /tokenize /detokenize /scale_elastic_ep /invocations /docs /openapi.json"
    others = [("POST", path) for path in wanted.split()] + [
        ("GET", "/nothing"),
        ("GET", "/about/x"),
    ]
    assert len(closed) > 20
    for method, path in [*closed, *others, ("POST", ROUTE), ("GET", "/v1/models")]:
        response = without_key(app, method, path)
        assert response.status_code == 401, (method, path)
        if method != "HEAD":
            assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("path", sorted(OPEN - {"/health", "/ping"}))  # they ask the engine
def test_health_metrics_and_page_need_no_key(app, path):
    assert without_key(app, "GET", path).status_code == 200


def test_a_preflight_request_needs_no_key(app):
    asked = {"Origin": "https://a.test", "Access-Control-Request-Method": "POST"}
    assert without_key(app, "OPTIONS", ROUTE, headers=asked).status_code != 401


@pytest.mark.parametrize(
    ("key", "protocols", "is_known"),
    [
        ("secret", [], True),
        ("no", ["realtime", "openai-insecure-api-key.secret"], True),
        ("no", ["realtime", "openai-insecure-api-key.no"], False),
        ("no", ["openai-insecure-api-key."], False),
        ("no", ["secret"], False),
    ],
)
def test_sessions_accept_the_keys_of_browsers(app, key, protocols, is_known):
    from starlette.testclient import WebSocketDenialResponse

    headers = {"Authorization": f"Bearer {key}"}
    try:
        with app.client.websocket_connect("/v1/realtime", protocols, headers=headers) as session:
            assert session.receive_json()["type"] == "session.created" and is_known
    except WebSocketDenialResponse as refused:
        assert error(refused, 401)["code"] == "invalid_api_key" and not is_known


def test_subprotocol_keys_open_only_sessions(app):
    headers = {"Sec-WebSocket-Protocol": "openai-insecure-api-key.secret"}
    assert without_key(app, "GET", "/v1/models", headers=headers).status_code == 401


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/about/", 404, "unknown_url"),
        ("GET", "/v1/audio/transcriptions/", 404, "unknown_url"),
        ("GET", ROUTE, 405, "method_not_supported"),
        ("DELETE", "/v1/chat/completions", 405, "method_not_supported"),
        ("GET", "/v1/models/whisper-9", 404, "model_not_found"),
        ("GET", "/v1/models/", 404, "model_not_found"),
        ("GET", "/v1/models/a%1B%5B2J%E2%80%AE", 404, "model_not_found"),
    ],
)
def test_unknown_urls_get_openais_error(app, method, path, status, code):
    response = app.client.request(method, path, follow_redirects=False)
    body = error(response, status)
    assert body["code"] == code and body["type"] == "invalid_request_error"
    assert ("Allow" in response.headers) == (status == 405)
    assert body["message"].isprintable()


def test_redirects_ignore_the_host_header(app):
    for _, path in paths(app):
        headers = {"Host": "evil.test"}
        response = app.client.get(f"{path}/", headers=headers, follow_redirects=False)
        assert "Location" not in response.headers, path


@pytest.mark.parametrize("name", ["asr", "whisper-1"])
def test_a_model_is_described(app, name):
    listed = {card["id"]: card for card in app.client.get("/v1/models").json()["data"]}
    card = app.client.get(f"/v1/models/{name}").json()
    assert card["id"] == name and card["object"] == "model"
    assert set(card) == set(listed[name])


@pytest.mark.parametrize("path", ["/v1/models/Qwen/ASR-1.7B", "/v1/models/Qwen%2FASR-1.7B"])
def test_model_names_may_contain_slashes(app, path):
    models = app.client.app.state.openai_serving_models.base_model_paths
    models.append(SimpleNamespace(name="Qwen/ASR-1.7B", model_path="x"))
    try:
        assert app.client.get(path).json()["id"] == "Qwen/ASR-1.7B"
    finally:
        models.pop()


@pytest.mark.parametrize(
    ("given", "echoed"),
    [
        ("req-1", "req-1"),
        ("a\x1b[31m b", "a?[31m?b"),
        ("x" * 5000, "x" * 128),
        ("", None),
        (None, None),
    ],
)
@pytest.mark.parametrize("path", ["/about", "/v1/nothing", "/v1/chat/completions"])
def test_responses_carry_their_request_id(app, path, given, echoed):
    headers = {} if given is None else {"X-Request-Id": given}
    for key in ("secret", "no"):
        answered = app.client.get(path, headers=headers | {"Authorization": f"Bearer {key}"})
        (shown,) = answered.headers.get_list("X-Request-Id")
        assert shown == echoed if echoed else re.fullmatch("[0-9a-f]{32}", shown)


def test_server_errors_carry_a_request_id(app, monkeypatch):
    async def fail():
        raise KeyError("\x1b[2Jsecret")

    models = app.client.app.state.openai_serving_models
    monkeypatch.setattr(models, "show_available_models", fail)
    monkeypatch.setattr(app.client._transport, "raise_server_exceptions", False)
    response = app.client.get("/v1/models", headers={"X-Request-Id": "req-1"})
    assert response.headers["X-Request-Id"] == "req-1"
    error(response, 500)


@pytest.mark.parametrize(
    ("name", "value", "limit"),
    [
        ("X-Vllm-Priority", str(2**70), "-9223372036854775808 to 9223372036854775807"),
        ("X-Vllm-Priority", "9" * 5000, "-9223372036854775808"),
        ("X-Vllm-Priority", "high", "whole number"),
        ("X-Vllm-Priority", "", "whole number"),
        ("X-data-parallel-rank", "1", "0 to 0"),
        ("X-data-parallel-rank", "-1", "0 to 0"),
        ("X-data-parallel-rank", "nonsense", "whole number"),
    ],
)
@pytest.mark.parametrize("path", [ROUTE, "/v1/chat/completions", "/invocations"])
def test_headers_out_of_range_are_refused(app, path, name, value, limit):
    body = error(app.client.post(path, headers={name: value}), 400)
    assert body["param"] == name and name in body["message"] and limit in body["message"]
    assert len(body["message"]) < 400


def test_headers_of_vllm_are_taken(app):
    headers = {"X-Vllm-Priority": " -7", "X-data-parallel-rank": "0"}
    response = app.client.post(ROUTE, files={"file": SECOND}, headers=headers)
    assert response.status_code == 200 and app.engine.asked[-1][2]["priority"] == -7


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("file:///etc/passwd", "local_file"),
        ("http://127.0.0.1:9/a.wav", "unreachable_url"),
    ],
)
def test_unreadable_media_is_a_bad_request(app, url, code):
    part = {"type": "audio_url", "audio_url": {"url": url}}
    chat = {"model": "asr", "messages": [{"role": "user", "content": [part]}]}
    body = error(app.client.post("/v1/chat/completions", json=chat), 400)
    assert body["code"] == code and body["type"] == "invalid_request_error"


def test_about_reveals_no_secret(app):
    response = app.client.get("/about")
    about = response.json()
    assert about["models"] == ["asr", "whisper-1"] and about["needs_key"]
    assert about["languages"] == LANGUAGES
    assert about["max_upload_mb"] == 1024 and about["max_duration_s"] == 14_400
    assert "secret" not in response.text


def test_the_page_runs_only_its_script(app):
    headers = app.client.get("/").headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'" and "unsafe" not in str(policy)
    assert policy["script-src"].startswith("'sha256-")
    assert headers["x-content-type-options"] == "nosniff"


def test_vllms_errors_look_like_ours(app):
    for response, status, param in (
        (ask(app, model="asr-2"), 404, "model"),
        (ask(app, top_p="7"), 400, "top_p"),
        (ask(app, ("a.wav", b"words" * 99)), 400, "file"),
        (ask(app, stream="true", language="tlh"), 400, "language"),
    ):
        assert error(response, status)["param"] == param
