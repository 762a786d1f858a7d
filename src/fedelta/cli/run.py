"""`fedelta run`: simulate an experiment file."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from fedelta.algorithms.federation import Federation
from fedelta.cli.experiment import Experiment, Sites, guarded
from fedelta.cli.options import RunSettings, simulation_options
from fedelta.cli.simulate import Simulation
from fedelta.core.errors import BadExperiment


@click.command(short_help="Simulate an experiment file.")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(1), help="Instead of the experiment's own number.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Replace a constant of the experiment.")
@simulation_options(
    seed="the experiment's own",
    seeds="Of initialisation, sampling, shuffling and dropout.",
    out="runs/EXPERIMENT",
)
def command(
    experiment: Path,
    rounds: int | None,
    settings: tuple[str, ...],
    seed: int | None,
    **options: Any,
) -> None:
    """Simulate EXPERIMENT, a Python file with program(), site(name), sites(), and optionally test()."""
    pairs = dict(_pair(setting) for setting in settings)
    loaded = Experiment.load(experiment, pairs)
    program = loaded.build()
    if not isinstance(program, Federation):
        raise BadExperiment(f"program() of {experiment} must return a Federation, got {type(program).__name__}")
    changes: dict[str, Any] = {"rounds": rounds, "seed": seed, "test": loaded.held_out()}
    federation: Federation[Any] = replace(program, **{k: v for k, v in changes.items() if v is not None})

    def site(name: str) -> object:
        return guarded(experiment, f"site({name!r}) was called", lambda: loaded.site(name))

    Simulation(
        title=experiment.stem,
        federation=federation,
        sites=Sites(load=site, names=loaded.names()),
        settings=RunSettings.take(options, Path("runs") / experiment.stem),
    ).run()


def _pair(setting: str) -> tuple[str, str]:
    name, separator, value = setting.partition("=")
    if not separator or not name:
        raise click.BadParameter(f"{setting!r} is not of the form NAME=VALUE", param_hint="--set")
    return name, value
