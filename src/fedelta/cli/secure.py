"""The options of secure aggregation and of encryption, and the collect that they ask for.

Sites of a simulation have no identities: in a deployment each has a key, and `SecureAggregation.identities` has the
public ones. The key party of a simulation is in its process; in a deployment it is a third party, and
`HomomorphicEncryption.public` has its key.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import click

from fedelta.core.errors import BadInput, FedeltaError

if TYPE_CHECKING:
    from fedelta.algorithms.federation import Federation
    from fedelta.cli.experiment import Sites
    from fedelta.core.examples import Examples

Command = Callable[..., Any]
_OPTIONS = (
    click.option(
        "--secure",
        is_flag=True,
        help="Secure aggregation: sites mask what they send, so that the coordinator learns sums over sites, and "
        "nothing of a single one.",
    ),
    click.option(
        "--secure-bits",
        type=click.Choice(["32", "64"]),
        callback=lambda _context, _option, bits: None if bits is None else int(bits),
        show_default="64",
        help="Of the integers that are added. 64: the mean has the bits of one in the clear; 32: half the bytes.",
    ),
    click.option(
        "--homomorphic",
        is_flag=True,
        help="Homomorphic encryption: sites encrypt what they send, and a key party opens the sum that the coordinator "
        "makes of it. For LoRA-sized updates; 6 times the bytes.",
    ),
)


def secure_options(command: Command) -> Command:
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def refusals(options: dict[str, Any]) -> list[tuple[bool, str]]:
    """What may be wrong with the options, and the sentence that says so."""
    return [
        (
            options["secure_bits"] is not None and not options["secure"],
            "--secure-bits has no effect without --secure; give both.",
        ),
        (
            options["homomorphic"] and options["secure"],
            "--secure and --homomorphic are two ways to add updates up unseen; leave one of them out.",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class Masks:
    """The options, under their names."""

    secure: bool = False
    secure_bits: int | None = None
    homomorphic: bool = False

    @classmethod
    def take(cls, options: dict[str, Any]) -> "Masks":
        """From the parsed options, out of which they are removed. Raises UsageError if they contradict each other."""
        for wrong, sentence in refusals(options):
            if wrong:
                raise click.UsageError(sentence)
        return cls(**{name: options.pop(name) for name in ("secure", "secure_bits", "homomorphic")})

    def on(self, federation: "Federation[Any]", sites: "Sites") -> "Federation[Any]":
        """The federation, whose updates are added up securely if that was asked for.

        Settings of a secure aggregation that it has already are kept. The integers of 32 bits are spread over weights
        up to the rows of the largest site, where rows are weights. Raises UnsoundCombination where the parts need more
        than sums, BadInput for noise that the integers have no room for.
        """
        if self.homomorphic:
            return _encrypted(federation, sites)
        if not self.secure:
            return federation
        from fedelta.privacy.local_dp import LocalDP
        from fedelta.secure.aggregation import SecureAggregation

        given: dict[str, Any] = {} if self.secure_bits is None else {"bits": self.secure_bits}
        if isinstance(federation.collect, SecureAggregation):
            return replace(federation, collect=replace(federation.collect, **given))
        if self.secure_bits == 32:
            if isinstance(federation.privacy, LocalDP):
                raise BadInput(
                    "the noise of LocalDP goes beyond the bound of integers of 32 bits; use --secure-bits 64"
                )
            given |= _weights(federation, sites)
        least = max(SecureAggregation.least, federation.min_sites)
        return replace(federation, min_sites=1, collect=SecureAggregation(least=least, **given))


def _encrypted(federation: "Federation[Any]", sites: "Sites") -> "Federation[Any]":
    """With updates that are added up encrypted, as finely as the number of sites and their rows allow."""
    from fedelta.core.extras import require
    from fedelta.privacy.local_dp import LocalDP
    from fedelta.secure import ckks
    from fedelta.secure.homomorphic import HomomorphicEncryption

    require(ckks.EXTRA, ckks.LIBRARY)
    if isinstance(federation.collect, HomomorphicEncryption):
        return federation
    if isinstance(federation.privacy, LocalDP):
        raise BadInput("the noise of LocalDP goes beyond the bound of encrypted numbers; use --secure")
    least = max(HomomorphicEncryption.least, federation.min_sites)
    collect = HomomorphicEncryption(least=least, most=max(least, len(sites.names)), **_weights(federation, sites))
    return replace(federation, min_sites=1, collect=collect)


def _weights(federation: "Federation[Any]", sites: "Sites") -> dict[str, Any]:
    """The bound on weights that is known, if one is: the finest grid."""
    from fedelta.adapters.hetlora import HetLoRA

    if federation.privacy is not None and federation.privacy.central:
        return {"weight_bound": 1.0}  # all sites count alike
    if isinstance(federation.algorithm, HetLoRA):
        return {}
    return {"weight_bound": float(max((len(rows) for rows in _held(sites)), default=1) or 1)}


def _held(sites: "Sites") -> Sequence["Examples"]:
    """What each site has to train on; those that have nothing will say so when they are asked."""
    found = []
    for name in sites.names:
        with suppress(FedeltaError, OSError):
            found.append(sites(name).train)
    return found
