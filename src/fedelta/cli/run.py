"""`fedelta run`: simulate an experiment file, or compare it with its baselines."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from fedelta.cli.compare import Comparison
from fedelta.cli.experiment import opened
from fedelta.cli.options import RunSettings, simulation_options
from fedelta.cli.secure import Masks, secure_options
from fedelta.cli.simulate import Simulation

_SEEDS = 3  # of a comparison
_NOT_COMPARED = {  # what a comparison does not take -> why
    "resume": "a comparison goes on by itself from the runs in its folder",
    "ledger": "a comparison is many runs, none of which is to be released",
    "plan": "a comparison trains as the experiment's own Plan says, and plainly where it says nothing",
    "commit_every": "a comparison keeps every finished run at once",
    "tensorboard": "a comparison is many runs, and its report has their curves",
    "mlflow": "a comparison is many runs, and its report has their curves",
}


@click.command(short_help="Simulate an experiment file.")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(1), help="Instead of the experiment's own number.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Replace a constant of the experiment.")
@click.option(
    "--compare",
    is_flag=True,
    help="Was it worth it? Beside the model as it is, closed form, each site alone, pooled rows, and from scratch.",
)
@click.option(
    "--seeds", type=click.IntRange(1), metavar="N", show_default=str(_SEEDS), help="Runs of every method of --compare."
)
@secure_options
@simulation_options(
    seed="the experiment's own",
    seeds="Of initialisation, sampling, shuffling and dropout; the first one with --compare.",
    out="runs/EXPERIMENT, or runs/EXPERIMENT-compare",
)
def command(
    experiment: Path,
    rounds: int | None,
    settings: tuple[str, ...],
    compare: bool,
    seeds: int | None,
    seed: int | None,
    **options: Any,
) -> None:
    """Simulate EXPERIMENT, a Python file with program(), site(name), sites(), and optionally test()."""
    _check(compare, seeds)
    masks = Masks.take(options)
    federation, sites = opened(experiment, settings, rounds=rounds, seed=seed)
    federation = masks.on(federation, sites)
    if compare:
        Comparison(
            title=experiment.stem,
            federation=federation,
            sites=sites,
            seeds=seeds or _SEEDS,
            out=options["out"] or Path("runs") / f"{experiment.stem}-compare",
            workers=options["workers"],
        ).run()
        return
    Simulation(
        title=experiment.stem,
        federation=federation,
        sites=sites,
        settings=RunSettings.take(options, Path("runs") / experiment.stem),
    ).run()


def _check(compare: bool, seeds: int | None) -> None:
    """Refuse options that do not go together."""
    if not compare:
        if seeds is not None:
            raise click.UsageError("--seeds is for --compare; a single run has --seed")
        return
    context = click.get_current_context()
    for name, why in _NOT_COMPARED.items():
        if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise click.UsageError(f"--compare goes without --{name.replace('_', '-')}: {why}")
