# SPDX-License-Identifier: Apache-2.0
"""Diarizers: functions, and the adapters of libraries on stand-ins with the libraries' types."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from support.audio import dialogue

from qwen3_asr_vllm.diarizers import (
    DiarizerError,
    DiarizerThread,
    check_diarizer,
    diarize,
    load_diarizer,
)
from qwen3_asr_vllm.speakers import DiarizationOutput, DiarizationRequest, SpeakerTurn

SECONDS = 4
WAVEFORM = np.zeros(SECONDS * 16_000, np.float32)


def two(waveform, num_speakers):
    return [(0, 1, 0), (1, 2, num_speakers or 1)]


def request(**fields):
    return DiarizationRequest(WAVEFORM, **fields)


# ---- functions ----


def test_a_plain_function_is_a_diarizer():
    turns = (SpeakerTurn(0, 1, 0), SpeakerTurn(1, 2, 3))
    assert diarize(two, request(num_speakers=3)) == DiarizationOutput(turns)


def test_a_function_may_take_the_waveform_only():
    found = diarize(lambda waveform: [(0, len(waveform) / 16_000, "Ada")], request())
    assert found.turns == (SpeakerTurn(0, SECONDS, "Ada"),)


@pytest.mark.parametrize("name", ["min_speakers", "max_speakers"])
def test_bounds_that_no_function_takes_are_refused(name):
    with pytest.raises(DiarizerError, match=f"{name}: this diarizer does not take it"):
        diarize(two, request(**{name: 2}))


def test_bounds_reach_a_function_that_takes_them():
    def count(waveform, num_speakers=None, *, min_speakers=None, max_speakers=None):
        return [(0, 1, str((num_speakers, min_speakers, max_speakers)))]

    found = diarize(count, request(min_speakers=2, max_speakers=5))
    assert found.turns[0].speaker == "(None, 2, 5)"


def test_failures_are_errors_of_the_output(caplog):
    def fail(waveform, num_speakers):
        raise RuntimeError("out of memory")

    found = diarize(fail, request())
    assert found.error == "the diarizer failed (RuntimeError: out of memory)"
    assert "out of memory" in caplog.text


def test_wrong_turns_are_errors_of_the_output():
    found = diarize(lambda waveform: [(0, 1)], request())
    assert "a turn is (start, end, speaker)" in found.error


# ---- known speakers ----


class Tones:
    """Two voices, which are the signs of their samples."""

    same_voice = 0.9

    def __call__(self, waveform, num_speakers=None):
        return [(0, 2, 0), (2, 4, 1)]

    def embed(self, waveform):
        return [1.0, float(np.sign(waveform.mean()))]


SIGNS = np.repeat(np.float32([0.1, -0.1]), 32_000)


def known(**voices):
    known = {name: np.full(32_000, sign, np.float32) for name, sign in voices.items()}
    return diarize(Tones(), DiarizationRequest(SIGNS, known_speakers=known))


def test_known_voices_get_their_names():
    assert [t.speaker for t in known(Bea=-0.2, Ada=0.2).turns] == ["Ada", "Bea"]
    assert [t.speaker for t in known(Bea=-0.2).turns] == [0, "Bea"]


def test_an_absent_voice_gives_no_name():
    assert [t.speaker for t in known(Cleo=0.0).turns] == [0, 1]


def test_known_voices_need_embeddings():
    with pytest.raises(DiarizerError, match="no embeddings of voices"):
        diarize(two, request(known_speakers={"Ada": WAVEFORM}))


def test_voices_are_compared_where_they_speak_alone():
    class Overlapping(Tones):
        def __call__(self, waveform, num_speakers=None):
            return [(0, 4, 0), (1.9, 4, 1)]

    request = DiarizationRequest(SIGNS, known_speakers={"Ada": np.full(32_000, 0.2, np.float32)})
    assert diarize(Overlapping(), request).turns[0].speaker == "Ada"


def test_resemblyzer_finds_four_voices():
    pytest.importorskip("resemblyzer", reason="the weights of Resemblyzer are in its package")
    from support.voices import diarize as voices

    waveform, spoken = dialogue()
    first = {voice: (start, end) for start, end, voice, _ in reversed(spoken)}
    references = {
        voice: waveform[round(start * 16_000) : round(end * 16_000)]
        for voice, (start, end) in first.items()
    }
    found = diarize(voices, DiarizationRequest(waveform, 4, known_speakers=references))
    for start, end, voice, _ in spoken:
        middles = [t for t in found.turns if start <= (t.start + t.end) / 2 <= end]
        assert {turn.speaker for turn in middles} == {voice}


# ---- specs ----


@pytest.mark.parametrize("spec", ["", "nothing", "a/b/c", "1x:y", "x:"])
def test_an_unknown_spec_lists_the_kinds(spec):
    with pytest.raises(ValueError, match="is no diarizer; use a checkpoint such as pyannote/"):
        load_diarizer(spec)


def test_a_function_is_loaded_by_its_name(monkeypatch):
    module = SimpleNamespace(two=two, Kind=SimpleNamespace(inner=two), number=3)
    monkeypatch.setitem(sys.modules, "of_a_user", module)
    assert load_diarizer("of_a_user:two") is load_diarizer("of_a_user:Kind.inner") is two
    with pytest.raises(ImportError, match="of_a_user:three cannot be imported"):
        load_diarizer("of_a_user:three")
    with pytest.raises(ValueError, match="is 3, which is no function"):
        load_diarizer("of_a_user:number")


@pytest.mark.parametrize(
    ("spec", "module", "install"),
    [
        ("pyannote/speaker-diarization-community-1", "pyannote.audio", "[speakers]"),
        ("nvidia/diar_sortformer_4spk-v1", "nemo.collections.asr.models", "nemo_toolkit[asr]"),
        ("sherpa-onnx:{0},{0}", "sherpa_onnx", "pip install sherpa-onnx"),
    ],
)
def test_a_missing_library_says_how_to_install(tmp_path, monkeypatch, spec, module, install):
    (tmp_path / "m.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError) as raised:
        load_diarizer(spec.format(tmp_path / "m.onnx"))
    assert module in str(raised.value) and install in str(raised.value)


def test_missing_files_of_sherpa_onnx_are_named():
    with pytest.raises(OSError, match="segmentation.onnx of sherpa-onnx does not exist"):
        load_diarizer("sherpa-onnx:segmentation.onnx,embedding.onnx")
    with pytest.raises(ValueError, match="names no two files"):
        load_diarizer("sherpa-onnx:one.onnx")


# ---- adapters, on stand-ins ----


class Annotation:
    """The part of pyannote.core's Annotation that a diarizer reads."""

    def __init__(self, *turns):
        self.turns = turns

    def labels(self):
        return sorted({label for _, _, label in self.turns})

    def itertracks(self, yield_label):
        assert yield_label
        for number, (start, end, label) in enumerate(self.turns):
            yield SimpleNamespace(start=start, end=end), number, label


@pytest.fixture
def pyannote(monkeypatch):
    """A module whose pipeline finds two speakers, and notes the calls."""
    calls = []

    def pipeline(file, **limits):
        calls.append((file["waveform"].shape, file["sample_rate"], limits))
        found = Annotation((0.5, 1.0, "SPEAKER_01"), (1.0, 2.0, "SPEAKER_00"))
        vectors = np.array([[1.0, 2.0], [3.0, 4.0]])
        return SimpleNamespace(speaker_diarization=found, speaker_embeddings=vectors)

    pipelines = {"of/one": pipeline, "of/gated": None}
    kind = SimpleNamespace(from_pretrained=pipelines.get)
    monkeypatch.setitem(sys.modules, "pyannote", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "pyannote.audio", SimpleNamespace(Pipeline=kind))
    return calls


def test_pyannote_gives_turns_and_voices(pyannote):
    found = load_diarizer("of/one")
    turns = [(0.5, 1.0, 1), (1.0, 2.0, 0)]
    assert found(WAVEFORM, max_speakers=3) == turns
    counts = {"num_speakers": None, "min_speakers": None, "max_speakers": 3}
    assert pyannote == [((1, len(WAVEFORM)), 16_000, counts)]
    np.testing.assert_array_equal(found.embed(WAVEFORM), [1.0, 2.0])
    check_diarizer(found, counts, has_known=True)


def test_a_gated_checkpoint_says_where_to_accept(pyannote):
    with pytest.raises(OSError, match="https://hf.co/of/gated, and set HF_TOKEN"):
        load_diarizer("of/gated")


@pytest.fixture
def sortformer(monkeypatch):
    def diarize(*, audio, sample_rate, batch_size, verbose):
        assert (len(audio), sample_rate, batch_size, verbose) == (len(WAVEFORM), 16_000, 1, False)
        return [["0.080 1.500 speaker_0", "1.500 2.000 speaker_3"]]

    model = SimpleNamespace(
        diarize=diarize, eval=lambda: None, cfg=SimpleNamespace(max_num_of_spks=4)
    )
    kind = SimpleNamespace(from_pretrained=lambda name: model)
    models = SimpleNamespace(SortformerEncLabelModel=kind)
    for name in ("nemo", "nemo.collections", "nemo.collections.asr"):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace())
    monkeypatch.setitem(sys.modules, "nemo.collections.asr.models", models)
    return load_diarizer("nvidia/diar_sortformer_4spk-v1")


def test_sortformer_counts_up_to_four(sortformer):
    found = diarize(sortformer, request())
    assert found.turns == (SpeakerTurn(0.08, 1.5, 0), SpeakerTurn(1.5, 2.0, 3))
    with pytest.raises(DiarizerError, match="num_speakers is 5; this diarizer finds at most 4"):
        diarize(sortformer, request(num_speakers=5))
    with pytest.raises(DiarizerError, match="max_speakers: this diarizer does not take it"):
        diarize(sortformer, request(max_speakers=2))


def test_sherpa_onnx_keeps_to_bounds(tmp_path, monkeypatch):
    """The stand-in finds as many speakers as its configuration says, else three."""

    def kind(**fields):
        return SimpleNamespace(**fields)

    class Diarization:
        def __init__(self, config):
            self.set_config(config)

        def set_config(self, config):
            self.number = config.clustering.num_clusters

        def process(self, waveform):
            number = 3 if self.number < 0 else self.number
            turns = [SimpleNamespace(start=i, end=i + 1, speaker=i) for i in range(number)]
            return SimpleNamespace(sort_by_start_time=lambda: turns)

    names = (
        "OfflineSpeakerSegmentationPyannoteModelConfig OfflineSpeakerSegmentationModelConfig "
        "SpeakerEmbeddingExtractorConfig FastClusteringConfig SpeakerEmbeddingExtractor"
    ).split()
    library = SimpleNamespace(**{name: kind for name in names})
    library.SpeakerEmbeddingExtractor = lambda config: None
    library.OfflineSpeakerDiarizationConfig = lambda **f: kind(validate=lambda: True, **f)
    library.OfflineSpeakerDiarization = Diarization
    monkeypatch.setitem(sys.modules, "sherpa_onnx", library)
    (file := tmp_path / "m.onnx").write_bytes(b"")
    found = load_diarizer(f"sherpa-onnx:{file},{file}")
    counts = [
        {},
        {"num_speakers": 2},
        {"max_speakers": 2},
        {"min_speakers": 4},
        {"max_speakers": 9},
    ]
    assert [len(found(WAVEFORM, **count)) for count in counts] == [3, 2, 2, 4, 3]


# ---- beside an engine ----


def test_a_thread_delivers_while_it_is_stepped():
    thread, delivered = DiarizerThread(two), []
    thread.submit("a", request(), delivered.append)
    thread.submit("b", request(), delivered.append)
    assert thread.abort("b") and not thread.abort("c")
    while not delivered:
        thread.step(is_alone=True)
    thread.step(is_alone=False)
    assert [output.turns[0].speaker for output in delivered] == [0]
