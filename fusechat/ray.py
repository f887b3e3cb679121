"""A Ray cluster for as long as a stage needs it, and its errors as ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fusechat.errors import ConfigError, FusechatError


@contextmanager
def ray_cluster(address: str) -> Iterator[Any]:
    """Give the ray module, connected to the cluster at `address` ("local" starts one here).

    Raises ConfigError when Ray is absent or the cluster cannot be reached. What a task raised within the block is
    raised as the FusechatError it was, or as one that names it.
    """
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray: pip install 'fusechat[ray]'") from error
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {str(error).splitlines()[0]}") from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise _ours(error) from error
    finally:
        if started:
            ray.shutdown()


def _ours(error: BaseException) -> FusechatError:
    """Return the FusechatError behind Ray's wrappers, or one made of their first line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FusechatError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return FusechatError(f"a Ray task failed: {(str(error).strip() or type(error).__name__).splitlines()[-1]}")
