# SPDX-License-Identifier: Apache-2.0
"""Options, and one engine and one server for the whole test session."""

# ruff: noqa: E402  (asserts of ``support`` explain themselves only if registered before)

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

pytest.register_assert_rewrite("support")

from support.checkpoints import ALIGNER, CHECKPOINT
from support.engines import engine
from support.servers import IN_TREE, Server, in_tree_environment, serving

# The same examples everywhere, without a deadline: machines may be slow. To search for others:
# pytest --hypothesis-profile=search
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")
settings.register_profile("search", derandomize=False, max_examples=1000)

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["NO_PROXY"] = os.environ["no_proxy"] = "127.0.0.1,localhost"  # where tests serve


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "servers have vLLM's own model: the tests of in-tree's faults (V1 ...) fail"
    parser.addoption("--in-tree", action="store_true", help=help)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--in-tree"):
        IN_TREE.update(in_tree_environment())


def pytest_make_parametrize_id(val: Any) -> str | None:
    """Name long bytes by their length: those of gzip hold the time."""
    return f"{len(val)} bytes" if isinstance(val, bytes) and len(val) > 40 else None


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Distribute groups, in their order, where ``-n`` starts several processes."""
    if getattr(config.option, "numprocesses", None):
        config.option.dist, config.option.loadscopereorder = "loadgroup", False
    if hasattr(config, "workerinput"):  # one of the processes
        config.option.loadgroup = True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Form the groups: one shares the server and the engine; each other is a file.

    Files that start engines come first, so that no process is alone with one at the end.
    """
    for item in items:
        is_sharing = {"server", "model"} & set(getattr(item, "fixturenames", ()))
        group = "shared" if is_sharing else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: item.get_closest_marker("vllm") is None)


@pytest.fixture(scope="module")
def vllm_parallel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One rank, so that vLLM's parallel layers can be built without an engine.

    Not for the whole session: an engine that ran in this process ends it with its own.
    """
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import (
        cleanup_dist_env_and_memory,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    with set_current_vllm_config(VllmConfig()):
        address = f"file://{tmp_path_factory.mktemp('rendezvous')}/store"
        init_distributed_environment(1, 0, address, local_rank=0, backend="gloo")
        ensure_model_parallel_initialized(1, 1)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="session")
def model() -> Iterator[Any]:
    """The one ``Qwen3ASR`` with its aligner. Tests share it and do not stop it."""
    from qwen3_asr_vllm import Qwen3ASR

    options = {"aligner": str(ALIGNER), "max_model_len": 4096, "enable_mm_embeds": True}
    with engine(CHECKPOINT, start=Qwen3ASR, languages={"he": "Hebrew"}, **options) as made:
        yield made


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The one ``qwen3-asr serve``. Tests share it and do not stop it."""
    with serving(tmp_path_factory.mktemp("server"), QWEN3_ASR_LANGUAGES="he=Hebrew") as made:
        yield made
