"""Chained files hold whatever their kind says; privacy/test_ledger.py puts the chain itself to the test."""

from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedelta.core.chain import ChainFile, Kind, Seal, is_signed, read_all
from fedelta.core.errors import BadLedger

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


def number(plain: Any) -> int:
    if type(plain) is not int:
        raise ValueError("has no number")
    return plain


def kind(name: str) -> Kind[int]:
    return Kind(
        format=name.encode(), file="diary", entry=name, cure="tear nothing out", plain=lambda value: value, parse=number
    )


NOTES, DREAMS = kind("note"), kind("dream")


def written(path: Path, *values: int, time: datetime | None = None) -> ChainFile[int]:
    chain, _ = ChainFile.open(path, NOTES, Seal.of(NOTES, KEY))
    with chain.held() as held:
        held.append(values, time)
    return chain


def test_what_was_appended_is_read_back_with_its_time(tmp_path: Path) -> None:
    path, moment = tmp_path / "diary", datetime(2026, 3, 1, 8, 30, 0, 17, timezone(timedelta(hours=2)))
    chain = written(path, 3, 1, time=moment)
    lines, head = read_all(path, NOTES, Seal.of_public(NOTES, KEY.public_key()))
    assert [(line.entry, line.time, line.tip.lines) for line in lines] == [(3, moment, 1), (1, moment, 2)]
    assert lines[0].time.tzinfo is UTC
    assert head == chain.head == lines[-1].tip.head
    assert lines[-1].tip.bytes == path.stat().st_size
    assert is_signed(path)


def test_the_time_is_that_of_the_clock(tmp_path: Path) -> None:
    before = datetime.now(UTC)
    written(tmp_path / "diary", 1)
    (line,), _ = read_all(tmp_path / "diary", NOTES, Seal.of_public(NOTES, KEY.public_key()))
    assert before <= line.time <= datetime.now(UTC)


def test_each_object_is_told_once_what_others_added(tmp_path: Path) -> None:
    one = written(tmp_path / "diary", 1)
    other = written(tmp_path / "diary", 2, 3)
    with one.held() as held:
        assert [line.entry for line in held.added] == [2, 3]
        held.append([4])
    with one.held() as held:
        assert held.added == []
    with other.held() as held:
        assert [line.entry for line in held.added] == [4]


def test_a_file_of_one_kind_is_none_of_another(tmp_path: Path) -> None:
    """Whoever gets one key to sign lines of one kind has no line of another."""
    written(tmp_path / "diary", 1)
    with pytest.raises(BadLedger, match=r"^line 1 of .* is not signed with this key; tear nothing out$"):
        read_all(tmp_path / "diary", DREAMS, Seal.of_public(DREAMS, KEY.public_key()))
    with pytest.raises(BadLedger, match=r"does not have the form of a dream; tear nothing out$"):
        read_all(tmp_path / "diary", DREAMS, Seal.of_public(NOTES, KEY.public_key()))


def test_messages_name_the_kind(tmp_path: Path) -> None:
    seal = Seal.of(NOTES, KEY)
    with pytest.raises(BadLedger, match=r"^there is no diary .*; tear nothing out$"):
        read_all(tmp_path / "diary", NOTES, seal)
    with pytest.raises(BadLedger, match=r"^the diary .* cannot be begun: "):
        ChainFile.open(tmp_path / "none" / "diary", NOTES, seal)
    written(tmp_path / "diary", 1)
    with pytest.raises(BadLedger, match=r"has 1 notes and must have at least 2; tear nothing out$"):
        ChainFile.open(tmp_path / "diary", NOTES, seal, at_least=2)
    with pytest.raises(BadLedger, match=r"does not begin a diary of this key"):
        ChainFile.open(tmp_path / "diary", NOTES, Seal(format=b"note", private=seal.private))


def test_what_the_kind_refuses_is_refused_with_its_line(tmp_path: Path) -> None:
    any_value: Kind[Any] = Kind(
        format=b"note", file="diary", entry="note", cure="", plain=lambda value: value, parse=lambda plain: plain
    )
    chain, _ = ChainFile.open(tmp_path / "diary", any_value, Seal.of(any_value, None))
    with chain.held() as held:
        held.append([1, "two"])
    with pytest.raises(BadLedger, match=r"^line 2 of .* has no number; tear nothing out$"):
        read_all(tmp_path / "diary", NOTES, Seal.of_public(NOTES, None))
    assert not is_signed(tmp_path / "diary")
