"""How much of each target's update survives a merge, for several shares of selected elements. Torch is not needed.

python docs/examples/merge_sweep.py OUT BASE TARGET TARGET...
"""

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
    survives = merge(config, place)["surviving_share"]
    print(f"select_topk {top}: {place}, of the updates survive {', '.join(f'{share:.0%}' for share in survives)}")
