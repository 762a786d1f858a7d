"""What the sites of a simulation hold: loaded and looked over before the work."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from fedelta.algorithms.federation import Federation
from fedelta.cli.experiment import Sites
from fedelta.core.digest import digest
from fedelta.core.errors import FedeltaError
from fedelta.data.overview import Overview, overview
from fedelta.learning.objectives import Classification
from fedelta.observe.page import Plot, Section

_NOT_TOLD = "not told"


@dataclass(frozen=True, kw_only=True)
class Held:
    """A digest of each site's data for the manifest (None: it has none to train on), and labels if there are classes.

    Under a guarantee neither is told: no noise covers them. `overview` is None where there are no labels.
    """

    classes: tuple[str, ...]
    digests: dict[str, str | None] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)  # for training; of the sites that have some
    labels: dict[str, npt.NDArray[np.int64]] = field(default_factory=dict)

    @classmethod
    def of(cls, sites: Sites, federation: Federation[Any], console: Console, classes: Sequence[str] = ()) -> "Held":
        """Load all sites, and say which of them have no data to train on; `classes` are names of the labels."""
        objective = federation.algorithm.task.objective
        numbered = tuple(map(str, range(objective.classes))) if isinstance(objective, Classification) else ()
        held = cls(classes=tuple(classes or numbered) if numbered else ())
        with console.status("loading the sites' data"):
            for name in sites.names:
                try:
                    data = sites(name)
                    federation.algorithm.task.check(data.train)
                except (FedeltaError, OSError) as error:
                    held.digests[name] = None
                    console.print(
                        f"{name} has no data to train on: {error}", style="yellow", markup=False, soft_wrap=True
                    )
                    continue
                told = federation.privacy is None
                parts = [part.digest() for part in (data.train, data.validation) if part is not None and told]
                held.digests[name] = digest(parts) if told else _NOT_TOLD
                held.rows[name] = len(data.train)
                if held.classes and told:
                    held.labels[name] = data.train.targets.numpy()
        return held

    def overview(self) -> Overview | None:
        return overview(self.labels, self.classes) if self.labels else None

    def sections(self) -> list[Section]:
        """Of a report: what each site holds."""
        found = self.overview()
        if found is None:
            return []
        plot = Plot(figure=found.plot(), caption="Rows by class and site.", wide=True)
        return [Section(heading="What each site holds", plots=[plot])]
