"""Numbers, sizes and durations as people read them."""

from __future__ import annotations

import pytest

from fusechat.errors import ConfigError
from fusechat.quantity import duration, human_bytes, parse_size, prefixed


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.25, "0.25"), (999.4, "999"), (999.6, "1k"), (1234, "1.23k"), (999_600, "1M"), (-7.24e9, "-7.24G"),
        (3e12, "3T"), (796e15, "796P"), (1.19e18, "1.19E"),
    ],
)  # fmt: skip
def test_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert prefixed(value) == text


def test_a_billion_of_parameters_is_b_and_bytes_have_a_unit() -> None:
    assert prefixed(7.24e9, giga="B") == "7.24B"
    assert prefixed(7.24e6, giga="B") == "7.24M"
    assert [human_bytes(n) for n in (0, 512, 999_700, 1.5e9)] == ["0 B", "512 B", "1 MB", "1.5 GB"]


@pytest.mark.parametrize("size_bytes", [1, 999, 14_500_000_000, 2_000_000_000_000])
def test_what_is_written_is_read_again(size_bytes: int) -> None:
    assert parse_size(human_bytes(size_bytes)) == size_bytes


@pytest.mark.parametrize("text", ["0", "0.4B", "9" * 400, "9" * 30 + "GiB", "-1", "1e3"])
def test_what_no_machine_has_is_no_size(text: str) -> None:
    """Catches a size beyond what a float or 64 bits hold."""
    with pytest.raises(ConfigError, match="is no size") as error:
        parse_size(text)
    assert len(str(error.value)) < 120


def test_a_duration_has_its_two_largest_units() -> None:
    assert [duration(x) for x in (0.04, 59.94, 59.96, 5400, 172_800)] == [
        "0.0 s", "59.9 s", "1 min 0 s", "1 h 30 min", "2 d 0 h",
    ]  # fmt: skip
