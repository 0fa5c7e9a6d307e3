"""The model `vica` for lmms-eval, which finds it through the entry point of pyproject.toml:

lmms-eval --model vica --model_args pretrained=...,t2v_layers=[0,1,7] --tasks pope,mme --batch_size auto
"""

import logging
import os
from collections.abc import Iterator, Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms

from ..engine import Engine, Request, Result
from ..eval.ranks import TIMEOUT
from ..loading import load_wired
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from ..utils.progress import counter
from .likelihood import Candidate, log_likelihoods
from .lmms_eval_options import (
    ImageKeys,
    as_images,
    batch_limit,
    generation_options,
    grouped,
    parse_layers,
    prefetch,
    prompt_of,
    turn_text,
)

log = logging.getLogger(__name__)

WORKERS = min(8, os.cpu_count() or 1)  # threads that turn documents into requests
CANDIDATES = 16  # possible answers in one pass, unless lmms-eval sets a batch size


def manifest():
    # lmms-eval imports this module while it is being imported itself
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("vica", simple_class_path=f"{__name__}.{ViCA.__name__}")


class ViCA(lmms):
    """Model for lmms-eval. The arguments are those of --model_args. `batch_size`, `max_batch_size` and `device` come
    from lmms-eval's own flags; `max_batch` overrides the first two. With `allow_errors` a question that cannot be
    answered counts as answered with nothing."""

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        variant: str | None = None,
        t2v_layers=None,
        freeze_prefix: bool | int | None = None,
        dtype: str | None = None,
        device: str | None = None,
        conv_template: str | None = None,
        image_mode: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_batch: int | None = None,
        allow_errors: bool = False,
    ):
        super().__init__()
        self.max_batch = batch_limit(batch_size, max_batch_size, max_batch)
        wiring = Wiring(variant, parse_layers(t2v_layers), freeze_prefix)
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=TIMEOUT)])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, processor = load_wired(pretrained, wiring, self._own_device(device), dtype)
        if processor is None:
            raise ViCAError(f"{pretrained} holds no tokenizer, so it cannot be asked anything")
        self.processor = processor.changed(conv_template, image_mode)
        self.allow_errors = allow_errors
        self._engine: Engine | None = None

    def _own_device(self, device: str | None) -> str | None:
        """Returns each process's own card if there are several processes."""
        if self.world_size > 1 and device in (None, "cuda") and torch.cuda.is_available():
            return f"cuda:{self.accelerator.local_process_index}"
        return device

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def batch_size(self) -> int | None:
        return self.max_batch

    @property
    def engine(self) -> Engine:
        """The engine, built on first use: it takes the memory that is free then."""
        if self._engine is None:
            self._engine = Engine(self.model, self.processor, max_batch=self.max_batch)
        return self._engine

    def clean(self) -> None:
        self._engine = None
        super().clean()

    # --- answers ---

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        self._preload_tasks(requests)
        answers: list[GenerationResult | None] = [None] * len(requests)
        asked = prefetch(lambda place: self._request(place, requests[place]), self._by_image(requests), WORKERS)
        with self._bar(len(requests), "answers") as bar:
            for request in self.engine.results(asked):
                assert request.result is not None  # `results` yields a request once it is done
                answers[request.id] = self._answer(requests[request.id], request.result)
                bar.update()
        return answers

    def _request(self, place: int, instance: Instance) -> Request:
        context, settings, *shown = instance.args
        images = self._images(*shown)
        options = generation_options(settings)
        if options["seed"] is None:  # from lmms-eval's --seed; each repeat of a question samples anew
            options["seed"] = (torch.initial_seed() + place * self.world_size + self.rank) % 2**63
        return Request(prompt_of(self.processor.conversation, context, len(images)), images, id=place, **options)

    def _answer(self, instance: Instance, result: Result) -> GenerationResult:
        if result.error is not None:
            failed = f"{instance.task_name}, document {instance.doc_id}: {result.error}"
            if not self.allow_errors:
                raise ViCAError(f"{failed} (allow_errors=true among the model_args goes on, with an empty answer)")
            log.warning("%s", failed)
        return GenerationResult(result.text.strip(), TokenCounts(result.prompt_tokens, len(result.tokens)))

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("vica answers no multi-round tasks: ask it with tasks of one round")

    # --- likelihoods ---

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Returns wrapped pairs of number and greedy: lmms-eval 0.7.3 turns a bare pair into text before it looks
        inside."""
        if alone := [r.task_name for r in requests if len(r.args) < 6]:  # needed for the metric acc_mutual_info
            raise NotImplementedError(f"{alone[0]} asks how likely answers are without their question: vica does not")
        self._engine = None  # frees its memory
        values: list[GenerationResult | None] = [None] * len(requests)
        order, batch_size = self._by_image(requests), self.max_batch or CANDIDATES
        with self._bar(len(requests), "candidates") as bar:
            for first in range(0, len(order), batch_size):
                places = order[first : first + batch_size]
                batch = [requests[place] for place in places]
                for place, pair in zip(places, self._likelihoods(batch)):
                    values[place] = GenerationResult(pair)
                bar.update(len(places))
        return values

    def _likelihoods(self, batch: Sequence[Instance]) -> Iterator[tuple[float, bool]]:
        candidates: list[Candidate] = []
        shown: dict[tuple, list] = {}
        for instance in batch:
            context, target, *document = instance.args
            key = tuple(document[1:])
            images = shown[key] = shown.get(key) or self._images(*document)
            answer = target(self._document(*key)) if callable(target) else target
            candidates.append(Candidate(turn_text(context, len(images)), answer, images))
        for instance, (value, greedy) in zip(batch, log_likelihoods(self.model, self.processor, candidates)):
            # lmms-eval takes the candidate with the *least* number as the model's choice. For a task of output type
            # loglikelihood, whose target is a function, it takes the log-likelihood itself.
            yield value if callable(instance.args[1]) else -value, greedy

    # --- documents ---

    def _document(self, doc_id: int, task: str, split: str):
        return self.task_dict[task][split][doc_id]

    def _images(self, doc_to_visual, doc_id: int, task: str, split: str) -> list:
        return as_images(doc_to_visual(self._document(doc_id, task, split)))

    def _by_image(self, requests: Sequence[Instance]) -> list[int]:
        """Returns the requests' places with those about one picture next to each other, so that it is encoded once."""
        key = ImageKeys(self.task_dict)
        return grouped([key(task, split, doc_id) for doc_id, task, split in (r.args[3:] for r in requests)])

    def _preload_tasks(self, requests: Sequence[Instance]) -> None:
        """Loads each task's first document. Some tasks load more data with it, which two threads must not do."""
        for request in {request.task_name: request for request in requests}.values():
            self._images(*request.args[2:])

    def _bar(self, total: int, unit: str):
        return counter(total, unit, "vica", shown=self.rank == 0)
