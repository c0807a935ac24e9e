# SPDX-License-Identifier: Apache-2.0
"""The benchmarks compare only equal work, and their counting checkpoint counts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import counting
import end_of_turn
import gpu
import long_session
import offline
import pytest
import work
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from support.audio import speech
from support.checkpoints import CHECKPOINT, published_model
from support.servers import on_a_port
from work import UnequalWork, Work, check_work

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DONE = Work(clips=2, encoded_s=20.0, prompt_tokens=300, tokens=256)


def test_equal_work_is_compared():
    check_work({"in-tree": DONE, "ours": replace(DONE)}, clips=2, audio_s=20)
    check_work({"ours": replace(DONE, encoded_s=20.1)}, audio_s=20)  # a token for each clip


@pytest.mark.parametrize("name", ["clips", "encoded_s", "prompt_tokens", "tokens"])
def test_unequal_work_is_not_compared(name):
    other = replace(DONE, **{name: getattr(DONE, name) + 1})
    for works in ({"in-tree": DONE, "ours": other}, {"in-tree": other, "ours": DONE}):
        with pytest.raises(UnequalWork, match=f"unequal work: {name}"):
            check_work(works)


def test_loops_fail_also_where_all_sides_loop():
    looped = replace(DONE, clips=10, encoded_s=60.0)
    with pytest.raises(UnequalWork, match="in-tree was sent 2 clips and decoded 10"):
        check_work({"in-tree": looped, "ours": looped}, clips=2)
    with pytest.raises(UnequalWork, match="in-tree was sent 20 seconds and decoded 60"):
        check_work({"in-tree": looped, "ours": looped}, audio_s=20)


METRICS = """# HELP vllm:prompt_tokens_total
vllm:prompt_tokens_total{engine="0",model_name="model"} 200.0
vllm:prompt_tokens_total{engine="1",model_name="model"} 100.0
vllm:prompt_tokens_cached_total{engine="0",model_name="model"} 20.0
vllm:generation_tokens_total{engine="0",model_name="model"} 256.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="model"} 1.0
vllm:request_success_total{engine="1",finished_reason="length",model_name="model"} 1.0
vllm:request_success_created{engine="1",finished_reason="length",model_name="model"} 1.7e9
"""


def test_server_work_sums_over_engines():
    app = Starlette(routes=[Route("/metrics", lambda _: PlainTextResponse(METRICS))])
    with on_a_port(app) as address:
        done = work.server_work(address, text_tokens=10)
    assert done == replace(DONE, encoded_s=260 / 13)  # 300 - 20 cached - 2 x 10 of text


def test_engine_work_sums_over_steps():
    loggers = []
    count = work.EngineWork(
        SimpleNamespace(
            llm_engine=SimpleNamespace(logger_manager=SimpleNamespace(stat_loggers=loggers))
        )
    )
    details = SimpleNamespace(num_encoder_output_tokens=130)
    step = SimpleNamespace(finished_requests=[], num_prompt_tokens=150, num_generation_tokens=1)
    last = SimpleNamespace(finished_requests=[1], num_prompt_tokens=0, num_generation_tokens=9)
    loggers[0].record(SimpleNamespace(iteration_details=details), step)
    before = count.work
    loggers[0].record(SimpleNamespace(iteration_details=None), last)
    loggers[0].record(None, None)
    assert count.work == Work(1, 10.0, 150, 10)
    assert count.work - before == Work(1, 0.0, 0, 9)


def test_text_tokens_are_those_of_the_prompt():
    """``<|audio_pad|>`` aside: six control tokens, three names of roles, four newlines."""
    none, one = (work.num_text_tokens(CHECKPOINT, context) for context in ("", "Hamburg"))
    assert none < one and work.prompt("Hamburg").count("Hamburg") == 1


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"work": replace(DONE, tokens=255)}, "tokens 256 .LLM.generate., 255 .HTTP."),
        ({"work": replace(DONE, clips=3)}, "clips 2"),
        ({"work": None, "texts": ["a", "c"]}, "HTTP wrote other texts"),
    ],
)
def test_a_folder_is_transcribed_alike_by_all(other, error):
    first = offline.Pass(1.0, 1.0, ["a", "b"], DONE)
    offline.check_passes({"LLM.generate": [first], "HTTP": [first]}, audio_s=20.0)
    with pytest.raises(UnequalWork, match=error):
        offline.check_passes({"LLM.generate": [first], "HTTP": [first._replace(**other)]}, 20.0)


def test_checkpoints_count_any_audio(tmp_path):
    import torch
    from transformers import AutoTokenizer
    from transformers.models.qwen3_asr import Qwen3ASRFeatureExtractor

    folder = counting.counting_checkpoint("counting", tmp_path)
    model = published_model(folder)
    extract = Qwen3ASRFeatureExtractor()
    clips = [speech(2.0, seed=seed) for seed in range(2)]
    audio = extract(clips, sampling_rate=16_000, padding="longest", return_attention_mask=True)
    features = {"input_features": audio["input_features"]}
    features["input_features_mask"] = audio["attention_mask"]
    text = work.prompt().replace(work.AUDIO_TOKEN, work.AUDIO_TOKEN * 26)
    ids = AutoTokenizer.from_pretrained(folder)([text] * 2, return_tensors="pt").input_ids
    with torch.inference_mode():
        rows = model.generate(
            input_ids=ids, **features, do_sample=False, max_new_tokens=40, pad_token_id=0
        )[:, ids.shape[1] :].tolist()
    words = counting.words(folder)
    start = words.index(rows[0][0])
    expected = [words[(start + i) % len(words)] for i in range(40)]
    assert rows == [expected, expected]
    assert len(set(expected)) == 40


def test_a_plan_for_a_gpu_is_whole():
    """Its servers exist, each group has one baseline at most, and it fits eight minutes."""
    plan = json.loads((BENCHMARKS / "gpu.json").read_text())
    assert plan["deadline_s"] <= 480
    for step in plan["steps"]:
        gpu.check_step(step)


def test_long_sessions_lose_and_repeat_nothing():
    """Three minutes, twice; the whole day is the benchmark's."""
    found = long_session.rows(hours=0.05)
    assert [row["lost"] for row in found] == [0, 0], found
    assert max(row["drift s"] for row in found) <= 0.1, found


def test_waits_are_judged_against_equal_false_cuts():
    """Ten whole sentences, one cut at a pause inside, and ten cut ones, one judged complete."""
    whole = [end_of_turn.Outcome(True, wait_s, 0.3, "Go.") for wait_s in [0.2] * 9 + [-0.5]]
    cut = [end_of_turn.Outcome(False, wait_s, 4.1, "Go") for wait_s in [4.0] * 9 + [0.2]]
    row = end_of_turn.row("semantic_vad", whole + cut, whole)
    assert row["F1"] == pytest.approx(2 * 9 / (2 * 9 + 2))
    assert (row["whole but cut"], row["mean s"]) == (1, pytest.approx(0.2))
    assert end_of_turn.false_cuts([row["fixed s"]]) == pytest.approx(row["false cuts %"] / 100)
    assert end_of_turn.false_cuts([0.5]) == pytest.approx(0.5)
