"""Tables from files, folders and the Hugging Face hub, and the texts, words and labels in them.

Limits: files are UTF-8. In csv and tsv every value is text as it stands there, "007" and "1.0" too, and only an empty
field is a missing value: "NA" and "None" are text, as they should be for sentences.
"""

import csv
import gzip
import json
import re
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from fedelta.core.errors import BadInput
from fedelta.data.files import CLASS, FILE, class_folders
from fedelta.data.hub import from_folder, from_hub, in_a_line
from fedelta.data.names import grouped, in_order, name_of

if TYPE_CHECKING:
    import pandas
    from datasets import Dataset

    from fedelta.data.names import Column

Rows = npt.NDArray[np.int64]

_HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_FORMATS = ".csv, .data (as csv), .tsv, .json, .jsonl, .ndjson (each also with .gz) and .parquet"


def read_table(
    source: str | Path, columns: Sequence[str] | None = None, *, split: str | None = None
) -> "pandas.DataFrame":
    """The table in `source`, with rows numbered from 0.

    `source`: a file in csv, tsv, json lines (or a json array of objects), each also gzipped, or parquet; a folder that
    `datasets.save_to_disk` wrote; or, where no such file exists, a name on the Hugging Face hub. `columns` names the
    columns of a csv or tsv file that has no header line. `split` is for folders and the hub: by default "train", or the
    only one. Columns of class ids (`ClassLabel`) become categories with the names of their classes.

    Raises BadInput, in one sentence, for whatever cannot be found or read.
    """
    path = Path(source).expanduser()
    kind = _kind(path)
    if columns is not None and (path.is_dir() or kind not in (".csv", ".data", ".tsv")):
        raise BadInput(f"{source} names its own columns; give column names only for csv or tsv files without a header")
    if path.is_dir():
        return _frame(from_folder(path, split))
    if not path.exists():
        if isinstance(source, Path) or kind in _READERS or not _HUB_NAME.fullmatch(source):
            raise BadInput(f"there is no file {str(source)!r}; check the path")
        return _frame(from_hub(source, split))
    if split is not None:
        raise BadInput(f"{source} is a file and has no splits, and {split!r} was asked for; leave the split out")
    if kind not in _READERS:
        raise BadInput(f"{source} has the suffix {path.suffix!r}; the formats known are {_FORMATS}")
    try:
        table = _READERS[kind](path, columns)
    except (ValueError, OSError, EOFError, zlib.error) as error:
        raise BadInput(f"{source} cannot be read as {kind.removeprefix('.')}: {in_a_line(error)}") from error
    return table.reset_index(drop=True)


def text_and_labels(
    table: "pandas.DataFrame",
    text: str | Sequence[str],
    label: str,
    classes: Sequence[str] | None = None,
) -> tuple[list[str], Rows, tuple[str, ...]]:
    """Texts[n], class indices[n] and the names of the classes: `texts_in` and `labels_in`."""
    for column in (*_several(text), label):
        check_column(table, column)
    return texts_in(table, text), *labels_in(table, label, classes)


def texts_in(table: "pandas.DataFrame", text: str | Sequence[str]) -> list[str]:
    """The text of each row; several columns are joined by a space.

    Raises BadInput for an unknown column, an empty table, missing values, or a blank text.
    """
    columns = _several(text)
    for column in columns:
        _check_rows(table, column)
        _check_complete(column, np.asarray(table[column].isna()))
    parts = [[str(value) for value in table[column]] for column in columns]
    texts = [" ".join(row) for row in zip(*parts, strict=True)]
    blank = next((row for row, joined in enumerate(texts) if not joined.strip()), None)
    if blank is not None:
        raise BadInput(f"the text in row {blank} (counted from 0) is blank; fill it in or drop the row")
    return texts


def labels_in(
    table: "pandas.DataFrame", label: str, classes: Sequence[str] | None = None
) -> tuple[Rows, tuple[str, ...]]:
    """Class indices[n] and the names of the classes, from a column.

    The classes are `classes` where given; the categories of a categorical column; otherwise the values there are,
    sorted (numbers as numbers). Labels are compared by name: 3, 3.0 and "3" are one class.

    Raises BadInput for an unknown column, an empty table, missing values, fewer than two classes, or a label outside
    `classes`.
    """
    _check_rows(table, label)
    if classes is None:
        classes = getattr(table[label].dtype, "categories", None)
    return _indexed(label, table[label], np.arange(len(table)), len(table), classes)


def words_and_tags(
    table: "pandas.DataFrame", words: str, tags: str, classes: Sequence[str] | None = None
) -> tuple[list[list[str]], list[list[int]], tuple[str, ...]]:
    """The words of each row, the class index of each word's tag, and the names of the classes, from columns of lists.

    The classes are as in `labels_in`. Raises BadInput for an unknown column, an empty table, a value that is no list of
    words or of tags, a row with another number of tags than words, a missing tag, fewer than two classes, or a tag
    outside `classes`.
    """
    texts, marks = (_lists(table, column) for column in (words, tags))
    for row, (own, given) in enumerate(zip(texts, marks, strict=True)):
        if not all(isinstance(word, str) for word in own):
            raise BadInput(f"column {words!r} has {_cut(own)} in row {row} (counted from 0), not a list of words")
        if len(own) != len(given):
            raise BadInput(
                f"row {row} (counted from 0) has {len(own)} words and {len(given)} tags; give one tag for each word"
            )
    if classes is None:
        classes = getattr(table[tags].iloc[0], "categories", None)
    lengths = [len(given) for given in marks]
    rows = np.repeat(np.arange(len(table)), lengths)
    indices, known = _indexed(tags, [tag for given in marks for tag in given], rows, len(table), classes)
    return texts, [part.tolist() for part in np.split(indices, np.cumsum(lengths)[:-1])], known


def class_table(folder: str | Path, what: str) -> "pandas.DataFrame":
    """A row for each file in the sub-folders of `folder`: its path within it as FILE, and its sub-folder as CLASS.

    Raises BadInput as `class_folders` does; `what` is "image" or "recording".
    """
    import pandas

    files, codes, classes = class_folders(folder, what)
    root = Path(folder).expanduser()
    names = pandas.Categorical.from_codes(codes, categories=pandas.Index(classes))
    return pandas.DataFrame({FILE: [str(file.relative_to(root)) for file in files], CLASS: names})


def _indexed(
    column: str, values: "Column", rows: Rows, count: int, classes: Iterable[object] | None
) -> tuple[Rows, tuple[str, ...]]:
    """The index of each value's class, and the names of the classes; `rows` says in which of `count` rows it is."""
    codes, names = grouped(values)
    _check_complete(column, np.bincount(rows[codes < 0], minlength=count) > 0)
    known = tuple(in_order(names) if classes is None else (name_of(value) for value in classes))
    if len(set(known)) != len(known):
        raise BadInput(f"the classes must be distinct, got {', '.join(map(repr, known))}")
    if len(known) < 2:
        given = f"the single class {known[0]!r}" if known else "no class"
        raise BadInput(f"column {column!r} has {given}; classification needs two or more")
    index = {name: position for position, name in enumerate(known)}
    indices = np.array([index.get(name, -1) for name in names], dtype=np.int64)[codes]
    unknown = np.flatnonzero(indices < 0)
    if len(unknown):
        raise BadInput(
            f"label {names[codes[unknown[0]]]!r} in row {rows[unknown[0]]} (counted from 0) is none of the classes "
            f"{_listed(known)}"
        )
    return indices, known


def _lists(table: "pandas.DataFrame", column: str) -> list[list[Any]]:
    _check_rows(table, column)
    for row, value in enumerate(table[column]):
        if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__") or not len(value):
            raise BadInput(
                f"column {column!r} has {_cut(value)} in row {row} (counted from 0), not a list with a value or more; "
                "give json lines, parquet or a data set with columns of lists"
            )
    return [list(value) for value in table[column]]


def _several(text: str | Sequence[str]) -> tuple[str, ...]:
    columns = (text,) if isinstance(text, str) else tuple(text)
    if not columns:
        raise BadInput("name at least one text column")
    return columns


def _check_rows(table: "pandas.DataFrame", column: str) -> None:
    check_column(table, column)
    if not len(table):
        raise BadInput("the table has no rows")


def check_column(table: "pandas.DataFrame", column: str) -> None:
    """Raise BadInput, with the closest name that there is, unless the table has this column."""
    if column in table.columns:
        return
    there = [str(name) for name in table.columns]
    close = get_close_matches(column, there, n=1)
    cure = f"did you mean {close[0]!r}?" if close else "if its file has no header line, name its columns"
    raise BadInput(f"the table has no column {column!r} but {_listed(there)}; {cure}")


def _check_complete(column: str, missing: npt.NDArray[np.bool_]) -> None:
    if missing.any():
        raise BadInput(
            f"column {column!r} has no value in {int(missing.sum())} of {len(missing)} rows, the first in row "
            f"{int(missing.argmax())} (counted from 0); fill them in or drop them"
        )


def _cut(value: object) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 40 else text[:37] + "..."


def _listed(names: Sequence[str]) -> str:
    """Names for a message, long ones cut (a file read without its header has sentences for names)."""
    shown = [repr(name if len(name) <= 40 else name[:37] + "...") for name in names[:12]]
    return ", ".join(shown) + (f", ... ({len(names)} in all)" if len(names) > 12 else "")


def _kind(path: Path) -> str:
    """The suffix that tells the format, in lower case and without .gz: ".csv" for "a.CSV.gz"."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix == ".gz" else suffix


def _open(path: Path) -> IO[str]:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_csv(path: Path, columns: Sequence[str] | None) -> "pandas.DataFrame":
    return _read_separated(path, columns, ",", csv.QUOTE_MINIMAL)


def _read_tsv(path: Path, columns: Sequence[str] | None) -> "pandas.DataFrame":
    # Many tsv files never quote, so that a text may begin with a lone quotation mark; taken as quoting, it would
    # swallow the lines up to the next one. Quotes count as quoting only if the whole file is well-formed that way.
    try:
        with _open(path) as file:
            for _ in csv.reader(file, delimiter="\t", strict=True):
                pass
        quoting = csv.QUOTE_MINIMAL
    except csv.Error:
        quoting = csv.QUOTE_NONE
    return _read_separated(path, columns, "\t", quoting)


def _read_separated(path: Path, columns: Sequence[str] | None, separator: str, quoting: Any) -> "pandas.DataFrame":
    import pandas

    with _open(path) as file, warnings.catch_warnings():
        # pandas only warns when a line has more fields than the header, and drops them.
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            table = pandas.read_csv(
                file,
                sep=separator,
                quoting=quoting,
                header="infer" if columns is None else None,
                index_col=False,
                dtype=str,  # guessed types would make "7" of "007"
                keep_default_na=False,
                na_values=[""],
            )
        except pandas.errors.ParserWarning as warning:
            raise ValueError("its lines have more fields than its header") from warning
    if columns is not None:
        if len(columns) != table.shape[1]:
            raise ValueError(f"it has {table.shape[1]} columns, and {len(columns)} names were given")
        if len(set(columns)) != len(columns):
            raise ValueError(f"column names must be distinct, got {_listed(columns)}")
        table.columns = pandas.Index(columns)
    return table


def _read_json(path: Path, columns: Sequence[str] | None) -> "pandas.DataFrame":
    import pandas

    # Not pandas.read_json, which guesses at types: "007" would become 7, and a column named "date" dates.
    with _open(path) as file:
        if _first_character(file) == "[":
            rows = json.load(file)
        else:
            rows = [_parsed(number, line) for number, line in enumerate(file, 1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("every row must be an object, with column names as its keys")
    return pandas.DataFrame(rows)


def _first_character(file: IO[str]) -> str:
    """The first character of `file` that is no white space, or nothing; leaves the file at its start."""
    character = " "
    while character.isspace():
        character = file.read(1)
    file.seek(0)
    return character


def _parsed(number: int, line: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number} is not a json object") from error


def _read_parquet(path: Path, columns: Sequence[str] | None) -> "pandas.DataFrame":
    import pandas

    return pandas.read_parquet(path)


_READERS: dict[str, Callable[[Path, Sequence[str] | None], "pandas.DataFrame"]] = {
    ".csv": _read_csv,
    ".data": _read_csv,  # as the UCI repository names its tables
    ".tsv": _read_tsv,
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".parquet": _read_parquet,
}


def _frame(dataset: "Dataset") -> "pandas.DataFrame":
    """A data set as a table; class ids become categories, in the order of the data set, and lists of them likewise."""
    import pandas
    from datasets import ClassLabel

    table: pandas.DataFrame = dataset.to_pandas()
    for name, feature in dataset.features.items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, ClassLabel):
            table[name] = _categories(table[name].fillna(-1), feature.names)
        elif isinstance(inner, ClassLabel):
            lists = [None if ids is None else _categories(ids, inner.names) for ids in table[name]]
            table[name] = pandas.Series(lists, dtype=object)
    return table


def _categories(ids: Any, names: list[str]) -> "pandas.Categorical[str]":
    import pandas

    return pandas.Categorical.from_codes(np.asarray(ids, dtype=np.int64), categories=pandas.Index(names))
