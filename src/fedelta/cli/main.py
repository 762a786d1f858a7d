"""The command line: thin commands, each calling what a Python user would call.

Every user error is one sentence on standard error and exit status 2 (130 after Ctrl-C); `--debug` shows the traceback.
Commands load on first use, so that `fedelta --help` answers without importing PyTorch.
"""

import logging
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import click

from fedelta import __version__
from fedelta.core.errors import FedeltaError, FedeltaWarning

_COMMANDS = {
    "ca": "A small certificate authority: who may join a coordinator, and which coordinator is the right one.",
    "combinations": "Tell which algorithms, guarantees and parts go together, and why others do not.",
    "demo": "A pre-trained model federated over 8 unequal sites, against every baseline; offline, in a minute.",
    "departures": "Check a site's own log of what left it, and tell what was in it.",
    "finetune": "Fine-tune a Hugging Face model over a table split among sites, with no Python written.",
    "join": "Take part in a run as a site: open a stream to its coordinator, and answer what it asks.",
    "ledger": "Check a privacy ledger, and tell what was released and what it adds up to.",
    "plan": "Tell what a run of an experiment file will send, need and show, before anything is sent.",
    "run": "Simulate an experiment file.",
    "serve": "Coordinate a run whose sites are elsewhere and join it over mutual TLS.",
    "signatures": "Check what the other parties of a run have signed.",
    "sites": "The sites of a run of `serve`: who is here, who counted, who is in quarantine and why.",
    "stats": "Counts, means, histograms and quantiles over the sites, of which only sums are seen.",
}


class _Lazy(click.Group):
    """Imports the module of a command when the command is asked for."""

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        command = import_module(f"fedelta.cli.{name}").command
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


# The commands given here are their names alone, from which click suggests the closest.
@click.group(
    cls=_Lazy,
    commands={name: click.Command(name) for name in _COMMANDS},
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="fedelta")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def cli(debug: bool) -> None:
    """Federated learning of pre-trained models: the model goes out to the data, and only the delta comes back."""


@contextmanager
def interrupts_kept() -> Iterator[None]:
    """Python drops what is raised while it runs a finalizer: an interrupt is raised anew, so that Ctrl-C counts."""
    before = sys.unraisablehook

    def hook(dropped: "sys.UnraisableHookArgs") -> None:
        if dropped.exc_type is KeyboardInterrupt:
            again = threading.main_thread().ident, signal.SIGINT
            threading.Timer(0.01, signal.pthread_kill, again).start()  # not here, where it would be dropped as well
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    # accepted after the command, too, where people add it
    debug = "--debug" in arguments
    arguments = ["--debug"] * debug + [argument for argument in arguments if argument != "--debug"]
    if not debug:
        warnings.simplefilter("ignore", FutureWarning)
        logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of its font cache, at length
    warnings.formatwarning = _warning  # type: ignore[assignment]  # by the names of its arguments
    try:
        with interrupts_kept():
            cli.main(arguments, prog_name="fedelta", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as error:  # a command that can go on says in Abort what is kept, and how
        click.echo(f"fedelta: interrupted{f'; {error}' if str(error) else ''}", err=True)
        sys.exit(130)
    except (FedeltaError, OSError) as error:
        if debug:
            raise
        click.echo(f"fedelta: {error}", err=True)
        sys.exit(2)
    except Exception as error:
        if debug:
            raise
        said = next(iter(str(error).strip().splitlines()), "no message")
        click.echo(f"fedelta: {type(error).__name__}: {said} (--debug shows where)", err=True)
        sys.exit(1)
    sys.exit(0)


_usual_warning = warnings.formatwarning


def _warning(message: Warning | str, category: type[Warning], file: str, row: int, line: str | None = None) -> str:
    """One of ours as one line, as errors are."""
    return f"fedelta: {message}\n" if category is FedeltaWarning else _usual_warning(message, category, file, row, line)
