# SPDX-License-Identifier: Apache-2.0
"""The names that this package takes from vLLM: promised ones, and ones that any release may change.

This is the one list of the second kind. Each line names the test that fails when it changes; here,
every import of the package must be in one of the two tables, and every name must still be there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from functools import reduce
from pathlib import Path

import pytest

import qwen3_asr_vllm

PACKAGE = Path(qwen3_asr_vllm.__file__).parent

# For authors of models, plugins and programs: documented, and deprecated before it goes.
PROMISED = (
    *("vllm", "vllm.LLM", "vllm.envs", "vllm.outputs", "vllm.sampling_params", "vllm.inputs"),
    *("vllm.logger.init_logger", "vllm.config", "vllm.engine", "vllm.platforms", "vllm.plugins"),
    *("vllm.SamplingParams", "vllm.PoolingParams", "vllm.pooling_params", "vllm.logprobs"),
    *("vllm.model_executor.models.interfaces", "vllm.model_executor.models.interfaces_base"),
    *("vllm.model_executor.models.registry", "vllm.model_executor.models.module_mapping"),
    *("vllm.multimodal", "vllm.sequence", "vllm.tasks", "vllm.tokenizers", "vllm.distributed"),
)

# Its inside. What is imported from there, and the test that fails when it changes.
WATCHED = {
    "vllm.transformers_utils.config": "test_plugin.py",
    "vllm.entrypoints.generate.base": "test_transcriptions.py",
    "vllm.entrypoints.generate.beam_search": "test_beam_search.py",
    "vllm.entrypoints.openai.models.serving": "test_transcriptions.py",
    "vllm.entrypoints.serve": "test_app.py",
    "vllm.renderers": "test_chat_template.py",
    "vllm.entrypoints.cli": "test_server.py",
    "vllm.logger.configure_logging_from_args": "test_server.py",
    "vllm.transformers_utils.repo_utils": "test_cli.py",
    "vllm.utils.argparse_utils": "test_cli.py",
    "vllm.utils.torch_utils": "test_encoder_graph.py",
    "vllm.usage.usage_lib": "test_engine.py",
    "vllm.triton_utils": "test_gpu.py",
    "vllm.model_executor.layers": "test_encoder.py",
    "vllm.model_executor.models.qwen3": "test_model.py",
    "vllm.model_executor.models.utils": "test_model.py",
    "vllm.v1.attention": "test_encoder.py",
    "vllm.exceptions": "test_offline.py",
    "vllm.v1.engine.exceptions": "test_weather.py",
    "vllm.v1.outputs": "test_aligner.py",
    "vllm.v1.pool": "test_aligner.py",
    "vllm.v1.sample.logits_processor": "test_transcriptions.py",
    "vllm.v1.worker.encoder_cudagraph_defs": "test_encoder_graph.py",
    "vllm.v1.worker.gpu_worker": "test_worker.py",
    "vllm.v1.worker.worker_base": "test_worker.py",
}

# What is reached through an object: a name, the parameters that are passed to it, and the test.
SERVING = "vllm.entrypoints.generate.base.serving.GenerateBaseServing"
ENGINE = "vllm.v1.engine"
RENDERER = "vllm.renderers.base.BaseRenderer"
MODEL = "vllm.model_executor.models.interfaces.SupportsMultiModal"

# Attributes that an object of vLLM gets when it is made.
ATTRIBUTES = {
    f"{ENGINE}.output_processor.OutputProcessor": ("external_req_ids", "request_states"),
    f"{ENGINE}.output_processor.RequestState": ("stream_interval",),
}
MEMBERS = {
    "vllm.transformers_utils.config._CONFIG_REGISTRY": ((), "test_plugin.py"),
    f"{SERVING}._check_model": (("request",), "test_transcriptions.py"),
    f"{SERVING}._preflight": ((), "test_transcriptions.py"),
    f"{SERVING}._base_request_id": (("raw_request",), "test_transcriptions.py"),
    f"{SERVING}._maybe_get_adapters": (("request",), "test_transcriptions.py"),
    f"{SERVING}._get_trace_headers": (("headers",), "test_supervisor.py"),
    f"{SERVING}._get_priority": (("request", "raw_request"), "test_app.py"),
    f"{SERVING}._get_data_parallel_rank": (("raw_request",), "test_app.py"),
    f"{SERVING}._raise_if_error": (("finish_reason", "request_id"), "test_transcriptions.py"),
    "vllm.v1.worker.gpu_worker.Worker.init_device": ((), "test_worker.py"),
    "vllm.v1.worker.gpu_worker.Worker.compile_or_warm_up_model": ((), "test_worker.py"),
    "vllm.config.ParallelConfig.data_parallel_rank_local": ((), "test_worker.py"),
    f"{SERVING}._is_model_supported": (("model_name",), "test_sessions.py"),
    "vllm.entrypoints.cli.serve.APIServerProcessManager": ((), "test_api_servers.py"),
    "vllm.config.ModelConfig.try_get_generation_config": ((), "test_generation.py"),
    "vllm.engine.arg_utils.EngineArgs.get_batch_defaults": (("world_size",), "test_engine.py"),
    "vllm.LLM._resolve_mm_lora": ((), "test_offline.py"),
    f"{RENDERER}.render_cmpl": ((), "test_offline.py"),
    f"{RENDERER}.render_cmpl_async": ((), "test_clients.py"),
    f"{MODEL}._mark_tower_model": (("vllm_config", "modalities"), "test_model.py"),
    f"{MODEL}._mark_language_model": (("vllm_config",), "test_model.py"),
    "vllm.multimodal.processing.BaseProcessingInfo._get_expected_hidden_size": (
        (),
        "test_inputs.py",
    ),
    "vllm.SamplingParams.from_optional": (("stream_interval",), "test_transcriptions.py"),
    "vllm.LLM.enqueue": (("prompts", "sampling_params", "use_tqdm"), "test_offline.py"),
    f"{ENGINE}.llm_engine.LLMEngine.step": ((), "test_offline.py"),
    f"{ENGINE}.llm_engine.LLMEngine.abort_request": (("request_ids",), "test_offline.py"),
    f"{ENGINE}.async_llm.AsyncLLM.check_admission": (("n",), "test_clients.py"),
    f"{ENGINE}.async_llm.AsyncLLM.errored": ((), "test_weather.py"),
    f"{ENGINE}.output_processor.OutputProcessor.propagate_error": (("e",), "test_weather.py"),
}


def imported() -> dict[str, set[str]]:
    """Every name that the package takes from vLLM, and the modules that do."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            else:
                continue
            for name in names:
                if name.split(".")[0] == "vllm":
                    found.setdefault(name, set()).add(path.name)
    return found


def is_in(name: str, table: tuple[str, ...]) -> bool:
    return any(name == entry or name.startswith(f"{entry}.") for entry in table if entry != "vllm")


def find(name: str):
    """The object of a dotted name."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[end:], module)
    raise ModuleNotFoundError(name)


def test_private_vllm_names_are_listed():
    unlisted = {
        name: modules
        for name, modules in imported().items()
        if name != "vllm" and not is_in(name, PROMISED) and not is_in(name, tuple(WATCHED))
    }
    assert unlisted == {}


def test_nothing_is_listed_that_is_not_taken():
    names = imported()
    assert [entry for entry in WATCHED if not any(is_in(name, (entry,)) for name in names)] == []
    tests = {*WATCHED.values(), *(test for _, test in MEMBERS.values())}
    assert {file for file in tests if not [*Path(__file__).parent.rglob(file)]} == set()


@pytest.mark.parametrize("name", sorted(imported()))
def test_this_vllm_has_it(name):
    find(name)


@pytest.mark.parametrize("name", MEMBERS)
def test_this_vllm_has_the_member(name):
    member = find(name)
    if parameters := MEMBERS[name][0]:
        assert set(parameters) <= set(inspect.signature(member).parameters)


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_this_vllm_sets_the_attributes(name):
    source = inspect.getsource(find(name))
    assert [each for each in ATTRIBUTES[name] if f"self.{each}" not in source] == []
