"""How much the engine may hold: what the caller says, else shares of what the device has free."""

from dataclasses import dataclass

import torch

from ..bench.flops import kv_bytes as bytes_of_tokens
from ..errors import ViCAError

CPU_BYTES = 2**30  # of text K/V, and of images, on a CPU
RESERVE = 0.1  # of a card's memory for activations and captured graphs
MAX_BATCH = {"cuda": 256, "cpu": 16}


@dataclass(frozen=True)
class Budget:
    max_batch: int
    slots: int  # rows of text K/V
    image_bytes: int

    @classmethod
    def of(cls, model, max_batch: int | None, kv_bytes: int | None, image_bytes: int | None) -> "Budget":
        for name, value, least in (
            ("max_batch", max_batch, 1),
            ("kv_bytes", kv_bytes, 1),
            ("image_memory_bytes", image_bytes, 0),
        ):
            if value is not None and (not isinstance(value, int) or value < least):
                raise ViCAError(f"{name} is {value!r}; it must be a whole number from {least}")
        device, config = model.device, model.config
        if device.type == "cpu":
            text, images = CPU_BYTES, CPU_BYTES
        else:
            free, total = torch.cuda.mem_get_info(device)
            free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
            room = max(0, free - int(RESERVE * total))
            # the other's share grows where one is given
            share = 0.05 if config.plan[0].visual_updated else 0.5
            images = int(share * room) if kv_bytes is None else max(0, room - kv_bytes)
            images = image_bytes if image_bytes is not None else images
            text = room - images
        slot = bytes_of_tokens(config, model.dtype.itemsize)[1]
        max_batch = max_batch or MAX_BATCH[device.type]
        most = max_batch * config.text_config.max_position_embeddings  # more could never be used
        slots = min((text if kv_bytes is None else kv_bytes) // slot, most)
        if slots < 2:
            raise ViCAError(
                f"{text if kv_bytes is None else kv_bytes} bytes for text K/V hold no token; one takes {slot}"
            )
        return cls(max_batch, slots, images if image_bytes is None else image_bytes)
