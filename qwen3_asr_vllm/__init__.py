# SPDX-License-Identifier: Apache-2.0
"""Qwen3-ASR on vLLM: speech to text through vLLM's own engine.

Installed beside vLLM, this package replaces the in-tree Qwen3-ASR: ``vllm serve
Qwen/Qwen3-ASR-1.7B``, ``LLM.generate`` and ``/v1/audio/transcriptions`` run on its configs,
processor, audio encoder and thinker. ``VLLM_PLUGINS=""`` switches it off.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .audio import load_audio
    from .corpus.client import Client
    from .diarizers import load_diarizer
    from .formats import FORMATS
    from .languages import LANGUAGES
    from .offline import ForcedAligner, Qwen3ASR
    from .options import TranscribeOptions
    from .recordings import Result
    from .transcript import Segment, Transcript, Word

__version__ = "0.1.0"
__all__ = [
    "FORMATS",
    "LANGUAGES",
    "Client",
    "ForcedAligner",
    "Qwen3ASR",
    "Result",
    "Segment",
    "TranscribeOptions",
    "Transcript",
    "Word",
    "load_audio",
    "load_diarizer",
    "register",
]

SUPPORTED_VLLM = ("0.32", "0.33")
ARCHITECTURES = {  # to the names of our classes
    "Qwen3ASRForConditionalGeneration": "Qwen3ASRForConditionalGeneration",
    "Qwen3ASRForcedAlignerForTokenClassification": "Qwen3ASRForcedAlignerForTokenClassification",
    # In-tree needs this name for its realtime route; ours needs no other architecture.
    "Qwen3ASRRealtimeGeneration": "Qwen3ASRForConditionalGeneration",
}

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints


def register() -> None:
    """Put this package's config and model classes in the place of vLLM's own.

    vLLM calls this in every process (entry point ``vllm.general_plugins``), some of them more
    than once, and does not guard the call: an exception here would end every vllm command on the
    machine. So whatever goes wrong is logged, and vLLM goes on with its in-tree model.
    """
    try:
        _register()
    except Exception:
        logger.exception("qwen3_asr_vllm %s could not register; in-tree model stays.", __version__)


def _register() -> None:
    from .processes import end_engines_with_parents

    end_engines_with_parents()
    import vllm
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.transformers_utils import config as vllm_config

    from .model.config import Qwen3ASRConfig

    if not vllm.__version__.startswith(tuple(f"{v}." for v in SUPPORTED_VLLM)):
        logger.warning(
            "qwen3_asr_vllm %s is tested with vLLM %s, and this is %s. "
            'VLLM_PLUGINS="" selects the in-tree model.',
            __version__,
            " and ".join(SUPPORTED_VLLM),
            vllm.__version__,
        )
    # vLLM re-registers its own table with AutoConfig on every load, so only this entry counts.
    vllm_config._CONFIG_REGISTRY[Qwen3ASRConfig.model_type] = Qwen3ASRConfig
    for architecture, name in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, f"{__name__}.model:{name}")
    logger.debug("Registered %s.", ", ".join(ARCHITECTURES))


_MODULES = {  # of the public names, which are imported when they are first used
    "FORMATS": "formats",
    "LANGUAGES": "languages",
    "Client": "corpus.client",
    "ForcedAligner": "offline",
    "Qwen3ASR": "offline",
    "Result": "recordings",
    "Segment": "transcript",
    "TranscribeOptions": "options",
    "Transcript": "transcript",
    "Word": "transcript",
    "load_audio": "audio",
    "load_diarizer": "diarizers",
}


def __getattr__(name: str) -> Any:
    if module := _MODULES.get(name):
        return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
