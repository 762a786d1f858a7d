"""How often something may happen: a bucket of tokens that fills again with time."""

from dataclasses import dataclass

from fedelta.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Rate:
    """So many a minute on the long run, and `burst` at once."""

    per_minute: float
    burst: float

    def __post_init__(self) -> None:
        if not (self.per_minute > 0 and self.burst > 0):
            raise BadInput(f"a rate has per_minute and burst > 0, got {self.per_minute} and {self.burst}")


class Bucket:
    """What is left of a rate. Times are in seconds, of any clock that does not go back."""

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._tokens = rate.burst
        self._at = now

    def take(self, tokens: float, now: float) -> float:
        """0 where there are as many, which are taken; otherwise the seconds until there are, and none is taken."""
        per_second = self._rate.per_minute / 60
        self._tokens = min(self._rate.burst, self._tokens + (now - self._at) * per_second)
        self._at = now
        if tokens > self._tokens:
            return (tokens - self._tokens) / per_second
        self._tokens -= tokens
        return 0.0
