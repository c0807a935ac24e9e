# SPDX-License-Identifier: Apache-2.0
"""``--engines-per-gpu``: what it makes of vLLM's options, without an engine."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import vllm.platforms
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser

from qwen3_asr_vllm.engine import NUM_GPUS, SHARED_GPU_WORKER
from qwen3_asr_vllm.server.engines import UNSUITED, add_engines_option, share_gpus


@pytest.fixture(scope="module")
def parser():
    """The parser of ``vllm serve``, with the option."""
    commands = FlexibleArgumentParser(prog="qwen3-asr").add_subparsers()
    made = ServeSubcommand().subparser_init(commands)
    add_engines_option(made)
    return made


@pytest.fixture
def cuda(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))
    platform = SimpleNamespace(is_cuda_alike=lambda: True)
    monkeypatch.setattr(vllm.platforms, "current_platform", platform)


def shared(parser, line):
    args = parser.parse_args(["asr", *line.split()])
    share_gpus(args, parser)
    return args


def test_one_engine_changes_nothing(parser):
    line = "--tensor-parallel-size 2 --gpu-memory-utilization 0.5"
    assert shared(parser, line) == parser.parse_args(["asr", *line.split()])


def test_two_engines_share_a_gpu(parser, cuda):
    args = shared(parser, "--engines-per-gpu 2 --gpu-memory-utilization 0.8")
    assert (args.data_parallel_size, args.gpu_memory_utilization) == (2, 0.4)
    assert (args.worker_cls, os.environ[NUM_GPUS]) == (SHARED_GPU_WORKER, "1")
    assert args.distributed_executor_backend == "uni"
    assert args.api_server_count is None


def test_each_of_several_gpus_is_shared(parser, cuda):
    args = shared(parser, "--engines_per_gpu=2 -dp 4 --kv-cache-memory-bytes 8G")
    assert (args.data_parallel_size, os.environ[NUM_GPUS]) == (8, "4")
    assert args.kv_cache_memory_bytes == 4 << 30


def test_a_cpu_keeps_its_worker(parser):
    args = shared(parser, "--engines-per-gpu 3 --distributed-executor-backend mp")
    assert (args.data_parallel_size, args.api_server_count, args.worker_cls) == (3, 1, "auto")
    assert args.distributed_executor_backend == "mp"
    assert shared(parser, "--engines-per-gpu 2 --api-server-count 2").api_server_count == 2


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("-tp 2", ["--tensor-parallel-size"]),
        ("--pipeline-parallel-size=2 --headless", ["--pipeline-parallel-size", "--headless"]),
        ("--data-parallel-rank 0", ["--data-parallel-rank"]),
        ("-dpl 1 -dpa 10.0.0.1", ["--data-parallel-size-local", "--data-parallel-address"]),
        ("--data-parallel-backend ray", ["--data-parallel-backend"]),
        ("--distributed-executor-backend ray", ["--distributed-executor-backend"]),
        ("--worker-cls my.Worker", ["--worker-cls"]),
    ],
)
def test_other_placements_are_refused(parser, capsys, line, named):
    with pytest.raises(SystemExit, match="2"):
        shared(parser, f"--engines-per-gpu 2 {line}")
    error = capsys.readouterr().err
    assert all(option in error for option in named) and "--engines-per-gpu 2" in error


@pytest.mark.parametrize("number", ["0", "-1", "many"])
def test_a_wrong_number_is_refused(parser, capsys, number):
    with pytest.raises(SystemExit, match="2"):
        shared(parser, f"--engines-per-gpu {number}")
    assert "--engines-per-gpu" in capsys.readouterr().err


def test_vllm_has_the_refused_options(parser):
    assert set(UNSUITED) <= vars(parser.parse_args(["asr"])).keys()
