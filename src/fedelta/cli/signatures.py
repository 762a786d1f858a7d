"""`fedelta signatures`: whether what the other parties of a run have signed holds."""

from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape

from fedelta.cli.tables import new_table, show_table
from fedelta.core.errors import BadInput
from fedelta.fleet.receipts import FILE, read
from fedelta.observe.text import plural


@click.command(short_help="Check what the other parties of a run have signed.")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
def command(folder: Path) -> None:
    """Check the signatures kept in FOLDER: that of a run of `fedelta serve`, or of --keep of `fedelta join`."""
    found = [path.parent for path in sorted(folder.rglob(FILE))]
    if not found:
        raise BadInput(f"there are no signatures in {folder}; they are kept by `serve` and `join`, but not --insecure")
    counts: Counter[tuple[str, str]] = Counter()
    rounds: dict[tuple[str, str], list[int]] = {}
    for one in found:
        for receipt in read(one):
            key = receipt.signer, receipt.what
            counts[key] += 1
            first, last = rounds.get(key, [receipt.round] * 2)
            rounds[key] = [min(first, receipt.round), max(last, receipt.round)]
    console = Console(highlight=False)
    console.print(f"{plural(counts.total(), 'signature')}, and all of them hold.", markup=False)
    table = new_table("signed by", "what", "number", "rounds", texts=2)
    for (signer, what), number in sorted(counts.items()):
        first, last = rounds[signer, what]
        table.add_row(escape(signer), what, f"{number:,}", f"{first} to {last}")
    console.print()
    show_table(console, table)
