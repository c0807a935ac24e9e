# SPDX-License-Identifier: Apache-2.0
"""How many API servers a server has, what each may hold, and how they stop."""

from __future__ import annotations

import asyncio
import os
import socket
from argparse import Namespace
from types import SimpleNamespace

import pytest
from fastapi import FastAPI
from support.fake_engine import FakeEngine
from support.slow_to_end import answer_and_end

from qwen3_asr_vllm.cli.vllm_serve import parse
from qwen3_asr_vllm.prompt import PUBLISHED
from qwen3_asr_vllm.server import api_servers, serving
from qwen3_asr_vllm.server.api_servers import available_cores, count_for, set_api_server_count
from qwen3_asr_vllm.server.serving import shared_admission

pytestmark = pytest.mark.vllm


@pytest.fixture
def cuda(monkeypatch):
    """vLLM's platform claims to be CUDA, on 16 cores."""
    from vllm.platforms import current_platform

    monkeypatch.setattr(current_platform, "is_cuda", lambda: True)
    monkeypatch.setattr(current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(api_servers, "available_cores", lambda: 16)


@pytest.fixture(scope="module")
def defaults():
    """The options of a command line without any, as vLLM parses them."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    return vars(make_arg_parser(FlexibleArgumentParser()).parse_args([]))


@pytest.mark.parametrize(
    ("cores", "count"), [(0.5, 1), (1, 1), (3, 1), (7.9, 1), (8, 2), (16, 4), (32, 8), (192, 8)]
)
def test_four_cores_have_one_api_server(cores, count):
    assert count_for(cores) == count


@pytest.mark.parametrize(
    ("given", "count"),
    [
        ({}, 4),
        ({"api_server_count": 1}, 1),
        ({"api_server_count": 12}, 12),
        ({"data_parallel_size": 2}, 4),
        ({"data_parallel_size": 6}, 6),
        ({"data_parallel_rank": 0}, None),
        ({"data_parallel_start_rank": 1}, None),
        ({"headless": True}, None),
        ({"data_parallel_external_lb": True}, None),
        ({"data_parallel_hybrid_lb": True}, None),
        ({"data_parallel_multi_port_external_lb": True}, None),
        ({"enable_elastic_ep": True}, None),
        ({"enable_fault_tolerance": True}, None),
        ({"grpc": True}, None),
    ],
)
def test_a_gpu_has_several_api_servers(cuda, defaults, given, count):
    """None leaves the choice to vLLM, which takes only some numbers there."""
    assert given.keys() <= defaults.keys()
    args = Namespace(**defaults | given)
    set_api_server_count(args)
    assert args.api_server_count == count


def test_loading_adapters_needs_one_api_server(cuda, defaults, monkeypatch):
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    args = Namespace(**defaults)
    set_api_server_count(args)
    assert args.api_server_count is None


def test_a_cpu_has_one_api_server(defaults):
    args = Namespace(**defaults)
    set_api_server_count(args)
    assert args.api_server_count is None


def test_gpu_command_lines_are_completed(cuda):
    _, args = parse(["some/model", "--max-num-batched-tokens", "2k"])
    assert args.api_server_count == 4
    assert args.mm_processor_cache_gb == 0.25  # of 1 GiB, in each of four processes
    assert args.compilation_config == {"cudagraph_mm_encoder": True}
    assert args.cudagraph_capture_sizes[-9:] == [512, 640, 768, 896, 1024, 1280, 1536, 1792, 2000]


def test_the_command_line_of_a_user_stays(cuda):
    options = "--api-server-count 1 --mm-processor-cache-gb 3 -cc.cudagraph_mode=PIECEWISE"
    _, args = parse(["some/model", *options.split()])
    assert (args.api_server_count, args.mm_processor_cache_gb) == (1, 3)
    assert args.cudagraph_capture_sizes is None and not args.compilation_config.cudagraph_mm_encoder


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu.max": "1600000 100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
    ],
)
def test_cores_are_those_of_the_container(monkeypatch, tmp_path, files, cores):
    (tmp_path / "cpu").mkdir()
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(api_servers, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert available_cores() == cores


def test_api_servers_share_the_limits(monkeypatch):
    assert vars_of(shared_admission(1)) == (1024, 57_600, 8192)
    assert vars_of(shared_admission(4)) == (256, 14_400, 2048)
    monkeypatch.setenv("QWEN3_ASR_MAX_RECORDINGS", "10")
    assert shared_admission(4).max_recordings == 3


def test_a_share_has_room_for_one_recording(monkeypatch):
    assert vars_of(shared_admission(64)) == (16, 14_400, 1024)
    monkeypatch.setenv("QWEN3_ASR_MAX_RECORDINGS", "2")
    monkeypatch.setenv("QWEN3_ASR_MAX_AUDIO_S", "600")
    monkeypatch.setenv("QWEN3_ASR_MAX_UPLOADS_MB", "100")
    assert vars_of(shared_admission(64)) == (1, 600, 100)


def vars_of(admission):
    return admission.max_recordings, admission.max_audio_s, admission.max_bytes >> 20


@pytest.mark.parametrize(("count", "recordings", "threads"), [(None, 1024, 20), (4, 256, 5)])
def test_routes_hold_their_api_servers_share(monkeypatch, count, recordings, threads):
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels

    from qwen3_asr_vllm.server import plugin

    monkeypatch.setattr(plugin, "Realtime", lambda *_, **options: None)
    monkeypatch.setattr(plugin, "load_protocol", lambda *_: PUBLISHED)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    engine = FakeEngine("")
    engine.model_config.hf_config = SimpleNamespace(model_type="qwen3_asr", is_aligner=False)
    engine.model_config.architectures = []
    engine.vllm_config.parallel_config = SimpleNamespace(data_parallel_size=1)
    state = SimpleNamespace(
        openai_serving_models=OpenAIServingModels(engine, [BaseModelPath("asr", "asr")]),
        openai_serving_transcription=SimpleNamespace(
            asr_config=SimpleNamespace(max_audio_clip_s=30)
        ),
    )

    async def start():
        (made := plugin.EndpointPlugin()).attach_router(FastAPI())
        args = Namespace(
            api_key=None, allowed_origins=["*"], api_server_count=count, chat_template=None
        )
        await made.init_state(engine, state, args)
        state.qwen3_asr.watch.cancel()

    asyncio.run(start())
    transcriber = state.qwen3_asr.transcriber
    assert transcriber.admission.max_recordings == recordings
    assert transcriber.pool._max_workers == threads


def test_api_servers_answer_before_they_end(monkeypatch):
    from multiprocessing import Pipe

    from vllm.entrypoints.cli import serve

    monkeypatch.setattr(serve, "APIServerProcessManager", serve.APIServerProcessManager)
    monkeypatch.setattr(serving, "CLOSE_S", 60)
    api_servers.wait_for_api_servers()
    listeners = [SimpleNamespace(address="", socket=None, close=bool, cleanup=bool)] * 2
    ours, theirs = Pipe()
    with socket.socket() as sock:
        manager = serve.APIServerProcessManager(
            "", sock, theirs, 2, listeners, listeners, target_server_fn=answer_and_end
        )
        assert [ours.recv(), ours.recv()] == ["ready", "ready"]
        manager.shutdown(timeout=0)
    assert [process.exitcode for process in manager.processes] == [0, 0]
