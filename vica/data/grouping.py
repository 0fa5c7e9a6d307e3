"""Orders the samples of an epoch so that samples of similar length, or of one modality, share a batch."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

IMAGE_WORDS = 128  # words that an image adds to a sample's length when both kinds are grouped together: LLaVA's number


class LengthGroupedSampler(Sampler):
    """Gives every index once an epoch, in megabatches of `world_size` batches, one for each rank in order.

    With gradient accumulation, count a rank once for each of its batches in a step. The ranks' shares of a megabatch
    are about equally long. `lengths` are TrainingSet's: negative for text without an image.

    `by_modality`: a megabatch holds only images or only text, except the last ones, in which both run out. `pool` is
    the number of megabatches that are sorted by length together. 1, as in LLaVA, leaves their lengths to chance; it is
    the default with `by_modality`. By length alone the default is 50, as in transformers.
    """

    def __init__(
        self,
        lengths: list[int],
        batch_size: int,
        world_size: int = 1,
        by_modality: bool = False,
        seed: int = 0,
        pool: int | None = None,
    ):
        self.lengths, self.batch_size, self.world_size, self.seed = lengths, batch_size, world_size, seed
        self.by_modality, self.pool, self.epoch = by_modality, pool or (1 if by_modality else 50), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        dice = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.by_modality:
            sizes = [abs(length) for length in self.lengths]
            kinds = [[i for i, x in enumerate(self.lengths) if (x > 0) == image] for image in (True, False)]
        else:
            sizes = [length + IMAGE_WORDS if length > 0 else -length for length in self.lengths]
            kinds = [list(range(len(sizes)))]
        full, rest = [], []
        for indices in kinds:
            megabatches, left = self._cut(shuffle(indices, dice), sizes)
            full += megabatches
            rest += left
        # The remainders come last, where they do not shift any other megabatch among the ranks.
        for megabatch in [*shuffle(full, dice), *self._in_megabatches(rest)]:
            yield from deal(megabatch, sizes, self.world_size)

    def _cut(self, indices: list[int], sizes: list[int]) -> tuple[list[list[int]], list[int]]:
        """Returns full megabatches, and the rest of `indices`."""
        size = self.batch_size * self.world_size
        whole = len(indices) // size * size
        megabatches = []
        for start in range(0, whole, self.pool * size):
            pool = indices[start : min(start + self.pool * size, whole)]
            megabatches += self._in_megabatches(sorted(pool, key=sizes.__getitem__))
        return megabatches, indices[whole:]

    def _in_megabatches(self, indices: list[int]) -> list[list[int]]:
        size = self.batch_size * self.world_size
        return [indices[start : start + size] for start in range(0, len(indices), size)]


def shuffle(items: list, dice: torch.Generator) -> list:
    return [items[i] for i in torch.randperm(len(items), generator=dice).tolist()]


def deal(megabatch: list[int], sizes: list[int], ranks: int) -> list[int]:
    """Returns the megabatch as the ranks' shares one after the other: each sample, longest first, goes to the lightest
    rank."""
    room = -(-len(megabatch) // ranks)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    load = [0] * ranks
    for index in sorted(megabatch, key=sizes.__getitem__, reverse=True):
        lightest = min((rank for rank in range(ranks) if len(shares[rank]) < room), key=load.__getitem__)
        shares[lightest].append(index)
        load[lightest] += sizes[index]
    return [index for share in shares for index in share]
