"""What each model of a run is extracted with."""

from __future__ import annotations

from fusechat.config import ExtractConfig, RunConfig, SourceConfig, source_name


def extract_settings(config: RunConfig, source: SourceConfig | None = None) -> ExtractConfig:
    """Return the settings of the pivot, or of a source: its own where it has some, `template: pivot` by its place."""
    own = (source.extract if source else None) or config.extract
    return own.model_copy(update={"template": config.pivot}) if own.template == "pivot" else own


def models_with_settings(config: RunConfig) -> dict[str, tuple[str, ExtractConfig]]:
    """Return by the names of their stores the pivot and every source, and what it is extracted with."""
    sources = {source_name(source): (source.model, extract_settings(config, source)) for source in config.sources}
    return {"pivot": (config.pivot, extract_settings(config)), **sources}
