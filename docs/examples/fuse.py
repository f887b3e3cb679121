"""A whole fusion from Python: write the configuration, run it, read the result.

python docs/examples/fuse.py PIVOT SOURCE DIALOGUES OUT
"""

import sys
from pathlib import Path

import yaml

import fusechat

pivot, source, dialogues, out = (str(Path(argument).resolve()) for argument in sys.argv[1:])
config = {
    "pivot": pivot,
    "sources": [{"model": source, "name": "source"}],
    "data": {"train": dialogues, "held_out_fraction": 0.2},
    "out": out,
    "train": {"hard_weight": 0.5, "epochs": 1, "batch_size": 8, "learning_rate": 1e-3},
}
Path(out).mkdir(parents=True, exist_ok=True)
path = Path(out) / "fusion.yaml"
path.write_text(yaml.safe_dump(config))
results = fusechat.run(path)  # a second call returns at once
print(yaml.safe_dump(results, allow_unicode=True)[:800])
