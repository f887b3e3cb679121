"""Top-k next-token log-probabilities from hidden states, lm_head in row chunks."""

from __future__ import annotations

import torch
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.loss.backend import NATIVE_FORMATS, backend_for, native_topk

_DEFAULT_BUDGET_BYTES = 64 << 20


def topk_logprob(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    labels: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    budget_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ids int32[N, k], logprobs float32[N, k], lse float32[N] and the labels' logprob float32[N].

    Equal to

        logprob = log_softmax(softcap·tanh((hidden @ weight.T + bias) / softcap))
        logprobs, ids = logprob.topk(k)
        label_logprob = logprob.gather(1, labels)

    in fp32, without logits of more than a chunk of rows. Entries are in descending order, the
    log-probabilities those of the full softmax. Rows without a label (`labels` None, or −100) hold NaN as
    their label's logprob.

    Args:
        hidden: float[N, D]. weight: float[V, D] of the same dtype. bias: float[V].
        labels: int64[N]. softcap: as in Gemma 2.
        budget_bytes: the most memory to take beyond inputs and results, 64 MiB unless given.

    Raises ConfigError for shapes and dtypes that do not fit, k outside [1, V], and a budget too small for one
    row.
    """
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ConfigError(f"hidden is {list(hidden.shape)} and weight {list(weight.shape)}, expected [N, D] and [V, D]")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ConfigError(f"hidden is {hidden.dtype} and weight {weight.dtype}, expected one floating dtype")
    n_rows, vocabulary = hidden.shape[0], weight.shape[0]
    if not 1 <= k <= vocabulary:
        raise ConfigError(f"k is {k}, expected 1 <= k <= {vocabulary}, the vocabulary's size")
    if labels is not None and labels.shape != (n_rows,):
        raise ConfigError(f"labels are {list(labels.shape)}, expected int64[{n_rows}]")
    budget_bytes = _DEFAULT_BUDGET_BYTES if budget_bytes is None else budget_bytes
    row_bytes = vocabulary * hidden.element_size()
    if budget_bytes < row_bytes:
        raise ConfigError(
            f"budget_bytes is {budget_bytes}, too little for one row of logits: give at least {row_bytes}"
        )

    ids = torch.empty(n_rows, k, dtype=torch.int32, device=hidden.device)
    logprobs = torch.empty(n_rows, k, dtype=torch.float32, device=hidden.device)
    lse = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    label_logprob = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    labels = torch.full((n_rows,), -1, device=hidden.device) if labels is None else labels.long()
    step = budget_bytes // row_bytes
    buffer = hidden.new_empty(min(step, n_rows), vocabulary)
    with torch.no_grad():
        for start in range(0, n_rows, step):
            part = slice(start, start + step)
            z = buffer[: min(step, n_rows - start)]
            if bias is None:
                torch.mm(hidden[part], weight.t(), out=z)
            else:
                torch.addmm(bias, hidden[part], weight.t(), out=z)
            ids[part], logprobs[part], lse[part], label_logprob[part] = topk_rows(z, k, labels[part], softcap or 0.0)
    return ids, logprobs, lse, label_logprob


def topk_rows(logits: Tensor, k: int, labels: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `topk_logprob` returns, of the logits [C, V] of a chunk; softcap 0 means none."""
    backend = backend_for(logits.device)
    if backend == "native" and logits.dtype in NATIVE_FORMATS:
        return native_topk(logits, k, labels, softcap)
    if backend == "triton" and logits.dtype in NATIVE_FORMATS:
        from fusechat.kernels.topk_logprob import topk_logprob_rows

        values: tuple[Tensor, Tensor, Tensor, Tensor] = topk_logprob_rows(logits, k, labels, softcap)
        return values
    z = logits.float()
    if softcap:
        z = z.div(softcap).tanh_().mul_(softcap)
    lse = torch.logsumexp(z, 1)
    top, ids = z.topk(k, dim=1)
    z_label = z.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    return ids.int(), top - lse.unsqueeze(1), lse, torch.where(labels >= 0, z_label - lse, float("nan"))
