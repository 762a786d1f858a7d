"""`fedelta finetune`: federated fine-tuning of a Hugging Face model over a table, with no Python written.

Here are the options and which of them go together; the work is in `finetune_job`, which loads PyTorch.
"""

import math
from pathlib import Path
from typing import Any

import click

from fedelta.cli.options import RunSettings, simulation_options

_ADAPTIVE = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")  # the algorithms with a server optimiser
_POSITIVE = click.FloatRange(0, min_open=True)


@click.command(epilog="With LoRA, OUT/model holds the factors and the head; peft puts them on the model that M names.")
@click.option("--model", required=True, metavar="M", help="Hub name or local folder of a pre-trained model.")
@click.option(
    "--data",
    required=True,
    metavar="D",
    help="Table: a csv, tsv, parquet or json lines file, a folder that `datasets` saved, or a hub name.",
)
@click.option("--columns", metavar="A,B,…", help="Names of the columns of a csv or tsv file that has no header line.")
@click.option("--text", multiple=True, required=True, metavar="COLUMN", help="The text; given twice, both are joined.")
@click.option("--label", required=True, metavar="COLUMN", help="The class.")
@click.option("--split-by", metavar="COLUMN", help="Natural sites: the column that says to which site a row belongs.")
@click.option("--sites", type=click.IntRange(1), metavar="N", help="Simulated sites: how many.")
@click.option(
    "--alpha", type=_POSITIVE, metavar="A", show_default="no skew", help="Label skew of --sites: Dirichlet(A)."
)
@click.option("--test", metavar="D", help='Table with the test rows; where it is the --data, its split "test".')
@click.option(
    "--test-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="F",
    show_default="0.2",
    help="Share of --data that is held out as test rows, where there is no --test.",
)
@click.option(
    "--tune",
    type=click.Choice(["full", "head", "lora"]),
    default="lora",
    show_default=True,
    help="What is trained and sent: all weights, the head, or LoRA factors and the head.",
)
@click.option("--rank", type=click.IntRange(1), metavar="R", show_default="8", help="Of the LoRA factors.")
@click.option(
    "--rounds",
    type=click.IntRange(1),
    metavar="N",
    default=5,
    show_default=True,
    help="Times that the model goes out to the sites.",
)
@click.option(
    "--epochs", type=click.IntRange(1), metavar="N", default=1, show_default=True, help="At each site in each round."
)
@click.option(
    "--lr",
    type=_POSITIVE,
    metavar="LR",
    show_default="lora 5e-4, full 5e-5, head 1e-3",
    help="Of AdamW at the sites.",
)
@click.option(
    "--schedule",
    type=click.Choice(["constant", "cosine"]),
    default="constant",
    show_default=True,
    help="The learning rate over the rounds; cosine lowers it to a tenth.",
)
@click.option("--batch", type=click.IntRange(1), metavar="N", default=16, show_default=True, help="Rows a step.")
@click.option(
    "--max-length",
    type=click.IntRange(1),
    metavar="N",
    show_default="128, or what the model reads",
    help="Tokens kept of a text.",
)
@click.option(
    "--algorithm",
    type=click.Choice(["fedavg", "fedprox", *_ADAPTIVE]),
    default="fedavg",
    show_default=True,
    help="How the sites' updates become the next model.",
)
@click.option("--mu", type=click.FloatRange(0), metavar="MU", show_default="0.01", help="Proximal term of fedprox.")
@click.option(
    "--server-lr",
    type=_POSITIVE,
    metavar="LR",
    show_default="fedavgm 1, fedadagrad 0.1, fedadam and fedyogi 0.01",
    help="Of the server optimiser.",
)
@click.option(
    "--per-round", type=click.IntRange(1), metavar="N", show_default="all", help="Sites that take part in a round."
)
@click.option("--bf16", is_flag=True, help="Forward passes in bfloat16, where the processor has it.")
@simulation_options(seed="0", seeds="Of initialisation, sampling, shuffling, dropout and splits.", out="runs/finetune")
def command(**options: Any) -> None:
    """Fine-tune a pre-trained classifier of texts over a table that is split among sites.

    The result, in OUT/model, loads with plain transformers (and peft, for LoRA).

    \b
    fedelta finetune --model M --data train.csv --text text --label label \\
        --sites 8 --alpha 0.5
    """
    _check(options)
    from fedelta.cli.finetune_job import FineTuning

    settings = RunSettings.take(options, Path("runs/finetune"))
    FineTuning(**{name: value for name, value in options.items() if value is not None}).run(settings)


def _check(options: dict[str, Any]) -> None:
    """Refuse options that contradict each other, and those that would have no effect: they are a misunderstanding."""
    given = {name for name, value in options.items() if value is not None}
    tune, algorithm = options["tune"], options["algorithm"]
    for wrong, sentence in (
        (
            not {"split_by", "sites"} & given,
            "Say how the rows are split: --split-by COLUMN for natural sites, or --sites N to simulate them.",
        ),
        (
            {"split_by", "sites"} <= given,
            "--split-by is for natural sites and --sites for simulated ones; leave one of them out.",
        ),
        (
            {"split_by", "alpha"} <= given,
            "--alpha is for simulated sites (--sites); with --split-by the column decides.",
        ),
        (
            {"test", "test_fraction"} <= given,
            "--test names the test rows, so --test-fraction has no effect; leave one of them out.",
        ),
        ("rank" in given and tune != "lora", f"--rank has no effect with --tune {tune}; it is for --tune lora."),
        (
            "mu" in given and algorithm != "fedprox",
            f"--mu has no effect with --algorithm {algorithm}; it is for fedprox.",
        ),
        (
            "server_lr" in given and algorithm not in _ADAPTIVE,
            f"--server-lr has no effect with --algorithm {algorithm}; it is for {', '.join(_ADAPTIVE)}.",
        ),
        *(  # click takes "nan" for a number in any range
            (isinstance(value, float) and math.isnan(value), f"--{name.replace('_', '-')} is not a number.")
            for name, value in options.items()
        ),
    ):
        if wrong:
            raise click.UsageError(sentence)
