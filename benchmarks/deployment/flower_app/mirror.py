"""The app on Flower's deployment: sites return the model that they get, plus a number of their own.

SuperLink and SuperNodes know parts of a message by their hash, and do not send again what the other one has. Models
that are trained differ, so here too every round has another model, and every site adds another number to it, which is
in the time of a round. The ServerApp asks for replies every 0.1 s, where Flower's strategies ask every 3 s, and keeps
them until all are there, as those do.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

_POLL_S = 0.1

server = ServerApp()
client = ClientApp()


@client.train()  # type: ignore[untyped-decorator,unused-ignore]
def mirror(message: Message, context: Context) -> Message:
    [model] = message.content["arrays"].to_numpy_ndarrays()
    own = np.float32(1 + int(context.node_config["partition-id"]))
    return Message(content=RecordDict({"arrays": ArrayRecord([model + own])}), reply_to=message)


@server.main()  # type: ignore[untyped-decorator,unused-ignore]
def measure(grid: Grid, context: Context) -> None:
    """A line of JSON when all sites are connected, and one for each round, in the file that the run names."""
    config = context.run_config
    sites, superlink = int(config["sites"]), int(config["superlink"])
    while len(nodes := list(grid.get_node_ids())) < sites:
        time.sleep(1)
    with Path(str(config["lines"])).open("w", buffering=1) as lines:
        own, other = (_memory(pid, "VmRSS:") for pid in (os.getpid(), superlink))
        print(json.dumps({"superlink": other, "both": own + other}), file=lines)
        for number in range(int(config["rounds"])):
            seconds = _round(grid, nodes, number, int(config["parameters"]))
            peak = sum(_memory(pid, "VmHWM:") for pid in (os.getpid(), superlink))
            print(json.dumps({"seconds": seconds, "peak": peak}), file=lines)


def _round(grid: Grid, nodes: list[int], number: int, parameters: int) -> float:
    """Seconds from the model to all replies. Raises RuntimeError if one is not what the site should have sent."""
    model = np.random.default_rng(number).standard_normal(parameters, dtype=np.float32)
    began = time.perf_counter()
    content = RecordDict({"arrays": ArrayRecord([model])})
    messages = [Message(content=content, message_type="train", dst_node_id=node) for node in nodes]
    missing = set(grid.push_messages(messages))
    replies: list[Message] = []
    while True:
        came = list(grid.pull_messages(missing))
        replies += came
        missing -= {reply.metadata.reply_to_message_id for reply in came}
        if not missing:
            break
        time.sleep(_POLL_S)
    seconds = time.perf_counter() - began
    _check(model, replies)
    return seconds


def _check(model: np.ndarray, replies: list[Message]) -> None:
    added = set()
    for reply in replies:
        if reply.has_error():
            raise RuntimeError(f"a site answers: {reply.error.reason}")
        [found] = reply.content["arrays"].to_numpy_ndarrays()
        number = np.float32(np.rint(found[0] - model[0]))
        if not np.array_equal(found, model + number):
            raise RuntimeError("a site has not returned the model plus a number")
        added.add(int(number))
    if added != set(range(1, len(replies) + 1)):
        raise RuntimeError(f"{len(replies)} sites have added {sorted(added)}")


def _memory(pid: int, key: str) -> int:
    """Bytes."""
    found = Path(f"/proc/{pid}/status").read_text().split()
    return 1024 * int(found[found.index(key) + 1])
