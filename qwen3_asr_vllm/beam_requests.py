# SPDX-License-Identifier: Apache-2.0
"""A beam search as requests of vLLM, and its result as an output of vLLM.

    rendered prompt  -- yields -->   [(prompt with the tokens of a beam, SamplingParams), ...]
                     <-- is sent --  [RequestOutput, ...]  in the same order
                     -- returns -->  RequestOutput

All prompts hold the same rendered clip under the same hash: the encoder runs once, and vLLM's
prefix cache keeps what beams share.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .beams import Hypothesis, Scored, num_scores, search
from .decoding import Decoding
from .engine import sampling_params
from .generation import UNSEARCHED, generation_defaults
from .rounds import Rounds, Steps

if TYPE_CHECKING:
    from vllm.config import ModelConfig
    from vllm.logprobs import Logprob
    from vllm.outputs import RequestOutput
    from vllm.sampling_params import SamplingParams

logger = logging.getLogger(f"vllm.{__name__}")  # a child of vLLM's, whose handler prints


@dataclass(frozen=True)
class BeamSearcher:
    """Searches the outputs of one checkpoint."""

    tokenizer: Any
    end_ids: frozenset[int]  # tokens that end an output
    language_ids: Mapping[str, int]  # those of ``language_token_ids``
    max_model_len: int

    @classmethod
    def of(
        cls, model_config: ModelConfig, tokenizer: Any, language_ids: Mapping[str, int]
    ) -> BeamSearcher:
        """Read the end tokens of a checkpoint; warns about defaults that a search does not use."""
        given = model_config.try_get_generation_config().get("eos_token_id") or ()
        ids = {given} if isinstance(given, int) else set(given)
        defaults = generation_defaults(model_config)
        for name, neutral in UNSEARCHED.items():
            if (value := defaults.get(name, neutral)) != neutral:
                logger.warning("Beam search does not use the checkpoint's %s of %g.", name, value)
        return cls(
            tokenizer=tokenizer,
            end_ids=frozenset(ids | {tokenizer.eos_token_id} - {None}),
            language_ids=language_ids,
            max_model_len=model_config.max_model_len,
        )

    def search(self, prompt: Any, decoding: Decoding) -> Rounds[RequestOutput]:
        """Search for the best output of a rendered prompt with ``decoding.beams``.

        Its log-probabilities hold those of the scored languages at the token that names the
        language, as an ordinary output does.
        """
        from vllm.logprobs import Logprob

        best = yield from self._best(prompt, decoding)
        tokens = [token for token in best.tokens if token not in self.end_ids]
        texts = token_texts(tokens, self.tokenizer)
        scores = [
            {token: Logprob(logprob, decoded_token=text)}
            for token, logprob, text in zip(tokens, best.logprobs, texts, strict=False)
        ]
        slot = _language_slot(texts, decoding.special_tokens)
        if decoding.scored_languages and slot is not None:
            asked = replace(decoding, max_tokens=1)
            params = _whole(sampling_params(asked, self.language_ids))
            (output,) = yield [(_continued(prompt, tokens[:slot]), params)]
            for token, score in output.outputs[0].logprobs[0].items():
                scores[slot].setdefault(token, score)  # the written token stays the first
        return _output(prompt, tokens, "".join(texts), scores, best.finish_reason)

    def _best(self, prompt: Any, decoding: Decoding) -> Rounds[Hypothesis]:
        """Run the search, each prefix of which is a request."""
        assert decoding.beams is not None
        room = self.max_model_len - len(prompt["prompt_token_ids"])
        max_tokens = max(1, min(decoding.max_tokens, room))
        num = num_scores(decoding.beams, self.end_ids)
        steps = Steps(search(decoding.beams, end_ids=self.end_ids, max_tokens=max_tokens))
        while steps.requests:
            outputs = yield [
                (_continued(prompt, prefix.tokens), _params(prefix.max_tokens, num))
                for prefix in steps.requests
            ]
            steps.send(list(map(_scored, outputs)))
        return steps.result


def _continued(prompt: Any, tokens: Sequence[int]) -> Any:
    """Return the rendered prompt followed by the tokens of a beam."""
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchSequence

    all_tokens = [*prompt["prompt_token_ids"], *tokens]
    return BeamSearchSequence(prompt, tokens=all_tokens, logprobs=[]).get_prompt()


def _params(max_tokens: int, num_scores: int) -> SamplingParams:
    """Return the parameters of a request that scores ``num_scores`` tokens at each position."""
    params = sampling_params(Decoding(max_tokens), {})
    params.logprobs, params.flat_logprobs = num_scores, True
    params.detokenize = False
    return _whole(params)


def _whole(params: SamplingParams) -> SamplingParams:
    """Make the output come in one piece."""
    from vllm.sampling_params import RequestOutputKind

    params.output_kind = RequestOutputKind.FINAL_ONLY
    return params


def _scored(output: RequestOutput) -> Scored:
    completion = output.outputs[0]
    logprobs: Any = completion.logprobs  # FlatLogprobs: requested so by sampling_params
    spans = zip(logprobs.start_indices, logprobs.end_indices, strict=True)
    return Scored(
        completion.token_ids,
        [dict(zip(logprobs.token_ids[a:b], logprobs.logprobs[a:b], strict=True)) for a, b in spans],
    )


def token_texts(tokens: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text of each token, special ones too; joined, they are the text of all.

    Where a character takes several tokens, the last one has it, and the others are empty.
    """
    texts: list[str] = []
    pending: list[int] = []
    for number, token in enumerate(tokens, 1):
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        is_complete = not text.endswith("\ufffd") or number == len(tokens)
        texts.append(text if is_complete else "")
        if is_complete:
            pending.clear()
    return texts


def _language_slot(texts: Sequence[str], special_tokens: Collection[str]) -> int | None:
    """Return the index of the token that names the language; None without a header.

    Special tokens may stand before the header.
    """
    header = ""
    for index, text in enumerate(texts):
        if text in special_tokens:
            continue
        if header.strip() == "language":
            return index
        header += text
        if not "language".startswith(header.strip()):
            break
    return None


def _output(
    prompt: Any,
    tokens: list[int],
    text: str,
    scores: list[dict[int, Logprob]],
    finish_reason: str | None,
) -> RequestOutput:
    from vllm.outputs import CompletionOutput, RequestOutput

    completion = CompletionOutput(
        index=0,
        text=text,
        token_ids=tokens,
        cumulative_logprob=None,
        logprobs=scores,
        finish_reason=finish_reason,
    )
    return RequestOutput(
        request_id="",
        prompt=None,
        prompt_token_ids=prompt["prompt_token_ids"],
        prompt_logprobs=None,
        outputs=[completion],
        finished=True,
    )
