# SPDX-License-Identifier: Apache-2.0
"""API servers: the HTTP processes before one engine, ``--api-server-count``.

    a port -- the one with the fewest connections accepts --> API server 0 ... n - 1 --> engine

A process answers about 60 requests/s: each costs it 14 ms of Python. Every process has an equal
share of the settings that limit the load (``serving.py``), of the decoding threads, and of the
cache of audio.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

CORES_PER_SERVER = 4
MAX_SERVERS = 8
CGROUP = Path("/sys/fs/cgroup")
# Options with which vLLM chooses the number itself, or takes only one.
DECIDING = (
    "headless",
    "grpc",
    "data_parallel_external_lb",
    "data_parallel_hybrid_lb",
    "data_parallel_multi_port_external_lb",
    "enable_elastic_ep",
    "enable_fault_tolerance",
)
RANKS = ("data_parallel_rank", "data_parallel_start_rank")  # decide, too; 0 is a rank


def set_api_server_count(args: Namespace) -> None:
    """Set ``--api-server-count`` for a GPU, where the command line leaves it open.

    It is one per four cores, at least one per data-parallel engine, as in vLLM.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    is_decided = (
        args.api_server_count is not None
        or any(getattr(args, name, False) for name in DECIDING)
        or any(getattr(args, name, None) is not None for name in RANKS)
        or envs.VLLM_USE_RUST_FRONTEND
        or envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING  # a process loads adapters for itself alone
    )
    if current_platform.is_cuda() and not is_decided:
        args.api_server_count = max(count_for(available_cores()), args.data_parallel_size)


def count_for(num_cores: float) -> int:
    """Return the number of API servers for so many cores."""
    return max(1, min(int(num_cores) // CORES_PER_SERVER, MAX_SERVERS))


def available_cores() -> float:
    """Return the CPU cores that this process may use: its affinity, or the quota of its cgroup."""
    return min(len(os.sched_getaffinity(0)), _quota())


def _quota() -> float:
    """Return the cores that the cgroup grants, of either version; infinity without a limit."""
    try:
        quota, period = (CGROUP / "cpu.max").read_text().split()
    except OSError:
        try:
            quota, period = (
                (CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period")
            )
        except OSError:
            return float("inf")
    return int(quota) / int(period) if quota.strip().isdecimal() else float("inf")


def wait_for_api_servers() -> None:
    """Let several API servers answer 503 when they stop; vLLM would kill them at once.

    It waits for ``--shutdown-timeout``, which is 0 seconds, and has no other option.
    """
    from vllm.entrypoints.cli import serve

    from .serving import CLOSE_S

    class PatientManager(serve.APIServerProcessManager):
        def shutdown(self, timeout: float | None = None) -> None:
            super().shutdown(None if timeout is None else timeout + CLOSE_S + 1)

    serve.APIServerProcessManager = PatientManager
