"""From what was measured to figures: medians, ratios, tables."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.simulation.measure import BASE


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one contestant in one workload; times in seconds, medians over the repeats."""

    name: str
    round_s: float  # a round, from the second on
    ratio: float  # to the bare loop's in the same repeat
    least: float
    most: float
    first_s: float  # from the start of a run in a warm process to the end of its first round
    first_run_s: float  # the same in the first run of the process
    peak_mb: float
    agreement: Mapping[str, Any] | None


def round_seconds(ends: Sequence[float]) -> float:
    """Mean time of the rounds from the second on."""
    return (ends[-1] - ends[0]) / (len(ends) - 1)


def figures(block: Mapping[str, Any]) -> list[Figures]:
    found = []
    base = [round_seconds(repeat["ends"]) for repeat in block["contestants"][BASE]["repeats"]]
    for name, result in block["contestants"].items():
        rounds = [round_seconds(repeat["ends"]) for repeat in result["repeats"]]
        ratios = [own / bare for own, bare in zip(rounds, base, strict=True)]
        found.append(
            Figures(
                name=name,
                round_s=statistics.median(rounds),
                ratio=statistics.median(ratios),
                least=min(ratios),
                most=max(ratios),
                first_s=statistics.median(repeat["ends"][0] for repeat in result["repeats"]),
                first_run_s=result["first_run_s"],
                peak_mb=result["peak_mb"],
                agreement=result.get("agreement"),
            )
        )
    return found


HEADER = (
    "contestant",
    "a round",
    "in units of bare",
    "least to most",
    "first round ends after",
    "in a new process",
    "memory",
    "agrees",
)


def rows(block: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The table of a workload, without its header."""
    return [
        (
            own.name,
            seconds(own.round_s),
            f"{own.ratio:.3g}",
            f"{own.least:.3g} to {own.most:.3g}",
            seconds(own.first_s),
            seconds(own.first_run_s),
            f"{own.peak_mb:,.0f} MB",
            _agrees(own.agreement),
        )
        for own in figures(block)
    ]


def seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def _agrees(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "not checked"
    return f"{'yes' if found['agrees'] else 'NO'} ({found['relative']:.0e})"


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    table = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in table)


def plain(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (header, *lines)
    )


def versions(blocks: Iterable[Mapping[str, Any]]) -> str:
    """The versions of everything that took part, sorted."""
    found = {
        f"{package} {version}"
        for block in blocks
        for result in block["contestants"].values()
        for package, version in result["versions"].items()
    }
    return ", ".join(sorted(found))
