"""A PEFT LoRA adapter as a change to a model's tensors, W + scale · B A, added block by block while a merge streams."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusechat.artifact import Json, read_json, sha256_bytes
from fusechat.checkpoint import Checkpoint, TensorEntry, read_header, read_tensor
from fusechat.errors import DataError, FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    F32 = npt.NDArray[np.float32]

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>embedding_)?(?P<side>[AB])(?:\.weight)?$")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Factors:
    a: TensorEntry
    b: TensorEntry
    transposed: bool  # the module keeps its weight as [in, out], or is an embedding
    scale: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Adapter:
    """An adapter's factors by the name of the tensor they change."""

    directory: Path
    factors: Mapping[str, _Factors]
    config_sha256: str

    @property
    def files(self) -> tuple[Path, ...]:
        """The adapter's weight file."""
        return (self.directory / WEIGHTS_FILE,)

    @property
    def largest_bytes(self) -> int:
        """The memory one tensor's factors take at most."""
        return max((4 * (f.a.n_elements + f.b.n_elements) for f in self.factors.values()), default=0)

    def low_rank(self, tensor: str) -> tuple[F32, F32, float] | None:
        """Return (A [rank, columns], B [rows, rank], scale) of a tensor's update, None where there is none."""
        found = self.factors.get(tensor)
        if found is None:
            return None
        import numpy as np

        a, b = (np.asarray(read_tensor(entry), np.float32) for entry in (found.a, found.b))
        if found.transposed:
            a, b = b.T, a.T
        return np.ascontiguousarray(a), np.ascontiguousarray(b), found.scale


def open_adapter(directory: Path, model: Checkpoint) -> Adapter:
    """Read a LoRA adapter's config and header, and check both against the model it changes.

    Raises DataError for kinds of adapters that are not W + scale · B A, or that do not fit the model.
    """
    config = read_json(directory / CONFIG_FILE)
    _refuse_other_kinds(directory, config)
    if not (directory / WEIGHTS_FILE).exists():
        raise DataError(f"{directory} has no {WEIGHTS_FILE}: save the adapter with safe_serialization=True")
    sides: dict[str, dict[str, TensorEntry]] = {}
    embeddings = set()
    for name, entry in read_header(directory / WEIGHTS_FILE).items():
        match = _FACTOR.match(name.removeprefix(_PREFIX))
        if match is None or not name.startswith(_PREFIX):
            raise DataError(
                f"{entry.file}: {name} is no LoRA factor: merge this adapter with peft's merge_and_unload first"
            )
        sides.setdefault(match["module"], {})[match["side"]] = entry
        if match["kind"]:
            embeddings.add(match["module"])
    factors = {}
    for module, pair in sides.items():
        tensor = f"{module}.weight"
        if pair.keys() != {"A", "B"}:
            raise FormatError(f"{directory / WEIGHTS_FILE} has one half of the factors of {module}")
        if tensor not in model.tensors:
            raise DataError(
                f"{directory} changes {tensor}, which {model.directory} does not have: another model's adapter"
            )
        transposed = bool(config.get("fan_in_fan_out")) or module in embeddings
        factors[tensor] = _Factors(
            a=pair["A"], b=pair["B"], transposed=transposed, scale=_scale(config, module, pair["A"])
        )
        _check_shapes(directory, tensor, model.tensors[tensor], factors[tensor])
    digest = sha256_bytes((directory / CONFIG_FILE).read_bytes())
    return Adapter(directory=directory, factors=factors, config_sha256=digest)


def _refuse_other_kinds(directory: Path, config: Any) -> None:
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise DataError(f"{directory} is no LoRA adapter: its {CONFIG_FILE} must have peft_type LORA")
    for key in (
        "use_dora",
        "modules_to_save",
        "layer_replication",
        "trainable_token_indices",
        "use_bdlora",
        "lora_bias",
    ):
        if config.get(key):
            raise DataError(f"{directory} uses {key}: merge this adapter with peft's merge_and_unload first")
    if config.get("bias", "none") != "none":
        raise DataError(f"{directory} trained biases: merge this adapter with peft's merge_and_unload first")


def _scale(config: Json, module: str, a: TensorEntry) -> float:
    rank = _pattern(config.get("rank_pattern"), module, config.get("r"))
    alpha = _pattern(config.get("alpha_pattern"), module, config.get("lora_alpha"))
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float) or rank not in a.shape:
        raise DataError(
            f"{a.file}: the rank and alpha of {module} in {CONFIG_FILE} ({rank}, {alpha}) do not fit its factors"
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, module: str, default: Any) -> Any:
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _check_shapes(directory: Path, tensor: str, entry: TensorEntry, factors: _Factors) -> None:
    a, b = (factors.b.shape[::-1], factors.a.shape[::-1]) if factors.transposed else (factors.a.shape, factors.b.shape)
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or (b[0], a[1]) != entry.shape:
        raise DataError(
            f"{directory}: the factors of {tensor} are {list(factors.b.shape)} and {list(factors.a.shape)}, "
            f"which do not give its shape {list(entry.shape)}"
        )
