"""The fusion loss (design: one soft target of K + 1 entries a row; L = λ·L_SFT + (1 − λ)·L_Fusion, arXiv
2408.07990, eq. 4)."""

from __future__ import annotations

from fusechat.loss.choice import Choice, candidate_weights, mix_candidates
from fusechat.loss.linear import linear_sparse_soft_ce
from fusechat.loss.logits import sparse_soft_ce
from fusechat.loss.options import Divergence, LossOptions, Missing
from fusechat.loss.rows import IGNORE_LABEL, Cells, LossOutput
from fusechat.loss.upstream import upstream_rows

__all__ = [
    "IGNORE_LABEL",
    "Cells",
    "Choice",
    "Divergence",
    "LossOptions",
    "LossOutput",
    "Missing",
    "candidate_weights",
    "linear_sparse_soft_ce",
    "mix_candidates",
    "sparse_soft_ce",
    "upstream_rows",
]
