"""Where a plan's facts come from: headers and configs of local models, shipped facts of the paper's, or the hub's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fusechat.artifact import Json, read_json
from fusechat.checkpoint import INDEX_FILE, ITEM_BYTES, SINGLE_FILE, hub_id, read_weights
from fusechat.errors import DataError, FormatError
from fusechat.plan.model_shape import ModelShape, count_parameters, shape_from_config

_FOLDER = Path(__file__).parent / "facts"
_WEIGHTS = ("*.safetensors", INDEX_FILE, "*.bin", "*.pth")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def shipped(name: str) -> Json:
    """Return a table of facts that comes with the package."""
    return dict(read_json(_FOLDER / name))


def shipped_models() -> dict[str, Json]:
    """Return the configs of the paper's models by hub id."""
    tables = [read_json(file) for file in sorted((_FOLDER / "models").glob("*.json"))]
    return {table["model"]: table["config"] for table in tables}


def model_shape(model: str) -> tuple[ModelShape, str]:
    """Return the shape of a model and where it was read: a local directory's config, and headers where it has weights,
    the facts shipped with fusechat, or the hub's config and headers.

    Raises DataError for a model without config, FormatError for a header that contradicts its file.
    """
    directory = Path(model).expanduser()
    if directory.is_dir():
        return _local(directory)
    known = shipped_models()
    name, _ = hub_id(model)
    if name in known:
        return shape_from_config(name, known[name]), "shipped facts"
    if directory.is_absolute() or model.startswith("."):
        raise DataError(f"model {model} does not exist: give a directory with config.json and safetensors, or a hub id")
    return _hub(model, sorted(known)), "the hub's headers"


def _local(directory: Path) -> tuple[ModelShape, str]:
    if not (directory / "config.json").exists():
        raise DataError(f"{directory} has no config.json: it is not a model directory")
    config = read_json(directory / "config.json")
    if not isinstance(config, dict):
        raise FormatError(f"{directory / 'config.json'} is not a JSON object")
    if not any(any(directory.glob(pattern)) for pattern in _WEIGHTS):  # of a served source: they are the server's
        return shape_from_config(directory.name, config), "its config"
    elements: dict[str, int] = {}
    for entry in read_weights(directory, SINGLE_FILE, INDEX_FILE).values():
        elements[entry.dtype] = elements.get(entry.dtype, 0) + entry.n_elements
    return _with_headers(directory.name, config, elements), "its headers"


def _with_headers(name: str, config: Json, elements: Mapping[str, int]) -> ModelShape:
    """Return the shape of a config with the size of its weights, and the dtype a forward pass has by itself.

    `elements` counts the stored ones by safetensors' dtypes. A quantised model computes in the dtype its config states:
    its floats are scales and ends.
    """
    shape = shape_from_config(name, config)
    n_elements = sum(elements.values())
    floats = {_FLOATS[dtype]: n for dtype, n in elements.items() if dtype in _FLOATS}
    computed = shape.dtype if shape.quantisation and shape.dtype in _FLOATS.values() else ""
    computed = computed or max(floats, key=lambda dtype: floats[dtype], default="float32")
    size_bytes = sum(n * ITEM_BYTES.get(dtype, 1) for dtype, n in elements.items())
    shape = replace(shape, dtype=computed, weight_bytes=size_bytes)
    counted = count_parameters(shape)
    # Rotary tables, odd extra heads: small. A config of another model than the weights: not small.
    if shape.quantisation is None and shape.known and not math.isclose(counted, n_elements, rel_tol=0.02):
        raise DataError(
            f"{name}: the config describes {counted:,} parameters, the weights hold {n_elements:,}: "
            "config.json and weights are not of one model"
        )
    return shape


def _hub(model: str, known: list[str]) -> ModelShape:
    from huggingface_hub import get_safetensors_metadata, hf_hub_download
    from huggingface_hub.errors import HFValidationError

    try:
        name, revision = hub_id(model)
        config: Any = read_json(Path(hf_hub_download(name, "config.json", revision=revision)))
        stored = get_safetensors_metadata(name, revision=revision).parameter_count
    except (OSError, ValueError, RuntimeError, HFValidationError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"nothing is known of model {model}: no directory, no answer from the hub ({reason}), and the shipped "
            f"facts are of {', '.join(known)}"
        ) from error
    return _with_headers(model, config, {str(dtype): n for dtype, n in stored.items()})
