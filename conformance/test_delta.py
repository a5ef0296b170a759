"""Delta debugging against oracles whose answer is known: one culprit, several, and such as are bad only together."""

from __future__ import annotations

import math
from collections.abc import Collection

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from alignment.engine.delta import minimal, search

pytestmark = pytest.mark.culprit
SIZES = st.integers(1, 200)


def units(count: int) -> tuple[str, ...]:
    return tuple(f"n{index}" for index in range(count))


class Bad:
    """Says that a set is bad where it holds all of one of `sets`; counts, and wants every set in order and once."""

    def __init__(self, *sets: Collection[str]) -> None:
        self.sets, self.asked = [set(one) for one in sets], []

    def __call__(self, chosen: tuple[str, ...]) -> bool:
        assert chosen
        assert list(chosen) == sorted(chosen, key=lambda name: int(name[1:]))
        assert chosen not in self.asked
        self.asked.append(chosen)
        return any(one <= set(chosen) for one in self.sets)


def some(data: st.DataObject, names: tuple[str, ...], least: int, most: int) -> list[str]:
    return data.draw(st.lists(st.sampled_from(names), min_size=least, max_size=most, unique=True))


@given(SIZES, st.data())
def test_one_culprit(count, data):
    names = units(count)
    culprit = data.draw(st.sampled_from(names))
    bad = Bad({culprit})
    found = search(bad, names)
    assert found.removal == (culprit,)
    assert found.cores == ((culprit,),)
    assert found.closed
    assert found.needed
    assert found.questions == len(bad.asked) <= 2 * math.ceil(math.log2(count)) + 2


@given(SIZES, st.integers(1, 12), st.data())
def test_several_culprits(count, blocks, data):
    names = units(count)
    culprits = some(data, names, 1, 5)
    bad = Bad(*({one} for one in culprits))
    found = search(bad, names, blocks, limit=1000)
    assert set(found.removal) == set(culprits)
    assert found.closed
    assert found.needed
    rounds = 2 * math.ceil(math.log2(count)) + 2
    assert found.questions <= len(culprits) * rounds + (2 * blocks + len(culprits) + 1 if blocks > 1 else 0)


@given(st.integers(2, 200), st.data())
def test_two_that_are_bad_together(count, data):
    names = units(count)
    pair = some(data, names, 2, 2)
    cheap = data.draw(st.sampled_from(pair))
    found = search(Bad(pair), names, cost=lambda unit: float(unit != cheap))
    assert [set(core) for core in found.cores] == [set(pair)]
    assert found.removal == (cheap,)
    assert found.closed
    assert found.needed
    assert found.questions <= 6 * math.ceil(math.log2(count)) + 2


@given(st.integers(1, 40), st.data())
def test_any_bad_sets(count, data):
    """What is removed hits every bad set, and each of its units is needed for that; each core is a smallest bad set."""
    names = units(count)
    sets = [set(some(data, names, 1, 3)) for _ in range(data.draw(st.integers(1, 4)))]
    found = search(Bad(*sets), names, limit=1000)
    removal = set(found.removal)
    assert all(one & removal for one in sets)
    assert all(not all(one & (removal - {unit}) for one in sets) for unit in removal)
    assert found.closed
    assert found.needed
    for core in map(set, found.cores):
        assert core in sets
        assert not any(one < core for one in sets)


@given(st.integers(2, 60), st.data())
def test_beside_a_background(count, data):
    names = units(count)
    wanted = some(data, names, 2, 4)
    split = data.draw(st.integers(1, count - 1))
    background, rest = names[:split], names[split:]
    assume(set(wanted) - set(background))
    assert set(minimal(lambda chosen: set(wanted) <= set(chosen), rest, background)) == set(wanted) - set(background)


def test_nothing_is_bad():
    bad = Bad()
    found = search(bad, units(50))
    assert (found.removal, found.cores, found.closed, found.questions) == ((), (), True, 1)


def hidden(chosen: tuple[str, ...]) -> bool:
    """One culprit, which no more than 16 units together show: not monotone."""
    return "n33" in chosen and len(chosen) <= 16


def test_noise_of_the_whole_hides_a_culprit():
    assert search(hidden, units(64)).removal == ()
    found = search(hidden, units(64), blocks=8)
    assert found.removal == ("n33",)
    assert found.closed
    assert found.needed
    assert found.questions <= 8 + 2 * 3 + 2


def test_what_is_wrong_everywhere_is_said_to_be():
    found = search(lambda chosen: True, units(30), limit=20)
    assert found.questions == 20
    assert 0 < len(found.removal) < 20
    assert not found.closed
    assert not found.needed


def test_a_removal_that_a_later_one_makes_superfluous():
    """The first of the two bad sets is hit by what the second needs."""
    bad = Bad({"n0", "n1"}, {"n0", "n2"}, {"n0"})
    found = search(bad, units(3))
    assert found.removal == ("n0",)
    found = search(Bad({"n0", "n1"}, {"n0", "n2"}), units(3), cost=lambda unit: float(unit == "n0"))
    assert found.removal == ("n1", "n2")
    found = search(Bad({"n0", "n1"}, {"n1", "n2"}, {"n2", "n0"}), units(3))
    assert found.closed
    assert found.needed


def test_all_is_taken_out_where_any_unit_is_bad():
    found = search(lambda chosen: True, units(3))
    assert found.removal == units(3)
    assert found.closed  # nothing that reads int8 is left
    assert found.needed
