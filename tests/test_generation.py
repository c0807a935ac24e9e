# SPDX-License-Identifier: Apache-2.0
"""Defaults of a checkpoint's generation config, read by vLLM's own config."""

from __future__ import annotations

import json
import shutil

import pytest
from support.checkpoints import CHECKPOINT

from qwen3_asr_vllm.generation import (
    SAMPLING,
    describe,
    generation_defaults,
    read_generation_config,
    sampling_defaults,
)

pytestmark = pytest.mark.vllm

BEAMS = {"use_beam_search": True, "n": 4, "length_penalty": 0.7}


@pytest.fixture
def defaults_of(tmp_path):
    """The defaults of the tiny checkpoint with another ``generation_config.json``."""
    from vllm.engine.arg_utils import EngineArgs

    def defaults(config, **options):
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(CHECKPOINT / name, tmp_path)
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
        made = EngineArgs(str(tmp_path), max_model_len=1024, **options).create_model_config()
        return generation_defaults(made)

    return defaults


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"do_sample": False, "temperature": 1e-6}, {"temperature": 0.0}),  # as published
        ({}, {}),
        ({"temperature": 0.6, "top_p": 0.9, "top_k": 20}, None),
        ({"repetition_penalty": 1.1, "max_new_tokens": 300}, None),
        ({"num_beams": 4, "length_penalty": 0.7}, BEAMS),
        ({"num_beams": 1, "length_penalty": 0.7}, {}),
    ],
)
def test_the_checkpoint_sets_the_defaults(defaults_of, config, expected):
    renamed = {name.replace("max_new", "max"): value for name, value in config.items()}
    assert defaults_of(config) == (renamed if expected is None else expected)


def test_options_of_vllm_override_the_checkpoint(defaults_of):
    config = {"temperature": 0.6, "num_beams": 4}
    assert defaults_of(config, generation_config="vllm") == {}
    override = {"temperature": 0.2, "num_beams": 1}
    assert defaults_of(config, override_generation_config=override) == {"temperature": 0.2}


def test_the_parameters_are_those_that_vllm_reads(defaults_of):
    from vllm.config import ModelConfig

    names = {name: 0.5 for name in SAMPLING if name not in ("max_tokens", "top_k")}
    names |= {"max_new_tokens": 5, "top_k": 3}

    class Reads(ModelConfig):
        def __init__(self):
            self.generation_config, self.override_generation_config = "vllm", names

    assert ModelConfig.get_diff_sampling_param(Reads()) == read_generation_config(names)


@pytest.mark.parametrize("config", [{"temperature": -1.0}, {"num_beams": 0}, {"top_p": 5}])
def test_a_bad_default_names_the_checkpoint(defaults_of, tmp_path, config):
    with pytest.raises(ValueError, match=f"generation config of {tmp_path}: .*--generation-config"):
        defaults_of(config)


def test_beams_are_no_sampling_parameter():
    assert sampling_defaults({"top_p": 0.2} | BEAMS) == {
        "temperature": 0.0,
        "max_tokens": None,
        "top_p": 0.2,
    }


@pytest.mark.parametrize(
    ("defaults", "line"),
    [
        ({}, "temperature 0"),
        ({"temperature": 0.6, "top_k": 20}, "temperature 0.6, top_k 20"),
        (BEAMS, "temperature 0, 4 beams, length_penalty 0.7"),
    ],
)
def test_the_line_names_each_default(defaults, line):
    assert describe(defaults) == line
