"""Makes a stage's module callable, so that `fusechat.align(...)` and `fusechat.align.dtw(...)` both work."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


class CallableModule(ModuleType):
    """A module whose call is forwarded to the function of the module's own name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._stage(*args, **kwargs)

    @property
    def __signature__(self) -> Any:
        """The function's, for a prompt that shows what a call takes."""
        import inspect

        return inspect.signature(self._stage)

    @property
    def _stage(self) -> Callable[..., Any]:
        stage: Callable[..., Any] = self.__dict__[self.__name__.rpartition(".")[2]]
        return stage


def make_callable(module_name: str) -> None:
    """Turn the named, already imported module into one that can be called."""
    sys.modules[module_name].__class__ = CallableModule
