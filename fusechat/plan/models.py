"""Where a plan's facts come from: headers and configs of local models, shipped facts of the paper's, or the hub's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from fusechat.artifact import Json, read_json
from fusechat.checkpoint import hub_id
from fusechat.errors import DataError, first_line
from fusechat.model_shape import (
    ModelShape,
    count_parameters,
    shape_from_config,
    shape_of_directory,
    with_weights,
)

_FOLDER = Path(__file__).parent / "facts"


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
    shape, n_elements = shape_of_directory(directory)
    if n_elements is None:
        return shape, "its config"
    return _of_one_model(shape, n_elements), "its headers"


def _of_one_model(shape: ModelShape, n_elements: int) -> ModelShape:
    counted = count_parameters(shape)
    # Rotary tables, odd extra heads: small. A config of another model than the weights: not small.
    if shape.quantisation is None and shape.known and not math.isclose(counted, n_elements, rel_tol=0.02):
        raise DataError(
            f"{shape.name}: the config describes {counted:,} parameters, the weights hold {n_elements:,}: "
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
        raise DataError(
            f"nothing is known of model {model}: no directory, no answer from the hub ({first_line(error)}), "
            f"and the shipped facts are of {', '.join(known)}"
        ) from error
    elements = {str(dtype): n for dtype, n in stored.items()}
    return _of_one_model(with_weights(shape_from_config(model, config), config, elements), sum(elements.values()))
