"""The model card of a merge: what went in, how, and with which versions."""

from __future__ import annotations

from fusechat import __version__
from fusechat.artifact import Json
from fusechat.merge.config import MergeConfig

_PAPERS = {
    "sce": "SCE (arXiv 2408.07990)",
    "varm": "VaRM (arXiv 2402.16107)",
    "linear": "a weighted mean (arXiv 2203.05482)",
    "task_arithmetic": "task arithmetic (arXiv 2212.04089)",
    "ties": "TIES (arXiv 2306.01708)",
    "dare_linear": "DARE (arXiv 2311.03099)",
    "dare_ties": "DARE with TIES' sign election (arXiv 2311.03099)",
    "slerp": "spherical interpolation",
}


def model_card(config: MergeConfig, recipe: str, summary: Json) -> str:
    """Return README.md for the merged model, in Hugging Face's form."""
    names = [str(target.ref) for target in config.targets]
    parents = "\n".join(f"- {name}" for name in dict.fromkeys([str(config.base), *names]))
    lines = [
        "---",
        "library_name: transformers",
        "tags:",
        "- merge",
        "- fusechat",
        "base_model:",
        parents,
        "---",
        "",
        "# Merged model",
        "",
        f"Made by fusechat {__version__} with {_PAPERS[config.method_name]} from the base `{config.base}`.",
        "",
    ]
    shares = summary.get("surviving_share")
    if shares:
        lines += ["| model | mean weight | share of its update that survives |", "|---|---|---|"]
        rows = zip(names, summary["mean_weight"], shares)
        lines += [f"| `{name}` | {weight:.4f} | {share:.1%} |" for name, weight, share in rows]
    else:
        lines += ["Merged:", ""] + [f"- `{name}`" for name in names]
    lines += ["", "The recipe:", "", "```yaml", recipe.rstrip(), "```", ""]
    lines += ["Numbers per tensor are in `merge_stats.json`, checksums in `provenance.json`.", ""]
    return "\n".join(lines)
