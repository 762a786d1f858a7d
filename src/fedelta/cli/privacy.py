"""The options of a privacy guarantee, the guarantee that they ask for, and its ledger in a run's folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fedelta.algorithms.federation import Federation
    from fedelta.algorithms.private import Privacy
    from fedelta.core.release import Ledger

Command = Callable[..., Any]
LEDGER = "ledger.jsonl"
KEY = "ledger.key"
UNITS = ("example", "site", "local")
_POSITIVE = click.FloatRange(0, min_open=True)
_OPTIONS = (
    click.option(
        "--epsilon",
        type=_POSITIVE,
        metavar="E",
        help="Differential privacy: noise is chosen so that the whole run spends no more than this.",
    ),
    click.option(
        "--delta",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        metavar="D",
        show_default="1e-5",
        help="The probability with which --epsilon may not hold; well below 1 / the number of what is protected.",
    ),
    click.option(
        "--unit",
        type=click.Choice(UNITS),
        show_default="example",
        help="What is protected. example: each row, by noise that its site adds in training; site: all rows of a site "
        "together, by noise that the coordinator adds; local: the same, by noise that the site adds.",
    ),
    click.option(
        "--clip",
        type=_POSITIVE,
        metavar="C",
        show_default="example 1; site: follows the median of the updates",
        help="Bound on the gradient of a row, or on the update of a site (L2).",
    ),
    click.option(
        "--noise",
        type=_POSITIVE,
        metavar="Z",
        show_default="solved from --epsilon",
        help="The noise multiplier itself.",
    ),
    click.option(
        "--sample-rate",
        type=click.FloatRange(0, 1, min_open=True),
        metavar="Q",
        help="Ask each site with this probability in a round, instead of --per-round; with --unit site it amplifies.",
    ),
)


def privacy_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refusals(options: dict[str, Any]) -> list[tuple[bool, str]]:
    """What may be wrong with the options, and the sentence that says so."""
    asked = options["epsilon"] is not None or options["noise"] is not None
    given = {name for name in ("delta", "unit", "clip") if options[name] is not None}
    return [
        (
            bool(given) and not asked,
            f"--{min(given, default='')} has no effect without --epsilon or --noise; give one of them.",
        ),
        (
            options["unit"] == "local" and options["clip"] is None,
            "--unit local needs --clip: no site may say how large its update is.",
        ),
        (
            options["sample_rate"] is not None and options["per_round"] is not None,
            "--sample-rate and --per-round are two ways to choose the sites of a round; leave one of them out.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The options, under their names."""

    epsilon: float | None = None
    delta: float | None = None
    unit: str | None = None
    clip: float | None = None
    noise: float | None = None

    def guarantee(self, *, fixed: bool) -> "Privacy | None":
        """None if none was asked for; `fixed` says whether cohorts have a fixed size, which only RDP accounts for."""
        from fedelta.privacy.clipping import AdaptiveClip
        from fedelta.privacy.example_level import ExampleLevel
        from fedelta.privacy.local_dp import LocalDP
        from fedelta.privacy.site_level import SiteLevel

        if self.epsilon is None and self.noise is None:
            return None
        amounts: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta or 1e-5, "noise": self.noise}
        if self.unit == "site":
            clip = AdaptiveClip() if self.clip is None else self.clip
            return SiteLevel(clip=clip, accountant="rdp" if fixed else "pld", **amounts)
        if self.unit == "local":
            assert self.clip is not None
            return LocalDP(clip=self.clip, **amounts)
        return ExampleLevel(clip=self.clip or 1.0, **amounts)


def ledger_in(folder: Path, shared: Path | None) -> "Ledger":
    """The ledger of a run, signed with a key of its own: in its folder, or in a file that several runs share."""
    from fedelta.privacy.keys import new_key
    from fedelta.privacy.ledger import FileLedger

    path = folder / LEDGER if shared is None else shared
    key = path.with_name(KEY) if shared is None else path.with_suffix(".key")
    if not key.exists():
        new_key(key)
    return FileLedger.open(path, key)


def described(federation: "Federation[Any]") -> str:
    """One line that says what a run protects."""
    privacy = federation.privacy
    assert privacy is not None
    amount = f"epsilon {privacy.epsilon:g}" if privacy.epsilon is not None else "no limit"
    noise = "solved from it" if privacy.noise is None else f"multiplier {privacy.noise:g}"
    what = "each row of a site" if privacy.unit == "example" else "each site as a whole"
    whom = "whoever sees the models" if privacy.central else "the coordinator and whoever sees the models"
    return f"Privacy: {what} is protected from {whom}; {amount} at delta {privacy.delta:g}, noise {noise}."
