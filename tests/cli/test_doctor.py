# SPDX-License-Identifier: Apache-2.0
"""``doctor`` names each problem of an installation and what to do. ``test_cli.py`` runs it all."""

from __future__ import annotations

import socket
import sys

import pytest
from support.servers import reserved_port

from qwen3_asr_vllm.cli import doctor


def test_missing_packages_come_with_an_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(RuntimeError, match="Do: pip install av"):
        doctor.DECODERS["av"]()


def test_a_disabled_plugin_is_noticed(monkeypatch):
    monkeypatch.setenv("VLLM_PLUGINS", "")
    with pytest.raises(RuntimeError, match="Do: add qwen3_asr to it"):
        doctor.check_entry_points()


def test_a_taken_port_and_limits_are_noticed(monkeypatch):
    with reserved_port() as port, socket.socket() as taken:
        monkeypatch.setattr(doctor, "DEFAULT_PORT", port)
        assert doctor.INSTALLATION["port"]() == f"{port} is free"
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", port))
        taken.listen()
        assert doctor.INSTALLATION["port"]() == f"{port} is in use; another server needs --port"
    monkeypatch.setenv("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "25")
    assert doctor.INSTALLATION["limits"]() == "uploads of 25 MiB, 4 h, 4 GiB decoded"


def test_it_finds_the_cache_of_checkpoints(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    (tmp_path / "hub" / "models--Qwen--Qwen3-ASR-1.7B").mkdir(parents=True)
    assert doctor.INSTALLATION["cache"]().startswith(f"{tmp_path / 'hub'}, 1 models, ")
