"""The file of results, and what is made of it: tables, pictures and the section of docs/benchmarks.md."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.simulation import plot
from benchmarks.simulation.figures import HEADER, figures, markdown, plain, rows, seconds, versions
from benchmarks.simulation.processes import ROOT

PAGE = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- simulation -->", "<!-- /simulation -->"
RATIOS, GROWTH = "simulation.png", "simulation-growth.png"
_GROWTH = {"tiny-many": "sites a round (tiny-many)", "stack": "parameters (stack, 2 sites)"}

Block = Mapping[str, Any]


def read(file: Path) -> dict[str, Block]:
    """What the file holds, by workload; nothing if there is no such file."""
    if not file.exists():
        return {}
    found: dict[str, Block] = json.loads(file.read_text())
    return found


def add(file: Path, block: Block) -> None:
    """Write a workload into the file, in the place of an earlier measurement of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**read(file), block["workload"]: block}, indent=1) + "\n")


def table(block: Block) -> str:
    """The results of a workload as text."""
    lines = [f"{block['workload']}: {_where(block)}", plain(HEADER, rows(block))]
    return "\n".join([*lines, *_absent(block)])


def pictures(results: Mapping[str, Block], folder: Path) -> list[str]:
    """Write the pictures that there are results for; their names."""
    written = []
    main, growing = _main(results), _growing(results)
    if main:
        plot.ratios(main, folder / RATIOS)
        written.append(RATIOS)
    if growing:
        plot.growth([(_GROWTH[kind], blocks) for kind, blocks in growing.items()], folder / GROWTH)
        written.append(GROWTH)
    return written


def write_docs(results: Mapping[str, Block], page: Path = PAGE) -> None:
    """Rewrite what stands between the markers of the page. Raises ValueError if they are not there once each."""
    text = page.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{page} needs one line {BEGIN} and, after it, one line {END}")
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    drawn = pictures(results, page.parent / "images")
    page.write_text(f"{before}{BEGIN}\n\n{section(results, drawn)}\n\n{END}{after}")


def section(results: Mapping[str, Block], drawn: Sequence[str]) -> str:
    """The part of the page between the markers, in Markdown."""
    parts = []
    for block in _main(results):
        parts += [f"### {block['workload']}", _where(block), markdown(HEADER, rows(block))]
        parts += ["\n".join(f"- {line}" for line in _absent(block))] if block["missing"] else []
    if RATIOS in drawn:
        parts.append(f"![Time of a round in units of the bare loop](images/{RATIOS})")
    for kind, blocks in _growing(results).items():
        names = list(dict.fromkeys(name for block in blocks for name in block["contestants"]))
        lines = []
        for block in blocks:
            times = {own.name: seconds(own.round_s) for own in figures(block)}
            lines.append([f"{_size(block):,}", *(times.get(name, "–") for name in names)])
        parts += [f"### Growth with {_GROWTH[kind]}", _where(*blocks), markdown([_GROWTH[kind], *names], lines)]
    if GROWTH in drawn:
        parts.append(f"![Time of a round by sites and by parameters](images/{GROWTH})")
    if results:
        parts.append(f"Versions: {versions(results.values())}.")
    return "\n\n".join(parts) or "There are no figures yet."


def _where(*blocks: Block) -> str:
    block = blocks[0]
    machine, settings = block["machine"], block["settings"]
    repeats = " to ".join(map(str, sorted({block["settings"]["repeats"] for block in blocks})))
    gpu = next((result["gpu"] for result in block["contestants"].values() if result.get("gpu")), None)
    device = f"on {gpu}" if gpu else "no accelerator used"
    return (
        f"{settings['cores']} of {machine['cores']} cores ({machine['cpu']}), {machine['memory_gb']} GB, {device}; "
        f"medians of {repeats} repeats in turns, {block['date']}."
    )


def _absent(block: Block) -> list[str]:
    return [f"{name}: {reason}" for name, reason in block["missing"].items()]


def _main(results: Mapping[str, Block]) -> list[Block]:
    return [block for name, block in results.items() if "@" not in name]


def _growing(results: Mapping[str, Block]) -> dict[str, list[Block]]:
    """By kind of workload, in order of size."""
    found = {kind: [block for name, block in results.items() if name.startswith(f"{kind}@")] for kind in _GROWTH}
    return {kind: sorted(blocks, key=_size) for kind, blocks in found.items() if blocks}


def _size(block: Block) -> int:
    return int(block["workload"].partition("@")[2])
