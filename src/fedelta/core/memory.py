"""What a site keeps between rounds: control variates, error feedback, personal heads.

Versioned by round, so that a coordinator that goes back to an earlier round (a resume, a reply that never arrived)
finds the site as it was: a request says from which round the site continues. Two versions are kept.
"""

from collections.abc import Mapping

from torch import Tensor

from fedelta.core.errors import BadInput


class Memory:
    """Named tensors per round; round -1 is the empty memory that every site starts with."""

    def __init__(self) -> None:
        self._versions: dict[int, dict[str, Tensor]] = {-1: {}}

    def at(self, round: int) -> Mapping[str, Tensor]:
        """The memory as it was left by `round`. Raises BadInput if that version is no longer (or not yet) there."""
        if round not in self._versions:
            raise BadInput(f"this site has no memory of round {round}, only of {sorted(self._versions)}")
        return self._versions[round]

    def commit(self, base: int, round: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors` as the version that `round` leaves, and `base`, from which it was made; forget the others."""
        kept = self.at(base)
        self._versions = {base: dict(kept), round: {name: tensor.clone() for name, tensor in tensors.items()}}
