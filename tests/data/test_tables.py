"""Tables: every format gives what was written, and every mistake one clear sentence."""

import gzip
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.data.names import name_of
from fedelta.data.partition import by_column
from fedelta.data.tables import class_table, labels_in, read_table, text_and_labels, words_and_tags

TEXTS = [
    'He said "no", twice',
    "a comma, and\ttab",
    "two\nlines",
    "NA",
    "None",
    "  spaces kept ",
    "grüß dich, 你好",
    "007",
    '"',
]
TABLE = pandas.DataFrame({"text": TEXTS, "label": [3, 1, 2, 3, 1, 2, 3, 1, 2]})
WRITERS: dict[str, Callable[[Path], object]] = {
    "t.csv": lambda path: TABLE.to_csv(path, index=False),
    "t.CSV.GZ": lambda path: TABLE.to_csv(path, index=False, compression="gzip"),
    "t.tsv": lambda path: TABLE.to_csv(path, index=False, sep="\t"),
    "t.tsv.gz": lambda path: TABLE.to_csv(path, index=False, sep="\t"),
    "t.jsonl": lambda path: TABLE.to_json(path, orient="records", lines=True),
    "t.ndjson.gz": lambda path: TABLE.to_json(path, orient="records", lines=True),
    "lines.json": lambda path: TABLE.to_json(path, orient="records", lines=True),
    "array.json": lambda path: TABLE.to_json(path, orient="records", indent=1),
    "t.parquet": lambda path: TABLE.to_parquet(path),
    "filtered.parquet": lambda path: TABLE.set_axis(range(5, 14)).to_parquet(path),
    "folder": lambda path: datasets.Dataset.from_pandas(TABLE).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_what_was_written(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    WRITERS[name](path)
    for source in (path, str(path)):
        table = read_table(source)
        assert list(table.columns) == ["text", "label"]
        assert table["text"].tolist() == TEXTS
        assert table["label"].map(name_of).tolist() == [str(label) for label in TABLE["label"]]
        assert table.index.tolist() == list(range(9))


@given(
    st.lists(st.tuples(st.text(st.characters(exclude_characters="\t\r\n", codec="utf-8")), st.integers()), min_size=1)
)
def test_csv_and_tsv_give_any_text_back(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    table = pandas.DataFrame({"text": [f"x{text}" for text, _ in rows], "n": [str(n) for _, n in rows]})
    folder = tmp_path_factory.mktemp("round")
    for name, separator in (("t.csv", ","), ("t.tsv", "\t")):
        table.to_csv(folder / name, index=False, sep=separator)
        assert read_table(folder / name)["text"].tolist() == table["text"].tolist()


NUMERALS = {"text": ["007", "1e5", "1.0", "True", "+3", "inf"], "label": ["01", "02", "1", "10", "9", "02"]}


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
def test_numerals_are_texts_as_in_json(tmp_path: Path, name: str) -> None:
    table = pandas.DataFrame(NUMERALS)
    table.to_csv(tmp_path / name, index=False, sep="\t" if "tsv" in name else ",")
    table.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    read, other = read_table(tmp_path / name), read_table(tmp_path / "t.jsonl")
    pandas.testing.assert_frame_equal(read, other)
    texts, labels, classes = text_and_labels(read, "text", "label")
    assert texts == NUMERALS["text"]
    assert classes == ("01", "1", "02", "9", "10")  # in the order of the numbers
    assert [classes[label] for label in labels] == NUMERALS["label"]
    assert list(by_column(read["label"])) == list(by_column(other["label"]))


def test_an_empty_field_is_missing(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text,label\na,1\n,2\n")
    with pytest.raises(BadInput, match="'text' has no value in 1 of 2 rows, the first in row 1"):
        text_and_labels(read_table(tmp_path / "t.csv"), "text", "label")


def test_a_tsv_without_quoting_keeps_its_quotation_marks(tmp_path: Path) -> None:
    path = tmp_path / "t.tsv"
    path.write_text('label\ttext\n1\t"Tis the season\n2\tplain\n1\t"No" means no\n', encoding="utf-8")
    assert read_table(path)["text"].tolist() == ['"Tis the season', "plain", '"No" means no']


def test_columns_of_a_file_without_a_header(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text('"3","title","body"\n"4","title 2","body 2"\n', encoding="utf-8-sig")
    table = read_table(path, ["class", "title", "body"])
    assert table.to_dict("list") == {"class": ["3", "4"], "title": ["title", "title 2"], "body": ["body", "body 2"]}
    with pytest.raises(BadInput, match="has 3 columns, and 2 names"):
        read_table(path, ["class", "title"])
    with pytest.raises(BadInput, match="names must be distinct"):
        read_table(path, ["class", "title", "title"])


def test_ag_news(shared: Callable[[str], Path]) -> None:
    table = read_table(shared("ag-news/test.csv"), ["class", "title", "description"])
    texts, labels, classes = text_and_labels(table, ["title", "description"], "class")
    assert classes == ("1", "2", "3", "4")
    assert np.bincount(labels).tolist() == [1900] * 4
    assert texts[0].startswith("Fears for T N pension after talks Unions representing workers at Turner")
    with pytest.raises(BadInput, match=r"no column 'class'.*if its file has no header line, name its columns"):
        text_and_labels(read_table(shared("ag-news/test.csv")), "class", "class")


def test_json_lines_keep_their_values(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "007", "date": "2024-01-01", "n": 1}\n\n {"id": "1", "n": 2}\n', encoding="utf-8-sig")
    assert read_table(path).astype(object).where(lambda table: table.notna(), None).to_dict("list") == {
        "id": ["007", "1"],
        "date": ["2024-01-01", None],
        "n": [1, 2],
    }


def test_a_saved_folder_with_splits(tmp_path: Path) -> None:
    names = datasets.ClassLabel(names=["sports", "business", "arts"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    split = {
        "train": datasets.Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features),
        "test": datasets.Dataset.from_dict({"text": ["c"], "label": [-1]}, features),
    }
    datasets.DatasetDict(split).save_to_disk(str(tmp_path / "both"))
    datasets.DatasetDict({"test": split["train"]}).save_to_disk(str(tmp_path / "one"))

    texts, labels, classes = text_and_labels(read_table(tmp_path / "both"), "text", "label")
    # The order is the data set's, and classes that this split lacks are classes all the same.
    assert (texts, labels.tolist(), classes) == (["a", "b"], [2, 0], ("sports", "business", "arts"))
    assert read_table(tmp_path / "one")["label"].tolist() == ["arts", "sports"]
    with pytest.raises(BadInput, match="'label' has no value in 1 of 1 rows"):
        text_and_labels(read_table(tmp_path / "both", split="test"), "text", "label")
    with pytest.raises(BadInput, match="no split 'dev'; it has 'train', 'test'"):
        read_table(tmp_path / "both", split="dev")


def test_what_cannot_be_found(tmp_path: Path) -> None:
    for missing in (tmp_path / "t.csv", tmp_path / "name", str(tmp_path / "name"), "nowhere.jsonl.gz", "./nowhere"):
        with pytest.raises(BadInput, match="there is no file"):
            read_table(missing)
    for name in ("nobody/has-this-data-set", "has-this"):
        with pytest.raises(BadInput, match="from the Hugging Face hub, and no file or folder has this name"):
            read_table(name)
    with pytest.raises(BadInput, match=r"is not a folder that datasets\.save_to_disk wrote"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b"", "cannot be read as csv"),
        ("t.csv", b"a,b\n1,2\n1,2,3\n", "Expected 2 fields in line 3, saw 3"),
        ("t.csv", b"a,b\n1,2,3\n4,5,6\n", "more fields than its header"),
        ("t.csv", b"a,b\n\xff,2\n", "utf-8"),
        ("t.tsv", b"a\tb\n\xff\t2\n", "cannot be read as tsv"),
        ("t.csv.gz", b"a,b\n1,2\n", "cannot be read as csv"),
        ("t.csv.gz", gzip.compress(b"a,b\n1,2\n" * 1000, mtime=0)[:-20], "cannot be read as csv"),
        ("t.jsonl", b'{"a": 1}\n\n{"a": \n', "cannot be read as jsonl: line 3 is not"),
        ("t.jsonl", b"1\n2\n", "every row must be an object"),
        ("t.json", b'[{"a": 1},\n{"a": ]', "cannot be read as json: .* line 2"),
        ("t.json", b'["a", "b"]', "every row must be an object"),
        ("t.parquet", b"a,b\n1,2\n", "cannot be read as parquet"),
        ("t.xlsx", b"PK", r"suffix '.xlsx'; the formats known are .csv"),
        ("t", b"a,b\n1,2\n", "suffix ''; the formats known are .csv"),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=message) as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_arguments_that_do_not_fit_the_source(tmp_path: Path) -> None:
    WRITERS["t.parquet"](tmp_path / "t.parquet")
    with pytest.raises(BadInput, match="names its own columns"):
        read_table(tmp_path / "t.parquet", ["text", "label"])
    with pytest.raises(BadInput, match="is a file and has no splits, and 'test'"):
        read_table(tmp_path / "t.parquet", split="test")


LABELS: list[tuple[object, list[int], tuple[str, ...]]] = [
    ([10, 9, 10], [1, 0, 1], ("9", "10")),
    ([10.0, -9.0, 10.0], [1, 0, 1], ("-9", "10")),
    (["10", "9", "10"], [1, 0, 1], ("9", "10")),
    ([0.5, 10.0, 9.0], [0, 2, 1], ("0.5", "9", "10")),
    ([True, False, True], [1, 0, 1], ("False", "True")),
    (["spam", "ham", "spam"], [1, 0, 1], ("ham", "spam")),
    (pandas.array([2, 1, 2], dtype="Int8"), [1, 0, 1], ("1", "2")),
    (pandas.Categorical(["x", "y", "x"], categories=["z", "y", "x"]), [2, 1, 2], ("z", "y", "x")),
    (pandas.Series([1, "1", "b"], dtype=object), [0, 0, 1], ("1", "b")),
]


@pytest.mark.parametrize(("values", "indices", "classes"), LABELS, ids=lambda value: str(value).replace("\n", " "))
def test_labels_of_any_dtype(values: object, indices: list[int], classes: tuple[str, ...]) -> None:
    table = pandas.DataFrame({"text": ["a", "b", "c"], "label": values})
    texts, labels, found = text_and_labels(table, "text", "label")
    assert (texts, labels.tolist(), found) == (["a", "b", "c"], indices, classes)
    assert labels.dtype == np.int64


def test_given_classes() -> None:
    table = pandas.DataFrame({"text": ["a", "b", "c"], "label": [2, 7, 2]})
    _, labels, classes = text_and_labels(table, "text", "label", ["7", "1", "2"])
    assert (labels.tolist(), classes) == ([2, 0, 2], ("7", "1", "2"))
    with pytest.raises(BadInput, match=r"label '7' in row 1 \(counted from 0\) is none of the classes '1', '2'"):
        text_and_labels(table, "text", "label", ["1", "2"])
    with pytest.raises(BadInput, match="must be distinct"):
        text_and_labels(table, "text", "label", ["2", "7", "2"])
    with pytest.raises(BadInput, match="two or more"):
        text_and_labels(table, "text", "label", [])


def test_several_text_columns_of_any_dtype() -> None:
    table = pandas.DataFrame({"title": ["A", "B"], "year": [1999, 2001], "label": ["x", "y"]})
    assert text_and_labels(table, ("year", "title"), "label")[0] == ["1999 A", "2001 B"]
    with pytest.raises(BadInput, match="at least one text column"):
        text_and_labels(table, (), "label")


def test_mistakes_in_a_table() -> None:
    table = pandas.DataFrame(
        {"text": ["a", "b", None, None], "label": ["x", None, "y", " "], "same": 1, "full": "word"}
    )
    with pytest.raises(BadInput, match=r"no column 'txt' but 'text', 'label', 'same', 'full'; did you mean 'text'\?"):
        text_and_labels(table, "txt", "label")
    with pytest.raises(BadInput, match=r"did you mean 'label'\?"):
        text_and_labels(table, "text", "labels")
    with pytest.raises(
        BadInput, match=r"column 'text' has no value in 2 of 4 rows, the first in row 2 \(counted from 0\)"
    ):
        text_and_labels(table, "text", "same")
    with pytest.raises(BadInput, match="column 'label' has no value in 2 of 4 rows, the first in row 1"):
        text_and_labels(table, "full", "label")
    with pytest.raises(BadInput, match="single class '1'"):
        text_and_labels(table, "full", "same")
    with pytest.raises(BadInput, match="no rows"):
        text_and_labels(table[:0], "text", "label")
    blank = pandas.DataFrame({"title": ["a", " "], "text": ["b", ""], "label": [1, 2]})
    with pytest.raises(BadInput, match=r"the text in row 1 \(counted from 0\) is blank"):
        text_and_labels(blank, ["title", "text"], "label")
    wide = pandas.DataFrame({f"{'long ' * 20}{number}": [1] for number in range(50)})
    with pytest.raises(BadInput, match=r"50 in all") as caught:
        text_and_labels(wide, "text", "label")
    assert len(str(caught.value)) < 800


WORDS = [["the", "old", "film"], ["it", "ended"]]
TAGS = [["o", "x", "o"], ["y", "o"]]


@pytest.mark.parametrize("name", ["t.jsonl", "t.parquet", "folder"])
def test_words_and_their_tags(tmp_path: Path, name: str) -> None:
    table = pandas.DataFrame({"words": WORDS, "tags": TAGS})
    if name == "folder":
        datasets.Dataset.from_pandas(table).save_to_disk(str(tmp_path / name))
    else:
        writer = (
            table.to_parquet if name == "t.parquet" else lambda path: table.to_json(path, orient="records", lines=True)
        )
        writer(tmp_path / name)
    found = words_and_tags(read_table(tmp_path / name), "words", "tags")
    assert found == (WORDS, [[0, 1, 0], [2, 0]], ("o", "x", "y"))
    assert words_and_tags(table, "words", "tags", ["y", "o", "x", "z"])[1:] == (
        [[1, 2, 1], [0, 1]],
        ("y", "o", "x", "z"),
    )


def test_tags_that_are_class_ids_keep_their_names_and_order(tmp_path: Path) -> None:
    tag = datasets.ClassLabel(names=["y", "x", "o", "unused"])
    features = datasets.Features({"words": [datasets.Value("string")], "tags": datasets.Sequence(tag)})
    ids = [[tag.str2int(name) for name in own] for own in TAGS]
    datasets.Dataset.from_dict({"words": WORDS, "tags": ids}, features).save_to_disk(str(tmp_path / "saved"))
    found = words_and_tags(read_table(tmp_path / "saved"), "words", "tags")
    assert found == (WORDS, ids, ("y", "x", "o", "unused"))


MISTAKES: list[tuple[dict[str, list[object]], str]] = [
    (
        {"words": ["the old film", "it ended"]},
        "column 'words' has 'the old film' in row 0 .*, not a list .*; give json",
    ),
    ({"words": [["a", "b", "c"], []]}, r"column 'words' has \[\] in row 1"),
    ({"words": [["a", "b", "c"], None]}, "column 'words' has None in row 1"),
    ({"words": [["a", "b", "c"], ["d", 2]]}, r"column 'words' has \['d', 2\] in row 1 .*, not a list of words"),
    ({"tags": [["o", "x", "o"], ["y"]]}, r"row 1 \(counted from 0\) has 2 words and 1 tags; give one tag"),
    ({"tags": [["o", "x", "o"], ["y", None]]}, "column 'tags' has no value in 1 of 2 rows, the first in row 1"),
    ({"tags": [["o", "o", "o"], ["o", "o"]]}, "column 'tags' has the single class 'o'"),
    ({"tag": TAGS}, "did you mean 'tag'"),
]


@pytest.mark.parametrize(("columns", "message"), MISTAKES)
def test_mistakes_in_words_and_tags(columns: dict[str, list[object]], message: str) -> None:
    usual = {"words": WORDS, "tags": TAGS} if "tag" not in columns else {"words": WORDS}
    with pytest.raises(BadInput, match=message):
        words_and_tags(pandas.DataFrame({**usual, **columns}), "words", "tags")


def test_a_tag_that_is_none_of_the_classes_is_refused() -> None:
    table = pandas.DataFrame({"words": WORDS, "tags": TAGS})
    with pytest.raises(BadInput, match=r"label 'y' in row 1 \(counted from 0\) is none of the classes 'o', 'x'"):
        words_and_tags(table, "words", "tags", ["o", "x"])


def test_a_folder_of_classes_is_a_table_of_files(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/deep/3.png", "a/1.png", "README", "a/.hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    table = class_table(tmp_path, "image")
    assert table["file"].tolist() == ["a/1.png", "b/2.png", "b/deep/3.png"]
    assert table["class"].tolist() == ["a", "b", "b"]
    indices, classes = labels_in(table[1:], "class")  # a class without rows is a class all the same
    assert (indices.tolist(), classes) == ([1, 1], ("a", "b"))
    with pytest.raises(BadInput, match="has 0 sub-folders"):
        class_table(tmp_path / "a", "image")
