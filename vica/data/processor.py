"""Turns texts and images into model inputs: `ViCAProcessor`, a transformers processor with LLaVA's exact rules.

Token ids are those of LLaVA's slow tokenizer (tokenizer.py). Images go through transformers' PIL processors even if
torchvision is installed, since its kernels give slightly different pixels.
"""

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoConfig, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from ..utils.errors import ViCAError
from .conversation import get_template
from .images import as_list, check_enlarged, load_image, pad_to_square
from .messages import is_batch, read_messages, shorten, sources_or_none
from .tokenizer import IMAGE_MARK, load_tokenizer, restore_llama_ids, tokenize_prompt

IMAGE_MODES = ("pad", "resize", "crop")
_MODE_OF_ASPECT_RATIO = {"pad": "pad", "resize": "resize", "crop": "crop", "square": "crop", None: "crop"}
# By the type that transformers saves; it is the same for its PIL and its torchvision backends.
_PIL_PROCESSORS = {
    "CLIPImageProcessor": CLIPImageProcessorPil,
    "LlavaImageProcessor": CLIPImageProcessorPil,  # pads to a square first; here image_mode does that
    "SiglipImageProcessor": SiglipImageProcessorPil,
}
_CALL_OPTIONS = ("padding", "padding_side", "return_tensors", "add_special_tokens", "truncation", "max_length")
_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


class ViCAProcessor(ProcessorMixin):
    """Turns prompts with `<image>` marks, and images, into `input_ids`, `attention_mask` and `pixel_values`.

    `image_mode` says how an image becomes the tower's square: "pad" (with the tower's mean colour), "resize" (squash)
    or "crop" (the tower's own preprocessing). `conversation` names the template of `apply_chat_template`. Without an
    `image_processor` the processor does text only, and the caller brings `image_features` to the model.
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
        self.tokenizer = restore_llama_ids(tokenizer)
        self.conversation = get_template(conversation).name
        self.image_mode = image_mode
        self.image_token_index = image_token_index

    @classmethod
    def from_config(cls, config, tokenizer: PreTrainedTokenizerBase) -> "ViCAProcessor":
        """Returns the processor that a model's config implies, for checkpoints that come without one."""
        return cls(tokenizer=tokenizer, **_settings_of(config))

    def changed(self, conversation: str | None = None, image_mode: str | None = None) -> "ViCAProcessor":
        """Returns itself, or another processor with the given settings."""
        if conversation is None and image_mode is None:
            return self
        return ViCAProcessor(
            self.image_processor,
            self.tokenizer,
            conversation or self.conversation,
            image_mode or self.image_mode,
            self.image_token_index,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **options) -> "ViCAProcessor":
        """Returns the saved processor, or the one that the model's config implies if none was saved. The constructor's
        settings, if given, override the saved ones."""
        hub = {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}
        settings, _ = cls.get_processor_dict(pretrained_model_name_or_path, **hub)
        if settings.get("processor_class") != cls.__name__:
            settings = _settings_of(AutoConfig.from_pretrained(pretrained_model_name_or_path, **hub))
        names = ("image_processor", "conversation", "image_mode", "image_token_index")
        chosen = {name: value for name, value in (settings | options).items() if name in names}
        return cls(tokenizer=load_tokenizer(pretrained_model_name_or_path, **hub), **chosen)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **_) -> list[str]:
        """Saves the processor. ProcessorMixin's version fails without an image processor."""
        if push_to_hub:
            raise ViCAError("push_to_hub=True is not for save_pretrained here; call processor.push_to_hub(name)")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        vocabulary = getattr(self.tokenizer, "vocab_file", None)
        kept = folder / "tokenizer.model"  # transformers 5 does not write it, and LLaVA reads no other file
        if vocabulary and Path(vocabulary).name == kept.name and Path(vocabulary).is_file() and not kept.exists():
            shutil.copyfile(vocabulary, kept)
        self.to_json_file(folder / "processor_config.json")
        return [str(folder / "processor_config.json")]

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
        """Returns the model's inputs. `text` is taken as it is: a rendered prompt, or several. `images` is one image, a
        flat list in reading order over the batch, or one list for each text; None leaves the marks to the model's
        `image_features`."""
        _refuse(unknown)
        if text is None and images is None:
            raise ViCAError("the processor needs text, images or both; got neither")
        data: dict[str, Any] = {}
        prompts = None if text is None else _as_prompts(text)
        if prompts is not None:
            sequences = [self.tokenize(prompt, add_special_tokens) for prompt in prompts]
            if truncation:
                sequences = [_truncate(ids, max_length, self.image_token_index) for ids in sequences]
            data |= self._pad(sequences, padding, padding_side, max_length, rectangular=return_tensors is not None)
        flat = None if images is None else _flatten(images, prompts)
        if flat:
            data["pixel_values"] = self.process_images(flat)
        return BatchFeature(data, tensor_type=return_tensors)

    def tokenize(self, prompt: str, add_special_tokens: bool = True) -> list[int]:
        """Returns the ids of one prompt, with `image_token_index` for each `<image>`."""
        return tokenize_prompt(prompt, self.tokenizer, self.image_token_index, add_special_tokens)

    def tokenize_next_turn(self, text: str) -> list[int]:
        """Returns the ids that follow a finished answer and its eos token, up to the assistant's next open turn. They
        differ from the ids of `next_turn(text)` on its own, which would begin with a prefix space."""
        template = get_template(self.conversation)
        stop = self.tokenize(template.stop, add_special_tokens=False)
        return self.tokenize(template.stop + template.next_turn(text), add_special_tokens=False)[len(stop) :]

    def process_images(self, images: Iterable) -> list[np.ndarray]:
        """Returns each image as the tower takes it: float32 [3, H, W]."""
        if self.image_processor is None:
            raise ViCAError("images were given, but this model has no vision tower; give it image_features instead")
        arranged = [self._arrange(load_image(image)) for image in images]
        return self.image_processor.preprocess(arranged)["pixel_values"]

    def image_settings(self) -> dict | None:
        """Returns all settings that decide which pixels an image becomes."""
        return None if self.image_processor is None else {"mode": self.image_mode, **self.image_processor.to_dict()}

    def _arrange(self, image):
        """Returns the image after LLaVA's steps that precede the tower's own preprocessing."""
        if self.image_mode == "pad":
            return pad_to_square(image, tuple(int(mean * 255) for mean in self.image_processor.image_mean))
        if self.image_mode == "resize":
            cropped = getattr(self.image_processor, "do_center_crop", False)
            square = self.image_processor.crop_size if cropped else self.image_processor.size
            return image.resize((square["width"], square["height"]))
        if "shortest_edge" in self.image_processor.size:
            check_enlarged(image, self.image_processor.size["shortest_edge"])
        return image

    def _pad(self, sequences: list[list[int]], padding, padding_side, max_length, rectangular: bool) -> dict:
        width = _padded_width(sequences, padding, max_length)
        side = padding_side or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ViCAError(f"padding_side is {side!r}; it must be left or right")
        padded, mask = [], []
        for ids in sequences:
            missing = max(width - len(ids), 0)
            padding_ids, absent, present = [self.pad_id] * missing, [0] * missing, [1] * len(ids)
            padded.append(padding_ids + ids if side == "left" else ids + padding_ids)
            mask.append(absent + present if side == "left" else present + absent)
        lengths = [len(ids) for ids in padded]
        if rectangular and len(set(lengths)) > 1:
            raise ViCAError(f"texts of {lengths} tokens make no rectangular tensor with padding={padding!r}; use True")
        return {"input_ids": padded, "attention_mask": mask}

    @property
    def pad_id(self) -> int:
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
        """Renders transformers' messages (one conversation, or a list of them) as prompts, or with `tokenize` as the
        inputs that `__call__` returns. In a user's message the images come first, each as `<image>` and a newline, at
        any place in the content: LLaVA's convention. Text may hold `<image>` itself to put an image elsewhere."""
        options = {**kwargs, **(processor_kwargs or {})}
        _refuse({"chat_template": chat_template} | {k: v for k, v in options.items() if k not in _CALL_OPTIONS})
        if add_generation_prompt and continue_final_message:
            raise ViCAError("add_generation_prompt and continue_final_message exclude each other")
        batched = is_batch(conversation)
        template = get_template(self.conversation)
        prompts, images = [], []
        for messages in conversation if batched else [conversation]:
            turns, sources = read_messages(messages)
            prompts.append(template.render(turns, add_generation_prompt, continue_final_message))
            images.append(sources)
        if not tokenize:
            return prompts if batched else prompts[0]
        features = self(text=prompts, images=sources_or_none(images), **options)
        return features if return_dict else features["input_ids"]

    def ask(self, question: str, images=()) -> BatchFeature:
        """Returns the model's inputs for one question about one or several images. One image needs no list around
        it."""
        content = [{"type": "image", "image": image} for image in as_list(images)]
        content.append({"type": "text", "text": question})
        return self.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True
        )

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


def as_pil_processor(image_processor):
    """Returns the PIL version of an image processor, or of its saved settings; None stays None."""
    if image_processor is None or isinstance(image_processor, tuple(_PIL_PROCESSORS.values())):
        return image_processor
    settings = dict(image_processor) if isinstance(image_processor, Mapping) else image_processor.to_dict()
    kind = settings.pop("image_processor_type", None)
    pil_class = _PIL_PROCESSORS.get(str(kind).removesuffix("Fast").removesuffix("Pil"))
    if pil_class is None:
        raise ViCAError(f"image processor {kind!r} is not supported; known: {', '.join(_PIL_PROCESSORS)}")
    return pil_class(**settings)


def _settings_of(config) -> dict:
    """Returns the constructor's arguments that a model's config implies, without the tokenizer."""
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
    if vision_config.model_type == "open_clip_vision":
        mean, std = list(vision_config.image_mean), list(vision_config.image_std)
        return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=square, image_mean=mean, image_std=std)
    raise ViCAError(
        f"no image preprocessing is known for a {vision_config.model_type!r} tower; "
        "known: clip_vision_model, siglip_vision_model, open_clip_vision"
    )


def _refuse(options: Mapping) -> None:
    """Raises if options that transformers' processors know and this one does not are set."""
    given = [name for name, value in options.items() if value is not None and value is not False]
    if given:
        raise ViCAError(f"the processor takes no {', '.join(given)}; known options: {', '.join(_CALL_OPTIONS)}")


def _as_prompts(text) -> list[str]:
    prompts = [text] if isinstance(text, str) else text
    if not isinstance(prompts, (list, tuple)) or not prompts or not all(isinstance(one, str) for one in prompts):
        raise ViCAError(f"text must be a string or a non-empty list of strings, got {shorten(text)}")
    return list(prompts)


def _truncate(ids: list[int], max_length: int | None, image_token_index: int) -> list[int]:
    if max_length is None or max_length < 1:
        raise ViCAError(f"truncation=True needs max_length from 1, got {max_length}")
    if image_token_index in ids[max_length:]:
        raise ViCAError(f"max_length={max_length} would cut an image away from a prompt of {len(ids)} tokens")
    return ids[:max_length]


def _padded_width(sequences: list[list[int]], padding, max_length: int | None) -> int:
    """Returns the length to which shorter sequences are padded; 0 for no padding."""
    if padding in (True, "longest"):
        return max(len(ids) for ids in sequences)
    if padding == "max_length" and max_length is not None:
        return max_length
    if padding in (False, None, "do_not_pad"):
        return 0
    raise ViCAError(f"padding is {padding!r}; it must be True, False, or 'max_length' together with max_length")


def _flatten(images, prompts: list[str] | None) -> list:
    """Returns all images in reading order, after it has checked that their number matches the marks in the prompts."""
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    marks = None if prompts is None else [prompt.count(IMAGE_MARK) for prompt in prompts]
    nested = any(isinstance(entry, (list, tuple)) for entry in images)
    if not nested:
        if marks is not None and sum(marks) != len(images):
            raise ViCAError(f"the text has {sum(marks)} {IMAGE_MARK} marks, but {len(images)} images were given")
        return images
    lists = [_as_image_list(entry) for entry in images]
    if marks is not None and len(lists) != len(marks):
        raise ViCAError(f"{len(marks)} texts were given, but {len(lists)} lists of images")
    for place, given in enumerate(lists):
        if marks is not None and marks[place] != len(given):
            raise ViCAError(
                f"text {place} has {marks[place]} {IMAGE_MARK} marks, but {len(given)} images were given for it"
            )
    return [image for given in lists for image in given]


def _as_image_list(entry) -> list:
    if entry is None:
        return []
    return list(entry) if isinstance(entry, (list, tuple)) else [entry]


def _drop_negative(ids):
    """Returns token ids, one sequence or several, without image placeholders and ignored labels: no tokenizer decodes
    those."""
    ids = ids.tolist() if hasattr(ids, "tolist") else ids
    if isinstance(ids, int):
        return ids
    values = [one.tolist() if hasattr(one, "tolist") else one for one in ids]
    if any(isinstance(one, (list, tuple)) for one in values):
        return [_drop_negative(one) for one in values]
    return [one for one in values if one >= 0]
