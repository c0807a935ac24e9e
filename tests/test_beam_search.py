# SPDX-License-Identifier: Apache-2.0
"""Beam search and probabilities of words, through the one engine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.audio import HELDOUT, HELLO, RECORDING, heldout
from support.checkpoints import CHECKPOINT, published_model
from support.checks import assert_timed
from support.fake_engine import ScoringEngine, rendered, tokenizer

from qwen3_asr_vllm import beam_requests
from qwen3_asr_vllm.audio import load_audio
from qwen3_asr_vllm.batch_engine import BatchEngine
from qwen3_asr_vllm.decoding import Decoding
from qwen3_asr_vllm.languages import LANGUAGES
from qwen3_asr_vllm.options import Beams
from qwen3_asr_vllm.prompt import build_prompt, parse_output
from qwen3_asr_vllm.transcription import EngineRequest

pytestmark = pytest.mark.vllm

SEARCH = {"use_beam_search": True, "n": 4, "length_penalty": 0.7}


@pytest.fixture(scope="module")
def by_transformers():
    """Return a function that gives the text of transformers' beam search with ``SEARCH``."""
    from transformers import AutoTokenizer
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    reference, tokenizer = published_model(), AutoTokenizer.from_pretrained(CHECKPOINT)
    extract = Qwen3ASRFeatureExtractor()

    @torch.inference_mode()
    def text(waveform):
        mel = extract(waveform, sampling_rate=16_000, padding="longest", return_attention_mask=True)
        features = mel["input_features"], mel["attention_mask"]
        pads = "<|audio_pad|>" * len(reference.get_audio_features(*features).pooler_output)
        ids = torch.tensor([tokenizer.encode(build_prompt().replace("<|audio_pad|>", pads))])
        output = reference.generate(
            input_ids=ids,
            input_features=features[0],
            input_features_mask=features[1],
            num_beams=SEARCH["n"],
            length_penalty=SEARCH["length_penalty"],
            max_new_tokens=200,
            do_sample=False,
            eos_token_id=[tokenizer.pad_token_id, tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
        )
        return parse_output(tokenizer.decode(output[0, ids.shape[1] :], True)).text

    return text


class ScoringLLM:
    """The parts of ``vllm.LLM`` that a beam search uses, over a ``ScoringEngine``."""

    def __init__(self, text):
        scoring = ScoringEngine(text)
        self.scored, self.model_config = scoring.scored, scoring.model_config
        scheduler = SimpleNamespace(max_num_seqs=4)
        self.vllm_config = SimpleNamespace(scheduler_config=scheduler)
        self.llm_engine, self.get_tokenizer = self, tokenizer
        self.renderer = SimpleNamespace(render_cmpl=lambda prompts: [rendered() for _ in prompts])
        self.waiting = {}

    def _resolve_mm_lora(self, prompt, lora_request):
        return lora_request

    def add_request(self, request_id, prompt, params, lora_request=None):
        self.waiting[request_id] = (prompt, params, request_id)

    def step(self):
        """Finish the latest request first: outputs come in any order."""
        request_id, asked = self.waiting.popitem()
        return [self.scored(*asked)]

    def abort_request(self, request_ids):
        for request_id in request_ids:
            del self.waiting[request_id]


def begin_searches(engines, outputs):
    decoding = Decoding(max_tokens=99, wants_logprobs=True, beams=Beams(4))
    request = EngineRequest(np.zeros(16_000, np.float32), 0, 0.0, decoding)
    return [engines.submit(request, outputs.append) for _ in range(2)]


def test_searches_run_side_by_side():
    llm, outputs = ScoringLLM("language English<asr_text>Good morning."), []
    engines = BatchEngine(llm, None, LANGUAGES)
    begin_searches(engines, outputs)
    while llm.waiting:
        engines.step()
    assert [output.text for output in outputs] == ["language English<asr_text>Good morning."] * 2
    assert "".join(token.text for token in outputs[0].tokens) == outputs[0].text


def test_searches_score_declared_languages_after_special_tokens():
    special = next(token for token in tokenizer().all_special_tokens if "audio" in token)
    text = f"{special}language English<asr_text>Good morning."
    outputs, languages = [], ("None", "English", "Hebrew")
    engines = BatchEngine(ScoringLLM(text), None, LANGUAGES.extended({"he": "Hebrew"}))
    decoding = Decoding(99, beams=Beams(4), scored_languages=languages, special_tokens=(special,))
    engines.submit(EngineRequest(np.zeros(16_000, np.float32), 0, 0.0, decoding), outputs.append)
    while not outputs:
        engines.step()
    assert outputs[0].text == text
    assert outputs[0].language_logprobs == {"English": -0.01, "Hebrew": -5.0, "None": -5.0}


def test_unused_defaults_of_a_checkpoint_are_named(monkeypatch):
    config = ScoringEngine("", repetition_penalty=1.1, temperature=0.6, num_beams=4).model_config
    said = []
    monkeypatch.setattr(
        beam_requests.logger, "warning", lambda text, *values: said.append(text % values)
    )
    beam_requests.BeamSearcher.of(config, tokenizer(), {})
    assert said == [
        "Beam search does not use the checkpoint's temperature of 0.6.",
        "Beam search does not use the checkpoint's repetition_penalty of 1.1.",
    ]


def test_aborting_a_search_aborts_its_requests():
    llm, outputs = ScoringLLM("language English<asr_text>Good morning."), []
    engines = BatchEngine(llm, None, LANGUAGES)
    ids = begin_searches(engines, outputs)
    for _ in range(3):
        engines.step()
    engines.abort(ids)
    assert not llm.waiting and not outputs


def test_texts_are_those_of_transformers_beams(model, by_transformers):
    spoken = [row for row in heldout() if row["text"]][::24]
    clips = [load_audio(HELDOUT / row["audio_filepath"]) for row in spoken]
    results = list(model.transcribe(clips, **SEARCH))
    assert [r.transcript.text for r in results] == list(map(by_transformers, clips))


def test_the_encoder_runs_once_per_clip(model, monkeypatch):
    """Every request of a search has the hash of the clip, by which vLLM caches the encoder."""
    engine, prompts = model.llm.llm_engine, []
    add = engine.add_request

    def spy(request_id, prompt, params, **options):
        prompts.append(prompt)
        return add(request_id, prompt, params, **options)

    monkeypatch.setattr(engine, "add_request", spy)
    greedy = model.transcribe(HELLO, confidences=True)
    (whole,) = prompts
    prompts.clear()
    searched = model.transcribe(HELLO, **SEARCH)
    assert searched.text == greedy.text
    hashes = {tuple(prompt["mm_hashes"]["audio"]) for prompt in prompts}
    assert len(hashes) == 1 and tuple(whole["mm_hashes"]["audio"]) not in hashes
    num_tokens = sum(len(segment.tokens) for segment in greedy.segments)
    assert 4 < len(prompts) < 3 * num_tokens


def test_a_searched_recording_has_words_and_confidences(model):
    transcript = model.transcribe(
        RECORDING, max_clip_s=12, word_timestamps=True, confidences=True, **SEARCH
    )
    greedy = model.transcribe(RECORDING, max_clip_s=12, confidences=True)
    assert transcript.languages == greedy.languages == ("English", "German", "Chinese")
    assert_timed(transcript)
    tokens = [token for segment in transcript.segments for token in segment.tokens]
    written = "".join(token.text for token in tokens)
    assert written.replace(" ", "") == transcript.text.replace(" ", "")  # some join two clips
    for segment, same in zip(transcript.segments, greedy.segments, strict=True):
        if same.avg_logprob is not None:  # a token that begins in the segment before has it all
            assert segment.avg_logprob == pytest.approx(same.avg_logprob, abs=0.05)
        assert segment.no_speech_prob == pytest.approx(same.no_speech_prob, abs=1e-3)
        assert segment.language_probability == pytest.approx(same.language_probability, abs=1e-3)
    assert all(0 < word.probability <= 1 for word in transcript.words)


def test_word_probabilities_lie_between_those_of_tokens(model):
    transcript = model.transcribe(HELLO, word_timestamps=True, confidences=True)
    for segment in transcript.segments:
        logprobs = [token.logprob for token in segment.tokens]
        for word in segment.words:
            assert min(logprobs) <= np.log(word.probability) <= max(logprobs) + 1e-6
    without = model.transcribe(HELLO, word_timestamps=True)
    assert {word.probability for word in without.words} == {None}


def test_candidate_languages_hold_in_a_search(model):
    among = model.transcribe(HELLO, languages=["Chinese", "German"], **SEARCH)
    assert among.language in ("Chinese", "German")
    assert among.text == model.transcribe(HELLO, language=among.language, **SEARCH).text


def test_an_abandoned_search_leaves_the_engine_free(model):
    results = model.transcribe([HELLO] * 3, in_order=False, **SEARCH)
    next(results)
    results.close()
    assert not model.llm.llm_engine.has_unfinished_requests()
    assert model.transcribe(HELLO, **SEARCH).text == model.transcribe(HELLO).text
