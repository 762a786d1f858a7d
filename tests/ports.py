"""Ports of loopback for what tests start."""

import socket

_HELD: list[socket.socket] = []


def free_port() -> int:
    """A port at which nobody listens; none but who is told of it will, as long as this process lives.

    It stays bound by a socket that does not listen. So the system gives it to nobody else, also between the moments at
    which a coordinator is killed and is there again; and it does not hinder whoever sets SO_REUSEADDR, as servers do.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind(("127.0.0.1", 0))
    _HELD.append(held)
    return int(held.getsockname()[1])
