"""Scores how likely a model finds given answers: the plain model, on many at once."""

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
    """A possible answer. `question` is the user's turn, with its `<image>` marks; `answer` is a possible answer of the
    assistant. Candidates with the same image objects share the work on them."""

    question: str
    answer: str
    images: Sequence = field(default=())


@torch.inference_mode()
def log_likelihoods(model, processor, candidates: Sequence[Candidate]) -> list[tuple[float, bool]]:
    """Returns for each answer, without an end mark, the sum of its tokens' log-probabilities, and whether greedy
    decoding would give it."""
    encoded = [encode_candidate(processor, candidate) for candidate in candidates]
    check_lengths(model.config, encoded)
    each = [torch.tensor(one) for one, _ in encoded]
    labels = pad_sequence([mark_answer(x, start) for x, (_, start) in zip(each, encoded)], True, IGNORE)
    mask = pad_sequence([torch.ones_like(x) for x in each], True)
    ids = pad_sequence(each, True, processor.pad_id)
    features = image_features(model, processor, [image for x in candidates for image in x.images])
    hidden, tokens = model.model(ids.to(model.device), mask.to(model.device), features)
    places, targets = scored_rows(tokens, labels)
    logits = model.lm_head(hidden[torch.from_numpy(places).to(hidden.device)]).float()
    wanted = torch.from_numpy(targets).to(logits.device)
    chosen = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double().cpu().numpy()
    greedy = (logits.argmax(-1) == wanted).cpu().numpy()
    owner = tokens.text_columns[places] // tokens.columns  # the candidate of each token
    return [(float(chosen[owner == i].sum()), bool(greedy[owner == i].all())) for i in range(len(candidates))]


def encode_candidate(processor, candidate: Candidate) -> tuple[list[int], int]:
    """Returns the ids of question and answer, and the place where the answer's begin. Both are tokenized together, and
    the answer begins at the first id that differs from the question's: a token may span the boundary. The template
    decides the space between them."""
    template = get_template(processor.conversation)
    question = template.render([("user", candidate.question)])
    turns = [("user", candidate.question), ("assistant", candidate.answer.lstrip())]
    if not turns[1][1]:
        return processor.tokenize(question), len(processor.tokenize(question))
    whole = processor.tokenize(template.render(turns, continue_final_message=True))
    return whole, len(os.path.commonprefix([processor.tokenize(question), whole]))


def mark_answer(ids: torch.Tensor, start: int) -> torch.Tensor:
    return torch.where(torch.arange(len(ids)) < start, IGNORE, ids)


def check_lengths(config, encoded) -> None:
    longest, most = max(positions(config, ids) for ids, _ in encoded), config.text_config.max_position_embeddings
    if longest > most:
        raise ViCAError(f"a question takes {longest} positions with its answer, the model has {most}")


def image_features(model, processor, images: Sequence) -> list[torch.Tensor] | None:
    """Returns the features of each image, in order; an object that occurs several times is encoded once."""
    if not images:
        return None
    distinct = {id(image): image for image in images}
    pixels = torch.from_numpy(np.stack(processor.process_images(distinct.values())))
    encoded = dict(zip(distinct, model.get_image_features(pixels.to(model.device))))
    return [encoded[id(image)] for image in images]
