"""Texts and images in, model inputs out: `ViCAProcessor`, a transformers processor with LLaVA's exact rules.

transformers 5 has only the fast Llama tokenizer, while LLaVA was trained with the slow one. The two differ in where
sentencepiece's prefix space goes, so that token ids would change without a word; `restore_llama_spacing` and
`tokenize_prompt` give the slow one's ids. Images go through transformers' PIL processors even where torchvision is
installed, since its kernels give slightly other pixels.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import decoders, models, normalizers, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BatchFeature,
    LlamaConfig,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from vica.data.conversation import get_template
from vica.data.images import load_image, pad_to_square
from vica.errors import ViCAError

IMAGE_MARK = "<image>"
IMAGE_MODES = ("pad", "resize", "crop")
_MODE_OF_ASPECT_RATIO = {"pad": "pad", "resize": "resize", "crop": "crop", "square": "crop", None: "crop"}
# By the type that transformers saves, which is the same for its PIL and its torchvision backends.
_PIL_PROCESSORS = {"CLIPImageProcessor": CLIPImageProcessorPil, "SiglipImageProcessor": SiglipImageProcessorPil}
_SOURCE_KEYS = ("image", "url", "path", "base64")
_CALL_OPTIONS = ("padding", "padding_side", "return_tensors", "add_special_tokens", "truncation", "max_length")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_SPACE = "\u2581"  # sentencepiece's visible space


class ViCAProcessor(ProcessorMixin):
    """Prompts with `<image>` marks, and images, to `input_ids`, `attention_mask` and `pixel_values`.

    `image_mode` says how an image becomes the tower's square: "pad" (with the tower's mean colour), "resize"
    (squash) or "crop" (the tower's own preprocessing). `conversation` names the template of `apply_chat_template`.
    Without an `image_processor` the processor does text only, and the caller brings `image_features` to the model.
    """

    def __init__(
        self,
        image_processor=None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        conversation: str = "vicuna_v1",
        image_mode: str = "pad",
        image_token_index: int = -200,
    ):
        # Not ProcessorMixin.__init__: it refuses an image_processor that is None.
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ViCAError(f"tokenizer is of type {type(tokenizer).__name__}; a transformers tokenizer is needed")
        if image_mode not in IMAGE_MODES:
            raise ViCAError(f"image_mode is {image_mode!r}; it must be one of {', '.join(IMAGE_MODES)}")
        self.chat_template = None
        self.image_processor = as_pil_processor(image_processor)
        self.tokenizer = restore_llama_spacing(tokenizer)
        self.conversation = get_template(conversation).name
        self.image_mode = image_mode
        self.image_token_index = image_token_index

    @classmethod
    def from_config(cls, config, tokenizer: PreTrainedTokenizerBase) -> "ViCAProcessor":
        """For checkpoints that come without a processor: what the model's config implies."""
        return cls(tokenizer=tokenizer, **_settings_of(config))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> "ViCAProcessor":
        """A saved processor, or, where none was saved, the one that the model's config implies. The constructor's
        settings may be given to override the saved ones."""
        hub = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        if settings.get("processor_class") != cls.__name__:
            settings = _settings_of(AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub))
        names = ("image_processor", "conversation", "image_mode", "image_token_index")
        chosen = {name: value for name, value in (settings | options).items() if name in names}
        return cls(tokenizer=load_tokenizer(pretrained_model_name_or_path, **hub), **chosen)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **_) -> list[str]:
        """Not ProcessorMixin's, which fails where there is no image processor."""
        if push_to_hub:
            raise ViCAError("push_to_hub=True is not for save_pretrained here; call processor.push_to_hub(name)")
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(save_directory)
        file = os.path.join(save_directory, "processor_config.json")
        self.to_json_file(file)
        return [file]

    def __call__(
        self,
        images=None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        padding_side: str | None = None,
        return_tensors: str | None = "pt",
        add_special_tokens: bool = True,
        truncation: bool | None = False,
        max_length: int | None = None,
        **unknown,
    ) -> BatchFeature:
        """`text` is taken as it is: a rendered prompt, or several. `images` is one image, a flat list in reading order
        over the batch, or one list for each text; None leaves the marks to the model's `image_features`."""
        _refuse(unknown)
        if text is None and images is None:
            raise ViCAError("the processor needs text, images or both; got neither")
        data = {}
        prompts = None if text is None else _as_prompts(text)
        if prompts is not None:
            rows = [self.tokenize(prompt, add_special_tokens) for prompt in prompts]
            if truncation:
                rows = [_truncate(row, max_length, self.image_token_index) for row in rows]
            data |= self._pad(rows, padding, padding_side, max_length, rectangular=return_tensors is not None)
        flat = None if images is None else _flatten(images, prompts)
        if flat:
            data["pixel_values"] = self.process_images(flat)
        return BatchFeature(data, tensor_type=return_tensors)

    def tokenize(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """The ids of one prompt, with `image_token_index` for each `<image>`."""
        return tokenize_prompt(prompt, self.tokenizer, self.image_token_index, add_special_tokens)

    def tokenize_next_turn(self, text: str) -> list[int]:
        """The ids that follow a finished answer and its eos token, up to the assistant's next open turn. They are not
        those of `next_turn(text)` on its own, which would begin with a prefix space."""
        template = get_template(self.conversation)
        stop = self.tokenize(template.stop, add_special_tokens=False)
        return self.tokenize(template.stop + template.next_turn(text), add_special_tokens=False)[len(stop) :]

    def process_images(self, images: Iterable) -> list[np.ndarray]:
        """Each image as the tower takes it: float32 [3, H, W]."""
        if self.image_processor is None:
            raise ViCAError("images were given, but this model has no vision tower; give it image_features instead")
        arranged = [self._arrange(load_image(image)) for image in images]
        return self.image_processor.preprocess(arranged)["pixel_values"]

    def _arrange(self, image):
        """What LLaVA does to an image before the tower's own preprocessing."""
        if self.image_mode == "pad":
            return pad_to_square(image, tuple(int(mean * 255) for mean in self.image_processor.image_mean))
        if self.image_mode == "resize":
            cropped = getattr(self.image_processor, "do_center_crop", False)
            square = self.image_processor.crop_size if cropped else self.image_processor.size
            return image.resize((square["width"], square["height"]))
        return image

    def _pad(self, rows: list[list[int]], padding, padding_side, max_length, rectangular: bool) -> dict:
        width = _padded_width(rows, padding, max_length)
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ViCAError(f"padding_side is {side!r}; it must be left or right")
        fill = self._pad_id()
        ids, mask = [], []
        for row in rows:
            missing = max(width - len(row), 0)
            filler, absent, present = [fill] * missing, [0] * missing, [1] * len(row)
            ids.append(filler + row if side == "left" else row + filler)
            mask.append(absent + present if side == "left" else present + absent)
        lengths = [len(row) for row in ids]
        if rectangular and len(set(lengths)) > 1:
            raise ViCAError(f"texts of {lengths} tokens make no rectangular tensor with padding={padding!r}; use True")
        return {"input_ids": ids, "attention_mask": mask}

    def _pad_id(self) -> int:
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token for token in candidates if token is not None)

    def apply_chat_template(
        self,
        conversation,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping | None = None,
        **kwargs,
    ):
        """transformers' messages (one conversation, or a list of them) as prompts, or with `tokenize` as `__call__`'s
        inputs. In a user's message the images come first, each as `<image>` and a newline, wherever they stand in the
        content: LLaVA's convention. Text may hold `<image>` itself where another place is wanted."""
        options = {**kwargs, **(processor_kwargs or {})}
        _refuse({"chat_template": chat_template} | {k: v for k, v in options.items() if k not in _CALL_OPTIONS})
        if add_generation_prompt and continue_final_message:
            raise ViCAError("add_generation_prompt and continue_final_message exclude each other")
        batched = _is_batch(conversation)
        template = get_template(self.conversation)
        prompts, images = [], []
        for messages in conversation if batched else [conversation]:
            turns, sources = _read_messages(messages)
            prompts.append(template.render(turns, add_generation_prompt, continue_final_message))
            images.append(sources)
        if not tokenize:
            return prompts if batched else prompts[0]
        features = self(text=prompts, images=_sources_or_none(images), **options)
        return features if return_dict else features["input_ids"]

    def decode(self, token_ids, **kwargs) -> str:
        return self.tokenizer.decode(_drop_negative(token_ids), **kwargs)

    def batch_decode(self, sequences, **kwargs) -> list[str]:
        return self.tokenizer.batch_decode(_drop_negative(sequences), **kwargs)

    def post_process_image_text_to_text(
        self, generated_outputs, skip_special_tokens: bool = True, **kwargs
    ) -> list[str]:
        return self.batch_decode(generated_outputs, skip_special_tokens=skip_special_tokens, **kwargs)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values"]


def tokenize_prompt(
    prompt: str, tokenizer: PreTrainedTokenizerBase, image_token_index: int = -200, add_special_tokens: bool = True
) -> list[int]:
    """LLaVA's way: each piece between images is tokenized on its own, so every piece gets its prefix space; one BOS in
    front where the tokenizer writes one."""
    ids = tokenizer("").input_ids[:1] if add_special_tokens else []
    if ids != [tokenizer.bos_token_id]:
        ids = []
    for place, piece in enumerate(prompt.split(IMAGE_MARK)):
        if place:
            ids.append(image_token_index)
        # Where the text itself begins with a space, Metaspace adds no other; sentencepiece always does.
        if _llama_legacy(tokenizer) is False and piece.startswith((" ", _SPACE)):
            piece = " " + piece
        ids += tokenizer(piece, add_special_tokens=False).input_ids
    return ids


def load_tokenizer(path_or_repo: str | os.PathLike, **hub_options) -> PreTrainedTokenizerBase:
    """AutoTokenizer, with LLaVA's token ids for Llama tokenizers."""
    written = get_tokenizer_config(path_or_repo, **hub_options)
    options = dict(hub_options)
    if written.get("tokenizer_class") in ("LlamaTokenizer", "LlamaTokenizerFast"):
        options["config"] = LlamaConfig()  # the folder's own model_type might choose another class
        # transformers 4 reads a missing "legacy" as true, 5 as false; only 5 writes "backend".
        if written.get("legacy") is None and "backend" not in written:
            options["legacy"] = True
    return restore_llama_spacing(AutoTokenizer.from_pretrained(path_or_repo, **options))


def restore_llama_spacing(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Gives a Llama tokenizer (others are left alone) the slow tokenizer's prefix space: before every piece of text
    between special tokens if it is `legacy`, else before the first only. Changes and returns the tokenizer.

    Needed twice over: transformers 5 leaves the space out for legacy text that begins with one, and loads a Llama
    tokenizer in a folder whose model_type is "llava" or "mistral" by a class that writes no prefix space at all.
    """
    legacy = _llama_legacy(tokenizer)
    if legacy is None:
        return tokenizer
    backend = tokenizer.backend_tokenizer
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
        backend.pre_tokenizer = None
    else:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", left=1)]
    )
    tokenizer.init_kwargs["legacy"] = legacy  # transformers 5 would not save it, and read it as false
    return tokenizer


def _llama_legacy(tokenizer: PreTrainedTokenizerBase) -> bool | None:
    """Which of the two prefix space rules holds; None where it is no Llama sentencepiece tokenizer."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if not isinstance(model, models.BPE) or not model.byte_fallback:
        return None
    if tokenizer.init_kwargs.get("add_prefix_space") is False:
        return None
    return getattr(tokenizer, "legacy", tokenizer.init_kwargs.get("legacy"))


def as_pil_processor(image_processor):
    """The PIL twin of an image processor, or of its saved settings; None stays None."""
    if image_processor is None or isinstance(image_processor, tuple(_PIL_PROCESSORS.values())):
        return image_processor
    settings = dict(image_processor) if isinstance(image_processor, Mapping) else image_processor.to_dict()
    kind = settings.pop("image_processor_type", None)
    pil_class = _PIL_PROCESSORS.get(str(kind).removesuffix("Fast").removesuffix("Pil"))
    if pil_class is None:
        raise ViCAError(f"image processor {kind!r} is not supported; known: {', '.join(_PIL_PROCESSORS)}")
    return pil_class(**settings)


def _settings_of(config) -> dict:
    """The constructor's arguments, but for the tokenizer, that a model's config implies."""
    ratio = getattr(config, "image_aspect_ratio", None)
    if ratio not in _MODE_OF_ASPECT_RATIO:
        known = ", ".join(str(name) for name in _MODE_OF_ASPECT_RATIO)
        raise ViCAError(f"image_aspect_ratio is {ratio!r}; it must be one of {known}")
    return {
        "image_processor": _processor_of_tower(getattr(config, "vision_config", None)),
        "conversation": getattr(config, "conversation", "vicuna_v1"),
        "image_mode": _MODE_OF_ASPECT_RATIO[ratio],
        "image_token_index": getattr(config, "image_token_index", -200),
    }


def _processor_of_tower(vision_config):
    if vision_config is None:
        return None
    side = vision_config.image_size
    square = {"height": side, "width": side}
    if vision_config.model_type == "clip_vision_model":
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square)
    if vision_config.model_type == "siglip_vision_model":
        return SiglipImageProcessorPil(size=square)
    raise ViCAError(
        f"no image preprocessing is known for a {vision_config.model_type!r} tower; "
        "known: clip_vision_model, siglip_vision_model"
    )


def _refuse(options: Mapping) -> None:
    """Options that transformers' processors know and this one does not may be given only as unset."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise ViCAError(f"the processor takes no {', '.join(given)}; known options: {', '.join(_CALL_OPTIONS)}")


def _as_prompts(text) -> list[str]:
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ViCAError(f"text must be a string or a non-empty list of strings, got {_shorten(text)}")
    return list(prompts)


def _truncate(row: list[int], max_length: int | None, image_token_index: int) -> list[int]:
    if max_length is None:
        raise ViCAError("truncation=True needs max_length")
    if image_token_index in row[max_length:]:
        raise ViCAError(f"max_length={max_length} would cut an image away from a prompt of {len(row)} tokens")
    return row[:max_length]


def _padded_width(rows: list[list[int]], padding, max_length: int | None) -> int:
    """The length that shorter rows are filled up to; 0 for no padding."""
    if padding in (True, "longest"):
        return max(len(row) for row in rows)
    if padding == "max_length" and max_length is not None:
        return max_length
    if padding in (False, None, "do_not_pad"):
        return 0
    raise ViCAError(f"padding is {padding!r}; it must be True, False, or 'max_length' together with max_length")


def _flatten(images, prompts: list[str] | None) -> list:
    """All images in reading order, after a check that they are as many as the marks in the prompts."""
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    marks = None if prompts is None else [prompt.count(IMAGE_MARK) for prompt in prompts]
    nested = any(isinstance(row, (list, tuple)) for row in images)
    if not nested:
        if marks is not None and sum(marks) != len(images):
            raise ViCAError(f"the text has {sum(marks)} {IMAGE_MARK} marks, but {len(images)} images were given")
        return images
    rows = [[] if row is None else list(row) if isinstance(row, (list, tuple)) else [row] for row in images]
    if marks is not None and len(rows) != len(marks):
        raise ViCAError(f"{len(marks)} texts were given, but {len(rows)} lists of images")
    for place, row in enumerate(rows):
        if marks is not None and marks[place] != len(row):
            raise ViCAError(
                f"text {place} has {marks[place]} {IMAGE_MARK} marks, but {len(row)} images were given for it"
            )
    return [image for row in rows for image in row]


def _is_batch(conversation) -> bool:
    if not isinstance(conversation, (list, tuple)) or not conversation:
        raise ViCAError(f"a conversation is a non-empty list of messages, got {_shorten(conversation)}")
    return isinstance(conversation[0], (list, tuple))


def _read_messages(messages: Sequence[Mapping]) -> tuple[list[tuple[str, str]], list]:
    """The turns as (role, text) pairs, and the sources of their images in reading order."""
    turns, sources = [], []
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise ViCAError(f"a message is a dict with role and content, got {_shorten(message)}")
        text, images = _read_content(message["content"])
        if images and message["role"] != "user":
            raise ViCAError(f"a message of role {message['role']!r} holds an image; only a user's may")
        turns.append((message["role"], f"{IMAGE_MARK}\n" * len(images) + text))
        sources += images
    return turns, sources


def _read_content(content) -> tuple[str, list]:
    """A message's text, several parts on lines of their own, and the sources of its images."""
    if isinstance(content, str):
        return content, []
    if not isinstance(content, (list, tuple)):
        raise ViCAError(f"a message's content is a string or a list of parts, got {_shorten(content)}")
    texts, images = [], []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            images.append(_image_source(part))
        else:
            raise ViCAError(f"a part of a message's content is of type text or image, got {_shorten(part)}")
    return "\n".join(texts), images


def _image_source(part: Mapping):
    """What `load_image` takes; None for a bare placeholder."""
    if part["type"] == "image_url":  # OpenAI's form
        url = part.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    key = next((key for key in _SOURCE_KEYS if part.get(key) is not None), None)
    if key == "base64":
        return f"data:image/unknown;base64,{part[key]}"
    return None if key is None else part[key]


def _sources_or_none(images: list[list]) -> list[list] | None:
    """None where the messages hold no image but placeholders: then the caller brings features."""
    given = [source is not None for row in images for source in row]
    if any(given) and not all(given):
        raise ViCAError(f"an image part names no source; give one of {', '.join(_SOURCE_KEYS)}")
    return images if any(given) else None


def _drop_negative(ids):
    """Token ids, one row or several, without the image placeholders and ignored labels that no tokenizer can decode."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return ids
    values = [one.tolist() if hasattr(one, "tolist") else one for one in ids]
    if any(isinstance(one, (list, tuple)) for one in values):
        return [_drop_negative(row) for row in values]
    return [one for one in values if one >= 0]


def _shorten(value) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 100 else text[:97] + "..."
