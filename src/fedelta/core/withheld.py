"""Why a site's work fails may tell of its rows: where those are hidden, the reason stays in the site's own log."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedelta.core.errors import FedeltaError, TrainingFailed
from fedelta.core.messages import PartyId

_LOG = logging.getLogger(__name__)
NO_CPU_MEMORY = "DefaultCPUAllocator: "  # PyTorch has no class for it; its message does not change with the language


@contextmanager
def withheld(site: PartyId, hidden: bool, told: str) -> Iterator[None]:
    """Where rows are `hidden`, what a user can mend is raised as TrainingFailed(told); a bug is raised as it is."""
    try:
        yield
    except Exception as error:
        if not hidden or not (isinstance(error, FedeltaError | OSError) or out_of_memory(error)):
            raise
        _LOG.warning("%s: %s", site, error)
        raise TrainingFailed(told) from None


def out_of_memory(error: Exception) -> bool:
    """Whether memory was lacking: how much was asked for depends on rows."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_CPU_MEMORY in str(error)
