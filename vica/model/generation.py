"""Fits transformers' generate to this model: its cache, images by row, and placeholders among the ids."""

from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessorList, StoppingCriteriaList

from ..utils.errors import ViCAError
from .cache import ViCACache
from .layout import check_image_count

# Settings beside sampling that a checkpoint's generation_config may hold, with their neutral values.
PLAIN = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_length": 0,
    "min_new_tokens": 0,
}


class ViCAGeneration(GenerationMixin):
    if TYPE_CHECKING:  # the model that inherits this has them
        config: Any
        model: Any
        device: Any

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Any:
        """Runs transformers' own generate."""
        if kwargs.get("assistant_model") is not None or kwargs.get("prompt_lookup_num_tokens"):
            raise ViCAError("assisted generation (assistant_model, prompt_lookup_num_tokens) is not supported")
        if streamer is not None:
            kwargs["streamer"] = TextOnlyStreamer(streamer)
        return super().generate(*args, **kwargs)  # type: ignore[misc]  # typed for models, not for a mixin

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ViCAError(f"cache_implementation {generation_config.cache_implementation!r} is not supported")
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs["past_key_values"]._is_user_defined = True
        elif generation_config.use_cache is not False:
            model_kwargs["past_key_values"] = ViCACache(self.config.text_config.num_hidden_layers)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Encodes images once and lists their features for every copy of a row, so that beams share them."""
        pixel_values: Any = model_kwargs.get("pixel_values")
        features: Any = model_kwargs.get("image_features")
        if expand_size > 1 and (pixel_values is not None or features is not None):
            features = self.model.encode_images(pixel_values.to(self.device)) if features is None else features
            per_row = (input_ids == self.config.image_token_index).sum(1).tolist()
            model_kwargs |= {
                "pixel_values": None,
                "image_features": repeat_by_row(list(features), per_row, expand_size),
            }
        expanded = super()._expand_inputs_for_generation  # type: ignore[misc]
        return expanded(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Any, next_sequence_length: int | None = None, is_first_iteration: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(  # type: ignore[misc]
            input_ids, next_sequence_length=next_sequence_length, is_first_iteration=is_first_iteration, **kwargs
        )
        for name in ("pixel_values", "image_features"):
            images = kwargs.get(name)
            if images is not None and not is_first_iteration and kwargs.get("use_cache", True):
                inputs[name] = None  # the model generated it: a placeholder among new tokens is text
            elif images is not None:
                inputs[name] = self._images_of_new_columns(input_ids, inputs["input_ids"], images)
        return inputs

    def _images_of_new_columns(self, all_ids: torch.Tensor, new_ids: torch.Tensor, images: Any) -> Any:
        """Returns the images of the new columns: callers may give the whole conversation's images again with a cache
        that holds the first of them."""
        is_image = all_ids == self.config.image_token_index
        total, new = int(is_image.sum()), int((new_ids == self.config.image_token_index).sum())
        if len(images) not in (new, total):
            check_image_count(total, len(images))
        if new == 0:
            return None
        if len(images) == new:
            return images
        columns = torch.arange(all_ids.shape[1], device=all_ids.device) >= all_ids.shape[1] - new_ids.shape[1]
        keep = columns.expand_as(is_image)[is_image].nonzero().flatten().tolist()
        return images[keep] if isinstance(images, torch.Tensor) else [images[i] for i in keep]

    def _get_logits_processor(self, *args: Any, **kwargs: Any) -> "TextOnlyProcessors":
        """Hides placeholders: processors such as the repetition penalty index the vocabulary by input_ids."""
        return TextOnlyProcessors(super()._get_logits_processor(*args, **kwargs))  # type: ignore[misc]

    def _get_stopping_criteria(self, *args: Any, **kwargs: Any) -> "TextOnlyCriteria":
        """Hides placeholders: stop strings embed the last ids."""
        return TextOnlyCriteria(super()._get_stopping_criteria(*args, **kwargs))  # type: ignore[misc]


class TextOnlyProcessors(LogitsProcessorList):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return super().__call__(text_only(input_ids), scores, **kwargs)


class TextOnlyCriteria(StoppingCriteriaList):
    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        return super().__call__(text_only(input_ids), scores, **kwargs)


def text_only(ids: torch.Tensor) -> Any:
    """Returns the ids with the row's first token of text in place of placeholders."""
    return torch.where(ids < 0, ids.gather(1, (ids >= 0).int().argmax(1, keepdim=True)), ids)


class TextOnlyStreamer:
    """Leaves placeholders out: streamers get the prompt first, and tokenizers cannot decode a placeholder."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.end = streamer, streamer.end

    def put(self, value: torch.Tensor) -> None:
        self.streamer.put(value[value >= 0].view(*value.shape[:-1], -1))


def repeat_by_row(items: list, per_row: list[int], times: int) -> list:
    """Returns [row a's items, row b's items] as [a's, a's again, ..., b's, b's again, ...]."""
    check_image_count(sum(per_row), len(items))
    repeated, start = [], 0
    for count in per_row:
        repeated += items[start : start + count] * times
        start += count
    return repeated
