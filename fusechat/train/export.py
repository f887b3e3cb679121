"""The finished target: an ordinary model directory in the pivot's dtype, with a card and its provenance."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from fusechat.artifact import Json, atomic_write
from fusechat.errors import FormatError
from fusechat.model import load_model
from fusechat.tokenizer import tokenizer_files
from fusechat.train.refusals import with_adapters
from fusechat.train_config import TrainConfig


def save_target(pivot: Path, state: dict[str, torch.Tensor], config: TrainConfig, out: Path) -> None:
    """Write the trained weights as a model directory; adapters are merged into the pivot's own weights.

    The model is loaded anew: what was trained may be sharded, quantised, compiled or wrapped, and its dtype is another.
    """
    model = load_model(pivot, device="cpu")
    if config.lora is None:
        own = model.state_dict()
        model.load_state_dict({name: tensor.to(own[name].dtype) for name, tensor in state.items() if name in own})
    else:
        own_dtype = model.dtype
        model = with_adapters(model.float(), config)
        adapters = {name: tensor for name, tensor in state.items() if "lora_" in name}
        unknown = model.load_state_dict(adapters, strict=False).unexpected_keys
        if unknown or not adapters:
            raise FormatError(f"the trained state does not fit the adapters: {unknown[:3]}")
        model = model.merge_and_unload().to(own_dtype)
    model.save_pretrained(out)
    for file in tokenizer_files(pivot):  # as they are: saving a loaded tokenizer would rewrite them
        shutil.copy2(file, out / file.name)


def write_card(out: Path, provenance: Json) -> None:
    """Write the model card: what was taught, by whom, and what was measured."""
    request, measured = provenance["request"], provenance["measured"]
    train: dict[str, Any] = request["train"]
    sources = provenance["sources"]
    rows = "\n".join(f"| `{s['name']}` | `{s['store_sha256'][:12]}` | {s['share']:.1%} |" for s in sources)
    taught = (
        f"| source | store | share of the dialogues it teaches |\n|---|---|---|\n{rows}" if sources else "labels only"
    )
    settings = "\n".join(f"  {key}: {value}" for key, value in train.items() if value is not None)
    held_out = measured["held_out_bits_per_byte"]
    figures = [f"loss {measured['first_loss']:.4f} → {measured['last_loss']:.4f}"] if measured["last_loss"] else []
    if held_out:
        figures.append(f"held-out bits per byte {held_out[0][1]:.4f} → {held_out[-1][1]:.4f}")
    text = f"""---
tags: [fusechat]
library_name: transformers
---

# A target of knowledge fusion

Trained from the pivot `{Path(provenance["pivot"]).name}` by [fusechat](https://arxiv.org/abs/2408.07990) on
{provenance["n_dialogues"]:,} dialogues (fingerprint `{provenance["dataset_fingerprint"][:12]}`).

{taught}

Measured: {"; ".join(figures) or "nothing"}. The whole log is `training.jsonl`, all inputs are in `provenance.json`.

```yaml
train:
{settings}
seed: {request["seed"]}
```
"""
    with atomic_write(out / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
