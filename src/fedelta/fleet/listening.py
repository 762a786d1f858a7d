"""The port at which a coordinator listens, and what is let through to it before anybody has said a word.

A connection takes one of the files that a process may have open, of which a run needs some itself. So there is room for
those of all sites and for some more, and no stranger holds one for long.
"""

import resource
import socket
from collections.abc import Callable
from typing import Any

from fedelta.core.errors import BadInput
from fedelta.fleet.limits import Limits
from fedelta.fleet.wire import METHOD, Credentials, grpc, transport

_STREAMS = 4  # of a connection. Not of the server: whoever keeps streams open would keep all others out
_EACH, _MORE = 2, 64  # connections for each site, whose last one may not have ended yet; and for whoever else comes
_OWN_FILES = 256  # of the run and its libraries
_HANDSHAKE_S = 20.0


async def listening(
    join: Callable[..., Any], at: str, credentials: Credentials | None, limits: Limits, sites: int
) -> tuple[Any, int]:
    """A server that has begun, and its port; `join` handles a site's stream. Raises BadInput if it cannot begin."""
    options = [
        *transport(limits.keepalive_s),
        ("grpc.so_reuseport", 0),
        ("grpc.max_connection_idle_ms", _ms(limits.stall_s)),  # a site has a stream, or goes
        ("grpc.server_handshake_timeout_ms", _ms(min(limits.stall_s, _HANDSHAKE_S))),
        ("grpc.max_allowed_incoming_connections", _connections(sites)),
    ]
    if credentials is not None:  # without, the sites of a process share a connection
        options.append(("grpc.max_concurrent_streams", _STREAMS))
    server = grpc.aio.server(options=options)
    service, _, method = METHOD[1:].partition("/")
    handlers = {method: grpc.stream_stream_rpc_method_handler(join)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    _check_free(at)
    try:
        if credentials is None:
            port = server.add_insecure_port(at)
        else:
            pair = [(credentials.key, credentials.chain)]
            tls = grpc.ssl_server_credentials(pair, root_certificates=credentials.root, require_client_auth=True)
            port = server.add_secure_port(at, tls)
    except RuntimeError as error:
        raise BadInput(f"nothing can listen at {at}: {error}; choose another --listen") from None
    if port == 0:
        raise BadInput(f"nothing can listen at {at}; choose another --listen, or look at the certificates")
    await server.start()
    return server, int(port)


def _connections(sites: int) -> int:
    """How many may be open at once; this process may then have as many files as that takes.

    Raises BadInput where the system does not let it.
    """
    wanted = _EACH * sites + _MORE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted + _OWN_FILES:
        return wanted
    most = wanted + _OWN_FILES if hard == resource.RLIM_INFINITY else min(hard, wanted + _OWN_FILES)
    if most < sites + _OWN_FILES:
        raise BadInput(
            f"this process may have {hard} files open, and {sites} sites take {sites + _OWN_FILES}; raise the limit "
            "(`ulimit -Hn`)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most - _OWN_FILES


def _check_free(at: str) -> None:
    """Before gRPC, which writes to standard error where it cannot listen. Raises BadInput."""
    host, _, port = at.rpartition(":")
    host = host.strip("[]")
    try:
        socket.create_server((host, int(port)), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise BadInput(f"nothing can listen at {at}: {error.strerror}; choose another --listen") from None


def _ms(seconds: float) -> int:
    return max(1, int(1000 * seconds))
