"""The methods of merging: which parameters each takes, and what it asks of the engine for one tensor."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fusechat.errors import ConfigError

REQUIRED = object()
Options = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """One parameter: its default, its range or its choices, and whether every model may have its own value."""

    default: Any
    least: float = -math.inf
    most: float = math.inf
    choices: tuple[str, ...] = ()
    per_model: bool = False
    whole: bool = False  # one plain value for the whole merge: no filters, no gradients


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorValues:
    """All parameters of one tensor, and what identifies its random draw."""

    name: str
    n: int
    shared: Mapping[str, Any]
    per_model: Sequence[Mapping[str, Any]]
    seed: int

    def each(self, parameter: str) -> list[float]:
        """Return one value per target."""
        return [float(values[parameter]) for values in self.per_model]


@dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """A method: its parameters, and its words for the engine. `from_base`: the engine sees differences to the base."""

    parameters: Mapping[str, Parameter]
    options: Callable[[TensorValues], Options]
    from_base: bool = True
    most_targets: int = 1024


_INT8 = Parameter(default=False)  # accepted for mergekit's files; changes nothing here
_WEIGHT = Parameter(default=REQUIRED, per_model=True)
_DENSITY = Parameter(default=1.0, least=0.0, most=1.0, per_model=True)
_LAMBDA = Parameter(default=1.0)
VARIANTS = ("fuseai", "paper", "mergekit")
GRANULARITIES = ("matrix", "layer", "model", "parameter")


def _constant_scale(values: TensorValues, weights: Sequence[float]) -> float:
    scale = float(values.shared.get("lambda", 1.0))
    total = sum(weights)
    if values.shared["normalize"] and abs(total) >= 1e-8:
        scale /= total
    return scale


def _linear(values: TensorValues) -> Options:
    weights = values.each("weight")
    if values.shared["normalize"] and sum(weights) == 0:
        raise ConfigError(f"the weights of {values.name} sum to zero: set normalize: false or other weights")
    return {"weights": weights, "scale": 1 / sum(weights) if values.shared["normalize"] else 1.0}


def _task_arithmetic(values: TensorValues) -> Options:
    weights = values.each("weight")
    return {"weights": weights, "scale": _constant_scale(values, weights)}


def _elected(values: TensorValues) -> Options:
    return {
        "elect": "weighted",
        "weights": values.each("weight"),
        "scale": float(values.shared["lambda"]),
        "divide": "surviving" if values.shared["normalize"] else "none",
    }


def _ties(values: TensorValues) -> Options:
    densities = values.each("density")
    options = _elected(values)
    if any(density < 1 for density in densities):
        # A positive density keeps at least one element, as in mergekit.
        quota = [max(int(d * values.n), min(values.n, 1)) if d > 0 else 0 for d in densities]
        options |= {"mask": "each", "quota": quota}
    return options


def _dare_mask(values: TensorValues) -> Options:
    densities = values.each("density")
    if not values.shared["rescale"]:
        raise ConfigError("rescale: false is not DARE: survivors are divided by their density (use ties to trim)")
    if any(density <= 0 for density in densities):
        raise ConfigError(f"density must be above 0 for {values.name}: a survivor is divided by it")
    if all(density == 1 for density in densities):
        return {}
    keys = [random_key(values.seed, j, values.name) for j in range(len(densities))]
    return {"mask": "random", "keep_share": densities, "random_key": keys}


def random_key(seed: int, model: int, tensor: str) -> int:
    """Return the 64-bit key of one tensor's draw: blocks and threads cannot change what a counter decides."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{model}/{tensor}".encode()).digest()[:8], "little")


def _sce(values: TensorValues) -> Options:
    from fractions import Fraction  # only here: it loads `decimal`

    variant = values.shared["variant"]
    share = Fraction(repr(float(values.shared["select_topk"])))
    options: Options = {
        "weights": [1.0] * len(values.per_model),
        "elect": "plain",
        "energy_weights": True,
        "mask_weights_only": variant == "fuseai",
        "uniform_below": 1e-6 if variant == "mergekit" else 0.0,
        "divide": {"paper": "none", "fuseai": "surviving", "mergekit": "clamped"}[variant],
    }
    if share < 1:
        if len(values.per_model) == 1 and variant != "fuseai":
            raise ConfigError("sce with select_topk below 1 needs two targets: over one, every variance is zero")
        share = share.limit_denominator(10**9)
        options |= {"mask": "shared", "quota_share": (share.numerator, share.denominator, variant != "paper")}
    return options


def _varm(values: TensorValues) -> Options:
    options: Options = {"weights": [1.0] * len(values.per_model)}
    if values.shared["granularity"] == "parameter":
        return options | {"per_parameter": True}
    return options | {"energy_weights": True}


def _slerp(values: TensorValues) -> Options:
    return {"weights": [1 - float(values.shared["t"]), float(values.shared["t"])]}


METHODS: Mapping[str, Method] = {
    "sce": Method(
        parameters={
            "select_topk": Parameter(default=1.0, least=0.0, most=1.0),
            "variant": Parameter(default="fuseai", choices=VARIANTS),
            "int8_mask": _INT8,
        },
        options=_sce,
    ),
    "varm": Method(
        parameters={"granularity": Parameter(default="matrix", choices=GRANULARITIES, whole=True)},
        options=_varm,
    ),
    "linear": Method(
        parameters={"weight": _WEIGHT, "normalize": Parameter(default=True), "int8_mask": _INT8},
        options=_linear,
        from_base=False,
    ),
    "task_arithmetic": Method(
        parameters={
            "weight": _WEIGHT,
            "normalize": Parameter(default=False),
            "lambda": _LAMBDA,
            "int8_mask": _INT8,
        },
        options=_task_arithmetic,
    ),
    "ties": Method(
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "normalize": Parameter(default=True),
            "lambda": _LAMBDA,
            "int8_mask": _INT8,
        },
        options=_ties,
    ),
    "dare_linear": Method(
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "normalize": Parameter(default=False),
            "rescale": Parameter(default=True),
            "lambda": _LAMBDA,
            "int8_mask": _INT8,
        },
        options=lambda values: _task_arithmetic(values) | _dare_mask(values),
    ),
    "dare_ties": Method(
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "normalize": Parameter(default=False),
            "rescale": Parameter(default=True),
            "lambda": _LAMBDA,
            "int8_mask": _INT8,
        },
        options=lambda values: _elected(values) | _dare_mask(values),
    ),
    "slerp": Method(
        parameters={"t": Parameter(default=REQUIRED, least=0.0, most=1.0), "int8_mask": _INT8},
        options=_slerp,
        from_base=False,
        most_targets=1,
    ),
}
