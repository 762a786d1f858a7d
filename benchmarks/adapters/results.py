"""The table and the picture."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adapters.methods import METHODS, Method
from benchmarks.adapters.workloads import Workload
from fedelta.observe.intervals import Interval, interval
from fedelta.observe.text import bytes_text, seconds_text

BEGIN, END = "<!-- adapters -->", "<!-- /adapters -->"
Results = Mapping[str, Mapping[str, Any]]


def show(
    workload: Workload, methods: Sequence[Method], rates: Mapping[Method, float], results: Results, seeds: int
) -> str:
    """The table of a workload, in Markdown."""
    head = ["method", workload.metric, "sent", "received", "seconds", "error", "learning rate"]
    lines = [f"**{workload.text}**", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for method in methods:
        own = _of(workload, method, results, seeds)
        if own:
            lines.append("| " + " | ".join(_row(workload, method, rates[method], own)) + " |")
    return "\n".join([*lines, *_start(workload, methods, results, seeds)])


def write_docs(workloads: Iterable[Workload], results: Results, seeds: int, root: Path) -> None:
    """Rewrite what stands between the markers of docs/adapters.md, and its picture, of what there are results for."""
    page, shown = root / "docs" / "adapters.md", [one for one in workloads if _known(one, results)]
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} needs a line {BEGIN} and, after it, a line {END}")
    tables = [show(one, _known(one, results), _rates(one, results), results, seeds) for one in shown]
    picture = "![Quality of every method with its interval, and what a site sends and receives](images/adapters.png)"
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join([*tables, picture]) + f"\n\n{END}{after}")
    _plot(shown, results, seeds, root / "docs" / "images" / "adapters.png")


def _of(workload: Workload, method: Method, results: Results, seeds: int) -> list[Mapping[str, Any]]:
    """The results on the test rows, those of tuning left out."""
    wanted = {str(seed) for seed in range(seeds)}
    start = f"{workload.name} | {method.name} | "
    return [found for key, found in results.items() if key.startswith(start) and key.rpartition("seed ")[2] in wanted]


def _known(workload: Workload, results: Results) -> list[Method]:
    return [method for method in METHODS if _of(workload, method, results, 1)]


def _rates(workload: Workload, results: Results) -> dict[Method, float]:
    rates = {}
    for method in METHODS:
        start = f"{workload.name} | {method.name} | lr "
        for key in results:
            if key.startswith(start) and key.endswith("| seed 0"):
                rates[method] = float(key.removeprefix(start).partition(" ")[0])
    return rates


def _row(workload: Workload, method: Method, lr: float, own: Sequence[Mapping[str, Any]]) -> list[str]:
    errors = [found["error"] for found in own if found["error"] is not None]
    error = f"{sum(errors) / len(errors):.1e}" if errors else "not observable"
    up, down, seconds = (sum(found[name] for found in own) / len(own) for name in ("up", "down", "seconds"))
    score = interval([found["score"] for found in own])
    return [
        method.name,
        _score(workload, score),
        bytes_text(up),
        bytes_text(down),
        seconds_text(seconds),
        error if not errors or max(errors) > 1e-12 else "0",
        f"{lr:g}",
    ]


def _score(workload: Workload, score: Interval) -> str:
    scale, digits, unit = (100, 1, "%") if workload.metric == "accuracy" else (1, 2, "")
    half = "" if score.half is None else f" ± {scale * score.half:.{digits}f}"
    return f"{scale * score.mean:.{digits}f}{unit}{half}"


def _start(workload: Workload, methods: Collection[Method], results: Results, seeds: int) -> list[str]:
    starts = [found["start"] for method in methods for found in _of(workload, method, results, seeds) if found["start"]]
    return ["", f"Round zero alone: {_score(workload, interval(sorted(set(starts))))}."] if starts else []


def _plot(workloads: Sequence[Workload], results: Results, seeds: int, file: Path) -> None:
    """A row for each workload: the quality of every method with its interval, and the bytes of a site and round."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    figure = Figure(figsize=(11, 3.8 * len(workloads)), layout="constrained", dpi=110)
    for row, part in enumerate(figure.subfigures(len(workloads), 1, squeeze=False)[:, 0]):
        workload = workloads[row]
        part.suptitle(workload.text, fontsize=9.5)
        quality, traffic = part.subplots(1, 2, sharey=True)
        methods = _known(workload, results)
        for place, method in enumerate(methods):
            own = _of(workload, method, results, seeds)
            score = interval([found["score"] for found in own])
            quality.errorbar(score.mean, place, xerr=score.half or 0.0, fmt="o", color="#0072b2", capsize=3)
            for offset, name, colour in ((-0.2, "up", "#009e73"), (0.2, "down", "#d55e00")):
                mean = sum(found[name] for found in own) / len(own)
                traffic.barh(
                    place + offset, mean, height=0.36, color=colour, label={"up": "sent", "down": "received"}[name]
                )
        quality.set_yticks(range(len(methods)), [method.name for method in methods])
        quality.invert_yaxis()
        quality.set_xlabel(
            f"{workload.metric}, with 95% intervals ({'more' if workload.sign > 0 else 'less'} is better)"
        )
        traffic.set_xlabel("by a site in a round")
        traffic.xaxis.set_major_locator(MaxNLocator(5))
        traffic.xaxis.set_major_formatter(FuncFormatter(lambda value, _: bytes_text(value)))
        handles, labels = traffic.get_legend_handles_labels()
        traffic.legend(handles[:2], labels[:2], fontsize=8, loc="lower right")
        for axes in (quality, traffic):
            axes.grid(visible=True, axis="x", color="#d9dee3", linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
