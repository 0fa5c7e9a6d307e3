"""Makes the inputs: prompts of one shape, with an image each, the same for every column."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError


@dataclass(frozen=True)
class Shape:
    """Token counts of a prompt, `prefix`, an image of `visual` and `text`, and of its longest answer."""

    prefix: int
    visual: int
    text: int
    answer: int = 1

    def check(self, config: ViCAConfig) -> "Shape":
        total, room = self.prefix + self.visual + self.text + self.answer, config.text_config.max_position_embeddings
        if total > room:
            raise ViCAError(f"{self} takes {total} positions, the model has {room}")
        return self

    def __str__(self) -> str:
        return f"{self.prefix} + {self.visual} + {self.text}"


class Prompts:
    """`batch` prompts with a common prefix, in the forms that models take."""

    def __init__(self, config: ViCAConfig, batch: int, shape: Shape, device, dtype, seed: int = 0):
        self.config, self.batch, self.shape = config, batch, shape
        self.device, self.dtype, self.seed = device, dtype, seed
        random = torch.Generator().manual_seed(seed)
        # without the special tokens and the last word of the vocabulary, which is transformers' placeholder here
        words = torch.randint(
            3, config.text_config.vocab_size - 1, (batch, shape.prefix + shape.text), generator=random
        )
        words[words == config.image_token_index] = 3
        self.prefix, self.text = words[:1, : shape.prefix].expand(batch, -1), words[:, shape.prefix :]

    @cached_property
    def stacked(self) -> torch.Tensor:
        """Features [batch, visual, width], made on the device because they may be large."""
        shape = (self.batch, self.shape.visual, self.config.text_config.hidden_size)
        random = torch.Generator(self.device).manual_seed(self.seed)
        return 0.8 * torch.randn(shape, generator=random, device=self.device, dtype=self.dtype)

    @cached_property
    def features(self) -> list[torch.Tensor]:
        return list(self.stacked)

    @cached_property
    def pixels(self) -> torch.Tensor:
        side = self.config.vision_config.image_size
        random = torch.Generator(self.device).manual_seed(self.seed)
        shape = (self.batch, 3, side, side)
        return torch.randn(shape, generator=random, device=self.device, dtype=self.dtype)

    @cached_property
    def ids(self) -> list[list[int]]:
        return self._around(self.config.image_token_index, 1).tolist()

    @cached_property
    def tensor(self) -> torch.Tensor:
        return torch.tensor(self.ids, device=self.device)

    def expanded(self, placeholder: int) -> torch.Tensor:
        """Returns the ids with a placeholder for each visual token, as transformers takes them."""
        return self._around(placeholder, self.shape.visual).to(self.device)

    @cached_property
    def without_image(self) -> torch.Tensor:
        return self._around(0, 0).to(self.device)

    def _around(self, placeholder: int, times: int) -> torch.Tensor:
        marks = torch.full((self.batch, times), placeholder)
        return torch.cat([self.prefix, marks, self.text], dim=1)


def write_pictures(folder: Path, count: int, size: tuple[int, int] = (640, 480), seed: int = 0) -> list[Path]:
    """Writes JPEG files that resemble photographs in size and in decoding cost: smooth gradients under noise."""
    random, (width, height) = np.random.default_rng(seed), size
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    paths = [folder / f"{n:05}.jpg" for n in range(count)]
    for path in paths:
        a, b, c = random.uniform(-1, 1, (3, 3))
        smooth = 128 + 80 * np.sin(6 * (x[..., None] * a + y[..., None] * b + c))
        noisy = smooth + random.normal(0, 12, smooth.shape)
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return paths
