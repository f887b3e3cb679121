"""A merge's configuration: mergekit's YAML form, read strictly. What is unknown, or in the wrong place, is refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fusechat.errors import ConfigError, nearest
from fusechat.merge.methods import METHODS, REQUIRED, Method, Parameter, TensorValues
from fusechat.merge.settings import Setting, depth_of, parse_setting
from fusechat.yaml_file import read_yaml, yaml_text

Vocab = Literal["error", "base", "pad"]
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_TOP_KEYS = (
    "models", "slices", "base_model", "merge_method", "parameters", "granularity", "vocab", "dtype", "out_dtype",
    "tokenizer", "tokenizer_source", "chat_template", "seed", "name",
)  # fmt: skip
_NOT_OFFERED = (
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear", "karcher", "model_stock", "multislerp",
    "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl",
)  # fmt: skip
_UNSUPPORTED = {
    "modules": "merges by module are not offered here: list whole models under `models`",
    "sweep": "a sweep compares merges on validation text: pass --sweep --data FILE",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelRef:
    """A model and, perhaps, a LoRA adapter on it: directories or hub ids."""

    model: str
    adapter: str | None = None

    def __str__(self) -> str:
        return f"{self.model}+{self.adapter}" if self.adapter else self.model


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetConfig:
    """One model that is merged, with the parameters that are its own."""

    ref: ModelRef
    parameters: Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True, slots=True)
class MergeConfig:
    """A whole merge. `out_dtype` is safetensors' name, None: each tensor keeps the base's."""

    method_name: str
    base: ModelRef
    targets: tuple[TargetConfig, ...]
    parameters: Mapping[str, Setting]
    out_dtype: str | None
    vocab: Vocab
    tokenizer: str | None  # "base", or a directory or hub id
    chat_template: str | None  # Jinja, None: as it comes with the tokenizer
    seed: int
    n_layers: int | None  # that `slices` says every model has

    @property
    def method(self) -> Method:
        """The method of that name."""
        return METHODS[self.method_name]

    def values_for(self, tensor: str, n: int, n_layers: int) -> TensorValues:
        """Resolve every parameter for one tensor of n elements; raises ConfigError when a required one is missing."""
        depth = depth_of(tensor, n_layers)
        shared = {}
        per_model: list[dict[str, Any]] = [{} for _ in self.targets]
        for name, parameter in self.method.parameters.items():
            if not parameter.per_model:
                shared[name] = _resolve(name, parameter, [self.parameters], tensor, depth, "")
                continue
            for values, target in zip(per_model, self.targets):
                scopes = [target.parameters, self.parameters]
                values[name] = _resolve(name, parameter, scopes, tensor, depth, f" of {target.ref}")
        return TensorValues(name=tensor, n=n, shared=shared, per_model=per_model, seed=self.seed)

    def filters(self) -> set[str]:
        """Return every filter, to be checked against the tensors' names."""
        scopes = [self.parameters, *(target.parameters for target in self.targets)]
        return {pattern for scope in scopes for setting in scope.values() for pattern in setting.patterns()}


def load_merge_config(config: Mapping[str, Any] | Path | str) -> tuple[MergeConfig, str]:
    """Read a merge's configuration from a mapping or a YAML file; return it with its text.

    Paths of models are taken from the current folder, as mergekit takes them. Raises ConfigError in one line.
    """
    if isinstance(config, Mapping):
        text = yaml_text(_plain(config))
        return parse_merge_config(config, "merge configuration"), text
    path = Path(config)
    return parse_merge_config(read_yaml(path), str(path)), path.read_text(encoding="utf-8")


def parse_merge_config(raw: Any, where: str) -> MergeConfig:
    """Validate a mapping in mergekit's form; raises ConfigError that starts with `where`."""
    try:
        return _parse(raw)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


def _parse(raw: Any) -> MergeConfig:
    if not isinstance(raw, Mapping):
        raise ConfigError(f"expected a mapping with the keys models, base_model, merge_method, found {raw!r}")
    for key, reason in _UNSUPPORTED.items():
        if key in raw:
            raise ConfigError(f"`{key}`: {reason}")
    _refuse_unknown(raw, _TOP_KEYS, "key")
    if raw.get("merge_method") is None:
        raise ConfigError(f"merge_method is missing: say one of {', '.join(METHODS)}")
    name = str(raw["merge_method"])
    if name in _NOT_OFFERED:
        raise ConfigError(f"merge_method {name} of mergekit is not offered here; there are {', '.join(METHODS)}")
    if name not in METHODS:
        raise ConfigError(f"merge_method {name!r} is not known{nearest(name, METHODS)}")
    method = METHODS[name]
    listed, place, of_slice, n_layers = _listed(raw)
    targets = _targets(listed, method, place)
    base = _base(raw, targets, method)
    if method.from_base or name == "slerp":
        targets = tuple(target for target in targets if target.ref != base)
    if not 1 <= len(targets) <= method.most_targets:
        more = ": name one of the two as base_model" if name == "slerp" and len(targets) == 2 else ""
        raise ConfigError(f"{name} takes {_count(method)} besides the base, found {len(targets)}{more}")
    shared = raw.get("parameters")
    if "granularity" in raw and (shared is None or isinstance(shared, Mapping)):
        shared = {"granularity": raw["granularity"]} | dict(shared or {})
    parameters = _settings(shared, method, "parameters", per_model_only=False)
    for key, setting in _settings(of_slice, method, "slices[0].parameters", per_model_only=False).items():
        parameters[key] = Setting((*setting.rules, *(parameters[key].rules if key in parameters else ())))
    if name == "linear" and raw.get("base_model") and base not in [t.ref for t in targets] and "weight" in parameters:
        raise ConfigError("a weight for all with a base_model outside `models` is ambiguous: list the base, or not")
    out_dtype = _dtype(raw, "out_dtype") or _dtype(raw, "dtype")
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise ConfigError(f"seed must be a whole number, found {seed!r}")
    config = MergeConfig(
        method_name=name, base=base, targets=targets, parameters=parameters, out_dtype=out_dtype,
        vocab=_choice(raw.get("vocab", "error"), ("error", "base", "pad"), "vocab"),
        tokenizer=_tokenizer(raw), chat_template=_chat_template(raw.get("chat_template")), seed=seed, n_layers=n_layers,
    )  # fmt: skip
    if not config.filters():  # else what the method asks is checked by tensor
        method.options(config.values_for("", 1, 1))
    return config


def _listed(raw: Mapping[str, Any]) -> tuple[Any, str, Any, int | None]:
    """Return the list of models, its place in the YAML, and of one slice of whole models its parameters and layers."""
    slices = raw.get("slices")
    if slices is None:
        return raw.get("models"), "models", None, None
    if raw.get("models") is not None:
        raise ConfigError("give models or slices, not both")
    if not isinstance(slices, list) or len(slices) != 1 or not isinstance(slices[0], Mapping):
        raise ConfigError("`slices`: only one slice, of whole models, is offered: layers cannot be put together anew")
    _refuse_unknown(slices[0], ("sources", "parameters"), "key in slices[0]")
    sources = slices[0].get("sources")
    if not isinstance(sources, list) or not sources or not all(isinstance(source, Mapping) for source in sources):
        raise ConfigError("slices[0].sources must be a list of models, each with its layer_range")
    first = sources[0].get("layer_range")
    for source in sources:
        given = source.get("layer_range")
        whole = isinstance(given, list) and len(given) == 2 and all(type(at) is int for at in given) and given[0] == 0
        if not whole or given[1] < 1 or given != first:
            raise ConfigError(f"slices[0]: layer_range must be [0, number of layers] in every source, found {given!r}")
    models = [{key: value for key, value in source.items() if key != "layer_range"} for source in sources]
    return models, "slices[0].sources", slices[0].get("parameters"), first[1]


def _targets(raw: Any, method: Method, place: str) -> tuple[TargetConfig, ...]:
    if not isinstance(raw, list) or not raw:
        raise ConfigError("`models` must be a list of the models to merge")
    targets = []
    for i, item in enumerate(raw):
        where = f"{place}[{i}]"
        entry = {"model": item} if isinstance(item, str) else item
        if not isinstance(entry, Mapping):
            raise ConfigError(f"{where} must have a `model`, found {entry!r}")
        _refuse_unknown(entry, ("model", "adapter", "parameters"), f"key in {where}")
        ref = _ref(entry.get("model"), where, entry.get("adapter"))
        parameters = _settings(entry.get("parameters"), method, f"{where}.parameters", per_model_only=True)
        targets.append(TargetConfig(ref=ref, parameters=parameters))
    refs = [target.ref for target in targets]
    for ref in refs:
        if refs.count(ref) > 1:
            raise ConfigError(f"the model {ref} is listed twice")
    return tuple(targets)


def _base(raw: Mapping[str, Any], targets: tuple[TargetConfig, ...], method: Method) -> ModelRef:
    if raw.get("base_model") is None:
        if raw["merge_method"] == "linear":
            return targets[0].ref
        raise ConfigError(f"{raw['merge_method']} needs `base_model`: the model all others were tuned from")
    return _ref(raw["base_model"], "base_model", None)


def _ref(raw: Any, where: str, adapter: Any) -> ModelRef:
    # mergekit's long form: {model: {model: {path: X}, lora: {model: {path: Y}}}}; its short form is X+Y.
    if not isinstance(raw, str) or not raw:
        raise ConfigError(
            f"{where}: `model` must be a directory or hub id, with an adapter MODEL+ADAPTER, found {raw!r}"
        )
    model, plus, inline = raw.partition("+")
    if plus and Path(raw).expanduser().is_dir():
        model, inline = raw, ""
    if adapter is not None and (not isinstance(adapter, str) or inline):
        raise ConfigError(f"{where}: `adapter` must be one directory or hub id, given once, found {adapter!r}")
    if not model:
        raise ConfigError(f"{where}: {raw!r} names an adapter without its model")
    return ModelRef(model=model, adapter=adapter or inline or None)


def _settings(raw: Any, method: Method, where: str, *, per_model_only: bool) -> dict[str, Setting]:
    if raw is None:
        return {}
    if not isinstance(raw, Mapping):
        raise ConfigError(f"`{where}` must be a mapping, found {raw!r}")
    _refuse_unknown(raw, method.parameters, f"parameter in {where}")
    settings = {}
    for name, value in raw.items():
        if per_model_only and not method.parameters[name].per_model:
            raise ConfigError(
                f"{where}.{name}: {name} is one value for the whole merge, give it in top-level `parameters`"
            )
        setting = parse_setting(value, f"{where}.{name}")
        if method.parameters[name].whole and not setting.plain:
            raise ConfigError(f"{where}.{name} is one value for the whole merge: give it without filters or a gradient")
        for rule in setting.rules:
            for scalar in rule.values:
                _check(name, method.parameters[name], scalar, f"{where}.{name}")
        settings[name] = setting
    return settings


def _check(name: str, parameter: Parameter, value: Any, where: str) -> None:
    if parameter.choices:
        _choice(value, parameter.choices, where)
    elif isinstance(parameter.default, bool):
        if not isinstance(value, bool):
            raise ConfigError(f"{where} must be true or false, found {value!r}")
    elif isinstance(value, bool) or not isinstance(value, int | float) or not abs(float(value)) < float("inf"):
        raise ConfigError(f"{where} must be a number, found {value!r}")
    elif not parameter.least <= value <= parameter.most:
        raise ConfigError(f"{where} must lie between {parameter.least:g} and {parameter.most:g}, found {value!r}")


def _resolve(
    name: str, parameter: Parameter, scopes: Iterable[Mapping[str, Setting]], tensor: str, depth: float, whose: str
) -> Any:
    for scope in scopes:
        value = scope[name].resolve(tensor, depth) if name in scope else None
        if value is not None:
            return value
    if parameter.default is REQUIRED:
        where = f" for {tensor}" if tensor else ""
        raise ConfigError(f"the parameter {name}{whose} has no value{where}: give it under `parameters`")
    return parameter.default


def _dtype(raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    return None if value is None else DTYPES[_choice(value, tuple(DTYPES), key)]


def _tokenizer(raw: Mapping[str, Any]) -> str | None:
    nested = raw.get("tokenizer")
    if nested is not None and raw.get("tokenizer_source") is not None:
        raise ConfigError("give tokenizer or tokenizer_source, not both")
    source = raw.get("tokenizer_source")
    if nested is not None:
        if not isinstance(nested, Mapping) or not nested:
            raise ConfigError(f"tokenizer must be a mapping with `source`, found {nested!r}")
        if "tokens" in nested or "pad_to_multiple_of" in nested:
            raise ConfigError(
                "tokenizer.tokens and pad_to_multiple_of would rebuild the vocabulary, which is not offered"
            )
        _refuse_unknown(nested, ("source",), "key in tokenizer")
        source = nested.get("source", "")
    if source == "union":
        raise ConfigError("tokenizer source `union` would renumber the vocabulary: use base or the path of a tokenizer")
    if source is not None and (not isinstance(source, str) or not source):
        raise ConfigError(f"tokenizer source must be base or a path, found {source!r}")
    return source


def _chat_template(given: Any) -> str | None:
    if given in (None, "auto"):
        return None
    if isinstance(given, str) and given.endswith(".jinja"):
        try:
            return Path(given).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat_template: cannot read {given}: {error}") from error
    if not isinstance(given, str) or "{" not in given:
        raise ConfigError(f"chat_template must be auto, a .jinja file or the template itself, found {given!r}")
    return given


def _count(method: Method) -> str:
    return "1 model" if method.most_targets == 1 else f"1 to {method.most_targets} models"


def _choice(value: Any, choices: tuple[str, ...], where: str) -> Any:
    if value not in choices:
        raise ConfigError(f"{where} must be one of {', '.join(choices)}, found {value!r}")
    return value


def _refuse_unknown(raw: Mapping[Any, Any], known: Iterable[str], what: str) -> None:
    for key in raw:
        if key not in (known := list(known)):
            raise ConfigError(f"unknown {what}: `{key}`{nearest(str(key), known)}")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
