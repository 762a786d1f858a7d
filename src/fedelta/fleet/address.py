"""Where a coordinator listens, and its sites call."""

import ipaddress

from fedelta.core.errors import BadInput
from fedelta.fleet.wire import Credentials


def check_address(address: str, credentials: Credentials | None) -> None:
    """Raises BadInput unless the address is HOST:PORT, and a loopback address where there is no TLS."""
    host, separator, port = address.rpartition(":")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise BadInput(f"{address!r} is not HOST:PORT")
    if credentials is None and not is_loopback(host):
        raise BadInput(f"{host} is not a loopback address, and beyond this machine there is no connection without TLS")


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its address, or is called localhost."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"
