"""The columns of the latency tables: a class for each competitor, with a method for each phase that it takes part in.

A method prepares one phase's work on some prompts and returns it as a Job. It may fail: then the column says why.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..engine import Request
from ..utils.errors import ViCAError
from .clock import Job
from .drive import Drive, answer_all
from .inputs import Prompts
from .models import Models
from .peers import Transformers

Makers = dict[str, Callable[[], Job]]

PREFILL = ("transformers", "text", "mask", "dense", "accel", "nothing", "prefix", "image")
# The columns of each phase, in the order of their turns.
PHASES = {
    "tower": ("transformers", "accel", "prefix"),
    "prefill": PREFILL,
    "visual": PREFILL,
    "first": ("transformers", "mask", "dense", "accel", "nothing", "prefix"),
    "decode": ("transformers", "static", "mask", "dense", "accel", "prefix"),
    "generate": ("dense", "prefix"),
}


class PeerColumn:
    """transformers' own LLaVA."""

    def __init__(self, models: Models, steps: int):
        self.models, self.steps = models, steps

    @property
    def model(self) -> Transformers:
        return self.models.transformers

    def ids(self, p: Prompts) -> torch.Tensor:
        return p.expanded(self.model.image_token)

    def tower(self, p: Prompts) -> Job:
        model = self.model
        return Job(lambda _: model.features(p.pixels))

    def prefill(self, p: Prompts) -> Job:
        model, ids = self.model, self.ids(p)
        return Job(lambda _: model.prefill(ids, p.stacked)[0])

    def first(self, p: Prompts) -> Job:
        model, ids = self.model, self.ids(p)
        return Job(lambda _: model.from_pixels(ids, p.pixels))

    def decode(self, p: Prompts) -> Job:
        model, ids = self.model, self.ids(p)
        return Job(
            lambda given: model.decode(given[0], given[1], self.steps),
            setup=lambda: model.prefill(ids, p.stacked),
            steps=self.steps,
        )


class TextColumn(PeerColumn):
    """transformers' LLaVA without the image."""

    def prefill(self, p: Prompts) -> Job:
        model = self.model
        return Job(lambda _: model.prefill(p.without_image)[0])


class CompiledColumn(PeerColumn):
    """transformers' decode on a static cache, compiled for some batches only, since that takes long."""

    def __init__(self, models: Models, steps: int, batches: list[int]):
        super().__init__(models, steps)
        self.batches = batches

    def decode(self, p: Prompts) -> Job:
        if p.batch not in self.batches:
            raise ViCAError("not run at batches that --compile-batch does not name")
        model, ids = self.model, self.ids(p)
        step, cache = model.compiled(), model.static_cache(ids.shape[1] + self.steps + 1)

        def setup():
            cache.reset()
            return model.prefill(ids, p.stacked, cache)

        return Job(lambda given: model.decode(given[0], given[1], self.steps, step), setup, self.steps)


class PlainColumn:
    """Our plain model: a variant's own forward, without the engine."""

    def __init__(self, models: Models, steps: int, variant: str):
        self.models, self.steps, self.variant = models, steps, variant

    @property
    def model(self):
        return self.models.wired(self.variant)

    def tower(self, p: Prompts) -> Job:
        return Job(torch.inference_mode()(lambda _: self.model.get_image_features(p.pixels)))

    def prefill(self, p: Prompts) -> Job:
        return Job(lambda _: first_tokens(self.model, p, image_features=p.features)[0])

    def first(self, p: Prompts) -> Job:
        return Job(lambda _: first_tokens(self.model, p, pixel_values=p.pixels)[0])

    def decode(self, p: Prompts) -> Job:
        model = self.model
        return Job(
            lambda given: decode(model, given[0], given[1], self.steps),
            setup=lambda: first_tokens(model, p, image_features=p.features),
            steps=self.steps,
        )


class EngineColumn:
    """Our engine: a variant, and which parts of a prompt it has computed before."""

    def __init__(self, drive: Callable[[], Drive], steps: int, prefix_kept: bool = True, image_kept: bool = False):
        self.drive, self.steps, self.prefix_kept, self.image_kept = drive, steps, prefix_kept, image_kept

    def tower(self, p: Prompts) -> Job:
        drive = self.drive()
        return Job(lambda _: drive.encode(p.pixels))

    def prefill(self, p: Prompts) -> Job:
        drive = self.drive()
        prompts = drive.admit(p, self.prefix_kept)
        if not self.image_kept:
            return Job(lambda _: drive.first_tokens(prompts, p.features))
        drive.give_images(prompts, p.features)
        return Job(lambda _: drive.prefill(prompts))

    def first(self, p: Prompts) -> Job:
        drive = self.drive()
        prompts = drive.admit(p, self.prefix_kept)
        return Job(lambda _: drive.first_tokens(prompts, drive.encode(p.pixels)))

    def decode(self, p: Prompts) -> Job:
        drive = self.drive()
        prompts = drive.admit(p, self.prefix_kept)
        return Job(
            lambda batch: drive.decode(batch, self.steps),
            setup=lambda: drive.start_decode(prompts, p.features),
            steps=self.steps,
        )

    def generate(self, p: Prompts, new_tokens: int) -> Job:
        drive = self.drive()
        options: dict[str, Any] = dict(max_new_tokens=new_tokens, ignore_eos=True)
        requests = [Request(ids, [image], **options) for ids, image in zip(p.ids, p.features)]
        return Job(lambda _: answer_all(drive.engine, requests))


class Columns:
    """All columns by name. `limits(variant)` returns what that variant's engine may hold; `steps` are of decoding."""

    def __init__(self, models: Models, limits: Callable[[str], dict], steps: int, compile_batch: list[int]):
        self.models, self.limits = models, limits
        self.drives: dict[str, Drive] = {}
        dense, accel = partial(self.drive, "dense"), partial(self.drive, "accel")
        self.columns = {
            "transformers": PeerColumn(models, steps),
            "text": TextColumn(models, steps),
            "static": CompiledColumn(models, steps, compile_batch),
            "mask": PlainColumn(models, steps, "mask"),
            "accel": PlainColumn(models, steps, "accel"),
            "dense": EngineColumn(dense, steps),
            "nothing": EngineColumn(accel, steps, prefix_kept=False),
            "prefix": EngineColumn(accel, steps),
            "image": EngineColumn(accel, steps, image_kept=True),
        }

    def jobs(self, phase: str, p: Prompts, *options) -> Makers:
        """Returns for each column of a phase a function that prepares its job. Call it only if the column is wanted."""
        method = "prefill" if phase == "visual" else phase  # the same work against visual tokens
        return {name: partial(getattr(self.columns[name], method), p, *options) for name in PHASES[phase]}

    def drive(self, variant: str) -> Drive:
        """Returns a variant's engine; its columns share it."""
        if variant not in self.drives:
            self.drives[variant] = Drive(self.models.engine(variant, **self.limits(variant)))
        return self.drives[variant]

    def clear(self) -> None:
        for drive in self.drives.values():
            drive.clear()


@torch.inference_mode()
def first_tokens(model, p: Prompts, **images) -> tuple:
    """Returns first tokens and the cache, by a model's own forward."""
    out = model(input_ids=p.tensor, use_cache=True, logits_to_keep=1, **images)
    return out.logits[:, -1].argmax(-1), out.past_key_values


@torch.inference_mode()
def decode(model, tokens, cache, steps: int) -> torch.Tensor:
    for _ in range(steps):
        tokens = model(input_ids=tokens[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
    return tokens
