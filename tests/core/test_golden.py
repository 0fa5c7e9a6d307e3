"""The public reference's own logits, on weights and inputs that golden/recipe.py regenerates."""

from pathlib import Path

import numpy as np
import pytest
import torch

import vica
from tests.golden import recipe

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = sorted(p.name for p in GOLDEN.glob("*.npz"))
TOLERANCE = 1e-4


def build(meta, variant: str) -> vica.ViCAForConditionalGeneration:
    known = {k: v for k, v in meta["config"].items() if k != "model_type"}
    config = vica.ViCAConfig(
        text_config=known, variant=variant, t2v_layers=meta["t2v_layers"], freeze_prefix=meta["freeze_prefix"]
    )
    with torch.device("meta"):
        model = vica.ViCAForConditionalGeneration(config)
    weights = {name: torch.from_numpy(array) for name, array in recipe.weights(meta)}
    model.load_state_dict(weights, strict=True, assign=True)
    return model.eval()


def padded_batch(meta, data):
    """Left-padded rows of all samples: ids, mask, features."""
    inputs = recipe.inputs(meta)
    if meta.get("text_only"):
        rows, features = [data[f"txt_ids_{b}"] for b in range(len(inputs))], None
    else:
        rows = [data[f"input_ids_{b}"] for b in range(len(inputs))]
        features = [torch.from_numpy(visual) for _, _, visual in inputs]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    return ids, mask, features


def check(name: str, got: torch.Tensor, want: np.ndarray) -> None:
    assert got.shape == want.shape, (name, got.shape, want.shape)
    error = np.abs(got.numpy() - want)
    assert np.isfinite(error).all(), f"{name}: NaN or infinity"
    assert error.max(initial=0.0) < TOLERANCE, f"{name}: off by {error.max():.2e}"


def params(names):
    return [pytest.param(n, marks=pytest.mark.slow if "width4096" in n else ()) for n in names]


@pytest.mark.parametrize("variant", ["accel", "mask"])
@pytest.mark.parametrize("file", params(FILES))
@torch.no_grad()
def test_prefix_text_and_decode_logits(file, variant):
    meta, data = recipe.load(GOLDEN / file)
    model = build(meta, variant)
    ids, mask, features = padded_batch(meta, data)
    out = model(ids, attention_mask=mask, image_features=features, use_cache=True)
    for b in range(len(ids)):
        logits, row = out.logits[b][mask[b] == 1], ids[b][mask[b] == 1]
        p = meta["prefix_lens"][b] if not meta.get("text_only") else 0
        text_from = p + 1 if not meta.get("text_only") else 0
        if f"prefix_logits_{b}" in data:
            check(f"prefix of row {b}", logits[:p], data[f"prefix_logits_{b}"])
        check(f"text of row {b}", logits[text_from : len(row)], data[f"text_logits_{b}"])

    tokens = torch.from_numpy(data["tokens"])
    assert torch.equal(out.logits[:, -1].argmax(-1), tokens[:, 0])
    for step in range(meta["steps"]):
        mask = torch.cat([mask, mask.new_ones(len(ids), 1)], dim=1)
        out = model(tokens[:, step : step + 1], attention_mask=mask, past_key_values=out.past_key_values)
        check(f"decode step {step}", out.logits[:, 0], data["decode_logits"][:, step])


def test_every_golden_file_is_here():
    assert len(FILES) == 10
