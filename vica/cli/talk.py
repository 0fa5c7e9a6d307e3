"""A conversation whose answers are written as they come. Every turn is answered from all ids and images so far, by the
engine, which keeps what it made of the images; or, for the referee (variant mask), by the plain model's generate."""

import torch

from ..data.conversation import get_template
from ..data.tokenizer import IMAGE_MARK
from ..engine import Engine, Request
from ..engine.text import TextStream
from ..model.generation import PLAIN
from ..plan.sizes import room_for_answer
from ..utils.errors import ViCAError


class Talk:
    def __init__(self, model, processor, options: dict):
        """`options`: settings of each answer's Request."""
        self.model, self.processor, self.options = model, processor, options
        self.engine = None if model.config.variant == "mask" else Engine(model, processor, max_batch=1)
        self.reset()

    def reset(self) -> None:
        self.ids: list[int] = []
        self.images: list = []
        self.answer_tokens = 0  # of the last answer
        self.finish_reason: str | None = None  # likewise

    def say(self, text: str, images: list, show: bool = True) -> str:
        """Writes the answer to stdout, if it is to be shown, and returns it; after an error the conversation is as it
        was before."""
        message, written = f"{IMAGE_MARK}\n" * len(images) + text, ""

        def write(piece: str) -> None:  # the white space around an answer is no part of it
            nonlocal written
            known, written = len(written.strip()), written + piece
            if show:
                print(written.strip()[known:], end="", flush=True)

        prompt = self.ids + (self._next_turn(message) if self.ids else self._first_turn(message))
        request = Request(prompt, self.images + images, **self.options)
        if self.engine is None:
            tokens = self._plain(prompt, request, write)
        else:
            tokens = self._fast(request, write)
        if show:
            print()
        self.answer_tokens = len(tokens)
        # a placeholder that the model utters is text, but in the next prompt it would stand for an image
        self.ids = prompt + [token for token in tokens if token != self.processor.image_token_index]
        self.images = request.images
        return written.strip()

    def _fast(self, request: Request, write) -> list[int]:
        assert self.engine is not None
        for _, token in self.engine.stream([request]):
            write(token.text)
        result = request.result
        assert result is not None  # the stream ends once the request is done
        if result.error:
            raise ViCAError(result.error)
        self.finish_reason = result.finish_reason
        return result.tokens

    def _plain(self, prompt: list[int], request: Request, write) -> list[int]:
        stream, room = TextStream(self.processor, request.stops), room_for_answer(self.model.config, prompt)

        def after_each_token(ids, scores, **_):
            write(stream.push(int(ids[0, -1])))
            return torch.tensor([stream.stopped], device=ids.device)

        ids = torch.tensor([prompt], device=self.model.device)
        pixels = self.processor(images=request.images)["pixel_values"] if request.images else None
        sampling = dict(temperature=request.temperature, top_p=request.top_p, top_k=request.top_k)
        torch.manual_seed(request.seed)
        out = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=None if pixels is None else pixels.to(ids.device),
            max_new_tokens=min(request.max_new_tokens, room),
            do_sample=request.temperature > 0,
            **PLAIN,
            stopping_criteria=[after_each_token],
            **(sampling if request.temperature > 0 else dict.fromkeys(sampling)),
        )
        write(stream.finish())
        tokens, ends = out[0, ids.shape[1] :].tolist(), self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self.finish_reason = "stop" if stream.stopped or tokens[-1] in ends else "length"
        return tokens

    def _first_turn(self, message: str) -> list[int]:
        return self.processor.tokenize(get_template(self.processor.conversation).render([("user", message)]))

    def _next_turn(self, message: str) -> list[int]:
        """An answer cut off by its length lacks the end mark that the next turn must follow."""
        end = self.processor.tokenizer.eos_token_id
        cut_off = end is not None and self.ids[-1] != end
        return ([end] if cut_off else []) + self.processor.tokenize_next_turn(message)
