# SPDX-License-Identifier: Apache-2.0
"""A fine-tune that writes two added tokens, in a vocabulary of another size, on the engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from support.audio import DATA, HELLO, heldout
from support.checkpoints import CHECKPOINT
from support.engines import engine

from qwen3_asr_vllm import Qwen3ASR

pytestmark = pytest.mark.vllm

SPEAKERS = {
    ".": "<|spk_0|>",
    ",": "<|spk_1|>",
}  # for full stop and comma
EMBEDDING = "thinker.model.embed_tokens.weight"


def save_with_speakers(path: Path) -> Path:
    """The tiny checkpoint, whose rows of two tokens stand for two added ones."""
    from transformers import AutoTokenizer

    shutil.copytree(CHECKPOINT, path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPEAKERS.values()]})
    tokenizer.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    tensors = load_file(path / "model.safetensors")
    rows = tensors[EMBEDDING][: len(tokenizer)].clone()
    never_written = config["thinker_config"]["audio_token_id"]
    for mark, speaker in SPEAKERS.items():
        (old,) = tokenizer.encode(mark)
        (new,) = tokenizer.encode(speaker)
        rows[new] = rows[old]
        rows[old] = rows[never_written]
    tensors[EMBEDDING] = rows
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config["thinker_config"]["text_config"]["vocab_size"] = len(tokenizer)
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def finetune(tmp_path_factory):
    """Its engine."""
    folder = save_with_speakers(tmp_path_factory.mktemp("added") / "asr")
    with engine(folder, start=Qwen3ASR, in_process=True, max_model_len=1024) as made:
        yield made


def recordings():
    rows = [row for row in heldout() if row["language"] != "Chinese"][::12]
    return [HELLO, *(DATA / "heldout" / row["audio_filepath"] for row in rows)]


def test_added_tokens_stay_out_of_the_text(model, finetune):
    marked = 0
    options = {"skip_special_tokens": False}
    for path in recordings():
        plain = model.transcribe(path).text
        marked += sum(map(plain.count, SPEAKERS))
        without, with_speakers = plain, plain
        for mark, speaker in SPEAKERS.items():
            without = without.replace(mark, "")
            with_speakers = with_speakers.replace(mark, speaker)
        assert finetune.transcribe(path).text == without
        assert finetune.transcribe(path, **options).text == with_speakers
    assert marked > 4
