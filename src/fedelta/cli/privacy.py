"""The options of a privacy guarantee, the guarantee that they ask for, and its ledger in a run's folder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedelta.core.errors import BadInput, BadLedger

if TYPE_CHECKING:
    from fedelta.algorithms.mechanism import Privacy
    from fedelta.algorithms.private import Guard, Prospect
    from fedelta.core.release import Ledger

Command = Callable[..., Any]
LEDGER = "ledger.jsonl"
UNITS = ("example", "site", "distributed", "local")
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
        "together, by noise that the coordinator adds; distributed: the same, by noise that sites add in shares under "
        "--secure, so that the coordinator sees no sum without it; local: by noise that suffices for each site alone.",
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
    click.option(
        "--entropy",
        type=click.Choice(["system", "seed"]),
        show_default="system",
        help="Where noise comes from. system: from the operating system; seed: from --seed, so that the run can be "
        "repeated, and whoever knows the seed can take the noise away.",
    ),
)
SIMULATED = "in a simulation: noise follows from the seed, and whoever knows it can take it away"


def privacy_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refusals(options: dict[str, Any]) -> list[tuple[bool, str]]:
    """What may be wrong with the options, and the sentence that says so."""
    asked = options["epsilon"] is not None or options["noise"] is not None
    given = {name for name in ("delta", "unit", "clip", "ledger", "entropy") if options[name] is not None}
    return [
        (
            bool(given) and not asked,
            f"--{min(given, default='')} has no effect without --epsilon or --noise; give one of them.",
        ),
        (
            options["unit"] in ("local", "distributed") and options["clip"] is None,
            f"--unit {options['unit']} needs --clip: no site may say how large its update is.",
        ),
        (
            options["unit"] == "distributed" and not options["secure"],
            "--unit distributed needs --secure: what a site adds to its update hides it in a sum, and not by itself.",
        ),
        (
            options["unit"] == "distributed" and options["secure_bits"] == 64,
            "--unit distributed adds integers of 16 bits, or of 32 (--secure-bits 32), and not of 64; leave it out.",
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
    bits: int | None = None  # of integers in which noise is added in shares

    def guarantee(self, *, fixed: bool) -> "Privacy | None":
        """None if none was asked for; `fixed` says whether cohorts have a fixed size, which only RDP accounts for."""
        from fedelta.privacy.clipping import AdaptiveClip
        from fedelta.privacy.distributed import DistributedDP
        from fedelta.privacy.example_level import ExampleLevel
        from fedelta.privacy.local_dp import LocalDP
        from fedelta.privacy.site_level import SiteLevel

        if self.epsilon is None and self.noise is None:
            return None
        amounts: dict[str, Any] = {"epsilon": self.epsilon, "delta": self.delta or 1e-5, "noise": self.noise}
        if self.unit == "site":
            clip = AdaptiveClip() if self.clip is None else self.clip
            return SiteLevel(clip=clip, accountant="rdp" if fixed else "pld", **amounts)
        if self.unit == "distributed":
            assert self.clip is not None
            return DistributedDP(clip=self.clip, bits=32 if self.bits == 32 else 16, **amounts)
        if self.unit == "local":
            assert self.clip is not None
            return LocalDP(clip=self.clip, **amounts)
        return ExampleLevel(clip=self.clip or 1.0, **amounts)


def ledger_in(folder: Path, shared: Path | None) -> "Ledger":
    """The ledger of a run, signed with a key of its own: in its folder, or in a file that several runs share."""
    from fedelta.core.keys import new_key
    from fedelta.privacy.ledger import FileLedger

    path = folder / LEDGER if shared is None else shared
    key = key_of(path)
    if not key.exists():
        if path.exists() and path.stat().st_size:
            raise BadLedger(f"{path} has no key {key} beside it, with which its lines are signed; put it back")
        new_key(key)
    return FileLedger.open(path, key)


def key_of(ledger: Path) -> Path:
    """The file of the private key that a ledger is signed with. Raises BadInput for a ledger that would be it."""
    if ledger.suffix == ".key":
        raise BadInput(f"{ledger} is the name of a key; give the ledger another one, such as ledger.jsonl")
    return ledger.with_suffix(".key")


def described(guard: "Guard", multipliers: Sequence[float], prospect: "Prospect | None", rounds: int) -> str:
    """What a run protects, in a line or two.

    `multipliers` are the noise multipliers of its sites, `prospect` is that of the site which gets least out of the
    budget; None: the run has begun.
    """
    from fedelta.cli.guarantees import amount, protected

    privacy = guard.privacy
    low, high = (f"{choose(multipliers):.3g}" for choose in (min, max))
    noise = f"noise multiplier {low}" if low == high else f"noise multiplier {low} to {high} by site"
    whom = "whoever sees the models" if privacy.central else "the coordinator and whoever sees the models"
    line = f"Privacy: {protected(privacy)} is protected from {whom}; {amount(privacy)}, {noise}"
    if prospect is not None and prospect.rounds < rounds:
        line += f", with which it lasts for {prospect.rounds:,} of {rounds:,} rounds"
    elif prospect is not None and privacy.epsilon is None:
        line += f": epsilon will be {prospect.epsilon:.4g}"
    return f"{line}." if guard.entropy == "system" else f"{line}.\nThis is so {SIMULATED}."
