"""How much of each target's update survives a merge, for several shares of selected elements. Torch is not needed.

python docs/examples/merge_sweep.py OUT BASE TARGET TARGET...
"""

import json
import sys
from pathlib import Path

from fusechat.merge import merge

out, base, *targets = sys.argv[1:]
for top in (0.1, 0.5, 1.0):
    config = {
        "merge_method": "sce",
        "base_model": base,
        "models": [{"model": target} for target in targets],
        "parameters": {"select_topk": top, "variant": "paper"},
        "dtype": "float32",
    }
    place = Path(out) / f"top-{top}"
    merge(config, place)
    tensors = json.loads((place / "merge_stats.json").read_text())["tensors"]
    conflicts = [tensor["sign_conflict_rate"] for tensor in tensors.values() if "sign_conflict_rate" in tensor]
    print(f"select_topk {top}: {place}, signs conflict in {sum(conflicts) / max(len(conflicts), 1):.1%} of elements")
