# SPDX-License-Identifier: Apache-2.0
"""Engines that share a GPU: ``--engines-per-gpu N``.

    port -> API server -> engine 0, engine 1 ... on GPU 0

One Python thread schedules all requests of an engine, and does not fill a large GPU. The engines
are ranks of vLLM's data parallelism, so vLLM balances requests and watches all engines. Each has an
equal share of the memory that the options grant on a GPU.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser, Namespace

OPTION = "--engines-per-gpu"
# Options that also say where engines run.
UNSUITED = (
    "data_parallel_size_local",
    "data_parallel_rank",
    "data_parallel_start_rank",
    "data_parallel_address",
    "data_parallel_rpc_port",
    "data_parallel_backend",
    "data_parallel_hybrid_lb",
    "data_parallel_external_lb",
    "data_parallel_multi_port_external_lb",
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "nnodes",
    "node_rank",
    "headless",
    "enable_elastic_ep",
    "numa_bind",
    "worker_cls",
)


def add_engines_option(parser: ArgumentParser) -> None:
    parser.add_argument(
        OPTION,
        type=int,
        default=1,
        metavar="N",
        help="engines on each GPU, behind one port; they share its memory equally. A second one "
        "fills a large GPU that one engine's Python thread does not. With --data-parallel-size G: "
        "N engines on each of G GPUs. If an engine dies, all start again. Default: 1",
    )


def share_gpus(args: Namespace, parser: ArgumentParser) -> None:
    """Set the options of vLLM that put ``args.engines_per_gpu`` engines on each GPU.

    Exits with status 2 for options that do not go with it.
    """
    num_engines = args.engines_per_gpu
    if num_engines < 1:
        parser.error(f"{OPTION} {num_engines}: pass 1 or more")
    if num_engines == 1:
        return
    if unsuited := _unsuited(args, parser):
        parser.error(
            f"{OPTION} {num_engines} puts whole engines on each GPU and does not go with "
            f"{', '.join(unsuited)}. Use --data-parallel-size for several GPUs, or {OPTION} 1"
        )
    _set_workers(args)
    args.data_parallel_size *= num_engines
    args.gpu_memory_utilization /= num_engines
    if args.kv_cache_memory_bytes is not None:
        args.kv_cache_memory_bytes //= num_engines


def _unsuited(args: Namespace, parser: ArgumentParser) -> list[str]:
    """Return the options of ``UNSUITED`` that differ from their defaults."""
    names = [x for x in UNSUITED if getattr(args, x, None) != parser.get_default(x)]
    if args.distributed_executor_backend not in (None, "uni", "mp"):
        names.append("distributed_executor_backend")
    return [f"--{name.replace('_', '-')}" for name in names]


def _set_workers(args: Namespace) -> None:
    """Set how and where the workers of the engines run."""
    from vllm.platforms import current_platform

    from ..engine import NUM_GPUS, SHARED_GPU_WORKER

    # As with a single engine; for several, vLLM's default is a process more for each.
    args.distributed_executor_backend = args.distributed_executor_backend or "uni"
    if current_platform.is_cuda_alike():
        args.worker_cls = SHARED_GPU_WORKER
        os.environ[NUM_GPUS] = str(args.data_parallel_size)
    elif args.api_server_count is None:  # vLLM's default is one for each engine
        args.api_server_count = 1
