"""The engine's loss and top-k against definitions in NumPy, for machines without torch: .ci/aarch64 runs it."""

from __future__ import annotations

import numpy as np

from fusechat import _native


def check_loss(rng: np.random.Generator) -> None:
    """Compare loss and gradient of λ · cross-entropy + (1 − λ) · soft targets with float64."""
    for n, vocabulary, k in ((1, 7, 2), (5, 1271, 10), (3, 6000, 33)):
        z = rng.normal(0, 3, (n, vocabulary)).astype(np.float32)
        labels = rng.integers(vocabulary, size=n)
        ids = np.stack([rng.choice(vocabulary, k, replace=False) for _ in range(n)])
        p = rng.dirichlet(np.ones(k), n)
        hard_weight = rng.random(n).astype(np.float32)
        gradient = np.empty_like(z)
        loss = _native.sparse_soft_ce(
            logits=z, gradient=gradient, format="float32", labels=labels, ids=ids,
            logprobs=np.log(p).astype(np.float32),
            hard_weight=hard_weight, row_scale=np.ones(n, np.float32), partition=np.zeros(n, bool), ranges=None,
            divergence="ce", missing="renormalise", temperature=1.0, student_temperature=1.0, beta=0.5,
            label_smoothing=0.0, z_loss=0.0, softcap=0.0, threads=2,
        )[0]  # fmt: skip
        exact = z.astype(np.float64)
        log_q = exact - exact.max(1, keepdims=True)
        log_q -= np.log(np.exp(log_q).sum(1, keepdims=True))
        target = np.zeros_like(exact)
        np.put_along_axis(target, ids, (1 - hard_weight[:, None].astype(np.float64)) * p, 1)
        target[np.arange(n), labels] += hard_weight
        np.testing.assert_allclose(loss, -(target * log_q).sum(1), rtol=1e-5)
        np.testing.assert_allclose(gradient, np.exp(log_q) - target, rtol=1e-4, atol=1e-6)


def check_topk(rng: np.random.Generator) -> None:
    """Compare the k most probable tokens and log-sum-exp with a sort."""
    z = rng.normal(0, 3, (4, 5003)).astype(np.float32)
    ids, logprobs, lse, _ = _native.topk_logprob(logits=z, format="float32", labels=None, k=10, softcap=0.0, threads=2)
    order = np.argsort(-z, 1, kind="stable")[:, :10]
    exact = np.log(np.exp(z.astype(np.float64)).sum(1))
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_allclose(lse, exact, rtol=1e-6)
    np.testing.assert_allclose(logprobs, np.take_along_axis(z, order, 1) - exact[:, None], rtol=1e-5)


def main() -> None:
    """Check all of it on seeded input."""
    rng = np.random.default_rng(0)
    check_loss(rng)
    check_topk(rng)
    print("loss and top-k agree with their definitions")


if __name__ == "__main__":
    main()
