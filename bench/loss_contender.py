"""One loss in a process of its own, run by the Python that has it: gradients first, then a time for every line read.

    PYTHON loss_contender.py CASE FOLDER DEVICE

Reads FOLDER/inputs.pt, writes loss and gradients to FOLDER/CASE.pt (of large ones every row's length and some rows),
answers each line of its input with the seconds of one more call as JSON. Imports nothing but torch and the package that
the case is of.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

# Of a gradient with more elements every n-th row is kept: gigabytes take longer to write and to read than all else.
KEPT_ELEMENTS = 1 << 27
Inputs = dict[str, Tensor]
Loss = Callable[[], Tensor]


def ours_linear(given: Inputs, hard_weight: float = 1.0, n_entries: int = 0, **options: object) -> Loss:
    """fusechat from hidden states; without entries it is cross-entropy."""
    from fusechat.loss import linear_sparse_soft_ce

    rows = given["labels"], given["ids"][:, :n_entries].contiguous(), given["logprobs"][:, :n_entries].contiguous()
    kept = torch.arange(len(rows[0]), device=rows[0].device)
    hidden, weight = given["hidden"], given["weight"]
    return lambda: linear_sparse_soft_ce(hidden, weight, *rows, hard_weight=hard_weight, kept=kept, **options).loss  # type: ignore[arg-type]


def ours_logits(given: Inputs) -> Loss:
    """fusechat on logits, hard labels; the gradient may take the logits' memory, as in training."""
    from fusechat.loss import sparse_soft_ce

    labels, ids, logprobs = given["labels"], given["ids"][:, :0], given["logprobs"][:, :0]
    return lambda: sparse_soft_ce(given["logits"] * 1, labels, ids, logprobs, hard_weight=1.0).loss


def liger_distillation(given: Inputs, beta: float, compiled: bool = True) -> Loss:
    """Liger's chunked distillation: a dense teacher, as hidden states and head; identity states give it any logits."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    n, vocabulary = len(given["labels"]), given["weight"].shape[0]
    teacher = torch.full((n, vocabulary), -1e4, device=given["labels"].device)
    teacher.scatter_(1, given["ids"].long(), given["logprobs"].float())
    head = teacher.t().contiguous().to(given["weight"].dtype)
    states = torch.eye(n, device=head.device, dtype=head.dtype)
    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=compiled)
    return lambda: loss(given["hidden"], given["weight"], states, head, given["labels"])  # type: ignore[no-any-return]


def liger_linear(given: Inputs) -> Loss:
    """Liger's fused linear cross-entropy, in Triton."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda: loss(given["weight"], given["hidden"], given["labels"])  # type: ignore[no-any-return]


def liger_logits(given: Inputs) -> Loss:
    """Liger's cross-entropy on logits, in Triton; it writes the gradient over them."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return lambda: loss(given["logits"] * 1, given["labels"])  # type: ignore[no-any-return]


def cut_cross_entropy(given: Inputs, implementation: str) -> Loss:
    """cut-cross-entropy; its `cce` is in Triton, `torch_compile` runs anywhere."""
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, labels = given["hidden"], given["weight"], given["labels"]
    return lambda: linear_cross_entropy(hidden, weight, labels, impl=implementation)  # type: ignore[no-any-return]


def transformers_logits(given: Inputs) -> Loss:
    """What a Hugging Face model computes from its logits when it is given labels."""
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels = given["logits"], given["labels"]
    return lambda: ForCausalLMLoss(logits * 1, labels, logits.shape[1], shift_labels=labels)  # type: ignore[no-any-return]


CASES: dict[str, Callable[[Inputs], Loss]] = {
    "ours": ours_linear,
    "ours kl": lambda g: ours_linear(g, 0.0, g["ids"].shape[1], divergence="kl"),
    "ours jsd": lambda g: ours_linear(g, 0.0, g["ids"].shape[1], divergence="jsd", missing="tail"),
    "ours logits": ours_logits,
    "liger kl": lambda g: liger_distillation(g, 0.0),
    "liger jsd": lambda g: liger_distillation(g, 0.5),
    "liger linear": liger_linear,
    "liger logits": liger_logits,
    "cce": lambda g: cut_cross_entropy(g, "cce"),
    "cce compiled": lambda g: cut_cross_entropy(g, "torch_compile"),
    "transformers logits": transformers_logits,
}


def kept_of(gradient: Tensor) -> Inputs:
    """Return every row's length and as many rows as are kept: all, or each n-th, n odd so that no tile is left out."""
    step = -(-gradient.numel() // KEPT_ELEMENTS) | 1
    lengths = torch.linalg.vector_norm(gradient, dim=1, dtype=torch.float32)
    return {"": gradient[::step].cpu(), " by rows": lengths.cpu()}


def extra_mib(call: Callable[[], Tensor], device: str) -> float:
    """Return what a call adds to this process's memory at its peak, gradients included."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def rss_mib(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before_mib = rss_mib("VmRSS")
    call()
    return rss_mib("VmHWM") - before_mib


def main() -> None:
    """Load, compute once for equality, then once for every line."""
    case, folder, device = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    given = {name: tensor.to(device) for name, tensor in torch.load(folder / "inputs.pt", weights_only=True).items()}
    learned = [given[name].requires_grad_(True) for name in ("hidden", "weight", "logits") if name in given]
    loss = CASES[case](given)

    def call() -> Tensor:
        for tensor in learned:
            tensor.grad = None
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        if device == "cuda":
            torch.cuda.synchronize()
        return value.detach()

    found = {"loss": call().float().cpu()}
    for i, tensor in enumerate(learned):
        if tensor.grad is not None:
            found |= {f"{i}{part}": value for part, value in kept_of(tensor.grad).items()}
    torch.save(found, folder / f"{case}.pt")
    del found
    print(json.dumps({"extra_mib": extra_mib(call, device)}), flush=True)
    for _ in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        print(json.dumps({"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - wall}), flush=True)


if __name__ == "__main__":
    main()
