"""The configuration of a run: one YAML, dotted overrides, and no key that is not known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from fusechat.checkpoint import hub_id
from fusechat.config_values import Section, merged, overridden, resolve_paths, validated
from fusechat.errors import ConfigError
from fusechat.layout import MULTI, SFT
from fusechat.recipe import is_recipe, recipe_path
from fusechat.train_config import TrainConfig
from fusechat.yaml_file import read_yaml


class DataConfig(Section):
    """The dialogues everything is computed on."""

    train: str = Field(description="file, or hub id, of the dialogues to fuse on")
    held_out: str | None = Field(
        None, description="file of dialogues only the evaluation sees; else a split of `train`"
    )
    held_out_fraction: float = Field(0.1, gt=0, lt=1, description="share of `train` held out when `held_out` is absent")
    validation: str | None = Field(
        None,
        description="dialogues neither trained nor tested on: a sweep of merges and the best checkpoint choose on them",
    )
    validation_fraction: float = Field(
        0.1, gt=0, lt=1, description="share of what remains of `train` for `merge.sweep` to choose on"
    )
    format: Literal["auto", "sharegpt", "messages", "alpaca", "text"] = Field("auto", description="layout of the file")
    separator: str | list[str] | None = Field(None, description="what separates documents in a text file")
    max_bytes: int | None = Field(None, gt=0, description="running text is cut into pieces of at most this many bytes")
    limit: int | None = Field(None, gt=0, description="use only the first so many dialogues")


_BACKENDS_OF = {
    "cache": ("hf",),
    "device": ("hf",),
    "device_map": ("hf",),
    "tensor_parallel_size": ("vllm",),
    "quantization": ("vllm", "vllm-server"),
    "fast_driver": ("vllm",),
    "engine_args": ("vllm",),
    "engines": ("hf", "vllm"),
    "ray": ("hf", "vllm"),
    "servers": ("vllm-server",),
    "served_model": ("vllm-server",),
    "concurrency": ("vllm-server",),
    "timeout_s": ("vllm-server",),
    "api_key_env": ("vllm-server",),
}
"""Keys of `extract` that not every backend takes, by those that do."""

_KEY_OF_ARGUMENT = {
    "model": "model",
    "dtype": "dtype",
    "quantization": "quantization",
    "tensor_parallel_size": "tensor_parallel_size",
    "trust_remote_code": "trust_remote_code",
    "max_model_len": "max_length_tokens",
    "max_logprobs": "top_k",
}
"""vLLM's arguments that are keys here: what is shared out, stored and planned goes by the keys."""


class ExtractConfig(Section):
    """Top-k log-probabilities of every model (design: one row per position that predicts an assistant token)."""

    backend: Literal["hf", "vllm", "vllm-server"] = Field(
        "hf", description="transformers; vLLM in a process of its own; vLLM servers over HTTP"
    )
    top_k: int = Field(10, ge=1, le=1024, description="log-probabilities kept per row")
    cache: Literal["top-k", "sampled"] = Field(
        "top-k", description="the k likeliest, or k draws whose weights are an unbiased estimate (hf only)"
    )
    template: str = Field("own", description="own | pivot: whose chat template renders a source's dialogues; or a path")
    max_length_tokens: int = Field(2048, ge=2, description="longer dialogues are cut at a turn")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="the forward pass")
    trust_remote_code: bool = Field(
        False, description="run the Python that comes with the model, with all your rights: read it first"
    )
    shard_dialogues: int = Field(512, ge=1, description="dialogues in one shard, the unit of resuming")
    engines: int | None = Field(None, ge=1, description="engines at once; as many as the GPUs hold when absent")
    ray: str | None = Field(None, description="address of a Ray cluster whose actors do the work, or `local`")
    device: str = Field("auto", description="hf: a torch device; a CUDA device where there is one")
    device_map: str | None = Field(None, description="hf: accelerate's placement over several devices, such as auto")
    batch_tokens: int = Field(8192, ge=1, description="hf, and scoring in bits per byte: padded tokens in one pass")
    tensor_parallel_size: int | None = Field(
        None, ge=1, description="vllm: GPUs one engine spreads over; the fewest that hold the model when absent"
    )
    quantization: str | None = Field(
        None, description="vllm: what the checkpoint does not say itself, such as fp8; vllm-server: what is served"
    )
    fast_driver: bool = Field(False, description="vllm: keep the engine's tensors; a patch of vLLM's own code")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="vllm: any other argument of its LLM class")
    servers: list[str] = Field(default_factory=list, description="vllm-server: URLs such as http://host:8000")
    served_model: str | None = Field(None, description="vllm-server: the model's name there, if not its own")
    concurrency: int = Field(16, ge=1, description="vllm-server: requests under way at one endpoint")
    timeout_s: float = Field(600.0, gt=0, description="vllm-server: how long one answer may take")
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="vllm-server: environment variable with the key, where a server wants one"
    )

    @model_validator(mode="after")
    def _backend_knows(self) -> ExtractConfig:
        if self.backend == "vllm-server" and not self.servers:
            raise ValueError("backend: vllm-server needs servers, a list of URLs")
        if not self.api_key_env.isidentifier():  # a key would be written into config.yaml
            raise ValueError("api_key_env is no name of an environment variable: put the key itself into one")
        for url in self.servers:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"servers: {url!r} is no URL: write http://{url}")
        for key, backends in _BACKENDS_OF.items():
            field = ExtractConfig.model_fields[key]
            if self.backend not in backends and getattr(self, key) != field.get_default(call_default_factory=True):
                raise ValueError(f"{key} is for backend: {' or '.join(backends)}, not {self.backend}: remove it")
        for argument, key in _KEY_OF_ARGUMENT.items():
            if argument in self.engine_args:
                raise ValueError(f"engine_args.{argument} is said by {key}: set that instead")
        return self


class SourceConfig(Section):
    """One source model."""

    model: str = Field(description="directory or hub id, owner/name or owner/name@revision")
    name: str = Field("", description="short name in folders and tables; the directory's name when empty")
    extract: ExtractConfig | None = Field(None, description="what differs from the run's `extract` for this source")


class AlignConfig(Section):
    """Source rows to the pivot's positions and vocabulary."""

    preset: Literal["paper"] | None = Field(None, description="all of it as the research code's default mode has it")
    tokens: Literal["bytes", "dtw"] = Field("bytes", description="equal byte ends; dtw warps, for parity")
    vocab: Literal["exact", "prefix", "mined", "ms", "ms-soft", "ms-upstream"] = Field(
        "prefix", description="source ids without a byte twin: dropped, or first piece"
    )
    granularity: Literal["cells", "chain", "first", "gold"] = Field("cells", description="what a finer row may teach")
    unaligned: Literal["gold", "pivot", "skip"] = Field("gold", description="rows without a common byte boundary")
    collisions: Literal["sum", "first"] = Field("sum", description="several source ids on one pivot id")


class MergeConfig(Section):
    """How the targets become one model; with `train.mode: multi` there is one, and only `sweep` is of use."""

    method: Literal["sce", "linear"] = Field("sce", description="any other by `sweep`, or by `fusechat merge`")
    variant: Literal["fuseai", "paper", "mergekit"] = Field("fuseai", description="sce: which of its three readings")
    select_topk: float = Field(0.1, gt=0, le=1, description="sce: τ, the share of elements selected by variance")
    weights: list[float] | None = Field(None, description="linear: one weight per source; equal when absent")
    sweep: list[dict[str, Any]] | None = Field(
        None,
        min_length=1,
        description="merges to compare on validation dialogues, in place of the above: merge_method, parameters, each",
    )

    @model_validator(mode="after")
    def _belongs_to_the_method(self) -> MergeConfig:
        foreign = {"weights"} if self.method == "sce" else {"variant", "select_topk"}
        for name, default in self.changed().items():
            if name in foreign:
                raise ValueError(f"{name} is not of method: {self.method}: leave it out (default {default})")
        idle = [name for name in self.changed() if name != "sweep"] if self.sweep else []
        if idle:
            raise ValueError(f"sweep says every merge itself: leave out {', '.join(idle)}, or write it into the sweep")
        if self.weights is not None and sum(self.weights) == 0:
            raise ValueError("weights sum to zero, and linear divides by their sum: give others")
        return self

    def changed(self) -> dict[str, Any]:
        """Return the defaults of the keys that have other values."""
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {name: default for name, default in defaults.items() if getattr(self, name) != default}


class EvalConfig(Section):
    """Held-out bits per byte with bootstrap intervals over dialogues."""

    sources: bool = Field(
        True, description="score the sources too, by transformers; one that cannot be is named with the reason"
    )
    bootstrap_samples: int = Field(2000, ge=100, le=100_000, description="resamples of dialogues behind every interval")
    confidence: float = Field(0.95, gt=0, lt=1, description="of the intervals")


class RunConfig(Section):
    """One whole fusion."""

    pivot: str = Field(description="directory or hub id of the pivot; owner/name@revision is a revision of it")
    sources: list[SourceConfig] = Field(min_length=1, description="a directory or hub id each, or a section of its own")
    data: DataConfig = Field(description="see its section")
    out: str = Field(description="folder of everything the run makes")
    stores: str | None = Field(
        None, description="folder of extract/ and align/, which runs may share: the `out` of another; `out` when absent"
    )
    seed: int = Field(
        0, ge=0, lt=2**32, description="of the split, the order of training, dropout and every random draw"
    )
    extract: ExtractConfig = ExtractConfig()
    align: AlignConfig = AlignConfig()
    train: TrainConfig = TrainConfig()
    merge: MergeConfig = MergeConfig()
    eval: EvalConfig = EvalConfig()

    @model_validator(mode="after")
    def _sources_are_told_apart(self) -> RunConfig:
        names = [source_name(source) for source in self.sources]
        for name in {"pivot", SFT, "merged", MULTI} & set(names):
            raise ValueError(f"a source may not be named {name!r}")
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named {name!r}: give them a `name`")
        unknown = sorted(set(self.train.source_weights) - {"pivot", *names})
        if unknown:
            raise ValueError(
                f"train.source_weights names {', '.join(unknown)}: there are pivot and the sources {', '.join(names)}"
            )
        return self

    @model_validator(mode="after")
    def _the_test_chooses_nothing(self) -> RunConfig:
        if self.train.final == "best" and self.data.validation is None:
            raise ValueError(
                "train.final: best needs data.validation: chosen by the held-out dialogues, the results would flatter"
            )
        return self

    @model_validator(mode="after")
    def _merge_fits_the_targets(self) -> RunConfig:
        idle = {name: default for name, default in self.merge.changed().items() if name != "sweep"}
        if self.train.mode == "multi" and idle:
            raise ValueError(
                "train.mode: multi makes one target, which is the result: leave out "
                + ", ".join(f"merge.{name} (default {default})" for name, default in idle.items())
            )
        weights = self.merge.weights
        if weights is not None and len(weights) != len(self.sources):
            raise ValueError(f"merge.weights has {len(weights)} numbers for {len(self.sources)} sources: give one each")
        return self

    @model_validator(mode="after")
    def _upstream_knows_no_ranges(self) -> RunConfig:
        if self.train.compat == "upstream" and self.align.preset is None and self.align.granularity == "cells":
            raise ValueError(
                "train.compat: upstream knows no ranges of tokens: set another align.granularity than cells"
            )
        return self

    @model_validator(mode="after")
    def _draws_stay_unbiased(self) -> RunConfig:
        caches = {(source.extract or self.extract).cache for source in self.sources}
        if "sampled" in caches and self.train.temperature != 1.0:
            raise ValueError("extract.cache: sampled is an estimate at train.temperature: 1 only; set it to 1")
        return self


def source_name(source: SourceConfig) -> str:
    """Return the source's short name: the one given, else its model's."""
    return source.name or short_name(source.model)


def short_name(model: str) -> str:
    """Return the last part of a model's path or hub id, less a revision, which may have slashes of its own."""
    is_path = model.startswith((".", "/", "~"))
    return Path(model if is_path else hub_id(model)[0]).name.partition("@")[0]


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML, or a shipped one by `recipe:NAME`, and apply dotted overrides such as `train.epochs=2`.

    Relative paths in the file are relative to the file's own folder, those of a recipe and of overrides to the current
    one. Raises ConfigError for a missing or malformed file, an unknown key (naming the nearest known one) or a wrong
    value.
    """
    folder = Path.cwd() if is_recipe(path) else Path(path).resolve().parent
    path = recipe_path(str(path))
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping with the keys {', '.join(RunConfig.model_fields)}")
    resolve_paths(values, folder)
    changes = overridden(overrides)
    resolve_paths(changes, Path.cwd())
    return parse_config(merged(values, changes), str(path))


def parse_config(values: Any, where: str) -> RunConfig:
    """Validate a mapping as a run's configuration; raises ConfigError in one line.

    A source's `extract` holds what differs from the run's; of that it takes over what its backend knows.
    """
    return validated(RunConfig, _with_source_extract(values), where)


def _with_source_extract(values: Any) -> Any:
    if not isinstance(values, dict) or not isinstance(values.get("sources"), list):
        return values
    common = values.get("extract")
    if not isinstance(common, dict):
        return values
    sources = [
        source | {"extract": merged(_for_backend(common, source["extract"]), source["extract"])}
        if isinstance(source, dict) and isinstance(source.get("extract"), dict)
        else source
        for source in values["sources"]
    ]
    return values | {"sources": sources}


def _for_backend(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Return the run's `extract` without what the backend that a source chose for itself does not take."""
    backend = own.get("backend", common.get("backend", "hf"))
    if backend == common.get("backend", "hf"):
        return common
    return {key: value for key, value in common.items() if backend in _BACKENDS_OF.get(key, (backend,))}


def parse_extract(values: dict[str, Any], overrides: Sequence[str] = (), where: str = "extract") -> ExtractConfig:
    """Build settings of an extraction alone from values and overrides such as `batch_tokens=4096`.

    Raises ConfigError, for `batch_tokens` too where the backend makes its own batches: in a run, scoring goes by it.
    """
    config = validated(ExtractConfig, merged(values, overridden(overrides)), where)
    if config.backend != "hf" and config.batch_tokens != ExtractConfig.model_fields["batch_tokens"].default:
        raise ConfigError(f"{where}: batch_tokens is for backend: hf, not {config.backend}: remove it")
    return config
