"""Top-k next-token log-probabilities from hidden states, lm_head in row chunks."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch
from torch import Tensor

from fusechat.errors import ConfigError
from fusechat.loss.backend import NATIVE_FORMATS, backend_for, native_topk
from fusechat.loss_chunks import TOPK_ENGINE_BUDGET_BYTES, TOPK_ENGINE_ROWS, TOPK_GPU_BUDGET_BYTES

_DEFAULT_BUDGET_BYTES = 64 << 20
_BLOCK = 64


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
        budget_bytes: the most memory to take for logits; unless given 512 MiB on a GPU, 8 MiB with the compiled
            engine, and 64 MiB elsewhere.

    Raises ConfigError for shapes and dtypes that do not fit, k outside [1, V], a budget too small for one row, and
    when FUSECHAT_LOSS forces what cannot take these.
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
    backend = backend_for(hidden.device)
    if hidden.dtype not in NATIVE_FORMATS:
        if os.environ.get("FUSECHAT_LOSS") == backend != "torch":
            raise ConfigError(
                f"FUSECHAT_LOSS is {backend}, whose top-k takes float32, bfloat16 or float16; these hidden "
                f"states are {hidden.dtype}: unset it"
            )
        backend = "torch"
    if budget_bytes is None:
        budget_bytes = TOPK_ENGINE_BUDGET_BYTES if backend == "native" else _default_budget(hidden.device)
    # The product in the model's dtype, and torch's fp32 copy of it.
    row_bytes = vocabulary * (hidden.element_size() + (4 if backend == "torch" else 0))
    if budget_bytes < row_bytes:
        raise ConfigError(
            f"budget_bytes is {budget_bytes}, too little for one row of logits: give at least {row_bytes}"
        )

    ids = torch.empty(n_rows, k, dtype=torch.int32, device=hidden.device)
    logprobs = torch.empty(n_rows, k, dtype=torch.float32, device=hidden.device)
    lse = torch.empty(n_rows, dtype=torch.float32, device=hidden.device)
    label_logprob = torch.full((n_rows,), float("nan"), dtype=torch.float32, device=hidden.device)
    known = torch.full((n_rows,), -1, device=hidden.device) if labels is None else labels.long()
    if backend == "native":
        columns = max(1, budget_bytes // (TOPK_ENGINE_ROWS * hidden.element_size()))
        with torch.no_grad():
            for start in range(0, n_rows, TOPK_ENGINE_ROWS):
                part = slice(start, start + TOPK_ENGINE_ROWS)
                found = _rows_by_blocks(hidden[part], weight, k, known[part], bias, softcap or 0.0, columns)
                ids[part], logprobs[part], lse[part], label_logprob[part] = found
        return ids, logprobs, lse, label_logprob
    if backend == "triton":
        step = budget_bytes // row_bytes
        with torch.no_grad():
            for start in range(0, n_rows, step):
                part = slice(start, start + step)
                logits = torch.nn.functional.linear(hidden[part], weight, bias)
                found = topk_rows(logits, k, known[part], softcap or 0.0)
                ids[part], logprobs[part], lse[part], label_logprob[part] = found
        return ids, logprobs, lse, label_logprob
    with torch.no_grad():
        for part, z in _chunks(hidden, weight, budget_bytes // row_bytes, bias, softcap):
            top, index = _largest(z, k)
            z_label = None if labels is None else _at_label(z, labels[part])
            lse[part] = _logsumexp_of(z, top[:, :1])
            ids[part] = index
            logprobs[part] = top - lse[part].unsqueeze(1)
            if z_label is not None:
                label_logprob[part] = z_label - lse[part]
    return ids, logprobs, lse, label_logprob


def _rows_by_blocks(
    hidden: Tensor, weight: Tensor, k: int, labels: Tensor, bias: Tensor | None, softcap: float, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `topk_logprob` does for a few rows, the logits of about `columns` tokens of the vocabulary at a time.

    The candidates are compared by their own logits, equal ones in the order of their ids.
    """
    n_rows, vocabulary = len(hidden), len(weight)
    columns = -(-vocabulary // -(-vocabulary // columns))  # blocks of one size
    buffer = torch.empty(n_rows * columns, dtype=hidden.dtype)
    values, ids, lses = [], [], []
    z_label = torch.full((n_rows,), float("nan"))
    for first in range(0, vocabulary, columns):
        block = weight[first : first + columns]
        z = buffer[: n_rows * len(block)].view(n_rows, len(block))
        if bias is None:
            torch.mm(hidden, block.t(), out=z)
        else:
            torch.addmm(bias[first : first + columns], hidden, block.t(), out=z)
        inside = (labels >= first) & (labels < first + len(block))
        place = torch.where(inside, labels - first, 0)
        found, _, lse, _ = native_topk(z, min(k, len(block)), torch.full((n_rows,), -1), softcap)
        top = _capped(z.gather(1, found.long()).float(), softcap)
        values.append(top)
        ids.append(found + first)
        lses.append(torch.where(top[:, 0] == -torch.inf, -torch.inf, lse))  # a block that no probability falls into
        z_label = torch.where(inside, _capped(z.gather(1, place[:, None])[:, 0].float(), softcap), z_label)
    best, order = torch.cat(values, 1).sort(dim=1, descending=True, stable=True)
    lse = torch.stack(lses, 1).logsumexp(1)
    return torch.cat(ids, 1).gather(1, order[:, :k]), best[:, :k] - lse[:, None], lse, z_label - lse


def _capped(z: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(z / softcap) if softcap else z


def topk_rows(logits: Tensor, k: int, labels: Tensor, softcap: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what `topk_logprob` returns, of the logits [C, V] of a chunk, by the compiled engine or by Triton; softcap
    0 means none."""
    if backend_for(logits.device) == "native":
        return native_topk(logits, k, labels, softcap)
    from fusechat.kernels.topk_logprob import topk_logprob_rows

    values: tuple[Tensor, Tensor, Tensor, Tensor] = topk_logprob_rows(logits, k, labels, softcap)
    return values


def drawn_logprob(
    hidden: Tensor,
    weight: Tensor,
    uniform: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids int64[N, k] drawn from each row's softmax, with replacement, and the labels' logprob float32[N].

    `uniform` float64[N, k] in [0, 1) decides the draws: the first token at which the cumulative probability exceeds
    it. Logits as in `topk_logprob`; the cumulative sums are float64, for a vocabulary's worth of float32 additions
    moves probability between tokens.
    """
    ids = torch.empty(uniform.shape, dtype=torch.int64, device=hidden.device)
    label_logprob = torch.empty(len(ids), dtype=torch.float32, device=hidden.device)
    row_bytes = weight.shape[0] * (hidden.element_size() + 4 + 2 * 8)
    with torch.no_grad():
        step = max(1, _default_budget(hidden.device) // row_bytes)
        for part, z in _chunks(hidden, weight, step, bias, softcap):
            lse = torch.logsumexp(z, 1)
            cumulative = torch.exp(z - lse.unsqueeze(1)).double().cumsum(1)
            point = uniform[part] * cumulative[:, -1:]
            ids[part] = torch.searchsorted(cumulative, point, right=True).clamp_(max=weight.shape[0] - 1)
            label_logprob[part] = _at_label(z, labels[part]) - lse
    return ids, label_logprob


def _default_budget(device: torch.device) -> int:
    return TOPK_GPU_BUDGET_BYTES if device.type == "cuda" else _DEFAULT_BUDGET_BYTES


def _chunks(
    hidden: Tensor, weight: Tensor, step: int, bias: Tensor | None, softcap: float | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the fp32 logits of `step` rows at a time."""
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        z = torch.nn.functional.linear(hidden[part], weight, bias).float()
        if softcap is not None:
            z = z.div_(softcap).tanh_().mul_(softcap)
        yield part, z


def _at_label(z: Tensor, labels: Tensor) -> Tensor:
    label = labels.long()
    return torch.where(label >= 0, z.gather(1, label.clamp(min=0).unsqueeze(1)).squeeze(1), float("nan"))


def _largest(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return z.topk(k): on a CPU by way of the k blocks with the largest maxima, which hold the k largest entries.

    Selecting from 32,000 entries costs torch more than twice as much as their maxima by blocks of 64 do.
    """
    n_rows, vocabulary = z.shape
    n_blocks = vocabulary // _BLOCK
    if z.is_cuda or n_blocks < 4 * k:
        top = z.topk(k, dim=1)
        return top.values, top.indices
    blocks = z[:, : n_blocks * _BLOCK].view(n_rows, n_blocks, _BLOCK)
    best = blocks.amax(2).topk(k, sorted=False).indices
    candidates = blocks.gather(1, best.unsqueeze(2).expand(n_rows, k, _BLOCK)).flatten(1)
    values, place = torch.cat([candidates, z[:, n_blocks * _BLOCK :]], 1).topk(k, dim=1)
    block = best.gather(1, (place // _BLOCK).clamp_(max=k - 1))
    inside = place < k * _BLOCK
    return values, torch.where(inside, block * _BLOCK + place % _BLOCK, (n_blocks - k) * _BLOCK + place)


def _logsumexp_of(z: Tensor, largest: Tensor) -> Tensor:
    """Return logsumexp(z, 1), given each row's largest entry; z, which is in the cache, is overwritten."""
    # e^−80 vanishes in the sum, and what lies below would be denormal, which costs a CPU many times as much.
    total = z.sub_(largest).clamp_(min=-80.0).exp_().sum(1)
    return total.log_().add_(largest.squeeze(1))
