"""The site's half of a federation: from a request to what leaves.

What comes in is trained on (or measured, or summed up), passes through the stages and the guarantee, is encoded, and is
handed to the collect.
"""

import copy
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fedelta.aggregation.rule import ManyRule, Rule
from fedelta.algorithms import round_zero
from fedelta.algorithms.algorithm import Algorithm, Incoming, IncomingMany
from fedelta.algorithms.evaluation import NO_VALUES
from fedelta.algorithms.parts import Collect, Encoding, Stage
from fedelta.algorithms.private import Guard
from fedelta.core.errors import BadInput, BadTensors, FedeltaError
from fedelta.core.grid import Terms
from fedelta.core.messages import Replies, Reply, Request, Requests, Tensors, Update
from fedelta.core.parameters import Layout, Parameters, trainable, travelling_buffers
from fedelta.core.program import HAND_OVER, Sight, Site
from fedelta.core.seeds import derive, derive_each
from fedelta.core.withheld import withheld
from fedelta.learning.plan import Plan
from fedelta.learning.training import evaluate

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AtSite:
    """What sites know of a federation. `rule` gives None where the coordinator has to see every update.

    It is asked only where sites are trained at once: it may need the whole model, which a site need not have.
    """

    algorithm: Algorithm[Any]
    start: bool  # whether there is a round zero
    validates: bool  # whether sites measure on what they hold back
    guard: Guard | None
    stages: Sequence[Stage]
    encoding: Encoding
    collect: Collect
    seed: int
    plan: Plan
    rule: Callable[[], Rule | None]
    terms: Callable[[str, Tensors], Terms]  # of requests of a kind, with what all sites get

    def handle(self, request: Request, site: Site) -> Reply:
        outgoing: Callable[[Request, Site], Tensors]
        if request.op == HAND_OVER:
            return self._keep(request, site)
        if request.op == "train":
            outgoing = self._update
        elif request.op == "evaluate" and self.validates:
            outgoing = self._evaluation
        elif request.op == "statistics" and self.start:
            outgoing = self._statistics
        else:
            return self.collect.answer(request, site)
        return self.collect.handle(
            request, site, lambda: outgoing(request, site), self.terms(request.op, request.shared)
        )

    def handle_many(self, requests: Requests, sites: Sequence[Site]) -> Replies:
        """Train `sites` at once. One summed update goes on where nothing on its way has to see the single ones."""
        by_example = self.guard is not None and self.guard.privacy.unit == "example"
        if requests.op != "train" or self.collect.shows is not Sight.EACH or by_example:
            raise BadInput(f"{requests.op!r} requests under {self.collect} are handled one by one")
        incoming = IncomingMany(
            shared=requests.shared,
            own=requests.bodies,
            round=requests.round,
            seed=self.seed,
            local_seeds=derive_each((self.seed, requests.round), requests.to, ("local",)),
            plan=self.plan,
            hidden=self._hidden,
        )
        updates, errors = self.algorithm.local_many(incoming, sites)
        rule = self._summing
        if rule is not None:
            refused = rule.refuse_many(updates)
            errors |= {updates.senders[row]: reason for row, reason in refused.items()}
            updates = updates.without(refused)
            body = self.encoding.encode(rule.combine(updates)) if len(updates) else {}
        else:
            updates = replace(updates, values=updates.values.cpu())
            by_name = {site.id: site for site in sites}
            pairs = zip(updates.senders, updates, strict=True)
            encoded = [self._outgoing(one, by_name[to], requests.shared, requests.round) for to, one in pairs]
            body = {name: torch.stack([tensors[name] for tensors in encoded]) for name in encoded[0]} if encoded else {}
        return Replies(senders=updates.senders, answers=requests.id, round=requests.round, body=body, errors=errors)

    @cached_property
    def _summing(self) -> ManyRule | None:
        """What makes one update of many; None where something on their way has to see the single ones."""
        rule = self.rule() if not self.stages and self.guard is None and self.encoding.linear else None
        return rule if isinstance(rule, ManyRule) else None

    def incoming(self, request: Request) -> Incoming:
        return Incoming(
            tensors=_Sent({**request.shared, **request.body}),
            round=request.round,
            base=request.base,
            seed=self.seed,
            local_seed=derive(self.seed, request.round, request.to, "local"),
            plan=self.plan,
            hidden=self._hidden,
        )

    @property
    def _hidden(self) -> bool:
        """Where noise is added to each step, a weight that is not finite came of noised ones, and leaves as it is."""
        return self.guard is not None and self.guard.privacy.unit == "site"

    def model(self, request: Request, site: Site) -> nn.Module:
        """A new module, on the CPU, with the weights that a site ends with."""
        if self.algorithm.personal:
            model, _ = self.algorithm.received(self.incoming(request), site, site.data().train)
            return copy.deepcopy(model.module).cpu()
        module = self.algorithm.task.build(self.seed)
        layout = Layout.of(trainable(module), travelling_buffers(module))
        Parameters(layout, _Sent(request.shared)["parameters"]).load(module)
        return module

    def _keep(self, request: Request, site: Site) -> Reply:
        if site.keep is None:
            raise BadInput("this site keeps no model")
        with self._withheld(site):
            model = self.model(request, site)
        try:
            site.keep(model, request.round)
        except (FedeltaError, OSError) as error:  # it is about the owner's disk
            _LOG.error("%s has not kept its model: %s", site.id, error)
            raise BadInput("it could not keep its model; why is in its own log") from None
        return Reply.to_request(request, {})

    def _update(self, request: Request, site: Site) -> Tensors:
        incoming = self.incoming(request)
        if self.guard is not None:
            with self._withheld(site):
                if not len(site.data().train):
                    raise BadInput("this site has no training examples")
            private = self.guard.training_at(site, request.shared, request.round)
            # what dropout hides of a row depends on the others of its batch, which nobody else may know
            secret = self.guard.entropy == "system" and private is not None
            seed = secrets.randbits(62) if secret else incoming.local_seed
            incoming = replace(incoming, private=private, local_seed=seed)
        with self._withheld(site):
            update = self.algorithm.local(incoming, site)
        return self._outgoing(update, site, request.shared, request.round)

    def _statistics(self, request: Request, site: Site) -> Tensors:
        if request.round != 0:  # a second one would be a second release
            raise BadInput(f"the closed-form start is in round 0, and it is asked for in round {request.round}")
        parameters = _Sent(request.shared)["parameters"]
        guard, task = self.guard, self.algorithm.task
        private, noise = None, None
        if guard is not None:
            private, noise = guard.moments(request.shared), guard.noise_at(site, request.shared, "statistics")
        with self._withheld(site):
            update = round_zero.statistics(task, parameters, site, self.seed, self.plan, private, noise)
        if guard is not None:
            guard.start_leaves(site, request.shared)
        return update.to_tensors()

    def _outgoing(self, update: Update, site: Site, told: Tensors, round: int) -> Tensors:
        for stage in self.stages:
            update = stage.on_site(update, site)
        if self.guard is not None:
            if not torch.isfinite(update.values.vector).all():
                counts = "zeros count in its place" if self._hidden else "nothing of it counts"
                _LOG.warning("%s: its training diverged, and %s; lower the learning rate", site.id, counts)
            update = self.guard.leaving(update, site, told, round)
        return self.encoding.encode(update)

    def _evaluation(self, request: Request, site: Site) -> Tensors:
        held_back = site.data().validation
        sums: Mapping[str, float] = {}
        if self.collect.shows is Sight.SUM:  # all have to be of one form: who holds nothing back adds zeros
            sums = dict.fromkeys(self.algorithm.task.objective.sums, 0.0)
        if held_back is not None and len(held_back):
            with self._withheld(site):
                model, rows = self.algorithm.received(self.incoming(request), site, held_back)
                sums = evaluate(model, rows, self.algorithm.task.objective, self.plan)
        return Update(values=Parameters.zeros(NO_VALUES), sums=sums).to_tensors()

    def _withheld(self, site: Site) -> AbstractContextManager[None]:
        hidden = self.guard is not None or self.collect.shows is Sight.SUM
        told = "it could not do its work; why is in its own log, as it may tell of its rows"
        return withheld(site.id, hidden, told)


class _Sent(dict[str, Tensor]):
    """Tensors of a request; what is not among them was left out by the coordinator."""

    def __missing__(self, name: str) -> Tensor:
        raise BadTensors(f"the request lacks {name!r}")
