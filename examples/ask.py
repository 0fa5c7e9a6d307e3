"""Ask the trained toy model one question about a picture, as accel and as mask: one function, two ways to compute it.

python examples/ask.py
"""

from pathlib import Path

import torch

import vica

PLAYGROUND = Path(__file__).parents[1] / "playground"

model, processor = vica.load(PLAYGROUND / "checkpoints/toy-vica", device="cpu", dtype="float32")
inputs = processor.ask("How many triangles are there?", images=[PLAYGROUND / "toy/pictures/3.png"])
prompt = inputs["input_ids"].shape[1]  # the image is one placeholder in it

logits = {}
for variant in ("accel", "mask"):
    model.set_variant(variant)  # the weights stay the same
    with torch.inference_mode():
        logits[variant] = model(**inputs).logits
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    print(f"{variant}: {processor.decode(out[0, prompt:], skip_special_tokens=True).strip()}")

print(f"largest difference of logits: {float((logits['accel'] - logits['mask']).abs().max()):.0e}")
