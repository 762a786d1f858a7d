"""Options that several commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def simulation_options(*, seed: str, out: str) -> Callable[[Command], Command]:
    """--seed, --workers, --out and --resume; `seed` and `out` say what they are where they are not given."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    options = (
        click.option("--seed", type=int, metavar="N", show_default=seed, help="Of all that is drawn at random."),
        click.option(
            "--workers",
            type=click.IntRange(0),
            metavar="N",
            default=cores,
            show_default="one per core",
            help="Worker processes; 0: all in this process.",
        ),
        click.option(
            "--out",
            type=click.Path(path_type=Path, file_okay=False),
            metavar="FOLDER",
            show_default=out,
            help="Folder of this run.",
        ),
        click.option("--resume", is_flag=True, help="Continue the run in the folder from its last commit."),
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate
