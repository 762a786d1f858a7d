"""The command line itself: its help, its exit statuses, and what it loads."""

import logging
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from fedelta.cli.main import cli, interrupts_kept, main
from fedelta.core.errors import FedeltaWarning

COMMANDS = ["ca", "combinations", "demo", "finetune", "ledger", "plan", "run", "stats"]
HEAVY = {"torch", "numpy", "transformers", "peft", "datasets", "pandas", "matplotlib", "sklearn", "jinja2"}


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    """The command silences libraries, for its own process."""
    level = logging.getLogger("matplotlib").level
    with warnings.catch_warnings():
        yield
    logging.getLogger("matplotlib").setLevel(level)


def fedelta(capsys: pytest.CaptureFixture[str], *arguments: object, status: int = 0) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments)])
    printed = capsys.readouterr()
    assert ended.value.code == status, printed.err
    assert (printed.err if status == 0 else printed.out) == ""
    return printed.err if status else printed.out


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["finetune", "--help"], 0),
        (["fintune"], 2),
        (["finetune", "--modle", "x"], 2),
    ],
)
def test_help_and_usage_errors_load_nothing_heavy(arguments: list[str], status: int) -> None:
    script = f"""
import sys
from fedelta.cli.main import main
try:
    main({arguments})
except SystemExit as ended:
    print("status", ended.code)
print("loaded", *sorted(set(sys.modules) & {HEAVY}))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines()[-2:] == [f"status {status}", "loaded"]
    assert bool(done.stderr) == bool(status)


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], ["-h"]):
        printed = fedelta(capsys, *arguments)
        assert printed.startswith("Usage: fedelta [OPTIONS] COMMAND [ARGS]...")
        assert all(f"\n  {name}  " in printed for name in COMMANDS)
    assert fedelta(capsys, status=2) == printed  # without a command


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_fits_a_terminal_and_explains_every_option(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    printed = fedelta(capsys, name, "--help")
    assert printed.startswith(f"Usage: fedelta {name} [OPTIONS]")
    assert max(map(len, printed.splitlines())) <= 80
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert all(option.help for option in options), [option.name for option in options if not option.help]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fedelta import __version__

    assert fedelta(capsys, "--version") == f"fedelta, version {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fintune"], "No such command 'fintune'. Did you mean 'finetune'?"),
        (["fly"], "No such command 'fly'."),
        (["--hepl"], "No such option '--hepl'. Did you mean '--help'?"),
        (["run"], "Missing argument 'EXPERIMENT'."),
        (["run", "x.py", "--workers", "many"], "'many' is not a valid integer range."),
        (["finetune", "--modle", "x"], "No such option '--modle'. Did you mean '--model'?"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    usage, hint, _, error = fedelta(capsys, *arguments, status=2).splitlines()
    assert usage.startswith("Usage: fedelta ")
    assert hint.startswith("Try 'fedelta ")
    assert error.startswith("Error: ")
    assert error.endswith(message)


def test_what_a_user_can_mend_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    missing = tmp_path / "no.py"
    assert fedelta(capsys, "run", missing, status=2) == f"fedelta: there is no experiment file {missing}\n"


@pytest.mark.parametrize("before", [True, False])
def test_debug_raises_it_instead(tmp_path: Path, before: bool) -> None:
    from fedelta.core.errors import BadExperiment

    arguments = ["run", str(tmp_path / "no.py")]
    with pytest.raises(BadExperiment, match="there is no experiment file"):
        main(["--debug", *arguments] if before else [*arguments, "--debug"])


def test_a_warning_of_ours_is_one_line_and_others_say_where_they_are_from(capsys: pytest.CaptureFixture[str]) -> None:
    fedelta(capsys, "--help")
    assert warnings.formatwarning("it may be wrong", FedeltaWarning, "part.py", 7) == "fedelta: it may be wrong\n"
    assert warnings.formatwarning("it is old", UserWarning, "part.py", 7, "") == "part.py:7: UserWarning: it is old\n"


class Finalized:
    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
        time.sleep(0)  # here the handler raises, in a finalizer


def test_an_interrupt_in_a_finalizer_is_not_lost() -> None:
    def work() -> None:
        with interrupts_kept():
            gone = Finalized()
            del gone
            time.sleep(60)

    with pytest.raises(KeyboardInterrupt):
        work()
