"""The fusion loss on the CPU against a copy of the logits, torch's own losses and the research code's dense loss.

    python bench/loss.py [--size small] [--json OUT] [--check]

Equality first, then interleaved rounds in one process, one thread unless said; every call computes loss and gradient.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

from fusechat.bench.baselines import collate_dense, dense_loss, gather_loss
from fusechat.bench.claims import Claim, Work, absent, at_least, at_most
from fusechat.bench.loss_peers import LOGITS, peer_claims
from fusechat.bench.report import parser, report
from fusechat.bench.timing import interleave, peak_rss_mib, ratio
from fusechat.loss import sparse_soft_ce
from fusechat.loss.backend import forward_rows
from fusechat.loss.options import LossOptions
from fusechat.loss.rows import Cells, check_rows
from fusechat.topk import topk_rows

N, V, K = 512, 32_000, 10
BATCH, LENGTH = 4, 512
HARD_WEIGHT = 0.9


def make_rows(n_rows: int, vocabulary: int, n_entries: int) -> tuple[torch.Tensor, ...]:
    """Return labels, distinct ids and log-probabilities of a seeded batch."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(vocabulary, (n_rows,), generator=rng)
    # Distinct within a row: one of each of n_entries equal parts of the vocabulary.
    part = vocabulary // n_entries
    ids = torch.randint(part, (n_rows, n_entries), generator=rng) + torch.arange(n_entries) * part
    return labels, ids, torch.log_softmax(torch.randn(n_rows, n_entries, generator=rng), 1)


def check_equal(logits: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> None:
    """Stop when loss or any element of the gradient differs from autograd's in fp64."""
    exact = logits.double().requires_grad_(True)
    reference = gather_loss(exact, *rows[:2], rows[2].double(), HARD_WEIGHT)
    reference.backward()
    ours = logits.clone().requires_grad_(True)
    out = sparse_soft_ce(ours * 1, *rows, hard_weight=HARD_WEIGHT)
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), reference, rtol=1e-6, atol=1e-6)
    # At a label or an entry the gradient is a difference of terms of up to 1 / N, which may cancel.
    at = torch.cat([rows[0][:, None], rows[1]], 1)
    torch.testing.assert_close(ours.grad.gather(1, at).double(), exact.grad.gather(1, at), rtol=5e-6, atol=1e-7 / N)
    rest = (grad.scatter(1, at, 0) for grad in (ours.grad.double(), exact.grad))
    torch.testing.assert_close(*rest, rtol=5e-6, atol=0)


def logits_claims(rounds: int, compiled: bool, dtype: torch.dtype) -> list[Claim]:
    """Compare on logits [N, V]."""
    rows = make_rows(N, V, K)
    logits = torch.randn(N, V).to(dtype)
    if dtype == torch.float32:
        check_equal(logits, rows)
    buffer, copy = logits.clone(), torch.empty_like(logits)
    columns = check_rows(*rows, HARD_WEIGHT, None, None, None, shape=(N, V))
    options = LossOptions()

    def autograd(loss: object) -> object:
        def call() -> None:
            loss(logits.detach().requires_grad_(True)).backward()  # type: ignore[operator]

        return call

    calls = {
        "ours": lambda: forward_rows(buffer, columns, options, buffer),
        "copy": lambda: copy.copy_(logits),
        "in place": lambda: copy.view(torch.int32).neg_(),
        "cross_entropy": autograd(lambda z: F.cross_entropy(z, rows[0])),
        "gather": autograd(lambda z: gather_loss(z, *rows, HARD_WEIGHT)),
    }
    if compiled:
        calls["compiled"] = autograd(torch.compile(lambda z: gather_loss(z, *rows, HARD_WEIGHT)))
    seconds = interleave(calls, rounds)
    ours_ms, in_place_ms = (seconds[name].median_s() * 1e3 for name in ("ours", "in place"))
    # One read and one write in place is the least that a gradient in the logits' memory can take.
    note = f"{ours_ms:.1f} ms; reading and writing in place takes {in_place_ms:.1f}"
    name = f"sparse_soft_ce, {str(dtype).removeprefix('torch.')}"

    def faster(call: str, against: str, limit: float) -> Claim:
        ceiling = ratio(seconds, call, "in place").median
        return at_least(name, against, ratio(seconds, call, "ours"), limit, note=f"at most {ceiling:.1f} in place")

    claims = [
        at_most(
            f"{name}, forward and backward",
            "copying the logits once",
            ratio(seconds, "ours", "copy"),
            1.3,
            note=note,
            samples=seconds["ours"],
            work=Work.of(seconds["ours"], 2 * logits.nbytes, 12 * logits.numel()),
        ),
        faster("cross_entropy", "F.cross_entropy, hard labels", 20),
        faster("gather", "gather and autograd", 40),
    ]
    if compiled:
        claims.append(faster("compiled", "torch.compile of the same", 20))
    return claims


def topk_claims(rounds: int) -> list[Claim]:
    """Compare the choice of the k most probable tokens of a chunk of logits with torch's own and with a copy."""
    claims = []
    for dtype in (torch.float32, torch.bfloat16):
        logits = torch.randn(N, V).to(dtype)
        copy, labels = torch.empty_like(logits), torch.zeros(N, dtype=torch.long)
        ids, logprobs, _, _ = topk_rows(logits, K, labels, 0.0)
        exact = torch.log_softmax(logits.double(), 1)
        torch.testing.assert_close(exact.gather(1, ids.long()), exact.topk(K, 1).values, rtol=0, atol=0)
        torch.testing.assert_close(logprobs.double(), exact.topk(K, 1).values, rtol=1e-6, atol=1e-6)

        def by_torch(logits: torch.Tensor = logits) -> None:
            z = logits.float()
            torch.logsumexp(z, 1), z.topk(K, 1)

        def ours(logits: torch.Tensor = logits, labels: torch.Tensor = labels) -> None:
            topk_rows(logits, K, labels, 0.0)

        def copying(logits: torch.Tensor = logits, copy: torch.Tensor = copy) -> None:
            copy.copy_(logits)

        seconds = interleave({"ours": ours, "torch": by_torch, "copy": copying}, rounds)
        name = f"top-{K} and logsumexp, {str(dtype).removeprefix('torch.')}"
        claims.append(at_most(name, "copying the logits once", ratio(seconds, "ours", "copy"), 1.3))
        claims.append(at_least(name, "torch.topk and logsumexp", ratio(seconds, "torch", "ours"), 2))
    return claims


def thread_claim(rounds: int) -> Claim:
    """Compare two threads with one, by the wall clock."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    if cores < 2 or load > cores:
        # The wall clock of two threads says nothing where others take the second core.
        return absent("sparse_soft_ce, two threads", "one thread", "≥ 1.7", f"{cores} cores at load {load:.1f}")
    columns = check_rows(*make_rows(N, V, K), HARD_WEIGHT, None, None, None, shape=(N, V))
    buffer, square = torch.randn(N, V), torch.ones(512, 512)
    # Behind a product, as behind lm_head; what a second thread is worth to the others is what this machine gives.
    calls: dict[str, Callable[[], object]] = {
        "in place": buffer.view(torch.int32).neg_,
        "product": lambda: square @ square,
        "ours": lambda: forward_rows(buffer, columns, LossOptions(), buffer),
    }

    def on(threads: int, call: Callable[[], object]) -> Callable[[], object]:
        def limited() -> None:
            torch.set_num_threads(threads)
            call()

        return limited

    seconds = interleave({f"{n} {name}": on(n, call) for n in (1, 2) for name, call in calls.items()}, rounds)
    gains = {name: ratio(seconds, f"1 {name}", f"2 {name}", "wall") for name in calls}
    note = (
        f"wall clock, behind a product on as many; here a second thread makes products in cache "
        f"{gains['product'].median:.2f} × as fast, reading and writing in place {gains['in place'].median:.2f} ×"
    )
    return at_least("sparse_soft_ce, two threads", "one thread", gains["ours"], 1.7, note=note)


def range_claims(rounds: int) -> list[Claim]:
    """Compare rows whose cells are ranges with rows of single ids; ranges hold 10 % of the vocabulary together."""
    labels, ids, logprobs = make_rows(N, V, K)
    order = torch.randperm(V).int()
    width = V // (10 * K)
    low = torch.randint(V - width, (N, 1)).int() // K + torch.arange(K).int() * (V // K)
    low = low.clamp(max=V - width).int()
    plain = check_rows(labels, ids, logprobs, HARD_WEIGHT, None, None, None, shape=(N, V))
    unused = Cells(order, torch.zeros(N, K).int(), torch.zeros(N, K).int())
    with_argument = check_rows(labels, ids, logprobs, HARD_WEIGHT, None, None, unused, shape=(N, V))
    cells = Cells(order, low, low + width)
    ranges = check_rows(labels, ids, logprobs, HARD_WEIGHT, None, None, cells, shape=(N, V))
    buffer, options = torch.randn(N, V), LossOptions(missing="tail")
    calls = {
        name: (lambda columns=columns: forward_rows(buffer, columns, options, buffer))
        for name, columns in (("plain", plain), ("unused", with_argument), ("ranges", ranges))
    }
    seconds = interleave(calls, rounds)
    note = f"{K} ranges of {width} tokens a row"
    return [
        at_most("rows without ranges among rows with", "rows of single ids", ratio(seconds, "unused", "plain"), 1.05),
        at_most("rows with ranges", "rows of single ids", ratio(seconds, "ranges", "plain"), 1.5, note=note),
    ]


def dense_batch() -> tuple[torch.Tensor, ...]:
    """Return logits and the two distributions of a batch."""
    labels, ids, logprobs = make_rows(BATCH * LENGTH, V, K)
    return torch.randn(BATCH, LENGTH, V), labels, ids, logprobs


def run_dense() -> None:
    """Collate and compute as the research code does."""
    logits, labels, ids, logprobs = DENSE
    shape = (BATCH, LENGTH, K)
    targets = [collate_dense(ids.view(shape), logprobs.view(shape), V) for _ in range(2)]
    z = logits.detach().requires_grad_(True)
    dense_loss(z, labels.view(BATCH, LENGTH), *targets, torch.rand(BATCH, 2), HARD_WEIGHT).backward()


def run_sparse() -> None:
    """Collate and compute as fusechat does: choose per sequence, then one pass over the logits."""
    logits, labels, ids, logprobs = DENSE
    chosen = torch.rand(BATCH, 2).argmin(1).repeat_interleave(LENGTH)
    candidates_ids, candidates = torch.stack([ids, ids], 1), torch.stack([logprobs, logprobs], 1)
    rows = torch.arange(BATCH * LENGTH)
    z = logits.detach().view(-1, V).requires_grad_(True)
    sparse_soft_ce(
        z, labels, candidates_ids[rows, chosen], candidates[rows, chosen], hard_weight=HARD_WEIGHT
    ).loss.backward()


DENSE: tuple[torch.Tensor, ...] = ()


def extra_mib(which: str) -> float:
    """Return the memory that one dense or sparse step adds, measured in a process of its own."""
    out = subprocess.run(
        [sys.executable, "-m", "fusechat.bench.loss", "--memory", which], check=True, capture_output=True, text=True
    )
    return float(out.stdout.split()[-1])


def dense_claims() -> list[Claim]:
    """Compare time and memory with the research code's dense loss, collator included."""
    global DENSE  # noqa: PLW0603
    DENSE = dense_batch()
    seconds = interleave({"dense": run_dense, "ours": run_sparse}, 5)
    saved = extra_mib("dense") - extra_mib("sparse")
    name = f"collate and loss, B={BATCH} S={LENGTH}"
    return [
        at_least(name, "dense targets, as the research code", ratio(seconds, "dense", "ours"), 100),
        at_least(f"{name}, memory saved", "dense targets", saved / 1024, 1, "GiB"),
    ]


def main() -> int:
    """Measure everything and report."""
    global DENSE  # noqa: PLW0603
    options = parser(__doc__ or "")
    options.add_argument("--memory", choices=["dense", "sparse"], help="print the MiB that one step adds, and stop")
    chosen = options.parse_args()
    if chosen.memory:
        DENSE = dense_batch()
        before = peak_rss_mib()
        (run_dense if chosen.memory == "dense" else run_sparse)()
        print(peak_rss_mib() - before)
        return 0
    torch.manual_seed(0)
    quick = chosen.size == "small"
    rounds = 5 if quick else 15
    threads = thread_claim(rounds)
    torch.set_num_threads(1)
    claims = [
        *logits_claims(rounds, not quick, torch.float32),
        *logits_claims(rounds, not quick, torch.bfloat16),
        threads,
        *range_claims(rounds),
        *topk_claims(rounds),
    ]
    if not quick:
        claims += dense_claims()
    labels, ids, logprobs = make_rows(N, V, K)
    inputs = {"logits": torch.randn(N, V), "labels": labels, "ids": ids, "logprobs": logprobs}
    claims += peer_claims(LOGITS, inputs, chosen.against, "cpu", rounds)
    return report("loss", claims, chosen)


if __name__ == "__main__":
    sys.exit(main())
