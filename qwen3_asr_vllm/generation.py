# SPDX-License-Identifier: Apache-2.0
"""Default sampling parameters of a checkpoint, from its ``generation_config.json``.

    {"temperature": 0.6, "num_beams": 4}  ->  {"temperature": 0.6, "n": 4, "use_beam_search": True}

They are the defaults of every route and of ``Qwen3ASR``; a request overrides each. vLLM's options
``--generation-config`` (``vllm``: none of the checkpoint's) and ``--override-generation-config``
apply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.config import ModelConfig

# Parameters that vLLM reads from a generation config, under the names of its requests.
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "max_tokens"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
BEAMS = ("use_beam_search", "n", "length_penalty")  # parameters of a beam search; n is its width
# Parameters that a beam search does not use, with the values that change nothing.
UNSEARCHED = {
    "temperature": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}

_REQUEST_NAMES = {"max_new_tokens": "max_tokens", "num_beams": "n"}
_LEAST_TEMPERATURE = 0.01  # vLLM raises lower ones to this; the published checkpoints have 1e-6


def generation_defaults(model_config: ModelConfig) -> dict[str, Any]:
    """Return the default parameters of a checkpoint: some of ``SAMPLING`` and ``BEAMS``.

    A temperature near 0 is greedy decoding. More than one beam is a beam search.

    Raises ValueError, which names the checkpoint, for parameters that vLLM rejects.
    """
    from vllm.exceptions import VLLMValidationError

    is_neutral = model_config.generation_config == "vllm"
    config = {} if is_neutral else model_config.try_get_generation_config()
    defaults = read_generation_config(config | model_config.override_generation_config)
    try:
        _check(defaults)
    except (TypeError, ValueError, VLLMValidationError) as error:
        message = f"the generation config of {model_config.model}: {error}"
        raise ValueError(f"{message} Correct it, or pass --generation-config vllm.") from error
    return defaults


def read_generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters of a generation config, under the names of requests."""
    given = {_REQUEST_NAMES.get(name, name): value for name, value in config.items()}
    known = (*SAMPLING, *BEAMS[1:])
    defaults = {name: given[name] for name in known if given.get(name) is not None}
    if 0 < defaults.get("temperature", 0) < _LEAST_TEMPERATURE:
        defaults["temperature"] = 0.0
    if defaults.get("n", 1) == 1:  # one beam is no search, and has no length to weigh
        return {name: value for name, value in defaults.items() if name not in BEAMS}
    return {"use_beam_search": True} | defaults


def sampling_defaults(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that ``vllm.SamplingParams`` takes: all but those of a beam search.

    Decoding is greedy and its length not limited, unless the checkpoint differs.
    """
    given = {name: value for name, value in defaults.items() if name in SAMPLING}
    return {"temperature": 0.0, "max_tokens": None} | given


def describe(defaults: Mapping[str, Any]) -> str:
    """Return the defaults in one line, such as "temperature 0.6, 4 beams, length_penalty 0.7"."""
    rest = {"temperature": 0.0} | {x: defaults[x] for x in defaults if x != "use_beam_search"}
    return ", ".join(
        f"{value} beams" if name == "n" else f"{name} {value:g}" for name, value in rest.items()
    )


def _check(defaults: Mapping[str, Any]) -> None:
    from vllm.sampling_params import BeamSearchParams, SamplingParams

    SamplingParams(**sampling_defaults(defaults))
    if "n" in defaults:
        BeamSearchParams(beam_width=defaults["n"], max_tokens=1)
