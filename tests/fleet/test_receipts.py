"""What others have signed, as it is kept on both sides of a stream and checked afterwards."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedelta.core.errors import BadInput
from fedelta.core.messages import Request
from fedelta.fleet.receipts import FILE, SIGNERS, Receipts, read
from fleet_program import Play, load
from remote_sites import PATIENCE_S, coordinator, site

FULL = """
import base64, json, resource, sys
from pathlib import Path
from fedelta.core.messages import Reply
from fedelta.fleet.receipts import FILE, SIGNERS, Receipts
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
line = json.loads((folder / FILE).read_text().splitlines()[0])
said, signature = line["said"], base64.b64decode(line["signature"])
reply = Reply(sender="", answers=said["answers"], round=said["round"])
certificate = (folder / SIGNERS / (line["by"] + ".der")).read_bytes()
what = certificate, bytes.fromhex(said["request"]), reply, bytes.fromhex(said["body"]), signature
receipts = Receipts(folder)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
try:
    receipts.reply(*what)
except OSError:
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    receipts.reply(*what)
else:
    sys.exit("the disk was not full")
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """That of a coordinator, and that of the site "amber" for the run: three were asked, of which one fails."""
    run, keep = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("amber")
    program = Play()
    with (
        coordinator(program, ("amber",), run="r", receipts=run) as fleet,
        site(program, load, "amber", fleet.port, folder=keep),
    ):
        for op, round in (("echo", 1), ("no such thing", 2), ("echo", 3)):
            fleet.submit(Request(to="amber", op=op, round=round))
            assert fleet.next_reply(PATIENCE_S) is not None
    (own,) = (path.parent for path in keep.rglob(FILE))
    return run, own


def test_both_sides_keep_what_the_other_has_signed(folders: tuple[Path, Path]) -> None:
    run, own = folders
    assert [(one.signer, one.what, one.round) for one in read(run)] == [("amber", "reply", 1), ("amber", "reply", 3)]
    assert [(one.signer, one.what, one.round) for one in read(own)] == [
        ("coordinator", "broadcast", 1),
        ("coordinator", "broadcast", 2),
        ("coordinator", "broadcast", 3),
    ]


@given(data=st.data())
def test_nothing_in_a_line_can_be_another(folders: tuple[Path, Path], data: st.DataObject) -> None:
    folder = data.draw(st.sampled_from(folders))
    lines = (folder / FILE).read_text().splitlines()
    number = data.draw(st.integers(0, len(lines) - 1))
    line = json.loads(lines[number])
    where = data.draw(st.sampled_from(["by", "what", "signature", *line["said"]]))
    within = line["said"] if where in line["said"] else line
    within[where] = data.draw(
        st.sampled_from(["", "x", 7, "reply", "00", "ab" * 32, None]).filter(lambda x: x != within[where])
    )
    copy = folder.parent / "copy"
    (copy / SIGNERS).mkdir(parents=True, exist_ok=True)
    for signer in (folder / SIGNERS).iterdir():
        (copy / SIGNERS / signer.name).write_bytes(signer.read_bytes())
    (copy / FILE).write_text("\n".join([*lines[:number], json.dumps(line), *lines[number + 1 :], ""]))
    with pytest.raises(BadInput, match=f"line {number + 1} of .* does not hold"):
        list(read(copy))


def test_a_torn_last_line_is_left_out_and_no_file_is_said(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="there is no"):
        list(read(tmp_path))
    run, _ = folders
    before = (run / FILE).read_bytes()
    try:
        (run / FILE).write_bytes(before[:-5])
        assert len(list(read(run))) == 1  # of two
        Receipts(run)  # which would go on
        assert (run / FILE).read_bytes() == before.splitlines(keepends=True)[0]
    finally:
        (run / FILE).write_bytes(before)


def test_a_full_disk_leaves_no_torn_line_in_which_the_next_one_would_be(folders: tuple[Path, Path]) -> None:
    run, _ = folders
    there = (run / FILE).read_bytes()
    folder = run.parent / "full"
    folder.mkdir()
    (folder / SIGNERS).mkdir()
    for signer in (run / SIGNERS).iterdir():
        (folder / SIGNERS / signer.name).write_bytes(signer.read_bytes())
    (folder / FILE).write_bytes(there)
    ended = subprocess.run(
        [sys.executable, "-c", FULL, str(folder), str(len(there) + 100)], capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 0, ended.stderr
    assert [one.round for one in read(folder)] == [1, 3, 1]
