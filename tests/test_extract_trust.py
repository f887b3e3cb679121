"""A model that brings Python of its own: nothing of it runs unasked, and with leave it is extracted like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from extract_world import manifest, shard_bytes
from typer.testing import CliRunner

import fusechat
from fusechat.cli import app
from fusechat.dialogue import load_dialogues
from fusechat.errors import DataError
from fusechat.evaluate.bpb import score_models
from fusechat.plan.models import model_shape
from fusechat.tokenizer import load_tokenizer

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig
Path({ran!r}).touch()
class HomemadeConfig(LlamaConfig):
    model_type = "homemade"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_homemade import HomemadeConfig
class HomemadeForCausalLM(LlamaForCausalLM):
    config_class = HomemadeConfig
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where transformers copies such Python to before it runs: one folder, for it stays on Python's path."""
    return tmp_path_factory.mktemp("modules")


@pytest.fixture
def homemade(tiny_world: Any, modules: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The pivot, as an architecture that only the Python beside it knows; `ran` exists once that has run."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    folder = tmp_path / "homemade"
    shutil.copytree(tiny_world.pivot, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "homemade", "architectures": ["HomemadeForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_homemade.HomemadeConfig",
            "AutoModelForCausalLM": "modeling_homemade.HomemadeForCausalLM",
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "configuration_homemade.py").write_text(CONFIGURATION.format(ran=str(tmp_path / "ran")))
    (folder / "modeling_homemade.py").write_text(MODELING)
    return folder


def test_code_runs_with_leave_only(homemade: Path, tiny_world: Any, tmp_path: Path) -> None:
    dialogues = load_dialogues(tiny_world.dialogues)
    assert model_shape(str(homemade))[0].remote_code
    with pytest.raises(DataError, match=r"extract\.trust_remote_code: true runs that code") as error:
        fusechat.extract(str(homemade), dialogues, tmp_path / "s")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "s").exists()
    words = ["extract", str(homemade), "--data", str(tiny_world.dialogues), "--out", str(tmp_path / "s")]
    done = CliRunner().invoke(app, [*words, "--trust-remote-code", "extract.shard_dialogues=9"])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "ran").exists()
    fusechat.extract(str(tiny_world.pivot), dialogues, tmp_path / "plain", shard_dialogues=9)
    assert shard_bytes(tmp_path / "s") == shard_bytes(tmp_path / "plain")
    assert manifest(tmp_path / "s")["trust_remote_code"] is True
    assert "trust_remote_code" not in manifest(tmp_path / "plain")


def test_the_evaluation_has_the_same_leave(homemade: Path, tiny_world: Any) -> None:
    """Catches a run that fails at its end."""
    dialogues = load_dialogues(tiny_world.dialogues)
    models = {"homemade": homemade, "pivot": tiny_world.pivot}
    with pytest.raises(DataError, match="custom code"):
        score_models(models, dialogues, options={name: {} for name in models})
    scores = score_models(models, dialogues, options={"homemade": {"trust_remote_code": True}, "pivot": {}})
    assert scores["homemade"].nll_json == scores["pivot"].nll_json


def test_a_tokenizer_of_code_is_told_to_become_a_file(tiny_world: Any, tmp_path: Path) -> None:
    """Catches a question on the terminal, which is what transformers does when it is not told."""
    folder = tmp_path / "coded"
    shutil.copytree(tiny_world.pivot, folder)
    (folder / "tokenizer.json").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "Coded", "auto_map": {"AutoTokenizer": [None, "coded.Coded"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "coded.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(DataError, match=r"without a tokenizer\.json: make one where you trust") as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "ran").exists()
