from weakref import ref

import pytest
import torch

from fedelta.core.examples import Examples
from fedelta.learning import joined as module
from fedelta.learning.joined import joined


def site(first: int, rows: int = 2) -> Examples:
    x = torch.arange(first, first + 3 * rows, dtype=torch.float32).view(rows, 3)
    return Examples({"x": x}, torch.full((rows,), first))


def same(rows: Examples, sites: list[Examples]) -> bool:
    inputs = torch.equal(rows.inputs["x"], torch.cat([own.inputs["x"] for own in sites]))
    return inputs and torch.equal(rows.targets, torch.cat([own.targets for own in sites]))


def test_sites_that_come_again_are_joined_no_more() -> None:
    sites = [site(0), site(10, rows=1), site(20)]
    first, second, third = joined(sites), joined(list(sites)), joined(tuple(sites))
    assert all(same(rows, sites) for rows in (first, second, third))
    assert third is second


def test_other_sites_are_joined_anew_whatever_they_begin_with() -> None:
    a, b, c = site(0), site(10), site(20)
    for sites in ([a, b], [a, b], [a, c], [a, b, c], [b, a], [a], [a, b], [a, a], [a, b], [a, b]):
        assert same(joined(sites), sites)
    alike = [site(0), site(10)]  # equal rows of other sites
    joined(alike)
    assert joined(alike) is not joined([a, b])


def test_what_is_kept_goes_with_its_first_site() -> None:
    sites = [site(0), site(10)]
    kept = [ref(joined(sites)) for _ in range(2)]
    assert kept[0]() is None
    assert kept[1]() is not None
    del sites[0]
    assert kept[1]() is None


def test_no_more_is_kept_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = [site(0), site(10)], [site(20, rows=50), site(30, rows=50)]
    monkeypatch.setattr(module, "_MOST", sum(kept.rows.nbytes for kept in module._last.values() if kept.rows) + 200)
    for sites in (small, large):
        joined(sites)
    assert joined(small) is joined(small)
    assert joined(large) is not joined(large)
    assert same(joined(large), large)
