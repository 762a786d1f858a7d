"""A secure sum with both halves in one process, whose messages a test may lose, reorder or alter."""

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedelta.core.codec import decode, encode
from fedelta.secure.graph import Shape, quorum
from fedelta.secure.protocol_coordinator import Asked, CoordinatorSum
from fedelta.secure.protocol_site import SiteSum


class Sum:
    """`sites` sites, their inputs (full range of int64 and int32), and a coordinator, with a registry of identities.

    Without a shape everybody is everybody's neighbour, and a quorum less one has the shares that it takes.
    """

    def __init__(
        self, sites: int, shape: Shape | None = None, context: bytes = b"job/1/train/0", size: int = 5
    ) -> None:
        self.quorum = quorum(sites)
        self.threshold = shape.threshold if shape else self.quorum - 1
        self.names = [f"site {i}" for i in range(sites)]
        self.identities = {name: Ed25519PrivateKey.generate() for name in self.names}
        self.registry = {name: key.public_key() for name, key in self.identities.items()}
        self.terms = {
            "context": context,
            "cohort": sites,
            "shape": lambda listed: shape or Shape(listed - 1, self.threshold),
            "registry": self.registry,
        }
        self.site = {name: SiteSum(name=name, identity=self.identities[name], **self.terms) for name in self.names}
        self.coordinator = CoordinatorSum(names=self.names, **self.terms)
        rng = np.random.default_rng()
        self.inputs = {
            name: {
                "wide": rng.integers(-(2**63), 2**63, size, np.int64),
                "narrow": rng.integers(-(2**31), 2**31, size, np.int32),
            }
            for name in self.names
        }

    def answer(self, name: str, asked: Asked, **altered):
        """What a site answers to a request, by way of the bytes of the wire."""
        told, _ = decode(encode({**asked.shared, **asked.bodies[name], **altered}))
        site = self.site[name]
        if asked.step == "keys":
            return site.keys()
        if asked.step == "masked":
            return site.masked(told, self.inputs[name])
        return getattr(site, asked.step)(told)

    def answer_all(self, asked: Asked, names: Iterable[str] | None = None) -> dict:
        """The answers of all that were asked, or of `names` among them, taken in that order."""
        answers = {}
        for name in asked.bodies if names is None else names:
            if name in asked.bodies:
                answers[name] = self.answer(name, asked)
                self.coordinator.take(name, decode(encode(answers[name]))[0])
        return answers

    def until(self, step: str) -> Asked:
        """Go through the steps before `step`, all sites answering; what is asked then."""
        asked = self.coordinator.ask()
        while asked.step != step:
            self.answer_all(asked)
            asked = self.coordinator.ask()
        return asked

    def expected(self, survivors: Iterable[str]) -> dict[str, list[int]]:
        """The sum in Python's integers, wrapped."""
        inputs = [self.inputs[name] for name in survivors]
        return {
            name: [
                (sum(column) + half) % (2 * half) - half
                for column in zip(*(each[name].tolist() for each in inputs), strict=True)
            ]
            for name, half in (("wide", 2**63), ("narrow", 2**31))
        }

    def check_total(self, survivors: Iterable[str]) -> None:
        total, counted = self.coordinator.total()
        assert counted == sorted(survivors, key=self.names.index)
        assert {name: vector.tolist() for name, vector in total.items()} == self.expected(counted)


@pytest.fixture(scope="session")
def new_sum() -> Callable[..., Sum]:
    return Sum
