"""What `serve` and `join` share: whom they trust, what they log, and how they load the experiment."""

import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

import click

from fedelta.core.extras import require
from fedelta.observe.logs import JsonLines, NoRounds

if TYPE_CHECKING:
    from fedelta.algorithms.federation import Federation
    from fedelta.cli.experiment import Experiment
    from fedelta.fleet.revocations import Revocations
    from fedelta.fleet.wire import Credentials

log = logging.getLogger(__name__)
Command = Callable[..., Any]

_OPTIONS: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--set", "settings", multiple=True, metavar="NAME=VALUE", help="Replace a constant of the experiment."
    ),
    click.option(
        "--certificates",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Certificate, key and authority of this party, as `fedelta ca issue` makes them.",
    ),
    click.option(
        "--insecure",
        is_flag=True,
        help="Without TLS, on this machine alone: whoever reaches the port may be anybody. For a first try.",
    ),
    click.option(
        "--largest-message",
        type=click.IntRange(1),
        metavar="MIB",
        show_default="8 models, at least 64",
        help="MiB that a message of the other side may have: what is announced with more is refused.",
    ),
    click.option(
        "--log",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="Form of what is logged to standard error: a line for people, or a line of JSON.",
    ),
)


def deployment_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def trusted(
    certificates: Path | None, insecure: bool, purpose: Literal["site", "coordinator"]
) -> "tuple[str | None, Credentials | None]":
    """This party's name and what it shows in TLS, or neither. Raises UsageError unless it is one or the other."""
    require("deployment", "grpc", "google")
    if (certificates is None) != insecure:
        raise click.UsageError(
            "give --certificates with this party's folder; or --insecure, on this machine alone, to try things out"
        )
    if certificates is None:
        log.warning("--insecure: no TLS; any process of this machine may take part under any name")
        return None, None
    from fedelta.fleet.own_files import Party
    from fedelta.fleet.wire import Credentials

    party = Party.read(certificates, purpose)
    return party.name, Credentials(root=party.root, chain=party.chain, key=party.key)


def watch_expiry(
    certificates: Path | None, credentials: "Credentials | None", revoked: "Revocations | None" = None
) -> None:
    """Warn of what ends soon, now and while the process lives."""
    from fedelta.cli.expiry import Expiry, Paper

    papers: list[Callable[[], Paper]] = []
    if certificates is not None and credentials is not None:
        own = Paper.certificate(certificates, credentials)
        papers.append(lambda: own)
    if revoked is not None:
        papers.append(lambda: Paper.revoked(revoked))
    Expiry(papers).begin()


def loaded(
    path: Path, settings: tuple[str, ...], *, test: bool, rounds: int | None = None
) -> "tuple[Experiment, Federation[Any]]":
    """The experiment as every party of a deployment runs it.

    Noise and samplings on which a guarantee rests come from the operating system, and sites are trained one by one.
    """
    from fedelta.cli.experiment import federated

    experiment, federation = federated(path, settings, rounds=rounds, test=test)
    entropy = federation.entropy if federation.privacy is None else "system"
    return experiment, replace(federation, entropy=entropy, plan=federation.plan.plain)


class _Screen(logging.StreamHandler[TextIO]):
    """Writes to what sys.stderr is at the moment: while progress is shown, that is above it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def end_in_order() -> None:
    """Let SIGTERM, with which containers and service managers end a process, do what Ctrl-C does to this command."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    click.get_current_context().call_on_close(lambda: signal.signal(signal.SIGTERM, before))


def _as_before(logger: logging.Logger, handlers: list[logging.Handler], propagate: bool) -> None:
    """Several commands may run in a process."""
    logger.handlers, logger.propagate = handlers, propagate


def log_to_stderr(form: str) -> None:
    """One line for each thing that happens to a stream; as JSON also for each round, and for warnings of libraries."""
    as_json = form == "json"
    handler = _Screen() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines() if as_json else logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    if not as_json:
        handler.addFilter(NoRounds())
    logging.captureWarnings(as_json)
    for name in ("fedelta", "opentelemetry", *(["py.warnings"] if as_json else [])):
        logger = logging.getLogger(name)
        click.get_current_context().call_on_close(partial(_as_before, logger, logger.handlers, logger.propagate))
        logger.handlers = [handler]
        logger.propagate = False
    logging.getLogger("fedelta").setLevel(logging.INFO)
