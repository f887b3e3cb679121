"""Fuse chat LLMs of different tokenizers, sizes and architectures into one (FuseChat, arXiv 2408.07990).

Each stage is a module that can be called: `fusechat.extract(...)`, `fusechat.align(...)`, `fusechat.train(...)`,
`fusechat.merge(...)` and `fusechat.run(config)` do what the command of the same name does.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_STAGES = ("align", "extract", "merge", "run", "train")
__all__ = ["__version__", "align", "extract", "merge", "run", "train"]


def __dir__() -> list[str]:
    # A stage that was not used yet is no attribute yet, and a prompt's completion should know it all the same.
    return sorted({*globals(), *_STAGES})


def __getattr__(name: str) -> Any:
    # The stages load on first use, so that `import fusechat` needs neither torch nor transformers.
    if name in _STAGES:
        from importlib import import_module

        return import_module(f"fusechat.{name}")
    raise AttributeError(f"module 'fusechat' has no attribute {name!r}")
