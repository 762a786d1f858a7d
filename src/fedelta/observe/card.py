"""The model card of a run: what a model came from, how it was learned, and what it cost.

In the form of the Hugging Face hub: a README.md that begins with metadata.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedelta.core.program import Report
from fedelta.observe.text import bytes_text, metric_text, plural


@dataclass(frozen=True, kw_only=True)
class Card:
    title: str
    base: str  # name of the pre-trained model
    base_digest: str | None  # of its frozen weights; None if nothing was frozen
    tuning: str
    algorithm: str
    sites: int  # 0: not known
    privacy: str  # what bounds what the model says about the rows
    updates: str = "in the clear"  # how they reached the coordinator
    library: str = "transformers"  # or "peft": what loads the folder
    ranks: Mapping[str, int] = field(default_factory=dict)  # adapted layer -> rank of its factors
    tiers: Mapping[str, int] = field(default_factory=dict)  # tier of sites -> their rank, where they differ
    classes: Sequence[str] = ()

    def text(self, run: Sequence[Report], version: str) -> str:
        """The card as Markdown."""
        rows = [*_learned(run, self.sites), ("updates reached the coordinator", self.updates)]
        return self._page([*rows, ("privacy spent", self.privacy), *_measured(run)], version)

    def at_site(self, site: str, rounds: int, version: str) -> str:
        """As `text`, of the model that a site keeps after so many rounds, whose reports it has not seen."""
        rows = [("kept by the site", site), *([("sites", f"{self.sites:,}")] if self.sites else [])]
        rows += [("rounds", plural(rounds, "round")), ("updates reached the coordinator", self.updates)]
        return self._page([*rows, ("privacy", self.privacy)], version)

    def _page(self, learned: Sequence[tuple[str, str]], version: str) -> str:
        rows = [*self._came_from(), *learned]
        table = ["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows)]
        head = ["---", f"library_name: {self.library}", f"base_model: {_quoted(self.base)}"]
        head += ["tags:", "- federated-learning", "- fedelta", "---"]
        return "\n".join([*head, "", f"# {self.title}", "", *table, "", *self._how(version), ""])

    def _came_from(self) -> list[tuple[str, str]]:
        rows = [("base model", self.base)]
        rows.append(("digest of its frozen weights", f"SHA-256 {self.base_digest}" if self.base_digest else "none"))
        rows += [("tuning", self.tuning), ("algorithm", self.algorithm)]
        if self.ranks:
            rows.append(("ranks", _ranks(self.ranks)))
        if self.tiers:
            rows.append(("ranks at the sites", ", ".join(f"{tier} {rank}" for tier, rank in self.tiers.items())))
        if self.classes:
            rows.append(("classes", ", ".join(self.classes)))
        return rows

    def _how(self, version: str) -> list[str]:
        loader = {
            "peft": "`PeftModel.from_pretrained(base, folder)` of peft, or `fedelta.load(folder)`",
            "fedelta": "`fedelta.load(folder)`",
        }.get(self.library, "`from_pretrained(folder)` of transformers, or `fedelta.load(folder)`")
        return [f"Loads with {loader}.", "", f"Learned with fedelta {version}."]


def _learned(run: Sequence[Report], sites: int) -> list[tuple[str, str]]:
    took_part = {site for report in run for site in report.cohort if site not in report.absent}
    rounds = sum(1 for report in run if report.round)
    return [
        ("sites", f"{sites:,}, of which {len(took_part):,} took part"),
        ("rounds", plural(rounds, "round") + (", after a head in closed form" if len(run) > rounds else "")),
        ("sent by all sites", bytes_text(sum(report.bytes_up for report in run))),
        ("received by all sites", bytes_text(sum(report.bytes_down for report in run))),
    ]


def _measured(run: Sequence[Report]) -> list[tuple[str, str]]:
    last = {name: value for report in run for name, value in report.metrics.items()}
    return [(name.replace("_", " "), metric_text(name, value)) for name, value in last.items()]


def _ranks(ranks: Mapping[str, int]) -> str:
    """ "8 in 24 layers"."""
    counts = {rank: sum(1 for own in ranks.values() if own == rank) for rank in sorted(set(ranks.values()))}
    return ", ".join(f"{rank} in {plural(count, 'layer')}" for rank, count in counts.items())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
