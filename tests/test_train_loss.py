"""The loss of training against plain definitions: every architecture, packing, chunks, sorted probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from fusechat.bench.baselines import collate_dense
from fusechat.errors import ConfigError
from fusechat.model_shape import forward_flops, shape_from_config
from fusechat.train.batch import fusion_batch
from fusechat.train.chunks import alm_row_weights, chunk_divergence
from fusechat.train.collate import collate
from fusechat.train.dataset import Example
from fusechat.train.fit import flops_per_token
from fusechat.train.forward import LossSettings, head_loss, install_loss, router_weight
from fusechat.train.targets import Targets

V = 96
SMALL: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {"tie_word_embeddings": True},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "sliding_window": 5},
    "Phi3": {},
    "GPTNeoX": {"num_key_value_heads": None},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.1},
}


def _model(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    settings = {k: v for k, v in (SMALL | ARCHITECTURES[name] | options).items() if v is not None}
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # a fresh model's logits are all alike
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def _example(seed: int, length: int, k: int = 4) -> Example:
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, V, length)
    rows = np.arange(length // 3, length - 1)
    labels = np.where(np.arange(length) > length // 3, ids, -100)
    top = np.stack([rng.permutation(V)[:k] for _ in rows])
    logprobs = np.log(rng.dirichlet(np.ones(k + 1), len(rows))[:, :k])
    return Example(
        dialogue=seed,
        input_ids=ids,
        labels=labels,
        rows=rows,
        targets=Targets.by(top, logprobs),
        taught=(rng.random(len(rows)) < 0.8).astype(np.float32),
        row_weight=np.ones(len(rows), np.float32),
        origin=np.zeros(len(rows), np.int64),
    )


def _tokens(batch: dict[str, Any]) -> dict[str, Tensor]:
    return {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids") if name in batch}


def _dense(logits: Tensor, batch: dict[str, Any], hard_weight: float) -> Tensor:
    """The loss from the model's own logits, with missing mass as one more event."""
    logprob = torch.log_softmax(logits.flatten(0, 1)[batch["rows"]].double(), 1)
    hard = -logprob.gather(1, batch["row_labels"][:, None]).squeeze(1)
    log_p = batch["target_logprobs"].double()
    log_q = logprob.gather(1, batch["target_ids"].long())
    soft = -(log_p.exp() * log_q).sum(1)
    soft -= (1 - log_p.exp().sum(1)) * torch.log1p(-log_q.exp().sum(1))
    weight = 1 - (1 - hard_weight) * batch["taught"].double()
    return (weight * hard + (1 - weight) * soft).sum()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_loss_is_that_of_the_models_own_logits(name: str) -> None:
    model = _model(name)
    batch = collate([_example(1, 14), _example(2, 9)], pad_token_id=0)
    logits = model(**_tokens(batch), use_cache=False).logits
    expected = _dense(logits, batch, 0.6)
    expected.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    install_loss(model, LossSettings(), None)
    parts = model(**_tokens(batch), batch=fusion_batch(batch, 0.6))
    assert parts["loss"].item() == pytest.approx(expected.item(), rel=2e-5)
    parts["loss"].backward()
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-3, atol=2e-5 * float(gradients[n].abs().max() + 1))
    assert model(**_tokens(batch), use_cache=False).logits.shape == logits.shape  # without a batch, as before


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_rows_give_the_loss_and_gradients_of_padded_ones(name: str) -> None:
    model = _model(name)
    install_loss(model, LossSettings(), None)
    examples = [_example(seed, length) for seed, length in ((1, 14), (2, 9), (3, 11))]
    results = []
    for packing in (False, True):
        batch = collate(examples, pad_token_id=0, packing=packing)
        assert ("position_ids" in batch) == packing
        model.zero_grad()
        loss = model(**_tokens(batch), batch=fusion_batch(batch, 0.6))["loss"]
        loss.backward()
        results.append((loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}))
    (padded, padded_gradients), (packed, packed_gradients) = results
    assert packed == pytest.approx(padded, rel=1e-5)
    for n, gradient in padded_gradients.items():
        torch.testing.assert_close(
            packed_gradients[n], gradient, rtol=1e-3, atol=2e-5 * float(gradient.abs().max() + 1)
        )


def test_the_router_loss_is_kept() -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    model = _model("Mixtral")
    assert router_weight(model.config, None) == pytest.approx(0.1)
    assert router_weight(_model("Llama").config, None) == 0
    batch = collate([_example(1, 14), _example(2, 9)], pad_token_id=0)
    outputs = model(**_tokens(batch), output_router_logits=True, use_cache=False)
    router = load_balancing_loss_func(outputs.router_logits, 4, 2, batch["attention_mask"])
    expected = _dense(outputs.logits, batch, 0.6).item() + 0.1 * router.item() * len(batch["rows"])
    install_loss(model, LossSettings(router_weight=0.1), None)
    parts = model(**_tokens(batch), batch=fusion_batch(batch, 0.6))
    assert parts["loss"].item() == pytest.approx(expected, rel=2e-5)
    with pytest.raises(ConfigError, match="no router loss"):
        install_loss(_model("Llama"), LossSettings(router_weight=0.1), None)


@pytest.mark.parametrize("objective", ["soft", "alm", "uld"])
@pytest.mark.parametrize("packing", [False, True])
def test_a_process_without_dialogues_still_takes_part(packing: bool, objective: str) -> None:
    model = _model("Llama")
    install_loss(model, LossSettings(objective=objective), None)
    batch = collate([], pad_token_id=0, packing=packing)
    loss = model(**_tokens(batch), batch=fusion_batch(batch, 0.5))["loss"]
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_without_a_gradient_the_labels_are_as_they_are() -> None:
    """Held-out bits are of the text, however training smooths its labels."""
    model = _model("Llama")
    batch = collate([_example(1, 14)], pad_token_id=0)
    logits = model(**_tokens(batch), use_cache=False).logits.flatten(0, 1)[batch["rows"]]
    plain, smoothed = (
        F.cross_entropy(logits, batch["row_labels"], reduction="sum", label_smoothing=share).item()
        for share in (0.0, 0.2)
    )
    install_loss(model, LossSettings(label_smoothing=0.2), None)
    assert model(**_tokens(batch), batch=fusion_batch(batch, 0.6))["hard"].item() == pytest.approx(smoothed, rel=2e-5)
    with torch.no_grad():
        scored = model(**_tokens(batch), batch=fusion_batch(batch, 0.6))["hard"].item()
    assert scored == pytest.approx(plain, rel=2e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_flops_are_of_the_weights_a_token_passes(name: str) -> None:
    """Against what the plan makes of the configuration, which sees no module."""
    model = _model(name)
    shape = shape_from_config(name, model.config.to_dict())
    forward = forward_flops(shape, tokens=1, context_tokens=0, head_rows=1)
    assert flops_per_token(model) == pytest.approx(3 * forward, rel=5e-3)  # norms are weights, and no products
    model.requires_grad_(False)
    assert flops_per_token(model) == pytest.approx(2 * forward, rel=5e-3)


def test_a_frozen_head_gets_no_gradient_of_its_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    from fusechat.loss import linear

    wanted = []
    own = linear.linear_loss
    monkeypatch.setattr(linear, "linear_loss", lambda *a: wanted.append(a[-1]) or own(*a))
    model = get_peft_model(_model("Llama", tie_word_embeddings=False), LoraConfig(target_modules=["q_proj"], r=2))
    install_loss(model, LossSettings(), None)
    batch = collate([_example(1, 14)], pad_token_id=0)
    model(**_tokens(batch), batch=fusion_batch(batch, 0.6))["loss"].backward()
    assert wanted == [(True, False, False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_fp32(dtype: torch.dtype) -> None:
    model = _model("Llama")
    install_loss(model, LossSettings(), None)
    batch = collate([_example(1, 14), _example(2, 9)], pad_token_id=0)
    exact = model(**_tokens(batch), batch=fusion_batch(batch, 0.6))["loss"].item()
    with torch.autocast("cpu", dtype=dtype):
        loss = model(**_tokens(batch), batch=fusion_batch(batch, 0.6))["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact, rel=2e-2)


def _head_inputs(n: int = 12, d: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, d, dtype=torch.float64), torch.randn(V, d, dtype=torch.float64)


def _compare(plain: Any, settings: LossSettings, batch: Any) -> None:
    """Compare loss and gradients with a plain fp64 function of (hidden, weight)."""
    hidden, weight = (t.requires_grad_() for t in _head_inputs())
    expected = plain(hidden, weight)
    expected.backward()
    h, w = (t.detach().float().requires_grad_() for t in (hidden, weight))
    loss = head_loss(h, w, None, None, batch, settings, None)["loss"]
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(h.grad.double(), hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), weight.grad, rtol=1e-4, atol=1e-5)


def _columns(n: int = 12, k: int = 5) -> dict[str, Any]:
    rng = np.random.default_rng(4)
    logprobs = -np.sort(-np.log(rng.dirichlet(np.ones(k + 2), n)[:, :k]), axis=1)
    taught = np.ones(n, np.float32)
    taught[3] = 0
    return {
        "rows": torch.arange(n),
        "row_labels": torch.from_numpy(rng.integers(0, V, n)),
        "target_ids": torch.where(torch.from_numpy(taught)[:, None] > 0, 0, -1).expand(n, k).int(),
        "target_logprobs": torch.from_numpy(np.where(taught[:, None] > 0, logprobs, -np.inf)).float(),
        "partition": torch.zeros(n, dtype=torch.bool),
        "row_weight": torch.ones(n),
        "taught": torch.from_numpy(taught),
    }


def test_uld_is_the_distance_of_sorted_probabilities() -> None:
    """arXiv 2402.12030: Σ_i |p_(i) − q_(i)|, both in descending order, on the K that the source stored."""
    columns = _columns()
    teacher = columns["target_logprobs"].double().exp()

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        q = torch.softmax(hidden @ weight.T, 1)
        hard = -q.gather(1, columns["row_labels"][:, None]).squeeze(1).log()
        distance = (q.sort(1, descending=True).values[:, :5] - teacher).abs().sum(1)
        hard_weight = 1 - 0.4 * columns["taught"].double()
        return (hard_weight * hard + (1 - hard_weight) * distance).sum()

    _compare(plain, LossSettings(objective="uld"), fusion_batch(columns, 0.6))


@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_alm_matches_the_likelihoods_of_chunks(temperature: float) -> None:
    """arXiv 2503.20083: f(p^(1/τ) ‖ q^(1/τ)) + f(1 − p^(1/τ) ‖ 1 − q^(1/τ)), f the terms of KL."""
    chunk = torch.tensor([0, 0, -1, -1, 1, 2, 2, 2, -1, 3, 3, 3])
    source = torch.tensor([-2.0, -0.3, -7.5, -1e-9])
    columns = _columns() | {"chunk": chunk, "chunk_logprob": source, "taught": (chunk >= 0).float()}

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        nll = -torch.log_softmax(hidden @ weight.T, 1).gather(1, columns["row_labels"][:, None]).squeeze(1)
        loss = (nll * torch.where(chunk >= 0, 0.6, 1.0)).sum()
        for c, log_p in enumerate(source.double().clamp(max=-1e-6 * temperature)):
            p, q = (log_p / temperature).exp(), (-nll[chunk == c].sum() / temperature).exp()
            loss = loss + 0.4 * (p * torch.log(p / q) + (1 - p) * torch.log((1 - p) / (1 - q)))
        return loss

    _compare(plain, LossSettings(objective="alm", alm_temperature=temperature), fusion_batch(columns, 0.6))


def test_upstream_rows_are_the_dense_targets_of_the_research_code() -> None:
    columns = _columns()
    columns["target_ids"] = torch.arange(12 * 5).view(12, 5).int()
    columns["target_ids"][::2, 3] = columns["target_ids"][::2, 0]
    columns["target_ids"][3] = -1
    columns["partition"][5] = True  # a finer row is an ordinary one there
    ids, logprobs, labels = columns["target_ids"].long(), columns["target_logprobs"], columns["row_labels"]

    def plain(hidden: Tensor, weight: Tensor) -> Tensor:
        q = torch.log_softmax(hidden @ weight.T, -1)
        target = collate_dense(ids.clamp(min=0)[None], logprobs.clamp(min=-99.0)[None], V)[0].double()
        hard = -q.gather(1, labels[:, None]).squeeze(1)
        soft = -(target * q).sum(1)
        return torch.where(columns["taught"] > 0, 0.6 * hard + 0.4 * soft, hard).sum()

    settings = LossSettings(missing="renormalise", compat="upstream")
    _compare(plain, settings, fusion_batch(columns, 0.6))


def test_chunks_as_likely_as_the_sources_cost_nothing() -> None:
    logprob = torch.tensor([-3.0, -0.01, -40.0])
    assert chunk_divergence(logprob, logprob, 100.0).abs().max() < 1e-6
    nll = torch.tensor([1.0, 2.0, 0.01, 40.0])
    values, slope = alm_row_weights(nll, torch.tensor([0, 0, 1, 2]), logprob, 100.0)
    assert values.abs().max() < 1e-5
    assert slope.abs().max() < 1e-4
