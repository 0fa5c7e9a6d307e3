"""Tests the prompts against strings written by hand as LLaVA's Conversation.get_prompt() gives them."""

import pytest

from vica.data.conversation import LLAMA_2_SYSTEM, VICUNA_SYSTEM, get_template
from vica.utils.errors import ViCAError

CHAT = [("user", "<image>\nWhat is it?"), ("assistant", "A cat."), ("user", "Sure?")]

EXPECTED_OPEN = {
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
    "USER: Sure? ASSISTANT:",
    "llama_2": "[INST] <<SYS>>\nYou are a helpful, respectful and honest assistant. Always answer as helpfully as "
    "possible, while being safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, "
    "dangerous, or illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information.\n<</SYS>>\n\n"
    "<image>\nWhat is it? [/INST] A cat. </s><s>[INST] Sure? [/INST]",
    "mistral": "[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Sure? [/INST]",
}
EXPECTED_CLOSED_END = {
    "vicuna_v1": " ASSISTANT: A cat.</s>",
    "llama_2": " [/INST] A cat. </s>",
    "mistral": " [/INST] A cat. </s>",
}
CHATTY = sorted(EXPECTED_OPEN)


@pytest.mark.parametrize("name", CHATTY)
def test_open_conversation(name):
    assert get_template(name).render(CHAT) == EXPECTED_OPEN[name]


@pytest.mark.parametrize("name", CHATTY)
def test_finished_conversation_ends_with_its_closing(name):
    finished = get_template(name).render(CHAT[:2])
    assert finished.endswith(EXPECTED_CLOSED_END[name])
    assert finished == get_template(name).render(CHAT[:2], add_generation_prompt=False)


def test_without_generation_prompt_the_users_turn_is_last():
    assert get_template("vicuna_v1").render([("user", "Hi")], False) == f"{VICUNA_SYSTEM} USER: Hi "
    assert get_template("mistral").render([("user", "Hi")], False) == "[INST] Hi [/INST]"


def test_system_message_replaces_the_default():
    turns = [("system", "Be brief."), ("user", "Hi")]
    assert get_template("vicuna_v1").render(turns) == "Be brief. USER: Hi ASSISTANT:"
    assert get_template("llama_2").render(turns) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert get_template("mistral").render(turns) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"


def test_an_empty_system_prompt_leaves_the_same_spaces_as_in_llava():
    turns = [("system", ""), ("user", "Hi")]
    assert get_template("vicuna_v1").render(turns) == " USER: Hi ASSISTANT:"
    assert get_template("llama_2").render(turns) == "[INST] Hi [/INST]"


def test_empty_text_is_an_open_turn():
    assert get_template("vicuna_v1").render([("user", ""), ("assistant", "")]) == f"{VICUNA_SYSTEM} USER:ASSISTANT:"
    chat = [("user", "Hi"), ("assistant", ""), ("user", "Go")]
    assert get_template("llama_2").render([("system", ""), *chat]) == "[INST] Hi [/INST]<s>[INST] Go [/INST]"
    with pytest.raises(ViCAError, match="must not be empty"):
        get_template("llama_2").render([("user", "")])


def test_only_the_templates_own_first_bos_is_dropped():
    assert get_template("llama_2").render([("system", ""), ("user", "<s>s>")]) == "[INST] <s>s> [/INST]"


def test_plain_is_the_first_training_stage():
    plain = get_template("plain")
    assert plain.render([("user", "<image>\nq")]) == "<image>\nq\n"
    assert plain.render([("user", "<image>"), ("assistant", "a cat")]) == "<image>a cat\n"
    with pytest.raises(ViCAError, match="not a chat"):
        plain.render(CHAT)
    with pytest.raises(ViCAError, match="plain holds one question"):
        plain.next_turn("more")


@pytest.mark.parametrize("name", CHATTY)
@pytest.mark.parametrize("turns_before", [1, 3])
def test_next_turn_continues_what_was_rendered(name, turns_before):
    template = get_template(name)
    before = CHAT[:turns_before]
    whole = template.render([*before, ("assistant", "Yes."), ("user", "<image>\nAnd this?")])
    spoken = " Yes." + template.closing
    assert whole == template.render(before) + spoken + template.next_turn("<image>\nAnd this?")
    assert spoken.endswith(template.stop)


def test_next_turn_strings():
    assert get_template("vicuna_v1").next_turn("Hi") == "USER: Hi ASSISTANT:"
    assert get_template("llama_2").next_turn("Hi") == "<s>[INST] Hi [/INST]"
    assert get_template("mistral").next_turn("Hi") == "[INST] Hi [/INST]"


@pytest.mark.parametrize(
    ("name", "end"),
    [("vicuna_v1", "USER: Hi ASSISTANT: A c"), ("llama_2", "Hi [/INST] A c"), ("mistral", "Hi [/INST] A c")],
)
def test_continued_final_message_stays_open(name, end):
    chat = [("user", "Hi"), ("assistant", "A c")]
    assert get_template(name).render(chat, False, continue_final_message=True).endswith(end)
    with pytest.raises(ViCAError, match="ends with an assistant message"):
        get_template(name).render(chat[:1], False, continue_final_message=True)
    with pytest.raises(ViCAError, match="ends with an assistant message"):
        get_template(name).render([], False, continue_final_message=True)


def test_stops_and_systems():
    assert {name: get_template(name).stop for name in (*CHATTY, "plain")} == {
        "vicuna_v1": "</s>",
        "llama_2": "</s>",
        "mistral": "</s>",
        "plain": "\n",
    }
    assert get_template("llama_2").system == LLAMA_2_SYSTEM


@pytest.mark.parametrize(
    ("turns", "complaint"),
    [
        ([("assistant", "Hi")], "turn 1 has role 'assistant' where 'user'"),
        ([("user", "a"), ("user", "b")], "turn 2 has role 'user' where 'assistant'"),
        ([("user", "a"), ("system", "b")], "turn 2 has role 'system' where 'assistant'"),
        ([("human", "a")], "turn 1 has role 'human' where 'user'"),
    ],
)
def test_turns_out_of_order(turns, complaint):
    with pytest.raises(ViCAError, match=complaint):
        get_template("vicuna_v1").render(turns)


def test_names():
    assert get_template("v1") is get_template("vicuna_v1")
    assert get_template("mistral_instruct") is get_template("mistral")
    for unknown in ("vicuna", None, ["v1"]):
        with pytest.raises(ViCAError, match="known: plain, vicuna_v1, llama_2, mistral, v1, mistral_instruct"):
            get_template(unknown)
