"""`fedelta finetune`: federated fine-tuning of a Hugging Face model over a table, with no Python written."""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt
import torch

from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.fedopt import FedAdagrad, FedAdam, FedAvgM, FedOpt, FedYogi
from fedelta.algorithms.fedprox import FedProx
from fedelta.algorithms.sampling import All, Fixed
from fedelta.cli.experiment import Sites
from fedelta.cli.options import simulation_options
from fedelta.cli.simulate import Simulation
from fedelta.core.errors import BadInput
from fedelta.core.examples import Examples
from fedelta.core.parameters import Parameters
from fedelta.core.seeds import derive
from fedelta.data.partition import IID, Dirichlet, by_column
from fedelta.data.tables import read_table, text_and_labels
from fedelta.learning.objectives import Classification
from fedelta.learning.optimizers import AdamW
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.task import Task
from fedelta.learning.text import encode
from fedelta.learning.training import Training
from fedelta.learning.tuning import Full, Head, LoRA, Tuning

_TUNINGS = ("full", "head", "lora")
_SERVERS = {"fedavgm": FedAvgM, "fedadam": FedAdam, "fedyogi": FedYogi, "fedadagrad": FedAdagrad}
_ALGORITHMS = ("fedavg", "fedprox", *_SERVERS)


@dataclass(frozen=True, kw_only=True)
class Table:
    """The texts, and to which site each belongs; -1 marks the rows of the test set."""

    examples: Examples
    classes: tuple[str, ...]
    rows: dict[str, npt.NDArray[np.int64]]
    test: npt.NDArray[np.int64]


@click.command(short_help="Fine-tune a Hugging Face model over a table split among sites.")
@click.option("--model", required=True, help="Hub name or local folder of a pre-trained model.")
@click.option("--data", required=True, help="csv, tsv, parquet, json lines, a `datasets` folder, or a hub name.")
@click.option("--columns", help="Names for the columns of a file that has no header line: a,b,c.")
@click.option("--text", multiple=True, required=True, help="Column with the text; given twice, the texts are joined.")
@click.option("--label", required=True, help="Column with the class.")
@click.option("--split-by", help="Column that says to which site a row belongs (natural sites).")
@click.option("--sites", type=click.IntRange(1), help="Number of simulated sites, where there is no such column.")
@click.option("--alpha", type=click.FloatRange(0, min_open=True), help="Label skew of --sites: Dirichlet(alpha). [IID]")
@click.option("--test", "test_data", help="Table with the test rows, in the form of --data.")
@click.option("--test-fraction", type=click.FloatRange(0, 1, max_open=True), default=0.2, show_default=True)
@click.option("--tune", type=click.Choice(_TUNINGS), default="lora", show_default=True, help="What is trained.")
@click.option("--rank", type=click.IntRange(1), default=8, show_default=True, help="Of the LoRA factors.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True)
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="At each site in each round.")
@click.option("--lr", type=click.FloatRange(0, min_open=True), help="[5e-4 for lora, 5e-5 for full, 1e-3 for head]")
@click.option("--batch", type=click.IntRange(1), default=16, show_default=True)
@click.option("--max-length", type=click.IntRange(8), default=128, show_default=True, help="Tokens kept of a text.")
@click.option("--algorithm", type=click.Choice(_ALGORITHMS), default="fedavg", show_default=True)
@click.option("--mu", type=click.FloatRange(0), default=0.01, show_default=True, help="Proximal term of fedprox.")
@click.option("--server-lr", type=click.FloatRange(0, min_open=True), help="Of the algorithms with a server optimiser.")
@click.option("--per-round", type=click.IntRange(1), help="Sites that take part in a round. [all]")
@click.option("--bf16", is_flag=True, help="Forward passes in bfloat16, where the processor has it.")
@simulation_options
def command(**options: Any) -> None:
    """Fine-tune a pre-trained classifier of texts over a table that is split among sites.

    The result, in OUT/model, loads with plain transformers (and peft, for LoRA).
    """
    table = _read(options)
    names = list(table.rows)
    sites = Sites(load=lambda name: table.examples[torch.from_numpy(table.rows[name])], names=names)
    federation: Federation[Any] = Federation(
        algorithm=_algorithm(options, table.classes),
        rounds=options["rounds"],
        sampling=All() if options["per_round"] is None else Fixed(size=options["per_round"]),
        seed=options["seed"] or 0,
        test=table.examples[torch.from_numpy(table.test)] if len(table.test) else None,
    )
    Simulation(
        title=f"fine-tuning {options['model']} ({options['tune']})",
        federation=federation,
        sites=sites,
        out=options["out"] or Path("runs/finetune"),
        resume=options["resume"],
        workers=options["workers"],
        classes=table.classes,
        again=f"fedelta {shlex.join(a for a in sys.argv[1:] if a != '--resume')} --resume",
    ).run()


def _algorithm(options: dict[str, Any], classes: tuple[str, ...]) -> Algorithm[Any]:
    lr = options["lr"] or {"lora": 5e-4, "full": 5e-5, "head": 1e-3}[options["tune"]]
    training = Training(
        optimizer=AdamW(lr=lr), batch=options["batch"], epochs=options["epochs"], clip=1.0, bf16=options["bf16"]
    )
    task = Task(
        model=Pretrained(source=options["model"], labels=classes, tuning=_tuning(options)),
        objective=Classification(classes=len(classes)),
    )
    client: Algorithm[Parameters] = FedAvg(task=task, training=training)
    if options["algorithm"] == "fedprox":
        client = FedProx(task=task, training=training, mu=options["mu"])
    server = _SERVERS.get(options["algorithm"])
    if server is None:
        return client
    settings = {} if options["server_lr"] is None else {"lr": options["server_lr"]}
    return FedOpt(client=client, server=server(**settings))


def _tuning(options: dict[str, Any]) -> Tuning:
    if options["tune"] == "lora":
        return LoRA(rank=options["rank"])
    return Head() if options["tune"] == "head" else Full()


def _read(options: dict[str, Any]) -> Table:
    columns = options["columns"].split(",") if options["columns"] else None
    frame = read_table(options["data"], columns)
    texts, labels, classes = text_and_labels(frame, options["text"], options["label"])
    held_out: tuple[list[str], npt.NDArray[np.int64]] = ([], np.empty(0, dtype=np.int64))
    if options["test_data"]:
        other = read_table(options["test_data"], columns)
        held_out = text_and_labels(other, options["text"], options["label"], classes)[:2]
        train = np.arange(len(texts))
        test = len(texts) + np.arange(len(held_out[0]))
    else:
        order = np.random.default_rng(derive(options["seed"] or 0, "test")).permutation(len(texts))
        cut = round(len(texts) * options["test_fraction"])
        test, train = np.sort(order[:cut]), np.sort(order[cut:])
    targets = torch.from_numpy(np.concatenate([labels, held_out[1]]))
    examples = encode([*texts, *held_out[0]], targets, tokenizer(options["model"]), options["max_length"])
    return Table(examples=examples, classes=classes, rows=_split(options, frame, labels, train), test=test)


def _split(
    options: dict[str, Any], frame: Any, labels: npt.NDArray[np.int64], train: npt.NDArray[np.int64]
) -> dict[str, npt.NDArray[np.int64]]:
    """Rows of each site, among the rows `train`."""
    if (options["split_by"] is None) == (options["sites"] is None):
        raise BadInput("say how the rows are split: --split-by COLUMN for natural sites, or --sites N to simulate them")
    if options["split_by"] is not None:
        if options["alpha"] is not None:
            raise BadInput("--alpha is for simulated sites (--sites); with --split-by the column decides")
        if options["split_by"] not in frame.columns:
            raise BadInput(f"there is no column {options['split_by']!r}; the columns are {', '.join(frame.columns)}")
        groups = by_column(frame[options["split_by"]].to_numpy()[train])
        return {name: train[rows] for name, rows in groups.items()}
    split = IID() if options["alpha"] is None else Dirichlet(alpha=options["alpha"])
    parts = split(labels[train], options["sites"], options["seed"] or 0)
    width = len(str(options["sites"] - 1))
    return {f"site-{i:0{width}d}": train[rows] for i, rows in enumerate(parts)}
