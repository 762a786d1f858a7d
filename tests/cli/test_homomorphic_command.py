"""`--homomorphic` of `fedelta run`, `fedelta plan` and `fedelta finetune`."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.cli.in_process import Fedelta, fedelta
from tests.cli.test_finetune import Command, files, finetune

__all__ = ["fedelta", "files", "finetune"]  # fixtures

pytest.importorskip("tenseal")
EXPERIMENT = '''
"""Five sites of 16 to 32 rows."""
import torch
from torch import nn
from fedelta import SGD, Classification, FedAvg, Federation, HomomorphicEncryption, LocalDP, Task, Training

UNIT = "none"
WIDTH = 8
OWN = 0

def program():
    task = Task(
        model=lambda: nn.Sequential(nn.Linear(6, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)),
        objective=Classification(classes=3),
    )
    return Federation(
        algorithm=FedAvg(task=task, training=Training(optimizer=SGD(lr=0.1), batch=8)),
        rounds=2,
        privacy=LocalDP(clip=0.5, noise=4.0) if UNIT == "local" else None,
        **({"collect": HomomorphicEncryption(most=OWN)} if OWN else {}),
    )

def sites():
    return [f"s{i}" for i in range(5)]

def examples(seed, n):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=g), torch.randint(0, 3, (n,), generator=g)

def site(name):
    return examples(int(name[1:]), 16 + 4 * int(name[1:]))

def test():
    return examples(100, 50)
'''
QUICK = ["--workers", 0, "--plan", "plain"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "exp.py"
    file.write_text(EXPERIMENT)
    return file


def rounds(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_an_encrypted_run_ends_where_one_in_the_clear_does(fedelta: Fedelta, path: Path, tmp_path: Path) -> None:
    clear, encrypted = tmp_path / "clear", tmp_path / "encrypted"
    fedelta("run", path, "--out", clear, *QUICK)
    told = json.loads(fedelta("plan", path, "--json", "--homomorphic"))
    fedelta("run", path, "--out", encrypted, "--homomorphic", "--workers", 2, "--plan", "plain")
    models = [load_file(out / "model.safetensors") for out in (clear, encrypted)]
    assert all(tensor.allclose(models[1][name], atol=1e-6) for name, tensor in models[0].items())
    assert not any(report["per_site"] or report["absent"] for report in rounds(encrypted))
    sizes = ("round", "bytes_down", "bytes_up")
    assert [[each[name] for name in sizes] for each in told["rounds"]] == [
        [report[name] for name in sizes] for report in rounds(encrypted)
    ]
    assert told["encrypted"]["numbers"] == 6 * 8 + 8 + 8 * 3 + 3
    assert told["encrypted"]["ciphertexts"] == 1
    assert told["encrypted"]["bits"] == 32  # for 5 sites
    assert told["secure_sum"] is None
    assert "Resumed after round 2." in fedelta(
        "run", path, "--out", encrypted, "--homomorphic", *QUICK, "--resume", "--rounds", 3
    )


def test_the_plan_says_what_encryption_costs_and_when_it_is_too_much(fedelta: Fedelta, path: Path) -> None:
    small = " ".join(fedelta("plan", path, "--homomorphic").split())
    assert "An update of 83 numbers is 1 ciphertext, 98.6 KB: " in small
    assert "times its bytes in the clear. Encryption takes " in small
    assert "a sum hides single updates the key party opens one of a round, over 3 to 5 sites" in small
    assert "neither encryption nor the coordinator's adding up are in them" in small
    assert "LoRA's size" not in small
    large = " ".join(fedelta("plan", path, "--homomorphic", "--set", "WIDTH=110000").split())
    assert "An update of 1,100,003 numbers is 269 ciphertexts" in large
    assert "6.0 times its bytes in the clear" in large
    assert "Encryption is meant for updates of LoRA's size; for this one take --secure, or LoRA." in large


def test_an_experiments_own_encryption_is_kept(fedelta: Fedelta, path: Path) -> None:
    for more in ([], ["--homomorphic"]):
        told = json.loads(fedelta("plan", path, "--json", "--set", "OWN=128", *more))
        assert told["encrypted"]["bits"] == 26


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--homomorphic", "--secure"], "--secure and --homomorphic are two ways to add updates up unseen"),
        (["--homomorphic", "--secure-bits", 32], "--secure-bits has no effect without --secure"),
        (["--homomorphic", "--set", "UNIT=local"], "the noise of LocalDP goes beyond the bound of encrypted numbers"),
    ],
)
def test_what_cannot_be_encrypted_is_refused(
    fedelta: Fedelta, path: Path, options: list[object], sentence: str
) -> None:
    error = fedelta("plan", path, *options, status=2)
    assert sentence in error
    assert "Traceback" not in error


def test_a_missing_library_is_a_sentence(fedelta: Fedelta, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedelta.core.extras.find_spec", lambda name: None)
    assert "run: pip install 'fedelta[homomorphic]'" in fedelta("plan", path, "--homomorphic", status=2)


def test_fine_tuning_is_encrypted(finetune: Command) -> None:
    ends = []
    for more in ([], ["--homomorphic"]):
        out = finetune.folder / f"out{len(more)}"
        finetune("--rounds", 2, *more, sites=4, out=out)
        ends.append({file.relative_to(out): load_file(file) for file in out.glob("model*/**/*.safetensors")})
        assert not any(report["absent"] for report in rounds(out))
    clear, encrypted = ends
    assert clear.keys() == encrypted.keys() != set()
    for file, tensors in clear.items():
        assert all(tensor.allclose(encrypted[file][key], atol=1e-5) for key, tensor in tensors.items())
