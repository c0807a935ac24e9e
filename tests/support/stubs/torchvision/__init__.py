# SPDX-License-Identifier: Apache-2.0
"""Stands in for torchvision in baseline processes, which only import it.

vLLM's in-tree Qwen3-ASR imports image code, and that imports torchvision, though no audio goes
through it. Every submodule is this one again, and every name in it is an empty class.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.0"


class Anything(type):
    """A class with every attribute: its name."""

    def __getattr__(cls, name: str) -> str:
        return name


class Stub(ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Stubs(MetaPathFinder, Loader):
    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{__name__}.") else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return Stub(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


sys.meta_path.insert(0, Stubs())
