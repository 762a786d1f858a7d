"""What a guarantee means, in words: who is protected, from whom, by what, and who has to be trusted with the rest."""

from typing import TYPE_CHECKING, Any

from fedelta.algorithms.forecast_sums import Bearing
from fedelta.algorithms.mechanism import Privacy, scheme
from fedelta.core.program import Sight
from fedelta.core.release import Relation
from fedelta.observe.text import plural
from fedelta.privacy.clipping import AdaptiveClip
from fedelta.privacy.distributed import DistributedDP
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.site_level import SiteLevel
from fedelta.secure.aggregation import SecureAggregation
from fedelta.secure.homomorphic import HomomorphicEncryption

if TYPE_CHECKING:
    from fedelta.algorithms.federation import Federation

NONE = "no guarantee: no noise is added, and what leaves a site may tell anything about its rows"
WITHHELD = "what sites measure in training (losses, accuracies), and any evaluation on their rows"
_NEIGHBOURS: dict[Relation, str] = {
    "add_or_remove_one": "with it and without it",
    "replace_one": "with it and with any other in its place",
    "replace_special": "with it and with one that counts as nothing in its place",
}


def protected(privacy: Privacy) -> str:
    return "each row of a site" if privacy.unit == "example" else "each site with all its rows"


def neighbours(privacy: Privacy, relation: Relation) -> str:
    """What the model would hardly tell apart."""
    known = "; how many rows a site has is public" if privacy.unit == "example" else ""
    return f"the same data {_NEIGHBOURS[relation]}{known}"


def amount(privacy: Privacy) -> str:
    """ "epsilon 8 at delta 1e-05"."""
    limit = "no limit on epsilon" if privacy.epsilon is None else f"epsilon {privacy.epsilon:g}"
    return f"{limit} at delta {privacy.delta:g}"


def mechanism(privacy: Privacy) -> str:
    """What is bounded, and where noise is added."""
    match privacy:
        case ExampleLevel():
            return f"DP-SGD at each site: the gradient of each row cut to norm {privacy.clip:g}, noise in every step"
        case DistributedDP():
            return f"each site cuts its update to norm {privacy.clip:g} and adds its share of the noise of a sum"
        case LocalDP():
            return f"each site cuts its update to norm {privacy.clip:g} and adds noise before it leaves"
        case SiteLevel(clip=AdaptiveClip()):
            return "each site cuts its update to a norm that follows the sites; the coordinator adds noise to the sum"
        case SiteLevel():
            how = f", correlated over {privacy.bands} rounds" if privacy.bands > 1 else ""
            return f"each site cuts its update to norm {privacy.clip:g}; the coordinator adds noise to the sum{how}"
    return repr(privacy)


def sampling(federation: "Federation[Any]") -> str:
    """Who is asked in a round, and whether that counts."""
    assert federation.privacy is not None
    who = {
        "all": "every site in every round",
        "poisson": "each site by itself with a probability",
        "fixed": "a cohort of fixed size, drawn anew",
        "cyclic": "sites in turn",
    }[scheme(federation.sampling)]
    if federation.privacy.unit == "example":
        return f"{federation.sampling}: {who}, for which nothing is taken off; rows of a site by Poisson sampling"
    if _amplifies(federation):
        return f"{federation.sampling}: {who}, which counts as long as nobody learns who was asked"
    return f"{federation.sampling}: {who}, for which nothing is taken off"


def trust(federation: "Federation[Any]", bearing: Bearing | None = None) -> list[tuple[str, str]]:
    """Each party, and what it can see, or has to be trusted with.

    `bearing` is that of the smallest cohort where updates are summed up securely.
    """
    privacy = federation.privacy
    if privacy is None:
        models = "the models, and so the mean of the updates between two of them"
        return [
            ("the coordinator", f"sees {received(federation)}; nothing bounds what that tells about a row"),
            *_colluding(federation, bearing),
            *_key_party(federation),
            ("another site", f"sees {models}{_list(federation)}; nothing bounds what that tells about a row"),
            ("whoever sees the models", "nothing bounds what they tell about a row"),
            ("an eavesdropper", _overheard(federation)),
        ]
    if not privacy.central:
        return [
            ("the site itself", "has its rows; it is trusted to add its noise, with randomness that nobody else knows"),
            ("the coordinator", f"protected from: it gets {received(federation)}; it learns who took part, and when"),
            *_colluding(federation, bearing),
            *_key_party(federation),
            ("another site", f"protected from: it sees models that are made of noised updates{_list(federation)}"),
            ("whoever sees the models", "protected from"),
            ("an eavesdropper", "protected from, as from the coordinator, even if the line is not encrypted"),
        ]
    amplifies, alone = _amplifies(federation), " alone" if federation.collect.shows is Sight.EACH else ""
    choose = ", choose sites at random and tell nobody which" if amplifies else ""
    hidden = " as long as it does not learn who was asked" if amplifies else ""
    return [
        (
            "the coordinator",
            f"NOT protected from: it gets {received(federation)}; it is trusted to add the noise{choose}",
        ),
        *_colluding(federation, bearing),
        *_key_party(federation),
        ("another site", f"protected from{hidden}: it sees the noised models{alone}{_list(federation)}"),
        ("whoever sees the models", f"protected from{hidden}"),
        ("an eavesdropper", _overheard(federation)),
    ]


def received(federation: "Federation[Any]") -> str:
    """What reaches the coordinator of a site's training, as it can read it."""
    privacy, collect = federation.privacy, federation.collect
    if collect.shows is Sight.EACH:
        if privacy is None:
            return "each site's update in the clear, its number of rows, and what it measured in training"
        if privacy.unit == "example":
            return "each site's update, which was learned with noise, and its number of rows"
        if privacy.central:
            return "each site's update in the clear, cut to a norm, no loss and no number of rows"
        return "each site's update with its noise, no loss and no number of rows"
    if privacy is None:
        what, single = "the sums of the updates, of the rows, and of what sites measured in training", "nothing"
    elif privacy.unit == "example":
        what, single = "the sum of the updates, which were learned with noise", "its number of rows"
    elif privacy.central:
        what, single = "the sum of the updates, each cut to a norm, without noise", "nothing"
    else:
        what, single = "the sum of the updates with their noise", "nothing"
    return f"{what}; of a single site {single}{_hidden(federation)}"


def collected(federation: "Federation[Any]") -> str:
    """How updates reach the coordinator: "in the clear", or how not."""
    collect = federation.collect
    if isinstance(collect, HomomorphicEncryption):
        return "encrypted (CKKS); only their sum is opened, by the key party"
    if isinstance(collect, SecureAggregation):
        whole = None if federation.privacy is None else federation.privacy.whole
        return f"under masks, as integers of {whole or collect.bits} bits, which only add up (secure aggregation)"
    return "in the clear" if collect.shows is Sight.EACH else "only as their sum"


def _hidden(federation: "Federation[Any]") -> str:
    """Of whom masks, or encryption, protect from."""
    collect = federation.collect
    if isinstance(collect, HomomorphicEncryption):
        return ", as long as it keeps to the protocol and does not work together with the key party"
    if not isinstance(collect, SecureAggregation):
        return ""
    if collect.identities is None:
        return ", as long as it keeps to the protocol (sites do not know each other's identities)"
    return ", whether it keeps to the protocol or not (sites know each other's identities)"


def _colluding(federation: "Federation[Any]", bearing: Bearing | None) -> list[tuple[str, str]]:
    """The coordinator together with sites that tell it what they know."""
    privacy, collect = federation.privacy, federation.collect
    if not isinstance(collect, SecureAggregation) or bearing is None:
        who = "the coordinator with other sites"
        if privacy is not None and not privacy.central:
            return [(who, "protected from, as from the coordinator alone")]
        if collect.shows is Sight.SUM:
            return [(who, "sees the sum of the updates of the others, which may be a single one")]
        return [(who, "sees what the coordinator sees, and what these sites have; of any other no more than that")]
    others = collect.honest(bearing.sites)
    if privacy is not None and privacy.whole is not None:
        who = f"the coordinator with up to {max(1, bearing.colluding)} of {plural(bearing.sites, 'site')}"
        return [(who, f"protected from: the noise of at least {others} others is in what they see, which is enough")]
    who = f"the coordinator with up to {bearing.colluding} of {plural(bearing.sites, 'site')}"
    what = f"the sum of the updates of the others, at least {others}"
    if not bearing.colluding:
        who, what = "the coordinator with other sites", f"of {plural(bearing.sites, 'site')} none may collude"
    if privacy is not None and not privacy.central:
        return [(who, f"protected from, as each site adds noise of its own; under masks {what}")]
    if not bearing.colluding:
        return [(who, f"{what}: with one that does, it may see single updates")]
    if privacy is None:
        what = f"sees {what}; nothing bounds what that tells about a row"
    else:
        what = f"NOT protected from: it gets {what}, without noise"
    return [(who, f"{what}; with more sites it may see single updates")]


def _key_party(federation: "Federation[Any]") -> list[tuple[str, str]]:
    """Who has the secret key, where updates are encrypted."""
    if not isinstance(federation.collect, HomomorphicEncryption):
        return []
    privacy = federation.privacy
    noised = "" if privacy is None else ", without noise" if privacy.central else ", with the noise of the sites"
    return [("the key party", f"sees the sums that it opens{noised}; together with the coordinator, each update")]


def _overheard(federation: "Federation[Any]") -> str:
    """What travels, without noise of the sites' own."""
    summed, central = federation.collect.shows is Sight.SUM, federation.privacy is not None
    if isinstance(federation.collect, HomomorphicEncryption):
        line = "sees, on the lines of sites that keep to the protocol, the models, who takes part, and ciphertexts"
        return f"{line}; between coordinator and key party the sum of the updates, unless that line is encrypted"
    if not summed:
        if central:
            return "NOT protected from: updates travel without noise, so the line has to be encrypted"
        return "sees all that travels, each update in the clear, unless the line is encrypted"
    line = "on one line, the models and who takes part, and nothing of an update"
    every = "on the lines of all sites, the sum of the updates, as the coordinator"
    if central:
        return f"sees {line}; {every}, without noise: NOT protected from there, so lines have to be encrypted"
    return f"unless the line is encrypted, sees {line}; {every}"


def _list(federation: "Federation[Any]") -> str:
    """What a secure sum tells its sites of each other."""
    return ", and who else takes part" if isinstance(federation.collect, SecureAggregation) else ""


def _amplifies(federation: "Federation[Any]") -> bool:
    """Whether the guarantee rests on nobody's knowing who was asked."""
    privacy = federation.privacy
    return privacy is not None and privacy.central and scheme(federation.sampling) in ("poisson", "fixed")
