"""What comes to a coordinator's port before it has said a word."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import grpc
import pytest

from fedelta.core.errors import BadInput
from fedelta.fleet import listening
from fedelta.fleet.limits import Limits
from fleet_program import Play, load
from remote_sites import PATIENCE_S, coordinator, issued, site, until

COORDINATOR = """
import resource, sys
from fedelta.core.errors import BadInput
from fleet_program import Play
from remote_sites import coordinator
soft, hard, sites = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    coordinator(Play(), [f"site-{place}" for place in range(sites)], credentials=None).close()
except BadInput as error:
    sys.exit(str(error))
print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def is_open(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


@contextmanager
def mute(port: int) -> Iterator[list[socket.socket]]:
    """Two hundred connections of whoever says nothing."""
    with ExitStack() as opened:
        found = []
        for _ in range(200):
            with suppress(ConnectionError):
                found.append(opened.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S)))
        yield found


def test_strangers_do_not_take_all_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "_HANDSHAKE_S", 10 * PATIENCE_S)
    limits = Limits(stall_s=10 * PATIENCE_S)
    with coordinator(Play(), ("amber",), limits=limits) as fleet, mute(fleet.port) as strangers:
        until(lambda: sum(map(is_open, strangers)) <= 66)


def test_strangers_do_not_keep_the_place_of_a_site() -> None:
    with coordinator(Play(), ("amber",), limits=Limits(stall_s=2.0)) as fleet, mute(fleet.port) as strangers:
        with site(Play(), load, "amber", fleet.port):
            assert fleet.wait_for(1, PATIENCE_S)
        until(lambda: not any(map(is_open, strangers)))


def test_a_connection_without_a_stream_is_closed() -> None:
    own, lost = issued("stranger"), threading.Event()
    credentials = grpc.ssl_channel_credentials(own.root, own.key, own.chain)
    with (
        coordinator(Play(), ("amber",), limits=Limits(stall_s=1.0)) as fleet,
        grpc.secure_channel(f"127.0.0.1:{fleet.port}", credentials) as channel,
        site(Play(), load, "amber", fleet.port),
    ):
        grpc.channel_ready_future(channel).result(20)
        channel.subscribe(lambda state: lost.set() if state is grpc.ChannelConnectivity.IDLE else None)
        assert fleet.wait_for(1, 20)
        assert lost.wait(60)
        assert fleet.connected() == ("amber",)  # a site that waits to be asked has a stream


def begun(*numbers: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", COORDINATOR, *map(str, numbers)]
    paths = {"PYTHONPATH": ":".join(filter(None, sys.path))}
    return subprocess.run(command, env=paths, capture_output=True, text=True, timeout=PATIENCE_S)


def test_as_many_files_may_be_open_as_the_sites_take() -> None:
    assert int(begun(300, 4000, 300).stdout) == 300 * 2 + 64 + 256
    assert int(begun(300, 600, 300).stdout) == 600
    assert int(begun(2000, 4000, 300).stdout) == 2000  # which is enough


def test_too_few_files_are_refused_with_how_many_it_takes() -> None:
    ended = begun(300, 500, 300)
    assert ended.returncode == 1
    assert ended.stderr == (
        "this process may have 500 files open, and 300 sites take 556; raise the limit (`ulimit -Hn`)\n"
    )


def test_a_port_that_is_taken_is_an_error() -> None:
    with coordinator(Play(), ("amber",)) as fleet, pytest.raises(BadInput, match="nothing can listen at"):
        coordinator(Play(), ("amber",), listen=f"127.0.0.1:{fleet.port}")
