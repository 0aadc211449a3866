"""Calling a function once a module has been imported, by whomever and whenever (an import hook, PEP 302)."""

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module as ever, and has it executed as ever; then the function is called."""

    def __init__(self, name: str, function: Callable[[ModuleType], Any]):
        self.name, self.function = name, function

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_call(module: ModuleType) -> None:
            execute(module)
            self.function(sys.modules[name])  # a module may put another object in its place

        spec.loader.exec_module = execute_and_call
        return spec


def after_import(name: str, function: Callable[[ModuleType], Any]) -> None:
    """Call `function(module)` as soon as the module is imported; at once if it is there already."""
    if name in sys.modules:
        function(sys.modules[name])
    else:
        sys.meta_path.insert(0, _AfterImport(name, function))
