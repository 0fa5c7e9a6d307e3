"""Compute numbers that stand for contents: images, weights, and the noise of a request's seed."""

import hashlib

import torch

CHECKSUM_WORDS = 2**24  # summed at once, which bounds the memory that a checksum takes


def fingerprint(tensors: list[torch.Tensor]) -> str:
    """Returns a digest of all values of all tensors."""
    return digest("".join(map(digest_tensor, tensors)).encode())


def sample_fingerprint(tensors: list[torch.Tensor], of_each: int = 1024) -> str:
    """Returns a fingerprint of about `of_each` values of each tensor. Training or merging changes it. The step between
    the values is odd, so that they come from all columns."""
    return fingerprint([x.detach().flatten()[:: x.numel() // of_each | 1] for x in tensors])


def digest(content: bytes) -> str:
    """Returns 128 bits of the content's BLAKE2b hash in hexadecimal."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def digest_tensor(x: torch.Tensor) -> str:
    """Returns a 128-bit digest of the values, their places, the shape and the type, computed on the tensor's device."""
    bits = x.detach().contiguous().flatten().view(torch.uint8)
    bits = torch.nn.functional.pad(bits, (0, -bits.numel() % 4)).view(torch.int32)
    sums = []
    for part, chunk in enumerate(bits.split(CHECKSUM_WORDS)):
        place = torch.arange(len(chunk), device=x.device) + part * CHECKSUM_WORDS
        for salt in (1, 2):
            sums.append(((chunk.long() + 1) * scramble(place * 2 + salt)).sum())
    words = " ".join(map(str, torch.stack(sums).tolist())) if sums else ""
    return digest(f"{x.dtype} {list(x.shape)} {words}".encode())


def scramble(x: torch.Tensor) -> torch.Tensor:
    """Returns a bijection of 64-bit numbers that leaves no pattern (splitmix64's finaliser)."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - 2**64), (27, 0x94D049BB133111EB - 2**64)):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)
