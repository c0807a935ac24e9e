# SPDX-License-Identifier: Apache-2.0
"""No request changes the answer to another: 30 recordings, before and after hostile audio.

The processor would refuse it. Its checks are switched off here, so that the model alone keeps NaN
out of the KV cache, whose blocks later requests read before they have filled them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
import soundfile
import torch
from support.audio import DATA, HOSTILE, heldout, noise, poisoned
from support.checkpoints import reference_config, reference_model, save_nested
from support.engines import engine

from qwen3_asr_vllm.prompt import AUDIO_PLACEHOLDER, build_prompt

pytestmark = pytest.mark.vllm

BLOCKS = 16  # of the KV cache: two requests of 12 s fill them all
ROWS = [row for row in heldout() if row["text"]][:30]


def recordings() -> list[np.ndarray]:
    paths = [DATA / "heldout" / row["audio_filepath"] for row in ROWS]
    return [soundfile.read(path, dtype="float32")[0] for path in paths]


@contextmanager
def unchecked() -> Iterator[None]:
    """The processor accepts any number."""
    from qwen3_asr_vllm.model import processor

    with pytest.MonkeyPatch.context() as patch:
        for check in ("check_waveform", "check_log_mel", "check_embeddings"):
            patch.setattr(processor, check, lambda _: None)
        yield


def hostile_audio(llm: Any, value: float) -> list[Any]:
    """Of 12 s each: one sample, all samples, a feature, and an embedding of this value."""
    log_mel = {
        "input_audio_features": poisoned(torch.zeros(128, 1200), value),
        "audio_feature_lengths": torch.tensor([1200]),
    }
    embeddings = poisoned(torch.zeros(156, llm.model_config.get_hidden_size()), value)
    waveforms = [poisoned(noise(12), value), np.full(192_000, value, np.float32)]
    return [*waveforms, log_mel, [embeddings]]


def generate(llm: Any, audios: list[Any], **options: Any) -> list[list[int]]:
    from vllm import SamplingParams

    asked = [
        {
            "prompt": build_prompt(),
            "multi_modal_data": {"audio": audio},
            "multi_modal_uuids": {"audio": [uuid4().hex]},  # nothing is cached
        }
        for audio in audios
    ]
    outputs = llm.generate(asked, SamplingParams(temperature=0, **options), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def assert_unchanged(
    answers: Callable[[], Any], attack: Callable[[float], Any], values: tuple[float, ...] = HOSTILE
) -> None:
    before = answers()
    for value in values:
        attack(value)
        assert answers() == before, f"after {value:g}"


def attack(llm: Any, value: float) -> None:
    with unchecked():
        generate(llm, hostile_audio(llm, value), max_tokens=16, ignore_eos=True)


def test_hostile_audio_changes_no_later_answer(model):
    """In float32, from arrays, features and embeddings."""
    clips = recordings()
    assert_unchanged(
        lambda: generate(model.llm, clips, max_tokens=24), lambda value: attack(model.llm, value)
    )


def test_hostile_audio_changes_no_later_times(model):
    """The aligner's, of words that are said in the recordings."""
    llm, clips = model.aligner.llm, [(clip, 16_000) for clip in recordings()]
    prompt = AUDIO_PLACEHOLDER + "word<timestamp><timestamp>" * 50

    def attack(value: float) -> None:
        waveforms = hostile_audio(llm, value)[:2]
        data = [{"prompt": prompt, "multi_modal_data": {"audio": audio}} for audio in waveforms]
        with unchecked():
            llm.encode(data, pooling_task="token_classify", use_tqdm=False)

    transcripts = partial(model.aligner.align, clips, [row["text"] for row in ROWS])
    assert_unchanged(lambda: [transcript.words for transcript in transcripts()], attack)


@pytest.fixture(scope="module")
def bfloat16_llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Of random weights: a CPU is slow in bfloat16."""
    checkpoint = save_nested(reference_model(reference_config()), tmp_path_factory.mktemp("tiny"))
    options = {"enable_mm_embeds": True, "enable_prompt_embeds": True}
    with engine(checkpoint, dtype="bfloat16", num_gpu_blocks_override=BLOCKS, **options) as llm:
        yield llm


def short_answers(llm: Any) -> list[list[int]]:
    """To 30 clips, one after the other: a batch of another size would round differently."""
    clips = [noise(0.5 + i / 100, seed=i) for i in range(30)]
    return [tokens for clip in clips for tokens in generate(llm, [clip], max_tokens=2)]


def test_hostile_audio_changes_no_bfloat16_answer(bfloat16_llm):
    llm = bfloat16_llm
    assert_unchanged(lambda: short_answers(llm), lambda value: attack(llm, value))


def test_hostile_prompt_embeddings_change_no_later_answer(bfloat16_llm):
    """No processor of ours sees what ``enable_prompt_embeds`` lets in."""
    from vllm import SamplingParams

    llm, params = bfloat16_llm, SamplingParams(max_tokens=1)

    def attack(value: float) -> None:
        hidden = llm.model_config.get_hidden_size()
        embeddings = poisoned(torch.zeros(300, hidden, dtype=torch.bfloat16), value)
        llm.generate([{"prompt_embeds": embeddings}] * 4, params, use_tqdm=False)

    assert_unchanged(lambda: short_answers(llm), attack, (3e38, np.nan, np.inf))
