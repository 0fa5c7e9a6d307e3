"""A small sentencepiece model like Llama's, folders as LLaVA writes them, and the slow tokenizer's ids."""

import json
import re
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from vica.data.conversation import VICUNA_SYSTEM, get_template

CORPUS = (
    f"{VICUNA_SYSTEM}\nUSER: What is in the image? ASSISTANT: A red square stands left of a blue circle.\n"
    "USER: How many shapes are there? Answer the question using a single word or phrase. ASSISTANT: 3\n"
    "The quick brown fox jumps over the lazy dog. Is the cat on the mat? Yes, it is on the mat.\n"
).splitlines() * 20 + [f"There are {n} birds and {n * 7} trees in picture {n}.{' ' * (n % 12)}the" for n in range(240)]
BOS, EOS, IMAGE = 1, 2, -200
BOS, EOS, IMAGE = 1, 2, -200
PROMPTS = [
    "",
    get_template("vicuna_v1").render([("user", "<image>\nWhat is in the image?")]),
    get_template("vicuna_v1").render([("user", "<image>\nHow many?"), ("assistant", "3"), ("user", "Sure?")]),
    get_template("llama_2").render([("user", "<image>\nHow many?"), ("assistant", "3"), ("user", "<image>\nSure?")]),
    get_template("mistral").render([("user", "Is <image> like <image> or like  <image>?"), ("assistant", "No.")]),
    "<image>",
    "<image><image>\n\n<image> ",
    " leading",
    "  two spaces",
    "def f(x):\n    the\n         a  the   a",
    *(f"a{' ' * length}the" for length in range(1, 20)),
    " ",
    "\n",
    "a  b   c ",
    "</s>",
    "</s> after",
    "before </s>  after</s>\nnext",
    "<s>hello <s> hello",
    "   </s>   ",
    "a<unk>b <unk> c",
    "naïve café – “quotes” … ﬁ ①",
    "日本語 🙂 👩‍👩‍👧 \u200b\u00a0\u3000 e\u0301",
    "\u2581visible \u2581\u2581 spaces\u2581",
    "</s>\u2581x <image> \u2581x",
    "\ttab\r\nwindows\x00null\ufeff",
    "<0x0A> </s < /s>",
    "2024 365 ٣५",
]


def train(folder: Path) -> bytes:
    """Returns the bytes of tokenizer.model."""
    prefix = folder / "model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_prefix=str(prefix),
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(prefix.with_suffix(".model").read_bytes())
    runs_of_spaces = [piece for piece in proto.pieces if set(piece.piece) == {"\u2581"}]
    assert len(runs_of_spaces) > 3
    for piece in runs_of_spaces:  # as in Llama's vocabulary, where they keep their low ids
        piece.score = -1e9
    return proto.SerializeToString()


def added_token(content: str, **more) -> dict:
    return {"content": content, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, **more}


def llava_folder(folder, model: bytes, legacy: bool | None, model_type: str | None = None, **changed):
    """Writes the tokenizer files of a LLaVA-1.5 checkpoint as transformers 4 did. With `legacy` None the setting is
    left out."""
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": legacy,
        "model_max_length": 2048,
        "pad_token": None,
        "padding_side": "right",
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **{name: added_token(content, __type="AddedToken") for name, content in named.items()},
        **changed,
    }
    if legacy is None:
        del config["legacy"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    special = {name: added_token(content) for name, content in named.items()}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "<unk>"}))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def slow_llama_ids(model: bytes, text: str, legacy: bool) -> list[int]:
    """Returns the ids of the slow LlamaTokenizer that LLaVA used: special tokens are cut out first, the rest goes to
    sentencepiece. Its dummy prefix is written before every piece (legacy), or before the whole text."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = legacy
    pieces = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    if not legacy and text and not re.match(r"<s>|</s>|<unk>", text):
        text = " " + text
    ids = [BOS]
    for part in re.split(r"(<s>|</s>|<unk>)", text):
        ids += [pieces.PieceToId(part)] if part in ("<s>", "</s>", "<unk>") else pieces.EncodeAsIds(part)
    return ids


def llava_ids(model: bytes, prompt: str, legacy: bool) -> list[int]:
    chunks = [slow_llama_ids(model, chunk, legacy)[1:] for chunk in prompt.split("<image>")]
    return [BOS, *chunks[0], *(token for chunk in chunks[1:] for token in [IMAGE, *chunk])]
