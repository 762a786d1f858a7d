"""`fedelta finetune`: federated fine-tuning of a Hugging Face model over a table or folders, with no Python written.

Here are the options and which of them go together; the work is in `finetune_job`, which loads PyTorch.
"""

import math
from pathlib import Path
from typing import Any

import click

from fedelta.cli import privacy, secure
from fedelta.cli.options import RunSettings, simulation_options
from fedelta.data.files import CLASS, FILE

_Refusals = list[tuple[bool, str]]  # what may be wrong with the options, and the sentence that says so

_ADAPTIVE = ("fedavgm", "fedadam", "fedyogi", "fedadagrad")  # the algorithms with a server optimiser
_RANKED = ("hetlora", "flexlora", "flora")  # those that allow sites of several ranks
_OF_LORA = ("ffa-lora", "rolora", "fedsa-lora", "fed-sb", *_RANKED, "fedex-lora", "lora-fair", "flora-na")
_OF_THE_BASE = (
    "fed-sb",
    "flora",
    "fedex-lora",
)  # those that move the weights beneath the factors, or ask their gradient
_POSITIVE = click.FloatRange(0, min_open=True)
_OF_TUNINGS = {  # an option -> the tunings that it is for
    "rank": ("lora",),
    "rslora": ("lora",),
    "width": ("adapter",),
    "virtual_tokens": ("prompt", "prefix"),
    "layers": ("last",),
}
_INPUTS = ("text", "tokens", "image", "audio")
_TEXTS, _WORDS, _LANGUAGE = "text classification", "token classification", "language models"
_IMAGES, _SOUNDS = "image classification", "audio classification"
_OF_TASKS = {  # an option -> the tasks that it is for
    "task": (_LANGUAGE,),
    "max_length": (_TEXTS, _WORDS, _LANGUAGE),
    "max_seconds": (_SOUNDS,),
    "alpha": (_TEXTS, _WORDS, _IMAGES, _SOUNDS),
    "start": (_TEXTS, _IMAGES, _SOUNDS),
    "features": (_TEXTS, _IMAGES, _SOUNDS),
}
_SOUND_FILES = (".wav", ".flac", ".mp3", ".ogg", ".opus", ".m4a", ".aac", ".aiff")  # only the first can be read
_OF_DATASETS = ("state.json", "dataset_dict.json")  # of these a folder that `datasets` saved has one


@click.command(
    epilog="With lora, ia3, prompt and prefix, OUT/model holds what was trained; peft puts it on the model that M "
    "names. With adapter, fedelta.load does. With all others OUT/model is a whole model."
)
@click.option("--model", required=True, metavar="M", help="Hub name or local folder of a pre-trained model.")
@click.option(
    "--data",
    required=True,
    metavar="D",
    help="Table: a csv, tsv, parquet or json lines file, a folder that `datasets` saved, or a hub name. Or a folder "
    "with a sub-folder of images, or of wav files, for each class; then no columns are named.",
)
@click.option("--columns", metavar="A,B,…", help="Names of the columns of a csv or tsv file that has no header line.")
@click.option("--text", multiple=True, metavar="COLUMN", help="The text; given twice, both are joined.")
@click.option(
    "--tokens", metavar="COLUMN", help="The words of a text, as a list; --label then has a list of their tags."
)
@click.option("--image", metavar="COLUMN", help="The image: a path from where the table is, or the bytes of a file.")
@click.option("--audio", metavar="COLUMN", help="The recording, a wav file: a path or bytes, as with --image.")
@click.option("--label", metavar="COLUMN", help="The class; a language model, from --text alone, has none.")
@click.option(
    "--task",
    type=click.Choice(["causal", "masked"]),
    show_default="what the model was pre-trained for",
    help="Of a language model: predict the next token, or masked ones.",
)
@click.option("--split-by", metavar="COLUMN", help="Natural sites: the column that says to which site a row belongs.")
@click.option("--sites", type=click.IntRange(1), metavar="N", help="Simulated sites: how many.")
@click.option(
    "--alpha",
    type=_POSITIVE,
    metavar="A",
    show_default="no skew",
    help="Label skew of --sites: Dirichlet(A), over --label; of words over the rarest tag of a row.",
)
@click.option(
    "--test", metavar="D", help='Table, or folder, with the test rows; where it is the --data, its split "test".'
)
@click.option(
    "--test-fraction",
    type=click.FloatRange(0, 1, max_open=True),
    metavar="F",
    show_default="0.2",
    help="Share of --data that is held out as test rows, where there is no --test.",
)
@click.option(
    "--tune",
    type=click.Choice(["full", "head", "last", "norms", "bitfit", "lora", "ia3", "adapter", "prompt", "prefix"]),
    default="lora",
    show_default=True,
    help="What is trained and sent: all weights, or the head and besides it nothing, the last layers, normalisation "
    "layers, biases, LoRA factors, IA3 vectors, bottleneck adapters, a prompt, or a prefix of every layer.",
)
@click.option("--rank", type=click.IntRange(1), metavar="R", show_default="8", help="Of the LoRA factors.")
@click.option("--rslora", is_flag=True, help="Scale LoRA factors by 1 / sqrt(rank), not 1 / rank: for high ranks.")
@click.option("--width", type=click.IntRange(1), metavar="N", show_default="64", help="Of the adapters' middle.")
@click.option(
    "--virtual-tokens", type=click.IntRange(1), metavar="N", show_default="20", help="Of the prompt or prefix."
)
@click.option("--layers", type=click.IntRange(1), metavar="K", show_default="1", help="Of the last ones, how many.")
@click.option(
    "--bits",
    type=click.Choice(["8", "4"]),
    callback=lambda _context, _option, bits: None if bits is None else int(bits),
    show_default="32",
    help="Of the weights of linear layers that stay as they were; needs fedelta[quantised].",
)
@click.option(
    "--start",
    type=click.Choice(["ridge", "lda", "drawn"]),
    show_default="ridge for a head that is new",
    help="Of the head: solved by ridge regression or LDA from sums over the sites' features (round zero), or drawn at "
    "random where it is not pre-trained.",
)
@click.option(
    "--features",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    show_default="OUT/features",
    help="Where --tune head keeps the frozen features of the rows, which are computed once.",
)
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
    show_default="full 5e-5, last 2e-4, lora 5e-4, bitfit 2e-3, ia3 and prefix 1e-2, prompt 3e-2, all others 1e-3",
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
    help="Tokens kept of a text; a language model learns all of a text, in rows of as many.",
)
@click.option("--max-seconds", type=_POSITIVE, metavar="S", show_default="all", help="Kept of a recording.")
@click.option(
    "--algorithm",
    type=click.Choice(["fedavg", "fedprox", *_ADAPTIVE, *_OF_LORA]),
    metavar="NAME",
    default="fedavg",
    show_default=True,
    help=f"How the sites' updates become the next model: fedavg, fedprox, {', '.join(_ADAPTIVE)}; and of LoRA factors "
    f"{', '.join(_OF_LORA)}.",
)
@click.option(
    "--ranks",
    metavar="TIER=R,…",
    show_default="--rank, at all sites",
    help="LoRA ranks of sites whose names begin with a tier, up to --rank.",
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
@privacy.privacy_options
@secure.secure_options
@click.option("--bf16", is_flag=True, help="Forward passes in bfloat16, where the processor has it.")
@simulation_options(seed="0", seeds="Of initialisation, sampling, shuffling, dropout and splits.", out="runs/finetune")
def command(**options: Any) -> None:
    """Fine-tune a pre-trained model over a table, or folders, split among sites.

    The columns say what it learns: classes of texts, images or recordings, tags of words, or, from texts alone, a
    language. The result, in OUT/model, loads with fedelta.load, and with plain transformers and peft.

    \b
    fedelta finetune --model M --data train.csv --text text --label label \\
        --sites 8 --alpha 0.5
    fedelta finetune --model M --data speeches.jsonl --text speech --split-by role
    fedelta finetune --model M --data photos --sites 4
    """
    options |= _class_folders(options)
    _check_task(options)
    _check(options)
    from fedelta.cli.finetune_job import FineTuning

    settings = RunSettings.take(options, Path("runs/finetune"))
    bits = options["secure_bits"]
    asked = privacy.Asked(
        **{name: options.pop(name) for name in ("epsilon", "delta", "unit", "clip", "noise")}, bits=bits
    )
    masks = secure.Masks.take(options)
    given = {name: value for name, value in options.items() if value is not None}
    FineTuning(**given, privacy=asked, masks=masks).run(settings)


def _class_folders(options: dict[str, Any]) -> dict[str, Any]:
    """The columns of the table that is made of a folder of classes; nothing where columns are named, or for a table."""
    folder = Path(options["data"]).expanduser()
    if not folder.is_dir() or any((folder / name).exists() for name in _OF_DATASETS):
        return {}
    if options["image"] or options["audio"]:
        raise click.UsageError(
            f"{options['data']} is a folder of files and no table; leave out the names of columns, and its sub-folders "
            "are the classes."
        )
    if any(options[name] for name in (*_INPUTS, "label")):
        return {}
    if options["columns"] is not None:
        raise click.UsageError("--columns names the columns of a csv or tsv file, and --data is a folder.")
    sounds = any(path.suffix.lower() in _SOUND_FILES for path in folder.glob("*/**/*"))
    return {"audio" if sounds else "image": FILE, "label": CLASS, "folders": True}


def _check_task(options: dict[str, Any]) -> None:
    """Refuse columns that make no task, and options that have no effect in theirs."""
    task = _task(options)
    for name, tasks in _OF_TASKS.items():
        if options[name] is not None and task not in tasks:
            raise click.UsageError(
                f"--{name.replace('_', '-')} has no effect for {task}; it is for {', '.join(tasks)}."
            )


def _task(options: dict[str, Any]) -> str:
    """The task that the named columns make."""
    named = [name for name in _INPUTS if options[name]]
    if not named:
        raise click.UsageError(
            "Name the column to learn from: --text, --tokens, --image or --audio; without any, --data is a folder with "
            f"a sub-folder for each class, and {options['data']} is none."
        )
    if len(named) > 1:
        raise click.UsageError(f"--{named[0]} and --{named[1]} are for different tasks; leave one of them out.")
    if options["label"] is None:
        if named != ["text"]:
            raise click.UsageError(
                f"--{named[0]} needs --label COLUMN; only texts can be learned from without classes."
            )
        return _LANGUAGE
    return {"text": _TEXTS, "tokens": _WORDS, "image": _IMAGES, "audio": _SOUNDS}[named[0]]


def _check(options: dict[str, Any]) -> None:
    """Refuse options that contradict each other, and those that would have no effect: they are a misunderstanding."""
    given = {name for name, value in options.items() if value is not None and value is not False}
    for wrong, sentence in (
        *_of_the_rows(given),
        *_of_the_training(given, options["tune"], options["algorithm"]),
        *privacy.refusals(options),
        *secure.refusals(options),
        *(  # click takes "nan" for a number in any range
            (isinstance(value, float) and math.isnan(value), f"--{name.replace('_', '-')} is not a number.")
            for name, value in options.items()
        ),
    ):
        if wrong:
            raise click.UsageError(sentence)


def _of_the_rows(given: set[str]) -> _Refusals:
    return [
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
    ]


def _of_the_training(given: set[str], tune: str, algorithm: str) -> _Refusals:
    return [
        *(
            (
                name in given and tune not in tunings,
                f"--{name.replace('_', '-')} has no effect with --tune {tune}; "
                f"it is for --tune {' and '.join(tunings)}.",
            )
            for name, tunings in _OF_TUNINGS.items()
        ),
        (
            "features" in given and tune != "head",
            f"--features has no effect with --tune {tune}; it is for --tune head.",
        ),
        (
            "bits" in given and tune in ("full", "last"),
            f"--bits rounds weights that --tune {tune} trains; use --tune lora.",
        ),
        (
            "bits" in given and algorithm in _OF_THE_BASE,
            f"--bits rounds weights that --algorithm {algorithm} needs as they are; use another algorithm.",
        ),
        (
            algorithm in _OF_LORA and tune != "lora",
            f"--algorithm {algorithm} is for LoRA factors, and --tune {tune} has none; use --tune lora.",
        ),
        (
            "ranks" in given and algorithm not in _RANKED,
            f"--ranks has no effect with --algorithm {algorithm}; it is for {', '.join(_RANKED)}.",
        ),
        (
            "mu" in given and algorithm != "fedprox",
            f"--mu has no effect with --algorithm {algorithm}; it is for fedprox.",
        ),
        (
            "server_lr" in given and algorithm not in _ADAPTIVE,
            f"--server-lr has no effect with --algorithm {algorithm}; it is for {', '.join(_ADAPTIVE)}.",
        ),
    ]
