# SPDX-License-Identifier: Apache-2.0
"""The text protocol of a checkpoint, read once when it is loaded.

    chat template, tokenizer -> load_protocol() -> TextProtocol -> prompts, parsing

The template is chosen and rendered by vLLM's own functions, so that every route sends the prompt
of vLLM's chat route. Marks stand in the places of context and audio.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .languages import checkpoint_languages
from .prompt import (
    ASR_TEXT,
    AUDIO_PAD,
    AUDIO_PLACEHOLDER,
    CONTEXT,
    NO_CONTEXT,
    PUBLISHED,
    TextProtocol,
    control_tokens,
)

if TYPE_CHECKING:
    from vllm.config import ModelConfig

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints

NO_TEMPLATE = (
    "The checkpoint has no chat_template; it gets the prompt of the published Qwen3-ASR. "
    "Put its chat_template.jinja beside its config.json if it was trained on another."
)


def load_protocol(
    model_config: ModelConfig,
    tokenizer: Any,
    chat_template: str | None = None,
    languages: str | Mapping[str, str] = "",
) -> TextProtocol:
    """Return the text protocol of a checkpoint; ``chat_template`` replaces its own.

    ``languages`` are more than those that its config and QWEN3_ASR_LANGUAGES name.

    Warns where the template has no place for a context. Raises ValueError where it cannot be
    rendered, or has not one place for audio.
    """
    bare, with_context = _render(model_config, tokenizer, chat_template)
    special = (token for token in tokenizer.all_special_tokens if token not in ("", ASR_TEXT))
    return TextProtocol(
        bare,
        with_context,
        control_tokens(tokenizer),
        special_tokens=tuple(sorted(special)),
        languages=checkpoint_languages(model_config.hf_config.support_languages, languages),
    )


def _render(
    model_config: ModelConfig, tokenizer: Any, chat_template: str | None
) -> tuple[str, str | None]:
    from vllm.exceptions import VLLMValidationError
    from vllm.renderers import hf
    from vllm.renderers.chat_utils import load_chat_template

    given = load_chat_template(chat_template)  # a path, or the template itself
    template = hf.resolve_chat_template(tokenizer, given, None, model_config=model_config)
    if template is None:
        logger.warning(NO_TEMPLATE)
        return PUBLISHED.bare, PUBLISHED.with_context
    content = hf.resolve_chat_template_content_format(
        template, None, "auto", tokenizer, model_config=model_config
    )

    def render(context: str) -> str:
        prompt: str = hf.safe_apply_chat_template(
            model_config,
            tokenizer,
            _messages(context, in_parts=content == "openai"),
            chat_template=template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return prompt

    try:
        bare = render("")
    except VLLMValidationError as error:
        raise ValueError(f"the checkpoint's chat_template fails: {error}") from error
    _check_audio(bare)
    try:
        with_context = render(CONTEXT)
    except VLLMValidationError:  # some templates refuse a system message
        with_context = ""
    if CONTEXT not in with_context:
        logger.warning("%s%s", NO_CONTEXT[0].upper(), NO_CONTEXT[1:])
        return bare, None
    _check_audio(with_context)
    return bare, with_context


def _messages(context: str, *, in_parts: bool) -> list[Any]:
    """Return a conversation as vLLM passes it to a template: contents are texts, or parts."""
    system = [{"type": "text", "text": context}] if in_parts else context
    audio = [{"type": "audio"}] if in_parts else AUDIO_PLACEHOLDER
    messages = [{"role": "system", "content": system}] if context else []
    return [*messages, {"role": "user", "content": audio}]


def _check_audio(prompt: str) -> None:
    """Raise ValueError for a prompt that has not one place for audio."""
    if (places := prompt.count(AUDIO_PAD)) != 1:
        raise ValueError(
            f"the checkpoint's chat_template renders {places} times {AUDIO_PAD} for a user "
            "message with one audio; it must be once. Use the template that the checkpoint was "
            "trained with."
        )
