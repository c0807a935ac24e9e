# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: what each module may import, and what importing it may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import qwen3_asr_vllm

PACKAGE = Path(qwen3_asr_vllm.__file__).parent
# The core, from the bottom: a row imports only rows below it.
CORE = (
    ("__init__",),
    ("checks", "iso639"),
    ("geometry", "generation", "languages", "processes", "printable"),
    ("transcript", "peaks", "voice_activity"),
    ("pauses",),
    ("media",),  # a folder: containers, damage, decoders
    ("audio", "windows", "prompt"),
    ("recordings", "units", "segments", "speakers", "options", "rounds", "chat_template"),
    ("decoding", "diarizers"),
    ("texts", "beams"),
    ("subtitles", "alignment"),
    ("formats",),
    ("transcription", "drafts"),
    ("streaming", "live_text", "live_words"),
    ("engine",),
    ("batching", "beam_requests"),
    ("batch_engine",),
    ("offline",),
)
# A wing imports the core and never another wing, but for the command line.
WINGS = {"model": set(), "server": set(), "corpus": set(), "cli": {"server", "corpus"}}
CORE_THAT_LOADS_A_MODEL = {"engine"}  # inside of a function
UPWARD = {
    "transcript": {"formats"},  # a transcript writes itself: inside of a method
    # types of its fields only
    "server.state": {
        f"server.{x}" for x in ("alignments", "page", "realtime_serving", "transcriptions")
    },
}
ROW = {module: row for row, modules in enumerate(CORE) for module in modules}
EXPORTED = {*ROW, "corpus.client"}  # modules of the public names


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name, without the package's."""
    paths = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        paths[".".join(parts)] = path
    return paths


MODULES = modules()


def wing(module: str) -> str:
    """The wing of a module; "" of one of the core, of which ``media`` is a part."""
    folder = module.rpartition(".")[0]
    return "" if folder == "media" else folder


def row_of(module: str) -> int:
    """The row of a module of the core; past the last row for one of a wing."""
    return ROW.get(module.split(".")[0], len(CORE))


def imports(module: str) -> set[str]:
    """Modules of the package that a module names, wherever it does."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if node.level:
            above = module.split(".")[: -node.level]
        elif (node.module or "").split(".")[0] == "qwen3_asr_vllm":
            above = []
        else:
            continue
        named = (node.module or "").removeprefix("qwen3_asr_vllm").strip(".")
        base = ".".join([*above, *filter(None, [named])])
        for alias in node.names:
            inner = f"{base}.{alias.name}".strip(".")
            found.add(inner if inner in MODULES else base or "__init__")
    return {name if name in MODULES else f"{name}.__init__" for name in found}


def test_every_module_has_its_layer():
    assert {name.split(".")[0] for name in MODULES if not wing(name)} == set(ROW)
    assert {wing(name) for name in MODULES} == {"", *WINGS}


@pytest.mark.parametrize("module", sorted(name for name in MODULES if not wing(name)))
def test_core_modules_import_only_rows_below(module):
    named = imports(module)
    if module.startswith("media."):
        named = {name for name in named if not name.startswith("media.")}
    if module in CORE_THAT_LOADS_A_MODEL:
        named = {name for name in named if wing(name) != "model"}
    if module == "__init__":  # exports lazily
        named = {name for name in named if wing(name) != "model"} - EXPORTED
    above = {name for name in named if row_of(name) >= row_of(module)}
    assert above == UPWARD.get(module, set())


@pytest.mark.parametrize("module", sorted(name for name in MODULES if wing(name)))
def test_wings_import_only_the_core(module):
    own = wing(module)
    others = {wing(name) for name in imports(module)} - {"", own}
    assert others <= WINGS[own]


def test_imports_form_no_cycle():
    graph = {
        name: imports(name) - {"__init__"} - UPWARD.get(name, set())
        for name in MODULES
        if name != "__init__"
    }
    TopologicalSorter(graph).prepare()


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, qwen3_asr_vllm; print({'torch', 'vllm', 'numpy'} & set(sys.modules))"
    assert run(code) == "set()"


# Wings whose modules load torch or vLLM when they are imported, and the modules that do not.
HEAVY = {"model", "server"}
LIGHT_IN_HEAVY = {
    *("server.admission", "server.decode_worker", "server.decoders", "server.supervisor"),
    *("server.__init__", "model.__init__"),
}


def test_pure_modules_need_neither_torch_nor_vllm():
    pure = [name for name in MODULES if wing(name) not in HEAVY or name in LIGHT_IN_HEAVY]
    names = ", ".join(
        f"qwen3_asr_vllm.{name}".removesuffix(".__init__")
        for name in pure
        if not name.endswith("__main__")
    )
    code = f"import sys, {names}; print({{'torch', 'vllm', 'transformers'}} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.parametrize("module", MODULES)
def test_files_open_with_licence_and_docstring(module):
    text = MODULES[module].read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.mark.parametrize("module", sorted(MODULES))
def test_modules_and_classes_stay_short(module):
    """A module has at most 500 lines, and a class 250."""
    source = MODULES[module].read_text()
    assert source.count("\n") <= 500
    classes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)]
    long = [each.name for each in classes if each.end_lineno - each.lineno >= 250]
    assert not long
