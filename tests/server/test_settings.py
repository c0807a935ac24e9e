# SPDX-License-Identifier: Apache-2.0
"""The table of environment variables: what it reads, what it refuses, and the README's copy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qwen3_asr_vllm.cli.entry import main
from qwen3_asr_vllm.server.settings import SETTINGS, check_settings, setting

README = Path(__file__).parents[2] / "qwen3_asr_vllm" / "server" / "README.md"
NUMBERS = [name for name, each in SETTINGS.items() if each.least is not None]


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch):
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def test_defaults_fit_a_lecture():
    """V10."""
    assert setting("VLLM_MAX_AUDIO_CLIP_FILESIZE_MB") == 1024
    assert setting("VLLM_MAX_AUDIO_DECODE_DURATION_S") == 14_400
    check_settings()


@pytest.mark.parametrize("name", NUMBERS)
def test_ends_of_a_range_are_read(name, monkeypatch):
    for end in (SETTINGS[name].least, SETTINGS[name].most):
        monkeypatch.setenv(name, str(end))
        assert setting(name) == end and isinstance(setting(name), type(SETTINGS[name].least))


@pytest.mark.parametrize(
    "given", ["", " ", "-1", "0", "inf", "-inf", "nan", "1e999", "many", "9" * 40]
)
@pytest.mark.parametrize("name", NUMBERS)
def test_settings_out_of_range_are_named(name, given, monkeypatch):
    monkeypatch.setenv(name, given)
    expected = f"{name} is '{given}'; give {SETTINGS[name].range}, or unset it."
    with pytest.raises(ValueError, match=re.escape(expected)):
        check_settings()


@pytest.mark.parametrize("name", ["VLLM_MAX_AUDIO_CLIP_FILESIZE_MB", "QWEN3_ASR_MAX_CLIP_S"])
def test_whole_numbers_have_no_fraction(name, monkeypatch):
    monkeypatch.setenv(name, "2.5")
    with pytest.raises(ValueError, match=f"{name} is '2.5'; give a whole number, 1 to"):
        check_settings()


def test_an_empty_text_is_none(monkeypatch):
    monkeypatch.setenv("QWEN3_ASR_ALIGNER_URL", "")
    assert setting("QWEN3_ASR_ALIGNER_URL") is None


def test_serve_refuses_before_it_loads_vllm(monkeypatch, capsys):
    monkeypatch.setenv("QWEN3_ASR_MAX_UTTERANCE_S", "inf")
    assert main(["serve", "some/model"]) == 2
    said = "QWEN3_ASR_MAX_UTTERANCE_S is 'inf'; give a number, 1 to 86400, or unset it."
    assert said in capsys.readouterr().err


def test_the_readme_shows_the_table():
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \| (.*) \| (.*) \| (.*) \|$", README.read_text(), re.M)
    shown = [
        (
            each.name,
            "none" if each.default is None else f"{each.default:g}",
            each.range,
            each.effect,
        )
        for each in SETTINGS.values()
    ]
    assert [row for row in rows if row[0] in SETTINGS] == shown
