"""The execution plan: how the arithmetic of local training is carried out.

Each part of it changes floating-point bits, so it is settled once in a run, written in its manifest and used again
after a resume.
"""

from dataclasses import dataclass, replace

import torch

from fedelta.core.errors import BadInput


@dataclass(frozen=True, kw_only=True)
class Plan:
    """None stands for what is still to be chosen; training that meets it takes the plain way (1 and False)."""

    cohort: int | None = None  # sites trained at once as one batch of models; 1: one by one
    channels_last: bool | None = None  # memory format of images and filters, [n, c, h, w]; only one by one
    bf16: bool = False  # autocast of the forward pass; weights stay float32
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.cohort is not None and self.cohort < 1:
            raise BadInput(f"Plan.cohort must be >= 1, got {self.cohort}")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise BadInput(f"Plan.device {self.device!r} is no device of PyTorch; give 'cpu' or 'cuda'") from None

    @property
    def settled(self) -> bool:
        return self.cohort is not None and self.channels_last is not None

    def filled(self, other: "Plan") -> "Plan":
        """This plan, with what it leaves open as in `other`."""
        return replace(
            self,
            cohort=other.cohort if self.cohort is None else self.cohort,
            channels_last=other.channels_last if self.channels_last is None else self.channels_last,
        )

    @property
    def plain(self) -> "Plan":
        """The plan with the plain way for what was not chosen."""
        return self.filled(Plan(cohort=1, channels_last=False))

    @classmethod
    def parse(cls, plain: object) -> "Plan":
        """The plan in a manifest. Raises BadInput if it is none."""
        try:
            return cls(**{str(key): value for key, value in dict(plain).items() if key != "threads"})  # type: ignore[call-overload]
        except (TypeError, ValueError):
            raise BadInput(f"{plain!s:.80} is not an execution plan") from None
