"""A fusion stage by stage: what `fusechat run` calls, and what can be changed between two calls.

python docs/examples/stages.py PIVOT SOURCE DIALOGUES OUT
"""

import sys

import fusechat
from fusechat.dialogue import load_dialogues

pivot, source, data, out = sys.argv[1:]
dialogues = load_dialogues(data)
fusechat.extract(pivot, dialogues, f"{out}/extract/pivot", max_length_tokens=512)
fusechat.extract(source, dialogues, f"{out}/extract/source", max_length_tokens=512)
aligned = fusechat.align(f"{out}/extract/pivot", f"{out}/extract/source", f"{out}/align/source")
print(f"rows with a counterpart: {1 - aligned['coverage']['rows']['none']:.0%}")
settings = {"hard_weight": 0.5, "epochs": 1, "batch_size": 8, "learning_rate": 1e-3}
fusechat.train(pivot, f"{out}/extract/pivot", f"{out}/align/source", f"{out}/target", **settings)
targets = [{"model": f"{out}/target", "parameters": {"weight": 1.0}}]  # one for each source
fusechat.merge({"merge_method": "linear", "base_model": pivot, "models": targets}, f"{out}/merged")
