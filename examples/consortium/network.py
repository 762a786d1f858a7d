"""The consortium over a bad network: each party in a network namespace of its own, one of which is cut off for a while.

    sudo python examples/consortium/network.py --data FOLDER --out FOLDER

Every line between a party and the switch, a bridge in a namespace of its own, takes 40 ms and loses 1% of the packets
in either direction. Once a third of the rounds are done, the line of one hospital is cut for 10 s. The model has to be
that of a simulation, to the bit.

It needs root, Linux and iproute2, and ends with status 77 where it lacks them. All interfaces are in the namespaces,
and these are removed in the end, also after Ctrl-C; what a killed run has left, the next one removes.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lines import Lines
from parties import Consortium, Failed, parsed, say, told

DELAY_MS = 40  # on each line, in each direction: a round trip between two parties is four times that
LOSS = 0.01
CUT_S = 10.0
VICTIM = "hungary"
ROUNDS_BEFORE = 6  # the cut
LACKING = 77  # the exit status that test programs use for "skipped"
_MARK = "fedelta-"  # begins the names of our namespaces


class Lacking(Exception):
    """There is no right, or no program, to make such a network."""


class Network:
    """A switch, and a line to it for each party: `address` of a party, `inside` it a command, `cut` and `mend`."""

    def __init__(self, parties: list[str]) -> None:
        self._switch = f"{_MARK}{os.getpid()}-switch"
        self._spaces = {party: f"{_MARK}{os.getpid()}-{party}" for party in parties}
        self._lines: Lines | None = None

    def address(self, party: str) -> str:
        return f"10.83.0.{1 + [*self._spaces].index(party)}"

    def inside(self, party: str) -> list[str]:
        return ["ip", "netns", "exec", self._spaces[party]]

    def cut(self, party: str) -> None:
        _ip("-n", self._switch, "link", "set", self._port(party), "down")

    def mend(self, party: str) -> None:
        _ip("-n", self._switch, "link", "set", self._port(party), "up")

    def traffic(self) -> str:
        """What was lost."""
        if self._lines is not None:
            return f"{self._lines.lost:,} of {self._lines.carried:,} packets were lost, beside those of the cut"
        counted = [_tc("-s", "-n", space, "qdisc", "show", "dev", "eth0") for space in self._spaces.values()]
        found = [re.search(r"(\d+) pkt \(dropped (\d+)", text) for text in counted]
        sent, lost = (sum(int(one[group]) for one in found if one) for group in (1, 2))
        return f"{lost:,} of {sent + lost:,} packets of the parties were lost, beside those of the cut"

    @contextmanager
    def there(self) -> Iterator[None]:
        """Within it there is the network. Raises Lacking."""
        _tidy()
        try:
            self._make()
            yield
        finally:
            for space in (*self._spaces.values(), self._switch):
                with suppress(Lacking):
                    _ip("netns", "delete", space)
            if self._lines is not None:
                self._lines.close()

    def _make(self) -> None:
        for space in (self._switch, *self._spaces.values()):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        if not self._netem():
            self._lines = Lines(DELAY_MS / 1000, LOSS)
        for party, space in self._spaces.items():
            near, far = self._ends(party)
            _ip("link", "set", near, "netns", space, "name", "eth0")
            _ip("link", "set", far, "netns", self._switch, "name", self._port(party))
            _ip("-n", self._switch, "link", "set", self._port(party), "master", "switch", "up")
            _ip("-n", space, "address", "add", f"{self.address(party)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            if self._lines is None:
                for owner, end in ((space, "eth0"), (self._switch, self._port(party))):
                    _slow(owner, end)
        if self._lines is not None:
            self._lines.start()

    def _ends(self, party: str) -> tuple[str, str]:
        """The two interfaces of a new line, which are to be moved to their namespaces at once."""
        number = [*self._spaces].index(party)
        near, far = f"fd{os.getpid()}n{number}", f"fd{os.getpid()}f{number}"
        if self._lines is None:
            _ip("link", "add", near, "type", "veth", "peer", "name", far)
        else:
            try:
                self._lines.add(near, far)
            except OSError as error:
                raise Lacking(f"the kernel has neither netem nor network interfaces of programs: {error}") from None
        return near, far

    def _netem(self) -> bool:
        """Whether the kernel can delay and lose packets."""
        try:
            _slow(self._switch, "lo")
        except Lacking:
            return False
        return True

    def _port(self, party: str) -> str:
        return f"port{[*self._spaces].index(party)}"


def _slow(space: str, interface: str) -> None:
    options = ("netem", "delay", f"{DELAY_MS}ms", "loss", f"{100 * LOSS:g}%")
    _tc("-n", space, "qdisc", "add", "dev", interface, "root", *options)


def _ip(*words: str) -> str:
    return _root("ip", *words)


def _tc(*words: str) -> str:
    return _root("tc", *words)


def _root(*words: str) -> str:
    """Its output. Raises Lacking where it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Lacking(f"there is no program {words[0]}; install iproute2") from None
    if done.returncode:
        raise Lacking(f"`{' '.join(words)}` failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def _tidy() -> None:
    """Remove what runs have left that were killed. Raises Lacking where that is not allowed."""
    if os.geteuid():
        raise Lacking("network namespaces need root; try sudo")
    for line in _ip("netns", "list").splitlines():
        space = line.split()[0]
        owner = re.match(rf"{_MARK}(\d+)-", space)
        if owner and not Path("/proc", owner[1]).exists():
            _ip("netns", "delete", space)


def main() -> None:
    with told():
        arguments = parsed(__doc__ or "")
        consortium = Consortium.at(arguments.out, arguments.data)
        parties = [consortium.coordinator, *consortium.hospitals.values()]
        network = Network([party.name for party in parties])
        try:
            with network.there(), consortium.ended():
                for party in parties:
                    party.before = network.inside(party.name)
                consortium.bring(arguments.data)
                consortium.certify([network.address("coordinator")])
                consortium.agree()
                over(consortium, network)
                say(network.traffic() + ".")
        except Lacking as error:
            shutil.rmtree(arguments.out)
            print(f"consortium: {error}", file=sys.stderr)
            sys.exit(LACKING)
        told_of(consortium)
        consortium.same(arguments.data)


def over(consortium: Consortium, network: Network) -> None:
    """A run with a cut in its middle."""
    at = consortium.serve(network.address("coordinator"), "--absence", "300")
    for name in consortium.hospitals:
        consortium.join(name, at)
    rounds = consortium.coordinator.folder / "run" / "rounds.jsonl"

    def done() -> int:
        return rounds.read_bytes().count(b"\n") if rounds.exists() else 0

    while done() < ROUNDS_BEFORE:
        consortium.check()
        time.sleep(0.05)
    network.cut(VICTIM)
    before = done()
    say(f"\nThe line of {VICTIM} is cut after {before} rounds, for {CUT_S:g} s.")
    time.sleep(CUT_S)
    say(f"It is mended; in the meantime {done() - before} rounds have ended.\n")
    network.mend(VICTIM)
    consortium.finish()


def told_of(consortium: Consortium) -> None:
    """Raises Failed if somebody was missing in a round."""
    from fedelta.observe.folder import read_run  # and PyTorch

    _, reports = read_run(consortium.coordinator.folder / "run")
    if any(report.absent for report in reports):
        raise Failed(f"somebody was absent: {[dict(report.absent) for report in reports]}")
    seconds = [sum(report.seconds.values()) for report in reports]
    say(
        f"{len(reports)} rounds, nobody absent in any: half of them took less than {statistics.median(seconds):.1f} s, "
        f"and the longest {max(seconds):.1f} s.\n"
    )


if __name__ == "__main__":
    main()
