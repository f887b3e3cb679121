"""Where every tensor of the output lies before one of them is computed: shards, headers, offsets."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from fusechat.artifact import Json
from fusechat.checkpoint import ITEM_BYTES
from fusechat.merge.inputs import TensorPlan

MAX_SHARD_BYTES = 5_000_000_000  # what save_pretrained uses


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """One tensor's place: `offset` is absolute in its shard."""

    plan: TensorPlan
    offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One output file: its header (with the length in front) and its tensors."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]
    size_bytes: int


def size_bytes(plan: TensorPlan) -> int:
    """Return the size of one output tensor."""
    return math.prod(plan.shape) * ITEM_BYTES[plan.dtype]


def lay_out(plans: Sequence[TensorPlan], max_shard_bytes: int = MAX_SHARD_BYTES) -> list[Shard]:
    """Distribute tensors over shards in the base's order, none above `max_shard_bytes` unless one tensor is."""
    groups: list[list[TensorPlan]] = [[]]
    filled = 0
    for plan in plans:
        if groups[-1] and filled + size_bytes(plan) > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(plan)
        filled += size_bytes(plan)
    if len(groups) == 1:
        return [_shard("model.safetensors", groups[0])]
    return [_shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def _shard(name: str, group: list[TensorPlan]) -> Shard:
    # Wider items first: every tensor is then aligned to its own items, for readers that map the file.
    ordered = sorted(group, key=lambda plan: -ITEM_BYTES[plan.dtype])
    entries: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for plan in ordered:
        end = offset + size_bytes(plan)
        entries[plan.name] = {"dtype": plan.dtype, "shape": list(plan.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    starts = {plan.name: entries[plan.name]["data_offsets"][0] for plan in ordered}
    slots = tuple(Slot(plan=plan, offset=len(header) + starts[plan.name]) for plan in group)
    return Shard(name=name, header=header, slots=slots, size_bytes=len(header) + offset)


def index_json(shards: Sequence[Shard]) -> Json:
    """Return the content of model.safetensors.index.json."""
    total = sum(size_bytes(slot.plan) for shard in shards for slot in shard.slots)
    weight_map = {slot.plan.name: shard.name for shard in shards for slot in shard.slots}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
