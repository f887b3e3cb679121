"""YAML as configurations are read and written. No pydantic: it takes half of the time a small merge takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fusechat.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, and 1e-6 as the number it is in YAML 1.2; 1.1 wants 1.0e-6 and takes the other for text.

    It matters where no type is declared, as in `train.lr_scheduler_args` and `extract.engine_args`. Quoted, it is text.
    A key that is given twice, the second of which PyYAML would let win, is refused.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        """Build a mapping, checking its keys."""
        merge_tag = "tag:yaml.org,2002:merge"
        keys = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != merge_tag]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the text 1e-6."""


for _reader_or_writer in (_Loader, _Dumper):
    _reader_or_writer.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
    )


def parse_yaml(text: str) -> Any:
    """Return what a YAML text says; raises yaml.YAMLError, and ValueError for a date that is none (2024-13-45)."""
    return yaml.load(text, _Loader)


def yaml_text(values: Any) -> str:
    """Return a YAML text that `parse_yaml` takes for the same values."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)


def read_yaml(path: Path) -> Any:
    """Return what a YAML file says; raises ConfigError in one line."""
    try:
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, ValueError) as error:  # among these a text that is not UTF-8
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
