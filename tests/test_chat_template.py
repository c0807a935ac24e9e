# SPDX-License-Identifier: Apache-2.0
"""The prompt of a checkpoint is that of its own chat template, by every route."""

from __future__ import annotations

import base64
import io
import json
import shutil

import numpy as np
import pytest
import soundfile
from support.audio import noise
from support.checkpoints import CHECKPOINT

from qwen3_asr_vllm.chat_template import load_protocol
from qwen3_asr_vllm.languages import LANGUAGES
from qwen3_asr_vllm.options import TranscribeOptions
from qwen3_asr_vllm.prompt import AUDIO_PLACEHOLDER, build_prompt
from qwen3_asr_vllm.rounds import Steps
from qwen3_asr_vllm.transcription import EngineOutput, transcribe

pytestmark = pytest.mark.vllm

SYSTEM = (
    "{%- for m in messages if m.role == 'system' -%}<|im_start|>system\n"
    "{{ m.content if m.content is string else m.content[0].text }}<|im_end|>\n{%- endfor -%}"
)
USER = f"<|im_start|>user\n{AUDIO_PLACEHOLDER}<|im_end|>\n"
ASSISTANT = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
EXAMPLE = "<|im_start|>user\nTranscribe.<|im_end|>\n<|im_start|>assistant\nReady.<|im_end|>\n"
THINKING = ASSISTANT.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
CHATML = (  # of a text model: contents are strings
    "{%- for m in messages -%}<|im_start|>{{ m.role + '\n' + m.content }}<|im_end|>\n"
    "{%- endfor -%}" + ASSISTANT
)
TEMPLATES = {
    "published": None,
    "no system turn": USER + ASSISTANT,
    "a system turn where there is a context": SYSTEM + USER + ASSISTANT,
    "extra turns": SYSTEM + EXAMPLE + USER + THINKING,
    "context after the audio": USER + SYSTEM + ASSISTANT,
    "bare audio": SYSTEM + USER.replace(AUDIO_PLACEHOLDER, "<|audio_pad|>") + ASSISTANT,
    "contents as strings": CHATML,
}
NO_CONTEXT = "no system turn"
CONTEXT = "Kathrin, Maier\n差分機 "


def checkpoint(folder, template):
    """The tiny checkpoint with another chat template, without its weights."""
    shutil.copytree(
        CHECKPOINT, folder, ignore=shutil.ignore_patterns("model*", "chat_template.json")
    )
    (folder / "chat_template.jinja").write_text(template)
    return folder


def loaded(folder):
    from vllm.engine.arg_utils import EngineArgs
    from vllm.tokenizers import cached_tokenizer_from_config

    model_config = EngineArgs(str(folder), max_model_len=1024).create_model_config()
    return model_config, cached_tokenizer_from_config(model_config)


@pytest.fixture(scope="module", params=TEMPLATES)
def made(request, tmp_path_factory):
    """A checkpoint as vLLM and its protocol as we read it, and the name of its template."""
    template = TEMPLATES[request.param]
    folder = tmp_path_factory.mktemp("template") / "asr"
    model_config, tokenizer = loaded(checkpoint(folder, template) if template else CHECKPOINT)
    return request.param, model_config, tokenizer, load_protocol(model_config, tokenizer)


def rendered(made, context):
    """Render with transformers' own ``apply_chat_template``."""
    from transformers import AutoProcessor

    name, model_config, _, _ = made
    audio = [{"type": "audio", "audio": "x"}]
    is_text = name == "contents as strings"
    messages = [{"role": "user", "content": AUDIO_PLACEHOLDER if is_text else audio}]
    if context:
        messages.insert(0, {"role": "system", "content": context})
    processor = AutoProcessor.from_pretrained(model_config.model)
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_prompts_equal_apply_chat_template(made, context):
    assert build_prompt(context=context, protocol=made[-1]) == rendered(made, context)


def test_language_and_text_follow_the_template(made):
    prompt = build_prompt(language="German", text="Guten", protocol=made[-1])
    assert prompt == rendered(made, "") + "language German<asr_text>Guten"


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_route_and_stream_send_that_prompt(made, context):
    from qwen3_asr_vllm.engine import stream_parts
    from qwen3_asr_vllm.streaming import Stream

    _, model_config, tokenizer, protocol = made
    speech, expected = noise(3.0), rendered(made, context)
    steps = Steps(transcribe(speech, TranscribeOptions(context=context), protocol))
    assert [request.prompt for request in steps.requests] == [expected]
    parts = stream_parts(model_config.hf_config.thinker_config, tokenizer, protocol)
    stream = Stream(**parts, context=context)
    stream.push(noise(11.0))
    windows = "<|audio_pad|>" * 2
    assert stream.request().prompt == expected.replace("<|audio_pad|>", windows)


@pytest.mark.parametrize("context", ["", CONTEXT])
def test_core_and_chat_routes_send_that_prompt(made, context):
    from vllm.config import VllmConfig
    from vllm.config.speech_to_text import SpeechToTextParams
    from vllm.renderers import ChatParams, renderer_from_config

    from qwen3_asr_vllm.model.transcriber import Qwen3ASRForConditionalGeneration as architecture

    _, model_config, tokenizer, _ = made
    params = SpeechToTextParams(
        audio=np.zeros(16_000, np.float32),
        stt_config=architecture.get_speech_to_text_config(model_config, "transcribe"),
        model_config=model_config,
        request_prompt=context,
    )
    sent = architecture.get_generation_prompt(params)["prompt_token_ids"]
    expected = rendered(made, context)
    assert tokenizer.decode(sent) == expected
    file = io.BytesIO()
    soundfile.write(file, np.zeros(1600), 16_000, format="WAV")
    url = f"data:audio/wav;base64,{base64.b64encode(file.getvalue()).decode()}"
    messages = [{"role": "system", "content": context}] if context else []
    audio = {"type": "audio_url", "audio_url": {"url": url}}
    messages.append({"role": "user", "content": [audio]})
    renderer = renderer_from_config(VllmConfig(model_config=model_config))
    kwargs = {"add_generation_prompt": True, "tokenize": False}
    _, prompt = renderer.render_messages(messages, ChatParams(chat_template_kwargs=kwargs))
    assert prompt["prompt"] == expected


def test_contexts_without_a_place_are_warned_about(made):
    name, _, _, protocol = made
    assert bool(protocol.with_context) == (name != NO_CONTEXT)
    steps = Steps(transcribe(noise(1.0), TranscribeOptions(keywords=["Kathrin"]), protocol))
    steps.send([EngineOutput("language English<asr_text>Kathrin.", "stop")])
    warnings = [w for w in steps.result.warnings if "no place for a context" in w]
    assert len(warnings) == (name == NO_CONTEXT)
    assert steps.result.text == "Kathrin."  # no prompt leak, for the model saw no context


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (SYSTEM + ASSISTANT, r"chat_template renders 0 times <\|audio_pad\|>"),
        (USER + USER + ASSISTANT, r"chat_template renders 2 times <\|audio_pad\|>"),
        ("{{ raise_exception('no audio here') }}", "chat_template fails: no audio here"),
    ],
)
def test_a_template_without_one_audio_is_refused(tmp_path, template, message):
    with pytest.raises(ValueError, match=message):
        load_protocol(*loaded(checkpoint(tmp_path / "asr", template)))


def test_a_template_may_refuse_system_messages(tmp_path):
    refusal = "{%- if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif -%}"
    folder = checkpoint(tmp_path / "asr", refusal + USER + ASSISTANT)
    assert load_protocol(*loaded(folder)).with_context is None


def test_without_a_template_prompts_are_published(tmp_path):
    folder = checkpoint(tmp_path / "asr", "")
    (folder / "chat_template.jinja").unlink()
    model_config, tokenizer = loaded(folder)
    protocol = load_protocol(model_config, tokenizer)
    assert build_prompt(context="a", protocol=protocol) == build_prompt(context="a")
    given = load_protocol(model_config, tokenizer, SYSTEM + EXAMPLE + USER + ASSISTANT)
    assert EXAMPLE in given.bare  # as --chat-template has it


def test_languages_of_the_config_reach_prompts(tmp_path):
    """By the core route too, whose hooks for languages get no config."""
    from vllm.config.speech_to_text import SpeechToTextConfig, SpeechToTextParams

    from qwen3_asr_vllm.model import Qwen3ASRForConditionalGeneration as Model

    folder = checkpoint(tmp_path / "asr", SYSTEM + USER + ASSISTANT)
    config = json.loads((folder / "config.json").read_text())
    config["support_languages"] += ["Hebrew", "Haitian Creole"]
    (folder / "config.json").write_text(json.dumps(config))
    model_config, tokenizer = loaded(folder)
    protocol = load_protocol(model_config, tokenizer, languages="ur=Urdu")
    assert set(protocol.languages) - set(LANGUAGES) == {"he", "ht", "ur"}

    def core_prompt(language):
        made = {"stt_config": SpeechToTextConfig(), "model_config": model_config}
        code = Model.validate_language(language)
        params = SpeechToTextParams(audio=noise(1), language=code, **made)
        return tokenizer.decode(Model.get_generation_prompt(params)["prompt_token_ids"])

    for language in ("he", "heb", "Hebrew", "he-IL"):
        assert core_prompt(language).endswith("language Hebrew<asr_text>")
    with pytest.raises(ValueError, match="QWEN3_ASR_LANGUAGES=sw=Swahili"):
        core_prompt("sw")
