"""Options that several commands share."""

import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from fedelta.core.extras import require

Command = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class RunSettings:
    """Where and how a simulation runs; none of it changes what comes out, `plan` only by rounding."""

    out: Path
    resume: bool
    workers: int  # processes; 0: all in this one
    plan: str  # "auto", "plain", or a run folder whose plan is taken
    commit_every_s: float  # seconds; 0: after every round
    again: str  # the command that continues this run
    ledger: Path | None = None  # of privacy, shared with other runs; None: of this run alone, in its folder
    tensorboard: Path | None = None  # the folder of its event files
    mlflow: str | None = None  # a tracking URI, or a folder

    @classmethod
    def take(cls, options: dict[str, Any], default_out: Path) -> "RunSettings":
        """From the parsed options, out of which they are removed.

        Raises BadInput where a library that they ask for is not installed.
        """
        tensorboard, mlflow = options.pop("tensorboard"), options.pop("mlflow")
        for extra, asked in (("tensorboard", tensorboard), ("mlflow", mlflow)):
            if asked is not None:
                require(extra, extra)  # before data are read
        return cls(
            out=options.pop("out") or default_out,
            resume=options.pop("resume"),
            workers=options.pop("workers"),
            plan=options.pop("plan"),
            commit_every_s=options.pop("commit_every"),
            again=f"fedelta {shlex.join(argument for argument in sys.argv[1:] if argument != '--resume')} --resume",
            ledger=options.pop("ledger"),
            tensorboard=tensorboard,
            mlflow=mlflow,
        )


def simulation_options(*, seed: str, seeds: str, out: str) -> Callable[[Command], Command]:
    """The options of `RunSettings`, and --seed.

    `seed` and `out` say what they are where they are not given, `seeds` what it is that the seed decides.
    """
    options: tuple[Callable[[Command], Command], ...] = (
        click.option("--seed", type=int, metavar="N", show_default=seed, help=seeds),
        *_of_a_run(out),
        *_TRACKERS,
    )

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _of_a_run(out: str) -> tuple[Callable[[Command], Command], ...]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (
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
        click.option(
            "--plan",
            metavar="PLAN",
            default="auto",
            show_default=True,
            help="How sites are trained. auto: the fastest way in a short trial; plain: one by one; or the folder of a "
            "run, to train as it did.",
        ),
        click.option("--resume", is_flag=True, help="Continue the run in the folder from its last commit."),
        click.option(
            "--commit-every",
            type=click.FloatRange(0),
            metavar="SECONDS",
            default=30.0,
            show_default=True,
            help="Time between commits of the run's state; 0: after every round.",
        ),
        click.option(
            "--ledger",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            show_default="one of its own, in the run's folder",
            help="Privacy ledger that runs over the same data share: what others have spent counts.",
        ),
    )


_TRACKERS: tuple[Callable[[Command], Command], ...] = (
    click.option(
        "--tensorboard",
        type=click.Path(path_type=Path, file_okay=False),
        metavar="FOLDER",
        help="Also write every round as TensorBoard events into this folder.",
    ),
    click.option(
        "--mlflow",
        metavar="URI|FOLDER",
        help="Also write every round to MLflow: a tracking URI, or a folder for a database of its own.",
    ),
)
