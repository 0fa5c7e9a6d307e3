"""Collates examples of any lengths into one batch."""

import torch
from torch.nn.utils.rnn import pad_sequence

from .labels import IGNORE
from .training import Broken, Example


class Collator:
    """Returns the model's inputs, padded on the right, with `sample_ids` and the `broken` samples beside them.
    `pixel_values` is present only if the batch has an image."""

    def __init__(self, pad_id: int):
        self.pad_id = pad_id

    def __call__(self, items: list[Example | Broken]) -> dict:
        examples = [item for item in items if isinstance(item, Example)]
        ids, labels = [item.input_ids for item in examples], [item.labels for item in examples]
        if not examples:
            # A sequence without labels, instead of no batch: a rank that skipped its step would block the others.
            ids, labels = [torch.tensor([self.pad_id])], [torch.tensor([IGNORE])]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "attention_mask": pad_sequence([torch.ones_like(one) for one in ids], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE),
            "sample_ids": [item.id for item in examples],
            "broken": [item for item in items if isinstance(item, Broken)],
        }
        if pixels := [image for item in examples for image in item.pixel_values]:
            batch["pixel_values"] = torch.stack(pixels)
        return batch
