"""What tensors contain, as a digest: whether two parties were sent the same."""

import hashlib
from dataclasses import dataclass

import torch

from fedelta.core.messages import Tensors


def content(tensors: Tensors) -> bytes:
    """32 bytes (BLAKE2b), equal for the same names, dtypes, shapes and bytes, and for nothing else."""
    hasher = hashlib.blake2b(digest_size=32)
    for name, tensor in sorted(tensors.items()):
        hasher.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        if tensor.numel():
            hasher.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hasher.digest()


@dataclass
class Contents:
    """`content`, remembered for the last tensors: in a simulation all sites of a round get the very same."""

    tensors: Tensors | None = None
    found: bytes = b""

    def of(self, tensors: Tensors) -> bytes:
        if self.tensors is not tensors:
            self.tensors, self.found = tensors, content(tensors)
        return self.found
