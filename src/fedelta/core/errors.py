"""The exception tree.

A message is one sentence that names the value at fault and says what to do. The command line prints it without a
traceback and exits with status 2; `--debug` shows the traceback.
"""

from collections.abc import Mapping


class FedeltaError(Exception):
    """Anything that a user can mend; every other exception that escapes fedelta is a bug."""


class BadInput(FedeltaError):
    """Data, a file or an argument is not what it has to be."""


class BadTensors(BadInput):
    """Bytes, a vector or named tensors that do not have the promised form."""


class BadExperiment(BadInput):
    """An experiment file cannot be loaded or does not define what it has to."""


class TrainingFailed(FedeltaError):
    """A site could not finish its local work (its loss became NaN, say); the round goes on without it."""


class TooFewSites(FedeltaError):
    """Fewer sites answered than the program needs for a round; `absent` has why, for each of which that is known."""

    def __init__(self, message: str, absent: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.absent: Mapping[str, str] = absent or {}


class RoundLost(TooFewSites):
    """A round of which nothing can be used, and which must not be asked for again: the run goes on with the next."""


class Refused(FedeltaError):
    """The coordinator does not let a site in, or no longer; the message is its reason."""


class NotNow(Refused):
    """Refused for a reason that passes without the site: it comes back by itself, and need not be started again."""


class CannotResume(FedeltaError):
    """A run folder does not fit the run that would continue it."""


class UnsoundCombination(FedeltaError):
    """Parts that do not hold together; raised when the program is built, before anything is sent."""


class FedeltaWarning(UserWarning):
    """Something that is done as asked, and may not be what was meant; the message says what."""


class BudgetSpent(FedeltaError):
    """A release would pass the privacy budget that was set."""


class BadLedger(FedeltaError):
    """A privacy ledger, or a log whose lines are chained, is not what was recorded in it, or cannot be read."""
