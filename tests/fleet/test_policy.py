"""A policy is read strictly, and what it does not allow neither begins nor leaves."""

import math
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedelta.core import codec
from fedelta.core.errors import BadInput, FedeltaError
from fedelta.core.messages import Reply, Request
from fedelta.fleet.departures import Departures, read
from fedelta.fleet.policy import NO_POLICY, Door, Facts, Policy, demands, refusal, told
from fedelta.fleet.policy_file import parse
from fedelta.fleet.policy_file import read as read_policy

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)  # a Friday
EXPERIMENT = "ab" * 32
OPEN = f"""
[experiments]
digests = ["{EXPERIMENT}"]
[work]
requests = ["train", "evaluate", "statistics"]
rounds = "any"
[leaves]
tensors = "any"
parameters = "any"
bytes_per_reply = "any"
bytes_per_round = "any"
bytes_per_day = "any"
[privacy]
unit = "any"
epsilon = "any"
delta = "any"
noise = "any"
[secure]
collect = "any"
identities = false
least = 1
[hours]
zone = "UTC"
open = "any"
"""
KEYS = [f"{section}.{key}" for section, table in tomllib.loads(OPEN).items() for key in table]
FACTS = Facts(
    experiment=EXPERIMENT,
    work=frozenset(["train", "evaluate"]),
    steps=frozenset(["keys", "shares"]),
    rounds=10,
    training="FedAvg",
    tuning="Head()",
    tensors=("head.weight", "head.bias"),
    shapes=((9, 10), (10,)),
    parameters=100,
    update_bytes=1000,
    round_bytes=None,
    collect="masks",
    identities=True,
    least=5,
    unit="example",
    epsilon=4.0,
    delta=1e-6,
    noise="site",
    secret=True,
)


def text(**changes: str) -> str:
    """OPEN with other values: text(work__rounds="3")."""
    lines, section = list[str](), ""
    for line in OPEN.splitlines():
        section = line.strip("[]") if line.startswith("[") else section
        key = f"{section}__{line.partition(' = ')[0]}"
        lines.append(f"{key.partition('__')[2]} = {changes.pop(key)}" if key in changes else line)
    assert not changes
    return "\n".join(lines)


def policy(**changes: str) -> Policy:
    return parse(text(**changes))


# The file


def test_an_open_policy_demands_nothing_but_the_experiment() -> None:
    assert refusal(policy(), FACTS) == []
    bare = replace(
        FACTS, collect="clear", identities=False, least=1, unit=None, epsilon=math.inf, delta=1.0, noise=None
    )
    assert refusal(policy(), bare) == []
    assert len(refusal(policy(), replace(bare, experiment="cd" * 32))) == 1


@pytest.mark.parametrize("key", KEYS)
def test_every_key_has_to_be_there(key: str) -> None:
    name = key.partition(".")[2]
    without = re.sub(rf"^{name} = .*\n", "", OPEN, count=1, flags=re.MULTILINE)
    with pytest.raises(BadInput, match=rf'^the policy has no key {key}; write it, with "any" where'):
        parse(without)


@pytest.mark.parametrize("section", tomllib.loads(OPEN))
def test_every_section_has_to_be_there(section: str) -> None:
    without = re.sub(rf"^\[{section}\]\n([^\[].*\n)*", "", OPEN, flags=re.MULTILINE)
    with pytest.raises(BadInput, match=f"^the policy has no section {section}; "):
        parse(without)
    with pytest.raises(BadInput, match=rf"{section} must be a section, got 1; begin it with \[{section}\]"):
        parse(f"{section} = 1\n{without}")


def test_nothing_else_may_be_there() -> None:
    with pytest.raises(BadInput, match=r"has an unknown section 'extra'; known are experiments, work, "):
        parse(OPEN + "[extra]\n")
    with pytest.raises(BadInput, match=r"has an unknown key 'hours.closed'; known are zone, open"):
        parse(OPEN + "closed = true\n")


BAD = [
    ("experiments__digests", '["abc"]', "a list of digests of 64 hexadecimal digits"),
    ("experiments__digests", "[]", "a list of digests"),
    ("experiments__digests", f'["{EXPERIMENT}", "{EXPERIMENT}"]', "each once"),
    ("experiments__digests", f'"{EXPERIMENT}"', 'a list of digests of .*, or "any"'),
    ("experiments__digests", f'["{EXPERIMENT.upper()}"]', "in small letters"),
    ("work__requests", '"any"', "a list of some of train, evaluate, statistics"),
    ("work__requests", '["train", "learn"]', "some of train"),
    ("work__requests", "[]", "some of train"),
    ("work__rounds", "0", 'a whole number from 1, or "any"'),
    ("work__rounds", "true", "a whole number"),
    ("work__rounds", "1.0", "a whole number"),
    ("work__rounds", '"Any"', "a whole number"),
    ("leaves__tensors", '[""]', "a list of names"),
    ("leaves__tensors", '"*"', "a list of names"),
    ("leaves__parameters", "-1", "a whole number"),
    ("leaves__bytes_per_reply", "9223372036854775808", "a whole number"),
    ("leaves__bytes_per_round", f"0x{'f' * 5000}", "a whole number"),
    ("leaves__bytes_per_day", "inf", "a whole number"),
    ("privacy__unit", '"row"', '"site" or "example", or "any"'),
    ("privacy__unit", "[]", '"site" or "example"'),
    ("privacy__epsilon", "0", "a number above 0"),
    ("privacy__epsilon", "inf", "a number above 0"),
    ("privacy__epsilon", "nan", "a number above 0"),
    ("privacy__epsilon", f"0x{'f' * 5000}", "a number above 0"),
    ("privacy__epsilon", '"4"', "a number above 0"),
    ("privacy__delta", "1", "a number above 0 and below 1"),
    ("privacy__noise", '"coordinator"', '"site", or "any"'),
    ("secure__collect", '["sum"]', "a list of some of clear, masks, encryption"),
    ("secure__identities", '"any"', "true or false"),
    ("secure__least", "0", "a whole number from 1"),
    ("secure__least", '"any"', "a whole number from 1"),
    ("hours__zone", '"Rome"', "a time zone"),
    ("hours__zone", '"../etc/passwd"', "a time zone"),
    ("hours__zone", '"Europe"', "a time zone"),
    ("hours__zone", "1", "a time zone"),
    ("hours__open", "[]", "a list of"),
    ("hours__open", '[{days = ["mon"], from = "08:00"}]', "a list of"),
    ("hours__open", '[{days = ["mon"], from = "08:00", to = "18:00", not = 1}]', "a list of"),
    ("hours__open", '[{days = ["monday"], from = "08:00", to = "18:00"}]', "with days of mon, tue"),
    ("hours__open", '[{days = [], from = "08:00", to = "18:00"}]', "with days of mon, tue"),
    ("hours__open", '[{days = ["mon"], from = "8:00", to = "18:00"}]', "with times from"),
    ("hours__open", '[{days = ["mon"], from = "24:00", to = "18:00"}]', "with times from"),
    ("hours__open", '[{days = ["mon"], from = "08:60", to = "18:00"}]', "with times from"),
    ("hours__open", '[{days = ["mon"], from = 08:00:00, to = "18:00"}]', "with times from"),
    ("hours__open", '[{days = ["mon"], from = "08:00", to = "08:00"}]', "two different times"),
]


@pytest.mark.parametrize(("key", "value", "said"), BAD)
def test_what_a_key_may_be(key: str, value: str, said: str) -> None:
    with pytest.raises(BadInput, match=rf"^the policy: {key.replace('__', '.')} must be .*{said}.*, got ") as error:
        policy(**{key: value})
    assert len(str(error.value)) < 300


def test_keys_that_do_not_go_together() -> None:
    with pytest.raises(BadInput, match=r"secure.least is 3, but secure.collect allows updates in the clear"):
        policy(secure__least="3", secure__collect='["clear", "masks"]')
    for collect in ('"any"', '["masks", "encryption"]'):
        with pytest.raises(BadInput, match=r"secure.identities goes with"):
            policy(secure__identities="true", secure__collect=collect)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"\xff", "is not UTF-8"), (b"[work", "is not TOML"), (b"#" * 2**21, "more than"), (None, "cannot be read")],
)
def test_a_file_that_is_none(tmp_path: Path, content: bytes | None, said: str) -> None:
    if content is not None:
        (tmp_path / "policy.toml").write_bytes(content)
    with pytest.raises(BadInput, match=said):
        read_policy(tmp_path / "policy.toml")


def test_a_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "policy.toml").write_text(OPEN)
    assert read_policy(tmp_path / "policy.toml") == parse(OPEN)


values = st.recursive(
    st.sampled_from(['"any"', "true", "-1", "0", "3", "1e400", "nan", '"UTC"', '"train"', "1979-05-27", "08:00:00"])
    | st.integers().map(str)
    | st.floats().map(repr)
    | st.text("ab/.-: \\u00e9*", max_size=6).map(lambda s: '"' + s.replace("\\", "") + '"'),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.tuples(inner, inner, inner).map(lambda v: f"{{days = {v[0]}, from = {v[1]}, to = {v[2]}}}")
        | inner.map(lambda v: f"{{x = {v}}}")
    ),
    max_leaves=6,
)


@settings(max_examples=300)
@given(key=st.sampled_from(KEYS), value=values)
def test_a_wrong_value_is_bad_input_and_nothing_else(key: str, value: str) -> None:
    with suppress(BadInput):
        assert isinstance(policy(**{key.replace(".", "__"): value}), Policy)


@settings(max_examples=200)
@given(st.text(max_size=60) | st.lists(st.sampled_from([*OPEN.splitlines(), "[", "]]", "a.b = 1"])).map("\n".join))
def test_any_text_is_a_policy_or_bad_input(content: str) -> None:
    with pytest.raises(BadInput):
        parse(content)


def test_deep_nesting_is_bad_input() -> None:
    with pytest.raises(BadInput):
        parse("x = " + "[" * 100_000)
    with pytest.raises(BadInput):
        policy(work__rounds="[" * 300 + "]" * 300)


# The experiment as a whole


UNMET: list[tuple[Mapping[str, str], dict[str, Any], str]] = [
    ({"work__requests": '["train"]'}, {}, "work.requests asks for no more than train, and there is train, evaluate"),
    ({"work__rounds": "9"}, {}, "work.rounds asks for 9 at most, and there is 10"),
    ({"leaves__tensors": '["head.w*"]'}, {}, r"leaves.tensors asks for .* head.w\*, and there is 1 others \(head.bias"),
    ({"leaves__tensors": '["HEAD.*"]'}, {}, "leaves.tensors"),
    ({"leaves__tensors": '["ead.*", "head"]'}, {}, "leaves.tensors"),
    ({"leaves__tensors": '["head?weight", "head.*s"]'}, {}, "leaves.tensors"),
    ({"leaves__parameters": "99"}, {}, "leaves.parameters asks for 99 at most, and there is 100"),
    ({"leaves__bytes_per_reply": "999"}, {}, "leaves.bytes_per_reply asks for 999 at most, and .* update of 1,000"),
    ({"leaves__bytes_per_round": "999"}, {}, "leaves.bytes_per_round"),
    ({"leaves__bytes_per_day": "999"}, {}, "leaves.bytes_per_day"),
    ({"privacy__unit": '"site"'}, {}, "privacy.unit asks for site, and there is example"),
    ({"privacy__unit": '"site"'}, {"unit": None, "noise": None}, "privacy.unit .* no guarantee"),
    ({"privacy__epsilon": "3.9"}, {}, "privacy.epsilon asks for 3.9 at most, and there is 4"),
    ({"privacy__epsilon": "1e300"}, {"epsilon": math.inf}, "privacy.epsilon .* there is no limit"),
    ({"privacy__epsilon": "1e300"}, {"unit": None, "epsilon": 0.0, "noise": None}, "privacy.epsilon .* no guarantee"),
    ({"privacy__delta": "1e-7"}, {}, "privacy.delta asks for 1e-07 at most, and there is 1e-06"),
    ({"privacy__noise": '"site"'}, {"noise": "coordinator"}, "privacy.noise .* noise from the coordinator"),
    ({"privacy__epsilon": "4"}, {"secret": False}, "privacy asks for randomness of the system .* a seed that all"),
    ({"privacy__noise": '"site"'}, {"secret": False}, "privacy asks for randomness of the system"),
    ({"secure__collect": '["encryption"]'}, {}, "secure.collect asks for encryption, and there is masks"),
    ({"secure__collect": '["masks"]'}, {"collect": "clear"}, "secure.collect asks for masks, and there is clear"),
    (
        {"secure__collect": '["masks"]', "secure__identities": "true"},
        {"identities": False},
        "secure.identities asks for identities of the sites, and there is none",
    ),
    (
        {"secure__collect": '["masks"]', "secure__least": "6"},
        {},
        "secure.least asks for a sum over 6 sites at least, and there is a sum over 5 or more",
    ),
]


@pytest.mark.parametrize(("changes", "other", "said"), UNMET)
def test_a_demand_that_is_not_met(changes: dict[str, str], other: dict[str, Any], said: str) -> None:
    facts = replace(FACTS, **other)
    (reason,) = refusal(policy(**changes), facts)
    assert re.search(said, reason)
    with pytest.raises(BadInput, match="this site's policy refuses the experiment: "):
        Door(policy(**changes), facts, None)  # type: ignore[arg-type]
    assert sum(not one.met for one in demands(policy(**changes), facts)) == 1


def test_bytes_of_a_whole_round_are_what_counts_where_they_are_known() -> None:
    facts = replace(FACTS, round_bytes=1500)
    changes = {"leaves__bytes_per_reply": "1000", "leaves__bytes_per_round": "1499", "leaves__bytes_per_day": "1500"}
    assert refusal(policy(**changes), facts) == [
        "leaves.bytes_per_round asks for 1,499 at most, and there is 1,500 in a round"
    ]
    assert dict(told(facts))["in all"] == "at most 1,500 bytes in a round, 15,000 in 10 rounds"


def test_who_has_no_policy_allows_all_that_the_experiment_declares_and_no_more(tmp_path: Path) -> None:
    worst = replace(FACTS, collect="clear", identities=False, least=1, unit=None, round_bytes=2**62)
    assert refusal(NO_POLICY, worst) == []
    door = Door(NO_POLICY, replace(FACTS, noise="coordinator"), Departures.open(tmp_path / "log"))
    assert door.refuse(Request(to="a", op="train", round=10**6)) is None
    assert "takes no 'statistics' requests" in (door.refuse(Request(to="a", op="statistics", round=0)) or "")
    assert "has no step 'train/other'" in (door.refuse(Request(to="a", op="train/other", round=1)) or "")


def test_noise_of_the_site_covers_the_rounds_of_the_experiment_over_all_its_runs(tmp_path: Path) -> None:
    facts = replace(FACTS, rounds=2, noise="site")
    for attempt, round in enumerate((1, 1)):  # another request for one round has noise of its own
        door = Door(NO_POLICY, facts, Departures.open(tmp_path / "log"))
        asked = Request(to="a", op="train", round=round, attempt=attempt)
        assert door.refuse(asked) is None
        door.leaving(asked, Reply.to_request(asked, {}))
    again = Door(NO_POLICY, facts, Departures.open(tmp_path / "log"))
    assert "answered 2 times" in (again.refuse(Request(to="a", op="train", round=2)) or "")
    assert "in rounds 1 to 2" in (again.refuse(Request(to="a", op="train", round=3)) or "")


def test_demands_that_are_just_met() -> None:
    exact = policy(
        work__requests='["train", "evaluate"]',
        work__rounds="10",
        leaves__tensors='["*.weight", "head.bias"]',
        leaves__parameters="100",
        leaves__bytes_per_reply="1000",
        leaves__bytes_per_round="1000",
        leaves__bytes_per_day="1000",
        privacy__unit='"example"',
        privacy__epsilon="4",
        privacy__delta="1e-6",
        privacy__noise='"site"',
        secure__collect='["masks"]',
        secure__identities="true",
        secure__least="5",
    )
    assert refusal(exact, FACTS) == []
    found = demands(exact, FACTS)
    assert len(found) == len(KEYS) - 2 + 1
    assert all(one.met for one in found)
    said = "an update of 1,000 bytes, under masks: the coordinator sees sums over 5 sites or more"
    assert said in dict(told(FACTS))["leaves"]


def test_names_are_matched_as_a_whole_and_only_stars_stand_for_others() -> None:
    for pattern, name, fits in (
        ("head.weight", "head.weight", True),
        ("head.weight", "headXweight", False),
        ("head.weight", "head.weight\n", False),
        ("head.*", "head.a\nb", True),
        ("head.*", "ahead.w", False),
        ("*", "", True),
        ("*.*.w", "a.w", False),
        ("[h]ead", "head", False),
    ):
        found = refusal(policy(leaves__tensors=f'["nothing", "{pattern}"]'), replace(FACTS, tensors=(name,)))
        assert (found == []) == fits, (pattern, name)


def test_a_seed_will_do_where_no_privacy_is_demanded() -> None:
    assert refusal(policy(), replace(FACTS, secret=False)) == []


def test_updates_in_the_clear_are_a_sum_over_nobody() -> None:
    own = policy(secure__collect='["masks"]', secure__least="3")
    unmet = [one.key for one in demands(own, replace(FACTS, collect="clear")) if not one.met]
    assert unmet == ["secure.collect", "secure.least"]


def test_a_size_that_is_not_known_is_left_to_the_door() -> None:
    assert refusal(policy(leaves__bytes_per_reply="1"), replace(FACTS, update_bytes=None)) == []


# Each request and each reply


class Clock:
    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


def door(folder: Path, clock: Clock | None = None, **changes: str) -> Door:
    facts = replace(FACTS, rounds=1, noise="coordinator")  # of a run; a policy counts all of them
    return Door(policy(**changes), facts, Departures.open(folder / "log"), clock or Clock())


def request(op: str = "train", round: int = 1) -> Request:
    return Request(to="a", op=op, round=round)


def reply(request: Request, size: int = 1000) -> Reply:
    """One whose message has so many bytes."""
    made = (Reply.to_request(request, {"w": torch.zeros(n, dtype=torch.uint8)}) for n in range(size - 200, size))
    return next(reply for reply in made if codec.size(reply.body) == size)


def size_of(path: Path) -> list[int]:
    return [line.entry.bytes for line in read(path / "log")]


@pytest.mark.parametrize(
    ("op", "round", "said"),
    [
        ("statistics", 0, "no 'statistics' requests"),
        ("learn", 1, "no 'learn' requests"),
        ("", 1, "no '' requests"),
        ("train/leak", 1, "no step 'train/leak'"),
        ("train/", 1, "no step 'train/'"),
        ("train/keys/keys", 1, "no step"),
        ("train", 0, "train is asked for in round 0, and may be in rounds 1 to 3"),
        ("train", 4, "in round 4"),
        ("train/keys", 4, "in round 4"),
        ("evaluate", -1, "in round -1"),
        ("evaluate", 4, "in round 4"),
    ],
)
def test_a_request_that_is_not_allowed(tmp_path: Path, op: str, round: int, said: str) -> None:
    own = door(tmp_path, work__rounds="3")
    why = own.refuse(request(op, round))
    assert why is not None
    assert said in why
    with pytest.raises(BadInput, match="kept back by this site's policy"):
        own.leaving(request(op, round), reply(request(op, round)))


def test_requests_that_are_allowed(tmp_path: Path) -> None:
    own = door(tmp_path, work__rounds="3")
    for op, round in (("train", 1), ("train", 3), ("train/keys", 3), ("evaluate", 0), ("evaluate/shares", 3)):
        assert own.refuse(request(op, round)) is None
        own.leaving(request(op, round), reply(request(op, round)))
    assert [line.entry.op for line in read(tmp_path / "log")] == [
        "train",
        "train",
        "train/keys",
        "evaluate",
        "evaluate/shares",
    ]


def test_statistics_are_of_round_zero(tmp_path: Path) -> None:
    facts = replace(FACTS, work=frozenset(["train", "statistics"]))
    own = Door(policy(), facts, Departures.open(tmp_path / "log"))
    assert own.refuse(request("statistics", 0)) is None
    assert "may be in rounds 0 to 0" in (own.refuse(request("statistics", 1)) or "")


@pytest.mark.parametrize("restart", [False, True])
def test_rounds_are_counted_over_runs_and_restarts(tmp_path: Path, restart: bool) -> None:
    own = door(tmp_path, work__rounds="3")
    for _ in range(3):
        assert own.refuse(request(round=1)) is None  # the same number: of another run
        own.leaving(request(round=1), reply(request()))
        own = door(tmp_path, work__rounds="3") if restart else own
    assert "train has been answered 3 times, as often as it may be" in (own.refuse(request(round=2)) or "")
    with pytest.raises(BadInput, match="answered 3 times"):
        own.leaving(request(round=2), reply(request()))
    assert own.refuse(request("evaluate")) is None
    for _ in range(9):
        own.leaving(request("train/keys"), reply(request()))  # of a sum that was begun anew


def test_failures_are_no_rounds(tmp_path: Path) -> None:
    own = door(tmp_path, work__rounds="1", leaves__bytes_per_reply="1000")
    for _ in range(3):
        assert own.refuse(request()) is None
        own.leaving(request(), Reply.failure(request(), "no rows"))
    assert [line.entry.error for line in read(tmp_path / "log")] == ["no rows"] * 3


def test_there_is_one_evaluation_more_than_rounds(tmp_path: Path) -> None:
    own = door(tmp_path, work__rounds="2")
    for round in (0, 1, 2):
        assert own.refuse(request("evaluate", round)) is None
        own.leaving(request("evaluate", round), reply(request()))
    assert "evaluate has been answered 3 times" in (own.refuse(request("evaluate", 2)) or "")


def test_a_failure_may_always_leave(tmp_path: Path) -> None:
    clock = Clock()
    hours = '[{days = ["fri"], from = "12:00", to = "13:00"}]'
    own = door(tmp_path, clock, leaves__bytes_per_day="1000", hours__open=hours)
    own.leaving(request(), reply(request(), 1000))
    clock.now += timedelta(hours=2)
    own.leaving(request("learn"), Reply.failure(request("learn"), "refused"))
    assert size_of(tmp_path) == [1000, len("refused")]


@pytest.mark.parametrize("restart", [False, True])
def test_bytes_that_may_leave(tmp_path: Path, restart: bool) -> None:
    limits = {"leaves__bytes_per_reply": "1000", "leaves__bytes_per_round": "2000", "leaves__bytes_per_day": "5000"}
    clock = Clock()

    def again(own: Door) -> Door:
        return door(tmp_path, clock, **limits) if restart else own

    own = door(tmp_path, clock, **limits)
    with pytest.raises(BadInput, match=r"it has 1,001 bytes, .* in a reply, and at most 1,000 may leave"):
        own.leaving(request(), reply(request(), 1001))
    refused = sum(size_of(tmp_path))  # the sentence that leaves instead
    own = again(own)
    own.leaving(request(), reply(request(), 1000))
    own = again(own)
    own.leaving(request(), reply(request(), 1000 - refused))
    assert size_of(tmp_path)[1:] == [1000, 1000 - refused]
    assert "2,000 bytes have left in this round, and at most 2,000 may" in (again(own).refuse(request()) or "")
    own = again(own)
    for round in (2, 3, 4):
        own.leaving(request(round=round), reply(request(), 1000))
        own = again(own)
    assert "5,000 bytes have left in 24 hours" in (own.refuse(request(round=5)) or "")
    clock.now -= timedelta(days=9)
    assert "5,000 bytes have left in 24 hours" in (again(own).refuse(request(round=5)) or "")
    clock.now = NOON + timedelta(hours=24)
    assert again(own).refuse(request(round=5)) is None


STRICT = {
    "work__requests": '["train", "evaluate"]',
    "work__rounds": "1",
    "leaves__bytes_per_reply": "1000",
    "leaves__bytes_per_round": "1000",
    "leaves__bytes_per_day": "1000",
    "hours__open": '[{days = ["mon"], from = "00:00", to = "24:00"}]',
}


def test_a_model_may_always_come_in_and_nothing_leaves_for_it(tmp_path: Path) -> None:
    clock = Clock(NOON + timedelta(days=3))  # a Monday
    own = door(tmp_path, clock, **STRICT)
    own.leaving(request(), reply(request(), 1000))
    clock.now = NOON + timedelta(days=4) - timedelta(minutes=1)  # a Tuesday, with nothing left of the day
    for round in (0, 1, 99):
        handed = request("model", round)
        assert own.refuse(handed) is None
        own.leaving(handed, Reply.to_request(handed, {}))
    assert "and its hours are mon" in (own.refuse(request()) or "")
    for left in (reply(handed), replace(Reply.to_request(handed, {}), meta={"name": "a"})):
        with pytest.raises(BadInput, match="who is handed a model answers with none"):
            own.leaving(handed, left)
    entries = [line.entry for line in read(tmp_path / "log")]
    assert [(entry.op, entry.bytes, entry.error) for entry in entries[1:4]] == 3 * [("model", 0, None)]
    assert all(entry.error is not None for entry in entries[4:])
    assert "takes no 'model' requests" in (own.refuse(request("model/keys")) or "")


def test_what_is_kept_back_is_in_the_log_as_what_leaves_instead(tmp_path: Path) -> None:
    own = door(tmp_path, leaves__bytes_per_reply="1000")
    with pytest.raises(BadInput) as error:
        own.leaving(request(), reply(request(), 2000))
    (line,) = read(tmp_path / "log")
    assert (line.entry.error, line.entry.bytes, line.time) == (str(error.value), len(str(error.value)), NOON)


def test_a_log_that_was_altered_ends_it(tmp_path: Path) -> None:
    own = door(tmp_path)
    own.leaving(request(), reply(request()))
    path = tmp_path / "log"
    path.write_bytes(path.read_bytes()[:-9])
    assert own.refuse(request()) == "this site cannot tell what has left it; its own log says why"
    with pytest.raises(FedeltaError, match="has become shorter"):
        own.leaving(request(), reply(request()))


# Hours

NIGHT = '[{days = ["mon", "fri"], from = "22:00", to = "06:00"}]'
ROME = ZoneInfo("Europe/Rome")


@pytest.mark.parametrize(
    ("when", "is_open"),
    [
        ("2026-11-20 21:59:59.999999", False),  # Friday
        ("2026-11-20 22:00", True),
        ("2026-11-20 23:59:59.999999", True),
        ("2026-11-21 00:00", True),  # still Friday's
        ("2026-11-21 05:59:59.999999", True),
        ("2026-11-21 06:00", False),
        ("2026-11-21 22:00", False),
        ("2026-11-20 00:00", False),  # of Thursday's night
        ("2026-11-23 03:00", False),  # Monday before its night
        ("2026-11-24 03:00", True),
    ],
)
def test_a_night_belongs_to_the_day_on_which_it_begins(tmp_path: Path, when: str, is_open: bool) -> None:
    clock = Clock(datetime.fromisoformat(when).replace(tzinfo=ROME))
    own = door(tmp_path, clock, hours__zone='"Europe/Rome"', hours__open=NIGHT)
    why = own.refuse(request())
    assert (why is None) == is_open
    if is_open:
        own.leaving(request(), reply(request()))
    else:
        assert "in Europe/Rome, and its hours are mon, fri 22:00-06:00" in (why or "")
        with pytest.raises(BadInput, match="its hours are"):
            own.leaving(request(), reply(request()))


def open_minutes(day: str, begin: str, end: str) -> int:
    """Of the 27 hours from the midnight in Rome at which `day` begins."""
    days = '["sun"]'
    own = policy(hours__zone='"Europe/Rome"', hours__open=f'[{{days = {days}, from = "{begin}", to = "{end}"}}]')
    (window,) = own.hours or ()
    start = datetime.fromisoformat(day).replace(tzinfo=ROME).astimezone(UTC)
    moments = (start + timedelta(minutes=minute) for minute in range(27 * 60))
    return sum(window.holds(moment.astimezone(own.zone)) for moment in moments)


@pytest.mark.parametrize(
    ("day", "begin", "end", "minutes"),
    [
        ("2026-11-22", "00:00", "24:00", 24 * 60),
        ("2026-11-22", "23:00", "00:00", 60),
        ("2026-03-29", "00:00", "24:00", 23 * 60),  # 02:00 becomes 03:00
        ("2026-03-29", "02:15", "02:45", 0),
        ("2026-03-29", "01:30", "03:30", 60),
        ("2026-10-25", "00:00", "24:00", 25 * 60),  # 03:00 becomes 02:00
        ("2026-10-25", "02:15", "02:45", 60),
        ("2026-10-25", "01:30", "03:30", 180),
    ],
)
def test_hours_are_those_of_the_clock_on_the_wall(day: str, begin: str, end: str, minutes: int) -> None:
    assert open_minutes(day, begin, end) == minutes


def test_several_windows(tmp_path: Path) -> None:
    clock = Clock()
    windows = '[{days = ["fri"], from = "08:00", to = "12:00"}, {days = ["fri"], from = "12:00", to = "24:00"}]'
    own = door(tmp_path, clock, hours__open=windows)
    assert own.refuse(request()) is None
    clock.now = NOON - timedelta(hours=5)
    assert "fri 08:00-12:00; fri 12:00-24:00" in (own.refuse(request()) or "")
