"""What the tests of the loss share, whatever computes it: its forms, a call with its gradient, the comparison."""

from __future__ import annotations

import torch
from dense_loss import make_rows

from fusechat.loss import Cells, sparse_soft_ce

FORMS = [
    *({"divergence": d, "missing": "tail"} for d in ("ce", "kl", "reverse_kl", "jsd", "tvd", "skew_kl")),
    *({"divergence": d, "missing": "renormalise"} for d in ("ce", "kl", "jsd", "tvd", "skew_kl")),
    *({"divergence": d, "missing": "zero"} for d in ("ce", "kl", "reverse_kl", "jsd", "tvd", "skew_kl")),
    *({"divergence": "alpha", "missing": m, "beta": 0.3} for m in ("tail", "renormalise", "zero")),
    {"divergence": "alpha", "missing": "tail", "beta": 1.7},
    {"divergence": "jsd", "missing": "tail", "beta": 0.1},
    {"divergence": "ce", "missing": "uniform"},
    {"divergence": "kl", "missing": "uniform", "temperature": 2.0},
    {"missing": "renormalise", "temperature": 2.0, "student_temperature": 2.0},
    {"missing": "tail", "temperature": 0.7, "student_temperature": 3.0, "divergence": "reverse_kl"},
    {"missing": "uniform", "student_temperature": 1.5},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-3},
    {"softcap": 5.0, "missing": "tail"},
    {"softcap": 5.0, "z_loss": 0.1, "label_smoothing": 0.2, "student_temperature": 2.0, "missing": "uniform"},
]

RULED_OUT_FORMS = [
    {"missing": "tail", "label_smoothing": 0.1},
    {"missing": "uniform", "student_temperature": 2.0},
    {"missing": "uniform", "label_smoothing": 0.2, "divergence": "kl", "temperature": 2.0},
]


def run_ours(logits, labels, ids, logprobs, *, upstream=1.0, **options):
    """Return loss, gradient of upstream · loss, and the per-row outputs."""
    z = logits.clone().requires_grad_(True)
    out = sparse_soft_ce(z * 1, labels, ids, logprobs, **options)
    (gradient,) = torch.autograd.grad(out.loss, z, torch.tensor(upstream, device=z.device))
    return out, gradient


def assert_elementwise(ours, exact, size, dtype=torch.float32):
    """Compare every element relative to its own terms: a norm hides a wrong tail behind the few large targets."""
    epsilon = {torch.float32: 6e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
    underflow = {torch.float32: 1e-17, torch.bfloat16: 1e-17, torch.float16: 6e-8}[dtype]
    assert torch.isfinite(ours).all()
    error = (ours.double() - exact).abs()
    wrong = error > epsilon * exact.abs() + 6e-6 * size + underflow
    assert not wrong.any(), (error[wrong], exact[wrong], size[wrong])


def rising_rows():
    """Return rows of several blocks of the compiled loop whose later blocks hold logits up to ten above the first's."""
    rows = make_rows(17, 6, 5000, 6)
    rows[0][:, :2000].clamp_(max=0.0)
    rows[0][:, 4000:].add_(4.0)
    return rows


def make_cells(seed: int, n_rows: int, vocabulary: int, n_entries: int) -> Cells:
    """Return ranges as prefixes make them, two disjoint or one inside the other; some entries stay single ids."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(vocabulary, generator=rng).int()
    low = torch.zeros(n_rows, n_entries, dtype=torch.int32)
    high = torch.zeros_like(low)
    for row in range(n_rows):
        known = [(0, vocabulary)]
        for k in range(n_entries):
            if torch.rand((), generator=rng) < 0.4:
                continue
            outer = known[int(torch.randint(len(known), (), generator=rng))]
            if outer[1] - outer[0] < 1 or (torch.rand((), generator=rng) < 0.2 and outer != known[0]):
                low[row, k], high[row, k] = outer  # the same range twice
                continue
            inner = sorted(torch.randint(outer[0], outer[1] + 1, (2,), generator=rng).tolist())
            if all(inner[1] <= a or inner[0] >= b or (a <= inner[0] and inner[1] <= b) or
                   (inner[0] <= a and b <= inner[1]) for a, b in known):  # fmt: skip
                known.append((inner[0], inner[1]))
                low[row, k], high[row, k] = inner
    return Cells(order, low, high)


def widened_by_ruled_out(rows):
    """Return rows [N, V] in a vocabulary of 7 tokens more, whose logits are −∞, and where the old tokens went."""
    logits, labels, ids, logprobs = rows
    n_rows, vocabulary = logits.shape
    kept = torch.randperm(vocabulary + 7, generator=torch.Generator().manual_seed(0))[:vocabulary].sort().values
    wide = torch.full((n_rows, vocabulary + 7), -float("inf"))
    wide[:, kept] = logits
    labels = torch.where(labels >= 0, kept[labels.clamp(min=0)], labels)
    return (wide, labels, torch.where(ids >= 0, kept[ids.clamp(min=0)], ids), logprobs), kept


def assert_like_a_smaller_vocabulary(run, form):
    """Compare `run` on rows with tokens of −∞ to the same rows without those tokens."""
    common = {"hard_weight": 0.4, "partition": torch.arange(8) % 4 == 0, **form}
    rows = make_rows(19, 8, 3000, 4)
    expected, small = run(*rows, **common)
    rows, kept = widened_by_ruled_out(rows)
    out, gradient = run(*rows, **common)
    for value, exact in zip(out, expected):
        torch.testing.assert_close(value, exact, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(gradient[:, kept], small, rtol=2e-5, atol=1e-8)
    assert gradient.count_nonzero() == gradient[:, kept].count_nonzero()
