# SPDX-License-Identifier: Apache-2.0
"""The rules of the house: what each module may import, and what importing it may cost."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import qwen3_asr_vllm

PACKAGE = Path(qwen3_asr_vllm.__file__).parent
# A module imports only from above it.
ORDER = (
    "__init__",
    "geometry",
    "admission",
    "languages",
    "config",
    "audio",
    "log_mel",
    "prompt",
    "transcript",
    "decoding",
    "alignment",
    "transcription",
    "engine",
    "corpus",
    "pipeline",
    "remote",
    "probe",
    "evaluation",
    "streaming",
    "aligner",
    "kernels",
    "encoder",
    "processor",
    "model",
    "offline",
    "cluster",
    "page",
    "form",
    "serving",
    "metrics",
    "realtime",
    "alignments",
    "endpoints",
    "doctor",
    "supervisor",
    "cli",
)
WITH_TORCH = {
    "config",
    "log_mel",
    "kernels",
    "encoder",
    "processor",
    "model",
    "page",
    "form",
    "serving",
    "metrics",
    "realtime",
    "alignments",
    "endpoints",
}


def imports(tree: ast.AST) -> set[str]:
    """Modules of the package that the code names, wherever it does."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            module = (node.module or "").removeprefix("qwen3_asr_vllm").removeprefix(".")
            if node.level or (node.module or "").startswith("qwen3_asr_vllm"):
                found |= {module} if module else {alias.name for alias in node.names}
    return found & set(ORDER)


def test_every_module_has_its_place():
    assert {path.stem for path in PACKAGE.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER[1:])
def test_a_module_imports_only_from_above(module):
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    above = set(ORDER[: ORDER.index(module)])
    assert imports(tree) <= above


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, qwen3_asr_vllm; print({'torch', 'vllm', 'numpy'} & set(sys.modules))"
    assert run(code) == "set()"


def test_pure_modules_need_neither_torch_nor_vllm():
    pure = [module for module in ORDER[1:] if module not in WITH_TORCH]
    names = ", ".join(f"qwen3_asr_vllm.{module}" for module in pure)
    code = f"import sys, {names}; print({{'torch', 'vllm', 'transformers'}} & set(sys.modules))"
    assert run(code) == "set()"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_a_file_opens_with_its_licence_and_what_it_knows(path):
    text = path.read_text()
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n")
    assert ast.get_docstring(ast.parse(text))


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()
