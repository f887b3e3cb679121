"""The model's own forward, replaced by one that returns the loss.

DDP gathers gradients, FSDP gathers weights, and DeepSpeed does both, around calls of the modules they know. So the loss
is computed inside `model(...)`, and the part of it that reads the head's weight inside the head's own call: no
parameter is ever read from outside.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.loss import Cells, Divergence, Missing, linear_sparse_soft_ce, upstream_rows
from fusechat.model import head_softcap, scaled_hidden, unwrapped
from fusechat.topk import topk_logprob
from fusechat.train.batch import FusionBatch
from fusechat.train.chunks import alm_row_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class LossSettings:
    """What of the loss does not change during a run; see `fusechat.loss.sparse_soft_ce`."""

    objective: str = "soft"
    """soft: the rows' sparse targets; alm: chunk likelihoods; uld: sorted probabilities."""
    divergence: Divergence = "ce"
    missing: Missing = "tail"
    temperature: float = 1.0
    student_temperature: float = 1.0
    beta: float = 0.5
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    compat: str = "none"
    """upstream: rows as the research code's dense targets hold them."""
    alm_temperature: float = 100.0
    router_weight: float = 0.0
    """Weight of a mixture of experts' load-balancing loss; 0 for models without a router."""
    budget_bytes: int | None = None


# loss float32 scalar (with gradient), and the sums it is made of: hard, soft, router. A plain mapping: FSDP hangs its
# hooks on the tensors it finds in what a module returns.
LossParts = dict[str, Tensor]


def install_loss(model: Any, settings: LossSettings, byte_order: Tensor | None) -> None:
    """Make `model(input_ids, ..., batch=FusionBatch)` return LossParts, sums over the batch's rows.

    Without `batch` the model answers as before. Raises ConfigError for a router loss that the model does not have.
    """
    inner = unwrapped(model)
    inner.fusion = _Fusion(
        settings=settings, byte_order=byte_order, router_loss=router_loss(inner, settings.router_weight)
    )
    inner.forward = MethodType(_with_loss(inner.forward.__func__), inner)
    layer = inner.get_output_embeddings()
    layer.forward = MethodType(_head_with_loss(layer.forward.__func__), layer)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fusion:
    settings: LossSettings
    byte_order: Tensor | None
    router_loss: Callable[..., Any] | None


def _with_loss(own_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, input_ids: Tensor, batch: FusionBatch | None = None, **inputs: Any) -> Any:
        if batch is None:
            return own_forward(self, input_ids=input_ids, **inputs)
        fusion: _Fusion = self.fusion
        if fusion.router_loss is not None:
            inputs["output_router_logits"] = True
        outputs = self.base_model(input_ids=input_ids, use_cache=False, **inputs)
        hidden = scaled_hidden(self, outputs.last_hidden_state).flatten(0, 1).index_select(0, batch.rows)
        parts = self.get_output_embeddings()(hidden, batch, fusion, head_softcap(self))
        if fusion.router_loss is not None:
            config = self.config.get_text_config()
            experts = getattr(config, "num_local_experts", None) or config.num_experts
            mask = inputs.get("attention_mask")
            router = fusion.router_loss(outputs.router_logits, experts, config.num_experts_per_tok, mask)
            # The mean over the step's micro-batches, each by its rows, like every other part of the loss.
            parts["router"] = router * batch.row_weight.sum()
            parts["loss"] = parts["loss"] + fusion.settings.router_weight * parts["router"]
        return parts

    return forward


def _head_with_loss(own_forward: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        self: Any,
        hidden: Tensor,
        batch: FusionBatch | None = None,
        fusion: _Fusion | None = None,
        softcap: float | None = None,
    ) -> Any:
        if batch is None or fusion is None:
            return own_forward(self, hidden)
        device = hidden.device.type
        if torch.is_autocast_enabled(device):
            hidden = hidden.to(torch.get_autocast_dtype(device))
        bias = getattr(self, "bias", None)
        # The loss chooses the dtypes of its products itself.
        with torch.autocast(device, enabled=False):
            weight = self.weight.to(hidden.dtype)
            return head_loss(hidden, weight, bias, softcap, batch, fusion.settings, fusion.byte_order)

    return forward


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    batch: FusionBatch,
    settings: LossSettings,
    byte_order: Tensor | None,
) -> LossParts:
    """Return the loss of hidden states float[R,D] at the batch's rows, summed with the rows' weights.

    Objective `uld` (Universal Logit Distillation, arXiv 2402.12030, eq. 3, on the K largest): λ·CE + (1−λ)·Σ_i |p_(i) −
    q_(i)| over probabilities in descending order. For a given logit vector the ranking is fixed, so that it is twice
    the total variation over the student's own top K. `alm`: see `fusechat.train.chunks`.
    """
    bias = None if bias is None else bias.to(hidden.dtype)
    common: dict[str, Any] = {"bias": bias, "softcap": softcap, "budget_bytes": settings.budget_bytes}
    # Without a gradient `hard` is a score: the cross-entropy with the labels as they are.
    smoothing = settings.label_smoothing if torch.is_grad_enabled() else 0.0
    common |= {"label_smoothing": smoothing, "z_loss": settings.z_loss}
    # Every row counts; to find that out would wait for the device.
    common["kept"] = torch.arange(hidden.shape[0], device=hidden.device)
    # The control, an empty micro-batch and held-out dialogues have no chunks, and no entries either.
    if settings.objective == "alm" and batch.chunk is not None:
        return _alm(hidden, weight, batch, settings, common)
    ids, logprobs, hard_weight, divergence, missing = (
        batch.ids, batch.logprobs, batch.hard_weight, settings.divergence, settings.missing,
    )  # fmt: skip
    row_weight, partition = batch.row_weight, batch.partition
    cells = None
    soft_scale: float | Tensor | None = None
    if settings.objective == "uld":
        if ids.shape[1]:
            own = topk_logprob(
                hidden.detach(), weight.detach(), ids.shape[1], bias=None if bias is None else bias.detach(),
                softcap=softcap, budget_bytes=settings.budget_bytes,
            )  # fmt: skip
            ids = torch.where(ids >= 0, own[0], -1)
        divergence, missing = "tvd", "zero"
        soft_scale = 2.0
    elif settings.compat == "upstream":
        ids, logprobs, soft_scale = upstream_rows(ids, logprobs)
        partition = torch.zeros_like(partition)
    elif byte_order is not None and batch.low is not None and batch.high is not None:
        cells = Cells(order=byte_order.to(batch.low.device), low=batch.low, high=batch.high)
    if soft_scale is not None:
        # λ·hard + (1−λ)·s·soft as one weight and one mixture: w·(λ'·hard + (1−λ')·soft).
        total = hard_weight + (1.0 - hard_weight) * soft_scale
        row_weight, hard_weight = row_weight * total, hard_weight / total
    result = linear_sparse_soft_ce(
        hidden,
        weight,
        batch.labels,
        ids,
        logprobs,
        hard_weight=hard_weight,
        partition=partition,
        cells=cells,
        divergence=divergence,
        missing=missing,
        temperature=settings.temperature,
        student_temperature=settings.student_temperature,
        beta=settings.beta,
        row_weight=row_weight,
        **common,
    )
    soft = result.soft if soft_scale is None else result.soft * soft_scale
    return {
        "loss": result.loss,
        "hard": (result.hard * batch.row_weight).sum(),
        "soft": (soft * batch.row_weight).sum(),
    }


def _alm(
    hidden: Tensor, weight: Tensor, batch: FusionBatch, settings: LossSettings, common: dict[str, Any]
) -> LossParts:
    """Two passes over the head: the first finds how likely the chunks are, the second takes the gradient."""
    nothing: dict[str, Any] = {
        "ids": batch.ids[:, :0],
        "logprobs": batch.logprobs[:, :0],
        "hard_weight": torch.ones_like(batch.hard_weight),
    }
    assert batch.chunk is not None
    assert batch.chunk_logprob is not None
    with torch.no_grad():
        plain = common | {"label_smoothing": 0.0, "z_loss": 0.0}
        nll = linear_sparse_soft_ce(hidden, weight, batch.labels, **nothing, **plain).hard
    value, slope = alm_row_weights(nll, batch.chunk, batch.chunk_logprob, settings.alm_temperature)
    soft_weight = (1.0 - batch.hard_weight) * batch.row_weight
    in_chunk = batch.chunk >= 0
    # ∂(chunk loss)/∂z = slope · ∂nll/∂z, row by row: the gradient of a plain cross-entropy with these weights.
    row_weight = batch.hard_weight * batch.row_weight + torch.where(in_chunk, soft_weight * slope, 0.0)
    result = linear_sparse_soft_ce(hidden, weight, batch.labels, **nothing, row_weight=row_weight, **common)
    first = torch.where(in_chunk, value, 0.0)
    hard = (result.hard * batch.row_weight).sum()
    loss = (batch.hard_weight * batch.row_weight * result.hard).sum() + (soft_weight * first).sum()
    return {"loss": result.loss + (loss - result.loss).detach(), "hard": hard, "soft": first.sum()}


def router_loss(inner: Any, weight: float) -> Callable[..., Any] | None:
    """Return the function of a mixture of experts' router loss, None without weight; raises ConfigError when a model
    has none."""
    if weight == 0.0:
        return None
    function = getattr(sys.modules[type(inner).__module__], "load_balancing_loss_func", None)
    if function is None:
        raise ConfigError(f"{type(inner).__name__} has no router loss: leave train.router_weight out or set it to 0")
    return function  # type: ignore[no-any-return]


def router_weight(config: Any, asked: float | None) -> float:
    """Return the weight of the router loss: the one asked for, else the model's own, 0 for models without one."""
    own = getattr(config.get_text_config(), "router_aux_loss_coef", None)
    return float(own or 0.0) if asked is None else asked
