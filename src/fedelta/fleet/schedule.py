"""Which worker does what next: the longest first, and each site's tasks in order and one at a time.

Longest processing time first (Graham, SIAM J. Appl. Math. 17(2), 1969): with m workers the last one ends at most
4/3 - 1/(3m) times as late as in the best schedule. How long a task takes is what its sites took the last time, for the
same operation. A pure data structure: it knows neither processes nor clocks. Adding, taking and ending a task takes
time in proportion to its sites and to the workers, and to the logarithm of the number of tasks.
"""

import heapq
import itertools
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from fedelta.core.messages import PartyId

T = TypeVar("T")
Attempt = tuple[str, int, int]  # job, round, attempt: how long a site's scratch lasts

_ABOUT = 0.8  # of the cost of the longest: a task that costs this much may be preferred to it
_UNKNOWN = 1.0  # cost of a site as long as none was measured


@dataclass(eq=False)
class Task(Generic[T]):
    """Something that one worker does for some sites in one go; `what` is the caller's."""

    what: T
    sites: Sequence[PartyId]  # distinct
    op: str
    attempt: Attempt
    serial: int = -1  # in the order in which they were added
    cost: float = 0.0  # expected seconds
    worker: int = -1  # who has it; -1: nobody
    torn: bool = False  # its sites have scratch at several workers, so that none of them can do it
    dropped: bool = False
    before: int = 0  # number of tasks that must be over first
    after: "list[Task[T]]" = field(default_factory=list)  # those that wait for this one


class Schedule(Generic[T]):
    """Tasks of `workers` workers, numbered from 0.

    A site whose scratch holds something stays at its worker until its attempt is over. Any other task goes to whoever
    is free, but of tasks that take about as long, a worker gets one whose site it has had before.
    """

    def __init__(self, workers: int) -> None:
        self._serials = itertools.count()
        self._last: dict[PartyId, Task[T]] = {}  # of each site, the task that was added last and is not over
        self._home: dict[PartyId, int] = {}
        self._costs: dict[str, _Costs] = {}  # by operation
        self._scratch: dict[PartyId, tuple[Attempt, int]] = {}  # who has it, where it is not empty
        self._stale: list[set[PartyId]] = [set() for _ in range(workers)]  # sites whose scratch is of no use any more
        self._bound: list[_Heap[T]] = [[] for _ in range(workers)]  # what only this worker can do
        self._heaps: list[_Heap[T]] = [[] for _ in range(workers + 1)]  # by home; the last one: no home yet
        self._ready = 0  # number of tasks in the heaps that were not dropped
        self._left = 0.0  # their cost

    @property
    def ready(self) -> int:
        """Number of tasks that a worker could begin now."""
        return self._ready

    def add(self, task: Task[T]) -> None:
        task.serial = next(self._serials)
        task.cost = self._costs_of(task.op).expected(task.sites)
        if not self._last.keys().isdisjoint(task.sites):
            for earlier in {self._last[site] for site in task.sites if site in self._last}:
                earlier.after.append(task)
                task.before += 1
        self._last.update(dict.fromkeys(task.sites, task))
        if not task.before:
            self._put(task)

    def take(self, worker: int) -> Task[T] | None:
        """What a worker that is free is to do now; None if there is nothing for it."""
        heap = self._best_for(worker)
        return self._pop(heap, worker) if heap else None

    def take_ahead(self, worker: int, busy: float) -> Task[T] | None:
        """What a worker is to do after the task of cost `busy` that it has; None if that had better stay open.

        What it gets cannot be given to another worker that becomes free earlier. So there must be enough left to do
        for all workers until this one has come to the end of it.
        """
        heap = self._best_for(worker)
        if not heap:
            return None
        cost = heap[0][2].cost
        harmless = heap is self._bound[worker] or len(self._bound) == 1
        if not harmless and busy + cost > (self._left - cost) / len(self._bound):
            return None
        return self._pop(heap, worker)

    def over(self, task: Task[T], seconds: float | None, scratch: Collection[PartyId] = ()) -> None:
        """A task was done in `seconds`, and the scratch of the sites `scratch` is not empty; None: it was not done."""
        if seconds is not None:
            self._costs_of(task.op).learn(task.sites, seconds)
            if scratch or self._scratch:
                self._move_scratch(task, scratch)
        self._finish(task)

    def back(self, task: Task[T]) -> None:
        """A task that was taken is to be taken again."""
        task.worker = -1
        self._put(task)

    def drop(self, task: Task[T]) -> None:
        """Forget a task that nobody has taken; what waits for it then waits for what it had to wait for."""
        task.dropped = True
        if not task.before:
            self._leave(task)
            self._finish(task)

    def stale(self, worker: int) -> tuple[PartyId, ...]:
        """Sites whose scratch this worker is to empty before anything else, because they were elsewhere since."""
        if not self._stale[worker]:
            return ()
        sites = tuple(self._stale[worker])
        self._stale[worker].clear()
        return sites

    def _costs_of(self, op: str) -> "_Costs":
        costs = self._costs.get(op)
        if costs is None:
            costs = self._costs[op] = _Costs()
        return costs

    def _best_for(self, worker: int) -> "_Heap[T] | None":
        """The heap whose first task is the best for this worker."""
        if _settled(self._bound[worker]):
            return self._bound[worker]
        filled = [heap for heap in self._heaps if _settled(heap)]
        if not filled:
            return None
        bar = _ABOUT * max(heap[0][2].cost for heap in filled)
        for heap in (self._heaps[worker], self._heaps[-1]):
            if heap and heap[0][2].cost >= bar:
                return heap
        return max((heap for heap in filled if heap[0][2].cost >= bar), key=len)  # who has most can spare one

    def _pop(self, heap: "_Heap[T]", worker: int) -> Task[T]:
        task = heapq.heappop(heap)[2]
        self._leave(task)
        task.worker = worker
        self._home.update(dict.fromkeys(task.sites, worker))
        return task

    def _put(self, task: Task[T]) -> None:
        self._ready += 1
        self._left += task.cost
        heapq.heappush(self._place(task), (-task.cost, task.serial, task))

    def _leave(self, task: Task[T]) -> None:
        self._ready -= 1
        self._left = self._left - task.cost if self._ready else 0.0

    def _place(self, task: Task[T]) -> "_Heap[T]":
        if self._scratch:
            held = [self._scratch[site] for site in task.sites if site in self._scratch]
            workers = {worker for attempt, worker in held if attempt == task.attempt}
            if workers:
                task.torn = len(workers) > 1
                return self._bound[min(workers)]
        if len(task.sites) == 1:
            home = self._home.get(task.sites[0])
        else:
            counts = Counter(map(self._home.get, task.sites))
            home = max(counts, key=counts.__getitem__, default=None)
        return self._heaps[-1 if home is None else home]

    def _finish(self, task: Task[T]) -> None:
        done = [task]
        while done:
            over = done.pop()
            for site in over.sites:
                if self._last.get(site) is over:
                    del self._last[site]
            for later in over.after:
                later.before -= 1
                if later.before == 0:
                    if later.dropped:
                        done.append(later)
                    else:
                        self._put(later)
            over.after = []

    def _move_scratch(self, task: Task[T], scratch: Collection[PartyId]) -> None:
        for site in task.sites:
            _, where = self._scratch.pop(site, (task.attempt, task.worker))
            if where != task.worker:
                self._stale[where].add(site)
        for site in scratch:
            self._scratch[site] = (task.attempt, task.worker)


_Heap = list[tuple[float, int, Task[T]]]  # -cost, serial, task


def _settled(heap: "_Heap[T]") -> bool:
    """Whether there is a task in it; one that was dropped is not left on top."""
    while heap and heap[0][2].dropped:
        heapq.heappop(heap)
    return bool(heap)


class _Costs:
    """What sites took, in seconds, the last time that they did one operation."""

    def __init__(self) -> None:
        self._by_site: dict[PartyId, float] = {}
        self._total = 0.0

    def expected(self, sites: Sequence[PartyId]) -> float:
        known = self._by_site
        mean = self._total / len(known) if known else _UNKNOWN
        if len(sites) == 1:
            return known.get(sites[0], mean)
        return sum([known.get(site, mean) for site in sites])

    def learn(self, sites: Sequence[PartyId], seconds: float) -> None:
        """Together they took `seconds`; who took how much of it is not known."""
        known = self._by_site
        self._total += seconds - sum([known.get(site, 0.0) for site in sites])
        known.update(dict.fromkeys(sites, seconds / len(sites)))
