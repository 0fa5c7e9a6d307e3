"""Finds the layers with which the toy world's language model reads: scores its answers to questions about a caption
when the text after the caption sees it in some layers only. ViCA's T2V layers are chosen this way, before any training
on pictures."""

import argparse
import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, LlamaForCausalLM

from scripts.toy.base import check_least, check_part
from vica.data.conversation import get_template
from vica.loading import check_device
from vica.toy.captions import caption
from vica.toy.questions import questions_about
from vica.toy.world import random_scene
from vica.utils.errors import ViCAError
from vica.utils.program import DEFAULT, exit_status, quiet_transformers
from vica.utils.progress import progress
from vica.utils.table import table

KEPT = 32  # sets of one size, from which the next size is built
SHOWN = 10


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m scripts.toy.layers", description=__doc__)
    parser.add_argument("llm", type=Path, help="folder that scripts.toy.base made")
    parser.add_argument("--count", type=int, help="of layers (default: a quarter of them)")
    parser.add_argument(
        "--questions", type=int, default=512, metavar="N", help=f"to choose by, and as many to show with {DEFAULT}"
    )
    parser.add_argument("--device")
    quiet_transformers()
    return exit_status("scripts.toy.layers", lambda: run(parser.parse_args(argv)))


def run(args) -> None:
    check_least(args, {"count": 1, "questions": 1})
    device = check_device(args.device)
    model = LlamaForCausalLM.from_pretrained(check_part(args.llm, "llm"), attn_implementation="sdpa")
    model = model.to(device).eval()
    count = max(1, model.config.num_hidden_layers // 4) if args.count is None else args.count
    if count > model.config.num_hidden_layers:
        raise ViCAError(f"--count is {count}, but the model has {model.config.num_hidden_layers} layers")
    tokenizer = AutoTokenizer.from_pretrained(args.llm)
    chosen_by, shown_by = (
        Reader(model, tokenizer, range(first, first + args.questions)) for first in (0, args.questions)
    )
    print(search(chosen_by, shown_by, count))


def search(reader: "Reader", other: "Reader", count: int) -> str:
    """Returns a table of the best sets of `count` layers. The sets of each size are built from the best of one layer
    less, and the scores shown are on other questions than those of the search."""
    everything = frozenset(range(reader.depth))
    kept: list[frozenset[int]] = [frozenset()]
    for size in range(1, count + 1):
        larger = {one | {layer} for one in kept for layer in everything - one}
        scores = {one: reader(one) for one in progress(larger, len(larger), "sets", f"{size} layers")}
        kept = sorted(scores, key=lambda one: (-scores[one].likelihood, sorted(one)))[:KEPT]
    rows = [("layers", "right, %", "log-likelihood")]
    found = [("all", other(everything)), ("none", other(())), *((sorted(one), other(one)) for one in kept[:SHOWN])]
    return table(rows + [(str(name), f"{s.right:.1f}", f"{s.likelihood:.3f}") for name, s in found])


@dataclass(frozen=True)
class Score:
    right: float  # percentage of answers in which every token is the likeliest
    likelihood: float  # mean of the answers' log-likelihoods


class Reader:
    def __init__(self, model: LlamaForCausalLM, tokenizer, questions: Iterable[int]):
        self.model, self.layers, device = model, model.model.layers, model.device
        self.depth = len(self.layers)
        samples = [prepare(tokenizer, number) for number in questions]
        ids, answers, captions = (pad_sequence([one[x] for one in samples], batch_first=True) for x in range(3))
        self.ids, self.answers = ids.to(device), answers[:, 1:].to(device)
        places = torch.arange(ids.shape[1])
        past = (places[:, None] >= places)[None, None].to(device)
        # A caption's own tokens see it in every layer; the text after it only in reading layers.
        after = (captions.cumsum(1) == captions.sum(1, keepdim=True)) & ~captions
        closed = past & ~(after[:, None, :, None] & captions[:, None, None, :]).to(device)
        self.masks = {True: past.expand_as(closed), False: closed}

    @torch.inference_mode()
    def __call__(self, reading: Iterable[int]) -> Score:
        reading = set(reading)
        hooks = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, mask=self.masks[number in reading]: (args, {**kwargs, "attention_mask": mask}),
                with_kwargs=True,
            )
            for number, layer in enumerate(self.layers)
        ]
        try:
            logits = self.model(input_ids=self.ids, attention_mask=self.masks[True], use_cache=False).logits[:, :-1]
        finally:
            for hook in hooks:
                hook.remove()
        wanted = self.ids[:, 1:]
        right = ((logits.argmax(-1) == wanted) | ~self.answers).all(1).float().mean()
        likelihood = logits.log_softmax(-1).gather(-1, wanted[..., None])[..., 0]
        return Score(100 * right.item(), (likelihood * self.answers).sum(1).mean().item())


def prepare(tokenizer, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the token ids of a conversation about a caption, and masks of the answer's and of the caption's
    tokens."""
    rng, template = random.Random(f"layers {number}"), get_template("vicuna_v1")
    scene = random_scene(rng)
    told, question = caption(scene, rng), rng.choice(questions_about(scene, rng))
    asked = template.render([("user", f"{told}\n{question.text}")])
    begin = asked.index(told)
    found = tokenizer(f"{asked} {question.answer}{template.stop}", return_offsets_mapping=True)
    spans = found.offset_mapping
    answer = torch.tensor([start >= len(asked) for start, _ in spans])
    seen = torch.tensor([start < begin + len(told) and end > begin for start, end in spans])
    return torch.tensor(found.input_ids), answer, seen


if __name__ == "__main__":
    sys.exit(main())
