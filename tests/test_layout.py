"""The house keeps its shape: dependencies point one way, imports stay light, `kernels` stays out of others' way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fusechat"


def _imports(path: Path, *, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module}
    return names


def _modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p.relative_to(PACKAGE).parts[0] not in ("kernels", "bench")]


def test_kernels_know_nothing_of_the_package_and_are_no_package_themselves() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in sorted((ROOT / "kernels").glob("*.py")):
        foreign = {
            name
            for name in _imports(path)
            if name.split(".")[0] == "fusechat" and not name.startswith("fusechat.kernels")
        }
        assert not foreign, f"{path.name} imports {foreign}"


@pytest.mark.parametrize(
    ("room", "forbidden"),
    [
        ("commands", ()),
        ("demo", ("fusechat.commands", "fusechat.cli")),
        ("", ("fusechat.commands", "fusechat.cli", "fusechat.demo")),
        ("merge", ("torch", "transformers", "fusechat.model", "fusechat.train", "fusechat.extract", "fusechat.loss")),
        ("align", ("torch", "fusechat.train", "fusechat.extract", "fusechat.loss", "fusechat.merge", "fusechat.run")),
        ("loss", ("fusechat.train", "fusechat.extract", "fusechat.align", "fusechat.merge", "fusechat.run")),
        ("extract", ("fusechat.train", "fusechat.align", "fusechat.merge", "fusechat.run", "fusechat.loss")),
        ("train", ("fusechat.extract", "fusechat.merge", "fusechat.run", "fusechat.evaluate")),
        ("plan", ("fusechat.train", "fusechat.evaluate", "fusechat.run", "fusechat.profile")),
        ("profile", ("fusechat.plan", "fusechat.evaluate")),
        ("report", ("torch", "transformers", "fusechat.train", "fusechat.extract", "fusechat.loss", "fusechat.run")),
        ("evaluate", ("fusechat.train", "fusechat.align", "fusechat.merge", "fusechat.run")),
    ],
)
def test_dependencies_point_one_way(room: str, forbidden: tuple[str, ...]) -> None:
    for path in _modules():
        parts = path.relative_to(PACKAGE).parts
        here = parts[0] if len(parts) > 1 else ""
        if here != room or path.name in ("cli.py", "__main__.py"):
            continue
        bad = {n for n in _imports(path) for f in forbidden if n == f or n.startswith(f + ".")}
        assert not bad, f"{path.relative_to(ROOT)} imports {bad}"


def test_files_stay_short() -> None:
    code = [
        *_modules(),
        *(ROOT / "kernels").glob("*.py"),
        *(ROOT / "bench").glob("*.py"),
        *(ROOT / "tests").glob("*.py"),
        *(ROOT / "csrc").rglob("*.?pp"),
    ]
    long = {str(p.relative_to(ROOT)): n for p in code if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert not long


def _python(code: str, cwd: Path) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_and_the_command_line_loads_no_torch() -> None:
    heavy = "[m for m in ('torch', 'transformers', 'numba', 'numpy', 'pyarrow') if m in sys.modules]"
    assert _python(f"import sys, fusechat, fusechat.cli; print({heavy})", ROOT) == "[]"


def test_transformers_models_import_beside_our_kernels_folder() -> None:
    assert _python("from transformers import LlamaForCausalLM; print('ok')", ROOT) == "ok"


def test_stages_are_modules_that_can_be_called() -> None:
    code = (
        "import fusechat; print(all(callable(getattr(fusechat, s)) for s in ('extract','align','train','merge','run')))"
    )
    assert _python(code, ROOT) == "True"


def test_a_prompt_completes_the_stages_and_shows_what_they_take() -> None:
    """Catches a stage that is no attribute before its first use, and a call whose arguments are *args."""
    code = (
        "import fusechat, inspect; print('merge' in dir(fusechat), [*inspect.signature(fusechat.merge).parameters][:2])"
    )
    assert _python(code, ROOT) == "True ['config', 'out']"
