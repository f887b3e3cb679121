"""One stage of the plan's benchmark, in a process that imports nothing else; prints its largest resident size in bytes.

python -m fusechat.bench.plan_stage "extract pivot|extract source|align source|train source|merge" CONFIG.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path


def run_stage(what: str, path: Path) -> None:
    """Run one stage as its command does."""
    out = path.parent / "run"
    stage, _, name = what.partition(" ")
    if stage == "merge":
        from fusechat.merge import merge

        # Five targets, as in the paper: the one that was trained under five names.
        targets = [out / "targets" / name for name in ("source", "b", "c", "d", "e")]
        for target in targets[1:]:
            target.symlink_to(targets[0])
        recipe = {"merge_method": "sce", "base_model": str(path.parent / "pivot")}
        merge(
            recipe | {"models": [{"model": str(t)} for t in targets], "parameters": {"select_topk": 0.1}},
            out / "merged",
        )
        return
    from fusechat.config import load_config
    from fusechat.layout import Layout

    config = load_config(path)
    layout = Layout(out=Path(config.out))
    if stage == "extract":
        from fusechat.dialogue import load_dialogues, split_held_out
        from fusechat.extract import extract

        dialogues, _ = split_held_out(load_dialogues(config.data.train), config.data.held_out_fraction, config.seed)
        model = config.pivot if name == "pivot" else config.sources[0].model
        extract(model, dialogues, layout.store(name), config.extract)
    elif stage == "align":
        from fusechat.align import align

        align(layout.store("pivot"), layout.store(name), layout.aligned(name), **config.align.model_dump())
    else:
        from fusechat.train import train

        train(config.pivot, layout.store("pivot"), layout.aligned(name), layout.target(name), config.train)


if __name__ == "__main__":
    run_stage(sys.argv[1], Path(sys.argv[2]))
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(int(line.split()[1]) * 1024)
