"""The tables and the picture."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.privacy.jobs import CLOSED_FORM, EPSILONS, METHODS, Choice, Job, chosen
from benchmarks.privacy.workload import Setting
from fedelta.observe.intervals import interval

BEGIN, END = "<!-- privacy -->", "<!-- /privacy -->"
COLUMNS = sorted(EPSILONS, reverse=True)
_COLOURS = {CLOSED_FORM: "#767676", "FedIT": "#0072b2", "FFA-LoRA": "#009e73", "Fed-SB": "#d55e00"}
Found = Mapping[str, Mapping[str, Any]]


def show(setting: Setting, results: Found, seeds: int) -> str:
    """The table of a setting, in Markdown: of each cell the mean, its 95% interval, and over how many seeds it is."""
    trains = bool(setting.rounds)
    head = ["method", *(f"ε = {_epsilon(epsilon)}" for epsilon in COLUMNS), *(["learning rate"] if trains else [])]
    lines = [f"**{setting.text}**", "", "| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for method in (CLOSED_FORM, *METHODS) if trains else (CLOSED_FORM,):
        choice = _choice(setting, method, results)
        cells = [_cell(_runs(setting, method, epsilon, choice, results, seeds)) for epsilon in COLUMNS]
        rate = [f"{choice.lr:g}" if choice else "" if method == CLOSED_FORM else "missing"] if trains else []
        lines.append("| " + " | ".join([method, *cells, *rate]) + " |")
    return "\n".join([*lines, *_notes(setting, results, seeds)])


def write_docs(settings: Sequence[Setting], results: Found, seeds: int, root: Path) -> None:
    """Rewrite what stands between the markers of docs/privacy.md, and its picture."""
    page = root / "docs" / "privacy.md"
    before, begin, rest = page.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"{page} needs a line {BEGIN} and, after it, a line {END}")
    tables = [show(setting, results, seeds) for setting in settings]
    picture = "![Accuracy by epsilon, one line for each method with its interval](images/privacy.png)"
    page.write_text(f"{before}{BEGIN}\n\n" + "\n\n".join([*tables, picture]) + f"\n\n{END}{after}")
    _plot([setting for setting in settings if setting.rounds], results, seeds, root / "docs" / "images" / "privacy.png")


def _choice(setting: Setting, method: str, results: Found) -> Choice | None:
    """None where nothing is chosen, and where it is not known yet."""
    found = None if method == CLOSED_FORM else chosen(setting, method, results)
    return found if isinstance(found, Choice) else None


def _runs(
    setting: Setting, method: str, epsilon: float, choice: Choice | None, results: Found, seeds: int
) -> list[Mapping[str, Any]]:
    if choice is None and method != CLOSED_FORM:
        return []
    jobs = [Job(setting=setting, method=method, epsilon=epsilon, seed=seed, choice=choice) for seed in range(seeds)]
    return [results[job.key] for job in jobs if job.key in results]


def _cell(runs: Sequence[Mapping[str, Any]]) -> str:
    if not runs:
        return "missing"
    found = interval([run["accuracy"] for run in runs])
    half = "" if found.half is None else f" ± {100 * found.half:.1f}"
    return f"{100 * found.mean:.1f}%{half} ({found.count})"


def _notes(setting: Setting, results: Found, seeds: int) -> list[str]:
    """What was chosen, and the noise that followed."""
    lines = []
    choice = _choice(setting, METHODS[0], results) if setting.rounds else None
    if choice is not None:
        lines.append(f"Clip {choice.clip:g}; round zero may spend {choice.share:g} of epsilon.")
    finite = [epsilon for epsilon in COLUMNS if math.isfinite(epsilon)]
    for method in (METHODS[0], CLOSED_FORM) if setting.rounds else (CLOSED_FORM,):
        own = _choice(setting, method, results)
        runs = [_runs(setting, method, epsilon, own, results, seeds)[:1] for epsilon in finite]
        for part, what in (("round", "a step" if setting.unit == "example" else "a round"), ("start", "round zero")):
            known = [
                f"{run[0]['noise'][part]:.3g} (ε = {epsilon:g})"
                for epsilon, run in zip(finite, runs, strict=True)
                if run and part in run[0]["noise"]
            ]
            alone = " alone" if method == CLOSED_FORM else ""
            lines += [f"Noise multiplier of {what}{alone}: {', '.join(known)}."] if known else []
    return ["", *lines] if lines else []


def _epsilon(value: float) -> str:
    return f"{value:g}" if math.isfinite(value) else "∞"


def _plot(settings: Sequence[Setting], results: Found, seeds: int, file: Path) -> None:
    """A panel for each setting: accuracy over epsilon, a line for each method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(settings), 3.8), layout="constrained", dpi=110)
    panels = figure.subplots(1, len(settings), squeeze=False)[0]
    columns = COLUMNS[::-1]
    for axes, setting in zip(panels, settings, strict=True):
        for place, method in enumerate((CLOSED_FORM, *METHODS)):
            choice = _choice(setting, method, results)
            runs = [_runs(setting, method, epsilon, choice, results, seeds) for epsilon in columns]
            found = {x: interval([run["accuracy"] for run in cell]) for x, cell in enumerate(runs) if cell}
            if found:
                axes.errorbar(
                    [x + 0.05 * (place - 1.5) for x in found],
                    [100 * one.mean for one in found.values()],
                    yerr=[100 * (one.half or 0.0) for one in found.values()],
                    fmt="o-",
                    color=_COLOURS[method],
                    capsize=3,
                    markersize=4,
                    label=method,
                )
        axes.set_xticks(range(len(columns)), [_epsilon(epsilon) for epsilon in columns])
        axes.set_title(setting.text.replace(": ", ":\n"), fontsize=9)
        axes.set_xlabel("epsilon")
        axes.grid(visible=True, axis="y", color="#d9dee3", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    panels[0].set_ylabel("accuracy in percent, with 95% intervals")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)
