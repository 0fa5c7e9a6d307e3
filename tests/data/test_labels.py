"""Tests labels against LLaVA's own way of making them, written out here."""

from itertools import groupby

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.spm import IMAGE, llava_folder, llava_ids, slow_llama_ids
from tests.training import talk
from vica.data.conversation import VICUNA_SYSTEM, get_template
from vica.data.labels import IGNORE, encode
from vica.data.processor import ViCAProcessor
from vica.data.tokenizer import load_tokenizer
from vica.utils.errors import ViCAError

SIDE = 28
FRAGMENTS = [*("", " ", "  ", "\n", "\t", "the", "a", "USER:", "3", "é", "🙂", "日本", "\u2581", "."), "<s>", "[/INST]"]
WORDS = st.lists(st.sampled_from(FRAGMENTS), max_size=6).map("".join)


@pytest.fixture(scope="session")
def llama_like(sentencepiece_model) -> bytes:
    """Returns a vocabulary in which "USER" is one token and " USER" two, as in Llama's: LLaVA's arithmetic relies on
    it."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model)
    piece = next(piece for piece in proto.pieces if piece.piece == "\u2581USER")
    piece.piece, piece.score = "USER", -50.5  # after "US" and "ER", before "\u2581US"
    return proto.SerializeToString()


@pytest.fixture(scope="session")
def processors(llama_like, tmp_path_factory):
    root, images = tmp_path_factory.mktemp("llama"), dict(height=SIDE, width=SIDE)
    clip = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=images)
    return {
        legacy: ViCAProcessor(clip, load_tokenizer(llava_folder(root / str(legacy), llama_like, legacy)))
        for legacy in (True, False)
    }


class LLaVA:
    """Makes ids and labels as LLaVA-1.5's training does, which counts the tokens of each round alone. If the counts do
    not add up to the whole, LLaVA ignores the sample: all labels are IGNORE."""

    def __init__(self, model: bytes, legacy: bool):
        self.model, self.legacy = model, legacy

    def ids(self, text: str, has_image: bool) -> list[int]:
        return (llava_ids if has_image else slow_llama_ids)(self.model, text, self.legacy)

    def v1(self, texts: list[str], has_image: bool) -> tuple[list[int], list[int]]:
        prompt = VICUNA_SYSTEM + " "
        for place, text in enumerate(texts):
            if has_image and "<image>" in text:
                text = ("<image>\n" + text.replace("<image>", "").strip()).strip()
            role, end = (("USER", " "), ("ASSISTANT", "</s>"))[place % 2]
            prompt += f"{role}: {text}{end}" if text else f"{role}:"
        ids = self.ids(prompt, has_image)
        learned, at = [False] * len(ids), 1
        for place, part in enumerate(prompt.split("</s>")):
            if part == "" or len(part.split(" ASSISTANT: ")) != 2:
                break
            length = len(self.ids(part, has_image))
            question = len(self.ids(part.split(" ASSISTANT: ")[0] + " ASSISTANT: ", has_image)) - 2
            if place and not self.legacy:
                length, question = length - 1, question - 1
            learned[at + question : at + length] = [True] * (length - question)
            at += length
        if at != len(ids):
            learned = [False] * len(ids)
        return ids, [token if yes else IGNORE for token, yes in zip(ids, learned, strict=True)]

    def plain(self, caption: str) -> tuple[list[int], list[int]]:
        ids = self.ids(f"<image>{caption}\n", True)
        return ids, [IGNORE, IGNORE, *ids[2:]]


@st.composite
def conversations(draw):
    """Returns texts in turn, with an image anywhere in at most one of the questions."""
    texts = draw(st.lists(WORDS, min_size=2, max_size=7))
    if draw(st.booleans()):
        place = 2 * draw(st.integers(0, (len(texts) - 1) // 2))
        texts[place] = draw(st.sampled_from(["{}<image>\n", "<image>{}", " \n{}  <image>"])).format(texts[place])
    return texts


@settings(max_examples=400)
@given(texts=conversations(), legacy=st.booleans())
def test_v1_is_llavas(processors, llama_like, texts, legacy):
    has_image = any("<image>" in text for text in texts)
    ids, labels = LLaVA(llama_like, legacy).v1(texts, has_image)
    if set(labels) == {IGNORE} or not all(texts[0::2]):
        with pytest.raises(ViCAError):
            encode(talk(*texts), processors[legacy], "v1")
    else:
        assert encode(talk(*texts), processors[legacy], "v1") == (ids, labels)


@settings(max_examples=100)
@given(question=WORDS, caption=WORDS.filter(bool), legacy=st.booleans())
def test_plain_is_llavas_but_for_the_token_after_the_image(processors, llama_like, question, caption, legacy):
    ids, labels = LLaVA(llama_like, legacy).plain(caption)
    labels[2] = IGNORE
    assert encode(talk(question + "<image>", caption), processors[legacy], "plain") == (ids, labels)


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize(("template", "end"), [("v1", "</s>"), ("llama_2", " </s>"), ("mistral", " </s>")])
def test_only_the_answers_are_learned(processors, template, end, legacy):
    answers = ["3 birds.", "日本 🙂\n  yes ", "\nNo"]
    texts = ["<image>\nHow many?", answers[0], "Sure? <image> <image>", answers[1], "[/INST] ASSISTANT: 3", answers[2]]
    ids, labels = encode(talk(*texts), processors[legacy], template)
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    spans = [list(span) for learned, span in groupby(labels, key=lambda label: label != IGNORE) if learned]
    decoded = [processors[legacy].tokenizer.decode(span) for span in spans]
    assert [text.removeprefix(" ") for text in decoded] == [answer + end for answer in answers]
    texts[2] = "<image>\n<image>\nSure?"  # the images of a message go in front of it
    prompt = get_template(template).render(list(zip(["user", "assistant"] * 3, texts, strict=True)))
    assert ids == processors[legacy].tokenize(prompt)


def test_an_answer_before_any_question_is_left_out(processors):
    late = [{"from": "gpt", "value": "Hello"}, *talk("What?", "That.")]
    assert encode(late, processors[False], "v1") == encode(talk("What?", "That."), processors[False], "v1")


def test_text_is_cut_at_the_right_end(processors):
    texts = talk("<image>\nWhat?", "The mat.", "And <image>?", "The cat.")
    ids, labels = encode(texts, processors[False], "v1")
    for length in range(ids.index(IMAGE) + 30, len(ids)):
        assert encode(texts, processors[False], "v1", max_length=length) == (ids[:length], labels[:length])
    second = len(ids) - ids[::-1].index(IMAGE) - 1
    before = second + 575  # positions before the second image; the first takes 576
    for length in (before, before + 575):  # an image that does not fit goes with the text after it
        assert encode(texts, processors[False], "v1", length, visual_tokens=576)[0] == ids[:second]
    assert encode(texts, processors[False], "v1", before + 577, visual_tokens=576)[0] == ids[: second + 2]
    with pytest.raises(ViCAError, match="no answer begins within 40 positions"):
        encode(texts, processors[False], "v1", max_length=40)


BAD = {
    "does not end with an answer": talk("a", "b", "c"),
    "a question is empty": talk("a", "b", "", "c"),
    "gpt speaks twice": [*talk("a", "b"), {"from": "gpt", "value": "c"}],
    "human speaks twice": [*talk("a", "b", "c"), {"from": "human", "value": "c"}],
    "turn 2 must be": [*talk("a"), {"from": "gpt", "value": None}],
    "turn 1 must be": [{"from": "system", "value": "Be good."}, *talk("a", "b")],
    "conversations must be a list of turns, got \\[\\]": [],
    "conversations must be a list of turns, got 'a'": "a",
    "a message holds </s>": talk("<s>struck</s>", "b"),
    "an answer holds <image>": talk("<image>", "see <image>"),
    "turn 1 holds half a character": talk("\ud83d", "b"),
    "without its <image> marks holds another": talk("<im<image>age>", "b"),
}


@pytest.mark.parametrize("reason", BAD)
def test_malformed_conversations_say_why(processors, reason):
    with pytest.raises(ViCAError, match=reason):
        encode(BAD[reason], processors[False], "v1")


def test_plain_takes_one_image_and_its_caption(processors):
    for texts in (["a", "b"], ["<image>", "b", "c", "d"]):
        with pytest.raises(ViCAError, match="template plain takes an image and its caption"):
            encode(talk(*texts), processors[False], "plain")
