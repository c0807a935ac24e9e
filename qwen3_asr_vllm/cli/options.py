# SPDX-License-Identifier: Apache-2.0
"""Options of the command line, with the names of Whisper and WhisperX."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..formats import FORMATS, KARAOKE, SUBTITLES
from ..geometry import DEFAULT_CLIP_S, MAX_CLIP_S
from ..languages import ALIGNER_LANGUAGES
from ..options import DEFAULT_DIARIZER, MAX_BEAMS, MAX_LENGTH_PENALTY, SPEAKER_COUNTS
from ..subtitles import MAX_LINE_COUNT, MAX_LINE_WIDTH
from .arguments import (
    ListLanguages,
    Parser,
    at_least,
    declared_languages,
    format_list,
    number_between,
    seconds_between,
    step_seconds,
    word_list,
)

if TYPE_CHECKING:
    from ..transcript import Transcript

DEFAULT_MODEL = "Qwen/Qwen3-ASR-1.7B"
DEFAULT_ALIGNER = "Qwen/Qwen3-ForcedAligner-0.6B"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = Parser(
        prog="qwen3-asr", description="Speech to text with Qwen3-ASR on vLLM.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qwen3-asr {__version__}")
    parser.add_argument(
        "--list-languages",
        action=ListLanguages,
        nargs="?",
        metavar="MODEL",
        help="list the languages of a checkpoint, or of the published ones, and exit",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_transcribe(commands)
    _add_align(commands)
    _add_eval(commands)
    _add_stream(commands)
    _add_serve(commands)
    _add_doctor(commands)
    return parser


def _add_command(
    commands: Any, name: str, arguments: str, *, help: str, description: str
) -> argparse.ArgumentParser:
    """Add a command with an engine, which also takes the engine options of vLLM."""
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
        'NeMo or Hugging Face, CSV, TSV, or a list), and "-" for standard input. Finished '
        "recordings are skipped, so the same command continues a run that was stopped. Options "
        "that are not listed here, such as --gpu-memory-utilization 0.5, go to the engine of vLLM; "
        "put them last. Every option may be written with - or _.",
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCE")
    _add_model_options(parser)
    add = parser.add_argument_group("outputs").add_argument
    _add_format(add, "any of {}, or all; default: %(default)s", default="txt")
    add(
        "-o",
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write DIR/NAME.txt and so on, with the folders of the sources; default: stdout",
    )
    add("--stdout-only", action="store_true", help="write no files")
    add(
        "--manifest-out",
        type=Path,
        metavar="FILE",
        help="write a JSONL manifest with a pred_text for each recording",
    )
    add("--overwrite", action="store_true", help="transcribe finished recordings again")
    _add_layout(add)
    add = parser.add_argument_group("word times").add_argument
    add(
        "--word-timestamps",
        action="store_true",
        help="time every word with a forced aligner: words in json; exact srt, vtt and lrc",
    )
    names = ("--aligner", "--align-model")
    add(*names, metavar="MODEL", help=f"forced aligner; default: {DEFAULT_ALIGNER}")
    _add_speaker_options(parser)
    _add_ray_options(parser)


def _add_speaker_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("speakers").add_argument
    add(
        "--diarize",
        action="store_true",
        help="find who speaks: speakers in json, srt and vtt; more exact with --word-timestamps",
    )
    add(
        *("--diarizer", "--diarize-model"),
        metavar="SPEC",
        help=f"checkpoint or function that finds them; default: {DEFAULT_DIARIZER}",
    )
    for name in SPEAKER_COUNTS:
        option, how = f"--{name.replace('_', '-')}", name.partition("_")[0]
        meaning = {"num": "number", "min": "least number", "max": "largest number"}[how]
        add(option, type=at_least(1), metavar="N", help=f"{meaning} of speakers; default: any")


def _add_ray_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("many machines with Ray").add_argument
    add(
        "--ray",
        type=at_least(1),
        metavar="N",
        help="run N engines on Ray, which write -o DIR/shard-*.jsonl",
    )
    add(
        "--gpus-per-worker",
        type=float,
        default=1,
        metavar="N",
        help="GPUs per engine; 0: CPU; 0.5: two engines share a GPU and its memory; default: 1",
    )


def _add_align(commands: Any) -> None:
    parser = _add_command(
        commands,
        "align",
        "AUDIO TEXT",
        help="time the words of a recording whose text is known",
        description="Time each word of a text in a recording. TEXT is a file, or - for standard "
        "input; the cues of an SRT, VTT or LRC file get new times. Languages: "
        + ", ".join(sorted(ALIGNER_LANGUAGES))
        + ".",
    )
    parser.add_argument("audio", metavar="AUDIO")
    parser.add_argument("text", metavar="TEXT")
    add = parser.add_argument
    add("-m", "--model", "--aligner", default=DEFAULT_ALIGNER, help="default: %(default)s")
    _add_audio_track(add)
    _add_language(add, otherwise="detect by script")
    _add_format(add, "one of {}; default: %(default)s", default="json")
    add("-o", "--output", type=Path, metavar="FILE", help="output file; default: stdout")
    add("--keep-lines", action="store_true", help="make each line of TEXT a segment, cue or lyric")
    _add_layout(add)


def _add_layout(add: Callable[..., Any]) -> None:
    """Add the options of the subtitle layout."""
    add(
        "--max-line-width",
        type=at_least(2),
        metavar="N",
        help=f"columns of a subtitle line, 2 for a Chinese character; default: {MAX_LINE_WIDTH}",
    )
    add(
        "--max-line-count",
        type=at_least(1),
        metavar="N",
        help=f"lines of a subtitle; default: {MAX_LINE_COUNT}",
    )
    add(
        "--highlight-words",
        action="store_true",
        help="highlight the current word: underlined in srt and vtt, with its time in lrc",
    )


def _add_eval(commands: Any) -> None:
    parser = _add_command(
        commands,
        "eval",
        "MANIFEST...",
        help="measure the error rates of a model on your own recordings",
        description="Transcribe the recordings of a manifest and compare with its texts: WER and "
        "CER for each language, with the usual normalisers, and the speed. The column text, "
        "transcription or sentence of the manifest holds the reference, the column language or "
        "lang the language. Needs pip install 'qwen3-asr-vllm[eval]'.",
    )
    parser.add_argument("sources", nargs="+", metavar="MANIFEST")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--pred-text", action="store_true", help="score the manifest's pred_text; load no model"
    )
    parser.add_argument(
        "--open-asr",
        action="store_true",
        help="score English as the Open ASR Leaderboard does, with its RTFx, for each manifest",
    )
    _add_model_options(parser)
    parser.set_defaults(formats=["txt"])


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that transcribe and eval share: model and recognition."""
    add = parser.add_argument_group("model").add_argument
    add("-m", "--model", help=f"checkpoint; default: {DEFAULT_MODEL}, or the model of the server")
    add(
        "--server",
        metavar="URL",
        help="use a server such as http://localhost:8000 instead of an engine in this process; "
        "needs no vLLM here",
    )
    _add_api_key(add)
    add("--no-progress", action="store_true", help="hide the progress bar")
    add = parser.add_argument_group("recognition").add_argument
    _add_audio_track(add)
    _add_language(add, otherwise="detect")
    _add_languages(add)
    _add_context(add)
    add(
        "--keywords",
        "--hotwords",
        type=word_list,
        default=[],
        metavar="WORDS",
        help="names and terms to expect, separated by commas",
    )
    add(
        "--max-clip-s",
        "--chunk-size",
        type=seconds_between(1, MAX_CLIP_S),
        metavar="S",
        help=f"longest clip that the model decodes at once; default: {DEFAULT_CLIP_S:g}",
    )
    _add_special_tokens(add)
    _add_beams(add)
    add("--task", choices=["transcribe"], help="Whisper's option; Qwen3-ASR does not translate")


def _add_beams(add: Callable[..., Any]) -> None:
    add(
        "--beams",
        "--beam-size",
        type=number_between(int, 1, MAX_BEAMS),
        metavar="N",
        help="search with N beams, which costs more; 1: decode greedily; default: as the "
        "checkpoint's generation config says",
    )
    add(
        "--length-penalty",
        type=number_between(float, -MAX_LENGTH_PENALTY, MAX_LENGTH_PENALTY),
        metavar="X",
        help="power of the length that divides the scores of beams; above 0 favours long texts; "
        "default: the checkpoint's, else 1",
    )


def _add_stream(commands: Any) -> None:
    parser = _add_command(
        commands,
        "stream",
        "FILE|-",
        help="transcribe live speech from a pipe, or a file",
        description="Transcribe live audio: raw 16-bit PCM, mono, from a pipe (-), or a file. On a "
        "terminal, text that may still change is redrawn in place; elsewhere, each piece of final "
        "text is a line. From a microphone: "
        "arecord -q -t raw -f S16_LE -r 16000 | qwen3-asr stream -",
    )
    parser.add_argument("file", metavar="FILE|-")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="default: %(default)s")
    _add_audio_track(parser.add_argument)
    _add_language(parser.add_argument, otherwise="detect")
    _add_languages(parser.add_argument)
    _add_context(parser.add_argument)
    _add_special_tokens(parser.add_argument)
    parser.add_argument(
        "-r",
        "--rate",
        type=at_least(1000),
        default=16_000,
        metavar="HZ",
        help="sampling rate of the pipe; default: %(default)d",
    )
    parser.add_argument(
        "--step-s",
        type=step_seconds,
        default=2.0,
        metavar="S",
        help="seconds of new audio per decoding step; default: %(default)g",
    )


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="qwen3-asr serve MODEL [--aligner MODEL] [--diarizer SPEC] [--engines-per-gpu N] "
        "[--extra-languages LIST] [options of vllm serve]",
        description="The OpenAI-compatible server of vLLM, with the audio routes of this package "
        "and limits for long recordings. All options of `vllm serve` work; --help=all lists them. "
        "On CUDA, unless you set them: --cudagraph-capture-sizes goes up to "
        "--max-num-batched-tokens (--max-cudagraph-capture-size 512 is vLLM's default), and "
        "--api-server-count is one per four CPU cores, at most eight.",
        allow_abbrev=False,
    )
    serve.add_argument(
        "model", metavar="MODEL", nargs="?", help=f"checkpoint, such as {DEFAULT_MODEL}"
    )
    serve.add_argument(
        "--aligner",
        metavar="MODEL",
        help=f"forced aligner, such as {DEFAULT_ALIGNER}, in a second server on this machine",
    )
    serve.add_argument(
        "--engines-per-gpu",
        metavar="N",
        help="engines that share each GPU behind one port, for a GPU that one does not fill",
    )
    serve.add_argument(
        "--diarizer",
        metavar="SPEC",
        help=f"finds speakers, such as {DEFAULT_DIARIZER}, in a process on this machine",
    )
    serve.add_argument(
        "--extra-languages",
        metavar="LIST",
        help="languages that the checkpoint knows beyond its config: he=Hebrew,ur=Urdu",
    )
    serve.add_argument(
        "--aligner-options",
        metavar="OPTIONS",
        help="options of vllm serve for the aligner, as one argument: "
        "--aligner-options='--dtype float32'",
    )


def _add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check the installation, a model or a server",
        description="Check the installation. With --model, check what a checkpoint makes of "
        "recordings that ship with this package; other options go to vLLM's engine.",
    )
    doctor.add_argument(
        "--decoders", action="store_true", help="only check that audio formats decode; needs no GPU"
    )
    doctor.add_argument(
        "--server", metavar="URL", help="check a running server, such as http://localhost:8000"
    )
    doctor.add_argument(
        "--model", metavar="MODEL", help=f"check a checkpoint, such as {DEFAULT_MODEL}"
    )
    doctor.add_argument(
        "--aligner", metavar="MODEL", help=f"with --model: check {DEFAULT_ALIGNER} or another, too"
    )
    _add_api_key(doctor.add_argument)


def _add_api_key(add: Callable[..., Any]) -> None:
    key = os.environ.get("OPENAI_API_KEY")
    add(
        "--api-key",
        default=key,
        metavar="KEY",
        help="API key of the server; default: $OPENAI_API_KEY",
    )


def _add_audio_track(add: Callable[..., Any]) -> None:
    add(
        "--audio-track",
        type=at_least(1),
        metavar="N",
        help="audio track of a video, from 1; default: the default one, or the first with sound",
    )


def _add_language(add: Callable[..., Any], *, otherwise: str) -> None:
    add("-l", "--language", help=f"code or name; default: {otherwise}")


def _add_languages(add: Callable[..., Any]) -> None:
    add(
        "--languages",
        type=word_list,
        default=[],
        metavar="LIST",
        help="languages to detect one of",
    )
    add(
        "--extra-languages",
        type=declared_languages,
        default={},
        metavar="LIST",
        help="languages that the checkpoint knows beyond its config: he=Hebrew,ur=Urdu",
    )


def _add_context(add: Callable[..., Any]) -> None:
    names = ("-c", "--context", "--initial-prompt", "--prompt")
    add(*names, default="", metavar="TEXT", help="text that biases the model, such as the topic")


def _add_special_tokens(add: Callable[..., Any]) -> None:
    add(
        "--no-skip-special-tokens",
        dest="skip_special_tokens",
        action="store_false",
        help="keep special tokens of the checkpoint, such as <|spk_0|>, in the text",
    )


def _add_format(add: Callable[..., Any], help: str, *, default: str) -> None:
    add(
        "-f",
        "--output-format",
        "--format",
        dest="formats",
        type=format_list,
        default=default,
        metavar="FORMAT",
        help=help.format(",".join(FORMATS)),
    )


def wrong_layout(args: argparse.Namespace) -> str | None:
    """Return an error for layout options without subtitles; None if there are none."""
    formats = ", ".join(args.formats)
    for name in line_layout(args):
        if not set(args.formats) & set(SUBTITLES):
            return f"--{name.replace('_', '-')}: {formats} has no subtitle lines; add -f srt"
    if args.highlight_words and not set(args.formats) & set(KARAOKE):
        return f"--highlight-words: {formats} does not highlight words; add -f srt"
    return None


def line_layout(args: argparse.Namespace) -> dict[str, int]:
    """Return the layout options of subtitles that were given."""
    layout = {"max_line_width": args.max_line_width, "max_line_count": args.max_line_count}
    return {name: value for name, value in layout.items() if value is not None}


def writer(name: str, args: argparse.Namespace) -> Callable[[Transcript], str]:
    """Return the function that writes a format, with the layout options."""
    layout: dict[str, Any] = line_layout(args) if name in SUBTITLES else {}
    karaoke: dict[str, Any] = {"highlight_words": args.highlight_words} if name in KARAOKE else {}
    return partial(FORMATS[name], **karaoke, **layout)
