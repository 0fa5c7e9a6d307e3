"""A training loop of your own: the toy model learns two conversations by heart, through frozen visual tokens.

python examples/train.py

For LLaVA's two stages, with checkpoints, adapters and several GPUs, there is `vica train`: docs/training.md.
"""

from pathlib import Path

import torch
from torch.utils.data import DataLoader

import vica
from vica.data.collate import Collator
from vica.data.samples import open_samples
from vica.data.training import TrainingSet
from vica.plan.sizes import visual_tokens

PLAYGROUND = Path(__file__).parents[1] / "playground"
QUESTION, PICTURE = "What is in the picture?", PLAYGROUND / "toy/picture.png"

torch.manual_seed(0)
model, processor = vica.load(PLAYGROUND / "checkpoints/toy-vica", variant="accel", device="cpu", dtype="float32")


def ask() -> str:
    inputs = processor.ask(QUESTION, images=[PICTURE])
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    return processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


samples = open_samples(PLAYGROUND / "toy/samples.json")
data = TrainingSet(samples, processor, PLAYGROUND / "toy", visual_tokens=visual_tokens(model.config))
batches = DataLoader(data, batch_size=2, collate_fn=Collator(processor.pad_id))  # with and without an image

for name, parameter in model.named_parameters():
    parameter.requires_grad = "vision_tower" not in name  # as in LLaVA-1.5's stage 2
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)

print(f"before: {ask()}")
model.train()
for epoch in range(12):
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name not in ("sample_ids", "broken")}
        loss = model(**inputs, skip_logits=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if epoch % 4 == 3 or epoch == 0:
        print(f"epoch {epoch:2}  loss {float(loss.detach()):.3f}")
model.eval()
print(f"after: {ask()}")
