import pytest
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn import functional

from fedelta.learning.cross_entropy import cross_entropy


def reference(logits: Tensor, targets: Tensor) -> Tensor:
    losses = functional.cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


def case(*shape: int, classes: int = 7) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    return 3 * torch.randn(*shape, classes, generator=g), torch.randint(0, classes, shape, generator=g)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5)])
def test_it_is_that_of_pytorch_and_so_is_its_gradient(shape: tuple[int, ...]) -> None:
    logits, targets = case(*shape)
    logits.requires_grad_()
    weights = torch.arange(targets.numel()).view(shape) / 3
    torch.testing.assert_close(cross_entropy(logits, targets), reference(logits, targets))
    (found,) = torch.autograd.grad((weights * cross_entropy(logits, targets)).sum(), logits)
    (known,) = torch.autograd.grad((weights * reference(logits, targets)).sum(), logits)
    torch.testing.assert_close(found, known)


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = cross_entropy(logits, torch.tensor([1]))
    assert loss.tolist() == [2e4]
    loss.sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [[1.0, -1.0, 0.0]]


def test_bfloat16_is_computed_in_float32() -> None:
    logits, targets = case(4, 6)
    half = logits.bfloat16().requires_grad_()
    loss = cross_entropy(half, targets)
    torch.testing.assert_close(loss, reference(half.float(), targets))
    (gradient,) = torch.autograd.grad(loss.sum(), half)
    assert gradient.dtype == torch.bfloat16


def test_many_models_at_once() -> None:
    inputs, targets = case(4, 3, 5)
    weights = torch.randn(4, 7, 7, requires_grad=True)

    def loss(weight: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(inputs @ weight, targets).sum()

    known = torch.stack(
        [
            torch.autograd.grad(reference(x @ w, t).sum(), w)[0]
            for w, x, t in zip(weights.detach().requires_grad_(), inputs, targets, strict=True)
        ]
    )
    (found,) = torch.autograd.grad(vmap(loss)(weights, inputs, targets).sum(), weights)
    torch.testing.assert_close(found, known)
    torch.testing.assert_close(vmap(grad(loss))(weights.detach(), inputs, targets), known)


def test_it_keeps_no_tensor_of_the_size_of_the_logits() -> None:
    logits, targets = case(4, 6, classes=50)
    kept = []
    leaf = logits.requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        cross_entropy(leaf, targets).sum()
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() >= logits.numel()} == {logits.data_ptr()}
