"""What the tests of the loss share, whatever computes it: its forms, a call with its gradient, the comparison."""

from __future__ import annotations

import torch
from dense_loss import make_rows

from fusechat.loss import sparse_soft_ce

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
