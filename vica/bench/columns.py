"""How each column of the latency tables does each phase's work. A phase maps columns to what makes their job, which is
called only if the column is wanted, and may fail: then the column says why."""

from collections.abc import Callable
from typing import Any

import torch

from ..engine import Request
from ..utils.errors import ViCAError
from .clock import Job
from .drive import Drive, answer_all
from .inputs import Prompts
from .models import Models

Makers = dict[str, Callable[[], Job]]


class Columns:
    def __init__(self, models: Models, limits: Callable[[str], dict], steps: int, compile_batch: list[int]):
        """`limits(variant)`: what that variant's engine may hold. `steps`: of decoding."""
        self.models, self.limits, self.steps, self.compile_batch = models, limits, steps, compile_batch
        self.drives: dict[str, Drive] = {}

    def drive(self, variant: str) -> Drive:
        if variant not in self.drives:
            self.drives[variant] = Drive(self.models.engine(variant, **self.limits(variant)))
        return self.drives[variant]

    def clear(self) -> None:
        for drive in self.drives.values():
            drive.clear()

    # --- phases ---

    def tower(self, p: Prompts) -> Makers:
        def peer():
            transformers = self.models.transformers
            return Job(lambda _: transformers.features(p.pixels))

        def plain():
            return Job(torch.inference_mode()(lambda _: self.models.accel.get_image_features(p.pixels)))

        def engine():
            drive = self.drive("accel")
            return Job(lambda _: drive.encode(p.pixels))

        return {"transformers": peer, "accel": plain, "prefix": engine}

    def prefill(self, p: Prompts) -> Makers:
        def peer():
            transformers = self.models.transformers
            ids = p.expanded(transformers.image_token)
            return Job(lambda _: transformers.prefill(ids, p.stacked)[0])

        def text():
            transformers = self.models.transformers
            return Job(lambda _: transformers.prefill(p.without_image)[0])

        def plain(variant: str):
            return lambda: Job(lambda _: plain_tokens(self.models.wired(variant), p, image_features=p.features)[0])

        def engine(variant: str, prefix_kept: bool, image_kept: bool = False):
            def make():
                drive = self.drive(variant)
                rows = drive.rows(p, prefix_kept)
                if image_kept:
                    drive.show(rows, p.features)
                    return Job(lambda _: drive.prefill(rows))
                return Job(lambda _: drive.first_tokens(rows, p.features))

            return make

        return {
            "transformers": peer,
            "text": text,
            "mask": plain("mask"),
            "dense": engine("dense", prefix_kept=True),
            "accel": plain("accel"),
            "nothing": engine("accel", prefix_kept=False),
            "prefix": engine("accel", prefix_kept=True),
            "image": engine("accel", prefix_kept=True, image_kept=True),
        }

    visual = prefill

    def first(self, p: Prompts) -> Makers:
        def peer():
            transformers = self.models.transformers
            ids = p.expanded(transformers.image_token)
            return Job(lambda _: transformers.from_pixels(ids, p.pixels))

        def plain(variant: str):
            return lambda: Job(lambda _: plain_tokens(self.models.wired(variant), p, pixel_values=p.pixels)[0])

        def engine(variant: str, prefix_kept: bool):
            def make():
                drive = self.drive(variant)
                rows = drive.rows(p, prefix_kept)
                return Job(lambda _: drive.first_tokens(rows, drive.encode(p.pixels)))

            return make

        return {
            "transformers": peer,
            "mask": plain("mask"),
            "dense": engine("dense", prefix_kept=True),
            "accel": plain("accel"),
            "nothing": engine("accel", prefix_kept=False),
            "prefix": engine("accel", prefix_kept=True),
        }

    def decode(self, p: Prompts) -> Makers:
        def peer():
            transformers = self.models.transformers
            ids = p.expanded(transformers.image_token)
            return Job(
                lambda given: transformers.decode(given[0], given[1], self.steps),
                setup=lambda: transformers.prefill(ids, p.stacked),
                steps=self.steps,
            )

        def plain(variant: str):
            def make():
                model = self.models.wired(variant)
                return Job(
                    lambda given: plain_decode(model, given[0], given[1], self.steps),
                    setup=lambda: plain_tokens(model, p, image_features=p.features),
                    steps=self.steps,
                )

            return make

        def engine(variant: str):
            def make():
                drive = self.drive(variant)
                rows = drive.rows(p, prefix_kept=True)
                return Job(
                    lambda batch: drive.decode(batch, self.steps),
                    setup=lambda: drive.start_decode(rows, p.features),
                    steps=self.steps,
                )

            return make

        return {
            "transformers": peer,
            "static": lambda: self._compiled_decode(p),
            "mask": plain("mask"),
            "dense": engine("dense"),
            "accel": plain("accel"),
            "prefix": engine("accel"),
        }

    def _compiled_decode(self, p: Prompts) -> Job:
        if p.batch not in self.compile_batch:
            raise ViCAError("not run at batches that --compile-batch does not name")
        transformers = self.models.transformers
        ids, step = p.expanded(transformers.image_token), transformers.compiled()
        cache = transformers.static_cache(ids.shape[1] + self.steps + 1)

        def setup():
            cache.reset()
            return transformers.prefill(ids, p.stacked, cache)

        return Job(lambda given: transformers.decode(given[0], given[1], self.steps, step), setup, self.steps)

    def generate(self, p: Prompts, new_tokens: int) -> Makers:
        def engine(variant: str):
            def make():
                drive = self.drive(variant)
                options: dict[str, Any] = dict(max_new_tokens=new_tokens, ignore_eos=True)
                requests = [Request(ids, [image], **options) for ids, image in zip(p.ids, p.features)]
                return Job(lambda _: answer_all(drive.engine, requests))

            return make

        return {"dense": engine("dense"), "prefix": engine("accel")}


@torch.inference_mode()
def plain_tokens(model, p: Prompts, **images) -> tuple:
    """First tokens and the cache, by a model's own forward."""
    out = model(input_ids=p.tensor, use_cache=True, logits_to_keep=1, **images)
    return out.logits[:, -1].argmax(-1), out.past_key_values


@torch.inference_mode()
def plain_decode(model, tokens, cache, steps: int) -> torch.Tensor:
    for _ in range(steps):
        tokens = model(input_ids=tokens[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
    return tokens
