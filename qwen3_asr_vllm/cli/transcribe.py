# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr transcribe``: a corpus to files, a manifest, stdout, or shards on Ray."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from functools import partial
from typing import Any

from ..corpus.locks import OutputInUseError
from ..corpus.run import Corpus, Transcribe, open_corpus
from ..options import DEFAULT_DIARIZER, SPEAKER_COUNTS, TranscribeOptions
from ..recordings import Recording, Result
from . import models
from .options import DEFAULT_ALIGNER, DEFAULT_MODEL, writer, wrong_layout
from .terminal import INTERRUPTED, bar, check_stdout, complain, print_text, usage_error


def transcribe(args: argparse.Namespace, rest: list[str]) -> int:
    if args.ray:
        return _transcribe_on_ray(args, rest)
    if message := _wrong_outputs(args) or wrong_for_a_server(args, rest):
        return usage_error(message)
    if not (args.output_dir or args.manifest_out):
        check_stdout()
    with ExitStack() as stack:
        try:
            corpus = stack.enter_context(_open_corpus(args))
        except OutputInUseError as error:
            complain(str(error))
            return 1
        except (OSError, ValueError) as error:
            return usage_error(str(error))
        return _transcribe(corpus, args, rest)


def _open_corpus(args: argparse.Namespace) -> AbstractContextManager[Corpus]:
    return open_corpus(
        args.sources,
        output_dir=args.output_dir,
        formats={name.replace("_", "."): writer(name, args) for name in args.formats},
        manifest_out=args.manifest_out,
        overwrite=args.overwrite,
        report=complain,
    )


def _transcribe(corpus: Corpus, args: argparse.Namespace, rest: list[str]) -> int:
    if skipped := corpus.num_skipped:
        total = len(corpus.recordings)
        complain(f"{skipped} of {total} are finished; --overwrite transcribes them again")
    write = writer(args.formats[0], args)
    try:
        summary = corpus.transcribe(
            partial(transcriber, args, rest),
            on_transcript=None if corpus.outputs else lambda _, text: print_text(write(text)),
        )
    except KeyboardInterrupt:
        complain("stopped; the same command continues from here")
        return INTERRUPTED
    except (
        ImportError,
        OSError,
        ValueError,
    ) as error:  # such as a missing vLLM, a dead engine, or a full disk
        complain(str(error))
        return 1
    if failed := [recording for recording, _ in summary.failed]:
        complain(f"{len(failed)} of {len(corpus.todo)} failed: {', '.join(failed)}")
    return 1 if failed else 0


def _transcribe_on_ray(args: argparse.Namespace, rest: list[str]) -> int:
    other = args.server or args.manifest_out or args.stdout_only or args.overwrite
    if not args.output_dir or args.formats != ["txt"] or other:
        return usage_error(
            "--ray writes JSONL shards into -o DIR, and continues an earlier run there; it "
            "takes no -f, --server, --manifest-out, --stdout-only or --overwrite"
        )
    if args.word_timestamps or args.aligner:
        return usage_error("--ray has no word times; remove --word-timestamps and --aligner")
    if args.diarize:
        return usage_error("--ray finds no speakers; remove --diarize")
    if message := wrong_layout(args) or _wrong_speakers(args):
        return usage_error(message)
    from ..corpus.ray_data import transcribe_on_ray

    try:
        with bar(hidden=args.no_progress) as progress:
            summary = transcribe_on_ray(
                args.sources,
                args.output_dir,
                model=args.model or DEFAULT_MODEL,
                num_workers=args.ray,
                num_gpus=args.gpus_per_worker,
                engine_options=models.model_options(args, rest),
                progress=progress,
                report=complain,
                options=_options(args),
            )
    except OutputInUseError as error:
        complain(str(error))
        return 1
    except (ImportError, OSError, ValueError) as error:
        return usage_error(str(error))
    for message in summary.failed.values():
        complain(message)
    complain(
        f"{summary.num_done} transcribed, {summary.num_skipped} skipped, "
        f"{len(summary.failed)} failed"
    )
    return 1 if summary.failed else 0


def _wrong_outputs(args: argparse.Namespace) -> str | None:
    if args.stdout_only and (args.output_dir or args.manifest_out):
        return "--stdout-only writes no files; remove it, or -o and --manifest-out"
    if len(args.formats) > 1 and not args.output_dir:
        return "several formats need -o DIR"
    if args.aligner and not args.word_timestamps:
        return "--aligner needs --word-timestamps; give both, or neither"
    if args.highlight_words and not args.word_timestamps:
        return "--highlight-words needs word times; add --word-timestamps"
    return wrong_layout(args) or _wrong_speakers(args)


def _wrong_speakers(args: argparse.Namespace) -> str | None:
    """Return an error for options of speakers; None if there are none."""
    if args.diarizer and not args.diarize:
        return "--diarizer needs --diarize; give both, or neither"
    if args.diarize and set(args.formats) <= {"txt", "tsv", "lrc"}:
        return f"--diarize: {', '.join(args.formats)} has no speakers; add -f json, srt or vtt"
    try:
        TranscribeOptions(**_speakers(args))
    except ValueError as error:
        return str(error)
    return None


def _speakers(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of speakers; ``eval`` has none."""
    return {name: getattr(args, name) for name in ("diarize", *SPEAKER_COUNTS) if name in args}


def wrong_for_a_server(args: argparse.Namespace, rest: list[str]) -> str | None:
    """Return an error for options that --server does not take; None if there are none."""
    if args.server and args.max_clip_s:
        return "--max-clip-s: the server cuts clips; set QWEN3_ASR_MAX_CLIP_S there"
    if args.server and getattr(args, "aligner", None):
        return "--aligner: the server has its own; set QWEN3_ASR_ALIGNER_URL there"
    if args.server and getattr(args, "diarizer", None):
        return "--diarizer: the server has its own; set QWEN3_ASR_DIARIZER_URL there"
    if args.server and args.extra_languages:
        return "--extra-languages: the server declares them; set QWEN3_ASR_LANGUAGES there"
    if args.server and rest:
        return f"{' '.join(rest)}: engine options; set them on the server"
    return None


def transcriber(args: argparse.Namespace, rest: list[str]) -> Transcribe:
    """Connect to a server, or load an engine in this process."""
    if args.server:
        model = models.connect(args)
    else:
        models.set_defaults(models.TRANSCRIBE_ENVIRONMENT)
        engine = models.model_options(args, rest)
        if getattr(args, "word_timestamps", False):
            engine["aligner"] = args.aligner or DEFAULT_ALIGNER
        if getattr(args, "diarize", False):
            engine["diarizer"] = args.diarizer or DEFAULT_DIARIZER
        model = models.load_model(args.model or DEFAULT_MODEL, engine)
    options = _options(args)

    def transcribe(recordings: list[Recording], *, in_order: bool) -> Iterator[Result]:
        with bar(hidden=args.no_progress) as progress:
            yield from model.transcribe(recordings, options, in_order=in_order, progress=progress)

    return transcribe


def _options(args: argparse.Namespace) -> TranscribeOptions:
    """Return the options of a command line; ``eval`` has no word times and no speakers."""
    return TranscribeOptions(
        language=args.language,
        languages=args.languages,
        context=args.context,
        keywords=args.keywords,
        max_clip_s=args.max_clip_s,
        confidences=not {"json", "verbose_json"}.isdisjoint(args.formats),
        word_timestamps=getattr(args, "word_timestamps", False),
        skip_special_tokens=args.skip_special_tokens,
        audio_track=args.audio_track,
        use_beam_search=None if args.beams is None else args.beams > 1,
        n=args.beams,
        length_penalty=args.length_penalty,
        **_speakers(args),
    )
