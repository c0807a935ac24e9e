# SPDX-License-Identifier: Apache-2.0
"""Metrics grow by the requests sent, in one API server and in several."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import urllib.request
from pathlib import Path

import openai
import pytest
import soundfile
import yaml
from prometheus_client import CollectorRegistry, multiprocess
from prometheus_client.parser import text_string_to_metric_families
from support.audio import DATA, noise
from support.checkpoints import CHECKPOINT
from support.clients import speak

from qwen3_asr_vllm.server.metrics import (
    AUDIO,
    CLIPS,
    DECODING,
    LOOPS,
    REAL_TIME_FACTOR,
    REALTIME_DELAY,
    REQUESTS,
    SESSIONS,
)

HELLO = DATA / "hello.flac"
API_SERVER = """
import time
from qwen3_asr_vllm.server.metrics import (
    SESSIONS, count_transcript, count_utterance, observe_decoding
)
from qwen3_asr_vllm.transcript import Transcript
observe_decoding(0.02, "asr")
made = Transcript("Hi.", duration=36_000.0, loops=1)  # ten hours, so that seconds do not matter
ended = dict(num_clips=3, model="asr", request_id="a", started=time.perf_counter() - 1_440)
count_transcript(made, **ended)
count_utterance(3.0, delay_s=0.6, model="asr", item_id="b")
SESSIONS.labels("asr").inc()
"""


def test_several_api_servers_add_up(tmp_path):
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    for _ in range(2):
        subprocess.run([sys.executable, "-c", API_SERVER], env=env, check=True)
    registry = CollectorRegistry()
    multiprocess.MultiProcessCollector(registry, str(tmp_path))

    def value(name, **labels):
        return registry.get_sample_value(f"qwen3_asr_{name}", {"model_name": "asr", **labels})

    assert value("audio_seconds_total") == 72_006
    assert (value("clips_total"), value("loops_total")) == (6, 2)
    assert value("audio_decode_seconds_sum") == pytest.approx(0.04)
    assert value("real_time_factor_bucket", le="0.02") == 0
    assert value("real_time_factor_bucket", le="0.05") == 2
    assert (value("realtime_delay_seconds_sum"), value("realtime_sessions")) == (1.2, 2)


def read(server):
    """Every sample at /metrics: its name and the labels that matter, its value."""
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    return {
        (sample.name, sample.labels.get("status")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("qwen3_asr_") and "le" not in sample.labels
    }


@pytest.mark.vllm
def test_metrics_grow_with_requests(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    ask = client.audio.transcriptions.create
    ask(model=str(CHECKPOINT), file=HELLO)
    before = read(server)
    ask(model=str(CHECKPOINT), file=HELLO)
    list(ask(model=str(CHECKPOINT), file=HELLO, stream=True))
    for _ in range(3):
        with pytest.raises(openai.BadRequestError):
            ask(model=str(CHECKPOINT), file=("notes.wav", b"words" * 99))
    after = read(server)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown.pop(("qwen3_asr_audio_decode_seconds_sum", None)) > 0
    assert grown.pop(("qwen3_asr_real_time_factor_sum", None)) > 0
    duration = soundfile.info(HELLO).duration
    assert grown.pop(("qwen3_asr_audio_seconds_total", None)) == pytest.approx(2 * duration)
    assert {key: growth for key, growth in grown.items() if growth and "created" not in key[0]} == {
        ("qwen3_asr_requests_total", "200"): 2,
        ("qwen3_asr_requests_total", "400"): 3,
        ("qwen3_asr_clips_total", None): 2,
        ("qwen3_asr_audio_decode_seconds_count", None): 2,
        ("qwen3_asr_real_time_factor_count", None): 2,
    }


@pytest.mark.vllm
def test_utterances_are_counted_not_ended_sessions(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    speak(client, noise(0.5))
    before = read(server)
    speak(client, noise(0.5))
    after = read(server)
    for name, growth in {"audio_seconds_total": 0.5, "realtime_delay_seconds_count": 1}.items():
        key = (f"qwen3_asr_{name}", None)
        assert after[key] - before[key] == pytest.approx(growth)
    assert after["qwen3_asr_realtime_delay_seconds_sum", None] > 0


NAME = re.compile(r"\b(?:vllm:|qwen3_asr_)\w+")
DOCKER = Path(__file__).parents[2] / "docker"


def alerts():
    (group,) = yaml.safe_load((DOCKER / "alerts.yaml").read_text())["groups"]
    return group["rules"]


def panels():
    return json.loads((DOCKER / "grafana.json").read_text())["panels"]


@pytest.mark.vllm
def test_dashboard_and_alerts_use_existing_metrics(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    client.audio.transcriptions.create(model=str(CHECKPOINT), file=HELLO)
    speak(client, noise(0.5))
    text = urllib.request.urlopen(f"{server.url}/metrics").read().decode()
    has = {name for line in text.splitlines() for name in NAME.findall(line.split(" ")[0])}
    shown = [target["expr"] for panel in panels() for target in panel["targets"]]
    for expression in (*shown, *(rule["expr"] for rule in alerts())):
        assert (asked := set(NAME.findall(expression))) and asked <= has, expression


def test_dashboard_and_alerts_are_whole():
    assert {rule["labels"]["severity"] for rule in alerts()} <= {"page", "warning", "info"}
    assert all(rule["annotations"]["summary"] and rule["for"] for rule in alerts())
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids) and all(panel["description"] for panel in panels())
    readme = (DOCKER.parent / "qwen3_asr_vllm" / "server" / "README.md").read_text()
    recordings = (REQUESTS, AUDIO, CLIPS, LOOPS, DECODING, REAL_TIME_FACTOR)
    for metric in (*recordings, SESSIONS, REALTIME_DELAY):
        (family,) = metric.describe()
        shown = json.dumps(panels())
        assert family.name in shown and f"`{family.name}" in readme, family.name
