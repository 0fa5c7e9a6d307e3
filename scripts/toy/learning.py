"""Trains the small parts that training starts from."""

from collections.abc import Callable

import numpy as np
import torch

from vica.utils.progress import counter


def learn(model, loss: Callable[[], torch.Tensor], steps: int, rate: float, name: str, device: torch.device):
    """Trains with AdamW, a short warm-up of the rate and a cosine decay, and returns the model. On CUDA a step is
    captured once: for such small models the launches of kernels would take longer than their work."""
    captured = device.type == "cuda"
    rates = torch.tensor(0.0, device=device)  # zero at first: the steps before the capture must not train
    settings = dict(lr=rates, capturable=True) if captured else dict(lr=rate)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05, **settings)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=captured, cache_enabled=False):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return value.detach()

    model.train()
    run = capture(step) if captured else step
    with counter(steps, "steps", name) as bar:
        for done in range(steps):
            now = rate * min((done + 1) / max(1, steps // 20), 0.5 * (1 + np.cos(np.pi * done / steps)))
            for group in optimizer.param_groups:
                group["lr"] = rates.fill_(now) if captured else now
            value = run()
            if done % 100 == 0 or done == steps - 1:
                bar.set_postfix(loss=f"{value.item():.3f}")
            bar.update()
    print(f"{name}: loss {value.item():.3f} after {steps} steps", flush=True)
    return model.eval().cpu()


def capture(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """Returns `step` as a CUDA graph, captured after some ordinary steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = step()

    def run() -> torch.Tensor:
        graph.replay()
        return value

    return run
