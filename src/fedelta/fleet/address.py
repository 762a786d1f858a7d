"""Where a coordinator listens, and its sites call."""

import ipaddress

from fedelta.core.errors import BadInput
from fedelta.fleet.wire import Credentials

_LAST_PORT, _DIGITS = 65535, 5


def check_address(address: str, credentials: Credentials | None, *, least: int = 0) -> None:
    """Raises BadInput unless the address is HOST:PORT, and a loopback address where there is no TLS.

    `least` is the lowest port: one can listen at 0, which is any that is free, and call from 1 on.
    """
    host, separator, port = address.rpartition(":")
    if not separator or not host or not (port.isascii() and port.isdecimal()):
        raise BadInput(f"{address!r} is not HOST:PORT, such as 127.0.0.1:7443")
    if len(port) > _DIGITS or not least <= int(port) <= _LAST_PORT:
        raise BadInput(f"there is no port {port} in {address!r}: they are from {least} to {_LAST_PORT}; give another")
    if credentials is None and not is_loopback(host):
        raise BadInput(f"{host} is not a loopback address, and beyond this machine there is no connection without TLS")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its address, or is called localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
