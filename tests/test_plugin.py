# SPDX-License-Identifier: Apache-2.0
"""vLLM finds our model where the package is installed, unless VLLM_PLUGINS switches it off."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from support.checkpoints import CHECKPOINT

import qwen3_asr_vllm

pytestmark = pytest.mark.vllm

RESOLVE = f"""
import json
from vllm.plugins import load_general_plugins
from vllm.transformers_utils.config import get_config
from vllm.model_executor.models.registry import ModelRegistry

load_general_plugins()
config = get_config({str(CHECKPOINT)!r}, trust_remote_code=False)
model = ModelRegistry.models["Qwen3ASRForConditionalGeneration"]
print(json.dumps([type(config).__module__, model.module_name]))
"""


@pytest.mark.parametrize(
    ("plugins", "config", "model"),
    [
        (None, "qwen3_asr_vllm.model.config", "qwen3_asr_vllm.model"),
        ("", "vllm.transformers_utils.configs.qwen3_asr", "vllm.model_executor.models.qwen3_asr"),
    ],
)
def test_vllm_plugins_decides_whose_model_is_served(plugins, config, model):
    env = {name: value for name, value in os.environ.items() if name != "VLLM_PLUGINS"}
    env |= {} if plugins is None else {"VLLM_PLUGINS": plugins}
    result = subprocess.run(
        [sys.executable, "-c", RESOLVE], capture_output=True, text=True, env=env
    )
    assert json.loads(result.stdout.splitlines()[-1]) == [config, model], result.stderr


def test_registering_again_changes_nothing():
    from vllm.model_executor.models.registry import ModelRegistry

    for _ in range(2):
        qwen3_asr_vllm.register()
    for architecture in qwen3_asr_vllm.ARCHITECTURES:
        assert ModelRegistry.models[architecture].module_name == "qwen3_asr_vllm.model"


def test_untested_vllm_versions_are_warned_about(monkeypatch, caplog):
    import vllm

    monkeypatch.setattr(vllm, "__version__", "0.41.0")
    monkeypatch.setattr(qwen3_asr_vllm.logger.parent, "propagate", True)
    qwen3_asr_vllm.register()
    assert "tested with vLLM 0.32 and 0.33, and this is 0.41.0" in caplog.text


def test_failed_registration_raises_nothing(monkeypatch, caplog):
    from vllm.model_executor.models.registry import ModelRegistry

    monkeypatch.setattr(type(ModelRegistry), "register_model", None)
    monkeypatch.setattr(qwen3_asr_vllm.logger.parent, "propagate", True)
    qwen3_asr_vllm.register()
    assert "could not register" in caplog.text


def test_the_model_has_all_in_tree_interfaces():
    from vllm.model_executor.models import interfaces

    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration as model

    for name in ("multimodal", "pp", "lora", "eagle3", "transcription"):
        assert getattr(interfaces, f"supports_{name}")(model), name
    assert not interfaces.supports_mrope(model)  # plain RoPE: a decision, tested in test_model


def test_every_public_name_is_imported_lazily():
    names = {name: getattr(qwen3_asr_vllm, name) for name in qwen3_asr_vllm.__all__}
    assert names.keys() <= set(dir(qwen3_asr_vllm))
    assert names["FORMATS"]["txt"](names["Transcript"]("Hello.", 1.0)) == "Hello.\n"
    with pytest.raises(AttributeError, match="no_such_name"):
        qwen3_asr_vllm.no_such_name  # noqa: B018
