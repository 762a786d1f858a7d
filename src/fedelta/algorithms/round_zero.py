"""Round zero: the head in closed form, from one round of sums over the features of the model as it is.

Every registered site is asked once, whatever the sampling of later rounds is; what it sends passes through the collect,
as an update does, and is added on a grid of its own, so that the head does not depend on how the rows are split.

Where the sums are to be private (`PrivateMoments`), each half adds the noise that is its own to add.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedelta.aggregation.mean import Mean
from fedelta.algorithms.tally import Tally, bodies
from fedelta.core.errors import BadInput, BadTensors, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.grid import halves, joined
from fedelta.core.messages import Replies, Reply, Update
from fedelta.core.noise import Noise
from fedelta.core.parameters import Layout, Parameters
from fedelta.core.program import Site
from fedelta.learning.closed_form import ClosedForm, Ridge, moments, moments_layout
from fedelta.learning.features import NoFeatures, check_features, feature_shape, features, head_layer
from fedelta.learning.objectives import Classification
from fedelta.learning.plan import Plan
from fedelta.learning.private_moments import PrivateMoments, private_layout
from fedelta.learning.structure import is_new
from fedelta.learning.task import Task

# LDA is a little better where rows are many; where they are few its posteriors are far too sure of themselves, which is
# a bad start for training.
USUAL: ClosedForm = Ridge()
RULE = Mean(bound=2.0**14)  # on means of products of two features, which may be larger than weights are


def check(start: ClosedForm, task: Task, module: nn.Module) -> None:
    """Raise BadInput if `start` cannot give `module` its head."""
    layer = _linear(module, head_layer(module, classes(task)))
    if layer.bias is None and start.needs_bias:
        raise BadInput(f"the head of {type(module).__name__} has no bias, and {start} needs one; use Ridge()")


def ridge(start: ClosedForm) -> Ridge:
    """`start`, which has to be Ridge where the sums are private. Raises UnsoundCombination for another."""
    if not isinstance(start, Ridge):
        raise UnsoundCombination(
            f"{start} inverts the covariance within classes, which does not stand the noise of privacy; use Ridge()"
        )
    return start


def check_private(private: PrivateMoments, task: Task, module: nn.Module) -> None:
    """Raise BadInput, before any site is asked, if what sites would send cannot be made private."""
    if private.discrete is not None:
        layer = _linear(module, head_layer(module, classes(task)))
        private.discrete(private_layout(classes(task), layer.in_features).size)


def usual(task: Task, examples: Examples, seed: int, plan: Plan) -> ClosedForm | None:
    """`USUAL` for a head that is new; None for one that is pre-trained, or that has no closed form.

    `examples` are a few that the model reads.
    """
    if not isinstance(task.objective, Classification):
        return None
    module = task.flat(seed, plan).module
    try:
        name = head_layer(module, classes(task))
        feature_shape(module, [name], examples, plan)
    except BadInput:
        return None
    return USUAL if is_new(module.get_submodule(name)) else None


def statistics(
    task: Task,
    parameters: Tensor,
    site: Site,
    seed: int,
    plan: Plan,
    private: PrivateMoments | None = None,
    noise: Noise | None = None,
) -> Update:
    """A site's half: the moments of its training examples under the broadcast model, weighted by their number.

    Where they are `private` they are as that says; `noise` is what a site draws from to hide single examples.
    """
    data = site.data().train
    task.check(data)
    if not len(data):
        raise BadInput("this site has no training examples")
    model, rows = task.flat_on(data, seed, plan)
    name = head_layer(model.module, classes(task))
    found = torch.empty(len(data), _linear(model.module, name).in_features)
    try:
        if private is not None:  # with its own weights: others could be chosen so that some rows pass and some do not
            model.load(Parameters(model.layout, task.initial(seed).vector))
            check_features(model.module, [name], rows, plan)
        model.load(Parameters(model.layout, parameters))
        features(model.module, [name], rows, plan, found, checked=private is None)
    except NoFeatures as error:
        raise BadInput(f"{error}, so that its head cannot be solved in closed form; leave `start` out") from error
    if private is not None:
        return private.at_site(found, data.targets, classes(task), noise)
    return Update(values=moments(found, data.targets, classes(task)), kind="value", weight=float(len(data)))


def total(
    replies: Iterator[Reply | Replies],
    task: Task,
    module: nn.Module,
    tally: Tally,
    min_sites: int,
    private: PrivateMoments | None = None,
    noise: Noise | None = None,
    summed: bool = False,
) -> Update:
    """The coordinator's half: the mean over all rows, and their number as its weight.

    Where they are `private` it is what that makes of it; `noise` is what a coordinator draws from to hide whole sites.
    `summed`: what arrives is the mean already. Raises TooFewSites if not as many as `min_sites` answered.
    """
    layout = sums_layout(task, module, private)
    updates = _arriving(replies, layout, tally, min_sites, private)
    mean = tally.only(updates) if summed else _mean(updates, layout, len(tally.cohort))
    return mean if private is None else private.on_total(mean, noise)


def with_head(
    start: ClosedForm,
    task: Task,
    module: nn.Module,
    parameters: Parameters,
    total: Update,
    private: PrivateMoments | None = None,
) -> Parameters:
    """`parameters`, a copy of them, with the head that the moments give. `module` has their layout.

    A head of `private` moments has a bias of zero. Raises UnsoundCombination if they do not go with `start`.
    """
    name = head_layer(module, classes(task))
    within = f"{name}." if name else ""  # a model may be nothing but its head
    intercept = f"{within}bias" in parameters
    if private is None:
        weight, bias = start.solve(total.values, total.weight, intercept)
    else:
        weight = private.solve(total, ridge(start).penalty)
        bias = weight.new_zeros(len(weight))
    headed = parameters.like(parameters.vector.clone())
    headed[f"{within}weight"].copy_(weight)
    if intercept:
        headed[f"{within}bias"].copy_(bias)
    return headed


def sums_layout(task: Task, module: nn.Module, private: PrivateMoments | None = None) -> Layout:
    """Of what a site sends. Raises BadInput for a task that is no classification."""
    layer = _linear(module, head_layer(module, classes(task)))
    return (moments_layout if private is None else private_layout)(classes(task), layer.in_features)


def classes(task: Task) -> int:
    """Raises BadInput for a task that is no classification."""
    if not isinstance(task.objective, Classification):
        raise BadInput(f"a head in closed form is for classification, not for {task.objective}; leave `start` out")
    return task.objective.classes


def _linear(module: nn.Module, name: str) -> nn.Linear:
    layer = module.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer


def _mean(updates: Iterator[Update], layout: Layout, cohort: int) -> Update:
    """Of `cohort` sites at most, each added in two parts."""
    coarse = RULE.resolution(cohort)
    mean = RULE((_halved(update, coarse) for update in updates), cohort)
    vector = joined(mean.values["coarse"], mean.values["fine"], coarse, RULE.bound)
    return replace(mean, values=Parameters(layout, vector))


def _halved(update: Update, coarse: float) -> Update:
    parts = dict(zip(("coarse", "fine"), halves(update.values.vector, coarse, RULE.bound), strict=True))
    return replace(update, values=Parameters(Layout.of(parts), torch.cat(list(parts.values()))))


def _arriving(
    replies: Iterator[Reply | Replies], layout: Layout, tally: Tally, min_sites: int, private: PrivateMoments | None
) -> Iterator[Update]:
    for reply in replies:
        for senders, body in bodies(reply, tally.absent):
            try:
                update = Update.from_tensors(body, layout)
                if update.kind != "value" or update.values.vector.dtype != torch.float64:
                    raise BadTensors(f"they are a {update.kind} in {update.values.vector.dtype}")
                fault = _shares(update) if private is None else private.refuse(update)
                if fault is not None:
                    raise BadTensors(fault)
            except BadTensors as error:
                tally.refuse(senders, f"its statistics are malformed: {error}")
                continue
            refusal = RULE.refuse(update) if private is None or private.discrete is None else None
            if refusal is not None:
                tally.refuse(senders, refusal)
                continue
            tally.accept(senders, update.count)
            yield update
    if tally.accepted < min_sites:
        raise TooFewSites(tally.shortage(0, min_sites))


def _shares(update: Update) -> str | None:
    shares = update.values["class_shares"]
    if not bool((shares >= 0).all()) or abs(float(shares.sum()) - 1) > 1e-9:
        return "its shares of the classes do not add up to 1"
    return None
