# SPDX-License-Identifier: Apache-2.0
"""Diarizers: libraries that find who speaks when, behind one function.

    diarizer(waveform, num_speakers) -> [(start, end, speaker), ...]

``waveform`` is the whole recording, ``num_speakers`` None where it is unknown; times are seconds,
and a speaker is a name or, for a voice without one, a number. Any such function is a diarizer. It
may also take ``min_speakers`` and ``max_speakers``, and have a method ``embed(waveform)`` that
returns a vector of a voice, by which known speakers are found: two vectors whose cosine is at least
its ``same_voice`` are of one voice.

The libraries are imported when a diarizer is loaded. None of them is a dependency.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from .geometry import SAMPLE_RATE
from .options import DEFAULT_DIARIZER, MAX_SPEAKERS
from .speakers import DiarizationOutput, DiarizationRequest, Label, SpeakerTurn, read_turns

Diarizer: TypeAlias = Callable[..., Iterable[tuple[float, float, Label]]]
Deliver: TypeAlias = Callable[[DiarizationOutput], None]

MIN_VOICE_S, MAX_VOICE_S = 1.0, 30.0  # seconds of a voice that are compared
SAME_VOICE = 0.5  # least cosine of two vectors of one voice, unless the diarizer has its own

POLL_S = 0.05  # seconds that an idle engine waits for its diarizer before it looks for other work

logger = logging.getLogger(__name__)


class DiarizerError(ValueError):
    """A diarizer that cannot do what it is asked; the message says what it can."""


def load_diarizer(spec: str) -> Diarizer:
    """Load a diarizer: a checkpoint of a library, or a function of a Python module.

        pyannote/speaker-diarization-community-1, or a folder with a config.yaml: pyannote.audio
        nvidia/diar_sortformer_4spk-v1, or a .nemo file: NeMo's Sortformer
        sherpa-onnx:segmentation.onnx,embedding.onnx: two files for sherpa-onnx
        package.module:function

    Raises ImportError, which says what to install, OSError for a checkpoint that cannot be had,
    ValueError for another spec.
    """
    library, _, rest = spec.partition(":")
    if library == "sherpa-onnx":
        return SherpaOnnx(*_two_files(rest))
    if os.path.exists(spec) and spec.endswith(".nemo") or spec.startswith("nvidia/"):
        return Sortformer(spec)
    if os.path.exists(spec) or (spec.count("/") == 1 and not rest):
        return Pyannote(spec)
    if rest and all(part.isidentifier() for part in (*library.split("."), *rest.split("."))):
        return _function(library, rest)
    raise ValueError(
        f"{spec!r} is no diarizer; use a checkpoint such as {DEFAULT_DIARIZER}, "
        "sherpa-onnx:SEGMENTATION.onnx,EMBEDDING.onnx, or a function: package.module:function."
    )


def _function(module: str, name: str) -> Diarizer:
    try:
        found: Any = import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"the diarizer {module}:{name} cannot be imported: {error}") from error
    if not callable(found):
        raise ValueError(f"the diarizer {module}:{name} is {found!r:.80}, which is no function.")
    return found  # type: ignore[no-any-return]


def _two_files(names: str) -> tuple[str, str]:
    segmentation, _, embedding = names.partition(",")
    if not (segmentation and embedding):
        raise ValueError(
            f"sherpa-onnx:{names} names no two files; use "
            "sherpa-onnx:SEGMENTATION.onnx,EMBEDDING.onnx."
        )
    for name in (segmentation, embedding):
        if not Path(name).is_file():
            raise OSError(f"the file {name} of sherpa-onnx does not exist.")
    return segmentation, embedding


def _import(module: str, install: str) -> Any:
    try:
        return import_module(module)
    except (ImportError, OSError) as error:  # OSError: a library of another build
        reason = f"{module} cannot be imported ({error})"
        raise ImportError(f"{reason}; install it with: {install}") from error


# one request ----------------------------------------------------------------------------------


def check_diarizer(
    diarizer: Diarizer, limits: Mapping[str, int | None], *, has_known: bool = False
) -> None:
    """Raise DiarizerError for a number of speakers, or known voices, that it cannot honour."""
    given = {name: value for name, value in limits.items() if value is not None}
    most = getattr(diarizer, "most_speakers", None)
    for name, value in given.items():
        if most is not None and value > most:
            raise DiarizerError(
                f"{name} is {value}; this diarizer finds at most {most} speakers. Use another one."
            )
        if name not in _parameters(diarizer):
            raise DiarizerError(f"{name}: this diarizer does not take it; leave it out.")
    if has_known and not hasattr(diarizer, "embed"):
        raise DiarizerError(
            "known speakers: this diarizer has no embeddings of voices to find them by; "
            "leave them out, or use pyannote.audio or sherpa-onnx."
        )


def _parameters(diarizer: Diarizer) -> set[str]:
    """Return the numbers of speakers that a diarizer takes; the second parameter is the first."""
    try:
        parameters = list(inspect.signature(diarizer).parameters.values())
    except (TypeError, ValueError):  # such as a function in C
        return {"num_speakers"}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {"num_speakers", "min_speakers", "max_speakers"}
    numbers = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    return {*numbers, *(["num_speakers"] if len(parameters) > 1 else [])}


def diarize(diarizer: Diarizer, request: DiarizationRequest) -> DiarizationOutput:
    """Return the turns of one recording, with the names of its known speakers.

    A diarizer that fails gives an output with an ``error``. Raises DiarizerError as
    ``check_diarizer`` does.
    """
    limits = {"num_speakers": request.num_speakers} | request.bounds
    check_diarizer(diarizer, limits, has_known=bool(request.known_speakers))
    numbers = [request.num_speakers] if "num_speakers" in _parameters(diarizer) else []
    duration = len(request.waveform) / SAMPLE_RATE
    try:
        turns = read_turns(diarizer(request.waveform, *numbers, **request.bounds), duration)
        if request.known_speakers:
            turns = _with_known_names(diarizer, request, turns)
    except DiarizerError:
        raise
    except Exception as error:  # of any library
        logger.exception("The diarizer failed.")
        return DiarizationOutput(error=f"the diarizer failed ({type(error).__name__}: {error})")
    return DiarizationOutput(tuple(turns))


def _with_known_names(
    diarizer: Any, request: DiarizationRequest, turns: Sequence[SpeakerTurn]
) -> list[SpeakerTurn]:
    """Name the voices that are those of known speakers: each name once, the likeliest first."""
    embed = partial(_embed, diarizer)
    labels = list(dict.fromkeys(turn.speaker for turn in turns))
    voices = [embed(_voice(request.waveform, turns, label)) for label in labels]
    known = [embed(voice) for voice in request.known_speakers.values()]
    likeness = np.array([[_cosine(voice, own) for own in known] for voice in voices])
    least = getattr(diarizer, "same_voice", SAME_VOICE)
    names: dict[Label, str] = {}
    while likeness.size and likeness.max() >= least:
        voice, number = np.unravel_index(likeness.argmax(), likeness.shape)
        names[labels[voice]] = list(request.known_speakers)[number]
        likeness[voice, :] = likeness[:, number] = -np.inf
    return [turn._replace(speaker=names.get(turn.speaker, turn.speaker)) for turn in turns]


def _embed(diarizer: Any, voice: np.ndarray) -> np.ndarray | None:
    """Return the vector of a voice; None for one that is too short."""
    if len(voice) < MIN_VOICE_S * SAMPLE_RATE:
        return None
    return np.asarray(diarizer.embed(voice[: int(MAX_VOICE_S * SAMPLE_RATE)]), np.float32).ravel()


def _voice(waveform: np.ndarray, turns: Sequence[SpeakerTurn], label: Label) -> np.ndarray:
    """Return the speech of one speaker, the longest turns first, where no other speaks."""
    alone = np.zeros(len(waveform), bool)
    for turn in turns:
        if turn.speaker == label:
            alone[_samples(turn)] = True
    for turn in turns:
        if turn.speaker != label:
            alone[_samples(turn)] = False
    own = sorted((t for t in turns if t.speaker == label), key=lambda t: t.start - t.end)
    parts = [waveform[_samples(turn)][alone[_samples(turn)]] for turn in own]
    return np.concatenate(parts)[: int(MAX_VOICE_S * SAMPLE_RATE)]


def _samples(turn: SpeakerTurn) -> slice:
    return slice(round(turn.start * SAMPLE_RATE), round(turn.end * SAMPLE_RATE))


def _cosine(left: np.ndarray | None, right: np.ndarray | None) -> float:
    if left is None or right is None:
        return -np.inf
    norm = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / norm if norm > 0 else -np.inf


class DiarizerThread:
    """Runs a diarizer beside an engine, one recording at a time, for a caller who steps."""

    def __init__(self, diarizer: Diarizer | None) -> None:
        self._diarizer = diarizer
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="diarize")
        self._running: dict[str, tuple[Future[DiarizationOutput], Deliver]] = {}

    def submit(self, request_id: str, request: DiarizationRequest, deliver: Deliver) -> None:
        assert self._diarizer is not None  # checked before the request
        self._running[request_id] = self._pool.submit(diarize, self._diarizer, request), deliver

    def step(self, *, is_alone: bool) -> None:
        """Deliver the outputs that are done; wait briefly for one if nothing else runs."""
        futures = [future for future, _ in self._running.values()]
        if is_alone and futures:
            wait(futures, POLL_S, FIRST_COMPLETED)
        for request_id in [i for i, (future, _) in self._running.items() if future.done()]:
            future, deliver = self._running.pop(request_id)
            deliver(future.result())

    def abort(self, request_id: str) -> bool:
        """Drop a request; returns whether it was one. One that runs already ends in vain."""
        future, _ = self._running.pop(request_id, (None, None))
        return future is not None and (future.cancel() or True)


# libraries ------------------------------------------------------------------------------------


class Pyannote:
    """A pipeline of pyannote.audio 4, such as pyannote/speaker-diarization-community-1.

    It runs on the GPU if there is one. pyannote.audio's telemetry is switched off.
    """

    same_voice = 0.4

    def __init__(self, checkpoint: str) -> None:
        os.environ.setdefault("PYANNOTE_METRICS_ENABLED", "0")
        pipelines = _import("pyannote.audio", "pip install 'qwen3-asr-vllm[speakers]'")
        import torch

        try:
            pipeline = pipelines.Pipeline.from_pretrained(checkpoint)
        except Exception as error:  # of the hub, or of a config that is none
            raise OSError(f"the diarizer {checkpoint} cannot be loaded: {error}") from error
        if pipeline is None:  # pyannote.audio has printed why
            raise OSError(
                f"the diarizer {checkpoint} is gated or does not exist: accept its conditions at "
                f"https://hf.co/{checkpoint}, and set HF_TOKEN; or name a folder with a copy."
            )
        if torch.cuda.is_available():
            pipeline.to(torch.device("cuda"))
        self._pipeline, self._torch = pipeline, torch

    def __call__(
        self,
        waveform: np.ndarray,
        num_speakers: int | None = None,
        *,
        min_speakers: int | None = None,
        max_speakers: int | None = None,
    ) -> list[tuple[float, float, Label]]:
        annotation = self._run(
            waveform,
            num_speakers=num_speakers,
            min_speakers=min_speakers,
            max_speakers=max_speakers,
        ).speaker_diarization
        numbers = {label: number for number, label in enumerate(annotation.labels())}
        tracks = annotation.itertracks(yield_label=True)
        return [(turn.start, turn.end, numbers[label]) for turn, _, label in tracks]

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """Return the pipeline's own vector of a voice: that of its only speaker."""
        vectors = self._run(waveform, num_speakers=1).speaker_embeddings
        if vectors is None or not len(vectors):
            raise DiarizerError("known speakers: no voice was found in a reference.")
        return np.asarray(vectors[0])

    def _run(self, waveform: np.ndarray, **limits: int | None) -> Any:
        samples = self._torch.from_numpy(np.array(waveform, np.float32))[None]
        return self._pipeline({"waveform": samples, "sample_rate": SAMPLE_RATE}, **limits)


class SherpaOnnx:
    """sherpa-onnx: a segmentation model of pyannote and a model of voices, as ONNX files."""

    same_voice = 0.5

    def __init__(self, segmentation: str, embedding: str) -> None:
        self._library = library = _import("sherpa_onnx", "pip install sherpa-onnx")
        threads = max(1, (os.cpu_count() or 1) // 2)
        pyannote = library.OfflineSpeakerSegmentationPyannoteModelConfig(model=segmentation)
        self._segmentation = library.OfflineSpeakerSegmentationModelConfig(
            pyannote=pyannote, num_threads=threads
        )
        self._voices = library.SpeakerEmbeddingExtractorConfig(model=embedding, num_threads=threads)
        config = self._config(None)
        if not config.validate():
            raise OSError(f"sherpa-onnx cannot read {segmentation} or {embedding}.")
        self._diarization = library.OfflineSpeakerDiarization(config)
        self._extractor = library.SpeakerEmbeddingExtractor(self._voices)

    def __call__(
        self,
        waveform: np.ndarray,
        num_speakers: int | None = None,
        *,
        min_speakers: int | None = None,
        max_speakers: int | None = None,
    ) -> list[tuple[float, float, Label]]:
        turns = self._run(waveform, num_speakers)
        found = len({speaker for *_, speaker in turns})
        bounded = min(max(found, min_speakers or 0), max_speakers or MAX_SPEAKERS)
        if num_speakers is None and found and bounded != found:
            turns = self._run(waveform, bounded)
        return turns

    def embed(self, waveform: np.ndarray) -> np.ndarray:
        """Return the vector of a voice."""
        stream = self._extractor.create_stream()
        stream.accept_waveform(sample_rate=SAMPLE_RATE, waveform=waveform)
        stream.input_finished()
        return np.asarray(self._extractor.compute(stream), np.float32)

    def _run(
        self, waveform: np.ndarray, num_speakers: int | None
    ) -> list[tuple[float, float, Label]]:
        self._diarization.set_config(self._config(num_speakers))
        found = self._diarization.process(waveform).sort_by_start_time()
        return [(turn.start, turn.end, turn.speaker) for turn in found]

    def _config(self, num_speakers: int | None) -> Any:
        library = self._library
        clustering = library.FastClusteringConfig(num_clusters=num_speakers or -1, threshold=0.5)
        return library.OfflineSpeakerDiarizationConfig(
            segmentation=self._segmentation, embedding=self._voices, clustering=clustering
        )


class Sortformer:
    """NeMo's Sortformer, which counts the speakers itself, up to four."""

    def __init__(self, checkpoint: str) -> None:
        install = "pip install 'nemo_toolkit[asr]'"
        model = _import("nemo.collections.asr.models", install).SortformerEncLabelModel
        try:
            is_file = checkpoint.endswith(".nemo")
            self._model = (model.restore_from if is_file else model.from_pretrained)(checkpoint)
        except Exception as error:  # of the hub, or of a file that is none
            raise OSError(f"the diarizer {checkpoint} cannot be loaded: {error}") from error
        self._model.eval()
        self.most_speakers = int(self._model.cfg.max_num_of_spks)

    def __call__(self, waveform: np.ndarray) -> list[tuple[float, float, Label]]:
        (lines,) = self._model.diarize(
            audio=waveform, sample_rate=SAMPLE_RATE, batch_size=1, verbose=False
        )
        turns = (line.split() for line in lines)  # "0.08 2.40 speaker_0"
        return [(float(a), float(b), int(name.rpartition("_")[2])) for a, b, name in turns]
