"""The party that has the key: what it opens, what it refuses, and what never leaves it."""

import gc
import multiprocessing
import os
import pickle
import stat
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fedelta.core.errors import BadInput, BadTensors
from fedelta.secure import ckks
from fedelta.secure.ckks import PER, PublicKey, Total
from fedelta.secure.key_party import OPENED, PUBLIC, SECRET, KeyParty, Statement, new_keys

pytest.importorskip("tenseal")


def statement(round: int = 1, sites: int = 3, op: str = "train", attempt: int = 0) -> Statement:
    return Statement(job="", round=round, op=op, attempt=attempt, sites=sites)


def summed(public: bytes, sites: int = 3, count: int = 5) -> torch.Tensor:
    key = PublicKey.read(public)
    total = Total()
    for site in range(sites):
        total.add(key.encrypted(np.arange(count) * (site + 1.0)))
    return torch.from_numpy(total.rows())


@pytest.fixture(scope="module")
def party() -> KeyParty:
    return KeyParty(most=8, once=False)


def test_a_sum_is_opened_exactly(party: KeyParty) -> None:
    found = party.opened(statement(), summed(party.public))
    assert found.dtype == torch.int64
    assert found.shape == (1, PER)
    assert found[0, :5].tolist() == [0, 6, 12, 18, 24]
    assert not found[0, 5:].any()


def test_noise_is_there_before_anything_is_rounded_as_much_as_is_stated(party: KeyParty) -> None:
    precision = party._public.precision
    (one, other) = ckks.read(party._public.encrypted(np.zeros(PER + 1)), precision.scale)
    slots = [party._flooded(one), party._flooded(one), party._flooded(other)]
    noise = np.concatenate([np.concatenate([found.real, found.imag]) for found in slots])
    assert noise.std() == pytest.approx(precision.slot_noise, rel=0.05)
    assert abs(noise.mean()) < 5 * precision.slot_noise / np.sqrt(len(noise))
    assert abs(np.corrcoef(slots[0].real, slots[1].real)[0, 1]) < 0.15  # another one each time
    assert precision.slot_noise * precision.scale > 2**48  # an error of an encryption is about 2^9 there


@pytest.mark.parametrize("sites", [2, 0, -1, 9])
def test_sums_of_too_few_or_too_many_are_refused(party: KeyParty, sites: int) -> None:
    with pytest.raises(BadInput, match=f"opens sums over 3 to 8 sites, and this is one over {sites}"):
        party.opened(statement(sites=sites), summed(party.public))


def test_a_second_sum_of_a_round_is_refused() -> None:
    own = KeyParty(most=8)
    rows = summed(own.public)
    own.opened(statement(), rows)
    for attempt in (0, 1):
        with pytest.raises(BadInput, match=r"has opened a sum of round 1 \(train\) before"):
            own.opened(statement(attempt=attempt), rows)
    own.opened(statement(round=2), rows)
    own.opened(statement(op="evaluate"), rows)


def test_a_malformed_sum_is_refused_and_does_not_count() -> None:
    own = KeyParty(most=8)
    rows = summed(own.public)
    wrong = [rows[:, :-1], torch.zeros_like(rows), torch.full_like(rows, 255), rows.to(torch.int32)]
    for each in wrong:
        with pytest.raises(BadTensors):
            own.opened(statement(), each)
    assert own.opened(statement(), rows)[0, 1] == 6


def test_no_more_is_opened_than_noise_is_meant_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.secure.key_party.OPENINGS", 3)
    own = KeyParty(most=8)
    rows = summed(own.public, count=PER + 1)
    own.opened(statement(), rows)
    with pytest.raises(BadInput, match="has opened 2 ciphertexts, and its noise is meant for 3; go on with a new key"):
        own.opened(statement(round=2), rows)


def test_a_sum_of_two_tells_both() -> None:
    with pytest.raises(BadInput, match="least must be at least 3, got 2"):
        KeyParty(least=2)


def test_the_key_party_is_neither_pickled_nor_shown(party: KeyParty) -> None:
    with pytest.raises(TypeError, match="stays in its process"):
        pickle.dumps(party)
    assert repr(party) == "KeyParty(most=8, least=3)"


def _tell(queue, party: KeyParty, rows: torch.Tensor) -> None:
    try:
        party.opened(statement(), rows)
        queue.put("opened")
    except BadInput as error:
        queue.put((str(error), party._secret is None))


def test_a_fork_has_no_secret_key(party: KeyParty) -> None:
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_tell, args=(queue, party, summed(party.public)))
    child.start()
    told = queue.get(timeout=120)
    child.join()
    assert told[0].startswith("the secret key is in the process in which the key party was made, until it is closed")
    assert told[1]
    assert party.opened(statement(), summed(party.public))[0, 1] == 6


def test_keys_in_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    path = new_keys(folder, most=8)
    assert path == folder / PUBLIC
    assert stat.S_IMODE(os.stat(folder / SECRET).st_mode) == 0o600
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    public, secret = path.read_bytes(), (folder / SECRET).read_bytes()
    assert len(secret) > 10_000
    assert secret[100:200] not in public
    rows = summed(public)
    first = KeyParty.read(folder)
    assert first.public == public
    assert first.opened(statement(), rows)[0, 1] == 6
    first.close()
    with pytest.raises(BadInput, match="until it is closed"):
        first.opened(statement(round=2), rows)
    again = KeyParty.read(folder)  # after a restart
    assert again._count == 1
    with pytest.raises(BadInput, match="has opened a sum of round 1"):
        again.opened(statement(), rows)
    assert again.opened(statement(round=2), rows)[0, 1] == 6


def test_keys_are_not_overwritten(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys")
    with pytest.raises(BadInput, match="is there already"):
        new_keys(tmp_path / "keys")
    with pytest.raises(BadInput, match="cannot be written"):
        new_keys(tmp_path / "none" / "keys")


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="make them with new_keys"):
        KeyParty.read(tmp_path)
    folder = tmp_path / "keys"
    new_keys(folder)
    (folder / OPENED).write_text("[]\n")
    with pytest.raises(BadInput, match="has a line that cannot be read"):
        KeyParty.read(folder)
    (folder / OPENED).write_text("")
    os.chmod(folder / SECRET, 0o644)
    with pytest.raises(BadInput, match=r"others than its owner may read .*; run: chmod 600"):
        KeyParty.read(folder)
    os.chmod(folder / SECRET, 0o600)
    (folder / SECRET).write_bytes(b"no key")
    with pytest.raises(BadInput, match=r"is no secret key of a key party"):
        KeyParty.read(folder)


def multiple(public: bytes, constant: int) -> torch.Tensor:
    """A sum of three sites, one of which has added a number to its second polynomial: it decrypts to so many keys."""
    rows = summed(public)
    found = ckks.residues(rows.numpy()).copy()
    moduli = ckks._scheme().moduli
    more = np.array([[constant % int(modulus)] for (modulus,) in moduli], dtype=np.uint64)
    found[0, 1] = (found[0, 1] + more) % moduli  # in the library's form a constant is the same at each place
    return torch.from_numpy(ckks._packed(found))


def test_a_multiple_of_the_secret_key_in_a_sum_is_not_released() -> None:
    own = KeyParty(most=8)
    precision = own._public.precision
    for bits in (10, 20, precision.bits - 8):  # up to where it stays below what sites may add up to
        rows = multiple(own.public, int(2.0**bits * precision.scale / 300))
        with pytest.raises(BadTensors, match="does not decrypt to whole numbers"):
            own.opened(statement(round=bits), rows)
    with pytest.raises(BadInput, match="has opened a sum of round 10"):  # the noise is spent
        own.opened(statement(round=10), summed(own.public))


def test_a_sum_of_more_than_such_sites_add_up_to_is_not_released() -> None:
    own = KeyParty(most=8)
    key = PublicKey.read(own.public)
    total = Total()
    for _ in range(4):
        total.add(key.encrypted(np.full(3, 2.0**key.precision.bits)))
    rows = torch.from_numpy(total.rows())
    with pytest.raises(BadTensors, match="beyond what 3 sites can add up to"):
        own.opened(statement(sites=3), rows)
    assert own.opened(statement(round=2, sites=4), rows)[0, 0] == 4 * 2**key.precision.bits


def test_of_many_at_once_one_sum_of_a_round_is_opened(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys", most=8)
    own = KeyParty.read(tmp_path / "keys")
    rows, found, together = summed(own.public, count=4 * PER), [], threading.Barrier(6)

    def ask() -> None:
        together.wait()
        try:
            own.opened(statement(), rows)
            found.append("opened")
        except BadInput as error:
            found.append(str(error)[:46])

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["opened"] + 5 * ["the key party has opened a sum of round 1 (tra"]
    assert len((tmp_path / "keys" / OPENED).read_text().splitlines()) == 1


def test_a_folder_has_one_key_party_at_a_time(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys", most=8)
    first = KeyParty.read(tmp_path / "keys")
    with pytest.raises(BadInput, match=r"another key party has .*keys open; end it first"):
        KeyParty.read(tmp_path / "keys")
    assert first.opened(statement(), summed(first.public))[0, 1] == 6
    del first  # as when its process ends
    gc.collect()
    KeyParty.read(tmp_path / "keys").close()


def _wait(go, done) -> None:
    go.set()
    done.wait(120)


def test_a_fork_does_not_keep_the_folder(tmp_path: Path) -> None:
    new_keys(tmp_path / "keys", most=8)
    first = KeyParty.read(tmp_path / "keys")
    context = multiprocessing.get_context("fork")
    go, done = context.Event(), context.Event()
    child = context.Process(target=_wait, args=(go, done))
    child.start()
    assert go.wait(120)
    first.close()
    KeyParty.read(tmp_path / "keys").close()  # while the child lives
    done.set()
    child.join()


def test_a_line_that_a_power_cut_has_torn_is_dropped(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    new_keys(folder, most=8)
    first = KeyParty.read(folder)
    rows = summed(first.public)
    first.opened(statement(), rows)
    first.close()
    whole = (folder / OPENED).read_bytes()
    for torn in (b'{"sum": {"job": "j", "rou', whole[:-1].replace(b'"round": 1', b'"round": 2'), b"\xc3"):
        (folder / OPENED).write_bytes(whole + torn)
        again = KeyParty.read(folder)
        assert again._count == 1
        again.close()
        assert (folder / OPENED).read_bytes() == whole
    again = KeyParty.read(folder)
    assert again.opened(statement(round=2), rows)[0, 1] == 6
    again.close()
    assert KeyParty.read(folder)._count == 2


def test_what_cannot_be_noted_is_not_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_keys(tmp_path / "keys", most=8)
    own = KeyParty.read(tmp_path / "keys")
    rows, write = summed(own.public), os.write
    with monkeypatch.context() as full:
        full.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:9]))  # as on a full disk
        with pytest.raises(BadInput, match=r"cannot be written .* without it no sum is opened"):
            own.opened(statement(), rows)
    assert (tmp_path / "keys" / OPENED).read_bytes() == b""
    assert own.opened(statement(), rows)[0, 1] == 6
