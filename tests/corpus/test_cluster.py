# SPDX-License-Identifier: Apache-2.0
"""A corpus on Ray Data: two engines, of which one is killed. Needs pip install '.[ray]'."""

from __future__ import annotations

import json

import psutil
import pytest
from support.audio import DATA, heldout
from support.checkpoints import CHECKPOINT

from qwen3_asr_vllm.corpus.ray_data import Summary, done_keys, transcribe_on_ray

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.vllm

ENGINE = {"dtype": "float32", "enforce_eager": True, "max_model_len": 1024, "max_num_seqs": 8}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Ray on this machine, without its dashboard and with little memory of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two engines, one memory node
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        sizes = {"num_cpus": 4, "object_store_memory": 100 << 20}
        ray.init(include_dashboard=False, log_to_driver=False, **sizes)
        yield
        ray.shutdown()


@pytest.fixture
def manifest(tmp_path):
    """96 recordings, and one that is not there."""
    rows = [row for row in heldout() if row["text"]]
    lines = []
    for index in range(96):
        link = tmp_path / f"{index:02d}.flac"
        link.symlink_to(DATA / "heldout" / rows[index % len(rows)]["audio_filepath"])
        lines.append({"audio_filepath": link.name, "text": rows[index % len(rows)]["text"]})
    lines.append({"audio_filepath": "gone.wav", "text": ""})
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def actors():
    """The processes of ours that Ray runs workers in."""
    family = {p.pid for p in psutil.Process().children(recursive=True)}
    named = psutil.process_iter(["cmdline"])  # which passes over those that end meanwhile
    ours = [p for p in named if p.pid in family]
    return [p for p in ours if "ray::MapWorker" in (p.info["cmdline"] or [""])[0]]


def engine_of(actor):
    """The process that its worker waits for, of those that vLLM starts."""
    return next(p for p in actor.children(recursive=True) if "EngineCor" in p.name())


def rows(folder):
    return [json.loads(line) for s in folder.glob("shard-*.jsonl") for line in s.open()]


def test_a_killed_engine_loses_and_repeats_nothing(manifest, tmp_path):
    """An earlier run has done 16 of 96; of two workers one loses its engine after a first batch,
    and one is killed itself when half is done."""
    out = tmp_path / "out"
    out.mkdir()
    done = [{"audio_filepath": f"{i:02d}.flac", "pred_text": "Done before."} for i in range(16)]
    (out / "shard-earlier.jsonl").write_text("".join(json.dumps(row) + "\n" for row in done))
    killed = []

    def kill_one(progress):
        assert progress.recordings == 81 and progress.recordings_done % 8 in (0, 1)
        if not killed:
            killed.append(engine_of(actors()[0]))
        elif len(killed) == 1 and progress.recordings_done >= 40:
            killed.append(actors()[0])
        else:
            return
        killed[-1].kill()

    summary = transcribe_on_ray(
        [str(manifest)],
        out,
        model=str(CHECKPOINT),
        num_workers=2,
        num_gpus=0,
        batch_size=8,
        engine_options=ENGINE,
        progress=kill_one,
    )
    assert len(killed) == 2
    assert (summary.num_done, summary.num_skipped) == (80, 16)
    assert ["gone.wav" in source for source in summary.failed] == [True]
    found = rows(out)
    assert sorted(row["audio_filepath"] for row in found) == [f"{i:02d}.flac" for i in range(96)]
    assert sum(row["pred_text"] == "Done before." for row in found) == 16
    assert sum(row["pred_text"] == row.get("text") for row in found) > 30  # the tiny checkpoint's
    assert len(set(done_keys(out))) == 96


def test_a_finished_corpus_starts_no_engine(tmp_path):
    (tmp_path / "a.txt").write_text("a.wav\n")
    (tmp_path / "out").mkdir()
    row = json.dumps({"audio_filepath": "a.wav", "pred_text": "Hi."})
    (tmp_path / "out" / "shard-1.jsonl").write_text(row + "\n")
    summary = transcribe_on_ray(
        [str(tmp_path / "a.txt")], tmp_path / "out", model="no/model", num_workers=2
    )
    assert summary == Summary(num_done=0, num_skipped=1, seconds=0.0, failed={})
