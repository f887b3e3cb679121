"""The configuration refuses what it does not know and says what was meant."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from fusechat.cli import app
from fusechat.commands.evaluate.names import key_values
from fusechat.config import ExtractConfig, load_config, parse_config, parse_extract, short_name, source_name
from fusechat.config_values import overridden
from fusechat.errors import ConfigError
from fusechat.train_config import TrainConfig, parse_train
from fusechat.yaml_file import yaml_text

MINIMAL = "pivot: ./p\nsources: [./a, {model: org/b, name: bee}]\ndata: {train: ./x.jsonl}\nout: runs/one\n"


def _write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def test_paths_are_relative_to_the_file_and_hub_ids_stay(tmp_path: Path) -> None:
    config = load_config(_write(tmp_path, MINIMAL))
    assert config.pivot == str(tmp_path / "p")
    assert config.out == str(tmp_path / "runs/one")
    assert config.sources[0].model == str(tmp_path / "a")
    assert config.sources[1].model == "org/b"
    assert [source_name(s) for s in config.sources] == ["a", "bee"]
    pinned = load_config(_write(tmp_path, MINIMAL), ["sources=[org/b@v1.0]"])
    assert (pinned.sources[0].model, source_name(pinned.sources[0])) == ("org/b@v1.0", "b")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("org/b@refs/pr/1", "b"), ("/models/b", "b"), ("/models/b/", "b"), ("/models/by@hand/b", "b"),
        ("./by@hand/b", "b"), ("b@v1", "b"),
    ],
)  # fmt: skip
def test_a_source_is_called_by_its_model_less_the_revision(model: str, name: str) -> None:
    """Catches a revision with slashes whose last part becomes the name."""
    assert short_name(model) == name


def test_overrides_change_single_keys_and_keep_their_neighbours(tmp_path: Path) -> None:
    text = MINIMAL + "train: {epochs: 2, batch_size: 8, micro_batch_size: 8}\n"
    config = load_config(_write(tmp_path, text), ["train.epochs=5", "merge.variant=paper"])
    assert (config.train.epochs, config.train.batch_size, config.merge.variant) == (5, 8, "paper")


@pytest.mark.parametrize(
    ("addition", "overrides", "expected"),
    [
        ("trian: {}\n", [], "unknown key `trian`, did you mean `train`?"),
        ("train: {hard_wieght: 1}\n", [], "unknown key `train.hard_wieght`, did you mean `hard_weight`?"),
        ("train: {lora: {rnak: 1}}\n", [], "unknown key `train.lora.rnak`, did you mean `rank`?"),
        ("train: {hard_weight: 2}\n", [], "`train.hard_weight`: Input should be less than or equal to 1, got 2"),
        ("train: {batch_size: 7}\n", [], "batch_size must be a multiple of micro_batch_size"),
        ("", ["train.epochs"], "override `train.epochs` is not of the form key.subkey=value"),
        ("", ["train=3", "train.epochs=2"], "`train` was given a value of its own before"),
        ("", ["sources=[./a, ./b/a]"], "two sources are named 'a'"),
        ("", ["sources=[{model: ./a, name: sft}]"], "may not be named 'sft'"),
        ("", ["sources=[]"], "at least 1 item"),
        ("train: {compat: upstream}\n", [], "compat: upstream takes divergence ce, missing renormalise"),
        (
            "train: {compat: upstream, missing: renormalise}\n",
            [],
            "train.compat: upstream knows no ranges of tokens: set another align.granularity than cells",
        ),
        (
            "train: {select: weighted, source_weights: {a: 1, c: 2}}\n",
            [],
            "names c: there are pivot and the sources a, bee",
        ),
        (
            "merge: {method: linear, weights: [1, 2, 3]}\n",
            [],
            "merge.weights has 3 numbers for 2 sources: give one each",
        ),
        ("merge: {method: linear, weights: [1, -1]}\n", [], "weights sum to zero"),
        ("merge: {weights: [1, 2]}\n", [], "weights is not of method: sce: leave it out (default None)"),
        ("merge: {select_topk: 1}\n", ["merge.method=linear"], "select_topk is not of method: linear: leave it out"),
        ("merge: {variant: paper}\n", ["train.mode=multi"], "leave out merge.variant (default fuseai)"),
        (
            "merge: {select_topk: 0.5, sweep: [{merge_method: sce}]}\n",
            [],
            "sweep says every merge itself: leave out select_topk",
        ),
        ("x: [", [], "is not valid YAML"),
        ("train: {epochs: 1}\ntrain: {batch_size: 8}\n", [], "the key 'train' appears twice"),
        ("", ["data.separator=---"], "YAML reads a comment or a mark there: put it in quotes"),
        ("", ["data.separator=###"], "YAML reads a comment or a mark there: put it in quotes"),
    ],
)
def test_mistakes_are_named_in_one_line(tmp_path: Path, addition: str, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(_write(tmp_path, MINIMAL + addition), overrides)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_belongs_together_is_taken(tmp_path: Path) -> None:
    path = _write(tmp_path, MINIMAL)
    weighted = ["train.select=weighted", "train.source_weights={pivot: 0, a: 1, bee: 2}"]
    assert load_config(path, weighted).train.source_weights["bee"] == 2
    assert load_config(path, ["merge.method=linear", "merge.weights=[1, 3]"]).merge.weights == [1, 3]
    multi = load_config(path, ["train.mode=multi", "merge.select_topk=0.1"])  # a default written out is no wish
    assert parse_config(multi.model_dump(), "again") == multi
    swept = load_config(path, ["merge.sweep=[{merge_method: sce}]", "merge.variant=fuseai"])
    assert parse_config(swept.model_dump(), "again") == swept


def test_numbers_without_a_point_are_numbers_where_no_type_is_declared(tmp_path: Path) -> None:
    """YAML 1.1 takes 1e-6 for text, which transformers' scheduler would then divide by."""
    path = _write(tmp_path, MINIMAL + "train: {lr_scheduler_args: {min_lr: 1e-6, name: '1e-6', commit: 1e6f}}\n")
    config = load_config(path, ["extract={backend: vllm, engine_args: {swap_space: 2.5E+3}}"])
    assert config.train.lr_scheduler_args == {"min_lr": 1e-6, "name": "1e-6", "commit": "1e6f"}
    assert config.extract.engine_args == {"swap_space": 2500.0}
    assert parse_train(["lr_scheduler_args.min_lr=1e-6", "learning_rate=5e-6"]).lr_scheduler_args == {"min_lr": 1e-6}


def test_a_configuration_is_written_as_it_is_read(tmp_path: Path) -> None:
    """Catches text in the form of a number, such as the abbreviated commit 12e4567, that becomes one in config.yaml."""
    text = MINIMAL.replace("bee", "'1e5'") + "extract: {backend: vllm, engine_args: {revision: '12e4567', at: 1e-7}}\n"
    config = load_config(_write(tmp_path, text), ["data.separator='---'", "stores=", "data.held_out=~"])
    assert config.data.separator == "---"
    (tmp_path / "config.yaml").write_text(yaml_text(config.model_dump()))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(("command", "section"), [("train", TrainConfig), ("extract", ExtractConfig)])
def test_help_lists_every_key_within_eighty_columns(command: str, section: type[BaseModel]) -> None:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80"})
    assert done.exit_code == 0
    lines = done.output.splitlines()
    assert max(map(len, lines)) <= 80
    told = {line.partition("=")[0] for line in lines}
    options = {"backend", "top_k", "template", "max_length_tokens", "dtype", "tensor_parallel_size", "quantization"}
    options |= {"engines", "servers", "ray", "trust_remote_code"}  # of extract, in the table above
    wanted = set(section.model_fields) | {"lora.rank"} if command == "train" else set(section.model_fields) - options
    assert told & {*wanted, *options} == wanted


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing\.yaml"):
        load_config(tmp_path / "nothing.yaml")


def test_training_settings_alone() -> None:
    assert parse_train(["epochs=2", "lora={rank: 4}"]).lora is not None
    with pytest.raises(ConfigError, match="did you mean `epochs`"):
        parse_train(["epoch=2"])


@pytest.mark.parametrize(
    ("objective", "setting", "whose"),
    [
        ("alm", "divergence=kl", "soft"),
        ("alm", "missing=zero", "soft"),
        ("alm", "temperature=2", "soft or uld"),
        ("alm", "student_temperature=2", "soft or uld"),
        ("alm", "label_smoothing=0.1", "soft or uld"),
        ("alm", "z_loss=0.1", "soft"),
        ("alm", "when_pivot_wins=pivot", "soft"),
        ("uld", "divergence=kl", "soft"),
        ("uld", "beta=0.1", "soft"),
        ("uld", "missing=zero", "soft"),
        ("uld", "z_loss=0.1", "soft"),
        ("uld", "compat=upstream", "soft"),
        ("uld", "alm_temperature=1", "alm"),
        ("soft", "alm_temperature=1", "alm"),
    ],
)
def test_keys_of_another_objective_are_refused(objective: str, setting: str, whose: str) -> None:
    """Catches a setting that nothing follows."""
    key = setting.partition("=")[0]
    with pytest.raises(ConfigError, match=f"{key} is for objective: {whose}, not {objective}: remove it") as error:
        parse_train([f"objective={objective}", setting])
    assert "\n" not in str(error.value)
    default = parse_train([]).model_dump()[key]
    assert parse_train([f"objective={objective}", f"{key}={default}"]).objective == objective


def test_a_source_says_only_what_differs_for_it(tmp_path: Path) -> None:
    text = MINIMAL.replace("name: bee}", "name: bee, extract: {max_length_tokens: 9, engine_args: {seed: 1}}}")
    common = "extract: {backend: vllm, top_k: 7, engine_args: {block_size: 16}}\n"
    config = load_config(_write(tmp_path, text + common))
    assert config.sources[0].extract is None
    bee = config.sources[1].extract
    assert bee is not None
    assert (bee.backend, bee.top_k, bee.engine_args) == ("vllm", 7, {"block_size": 16, "seed": 1})
    assert (bee.max_length_tokens, config.extract.max_length_tokens) == (9, 2048)
    assert parse_config(config.model_dump(), "again") == config
    with pytest.raises(ConfigError, match=r"`sources.1.extract.bakcend`, did you mean `backend`"):
        load_config(_write(tmp_path, text.replace("max_length_tokens", "bakcend")))
    with pytest.raises(ConfigError, match="needs servers"):
        load_config(_write(tmp_path, text.replace("max_length_tokens: 9", "backend: vllm-server") + common))


def test_draws_cannot_be_tempered(tmp_path: Path) -> None:
    sampled = _write(tmp_path, MINIMAL + "extract: {cache: sampled}\n")
    assert load_config(sampled).extract.cache == "sampled"
    with pytest.raises(ConfigError, match="set it to 1"):
        load_config(sampled, ["train.temperature=2"])


def test_extraction_settings_alone() -> None:
    config = parse_extract({"top_k": 4, "backend": "vllm"}, ["engine_args.seed=2", "fast_driver=true"])
    assert (config.top_k, config.engine_args, config.fast_driver) == (4, {"seed": 2}, True)
    with pytest.raises(ConfigError, match="did you mean `concurrency`"):
        parse_extract({}, ["concurency=2"])


@pytest.mark.parametrize(
    ("command", "override", "told"),
    [
        (["extract", "m", "--data", "d", "--out", "o"], "extract.batch_tokens=0", "extract: `batch_tokens`: "),
        (["train", "m", "--pivot-store", "s", "--out", "o"], "train.epochs=0", "train: `epochs`: "),
    ],
)
def test_keys_are_taken_by_the_name_that_errors_give_them(command: list[str], override: str, told: str) -> None:
    """Catches an advice such as `lower extract.batch_tokens` that the command it is given by refuses."""
    assert str(CliRunner().invoke(app, [*command, override]).exception).startswith(told)


@pytest.mark.parametrize(
    ("backend", "key", "value", "whose"),
    [
        ("hf", "quantization", "fp8", "vllm or vllm-server"),
        ("hf", "tensor_parallel_size", 2, "vllm"),
        ("hf", "fast_driver", True, "vllm"),
        ("hf", "engine_args", {"seed": 1}, "vllm"),
        ("hf", "servers", ["http://a:8000"], "vllm-server"),
        ("hf", "served_model", "m", "vllm-server"),
        ("vllm", "device", "cuda:1", "hf"),
        ("vllm", "cache", "sampled", "hf"),
        ("vllm", "concurrency", 3, "vllm-server"),
        ("vllm-server", "engines", 2, "hf or vllm"),
        ("vllm-server", "ray", "local", "hf or vllm"),
        ("vllm-server", "engine_args", {"seed": 1}, "vllm"),
    ],
)
def test_keys_of_another_backend_are_refused(backend: str, key: str, value: object, whose: str) -> None:
    """Catches a setting that is ignored, and a manifest that says it was not."""
    values = {"backend": backend, key: value} | ({"servers": ["http://a:8000"]} if backend == "vllm-server" else {})
    with pytest.raises(ConfigError, match=f"{key} is for backend: {whose}, not {backend}"):
        parse_extract(values)
    default = parse_extract({}).model_dump()[key]
    assert parse_extract(values | {key: default}).backend == backend  # as the command line, which states all keys


def test_an_engine_argument_that_is_a_key_is_refused() -> None:
    """Catches a tensor-parallel size that overrides the one by which GPUs are shared out."""
    with pytest.raises(ConfigError, match=r"engine_args\.max_logprobs is said by top_k: set that instead"):
        parse_extract({"backend": "vllm", "engine_args": {"seed": 1, "max_logprobs": 20}})


def test_batch_tokens_of_an_extraction_alone_are_those_of_transformers(tmp_path: Path) -> None:
    """Catches a setting of `fusechat extract` that does nothing; in a run, scoring goes by it whatever extracts."""
    assert parse_extract({"backend": "hf"}, ["batch_tokens=4096"]).batch_tokens == 4096
    with pytest.raises(ConfigError, match="extract: batch_tokens is for backend: hf, not vllm: remove it"):
        parse_extract({"backend": "vllm"}, ["batch_tokens=4096"])
    config = load_config(_write(tmp_path, MINIMAL), ["extract.backend=vllm", "extract.batch_tokens=4096"])
    assert config.extract.batch_tokens == 4096


def test_a_source_with_a_backend_of_its_own_takes_over_what_that_knows(tmp_path: Path) -> None:
    """Catches a run whose vLLM settings forbid a source that is served, and settings of the run that are lost."""
    served = "extract: {backend: vllm-server, servers: ['http://a:8000']}"
    text = MINIMAL.replace("name: bee}", f"name: bee, {served}}}")
    common = "extract: {backend: vllm, top_k: 7, tensor_parallel_size: 2, quantization: fp8, engine_args: {seed: 1}}\n"
    bee = load_config(_write(tmp_path, text + common)).sources[1].extract
    assert bee is not None
    assert (bee.top_k, bee.quantization, bee.tensor_parallel_size, bee.engine_args) == (7, "fp8", None, {})
    mixed = load_config(_write(tmp_path, text + "extract: {cache: sampled}\n"))
    assert mixed.extract.cache == "sampled"
    assert mixed.sources[1].extract is not None
    assert mixed.sources[1].extract.cache == "top-k"


def test_templates_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a template looked for where the command was given, and own, pivot, plain or a hub id taken for a path."""
    (tmp_path / "own").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given, meant in {
        "chat.jinja": str(tmp_path / "chat.jinja"),
        "./tokenizer": str(tmp_path / "tokenizer"),
        "own": "own",
        "pivot": "pivot",
        "plain": "plain",
        "org/name": "org/name",
    }.items():
        text = MINIMAL.replace("name: bee}", f"name: bee, extract: {{template: {given}}}}}")
        config = load_config(_write(tmp_path, text + f"extract: {{template: {given}}}\n"))
        assert config.extract.template == meant
        assert config.sources[1].extract is not None
        assert config.sources[1].extract.template == meant
    here = load_config(_write(tmp_path, MINIMAL), ["extract.template=x.jinja"])
    assert here.extract.template == str(tmp_path / "elsewhere" / "x.jinja")


def test_a_date_that_is_none_is_one_line(tmp_path: Path) -> None:
    """Catches PyYAML's ValueError, which is no YAMLError."""
    with pytest.raises(ConfigError, match=r"data\.train=2024-13-45`: the value is not valid YAML"):
        overridden(["data.train=2024-13-45"])
    (tmp_path / "c.yaml").write_text("data: {train: 2024-13-45}")
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_config(tmp_path / "c.yaml")
    assert key_values(["a=1e-6"]) == {"a": 1e-6}
