"""How a table becomes sites: every row at one place, whatever the format, and no row of a site among the test rows."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import torch

from fedelta.cli.finetune_job import Data, FineTuning
from fedelta.core.errors import BadInput
from fedelta.learning.pretrained import tokenizer

CLASSES = ("bad", "dull", "good")
WARDS = ["10", "2", "9"]
# each text is another one, so that it tells the row
TEXTS = [f"the {a} {b}" for a in ("film", "plot", "story", "end") for b in ("was", "is", "not", "very", "a")]
TABLE = pandas.DataFrame(
    {
        "title": ["bright"] * 20,
        "text": TEXTS,
        "label": [CLASSES[row % 3] for row in range(20)],
        "ward": [int(WARDS[row % 3]) for row in range(19)] + [11],
    }
)
WRITERS: dict[str, Callable[[pandas.DataFrame, Path], object]] = {
    "t.csv": lambda rows, path: rows.to_csv(path, index=False),
    "t.tsv": lambda rows, path: rows.to_csv(path, index=False, sep="\t"),
    "t.parquet": lambda rows, path: rows.to_parquet(path),
    "t.jsonl": lambda rows, path: rows.to_json(path, orient="records", lines=True),
    "folder": lambda rows, path: datasets.Dataset.from_pandas(rows).save_to_disk(str(path)),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "t.csv"
    TABLE.to_csv(path, index=False)
    return path


def job(model: Path, data: Path, **options: Any) -> FineTuning:
    usual: dict[str, Any] = {
        "text": ("text",),
        "label": "label",
        "tune": "head",
        "rounds": 1,
        "epochs": 1,
        "batch": 8,
        "algorithm": "fedavg",
        "bf16": False,
    }
    return FineTuning(model=str(model), data=str(data), **{**usual, **options})


def words(model: Path, ids: torch.Tensor) -> list[str]:
    return [str(text) for text in tokenizer(str(model)).batch_decode(ids, skip_special_tokens=True)]


def texts_of_sites(read: Data, model: Path) -> dict[str, list[str]]:
    return {name: words(model, examples.inputs["input_ids"]) for name, examples in read.sites.items()}


def digests(read: Data) -> list[str]:
    """Of what each site has, and of the test set."""
    return [*read.sites, *(part.digest() for part in (*read.sites.values(), read.test) if part is not None)]


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_examples(bert: Path, data: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "again" / name
    path.parent.mkdir()
    WRITERS[name](TABLE, path)
    one, other = (job(bert, source, sites=3, alpha=1.0).read() for source in (data, path))
    assert digests(other) == digests(one)
    assert other.classes == one.classes == CLASSES
    label_of = dict(zip(TEXTS, TABLE["label"], strict=True))
    for site, texts in texts_of_sites(one, bert).items():
        assert [CLASSES[target] for target in one.sites[site].targets] == [label_of[text] for text in texts]


@pytest.mark.parametrize("split", [{"sites": 4}, {"sites": 4, "alpha": 0.5}, {"split_by": "ward"}])
@pytest.mark.parametrize("fraction", [0.0, 0.25])
def test_every_row_is_at_one_site_or_in_the_test_set(
    bert: Path, data: Path, split: dict[str, Any], fraction: float
) -> None:
    read = job(bert, data, test_fraction=fraction, **split).read()
    test = [] if read.test is None else words(bert, read.test.inputs["input_ids"])
    assert len(test) == 20 * fraction
    train = [text for texts in texts_of_sites(read, bert).values() for text in texts]
    assert sorted([*train, *test]) == sorted(TEXTS)


def test_the_seed_decides_the_split_and_the_test_rows(bert: Path, data: Path) -> None:
    drawn = [job(bert, data, sites=2, seed=seed).read() for seed in (1, 1, 2)]
    sites = [texts_of_sites(read, bert) for read in drawn]
    tests = [read.test.digest() for read in drawn if read.test is not None]
    assert sites[0] == sites[1] != sites[2]
    assert tests[0] == tests[1] != tests[2]


def test_natural_sites(bert: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    read = job(bert, data, split_by="ward", test_fraction=0.0).read()
    found = texts_of_sites(read, bert)
    assert list(found) == ["2", "9", "10", "11"]
    assert found["9"] == [text for row, text in enumerate(TEXTS[:19]) if row % 3 == 2]
    assert found["11"] == TEXTS[19:]
    assert capsys.readouterr().out == ""
    # a seed for which the only row of ward 11 is drawn for the test
    drawn = (job(bert, data, split_by="ward", seed=seed).read() for seed in range(100))
    assert list(next(read for read in drawn if "11" not in read.sites).sites) == ["2", "9", "10"]
    assert capsys.readouterr().out == "1 of 4 sites takes no part, all its rows being test rows: 11\n"


def test_test_rows_from_elsewhere(bert: Path, data: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "the end", "label": "good"}\n{"text": "dull", "label": "bad"}\n')
    read = job(bert, data, sites=2, test=str(other)).read()
    assert read.test is not None
    assert words(bert, read.test.inputs["input_ids"]) == ["the end", "dull"]
    assert read.test.targets.tolist() == [2, 0]
    assert sum(map(len, read.sites.values())) == 20


def test_the_test_split_of_the_same_data_set(bert: Path, tmp_path: Path) -> None:
    split = {name: datasets.Dataset.from_pandas(rows) for name, rows in (("train", TABLE), ("test", TABLE[:3]))}
    datasets.DatasetDict(split).save_to_disk(str(tmp_path / "both"))
    read = job(bert, tmp_path / "both", sites=2, test=f"{tmp_path}/./both").read()
    assert read.test is not None
    assert (sum(map(len, read.sites.values())), len(read.test)) == (20, 3)
    datasets.DatasetDict({"train": split["train"]}).save_to_disk(str(tmp_path / "one"))
    with pytest.raises(BadInput, match="has no split 'test'"):
        job(bert, tmp_path / "one", sites=2, test=str(tmp_path / "one")).read()


def test_texts_are_joined_and_cut(bert: Path, data: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.csv"
    TABLE.to_csv(bare, index=False, header=False)
    read = job(
        bert, bare, columns="title,text,label,ward", text=("title", "text"), sites=1, max_length=5, test_fraction=0
    ).read()
    expected = [" ".join(f"bright {text}".split()[:3]) for text in TEXTS]  # and two special tokens
    assert texts_of_sites(read, bert) == {"site-0": expected}
