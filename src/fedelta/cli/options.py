"""Options that several commands share."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

Command = Callable[..., Any]


def simulation_options(command: Command) -> Command:
    """--seed, --workers, --out and --resume."""
    for option in reversed(
        (
            click.option("--seed", type=int, help="Of everything that is drawn at random."),
            click.option(
                "--workers",
                type=click.IntRange(0),
                default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
                help="Worker processes; 0: all in this process. [one per core]",
            ),
            click.option("--out", type=click.Path(path_type=Path), help="Folder of this run. [runs/NAME]"),
            click.option("--resume", is_flag=True, help="Continue the run in the folder from its last commit."),
        )
    ):
        command = option(command)
    return command
