"""What a Ray cluster has room for; a cluster itself is in the stages' own tests."""

from __future__ import annotations

import socket
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from fusechat.errors import ConfigError
from fusechat.ray import ray_cluster, room_for


def cluster(*machines: dict[str, float]) -> Any:
    """A cluster of these machines, and of one that is gone."""
    nodes = [{"Alive": True, "Resources": machine} for machine in machines]
    return SimpleNamespace(nodes=lambda: [*nodes, {"Alive": False, "Resources": {"CPU": 99.0, "GPU": 99.0}}])


@pytest.mark.parametrize(
    ("machines", "share", "room"),
    [
        ([{"CPU": 8}], {"cpus": 3}, 2),
        ([{"CPU": 2}, {"CPU": 5}], {"cpus": 2}, 3),
        ([{"CPU": 64, "GPU": 8}, {"CPU": 64}], {"cpus": 0, "gpus": 4}, 2),
        ([{"CPU": 4, "GPU": 8}], {"cpus": 2, "gpus": 1}, 2),
    ],
)
def test_workers_fit_machines_not_the_sum_of_them(
    machines: list[dict[str, float]], share: dict[str, int], room: int
) -> None:
    assert room_for(cluster(*machines), **share, mend="") == room


@pytest.mark.parametrize(
    ("machines", "share", "named"),
    [
        ([{"CPU": 2}, {"CPU": 2}], {"cpus": 4}, "asks for 4 CPUs, and no machine .*: lower it"),
        ([{"CPU": 8, "GPU": 1}] * 2, {"cpus": 0, "gpus": 2}, "asks for 2 GPUs"),
        ([], {"cpus": 1}, "no machine"),
    ],
)
def test_a_worker_that_fits_no_machine_is_refused(
    machines: list[dict[str, float]], share: dict[str, int], named: str
) -> None:
    """Catches a run that waits for ever for what the cluster has not."""
    with pytest.raises(ConfigError, match=named):
        room_for(cluster(*machines), **share, mend="lower it")


@pytest.mark.parametrize("address", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "127.0.0.1:99999"])
def test_an_address_that_does_not_answer_is_told_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Catches minutes of waiting for a cluster that is not there."""
    with socket.socket() as taken:  # bound and not listening: nobody else can have the port meanwhile
        taken.bind(("127.0.0.1", 0))
        address = address.format(taken.getsockname()[1])
        stub = SimpleNamespace(is_initialized=lambda: False, init=lambda **_: pytest.fail("Ray was asked"))
        monkeypatch.setitem(sys.modules, "ray", stub)
        with pytest.raises(ConfigError, match=f"no Ray cluster at {address}: .*start it"), ray_cluster(address):
            pass


@pytest.mark.parametrize("address", ["local", "auto", "ray://head:10001"])
def test_the_cluster_is_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Catches `local` read as no address at all: Ray then joins RAY_ADDRESS, or a cluster that happens to run here."""
    asked: list[str | None] = []
    stub = SimpleNamespace(
        is_initialized=lambda: False,
        init=lambda address=None, **options: asked.append(address),
        shutdown=lambda: None,
        exceptions=SimpleNamespace(RayError=RuntimeError),
    )
    monkeypatch.setitem(sys.modules, "ray", stub)
    monkeypatch.setattr("socket.create_connection", lambda *_, **__: socket.socket())
    with ray_cluster(address) as ray:
        assert ray is stub
    assert asked == [address]
