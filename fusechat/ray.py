"""A Ray cluster for as long as a stage needs it: its room, its actors, and its errors as ours."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fusechat.errors import ConfigError, FusechatError, first_line

_ANSWER_S = 10.0


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
        _require_answer(address)
        try:
            ray.init(address=address, log_to_driver=False, include_dashboard=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(f"no Ray cluster at {address}: {first_line(error)}") from error
    try:
        yield ray
    except ray.exceptions.RayError as error:
        raise _ours(error) from error
    finally:
        if started:
            ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConfigError where nothing listens at a HOST:PORT: Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"no Ray cluster at {address}: {first_line(error)}; start it, or correct the address"
        ) from error


def _ours(error: BaseException) -> FusechatError:
    """Return the FusechatError behind Ray's wrappers, or one made of their last line, which names the error."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, FusechatError):
            return cause
        cause = getattr(cause, "cause", None) or cause.__cause__
    return FusechatError(f"a Ray task failed: {(str(error).strip() or type(error).__name__).splitlines()[-1]}")


def room_for(ray: Any, *, cpus: int, gpus: int = 0, mend: str) -> int:
    """Return how many workers of `cpus` cores and `gpus` GPUs each the machines of a cluster hold at once.

    Raises ConfigError, with the mend, when no machine holds one: Ray would wait for such a machine for ever.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    wanted = {name: number for name, number in (("CPU", cpus), ("GPU", gpus)) if number}
    room = sum(min(int(machine.get(name, 0)) // number for name, number in wanted.items()) for machine in machines)
    if not room:
        asked = " and ".join(f"{number} {name}s" for name, number in wanted.items())
        raise ConfigError(f"a worker asks for {asked}, and no machine of the Ray cluster has so many: {mend}")
    return room


def actor_results(
    ray: Any,
    actor: type,
    arguments: tuple[Any, ...],
    rows: Sequence[dict[str, Any]],
    *,
    actors: int,
    cpus: int,
    gpus: int = 0,
) -> Iterator[dict[str, Any]]:
    """Yield what `actors` instances of a class, made from `arguments`, give for each row, in no fixed order."""
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    results = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
        actor,
        fn_constructor_args=arguments,
        concurrency=min(actors, len(rows)),
        num_cpus=cpus,
        num_gpus=gpus,
    )
    yield from results.iter_rows()
