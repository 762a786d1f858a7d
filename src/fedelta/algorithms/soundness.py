"""What does not hold together in a federation, refused before anything is sent: one sentence, and what does hold."""

from collections.abc import Sequence
from typing import Any, Protocol

from fedelta.aggregation.mean import Mean
from fedelta.aggregation.rule import Rule
from fedelta.algorithms import round_zero
from fedelta.algorithms.algorithm import Algorithm
from fedelta.algorithms.mechanism import Privacy, scheme
from fedelta.algorithms.parts import Collect, Encoding, Float32, Stage
from fedelta.algorithms.sampling import Fixed, Sampling
from fedelta.algorithms.stopping import Stop
from fedelta.core.errors import BadInput, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.parameters import Layout
from fedelta.core.program import Sight
from fedelta.learning.closed_form import ClosedForm
from fedelta.learning.plan import Plan


class Parts(Protocol):
    """Of a Federation: what has to go together."""

    @property
    def algorithm(self) -> Algorithm[Any]: ...

    @property
    def start(self) -> ClosedForm | None: ...

    @property
    def sampling(self) -> Sampling: ...

    @property
    def rule(self) -> Rule | None: ...

    @property
    def aggregation(self) -> Rule: ...

    @property
    def privacy(self) -> Privacy | None: ...

    @property
    def stages(self) -> Sequence[Stage]: ...

    @property
    def encoding(self) -> Encoding: ...

    @property
    def collect(self) -> Collect: ...

    @property
    def stop(self) -> Stop | None: ...

    @property
    def min_sites(self) -> int: ...

    @property
    def enough(self) -> int | None: ...

    @property
    def test(self) -> Examples | None: ...

    @property
    def plan(self) -> Plan: ...

    @property
    def validate_at_sites(self) -> bool: ...


def check(federation: Parts) -> None:
    """Raises UnsoundCombination, or BadInput for what cannot be done, if two parts do not go together."""
    _check_parts(federation)
    if federation.enough is not None:
        _check_enough(federation, federation.enough)
    _check_aggregation(federation)
    _check_algorithm(federation)
    if federation.privacy is not None:
        _check_privacy(federation, federation.privacy)
        if federation.privacy.unit == "example":
            _check_examples(federation, federation.privacy)
        else:
            _check_sites(federation, federation.privacy)


def check_stop(federation: Parts) -> None:
    """Raises BadInput if `stop` waits for what is never measured."""
    if federation.stop is None:
        return
    part = federation.stop.metric.partition("_")[0]
    cure = {
        "test": None if federation.test is not None else "give test examples",
        "validation": None if federation.validate_at_sites else "set validate_at_sites",
        "train": None if federation.privacy is None else "under a guarantee take one of the coordinator's test set",
    }[part]
    if cure is not None:
        raise BadInput(f"{federation.stop} waits for a metric that is never measured; {cure}")


def check_layout(federation: Parts, layout: Layout) -> None:
    """Raises UnsoundCombination for a model of which a part is averaged, and not trained, where that does not hold."""
    if layout.size == layout.trained:
        return
    name = next(entry.name for entry in layout.entries if entry.offset >= layout.trained)
    cure = "use a tuning that freezes BatchNorm, or a model with GroupNorm or LayerNorm"
    if federation.privacy is not None:
        own = type(federation.privacy).__name__
        raise UnsoundCombination(f"{name!r} is a statistic that sites average and no noise of {own} covers; {cure}")
    if federation.collect.shows is Sight.SUM:
        raise UnsoundCombination(
            f"{name!r} is a statistic that sites average, for which the grid of {federation.collect} has no bound; "
            f"{cure}"
        )


def _check_parts(federation: Parts) -> None:
    task = federation.algorithm.task
    if isinstance(federation.sampling, Fixed) and federation.sampling.size < federation.min_sites:
        raise BadInput(f"{federation.sampling} asks fewer sites than min_sites={federation.min_sites} must answer")
    known = [f"{part}_{name}" for part in ("train", "test", "validation") for name in task.objective.metrics]
    if federation.stop is not None and federation.stop.metric not in known:
        raise BadInput(f"there is no metric {federation.stop.metric!r} to stop at; there are {', '.join(known)}")
    if federation.test is not None:
        try:
            task.check(federation.test)
        except BadInput as error:
            raise BadInput(f"the test set: {error}") from error
        if not len(federation.test):
            raise BadInput("the test set has no examples")
    if federation.start is not None:
        round_zero.classes(task)


def _check_enough(federation: Parts, enough: int) -> None:
    """What a round that does not wait for all sites rests on."""
    if enough < federation.min_sites:
        raise BadInput(f"enough={enough} sites end a round, and min_sites={federation.min_sites} must answer")
    if isinstance(federation.sampling, Fixed) and federation.sampling.size < enough:
        raise BadInput(f"{federation.sampling} asks fewer sites than enough={enough}; ask more, or leave `enough` out")
    if federation.collect.shows is Sight.SUM:
        raise UnsoundCombination(
            f"{federation.collect} reveals one sum, once all have answered or their time is over; leave `enough` out, "
            "or use Clear()"
        )
    if federation.privacy is not None and federation.privacy.central and federation.privacy.unit == "site":
        raise UnsoundCombination(
            f"with enough={enough} a site that answers early pushes another one out of the sum, which "
            f"{type(federation.privacy).__name__} has not reckoned with; leave `enough` out"
        )


def _check_aggregation(federation: Parts) -> None:
    rule, collect = federation.aggregation, federation.collect
    if rule.needs is Sight.EACH and collect.shows is Sight.SUM:
        raise UnsoundCombination(
            f"{rule} works on single updates, but {collect} reveals only their sum; use Clear() as the collect, or an "
            "algorithm and a rule that need no more than sums"
        )
    if federation.rule is not None and federation.algorithm.rule.needs is Sight.EACH:
        own = type(federation.algorithm).__name__
        raise UnsoundCombination(f"{own} aggregates in its own way, and not by {federation.rule}; leave `rule` out")
    if collect.shows is Sight.SUM:
        _check_sums(federation)


def _check_sums(federation: Parts) -> None:
    """What a collect that reveals only sums rests on."""
    rule, collect, encoding = federation.aggregation, federation.collect, federation.encoding
    if not isinstance(rule, Mean):
        raise UnsoundCombination(f"what {collect} reveals is a mean, which {rule} is not; use Mean()")
    if not encoding.linear:
        raise UnsoundCombination(
            f"{encoding} cannot be added up, but {collect} reveals only sums; use a linear encoding"
        )
    if federation.stages:
        raise UnsoundCombination(
            f"what {federation.stages} do to single updates on their arrival cannot be done to the sum that {collect} "
            "reveals; leave the stages out"
        )
    if federation.plan.cohort not in (None, 1):
        raise BadInput(f"under {collect} each site trains, and hides what it sends, by itself; leave Plan.cohort out")
    if federation.min_sites > collect.least:
        raise UnsoundCombination(
            f"once {collect} has revealed the sum of fewer than min_sites={federation.min_sites} sites it is too late; "
            f"leave min_sites out, and give least={federation.min_sites} to the collect"
        )
    if isinstance(federation.sampling, Fixed) and federation.sampling.size < collect.least:
        raise UnsoundCombination(
            f"{federation.sampling} asks fewer sites than the {collect.least} whose sum {collect} reveals; ask more"
        )
    privacy = federation.privacy
    if privacy is not None and privacy.central and scheme(federation.sampling) in ("poisson", "fixed"):
        raise UnsoundCombination(
            f"{federation.sampling} makes {type(privacy).__name__} stronger as nobody knows who was asked, and under "
            f"{collect} sites know each other, or sums of too few show it; use All() or Cyclic() sampling, or Clear()"
        )


def _check_algorithm(federation: Parts) -> None:
    algorithm, own = federation.algorithm, type(federation.algorithm).__name__
    if federation.stages and algorithm.kind == "value":
        raise UnsoundCombination(
            f"{own} sends values, which {federation.stages} would treat as differences; leave the stages out, or use "
            "an algorithm that sends differences"
        )
    if federation.stages and federation.start is not None:
        raise UnsoundCombination(
            f"{federation.start} collects sums of features, which {federation.stages} would not treat; leave `start` "
            "out"
        )
    if federation.plan.cohort not in (None, 1) and not algorithm.at_once:
        raise BadInput(f"{own} trains its sites one by one; leave Plan.cohort out")
    if algorithm.personal and federation.test is not None:
        raise BadInput(
            f"with {own} a part of the model stays at each site, so that only sites can evaluate; leave `test` out and "
            "set validate_at_sites"
        )


def _check_privacy(federation: Parts, privacy: Privacy) -> None:
    """What no guarantee allows."""
    own, algorithm = type(privacy).__name__, type(federation.algorithm).__name__
    privacy.check(scheme(federation.sampling))
    if privacy.whole is not None and not federation.collect.whole:
        raise UnsoundCombination(
            f"the noise of one site under {own} hides nothing by itself, and {federation.collect} makes no sum of "
            "whole numbers whose parts nobody sees; use SecureAggregation() as the collect, or LocalDP()"
        )
    if federation.validate_at_sites:
        raise UnsoundCombination(
            f"what sites measure on their own rows is a release that {own} does not cover; leave validate_at_sites out "
            "and give test examples to the coordinator"
        )
    if federation.algorithm.personal:
        raise UnsoundCombination(
            f"{algorithm} leaves a part of the model at each site, of which {own} says nothing; use an algorithm whose "
            "model is common to all"
        )
    if federation.start is not None:
        round_zero.ridge(federation.start)
    if not isinstance(federation.encoding, Float32):
        raise UnsoundCombination(
            f"what {federation.encoding} makes of an update that {own} has bounded is not bounded by anything; leave "
            "`encoding` out"
        )
    if federation.stages:
        raise UnsoundCombination(
            f"what {federation.stages} make of an update that {own} has bounded is not bounded by anything; leave the "
            "stages out"
        )


def _check_sites(federation: Parts, privacy: Privacy) -> None:
    """What a bound on one site's part in a sum rests on."""
    own, algorithm = type(privacy).__name__, federation.algorithm
    if federation.start is not None and not privacy.central and privacy.whole is None:
        raise UnsoundCombination(
            f"the sums of features of one site drown in the noise of {own}; leave `start` out, or use SiteLevel(), "
            "DistributedDP() or ExampleLevel()"
        )
    if not isinstance(federation.aggregation, Mean):
        raise UnsoundCombination(
            f"how much one site can move the result of {federation.aggregation} nobody has bounded; under {own} use an "
            "algorithm that takes the mean of differences, such as FedAvg or FFALoRA"
        )
    if algorithm.kind != "difference":
        raise UnsoundCombination(
            f"{type(algorithm).__name__} sends whole weights, with a weight that depends on the site's data, and {own} "
            "needs differences that all count alike; use FedAvg or FFALoRA"
        )
    if scheme(federation.sampling) == "cyclic" and not algorithm.steady:
        raise UnsoundCombination(
            f"what {type(algorithm).__name__} sends is not the same in all rounds, over which noise is correlated "
            "under Cyclic() sampling; use another algorithm, or another sampling"
        )
    if scheme(federation.sampling) == "poisson" and federation.min_sites > 1:
        raise UnsoundCombination(
            f"a round that is left out because fewer than min_sites={federation.min_sites} sites were drawn shows how "
            "many were; under Poisson sampling leave min_sites out"
        )


def _check_examples(federation: Parts, privacy: Privacy) -> None:
    """What DP-SGD at the sites needs."""
    algorithm = federation.algorithm
    if not algorithm.by_gradient:
        raise UnsoundCombination(
            f"{type(algorithm).__name__} does not learn by steps along gradients of single examples, which is where "
            f"{type(privacy).__name__} adds its noise; use SiteLevel(), or another algorithm"
        )
    if federation.plan.cohort not in (None, 1):
        raise BadInput(f"{type(privacy).__name__} trains sites one by one; leave Plan.cohort out")
    if algorithm.training.clip is not None:
        raise BadInput(
            f"Training.clip bounds the gradient of a batch, after the noise; {type(privacy).__name__}.clip is that of "
            "each example, so leave Training.clip out"
        )
