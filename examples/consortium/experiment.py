"""Heart disease at three hospitals, which train one model and show nobody their patients.

    fedelta join experiment.py --dry-run --name cleveland                  # at a hospital: what would leave it?
    fedelta run experiment.py --set COLLECT=clear --set DATA=heart-disease # a simulation, where all files are at hand

The UCI heart disease records (Janosi, Steinbrunn, Pfisterer, Detrano, 1988): 920 patients, 13 findings of each, and
whether a coronary vessel is narrowed. The parties are Cleveland, Hungary, and Switzerland together with the Veterans
Affairs hospital of Long Beach. DATA is a folder with the files of FILES, at a hospital with its own and no others.

Every fourth record is held back. What is missing takes the middle of MIDDLE_AND_SPREAD: round numbers that were chosen
beforehand and are not those of these patients, so that no hospital has to know anything of another. Updates are added
up under masks, and hospitals know each other by the keys in the folder IDENTITIES, in which each has put its own.
"""

import csv
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from fedelta import (
    SGD,
    Classification,
    Examples,
    FedAvg,
    Federation,
    Parameters,
    SecureAggregation,
    SiteData,
    Task,
    Training,
    identities,
)
from fedelta.core.errors import BadInput

DATA = "."
COLLECT = "masks"  # or "clear", which is for simulations: there hospitals have no keys
IDENTITIES = "identities"  # a folder with a public key NAME.pub of each hospital
ROUNDS = 20
LR = 0.1
FILES = {
    "cleveland": ["processed.cleveland.data"],
    "hungary": ["processed.hungarian.data"],
    "switzerland": ["processed.switzerland.data", "processed.va.data"],
}
COLUMNS = [
    "age",
    "sex",
    "cp",
    "trestbps",
    "chol",
    "fbs",
    "restecg",
    "thalach",
    "exang",
    "oldpeak",
    "slope",
    "ca",
    "thal",
]
MIDDLE_AND_SPREAD = {  # to which a value is shifted and scaled
    "age": (50, 10),  # years
    "trestbps": (130, 20),  # mmHg at rest; 0 is not measured
    "chol": (240, 50),  # mg/dl; 0 is not measured
    "thalach": (150, 25),  # beats a minute
    "oldpeak": (1, 1),  # mm
    "ca": (1, 1),  # vessels that fluoroscopy shows
}
KINDS = {  # a feature of 0 or 1 for each value; all are 0 where none is known
    "sex": (1,),
    "fbs": (1,),
    "exang": (1,),
    "cp": (1, 2, 3, 4),
    "restecg": (0, 1, 2),
    "slope": (1, 2, 3),
    "thal": (3, 6, 7),
}
FEATURES = len(MIDDLE_AND_SPREAD) + sum(map(len, KINDS.values()))


def program() -> Federation[Parameters]:
    """Logistic regression, as two outputs of one linear layer."""
    task = Task(model=partial(nn.Linear, FEATURES, 2), objective=Classification(classes=2))
    training = Training(optimizer=SGD(lr=LR), batch=16)
    algorithm = FedAvg(task=task, training=training)
    if COLLECT == "masks":
        collect = SecureAggregation(identities=identities(IDENTITIES))
        return Federation(algorithm=algorithm, rounds=ROUNDS, collect=collect, validate_at_sites=True)
    if COLLECT == "clear":
        return Federation(algorithm=algorithm, rounds=ROUNDS, validate_at_sites=True)
    raise BadInput(f"COLLECT is clear or masks, got {COLLECT!r}")


def sites() -> list[str]:
    return list(FILES)


def site(name: str) -> SiteData:
    rows = patients(Path(DATA), name)
    held_back = torch.arange(len(rows)) % 4 == 0
    return SiteData(train=rows[~held_back], validation=rows[held_back])


def patients(folder: Path, name: str) -> Examples:
    """The records of a hospital, in the order of its files."""
    records = []
    for file in FILES[name]:
        try:
            with open(folder / file, newline="") as lines:
                records += [dict(zip([*COLUMNS, "num"], map(number, line), strict=True)) for line in csv.reader(lines)]
        except OSError as error:
            raise BadInput(f"{folder / file} cannot be read: {error.strerror}; set DATA to the folder of it") from None
    sick = torch.tensor([record["num"] > 0 for record in records]).long()
    return Examples.of((torch.stack([features(record) for record in records]), sick))


def number(text: str) -> float:
    """NaN for what is missing."""
    return float("nan") if text == "?" else float(text)


def features(record: dict[str, float]) -> Tensor:
    found = []
    for name, (middle, spread) in MIDDLE_AND_SPREAD.items():
        value = record[name]
        missing = value != value or (value == 0 and name in ("trestbps", "chol"))
        found.append(0.0 if missing else (value - middle) / spread)
    return torch.tensor([*found, *(float(record[name] == kind) for name, kinds in KINDS.items() for kind in kinds)])
