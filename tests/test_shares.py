"""Shares of a count are exact for every share that a person writes."""

import pytest

from anomalib_pack.shares import whole_share


@pytest.mark.parametrize("count", [1, 7, 100, 3136, 12_345_678])
def test_hundredths(count: int) -> None:
    """Integers have no rounding errors."""
    assert [whole_share(percent / 100, count) for percent in range(101)] == [
        percent * count // 100 for percent in range(101)
    ]


@pytest.mark.parametrize(("share", "expected"), [(1e-05, 1), (0, 0), (1, 100_000), (2.9e-1, 29_000)])
def test_ways_to_write_a_share(share: float, expected: int) -> None:
    assert whole_share(share, 100_000) == expected
