"""`fedelta plan`: what a run will send, need and show, before anything is sent."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedelta.algorithms.forecast import Forecast, Link, RoundForecast, Tier
from fedelta.algorithms.forecast_encrypted import LARGE, Encrypted
from fedelta.algorithms.forecasting import forecast
from fedelta.algorithms.mechanism import scheme
from fedelta.cli import guarantees
from fedelta.cli.experiment import opened
from fedelta.cli.secure import Masks, secure_options
from fedelta.cli.tables import new_table, show_table
from fedelta.core.program import Sight
from fedelta.observe.text import bytes_text, plural, seconds_text
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption

_GROUPS_SHOWN = 16  # lines of the table; more are summed up
_FAILURES_SHOWN = 3
_BANDWIDTH = click.FloatRange(0, min_open=True)


@click.command(short_help="Tell what a run will send, need and show, before anything is sent.")
@click.argument("experiment", type=click.Path(path_type=Path))
@click.option("--rounds", type=click.IntRange(1), help="Instead of the experiment's own number.")
@click.option("--seed", type=int, metavar="N", show_default="the experiment's own", help="Of sampling, above all.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Replace a constant of the experiment.")
@click.option(
    "--bandwidth",
    type=_BANDWIDTH,
    metavar="MBIT",
    default=20.0,
    show_default=True,
    help="Of a site's line, in megabits a second.",
)
@click.option(
    "--upload", type=_BANDWIDTH, metavar="MBIT", show_default="as --bandwidth", help="Towards the coordinator."
)
@click.option(
    "--latency",
    type=click.FloatRange(0),
    metavar="MS",
    default=20.0,
    show_default=True,
    help="One way, in milliseconds.",
)
@secure_options
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
def command(
    experiment: Path,
    rounds: int | None,
    seed: int | None,
    settings: tuple[str, ...],
    bandwidth: float,
    upload: float | None,
    latency: float,
    as_json: bool,
    **masked: Any,
) -> None:
    """Tell what a run of EXPERIMENT will send, need and show. Nothing is sent, and nothing is written.

    Bytes are those that the run will report. Time and memory are measured here, on a few real steps of training.
    """
    link = Link(down_mbit=bandwidth, up_mbit=upload or bandwidth, latency_ms=latency)
    masks = Masks.take(masked)
    federation, sites = opened(experiment, settings, rounds=rounds, seed=seed)
    federation = masks.on(federation, sites)
    with Console(stderr=True).status("loading the sites' data and trying out a few steps"):
        found = forecast(federation, sites, sites.names)
    if as_json:
        click.echo(json.dumps(numbers(found, link), indent=1, allow_nan=False))
    else:
        show(found, link, experiment.stem, Console(highlight=False))


def show(found: Forecast, link: Link, title: str, console: Console) -> None:
    """Print all of it."""
    federation = found.federation
    console.print(
        f"{title}: {plural(len(found.sites), 'site')}, {plural(federation.rounds, 'round')}, seed {federation.seed}",
        markup=False,
    )
    show_table(console, _groups(found), "What travels")
    show_table(console, _tiers(found, link), "At a site")
    show_table(console, _network(found), "Over the network, all sites together")
    show_table(console, _time(found, link), "Time")
    show_table(console, _sight(found), "Who sees what")
    show_table(console, _privacy(found), "Privacy")
    show_table(console, _checks(found), "Checked")
    for line in _remarks(found):
        console.print(line, markup=False, style="dim", soft_wrap=not console.is_terminal)


def numbers(found: Forecast, link: Link) -> dict[str, object]:
    """The forecast as plain values: sizes in bytes, times in seconds."""
    federation = found.federation
    return {
        "seed": federation.seed,
        "trained": found.trained,
        "frozen": found.frozen,
        "frozen_bytes": found.frozen_bytes,
        "groups": [asdict(group) for group in found.groups],
        "bytes_down": found.bytes_down,
        "bytes_up": found.bytes_up,
        "rounds": [
            {**asdict(each), "seconds": seconds, "seconds_here": here}
            for each, seconds, here in zip(found.rounds, found.seconds(link), found.seconds_here(), strict=True)
        ],
        "link": asdict(link),
        "tiers": [
            {"called": tier.called, "site": tier.site.name, "memory_bytes": tier.memory_bytes} for tier in found.tiers
        ],
        "sites": [asdict(site) for site in found.sites],
        "leaves_a_site": [asdict(piece) for piece in found.tiers[0].rehearsal.update],
        "coordinator_sees": federation.collect.shows.value,
        "trust": dict(guarantees.trust(federation, found.bearing)),
        "secure_sum": _secure_sum(found),
        "encrypted": None if (encrypted := _encrypted(found)) is None else asdict(encrypted),
        "test_rows": 0 if federation.test is None else len(federation.test),
        "privacy": _guarantee(found),
        "checks": [asdict(check) for check in found.checks],
    }


def _groups(found: Forecast) -> Table:
    table = new_table("", "tensors", "numbers", "bytes")
    ordered = sorted(found.groups, key=lambda group: -group.elements)
    shown = found.groups if len(ordered) <= _GROUPS_SHOWN else ordered[:_GROUPS_SHOWN]
    for group in shown:
        name = escape(group.name or "(the model itself)") + (", statistics" if group.buffers else "")
        table.add_row(name, f"{group.tensors:,}", f"{group.elements:,}", bytes_text(4 * group.elements))
    rest = ordered[_GROUPS_SHOWN:] if len(shown) < len(ordered) else []
    if rest:
        elements = sum(group.elements for group in rest)
        tensors = sum(group.tensors for group in rest)
        table.add_row(f"… {len(rest)} more groups", f"{tensors:,}", f"{elements:,}", bytes_text(4 * elements))
    table.add_section()
    for name, buffers in (("trained", False), ("averaged, not trained", True)):
        own = [group for group in found.groups if group.buffers == buffers]
        elements = sum(group.elements for group in own)
        if own:
            table.add_row(name, f"{sum(g.tensors for g in own):,}", f"{elements:,}", bytes_text(4 * elements))
    table.add_row("frozen, at every party", "", f"{found.frozen:,}", bytes_text(found.frozen_bytes))
    return table


def _tiers(found: Forecast, link: Link) -> Table:
    table = new_table("", *(f"{tier.called} ({tier.site.name})" for tier in found.tiers))

    def add(name: str, *values: str) -> None:
        table.add_row(name, *map(escape, values))

    add("rows", *(f"{tier.site.rows:,}" for tier in found.tiers))
    if any(site.held_back for site in found.sites):
        add("rows held back", *(f"{tier.site.held_back:,}" for tier in found.tiers))
    add("steps of training a round", *(f"{tier.site.steps:,}" for tier in found.tiers))
    for op in found.tiers[0].site.bytes_down:
        called = {"train": "a round's training", "evaluate": "an evaluation", "statistics": "round zero"}.get(op, op)
        add(f"{called}: received", *(bytes_text(tier.site.bytes_down[op]) for tier in found.tiers))
        add("  sent", *(bytes_text(tier.site.bytes_up[op]) for tier in found.tiers))
        around = found.around(op)
        if around.each_down:
            add("  keys and shares: received", *(bytes_text(around.each_down) for _ in found.tiers))
            add("  keys and shares: sent", *(bytes_text(around.each_up) for _ in found.tiers))
        add("  work", *(seconds_text(tier.site.seconds[op]) for tier in found.tiers))
        lines = [found.line_s(op, tier.site, link) for tier in found.tiers]
        add(f"  on the line ({_line(link)})", *map(seconds_text, lines))
    add("data", *(bytes_text(tier.site.data_bytes) for tier in found.tiers))
    add("peak memory, with the data", *map(_memory, found.tiers))
    return table


def _memory(tier: Tier) -> str:
    return "not known here" if tier.memory_bytes is None else bytes_text(tier.memory_bytes)


def _network(found: Forecast) -> Table:
    table = new_table("", "sites asked", "received", "sent")
    kinds: dict[tuple[str, ...], list[RoundForecast]] = {}
    for each in found.rounds:
        kinds.setdefault(tuple(each.asked), []).append(each)
    for ops, alike in kinds.items():
        name = f"round {alike[0].round}" if len(alike) == 1 else f"a round, {len(alike):,} times"
        asked = ", ".join(f"{_span([each.asked[op] for each in alike])} {op}" for op in ops) or "none"
        ways = ([each.bytes_down for each in alike], [each.bytes_up for each in alike])
        table.add_row(name, asked, *map(_mean, ways))
    table.add_section()
    table.add_row("the whole run", "", bytes_text(found.bytes_down), bytes_text(found.bytes_up))
    table.add_row("  in bytes", "", f"{found.bytes_down:,}", f"{found.bytes_up:,}")
    return table


def _span(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _mean(values: Sequence[int]) -> str:
    """Of bytes; it says so where they are not all the same."""
    return bytes_text(values[0]) if len(set(values)) == 1 else f"{bytes_text(sum(values) / len(values))} on average"


def _time(found: Forecast, link: Link) -> Table:
    table = new_table("", "a round", "the whole run")
    for name, seconds in (
        (f"sites at the same time ({_line(link)})", found.seconds(link)),
        ("one after the other, in one process here", found.seconds_here()),
    ):
        total = sum(seconds)
        table.add_row(name, seconds_text(total / max(1, len(seconds))), seconds_text(total))
    return table


def _line(link: Link) -> str:
    speed = f"{link.down_mbit:g}" if link.down_mbit == link.up_mbit else f"{link.down_mbit:g}/{link.up_mbit:g}"
    return f"{speed} Mbit/s" + (f", {link.latency_ms:g} ms" if link.latency_ms else "")


def _sight(found: Forecast) -> Table:
    federation = found.federation
    update = found.tiers[0].rehearsal.update
    vectors = [f"{piece.name} ({piece.dtype}, {list(piece.shape)})" for piece in update if piece.shape]
    scalars = [piece.name for piece in update if not piece.shape]
    rows = [site.rows for site in found.sites if "train" not in site.failures]
    table = new_table("", "", texts=2)
    table.add_row("each site", f"its own rows, {sum(rows):,} in all, and the model")
    table.add_row("leaves a site", escape(f"{', '.join(vectors + scalars)}; {guarantees.collected(federation)}"))
    table.add_row("besides, the coordinator gets", "; ".join(_besides(found)))
    table.add_section()
    for who, what in guarantees.trust(federation, found.bearing):
        table.add_row(who, escape(what))
    return table


def _besides(found: Forecast) -> list[str]:
    """What the coordinator sees that is not of a site's training."""
    federation = found.federation
    each = federation.collect.shows is Sight.EACH
    seen = []
    if federation.validate_at_sites:
        seen.append("each site's evaluation" if each else "only the sum of the evaluations")
    if federation.start is not None:
        bare = federation.privacy is None or federation.privacy.central
        what = "each site's sums of features" + ("" if bare else ", with noise")
        seen.append(what if each else "only the sum of the sums of features")
    seen.append("no row of a site" if federation.test is None else f"its own test set of {len(federation.test):,} rows")
    return seen


def _secure_sum(found: Forecast) -> dict[str, object] | None:
    """The secure sum of the smallest cohort; its bytes are those of a site in the largest."""
    bearing, collect, privacy = found.bearing, found.federation.collect, found.federation.privacy
    if bearing is None or not isinstance(collect, SecureAggregation):
        return None
    around = found.around("train")
    return {
        "bits": (privacy and privacy.whole) or collect.bits,
        "identities": collect.identities is not None,
        **asdict(bearing),
        "bytes_down": around.each_down,
        "bytes_up": around.each_up,
    }


def _encrypted(found: Forecast) -> Encrypted | None:
    """An update of a round's training, where they are encrypted."""
    collect = found.federation.collect
    return (
        Encrypted.of(collect, found.tiers[0].rehearsal.update) if isinstance(collect, HomomorphicEncryption) else None
    )


def _guarantee(found: Forecast) -> dict[str, object]:
    """What is protected, from whom, by what, and for how long."""
    federation, privacy = found.federation, found.federation.privacy
    if privacy is None:
        return {"protected": None}
    return {
        "protected": guarantees.protected(privacy),
        "unit": privacy.unit,
        "epsilon": privacy.epsilon,
        "delta": privacy.delta,
        "accountant": privacy.accountant,
        "relation": privacy.relation(scheme(federation.sampling)),
        "neighbours": guarantees.neighbours(privacy, privacy.relation(scheme(federation.sampling))),
        "mechanism": guarantees.mechanism(privacy),
        "sampling": guarantees.sampling(federation),
        "withheld": guarantees.WITHHELD,
        "tiers": [
            {"called": tier.called, "site": tier.site.name, "rows": tier.site.rows, **asdict(tier.prospect)}
            for tier in found.tiers
            if tier.prospect is not None
        ],
    }


def _privacy(found: Forecast) -> Table:
    federation, privacy = found.federation, found.federation.privacy
    table = new_table("", "", texts=2)
    if privacy is None:
        table.add_row("protected", f"nobody; {guarantees.NONE}")
    else:
        relation = privacy.relation(scheme(federation.sampling))
        prospects = [tier.prospect for tier in found.tiers if tier.prospect is not None]
        last = min(prospect.rounds for prospect in prospects)
        noise = [prospect.noise for prospect in prospects]
        how = "solved, so that the whole run keeps epsilon" if privacy.noise is None else "given"
        for name, text in (
            ("protected", guarantees.protected(privacy)),
            ("by", f"{guarantees.amount(privacy)}, for the whole run, as computed by {privacy.accountant.upper()}"),
            ("hard to tell apart", guarantees.neighbours(privacy, relation)),
            ("mechanism", guarantees.mechanism(privacy)),
            ("noise multiplier", f"{_by_tier(found, noise)}; {how}"),
            *_of_the_start(found),
            ("who is asked", guarantees.sampling(federation)),
            ("spent at the end", f"epsilon {_by_tier(found, [prospect.epsilon for prospect in prospects])}"),
            ("the budget lasts for", _lasting(last, federation.rounds, limited=privacy.epsilon is not None)),
            ("withheld", guarantees.WITHHELD),
        ):
            table.add_row(name, escape(text))
    return table


def _of_the_start(found: Forecast) -> list[tuple[str, str]]:
    noise = [t.prospect.start_noise for t in found.tiers if t.prospect is not None and t.prospect.start_noise]
    return [("  of round zero", _by_tier(found, noise))] if noise else []


def _by_tier(found: Forecast, values: Sequence[float]) -> str:
    """ "1.13", or "1.43 (smallest), 0.912 (largest)" where sites differ."""
    texts = [f"{value:.3g}" for value in values]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(f"{text} ({tier.called})" for text, tier in zip(texts, found.tiers, strict=True))


def _lasting(last: int, rounds: int, *, limited: bool) -> str:
    if not limited:
        return "ever: there is no limit, and epsilon grows with every round"
    return f"all {plural(rounds, 'round')}" if last >= rounds else f"{last:,} of {plural(rounds, 'round')}"


def _checks(found: Forecast) -> Table:
    table = new_table("", "", "", texts=3)
    for check in found.checks:
        table.add_row("holds" if check.holds else "FAILS", escape(check.what), escape(check.found))
    return table


def _remarks(found: Forecast) -> list[str]:
    lines = []
    failing = [site for site in found.sites if site.failures]
    for site in failing[:_FAILURES_SHOWN]:
        lines.append(f"{site.name} will not answer: {next(iter(site.failures.values()))}")
    if len(failing) > _FAILURES_SHOWN:
        lines.append(f"{len(failing) - _FAILURES_SHOWN} more sites will not answer.")
    if found.federation.stop is not None:
        lines.append(f"The run may end earlier: {found.federation.stop}.")
    encrypted = _encrypted(found)
    if encrypted is not None:
        lines.append(
            f"An update of {encrypted.numbers:,} numbers is {plural(encrypted.ciphertexts, 'ciphertext')}, "
            f"{bytes_text(encrypted.bytes)}: {encrypted.expansion:,.1f} times its bytes in the clear. Encryption takes "
            f"{seconds_text(encrypted.seconds)} at a site; the coordinator's exchange with the key party is not told."
        )
        if encrypted.numbers >= LARGE:
            lines.append("Encryption is meant for updates of LoRA's size; for this one take --secure, or LoRA.")
    hiding = "masks" if found.bearing is not None else "encryption" if encrypted is not None else ""
    exact = all(check.holds for check in found.checks if check.what == "bytes are exact")
    lines.append(
        ("Bytes are those that the run will report, unless a site fails. " if exact else "")
        + "Time and memory are those of one thread of this machine; memory is beside Python and its libraries, and "
        + (f"neither {hiding} nor " if hiding else "")
        + "the coordinator's adding up "
        + ("are in them." if hiding else "takes no time.")
    )
    return lines
