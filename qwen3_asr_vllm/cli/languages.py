# SPDX-License-Identifier: Apache-2.0
"""Languages of a command line, resolved before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

from ..languages import Languages, checkpoint_languages, resolve_language

CONFIG = "config.json"


def resolve_languages(args: argparse.Namespace, default_model: str) -> None:
    """Replace --language and --languages by names.

    The config of the checkpoint is read if they are none of the published languages. A server
    resolves what only it may know. Raises ValueError for an unknown language.
    """
    resolve = _resolver(args, default_model)
    args.language = resolve(args.language)
    if hasattr(args, "languages"):
        args.languages = [name for name in map(resolve, args.languages) if name]


def languages_of(model: str | None, declared: str | Mapping[str, str] = "") -> Languages:
    """Return the languages of a checkpoint, and of the environment; None: of no checkpoint.

    Raises OSError if the checkpoint has no config.
    """
    if model is None:
        return checkpoint_languages(declared=declared)
    from vllm.transformers_utils.repo_utils import get_hf_file_to_dict

    config = get_hf_file_to_dict(CONFIG, model, revision=None)
    if config is None:
        raise OSError(f"{model} has no {CONFIG} here or on its hub; give a folder or a name.")
    return checkpoint_languages(config.get("support_languages"), declared)


def _resolver(args: argparse.Namespace, default_model: str) -> Callable[[str | None], Any]:
    if args.command == "align" or getattr(args, "pred_text", False):
        return resolve_language  # the aligner checks its own languages; a score needs no model
    known = languages_of(None, args.extra_languages)

    def resolve(language: str | None) -> str | None:
        try:
            return known.resolve(language)
        except ValueError:
            if getattr(args, "server", None):
                resolve_language(language)
                return language
            return _of_checkpoint(args, default_model, known).resolve(language)

    return resolve


def _of_checkpoint(args: argparse.Namespace, default_model: str, known: Languages) -> Languages:
    try:
        return languages_of(args.model or default_model, args.extra_languages)
    except (OSError, ImportError):  # loading the model reports it
        return known
