"""Do something as soon as another package is imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.abc import MetaPathFinder


def when_imported(package: str, then: Callable[[], object]) -> None:
    """Call `then` once: now if the package is imported already, otherwise right after it is.

    Args:
        package: a top-level package whose loader runs a module by `exec_module`, as those of files do.
        then: called in the thread that imports the package, before the import statement returns.
    """
    if package in sys.modules:
        then()
    else:
        sys.meta_path.insert(0, _Finder(package, then))


class _Finder(MetaPathFinder):
    """Finds the package as the other finders do, and has its loader call back."""

    def __init__(self, package: str, then: Callable[[], object]):
        self._package = package
        self._then = then

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self._package:
            return None
        others = [finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec")]
        spec = next(filter(None, (finder.find_spec(fullname, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            self._call_back(spec.loader)
        return spec

    def _call_back(self, loader) -> None:
        run = loader.exec_module

        def exec_module(module):
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self._then()

        loader.exec_module = exec_module
