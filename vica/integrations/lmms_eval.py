"""The model `vica` of lmms-eval, found through the entry point of pyproject.toml:

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
from ..eval.ranks import PATIENCE
from ..loading import load
from ..utils.errors import ViCAError
from ..utils.progress import counter
from .likelihood import Candidate, log_likelihoods
from .lmms_eval_options import (
    ImageKeys,
    ahead,
    as_images,
    batch_limit,
    generation_options,
    grouped,
    parse_layers,
    prompt_of,
    turn_text,
)

log = logging.getLogger(__name__)

WORKERS = min(8, os.cpu_count() or 1)  # threads that make documents into requests
CANDIDATES = 16  # rows of one pass over possible answers, where the batch is left to us


def manifest():
    from lmms_eval.models.registry_v2 import ModelManifest  # that package asks for this module while it is imported

    return ModelManifest("vica", simple_class_path=f"{__name__}.{ViCA.__name__}")


class ViCA(lmms):
    """The arguments are those of --model_args. `batch_size`, `max_batch_size` and `device` come from lmms-eval's own
    flags, of which `max_batch` goes before the first two. `allow_errors`: a question that cannot be answered counts as
    answered with nothing."""

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
        layers = parse_layers(t2v_layers)
        self.accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        self.model, processor = load(
            pretrained, variant, layers, device=self._own(device), dtype=dtype, freeze_prefix=freeze_prefix
        )
        if processor is None:
            raise ViCAError(f"{pretrained} holds no tokenizer, so it cannot be asked anything")
        self.processor = processor.changed(conv_template, image_mode)
        self.allow_errors = allow_errors
        self._engine: Engine | None = None

    def _own(self, device: str | None) -> str | None:
        """Each process's own card, where there are several."""
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
        """Made when it is needed first: it takes what memory is free."""
        if self._engine is None:
            self._engine = Engine(self.model, self.processor, max_batch=self.max_batch)
        return self._engine

    def clean(self) -> None:
        self._engine = None
        super().clean()

    # --- answers ---

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        self._touch_tasks(requests)
        answers: list[GenerationResult | None] = [None] * len(requests)
        asked = ahead(lambda place: self._request(place, requests[place]), self._by_image(requests), WORKERS)
        with self._bar(len(requests), "answers") as bar:
            for request in self.engine.results(asked):
                answers[request.id] = self._answer(requests[request.id], request.result)
                bar.update()
        return answers

    def _request(self, place: int, instance: Instance) -> Request:
        context, settings, *shown = instance.args
        images = self._images(*shown)
        options = generation_options(settings)
        if options["seed"] is None:  # by lmms-eval's --seed; each repeat of a question draws anew
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
        """Pairs of number and greedy, wrapped: of a bare pair lmms-eval 0.7.3 makes a text before it looks inside."""
        if alone := [r.task_name for r in requests if len(r.args) < 6]:  # for the metric acc_mutual_info
            raise NotImplementedError(f"{alone[0]} asks how likely answers are without their question: vica does not")
        self._engine = None  # its memory is needed
        values: list[GenerationResult | None] = [None] * len(requests)
        order, rows = self._by_image(requests), self.max_batch or CANDIDATES
        with self._bar(len(requests), "candidates") as bar:
            for first in range(0, len(order), rows):
                places = order[first : first + rows]
                batch = [requests[place] for place in places]
                for place, pair in zip(places, self._likelihoods(batch)):
                    values[place] = GenerationResult(pair)
                bar.update(len(places))
        return values

    def _likelihoods(self, batch: Sequence[Instance]) -> Iterator[tuple[float, bool]]:
        candidates, shown = [], {}
        for instance in batch:
            context, target, *document = instance.args
            of = tuple(document[1:])
            images = shown[of] = shown.get(of) or self._images(*document)
            answer = target(self._document(*of)) if callable(target) else target
            candidates.append(Candidate(turn_text(context, len(images)), answer, images))
        for instance, (value, greedy) in zip(batch, log_likelihoods(self.model, self.processor, candidates)):
            # lmms-eval takes the candidate with the *least* number for the model's choice; of a task of output type
            # loglikelihood, whose target is a function, it wants the log-likelihood itself.
            yield value if callable(instance.args[1]) else -value, greedy

    # --- documents ---

    def _document(self, doc_id: int, task: str, split: str):
        return self.task_dict[task][split][doc_id]

    def _images(self, doc_to_visual, doc_id: int, task: str, split: str) -> list:
        return as_images(doc_to_visual(self._document(doc_id, task, split)))

    def _by_image(self, requests: Sequence[Instance]) -> list[int]:
        """Their places, those about one picture one after another: it is encoded once."""
        key = ImageKeys(self.task_dict)
        return grouped([key(task, split, doc_id) for doc_id, task, split in (r.args[3:] for r in requests)])

    def _touch_tasks(self, requests: Sequence[Instance]) -> None:
        """Some tasks load more data with the first document they are asked for, which two threads must not do."""
        for request in {request.task_name: request for request in requests}.values():
            self._images(*request.args[2:])

    def _bar(self, total: int, unit: str):
        return counter(total, unit, "vica", shown=self.rank == 0)
