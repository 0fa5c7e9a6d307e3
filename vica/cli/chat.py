"""Talk about images over many turns; answers stream, and the cache is kept between turns."""

import sys

import torch
from transformers import TextStreamer

from ..data.conversation import get_template
from ..data.images import load_image
from ..data.tokenizer import IMAGE_MARK
from ..errors import ViCAError
from . import common

HELP = "/image F adds an image to your next message, /reset starts over, /exit ends."


def add_arguments(parser) -> None:
    parser.add_argument("--image", action="append", default=[], metavar="F", help="images of the first message")
    common.add_model(parser)
    common.add_generation(parser)


def run(args) -> None:
    images = [load_image(x) for x in args.image]
    model, processor = common.load_for_answers(args)
    talk = Talk(model, processor, common.generation_options(args, processor))
    if sys.stdin.isatty():
        print(HELP)
    while (line := read_line()) is not None:
        command, _, rest = line.partition(" ")
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            talk, images = Talk(model, processor, talk.options), []
        elif command == "/image":
            images += images_or_complaint(rest.strip())
        elif line.startswith("/"):
            print(HELP, file=sys.stderr)
        elif line:
            talk.say(line.replace(IMAGE_MARK, ""), images)
            images = []


def read_line() -> str | None:
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def images_or_complaint(source: str) -> list:
    """A wrong path must not end a conversation."""
    try:
        return [load_image(source)]
    except ViCAError as error:
        print(error, file=sys.stderr)
        return []


class Talk:
    """One conversation: all ids so far, and the cache that holds all but the last of them."""

    def __init__(self, model, processor, options: dict):
        self.model, self.processor, self.options = model, processor, options
        self.ids, self.cache = None, None

    @torch.inference_mode()
    def say(self, text: str, images: list) -> str:
        """Streams the answer to stdout and returns it."""
        message = f"{IMAGE_MARK}\n" * len(images) + text
        new = torch.tensor([self._first_turn(message) if self.ids is None else self._next_turn(message)])
        new = new.to(self.model.device)
        ids = new if self.ids is None else torch.cat([self.ids, new], 1)
        pixels = self.processor(images=images)["pixel_values"].to(self.model.device) if images else None
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels,
            past_key_values=self.cache,
            streamer=TextStreamer(self.processor.tokenizer, skip_prompt=True, skip_special_tokens=True),
            return_dict_in_generate=True,
            **self.options,
        )
        self.ids, self.cache = out.sequences, out.past_key_values
        return self.processor.decode(self.ids[0, ids.shape[1] :], skip_special_tokens=True).strip()

    def _first_turn(self, message: str) -> list[int]:
        prompt = get_template(self.processor.conversation).render([("user", message)])
        return self.processor.tokenize(prompt)

    def _next_turn(self, message: str) -> list[int]:
        """An answer cut off by its length lacks the end mark that the next turn must follow."""
        end = self.processor.tokenizer.eos_token_id
        cut_off = end is not None and int(self.ids[0, -1]) != end
        return ([end] if cut_off else []) + self.processor.tokenize_next_turn(message)
