"""Prompt templates: how the turns of a conversation become one string.

The strings are those of LLaVA's `conv_templates`, character for character, because the released weights were trained on
them. A conversation is a list of (role, text) pairs, role one of "system", "user", "assistant": an optional system
prompt first, then user and assistant in turn. As in LLaVA an empty text counts as a turn not yet spoken.

A chat can be continued without rendering it again, in all templates with more than one turn:

    render(turns + [("assistant", answer), ("user", text)])
        == render(turns) + spoken + next_turn(text),    spoken = " " + answer + closing

`spoken` ends with `stop`, the tokenizer's own eos token, which a model that finishes its answer has generated itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..utils.errors import ViCAError

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The two spaces after "safe." are Meta's.
LLAMA_2_SYSTEM = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information."
)


def _vicuna_layout(system: str, texts: Sequence[str]) -> str:
    prompt = f"{system} "
    for turn, text in enumerate(texts):
        role, end = ("ASSISTANT", "</s>") if turn % 2 else ("USER", " ")
        prompt += f"{role}: {text}{end}" if text else f"{role}:"
    return prompt


def _instruction_layout(system: str, texts: Sequence[str], start: str) -> str:
    if not texts or not texts[0]:
        raise ViCAError("this template writes the system prompt into the first user turn, which must not be empty")
    prompt = ""
    for turn, text in enumerate(texts):
        if turn == 0 and system:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        if text:
            prompt += f" {text} </s>" if turn % 2 else f"{start}[INST] {text} [/INST]"
    return prompt.removeprefix(start)  # the tokenizer writes the first <s>


def _llama_2_layout(system: str, texts: Sequence[str]) -> str:
    return _instruction_layout(system, texts, start="<s>")


def _mistral_layout(system: str, texts: Sequence[str]) -> str:
    return _instruction_layout(system, texts, start="")


def _plain_layout(system: str, texts: Sequence[str]) -> str:
    """A question alone ends in a newline; with its answer it is what LLaVA's first training stage reads, where
    nothing stands between image and caption: "<image>caption\\n"."""
    if len(texts) > 2:
        raise ViCAError("template plain holds one question and one answer, not a chat of several turns")
    return f"{system}{''.join(texts)}\n" if any(texts) else system


@dataclass(frozen=True)
class Template:
    """One prompt format. `closing` follows an answer in the prompt; `stop` is where generation ends."""

    name: str
    system: str
    layout: Callable[[str, Sequence[str]], str]
    closing: str
    stop: str

    def render(
        self,
        messages: Sequence[tuple[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """The prompt. `add_generation_prompt` opens the assistant's turn after a user's (after an answer there is
        nothing to open); `continue_final_message` leaves the final answer open, for the model to go on with."""
        system, texts = self._split(messages)
        ends_with_answer = len(texts) % 2 == 0
        if continue_final_message:
            if not ends_with_answer or not texts:
                raise ViCAError("continue_final_message needs a conversation that ends with an assistant message")
            return self.layout(system, texts).removesuffix(self.closing)
        if add_generation_prompt and not ends_with_answer:
            texts.append("")
        return self.layout(system, texts)

    def next_turn(self, text: str) -> str:
        """What follows a finished answer: the user's next turn, up to the open assistant role."""
        finished = ["question", "answer"]
        return self.layout("", [*finished, text, ""]).removeprefix(self.layout("", finished))

    def _split(self, messages: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
        """The system prompt and the texts of the turns, user first."""
        system, turns = self.system, list(messages)
        if turns and turns[0][0] == "system":
            system = turns.pop(0)[1]
        for place, (role, _) in enumerate(turns):
            expected = "assistant" if place % 2 else "user"
            if role != expected:
                raise ViCAError(
                    f"turn {place + 1} has role {role!r} where {expected!r} must stand: "
                    "an optional system message, then user and assistant in turn"
                )
        return system, [text for _, text in turns]


_TEMPLATES = {
    template.name: template
    for template in (
        Template("plain", "", _plain_layout, closing="\n", stop="\n"),
        Template("vicuna_v1", VICUNA_SYSTEM, _vicuna_layout, closing="</s>", stop="</s>"),
        Template("llama_2", LLAMA_2_SYSTEM, _llama_2_layout, closing=" </s>", stop="</s>"),
        Template("mistral", "", _mistral_layout, closing=" </s>", stop="</s>"),
    )
}
_ALIASES = {"v1": "vicuna_v1", "mistral_instruct": "mistral"}


def get_template(name: str) -> Template:
    """The template of that name; LLaVA's own names are understood too."""
    template = _TEMPLATES.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if template is None:
        known = ", ".join([*_TEMPLATES, *_ALIASES])
        raise ViCAError(f"unknown conversation template {name!r}; known: {known}")
    return template
