"""How likely a model finds given answers: by the plain model, many rows at once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from ..data.conversation import get_template
from ..model.loss import IGNORE, scored_rows
from ..plan.sizes import positions
from ..utils.errors import ViCAError


@dataclass(frozen=True)
class Candidate:
    """`question` is the user's turn, with its `<image>` marks; `answer` what the assistant might say. Candidates that
    share their image objects share the work on them."""

    question: str
    answer: str
    images: Sequence = field(default=())


@torch.inference_mode()
def log_likelihoods(model, processor, candidates: Sequence[Candidate]) -> list[tuple[float, bool]]:
    """Of each answer, without an end mark: the sum of its tokens' log-probabilities, and whether greedy decoding would
    say it."""
    rows = [row_of(processor, candidate) for candidate in candidates]
    check_lengths(model.config, rows)
    ids = [torch.tensor(row) for row, _ in rows]
    labels = pad_sequence([mark_answer(x, start) for x, (_, start) in zip(ids, rows)], True, IGNORE)
    mask = pad_sequence([torch.ones_like(x) for x in ids], True)
    ids = pad_sequence(ids, True, processor.pad_id)
    features = image_features(model, processor, [image for x in candidates for image in x.images])
    hidden, tokens = model.model(ids.to(model.device), mask.to(model.device), features)
    places, targets = scored_rows(tokens, labels)
    logits = model.lm_head(hidden[torch.from_numpy(places).to(hidden.device)]).float()
    wanted = torch.from_numpy(targets).to(logits.device)
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu().numpy()
    greedy = (logits.argmax(-1) == wanted).cpu().numpy()
    of = tokens.text_columns[places] // tokens.columns
    return [(float(chosen[of == row].sum()), bool(greedy[of == row].all())) for row in range(len(candidates))]


def row_of(processor, candidate: Candidate) -> tuple[list[int], int]:
    """The ids of question and answer, and where the answer's begin. They are tokenized together, and the answer begins
    where the ids are no longer the question's: a token may reach over the seam. The space between them is the
    template's matter."""
    template = get_template(processor.conversation)
    question = template.render([("user", candidate.question)])
    turns = [("user", candidate.question), ("assistant", candidate.answer.lstrip())]
    if not turns[1][1]:
        return processor.tokenize(question), len(processor.tokenize(question))
    whole = processor.tokenize(template.render(turns, continue_final_message=True))
    return whole, len(os.path.commonprefix([processor.tokenize(question), whole]))


def mark_answer(ids: torch.Tensor, start: int) -> torch.Tensor:
    return torch.where(torch.arange(len(ids)) < start, IGNORE, ids)


def check_lengths(config, rows) -> None:
    longest, most = max(positions(config, ids) for ids, _ in rows), config.text_config.max_position_embeddings
    if longest > most:
        raise ViCAError(f"a question takes {longest} positions with its answer, the model has {most}")


def image_features(model, processor, images: Sequence) -> list[torch.Tensor] | None:
    """Of each image, in order; an object that is there several times is encoded once."""
    if not images:
        return None
    distinct = {id(image): image for image in images}
    pixels = torch.from_numpy(np.stack(processor.process_images(distinct.values())))
    encoded = dict(zip(distinct, model.get_image_features(pixels.to(model.device))))
    return [encoded[id(image)] for image in images]
