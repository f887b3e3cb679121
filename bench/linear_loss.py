"""The fusion loss with lm_head in front, against the three matrix products it cannot do without.

    fusechat bench linear-loss [--size small|rows=512,vocabulary=32000,width=512,k=10] [--json OUT] [--check]
        [--against liger-kernel=VENV/bin/python] [--against cut-cross-entropy=VENV/bin/python]

Equality first, then interleaved rounds and one thread; loss and both gradients. Peers run in processes of their own.
"""

from __future__ import annotations

import sys

import torch

from fusechat.bench.baselines import gather_loss
from fusechat.bench.claims import Claim, Work, at_most
from fusechat.bench.loss import HARD_WEIGHT, make_rows
from fusechat.bench.loss_peers import LINEAR, peer_claims
from fusechat.bench.report import parser, report, sizes
from fusechat.bench.timing import interleave, ratio
from fusechat.loss import linear_sparse_soft_ce

PAPER = {"rows": 512, "vocabulary": 32_000, "width": 512, "k": 10}
SMALL = {"rows": 128, "vocabulary": 8_000, "width": 256, "k": 10}


def check_equal(hidden: torch.Tensor, weight: torch.Tensor, rows: tuple[torch.Tensor, ...]) -> None:
    """Stop when loss or either gradient differs from autograd's through the full logits."""
    sides = [[t.detach().clone().requires_grad_(True) for t in (hidden, weight)] for _ in range(2)]
    out = linear_sparse_soft_ce(*sides[0], *rows, hard_weight=HARD_WEIGHT).loss
    reference = gather_loss(sides[1][0] @ sides[1][1].t(), *rows, HARD_WEIGHT)
    out.backward()
    reference.backward()
    torch.testing.assert_close(out, reference, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*sides):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-7)


def peer_inputs(size: dict[str, int]) -> dict[str, torch.Tensor]:
    """Return what every contender is given, in fp32."""
    labels, ids, logprobs = make_rows(size["rows"], size["vocabulary"], size["k"])
    hidden = torch.randn(size["rows"], size["width"])
    weight = torch.randn(size["vocabulary"], size["width"]) / size["width"] ** 0.5
    return {"hidden": hidden, "weight": weight, "labels": labels, "ids": ids, "logprobs": logprobs}


def claim(dtype: torch.dtype, limit: float, size: dict[str, int], rounds: int) -> Claim:
    """Compare in one dtype."""
    rows = make_rows(size["rows"], size["vocabulary"], size["k"])
    hidden = torch.randn(size["rows"], size["width"]).to(dtype).requires_grad_(True)
    weight = (torch.randn(size["vocabulary"], size["width"]) / size["width"] ** 0.5).to(dtype).requires_grad_(True)
    if dtype == torch.float32:
        check_equal(hidden, weight, rows)
    h, w = hidden.detach(), weight.detach()

    def ours() -> None:
        linear_sparse_soft_ce(hidden, weight, *rows, hard_weight=HARD_WEIGHT).loss.backward()
        hidden.grad = weight.grad = None

    def products() -> None:
        # Into new memory, as everybody's: touching it for the first time is part of the cost.
        logits = h @ w.t()
        _ = logits @ w, logits.t() @ h

    seconds = interleave({"ours": ours, "products": products}, rounds)
    name = f"linear_sparse_soft_ce, {str(dtype).removeprefix('torch.')}"
    n_flops = 6 * size["rows"] * size["vocabulary"] * size["width"]
    n_bytes = h.nbytes + 2 * w.nbytes + w.nbytes  # weight read twice and its gradient written, hidden once
    work = Work.of(seconds["ours"], n_bytes, n_flops, str(dtype).removeprefix("torch."))
    against = "its three bare products"
    return at_most(name, against, ratio(seconds, "ours", "products"), limit, samples=seconds["ours"], work=work)


def main() -> int:
    """Measure everything and report."""
    chosen = parser(__doc__ or "", presets=None).parse_args()
    size = sizes(chosen.size, SMALL, PAPER)
    rounds = 3 if chosen.size == "small" else 7
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Where the processor has no bf16 arithmetic torch multiplies by loops: minutes a round at this size.
    bf16_rounds = rounds if torch.ops.mkldnn._is_mkldnn_bf16_supported() else 1
    claims = [claim(torch.float32, 1.1, size, rounds), claim(torch.bfloat16, 1.25, size, bf16_rounds)]
    claims += peer_claims(LINEAR, peer_inputs(size), chosen.against, "cpu", rounds)
    return report("linear-loss", claims, chosen)


if __name__ == "__main__":
    sys.exit(main())
