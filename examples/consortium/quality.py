"""How good the consortium's model is on the records that hospitals hold back, and what there would be without it.

Only here are the records of all hospitals in one place, which in reality nobody has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from torch import nn

import experiment
from fedelta import Examples, Federation, Local, Parameters, run


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Of one model, on the held-back records of one hospital, or of all."""

    rows: int
    accuracy: float
    auc: float  # area under the ROC curve


@dataclass(frozen=True, kw_only=True)
class Records:
    train: dict[str, Examples]
    held_back: dict[str, Examples]

    @classmethod
    def read(cls, folder: Path) -> "Records":
        rows = {name: experiment.patients(folder, name) for name in experiment.sites()}
        fourth = {name: torch.arange(len(found)) % 4 == 0 for name, found in rows.items()}
        return cls(
            train={name: found[~fourth[name]] for name, found in rows.items()},
            held_back={name: found[fourth[name]] for name, found in rows.items()},
        )


def compare(data: Path, model: Path) -> dict[str, dict[str, Quality]]:
    """By what was trained on, then by whose held-back records; "all" are those of all hospitals."""
    records = Records.read(data)
    federated: nn.Module = in_the_clear().algorithm.task.build(0)
    federated.load_state_dict(load_file(model))
    models = {
        "the consortium": federated,
        **{f"{name} alone": trained([rows]) for name, rows in records.train.items()},
        "all records in one place": trained([*records.train.values()]),
    }
    return {name: measured(one, records) for name, one in models.items()}


def in_the_clear() -> Federation[Parameters]:
    experiment.COLLECT = "clear"
    return experiment.program()


def trained(parts: Sequence[Examples]) -> nn.Module:
    """What one party learns from these records, in as many epochs as the consortium has rounds."""
    federation = replace(in_the_clear(), validate_at_sites=False)
    *_, (state, _) = run(federation, Local(federation, lambda _name: Examples.cat(parts), ["one"]))
    return federation.model(state)


def measured(model: nn.Module, records: Records) -> dict[str, Quality]:
    found = {**records.held_back, "all": Examples.cat([*records.held_back.values()])}
    return {name: quality(model, rows) for name, rows in found.items()}


def quality(model: nn.Module, rows: Examples) -> Quality:
    with torch.inference_mode():
        sick = model.eval()(rows.inputs["x"]).softmax(dim=1)[:, 1]
    right = (sick > 0.5) == rows.targets.bool()
    return Quality(rows=len(rows), accuracy=float(right.float().mean()), auc=float(roc_auc_score(rows.targets, sick)))


def table(found: dict[str, dict[str, Quality]]) -> str:
    names = list(next(iter(found.values())))
    width = max(map(len, found)) + 2
    rows = next(iter(found.values()))
    lines = ["trained on".ljust(width) + "".join(f"{name} ({rows[name].rows})".rjust(20) for name in names)]
    for trained_on, by in found.items():
        cells = [f"{by[name].auc:.3f}  {by[name].accuracy:6.1%}" for name in names]
        lines.append(trained_on.ljust(width) + "".join(cell.rjust(20) for cell in cells))
    return "\n".join(lines)
