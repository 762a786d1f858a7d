"""What a guarantee means, in words: who is protected, from whom, by what, and who has to be trusted with the rest."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedelta.algorithms.mechanism import Privacy, scheme
from fedelta.core.program import Sight
from fedelta.core.release import Relation
from fedelta.privacy.clipping import AdaptiveClip
from fedelta.privacy.example_level import ExampleLevel
from fedelta.privacy.local_dp import LocalDP
from fedelta.privacy.site_level import SiteLevel

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


def trust(federation: "Federation[Any]") -> list[tuple[str, str]]:
    """Each party, and what it can learn, or has to be trusted with."""
    privacy = federation.privacy
    if privacy is None:
        seen = "each update" if federation.collect.shows is Sight.EACH else "the sum of the updates"
        return [
            ("the coordinator", f"sees {seen}; nothing bounds what that tells about a row"),
            ("another site", "sees the models; nothing bounds what they tell about a row"),
            ("whoever sees the models", "nothing bounds what they tell about a row"),
            ("an eavesdropper", "sees all that travels, if the line is not encrypted"),
        ]
    hidden = " as long as it does not learn who was asked" if _amplifies(federation) else ""
    if not privacy.central:
        own = "how many rows each site has, " if privacy.unit == "example" else ""
        return [
            ("the site itself", "has its rows; it is trusted to add its noise, with randomness that nobody else knows"),
            ("the coordinator", f"protected from: what it gets is noised; it learns {own}who took part, and when"),
            ("another site", "protected from: it sees models that are made of noised updates"),
            ("whoever sees the models", "protected from"),
            ("an eavesdropper", "protected from, as from the coordinator, even if the line is not encrypted"),
        ]
    choose = ", choose sites at random and tell nobody which" if _amplifies(federation) else ""
    return [
        ("the coordinator", f"NOT protected from: it gets each update; it is trusted to add the noise{choose}"),
        ("another site", f"protected from{hidden}: it sees the noised models alone"),
        ("whoever sees the models", f"protected from{hidden}"),
        ("an eavesdropper", "NOT protected from: updates travel without noise, so the line has to be encrypted"),
    ]


def leaves(federation: "Federation[Any]") -> Sequence[str]:
    """What a coordinator sees of a site's training under the guarantee, or without one."""
    privacy, each = federation.privacy, federation.collect.shows is Sight.EACH
    if privacy is None or not each:
        return ["each site's update in the clear" if each else "only the sum of the updates"]
    if privacy.unit == "example":
        return ["each site's update, which was learned with noise, and its number of rows"]
    if privacy.central:
        return [
            "each site's update in the clear, cut to a norm",
            "no loss and no number of rows: each site counts as 1",
        ]
    return ["each site's update with its noise", "no loss and no number of rows: each site counts as 1"]


def _amplifies(federation: "Federation[Any]") -> bool:
    """Whether the guarantee rests on nobody's knowing who was asked."""
    privacy = federation.privacy
    return privacy is not None and privacy.central and scheme(federation.sampling) in ("poisson", "fixed")
