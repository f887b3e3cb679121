"""Where the kernels' checks run: on a GPU, or on the CPU where Triton's interpreter stands in for its compiler."""

from __future__ import annotations

import os
from typing import Any

import torch
import triton
from loss_checks import run_ours

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


def _count_with_triton_3_6() -> None:
    """Let Triton 3.6's interpreter make a number of an array of one element, which NumPy refuses it from 2.4 on."""
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch


if DEVICE == "cpu" and triton.__version__.startswith("3.6."):
    _count_with_triton_3_6()


def there(*values: Any) -> list[Any]:
    """Bring tensors, and the tensors of tuples, to the kernels' device."""
    return [type(v)(*there(*v)) if isinstance(v, tuple) else v.to(DEVICE) if torch.is_tensor(v) else v for v in values]


def run_there(*rows: torch.Tensor, **options: Any) -> tuple[Any, torch.Tensor]:
    """Return the loss and its gradient, computed there, on the CPU."""
    out, gradient = run_ours(*there(*rows), **dict(zip(options, there(*options.values()))))
    return type(out)(*(value.cpu() for value in out)), gradient.cpu()
