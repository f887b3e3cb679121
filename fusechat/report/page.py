"""The facts as one HTML page and as Markdown."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fusechat.artifact import Json
from fusechat.report import words
from fusechat.report.charts import charts
from fusechat.report.conclusions import conclude, headline

TEMPLATES = Path(__file__).parent / "templates"
_FORMATS = (
    "number",
    "signed",
    "percent",
    "count",
    "short",
    "size",
    "duration",
    "plural",
    "rate",
    "listed",
    "model",
    "probability",
)


def html_page(facts: Json) -> str:
    """Return the report as one HTML document that needs no network."""
    return render("report.html.j2", charts(facts), samples=embedded_json(_samples(facts)), **_story(facts))


def markdown_page(facts: Json) -> str:
    """Return the report's answers and tables as Markdown."""
    return _environment(html=False).get_template("report.md.j2").render(**_story(facts))


def json_text(facts: Json) -> str:
    """Return the facts with their conclusions as JSON."""
    return json.dumps({**facts, "conclusions": conclude(facts)}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _samples(facts: Json) -> list[Json]:
    """Return the sampled dialogues in the order the page shows them."""
    by_source = facts["alignment"].get("by_source", {}).values()
    return [sample for source in by_source if isinstance(source["dialogues"], list) for sample in source["dialogues"]]


def _story(facts: Json) -> Json:
    return {"facts": facts, "headline": headline(facts["outcome"]), "conclusions": conclude(facts)}


def render(template: str, specifications: dict[str, Json], **values: Any) -> str:
    """Fill an HTML template; charts are compiled to Vega and embedded with what draws them."""
    compiled = {name: _vega(specification) for name, specification in specifications.items()}
    return (
        _environment(html=True)
        .get_template(template)
        .render(
            **values,
            charts=compiled,
            chart_data=embedded_json(compiled),
            style=Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
            script=Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
            vega=Markup(_vega_library() if compiled else ""),
        )
    )


def _environment(*, html: bool) -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=html,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {name: getattr(words, name) for name in _FORMATS}
    environment.filters["cell"] = lambda text: " ".join(str(text).split()).replace("|", "\\|")
    return environment


def embedded_json(value: Any) -> Markup:
    """Return JSON that may stand inside a script element whatever its strings hold."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def _vega(specification: Json) -> Json:
    import vl_convert

    compiled: Json = vl_convert.vegalite_to_vega(specification)
    return compiled


@functools.cache
def _vega_library() -> str:
    """Return Vega as one script that sets window.vegaEmbed, from the copy that vl-convert carries."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")
