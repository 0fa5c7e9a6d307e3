"""Tokenizes prompts as LLaVA does, with transformers 5's tokenizers, and splits them at `<image>`.

transformers 5 has only the fast Llama tokenizer, while LLaVA was trained with the slow one. The two differ in where
sentencepiece's prefix space goes and in how they cut runs of spaces, so the token ids would change silently.
`load_tokenizer` and `tokenize_prompt` give the slow tokenizer's ids.
"""

import os

from sentencepiece import SentencePieceProcessor
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AddedToken, AutoTokenizer, LlamaConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from ..utils.errors import ViCAError

IMAGE_MARK = "<image>"
GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")  # classes that their tokenizer.json describes in full
_SPACE = "\u2581"  # sentencepiece's visible space


def tokenize_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int = -200, add_special_tokens: bool = True
) -> list[int]:
    """Returns the ids of a prompt. As in LLaVA, each piece between images is tokenized on its own, so every piece gets
    a prefix space of its own. One BOS stands in front if the tokenizer writes one."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:  # lone surrogates: Python reads undecodable bytes as these
        raise ViCAError("the text is not UTF-8") from error
    ids = tokenizer("").input_ids[:1] if add_special_tokens else []
    if ids != [tokenizer.bos_token_id]:
        ids = []
    for place, piece in enumerate(prompt.split(IMAGE_MARK)):
        if place:
            ids.append(image_token_index)
        if not piece:
            continue
        # Metaspace adds no prefix space to a text that begins with a space; sentencepiece always adds one.
        if _llama_legacy(tokenizer) is False and piece.startswith((" ", _SPACE)):
            piece = " " + piece
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def load_tokenizer(path_or_repo: str | os.PathLike, **hub_options) -> PreTrainedTokenizerBase:
    """Returns AutoTokenizer's tokenizer, with LLaVA's token ids if it is a Llama tokenizer."""
    written = get_tokenizer_config(path_or_repo, **hub_options)
    options = dict(hub_options)
    if written.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        options["config"] = LlamaConfig()  # the folder's own model_type might choose another class
        # transformers 4 reads a missing "legacy" as true, 5 as false; only 5 writes "backend".
        if written.get("legacy") is None and "backend" not in written:
            options["legacy"] = True
    elif written.get("tokenizer_class") in GENERIC:
        # ignores the folder's config, which changes nothing here but warns about LLaVA's fields
        options["config"] = PreTrainedConfig()
    return restore_llama_ids(AutoTokenizer.from_pretrained(path_or_repo, **options))


def restore_llama_ids(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Makes a Llama tokenizer give the slow tokenizer's ids and leaves others alone. Changes and returns the
    tokenizer."""
    legacy = _llama_legacy(tokenizer)
    if legacy is not None:
        _restore_spacing(tokenizer.backend_tokenizer, legacy)
        _restore_merges(tokenizer)
        tokenizer.init_kwargs["legacy"] = legacy  # transformers 5 would not save it, and then read it as false
    return tokenizer


def add_image_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Adds `<image>` as a token of its own, which transformers' LlavaProcessor needs. The ids around it stay
    LLaVA's."""
    splits_late = _llama_legacy(tokenizer) is False
    tokenizer.add_tokens([AddedToken(IMAGE_MARK, special=True, normalized=splits_late)], special_tokens=True)
    if splits_late:  # LLaVA begins the text after an image with a prefix space
        before_text = Regex(f"{IMAGE_MARK}(?!{IMAGE_MARK}|\\z)")
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(before_text, IMAGE_MARK + _SPACE)


def _restore_spacing(backend: Tokenizer, legacy: bool) -> None:
    """Puts a prefix space before every text between special tokens if `legacy`, else before the first text only.

    transformers 5 omits it in legacy texts that begin with a space, and always in the class that it chooses for folders
    with model_type "llava" or "mistral".
    """
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        backend.pre_tokenizer = None
    else:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )


def _restore_merges(tokenizer: PreTrainedTokenizerBase) -> None:
    """Orders the merges by sentencepiece's scores if the vocabulary file is present.

    transformers 5 orders them by id. In Llama's vocabulary the runs of spaces have low ids and the lowest scores: the
    ids of every text with two consecutive spaces would change.
    """
    file = getattr(tokenizer, "vocab_file", None)
    if not file or not os.path.isfile(file):
        return
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    pieces = SentencePieceProcessor(model_file=str(file))
    scores = {pieces.IdToPiece(i): pieces.GetScore(i) for i in range(len(pieces)) if _is_mergeable(pieces, i)}
    if not scores.keys() <= vocabulary.keys():
        return  # the vocabulary in use is from another source
    merges = [
        (score, piece[:cut], piece[cut:])
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    # Among equal scores sentencepiece takes the leftmost pair, so a run of spaces grows from its left end.
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    backend.model = models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for _, left, right in merges],
        unk_token=backend.model.unk_token,
        fuse_unk=True,
        byte_fallback=True,
    )


def _is_mergeable(pieces: SentencePieceProcessor, index: int) -> bool:
    return not (pieces.IsControl(index) or pieces.IsUnknown(index) or pieces.IsByte(index) or pieces.IsUnused(index))


def _llama_legacy(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Returns which of the two prefix space rules holds; None if this is no Llama sentencepiece tokenizer."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if not isinstance(model, models.BPE) or not model.byte_fallback:
        return None
    if tokenizer.init_kwargs.get("add_prefix_space") is False:
        return None
    return getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy"))
