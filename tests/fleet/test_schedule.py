"""The schedule against a model of workers: order, balance, and where the scratch of a site is."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.messages import Requests
from fedelta.fleet.answer import Sites
from fedelta.fleet.schedule import Schedule, Task

SITES = "abcdef"


def task(sites: str, attempt: int = 0, op: str = "train", *, keeps: bool = False) -> Task[bool]:
    return Task(keeps, tuple(sites), op, ("", 0, attempt))


def drain(schedule: Schedule[bool], worker: int) -> Iterator[str]:
    while (taken := schedule.take(worker)) is not None:
        yield "".join(taken.sites)
        schedule.over(taken, None)


def learned(costs: dict[str, float], workers: int = 2, by: int = 0) -> Schedule[bool]:
    """A schedule of workers that have done each site once, at worker `by`."""
    schedule: Schedule[bool] = Schedule(workers)
    for site, seconds in costs.items():
        schedule.add(task(site))
        taken = schedule.take(by)
        assert taken is not None
        schedule.over(taken, seconds)
    return schedule


def test_unknown_sites_come_in_their_order() -> None:
    schedule: Schedule[bool] = Schedule(1)
    for site in "dacb":
        schedule.add(task(site))
    assert "".join(drain(schedule, 0)) == "dacb"


def test_the_longest_comes_first_and_an_unknown_one_counts_as_the_mean() -> None:
    schedule = learned({"a": 1.0, "b": 9.0, "c": 4.0})  # mean 4.67
    for sites in ["a", "c", "d", "b"]:
        schedule.add(task(sites))
    assert "".join(drain(schedule, 1)) == "bdca"


def test_a_part_costs_what_its_sites_cost() -> None:
    schedule = learned({"a": 1.0, "b": 9.0, "c": 4.0, "d": 4.0, "e": 4.0})
    for sites in ["ac", "b", "de"]:
        schedule.add(task(sites))
    assert list(drain(schedule, 1)) == ["b", "de", "ac"]
    schedule.add(task("bcde"))
    part = schedule.take(0)
    assert part is not None
    assert part.cost == pytest.approx(21)
    schedule.over(part, 40.0)  # ten each
    schedule.add(task("b"))
    schedule.add(task("a"))
    assert [schedule.take(worker).cost for worker in (0, 1)] == pytest.approx([10, 1])  # type: ignore[union-attr]


def test_operations_cost_apart() -> None:
    schedule = learned({"a": 1.0, "b": 9.0})
    for site, seconds in {"a": 5.0, "b": 2.0}.items():
        schedule.add(task(site, op="evaluate"))
        taken = schedule.take(0)
        assert taken is not None
        schedule.over(taken, seconds)
    for op, order in {"train": "ba", "evaluate": "ab"}.items():
        for site in "ab":
            schedule.add(task(site, op=op))
        assert "".join(drain(schedule, 1)) == order


def test_of_what_costs_about_as_much_a_worker_gets_its_own() -> None:
    schedule = learned({"a": 10.0, "b": 9.0, "c": 5.0})
    for site, seconds in {"d": 9.5, "e": 1.0}.items():
        schedule.add(task(site))
        taken = schedule.take(1)
        assert taken is not None
        schedule.over(taken, seconds)
    for site in "abcde":
        schedule.add(task(site))
    assert [schedule.take(1).sites for _ in range(5)] == [("d",), ("a",), ("b",), ("c",), ("e",)]  # type: ignore[union-attr]


def test_nobody_is_idle_while_there_is_something_to_do() -> None:
    schedule = learned(dict.fromkeys(SITES, 1.0), workers=3)
    for site in SITES:
        schedule.add(task(site))
    assert len({schedule.take(worker).sites for worker in (0, 1, 2, 2, 1, 2)}) == 6  # type: ignore[union-attr]
    assert schedule.take(1) is None
    assert schedule.ready == 0


def test_ahead_only_while_enough_is_left_for_everybody() -> None:
    schedule = learned(dict.fromkeys(SITES, 1.0))
    for site in SITES:
        schedule.add(task(site))
    assert schedule.take(0) is not None
    assert schedule.take_ahead(0, 2.0) is None  # at the end of it, in 3, the other would have done three of those left
    assert schedule.take_ahead(0, 1.0) is not None  # 4 are left: two for each
    assert schedule.take(1) is not None
    assert schedule.take_ahead(1, 1.0) is None
    alone = learned({"a": 1.0, "b": 1.0}, workers=1)
    for site in "ab":
        alone.add(task(site))
    assert alone.take(0) is not None
    assert alone.take_ahead(0, 1.0) is not None


def test_a_long_chain_of_dropped_tasks_ends() -> None:
    schedule: Schedule[bool] = Schedule(1)
    chain = [task("a", attempt) for attempt in range(5000)]
    for link in chain:
        schedule.add(link)
    for link in chain[1:-1]:
        schedule.drop(link)
    assert schedule.take(0) is chain[0]
    assert schedule.take(0) is None
    schedule.over(chain[0], 1.0)
    assert schedule.take(0) is chain[-1]


@dataclass
class World:
    """Workers that do what the schedule says, beside one process that does everything in the order of its sites."""

    workers: int
    schedule: Schedule[bool] = field(init=False)
    here: list[Sites] = field(init=False)
    reference: Sites = field(default_factory=lambda: Sites(lambda name: None))
    open: list[Task[bool]] = field(default_factory=list)  # in the order of submission, not over
    held: dict[int, list[Task[bool]]] = field(init=False)
    bound: set[int] = field(default_factory=set)  # tasks that found scratch
    ended: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.workers)
        self.here = [Sites(lambda name: None) for _ in range(self.workers)]
        self.held = {worker: [] for worker in range(self.workers)}

    def startable(self) -> list[Task[bool]]:
        """What could begin; what was dropped still stands between others until it is its turn."""
        seen: set[str] = set()
        for one in list(self.open):
            if one.dropped and not seen & set(one.sites):
                self.open.remove(one)
            else:
                seen |= set(one.sites)
        seen.clear()
        found = []
        taken = [task for tasks in self.held.values() for task in tasks]
        for one in self.open:
            if not seen & set(one.sites) and one not in taken:
                found.append(one)
            seen |= set(one.sites)
        return found

    def take(self, worker: int) -> None:
        startable = self.startable()
        assert self.schedule.ready == len(startable)
        busy = self.held[worker]
        if busy:
            one = self.schedule.take_ahead(worker, sum(each.cost for each in busy))
        else:
            one = self.schedule.take(worker)
            if one is None:  # whatever is left needs the scratch that another worker has
                assert all(self.scratch_at(each) - {worker} for each in startable)
        if one is None:
            return
        assert one in startable
        assert one.worker == worker
        where = self.scratch_at(one)
        assert one.torn == (len(where) > 1)
        assert not where or worker in where
        if not where and not busy:
            free = [each.cost for each in startable if not self.scratch_at(each)]
            assert one.cost >= 0.79 * max(free)
        if where:
            self.bound.add(one.serial)
        self.held[worker].append(one)
        self.here[worker].forget(self.schedule.stale(worker))
        if not one.torn:
            assert self.play(one, self.here[worker]) == self.play(one, self.reference)

    def scratch_at(self, one: Task[bool]) -> set[int]:
        """The workers that have scratch which this task is to find."""
        asked = Requests(to=one.sites, op=one.op, round=0, attempt=one.attempt[2])
        return {
            worker
            for worker, sites in enumerate(self.here)
            for name in asked.to
            if sites._attempts.get(name) == one.attempt
            and sites._sites[name].scratch
            and self.reference._sites[name].scratch == sites._sites[name].scratch
        }

    @staticmethod
    def play(one: Task[bool], at: Sites) -> list[dict[str, object]]:
        """What the sites find in their scratch; then they leave something there, or nothing."""
        sites = at.many(Requests(to=one.sites, op=one.op, round=0, attempt=one.attempt[2]))
        found = [dict(site.scratch) for site in sites]
        for site in sites:
            site.scratch.clear()
            if one.what:
                site.scratch[f"{one.serial}"] = True
        return found

    def end(self, worker: int, seconds: float) -> None:
        one = self.held[worker].pop(0)
        self.schedule.over(one, None if one.torn else seconds, one.sites if one.what and not one.torn else ())
        self.open.remove(one)
        self.ended.append(one.serial)


@given(
    data=st.data(),
    workers=st.integers(1, 3),
    tasks=st.lists(
        st.tuples(
            st.sets(st.sampled_from(SITES), min_size=1, max_size=3),
            st.integers(0, 2),
            st.sampled_from(["train", "evaluate"]),
            st.sampled_from([False, False, True]),
        ),
        max_size=10,
    ),
)
def test_any_course_of_things(data: st.DataObject, workers: int, tasks: list[tuple[set[str], int, str, bool]]) -> None:
    """Each site in order and one at a time, its scratch as if it had never moved, and nobody idle for nothing."""
    world = World(workers)
    coming = [task("".join(sorted(sites)), attempt, op, keeps=keeps) for sites, attempt, op, keeps in tasks]
    dropped = 0
    while coming or world.open:
        worker = data.draw(st.integers(0, workers - 1))
        action = data.draw(st.sampled_from(["add", "add", "take", "take", "end", "drop", "back"]))
        if action == "add" and coming:
            world.open.append(coming.pop(0))
            world.schedule.add(world.open[-1])
        elif action == "end" and world.held[worker]:
            world.end(worker, data.draw(st.sampled_from([0.001, 1.0, 1.1, 7.0])))
        elif action == "drop" and world.open:
            one = data.draw(st.sampled_from(world.open))
            if one.worker < 0 and not one.dropped:
                world.schedule.drop(one)
                dropped += 1
        elif action == "back" and world.held[worker] and not any(each.what for each in world.held[worker]):
            if world.held[worker][-1].serial not in world.bound:  # doing it again finds the same: nothing
                world.schedule.back(world.held[worker].pop())
        else:
            for each in range(workers):
                world.take(each)
            if not any(world.held.values()):
                assert not world.startable()
    assert len(world.ended) == len(set(world.ended)) == len(tasks) - dropped
    assert world.schedule.ready == 0
