"""Prompt templates: how the turns of a conversation become one string.

The strings are those of LLaVA's `conv_templates`, character for character, because the released weights were trained on
them. A conversation is a list of (role, text) pairs, role one of "system", "user", "assistant": an optional system
prompt first, then user and assistant in turn. As in LLaVA an empty text counts as a turn not yet spoken.

A chat can be continued without rendering it again, in all templates with more than one turn:

    render(turns + [("assistant", answer), ("user", text)])
        == render(turns) + spoken + next_turn(text),    spoken = " " + answer + closing

`spoken` ends with `stop`, the tokenizer's own eos token, which the model generates itself when it finishes its answer.
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


def _format_vicuna(system: str, texts: Sequence[str]) -> str:
    prompt = f"{system} "
    for turn, text in enumerate(texts):
        role, end = ("ASSISTANT", "</s>") if turn % 2 else ("USER", " ")
        prompt += f"{role}: {text}{end}" if text else f"{role}:"
    return prompt


def _format_instruction(system: str, texts: Sequence[str], start: str) -> str:
    if not texts or not texts[0]:
        raise ViCAError("this template writes the system prompt into the first user turn, which must not be empty")
    prompt = ""
    for turn, text in enumerate(texts):
        if turn == 0 and system:
            text = f"<<SYS>>\n{system}\n<</SYS>>\n\n{text}"
        if text:
            prompt += f" {text} </s>" if turn % 2 else f"{start}[INST] {text} [/INST]"
    return prompt.removeprefix(start)  # the tokenizer writes the first <s>


def _format_llama_2(system: str, texts: Sequence[str]) -> str:
    return _format_instruction(system, texts, start="<s>")


def _format_mistral(system: str, texts: Sequence[str]) -> str:
    return _format_instruction(system, texts, start="")


def _format_plain(system: str, texts: Sequence[str]) -> str:
    """Returns image and caption with nothing between them, the text of LLaVA's first training stage:
    "<image>caption\\n". A question alone ends in a newline."""
    if len(texts) > 2:
        raise ViCAError("template plain holds one question and one answer, not a chat of several turns")
    return f"{system}{''.join(texts)}\n" if any(texts) else system


@dataclass(frozen=True)
class Template:
    """One prompt format. `closing` follows an answer in the prompt; generation ends at `stop`."""

    name: str
    system: str
    format: Callable[[str, Sequence[str]], str]
    closing: str
    stop: str

    def render(
        self,
        messages: Sequence[tuple[str, str]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> str:
        """Returns the prompt. `add_generation_prompt` opens the assistant's turn after a user's (after an answer there
        is nothing to open); `continue_final_message` leaves the final answer open, so that the model continues it."""
        system, texts = self._split(messages)
        ends_with_answer = len(texts) % 2 == 0
        if continue_final_message:
            if not ends_with_answer or not texts:
                raise ViCAError("continue_final_message needs a conversation that ends with an assistant message")
            return self.format(system, texts).removesuffix(self.closing)
        if add_generation_prompt and not ends_with_answer:
            texts.append("")
        return self.format(system, texts)

    def next_turn(self, text: str) -> str:
        """Returns the text that follows a finished answer: the user's next turn, up to the open assistant role."""
        finished = ["question", "answer"]
        return self.format("", [*finished, text, ""]).removeprefix(self.format("", finished))

    def _split(self, messages: Sequence[tuple[str, str]]) -> tuple[str, list[str]]:
        """Returns the system prompt and the texts of the turns, user first."""
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
        Template("plain", "", _format_plain, closing="\n", stop="\n"),
        Template("vicuna_v1", VICUNA_SYSTEM, _format_vicuna, closing="</s>", stop="</s>"),
        Template("llama_2", LLAMA_2_SYSTEM, _format_llama_2, closing=" </s>", stop="</s>"),
        Template("mistral", "", _format_mistral, closing=" </s>", stop="</s>"),
    )
}
_ALIASES = {"v1": "vicuna_v1", "mistral_instruct": "mistral"}


def get_template(name: str) -> Template:
    """Returns the template of that name; LLaVA's own names work too."""
    template = _TEMPLATES.get(_ALIASES.get(name, name)) if isinstance(name, str) else None
    if template is None:
        known = ", ".join([*_TEMPLATES, *_ALIASES])
        raise ViCAError(f"unknown conversation template {name!r}; known: {known}")
    return template
