"""`fedelta stats`, from files to what is shown."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas
import pytest
from tests.cli.in_process import Fedelta, fedelta

__all__ = ["fedelta"]

HEART = "age,sex,cp,trestbps,chol,fbs,restecg,thalach,exang,oldpeak,slope,ca,thal,num"


@pytest.fixture
def clinics(tmp_path: Path) -> list[str]:
    """The --site options of three tables, each of 40 rows."""
    generator, options = np.random.default_rng(0), []
    for name in ("north", "south", "west"):
        table = pandas.DataFrame(
            {
                "age": generator.integers(20, 90, 40).astype(str),
                "bmi": generator.normal(26, 4, 40).round(1).astype(str),
                "smoker": generator.choice(["yes", "no", "?"], 40),
                "note": [f"note {row} of {name}" for row in range(40)],
                "ill": generator.choice(["0", "1"], 40),
            }
        )
        table.loc[3, "bmi"] = "NA"
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        options += ["--site", f"{name}={tmp_path / name}.csv"]
    return options


def pooled(tmp_path: Path) -> pandas.DataFrame:
    return pandas.concat([pandas.read_csv(tmp_path / f"{name}.csv") for name in ("north", "south", "west")])


def test_the_hospitals_are_as_pandas_has_them(fedelta: Fedelta, shared: Callable[[str], Path], tmp_path: Path) -> None:
    folder = shared("heart-disease")
    names = ["cleveland", "hungarian", "switzerland", "va"]
    sites = [part for name in names for part in ("--site", f"{name}={folder}/processed.{name}.data")]
    printed = fedelta("stats", *sites, "--columns", HEART, "--label", "num", "--json", tmp_path / "found.json")
    assert "920 rows at 4 sites: cleveland, hungarian, switzerland, va" in printed
    assert "missing: 1,759 of 12,880 values (13.7%)" in printed
    found = json.loads((tmp_path / "found.json").read_text())["columns"]
    tables = [
        pandas.read_csv(folder / f"processed.{name}.data", header=None, names=HEART.split(","), na_values="?")
        for name in names
    ]
    table = pandas.concat(tables)
    for name, column in table.items():
        own, values = found[name], column.dropna().to_numpy(dtype=np.float64)
        assert (own["missing"], own["within"]) == (column.isna().sum(), len(values))
        assert own["mean"] == pytest.approx(column.mean(), rel=1e-14)
        assert own["standard_deviation"] == pytest.approx(column.std(), rel=1e-14)
        for q, quantile in own["quantiles"].items():
            assert (quantile["up_to"], quantile["exact"]) == (
                np.quantile(values, float(q), method="inverted_cdf"),
                True,
            )
    assert found["num"]["values"] == {"0": 411, "1": 265, "2": 109, "3": 107, "4": 28}


def test_what_is_printed(fedelta: Fedelta, clinics: list[str], tmp_path: Path) -> None:
    printed = fedelta("stats", *clinics, "--categories", "smoker=yes,no", "--label", "ill", "--quantiles", "0.5")
    table = pooled(tmp_path)
    assert "120 rows at 3 sites: north, south, west" in printed
    assert "The coordinator saw sums over 3 sites" in printed
    assert f"1  {(table['ill'] == 1).sum():>9}" in printed
    assert f"yes: {(table['smoker'] == 'yes').sum()}" in printed
    assert "bmi             3    2.5%" in printed
    assert "note is text, and no values of it are declared: give --categories note=A,B,…" in printed
    age = next(line.split() for line in printed.splitlines() if line.startswith("age "))
    assert age[1] == "120"
    assert float(age[4]) == np.quantile(table["age"], 0.5, method="inverted_cdf")


def test_one_table_divided_by_a_column(fedelta: Fedelta, clinics: list[str], tmp_path: Path) -> None:
    tables = [pandas.read_csv(option.partition("=")[2], dtype=str).assign(where=option[:4]) for option in clinics[1::2]]
    pandas.concat(tables).to_csv(tmp_path / "all.csv", index=False)
    arguments = ("--only", "age,bmi", "--json")
    fedelta("stats", "--data", tmp_path / "all.csv", "--by", "where", *arguments, tmp_path / "a.json")
    fedelta("stats", *clinics, *arguments, tmp_path / "b.json")
    one, other = (json.loads((tmp_path / name).read_text()) for name in ("a.json", "b.json"))
    assert one["sites"] == ["nort", "sout", "west"]
    assert one["columns"] == other["columns"]


def test_files_without_a_header(fedelta: Fedelta, clinics: list[str], tmp_path: Path) -> None:
    for option in clinics[1::2]:
        path = Path(option.partition("=")[2])
        path.write_text(path.read_text().partition("\n")[2])
    printed = fedelta("stats", *clinics, "--no-header", "--only", "1,2", "--label", "5")
    assert "label 5" in printed
    printed = fedelta("stats", *clinics, "--columns", "a,b,c,d,e", "--label", "e")
    assert "label e" in printed


def test_a_figure(fedelta: Fedelta, clinics: list[str], tmp_path: Path) -> None:
    plot = tmp_path / "stats.png"
    assert str(plot) in fedelta("stats", *clinics, "--label", "ill", "--clear", "--plot", plot)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_with_noise_and_a_ledger(fedelta: Fedelta, clinics: list[str], tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    asked = ["stats", *clinics, "--only", "age,ill", "--range", "age=0:120", "--categories", "ill=0,1"]
    printed = fedelta(*asked, "--epsilon", 4, "--ledger", ledger, "--json", tmp_path / "found.json")
    assert "Privacy: each row is protected from the coordinator" in printed
    assert "as long as 2 sites" in printed
    assert "epsilon 4 at delta 1e-05" in printed
    assert "Nothing remembers" not in printed
    found = json.loads((tmp_path / "found.json").read_text())
    assert abs(found["rows"] - 120) < 6 * found["privacy"]["noise"]
    (spent,) = re.findall(r"each row: epsilon (\S+) at delta 1e-05", fedelta("ledger", ledger))
    assert 3.9 <= float(spent) <= 4
    assert "all but a trace of epsilon 4" in fedelta(*asked, "--epsilon", 4, "--ledger", ledger, status=2)
    assert "about" in fedelta(*asked, "--epsilon", 6, "--ledger", ledger)
    assert "Nothing remembers what was spent" in fedelta(*asked, "--epsilon", 4)


def test_what_shares_six_digits_or_a_name_is_told_apart(fedelta: Fedelta, tmp_path: Path) -> None:
    sites = []
    for name in "abc":
        table = pandas.DataFrame({"day": range(20230101, 20230110), "kind": ["other"] * 4 + ["x"] * 5})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
        sites += ["--site", f"{name}={tmp_path / name}.csv"]
    asked = ("--categories", "kind=other,k", "--quantiles", "0.1234567,0.1234568", "--plot", tmp_path / "a.svg")
    printed = fedelta("stats", *sites, *asked)
    assert "20230101: 3 (11.1%),  20230102: 3 (11.1%)" in printed
    assert "other: 12 (44.4%),  k: 0 (0.0%),  (other): 15 (55.6%)" in printed
    assert "12.34567%   12.34568%" in printed
    assert re.search("20230101 █+ 20230109", printed)


def test_lists_are_refused_in_a_sentence(fedelta: Fedelta, tmp_path: Path) -> None:
    sites = []
    for name in "abc":
        pandas.DataFrame({"x": [[1], [2]]}).to_parquet(tmp_path / f"{name}.parquet")
        sites += ["--site", f"{name}={tmp_path / name}.parquet"]
    assert "column 'x' has lists in it" in fedelta("stats", *sites, "--range", "x=0:1", status=2)


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_categories_are_those_of_all_sites_in_any_order(fedelta: Fedelta, tmp_path: Path, order: str) -> None:
    values = {"a": ["u", "v"], "b": ["t", "10"], "c": ["9", "u"]}
    sites = []
    for name in order:
        table = pandas.DataFrame({"x": pandas.Categorical(values[name]), "y": [1, 2] if name == "a" else ["1", "?"]})
        table.to_parquet(tmp_path / f"{name}.parquet")
        sites += ["--site", f"{name}={tmp_path / name}.parquet"]
    fedelta("stats", *sites, "--json", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["columns"]
    assert list(found["x"]["counts"].items()) == [("9", 1), ("10", 1), ("t", 1), ("u", 2), ("v", 1)]
    assert (found["x"]["other"], found["y"]["missing"], found["y"]["within"]) == (0, 2, 4)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give the sites' tables"),
        (("--data", "a.csv"), "--data needs --by COLUMN"),
        (("--by", "a", "--site", "a=a.csv"), "--by is for --data"),
        (("--site", "a=a.csv", "--data", "a.csv", "--by", "x"), "leave one of them out"),
        (("--site", "a"), "NAME=FILE"),
        (("--site", "a=nowhere.csv"), "there is no file 'nowhere.csv'"),
        (("CLINICS", "--only", "agee"), "did you mean 'age'?"),
        (("CLINICS", "--label", "agee"), "no column 'agee'"),
        (("CLINICS", "--range", "age=1"), "COLUMN=LOW:HIGH"),
        (("CLINICS", "--range", "age=9:1"), "to a larger one"),
        (("CLINICS", "--range", "smoker=0:1"), "site north: column 'smoker' is of numbers and has"),
        (("CLINICS", "--range", "age=0:1", "--categories", "age=1,2"), "two declarations"),
        (("CLINICS", "--label", "smoker"), "the label 'smoker' is text"),
        (("CLINICS", "--missing", "?"), "column 'bmi' has 'NA' at north, and numbers mostly"),
        (("CLINICS", "--only", "age", "--range", "bmi=0:1"), "not among --only"),
        (("CLINICS", "--no-header"), "'age' at north, and numbers mostly"),
        (("CLINICS", "--quantiles", "0.5,a"), "not a list of numbers"),
        (("CLINICS", "--quantiles", "1"), "above 0 and below 1"),
        (("CLINICS", "--delta", "0.1"), "--delta has no effect without --epsilon"),
        (("CLINICS", "--ledger", "l"), "--ledger has no effect without --epsilon"),
        (("CLINICS", "--epsilon", "1"), "'age' has none; give --range age=LOW:HIGH"),
        (("CLINICS", "--plot", "a.txt"), "png, svg or pdf"),
        (("CLINICS", "--json", "nowhere/a.json"), "there is no folder nowhere for --json nowhere/a.json; make it"),
        (("CLINICS", "--plot", "nowhere/a.png"), "there is no folder nowhere for --plot nowhere/a.png; make it"),
        (("CLINICS", "--only", "age", "--range", "age=0:120", "--epsilon", "1e-6"), "raise epsilon, or look at fewer"),
        (("CLINICS", "--bin", "3"), "--bins"),
        (("ONE",), "there is 1 site"),
        (("TWO",), "with --clear"),
        (("CLINICS", "--site", "north=a.csv"), "'north' is given twice"),
    ],
)
def test_what_cannot_be_done_is_said_in_a_sentence(
    fedelta: Fedelta, clinics: list[str], arguments: tuple[str, ...], said: str
) -> None:
    stands = {"CLINICS": clinics, "ONE": clinics[:2], "TWO": clinics[:4]}
    given = [part for argument in arguments for part in stands.get(argument, [argument])]
    assert said in fedelta("stats", *given, status=2)


def test_tables_that_differ_are_refused(fedelta: Fedelta, clinics: list[str], tmp_path: Path) -> None:
    pandas.read_csv(tmp_path / "west.csv").drop(columns="bmi").to_csv(tmp_path / "west.csv", index=False)
    assert "west has no column 'bmi', and north has" in fedelta("stats", *clinics, status=2)


def test_a_header_that_is_none_is_noticed(fedelta: Fedelta, tmp_path: Path) -> None:
    (tmp_path / "a.data").write_text("1,2\n3,4\n")
    assert "give --no-header" in fedelta("stats", "--site", f"a={tmp_path}/a.data", status=2)


def test_two_sites_in_the_clear(fedelta: Fedelta, clinics: list[str]) -> None:
    printed = fedelta("stats", *clinics[:4], "--clear", "--only", "age")
    assert "80 rows at 2 sites" in printed
    assert "The coordinator saw what each site counts" in printed
