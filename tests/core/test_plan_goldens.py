"""FastV, PyramidDrop, VTW, ShortV and ViCA with PyramidDrop as plans, against the logits of their public code."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vica
from tests import plans
from tests.builders import IMAGE
from tests.golden import recipe

GOLDEN = Path(__file__).parents[1] / "golden" / "reductions"
FILES = sorted(p.name for p in GOLDEN.glob("*.npz"))
TOLERANCE = 1e-4
METHODS = {
    "fastv": plans.fastv,
    "pdrop": plans.pyramiddrop,
    "vtw": plans.vtw,
    "shortv": plans.shortv,
    "vica_pdrop": plans.vica_pyramiddrop,
}


def build(meta, variant: str) -> vica.ViCAForConditionalGeneration:
    config = vica.ViCAConfig(text_config=dict(meta["config"]), variant=variant, t2v_layers=[])
    config.plan = METHODS[meta["method"]](meta["config"]["num_hidden_layers"], **meta["settings"])
    with torch.device("meta"):
        model = vica.ViCAForConditionalGeneration(config)
    weights = {name: torch.from_numpy(array) for name, array in recipe.weights(meta)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def rows(meta) -> list[tuple[list[int], list[torch.Tensor]]]:
    """Returns ids and features of each row, whose parts are text and images in turn."""
    random, vocabulary = np.random.RandomState(meta["seed"] + 1000), meta["config"]["vocab_size"]
    result = []
    for lengths in meta["rows"]:
        ids: list[int] = []
        features = []
        for place, length in enumerate(lengths):
            if place % 2:
                drawn = random.standard_normal((length, meta["config"]["hidden_size"])) * 0.8
                features.append(torch.from_numpy(drawn.astype(np.float32)))
                ids.append(IMAGE)
            else:
                ids += random.randint(3, vocabulary, size=length).tolist()
        result.append((ids, features))
    return result


def padded(batch, side: str):
    width = max(len(ids) for ids, _ in batch)
    holes = [[0] * (width - len(ids)) for ids, _ in batch]
    ids = [hole + ids if side == "left" else ids + hole for hole, (ids, _) in zip(holes, batch)]
    ones = [[1] * len(row) for row, _ in batch]
    mask = [hole + one if side == "left" else one + hole for hole, one in zip(holes, ones)]
    return torch.tensor(ids), torch.tensor(mask), [x for _, features in batch for x in features]


def check(name: str, got: torch.Tensor, want: np.ndarray) -> None:
    assert got.shape == want.shape, (name, got.shape, want.shape)
    error = np.abs(got.numpy() - want)
    assert np.isfinite(error).all(), f"{name}: NaN or infinity"
    assert error.max(initial=0.0) < TOLERANCE, f"{name}: off by {error.max():.2e}"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("variant", ["accel", "mask"])
@pytest.mark.parametrize("file", FILES)
@torch.no_grad()
def test_ragged_batch_equals_the_public_code(file, variant, side):
    meta, data = recipe.load(GOLDEN / file)
    model, batch = build(meta, variant), rows(meta)
    ids, mask, features = padded(batch, side)
    out = model(ids, attention_mask=mask, image_features=features or None, use_cache=True)
    for b, (row, _) in enumerate(batch):
        assert row == data[f"input_ids_{b}"].tolist()
        text = (mask[b] == 1) & (ids[b] != IMAGE)
        check(f"row {b}", out.logits[b][text], data[f"logits_{b}"])
        assert out.past_key_values.kv_lengths()[:, b].tolist() == data[f"kv_lens_{b}"].tolist()

    tokens = torch.from_numpy(data["tokens"])
    for step in range(meta["steps"]):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        out = model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=out.past_key_values)
        check(f"decode step {step}", out.logits[:, 0], data["decode_logits"][:, step])


def test_every_golden_file_is_here():
    assert len(FILES) == 15
