"""Merging models in parameter space: any size, in a hundred megabytes, without torch.

`merge(config, out)` reads mergekit's YAML form and streams every tensor through the compiled engine (csrc/merge).
"""

from __future__ import annotations

from fusechat.callable_module import make_callable
from fusechat.merge.driver import merge

__all__ = ["merge"]
make_callable(__name__)
