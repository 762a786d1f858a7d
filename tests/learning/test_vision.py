"""Models of torchvision and timm, at a small size, where the two are installed (`make test-vision`)."""

import json
import math
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from fedelta import (
    SGD,
    Classification,
    Examples,
    FedAvg,
    Federation,
    Full,
    Head,
    Local,
    LoRA,
    Task,
    Training,
    run,
)
from fedelta.core.digest import describe
from fedelta.core.errors import BadInput
from fedelta.core.parameters import trainable
from fedelta.learning.vision import Vision, read_weights

LABELS = ("cat", "dog", "horse")
SMALL = {"torchvision": "squeezenet1_1", "timm": "test_resnet"}
libraries = pytest.mark.usefixtures("vision_libraries")
both = pytest.mark.parametrize("library", SMALL)


def images(n: int, size: int, seed: int = 0) -> Examples:
    generator = torch.Generator().manual_seed(seed)
    return Examples({"x": torch.randn(n, 3, size, size, generator=generator)}, torch.arange(n) % len(LABELS))


def federated(model: Vision, size: int, rounds: int = 1) -> nn.Module:
    """What a federated round over two sites of four images makes of the model."""
    task = Task(model=model, objective=Classification(classes=len(LABELS)))
    training = Training(optimizer=SGD(lr=0.01), batch=2, epochs=None, steps=1)
    federation = Federation(algorithm=FedAvg(task=task, training=training), rounds=rounds, test=images(3, size, 9))
    sites = {"a": images(4, size, 1), "b": images(4, size, 2)}
    states, reports = zip(*run(federation, Local(federation, sites.__getitem__, list(sites))), strict=True)
    assert len(reports) == rounds
    assert not any(report.absent for report in reports)
    assert all(math.isfinite(report.metrics["test_loss"]) for report in reports)
    return federation.model(states[-1]).eval()


def logits(module: nn.Module, size: int) -> torch.Tensor:
    with torch.no_grad():
        return module.eval()(images(2, size, 5).inputs["x"])


def built(name: str, library: str, classes: int, **options: object) -> nn.Module:
    """As a user of the library alone builds it, with random weights that are all away from 0 and 1."""
    torch.manual_seed(1)
    if library == "timm":
        import timm

        return _stirred(timm.create_model(name, num_classes=classes, **options))
    import torchvision

    return _stirred(torchvision.models.get_model(name, num_classes=classes, **options))


def _stirred(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    return module


@libraries
@pytest.mark.parametrize(
    ("name", "library", "size", "tuning"),
    [
        pytest.param(
            "vgg11", "torchvision", 32, Head(), marks=pytest.mark.slow
        ),  # 129 million weights, drawn four times
        ("inception_v3", "torchvision", 75, Full()),
        ("inception_v3", "torchvision", 75, LoRA(rank=2, targets=("branch_pool.conv",))),
        ("googlenet", "torchvision", 64, Head()),
        ("test_resnet", "timm", 32, Full()),
        ("test_vit", "timm", 160, LoRA(rank=2)),
    ],
)
def test_a_round_trains_what_the_tuning_says_and_nothing_else(name, library, size, tuning):
    model = Vision(name=name, library=library, labels=LABELS, tuning=tuning)
    start = Task(model=model, objective=Classification(classes=3)).build(0)
    trained = trainable(start).keys()
    before = {key: value.clone() for key, value in start.state_dict().items()}
    after = federated(model, size).state_dict()
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved & trained
    frozen = before.keys() - trained
    if not isinstance(tuning, Full):  # otherwise the statistics of normalisation layers are trained, too
        assert not moved & frozen
    assert after.keys() == before.keys()


@libraries
def test_the_head_of_a_vgg_is_the_last_of_its_three_layers():
    model = Vision(name="vgg11", labels=LABELS, tuning=Head())
    assert set(trainable(model())) == {"classifier.6.weight", "classifier.6.bias"}
    whole = replace(model, tuning=Head(names=("classifier",)))()
    assert {name.split(".")[0] for name in trainable(whole)} == {"classifier"}
    assert len(trainable(whole)) == 6


@libraries
def test_the_auxiliary_head_of_inception_is_passed_over(tmp_path):
    theirs = built("inception_v3", "torchvision", 5, init_weights=False)
    assert any(name.startswith("AuxLogits.") for name in theirs.state_dict())
    torch.save(theirs.state_dict(), tmp_path / "inception.pth")
    labels = tuple("abcde")
    ours = Vision(name="inception_v3", labels=labels, weights=str(tmp_path / "inception.pth"))()
    assert not any(name.startswith("AuxLogits.") for name in ours.state_dict())
    torch.testing.assert_close(logits(ours, 96), logits(theirs, 96), rtol=0, atol=0)
    other = Vision(
        name="inception_v3",
        labels=labels,
        weights=str(tmp_path / "inception.pth"),
        options={"transform_input": True},
    )()
    assert not torch.allclose(logits(other, 96), logits(theirs, 96))


@libraries
@both
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".wrapped.pt"])
def test_weights_of_the_library_give_its_outputs(tmp_path, library, suffix):
    from safetensors.torch import save_file

    theirs = built(SMALL[library], library, 3)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(theirs.state_dict(), file)
    else:
        parallel = {f"module.{name}": value for name, value in theirs.state_dict().items()}
        torch.save({"state_dict": parallel, "epoch": 3} if "wrapped" in suffix else theirs.state_dict(), file)
    for weights in (file, tmp_path):
        ours = Vision(name=SMALL[library], library=library, labels=LABELS, weights=str(weights))()
        torch.testing.assert_close(logits(ours, 64), logits(theirs, 64), rtol=0, atol=0)


@libraries
@both
def test_what_was_trained_goes_back_into_the_library(tmp_path, library):
    name = SMALL[library]
    model = Vision(name=name, library=library, labels=LABELS)
    ours = federated(model, 64)
    torch.save(ours.state_dict(), tmp_path / "trained.pth")
    theirs = built(name, library, 3)
    theirs.load_state_dict(read_weights(tmp_path / "trained.pth"))
    torch.testing.assert_close(logits(theirs, 64), logits(ours, 64), rtol=0, atol=0)
    again = replace(model, weights=str(tmp_path / "trained.pth"))()
    torch.testing.assert_close(logits(again, 64), logits(ours, 64), rtol=0, atol=0)


@libraries
@both
def test_a_head_for_other_labels_is_drawn_anew_and_trained(tmp_path, library):
    theirs = built(SMALL[library], library, 5)
    torch.save(theirs.state_dict(), tmp_path / "five.pth")
    model = Vision(name=SMALL[library], library=library, labels=LABELS, weights=str(tmp_path / "five.pth"))
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(model().state_dict())
    same = {name for name, value in theirs.state_dict().items() if torch.equal(value, states[0][name])}
    head = states[0].keys() - same
    assert {name.rpartition(".")[0] for name in head} == {"classifier.1" if library == "torchvision" else "fc"}
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert {name for name in head if name.endswith("weight") and not torch.equal(states[0][name], states[2][name])}
    # with a tuning that would freeze the head, too: random weights are always trained
    frozen = replace(model, tuning=LoRA(rank=2, head=False))()
    assert any("lora_" not in name for name in trainable(frozen))


@libraries
def test_a_folder_that_timm_saved_tells_how_the_model_was_built(tmp_path):
    from timm.models import save_for_hf

    theirs = built("test_resnet", "timm", 3, in_chans=1)
    save_for_hf(theirs, tmp_path / "model", safe_serialization="both")
    model = Vision(name="test_resnet", library="timm", labels=LABELS, weights=str(tmp_path / "model"))
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model()(x), theirs.eval()(x), rtol=0, atol=0)
    with pytest.raises(BadInput, match="holds the weights of timm's 'test_resnet'"):
        replace(model, name="test_vit")()
    assert "in_chans" in json.loads((tmp_path / "model" / "config.json").read_text())["model_args"]


@libraries
def test_old_names_of_densenet_are_understood(tmp_path):
    theirs = built("densenet121", "torchvision", 3)
    old = {
        name.replace(".norm1.", ".norm.1.").replace(".conv2.", ".conv.2."): value
        for name, value in theirs.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    torch.save(old, tmp_path / "old.pth")
    ours = Vision(name="densenet121", labels=LABELS, weights=str(tmp_path / "old.pth"))()
    torch.testing.assert_close(logits(ours, 32), logits(theirs, 32), rtol=0, atol=0)


@libraries
def test_weights_that_do_not_fit_are_refused(tmp_path):
    def refuses(file, message, name="squeezenet1_1"):
        with pytest.raises(BadInput, match=message) as caught:
            Vision(name=name, labels=LABELS, weights=str(file))()
        assert "\n" not in str(caught.value)

    torch.save(built("squeezenet1_1", "torchvision", 3).state_dict(), tmp_path / "one.pth")
    refuses(tmp_path / "one.pth", "are not those of torchvision's 'resnet18': they have no", name="resnet18")
    refuses(tmp_path / "one.pth", "'features.0.weight' has shape", name="squeezenet1_0")
    refuses(tmp_path / "none.pth", "there is no file")
    refuses(tmp_path / "one.pth", r"no architecture 'squeezenet11'.*did you mean squeezenet1_", name="squeezenet11")
    refuses(tmp_path / "one.pth", "no architecture 'fasterrcnn_resnet50_fpn'", name="fasterrcnn_resnet50_fpn")
    (tmp_path / "two").mkdir()
    refuses(tmp_path / "two", "has none")
    for file in ("a.pth", "b.pt"):
        (tmp_path / "two" / file).write_bytes((tmp_path / "one.pth").read_bytes())
    refuses(tmp_path / "two", "a.pth, b.pt; name one of them")
    state = read_weights(tmp_path / "one.pth")
    torch.save({**state, "extra": torch.ones(1)}, tmp_path / "more.pth")
    refuses(tmp_path / "more.pth", "'extra' has no place in it")
    with pytest.raises(BadInput, match=r"cannot build 'squeezenet1_1'.*check Vision.name and Vision.options"):
        Vision(name="squeezenet1_1", labels=LABELS, options={"depth": 3})()


class Runs:
    """What a pickle would run on loading."""

    def __reduce__(self):
        return (sys.exit, (3,))


def test_files_that_are_no_state_dict_are_refused_and_run_nothing(tmp_path):
    torch.save({"state_dict": {"w": torch.ones(2)}, "run": Runs()}, tmp_path / "pickle.pth")
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    (tmp_path / "text.pth").write_text("weights")
    (tmp_path / "text.safetensors").write_text("weights")
    for file, message in {
        "pickle.pth": "holds more than tensors",
        "list.pth": "holds no state dict",
        "empty.pth": "holds no state dict",
        "text.pth": "holds",
        "text.safetensors": "holds no weights that can be read",
        "absent.safetensors": "there is no file",
    }.items():
        with pytest.raises(BadInput, match=message) as caught:
            read_weights(tmp_path / file)
        assert "\n" not in str(caught.value)


def test_values_that_cannot_be_are_refused():
    with pytest.raises(BadInput, match="two or more distinct labels"):
        Vision(name="vgg11", labels=("one",))
    with pytest.raises(BadInput, match="'torchvision' or 'timm', got 'keras'"):
        Vision(name="vgg11", labels=LABELS, library="keras")
    with pytest.raises(BadInput, match="cannot set 'num_classes'"):
        Vision(name="vgg11", labels=LABELS, options={"num_classes": 3})


def test_a_model_is_a_value():
    model = Vision(name="vgg11", labels=LABELS, options={"dropout": 0.1})
    assert model == replace(model) != replace(model, library="timm")
    assert describe(model) == describe(replace(model)) != describe(replace(model, options={}))


def test_a_library_that_is_missing_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(BadInput, match=r"timm is not installed; run: pip install 'fedelta\[vision\]'"):
        Vision(name="vgg11", library="timm", labels=LABELS)()


def test_a_library_for_another_pytorch_is_told(monkeypatch, tmp_path):
    (tmp_path / "timm.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")')
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "timm", raising=False)
    with pytest.raises(BadInput, match=r"does not fit PyTorch .* \(operator torchvision::nms does not exist\)"):
        Vision(name="vgg11", library="timm", labels=LABELS)()
