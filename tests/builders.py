"""Builds small models and batches for the tests."""

from dataclasses import dataclass, field

import torch

import vica

IMAGE = vica.IMAGE_TOKEN_INDEX
VOCAB = 97
WIDTH = 32


def tiny_config(**changes) -> vica.ViCAConfig:
    text = dict(
        hidden_size=WIDTH, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        vocab_size=VOCAB, max_position_embeddings=512,
    )  # fmt: skip
    text |= changes.pop("text_config", {})
    return vica.ViCAConfig(text_config=text, **{"t2v_layers": [0, 2], **changes})


def tiny_model(seed: int = 0, **changes) -> vica.ViCAForConditionalGeneration:
    """Returns a model with weights so wide that a wrong key or position moves the logits far beyond any tolerance."""
    torch.manual_seed(seed)
    model = vica.ViCAForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("norm.weight") or "layernorm" in name:
                weight.copy_(1 + 0.1 * torch.randn_like(weight))
            elif weight.dim() == 2 and "vision_tower" not in name:
                weight.normal_(0, 1.0 if "embed_tokens" in name else weight.shape[1] ** -0.5)
            elif "bias" in name:
                weight.normal_(0, 0.5)
    return model


def tiny_vision(**changes) -> dict:
    return dict(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7,
        projection_dim=24, **changes,
    )  # fmt: skip


@dataclass
class Row:
    """A prompt's parts in order: an int is that many text tokens, ("image", n) is an image of n visual tokens."""

    parts: tuple
    seed: int = 0
    ids: list = field(init=False)
    images: list = field(init=False)

    def __post_init__(self):
        random = torch.Generator().manual_seed(self.seed)
        self.ids, self.images = [], []
        for part in self.parts:
            if isinstance(part, int):
                self.ids += torch.randint(3, VOCAB, (part,), generator=random).tolist()
            else:
                self.ids.append(IMAGE)
                self.images.append(torch.randn(part[1], WIDTH, generator=random))


def image(tokens: int):
    return ("image", tokens)


def batch(rows: list[Row], side: str = "left", extra: int = 0) -> dict:
    """Returns input_ids, attention_mask and image_features of prompts, padded on `side` (`extra` columns more than
    needed)."""
    width = max(len(r.ids) for r in rows) + extra
    ids, mask = [], []
    for row in rows:
        hole = [0] * (width - len(row.ids))
        ones = [1] * len(row.ids)
        ids.append(hole + row.ids if side == "left" else row.ids + hole)
        mask.append(hole + ones if side == "left" else ones + hole)
    return dict(
        input_ids=torch.tensor(ids),
        attention_mask=torch.tensor(mask),
        image_features=[x for r in rows for x in r.images] or None,
    )


def text_columns(inputs: dict) -> torch.Tensor:
    return (inputs["attention_mask"] == 1) & (inputs["input_ids"] != IMAGE)


def assert_close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-5, what: str = "") -> None:
    """Fails on NaN. The tolerance is absolute, and relative for values above 1."""
    assert got.shape == want.shape, (what, got.shape, want.shape)
    assert torch.isfinite(got).all(), f"{what}: NaN or infinity"
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, msg=lambda m: f"{what}: {m}")


# Shapes of batches; each name is a test case.
LAYOUTS = {
    "image first": [Row((image(5), 6))],
    "image last": [Row((6, image(5)))],
    "image alone": [Row((image(5),)), Row((3, image(2), 2), 1)],
    "image in the middle": [Row((4, image(7), 5))],
    "no image": [Row((9,))],
    "two images": [Row((3, image(4), 2, image(6), 4))],
    "three images, two side by side": [Row((2, image(3), image(4), 3, image(2), 2))],
    "unequal numbers of images": [Row((3, image(4), 5)), Row((2, image(3), 2, image(5), 3), 1), Row((7,), 2)],
    "ragged lengths": [Row((4, image(6), 9)), Row((2, image(6), 3), 1), Row((5, image(6), 1), 2)],
    "images of different sizes": [Row((3, image(2), 4)), Row((3, image(9), 4), 1)],
    "text beside image": [Row((8,)), Row((3, image(5), 4), 1)],
    "only text, ragged": [Row((8,)), Row((3,), 1)],
    "uniform": [Row((4, image(6), 5)), Row((4, image(6), 5), 1)],
}
