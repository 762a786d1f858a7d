"""Round zero in a federation: whatever the split, the head of the pooled rows."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import RidgeClassifier
from torch import nn

from fedelta.algorithms import round_zero
from fedelta.algorithms.fedavg import FedAvg
from fedelta.algorithms.federation import Federation
from fedelta.algorithms.sampling import Fixed
from fedelta.algorithms.stopping import Target
from fedelta.algorithms.tally import Tally
from fedelta.core import codec
from fedelta.core.errors import BadInput, TooFewSites, UnsoundCombination
from fedelta.core.examples import Examples
from fedelta.core.messages import Reply, Requests, Update
from fedelta.core.noise import SeededNoise
from fedelta.core.parameters import Parameters
from fedelta.core.program import Site, SiteData, run
from fedelta.data.tables import read_table, text_and_labels
from fedelta.fleet.local import Local
from fedelta.fleet.workers import Workers
from fedelta.learning.closed_form import LDA, Ridge, moments
from fedelta.learning.lora import LoRA
from fedelta.learning.objectives import Classification, Regression
from fedelta.learning.optimizers import SGD
from fedelta.learning.plan import Plan
from fedelta.learning.pretrained import Pretrained, tokenizer
from fedelta.learning.private_moments import PrivateMoments, row_sums
from fedelta.learning.task import Task
from fedelta.learning.text import encode
from fedelta.learning.training import Training
from small_task import plain_task, site_data

POOL = Examples.cat(list(site_data().values()))


def federation(task=None, **options):
    algorithm = FedAvg(task=task or plain_task(), training=Training(optimizer=SGD(lr=0.1)))
    return Federation(algorithm=algorithm, **{"rounds": 0, "start": LDA(shrinkage=0.1), "seed": 3, **options})


def head(program, sites) -> nn.Linear:
    ((state, _),) = run(program, Local(program, sites.__getitem__, list(sites)))
    return program.model(state)[-1]


@settings(max_examples=15)
@given(st.integers(0, 2**31), st.integers(1, 9), st.sampled_from([LDA(), LDA(shrinkage=0.3), Ridge()]))
def test_the_head_does_not_depend_on_the_split(seed, count, start):
    program = federation(start=start)
    g = torch.Generator().manual_seed(seed)
    parts = torch.tensor_split(torch.randperm(len(POOL), generator=g), count)
    found = head(program, {f"site-{i}": POOL[rows] for i, rows in enumerate(parts)})
    pooled = head(program, {"pooled": POOL})
    torch.testing.assert_close(found.weight, pooled.weight, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.bias, pooled.bias, rtol=1e-5, atol=1e-5)


def test_many_small_sites_lose_nothing_of_small_eigenvalues():
    """Features of scales from 10 to 1e-4: the moments of 500 sites of 3 rows are those of the pooled rows."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(1500, 8, generator=g).double() * torch.logspace(1, -4, 8).double()
    labels = torch.randint(0, 3, (1500,), generator=g)
    requests = Requests(to=[f"site-{i}" for i in range(500)], op="statistics", round=0)
    replies = [
        Reply.to_request(request, Update(values=moments(x, y, 3), kind="value", weight=3.0).to_tensors())
        for request, x, y in zip(requests, features.split(3), labels.split(3), strict=True)
    ]
    tally = Tally(cohort=requests.to)
    task = plain_task()
    total = round_zero.total(iter(replies), task, task.build(0), tally, min_sites=500)
    pooled = moments(features, labels, 3)
    assert total.weight == 1500
    torch.testing.assert_close(total.values.vector, pooled.vector, rtol=1e-10, atol=1e-13)


def test_it_is_scikit_learns_head_on_the_features_of_the_model_that_goes_out():
    program = federation()
    module = program.algorithm.task.build(program.seed)
    with torch.no_grad():
        features = module[:-1](POOL.inputs["x"])
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(features.double(), POOL.targets)
    found = head(program, site_data())
    torch.testing.assert_close(found.weight, torch.from_numpy(reference.coef_).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias, torch.from_numpy(reference.intercept_).float(), rtol=1e-4, atol=1e-4)


def test_a_model_that_is_nothing_but_a_head():
    task = Task(model=partial(nn.Linear, POOL.inputs["x"].shape[1], 3), objective=Classification(classes=3))
    program = federation(task, start=Ridge())
    ((state, _),) = run(program, Local(program, site_data().__getitem__, list(site_data())))
    reference = RidgeClassifier().fit(POOL.inputs["x"].double(), POOL.targets)
    found = program.model(state)
    torch.testing.assert_close(found.weight, torch.from_numpy(reference.coef_).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.bias, torch.from_numpy(reference.intercept_).float(), rtol=1e-4, atol=1e-4)


def test_one_round_before_the_first_of_all_sites_and_nothing_but_the_head_changes():
    sites = site_data()
    program = federation(rounds=2, sampling=Fixed(size=2), test=POOL, evaluate_every=2)
    fleet = Local(program, sites.__getitem__, list(sites))
    reports = []
    for state, report in run(program, fleet):
        reports.append(report)
        if report.round == 0:
            first, drawn = program.model(state), program.algorithm.task.build(program.seed)
    assert [report.round for report in reports] == [0, 1, 2]
    assert [len(report.cohort) for report in reports] == [4, 2, 2]
    assert torch.equal(first[0].weight, drawn[0].weight)
    assert not torch.equal(first[2].weight, drawn[2].weight)
    assert reports[0].metrics["test_accuracy"] > 0.7
    assert "train_loss" not in reports[0].metrics
    # 8 bytes for each of 3 counts, 3 sums of 8 features and 36 products; then weight and count
    assert reports[0].bytes_up == 4 * codec.size(
        {
            "value": torch.zeros(3 + 24 + 36, dtype=torch.float64),
            "weight": torch.tensor(1.0).double(),
            "count": torch.tensor(1.0).double(),
        }
    )


def test_it_continues_as_if_the_model_had_come_with_that_head():
    sites = site_data()
    with_start = federation(rounds=2)
    *_, (state, _) = run(with_start, Local(with_start, sites.__getitem__, list(sites)))
    zeroth = head(federation(), sites)

    def headed() -> nn.Module:
        module = plain_task().model()
        module[-1].load_state_dict(zeroth.state_dict())
        return module

    plain = federation(Task(model=headed, objective=Classification(classes=3)), rounds=2, start=None)
    *_, (expected, _) = run(plain, Local(plain, sites.__getitem__, list(sites)))
    assert torch.equal(state.algorithm.vector, expected.algorithm.vector)


def test_workers_give_the_same_bits():
    sites = site_data()
    program = federation(rounds=1)
    *_, (alone, _) = run(program, Local(program, sites.__getitem__, list(sites), threads=1))
    with Workers(program, sites.__getitem__, list(sites), workers=2, threads=1) as fleet:
        *_, (state, _) = run(program, fleet)
    assert torch.equal(state.algorithm.vector, alone.algorithm.vector)


def test_a_target_that_the_closed_form_reaches_ends_the_run():
    sites = site_data()
    program = federation(rounds=5, test=POOL, stop=Target(metric="test_accuracy", value=0.5))
    ((_, report),) = run(program, Local(program, sites.__getitem__, list(sites)))
    assert report.round == 0
    assert "test_accuracy reached" in report.stop


def test_a_site_without_rows_is_absent_and_too_few_end_the_run():
    sites = site_data()
    sites["site-1"] = sites["site-1"][:0]
    program = federation()
    ((_, report),) = run(program, Local(program, sites.__getitem__, list(sites)))
    assert report.absent == {"site-1": "this site has no training examples"}
    strict = replace(program, min_sites=4)
    with pytest.raises(TooFewSites, match=r"round 0: 3 of 4 sites answered and 4 must \(site-1: this site has no"):
        list(run(strict, Local(strict, sites.__getitem__, list(sites))))


class _Scaled(nn.Module):
    """Doubles the outputs of its last layer, so that they are not those of a linear layer on features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return 2 * self.layer(x)


class _Headless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, 3))

    def forward(self, x):
        return x @ self.weight


@dataclass(frozen=True)
class _Half:
    def on_site(self, update, site):
        return update

    on_arrival = on_total = staticmethod(lambda update: update)


def test_models_and_combinations_that_it_cannot_serve_are_refused():
    of = Classification(classes=3)
    with pytest.raises(BadInput, match="for classification, not for Regression"):
        federation(Task(model=plain_task().model, objective=Regression()))
    with pytest.raises(UnsoundCombination, match="would not treat; leave `start` out"):
        federation(stages=[_Half()])
    with pytest.raises(BadInput, match=r"has no bias, and LDA\(shrinkage=0.1\) needs one; use Ridge\(\)"):
        federation(Task(model=lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), objective=of)).init()
    with pytest.raises(BadInput, match="_Headless has no linear layer with 3 outputs"):
        federation(Task(model=_Headless, objective=of)).init()
    scaled = federation(Task(model=_Scaled, objective=of))
    with pytest.raises(TooFewSites, match="the outputs of _Scaled are not what its 'layer' makes of"):
        list(run(scaled, Local(scaled, site_data().__getitem__, list(site_data()))))
    biasless = federation(Task(model=lambda: nn.Sequential(nn.Linear(6, 3, bias=False)), objective=of), start=Ridge())
    assert head(biasless, site_data()).weight.abs().max() > 0


def test_minilm_on_real_news_gets_scikit_learns_head_in_one_round(shared, minilm):
    """Features whose plain covariance is singular: more of them than rows, and split by class."""
    table = read_table(shared("ag-news") / "test.csv", ["class", "title", "description"]).iloc[:120]
    texts, labels, names = text_and_labels(table, ["title", "description"], "class")
    rows = encode(texts, torch.from_numpy(labels), tokenizer(str(minilm)), 32)
    model = Pretrained(source=str(minilm), labels=names, tuning=LoRA())
    program = federation(Task(model=model, objective=Classification(classes=4)))
    sites = {f"site-{i}": rows[part] for i, part in enumerate(torch.tensor_split(rows.targets.argsort(), 5))}
    ((state, report),) = run(program, Local(program, sites.__getitem__, list(sites)))
    assert report.bytes_up < 1.01 * 5 * 8 * (384 * 385 // 2 + 4 * 385)
    body = program.algorithm.task.build(program.seed).get_base_model().bert
    with torch.no_grad():
        features = body(**rows.inputs).pooler_output.double()
    reference = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=0.1).fit(features, rows.targets)
    found = dict(program.model(state).named_parameters())
    weight, bias = (found[f"base_model.model.classifier.modules_to_save.default.{part}"] for part in ("weight", "bias"))
    scale = float(torch.from_numpy(reference.coef_).abs().max())
    torch.testing.assert_close(weight.double(), torch.from_numpy(reference.coef_), rtol=1e-4, atol=1e-4 * scale)
    torch.testing.assert_close(bias.double(), torch.from_numpy(reference.intercept_), rtol=1e-4, atol=1e-4 * scale)


def replied(private: PrivateMoments, sites, task) -> tuple[list[Reply], list[str]]:
    """What sites with these features and labels answer."""
    requests = Requests(to=[f"site-{i}" for i in range(len(sites))], op="statistics", round=0)
    classes = task.objective.classes
    return [
        Reply.to_request(request, private.at_site(x, y, classes, SeededNoise(7, request.to)).to_tensors())
        for request, (x, y) in zip(requests, sites, strict=True)
    ], list(requests.to)


@settings(max_examples=10)
@given(st.integers(0, 2**31), st.sampled_from(["site", "example"]))
def test_private_sums_and_their_noise_arrive_whole(seed, unit):
    g = torch.Generator().manual_seed(seed)
    sites = [(torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g)) for n in (1, 5, 40)]
    private = PrivateMoments(noise=3.0, unit=unit, site_norm=0.7)
    task = plain_task()
    replies, cohort = replied(private, sites, task)
    tally = Tally(cohort=cohort)
    found = round_zero.total(iter(replies), task, task.build(0), tally, 3, private, SeededNoise(9))
    expected = torch.zeros(found.values.layout.size, dtype=torch.float64)
    noises = [SeededNoise(7, party) for party in cohort] if unit == "example" else [SeededNoise(9)]
    for noise in noises:
        noise.add_normal(expected, 3.0)
    for x, y in sites:
        sums = row_sums(x, y, 3, private.feature_norm).vector
        mean = sums / len(y)
        expected += sums if unit == "example" else mean / max(0.7, float(mean.norm()))
    assert (found.weight, found.sums) == ((46.0, {"variance": 27.0}) if unit == "example" else (3.0, {"variance": 9.0}))
    torch.testing.assert_close(found.weight * found.values.vector, expected, rtol=1e-12, atol=1e-12)


def test_the_private_head_of_many_rows_is_near_the_plain_one_and_has_no_bias():
    task, private = plain_task(), PrivateMoments(noise=0.6, unit="example", feature_norm=4.0)
    module = task.build(3)
    sites = {name: Examples.cat([data] * 40) for name, data in site_data().items()}
    parameters = Parameters.of(module)
    requests = Requests(to=list(sites), op="statistics", round=0)
    replies = []
    for request in requests:
        at = Site(id=request.to, data=lambda name=request.to: SiteData(train=sites[name]))
        noise = SeededNoise(1, request.to)
        update = round_zero.statistics(task, parameters.vector, at, 3, Plan(), private, noise)
        replies.append(Reply.to_request(request, update.to_tensors()))
    found = round_zero.total(iter(replies), task, module, Tally(cohort=requests.to), 4, private)
    headed = round_zero.with_head(Ridge(), task, module, parameters, found, private)
    headed.load(module)
    assert not module[-1].bias.any()
    plain = head(federation(start=Ridge()), site_data())
    with torch.no_grad():
        features = module[:-1](POOL.inputs["x"])
        agreed = module[-1](features).argmax(dim=1) == plain(features).argmax(dim=1)
    assert agreed.double().mean() > 0.9


def test_sites_that_would_count_for_more_than_one_are_absent():
    task, private = plain_task(), PrivateMoments(noise=1.0, unit="site")
    replies, cohort = replied(private, [(torch.ones(4, 8), torch.zeros(4, dtype=torch.int64))] * 3, task)
    replies[0].body["value"].mul_(1.5)
    replies[1].body["weight"].fill_(2.0)
    tally = Tally(cohort=cohort)
    found = round_zero.total(iter(replies), task, task.build(0), tally, 1, private, SeededNoise(0))
    assert found.weight == 1.0
    assert "its norm is 1.5" in tally.absent["site-0"]
    assert "weight 2" in tally.absent["site-1"]


def test_lda_of_private_sums_is_refused():
    assert round_zero.ridge(Ridge(penalty=2.0)) == Ridge(penalty=2.0)
    with pytest.raises(UnsoundCombination, match=r"LDA\(shrinkage=None\) .*; use Ridge\(\)"):
        round_zero.ridge(LDA())
