"""The multimodal model as transformers knows one: loading, saving, rewiring, logits and loss."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..checkpoint import files, generation, projector
from ..checkpoint.folder import SHARD_SIZE
from ..checkpoint.source import Source
from ..checkpoint.tower import with_tower
from ..kernels.transfer import to_device
from ..plan.config import ViCAConfig
from ..plan.wiring import Wiring
from ..utils.errors import ViCAError
from .cache import ViCACache
from .decoder import ViCAModel, ViCAPreTrainedModel
from .generation import ViCAGeneration
from .layout import Tokens, last_text_tokens
from .loss import mean_loss, scored_rows
from .scores import Tap

log = logging.getLogger(__name__)

# Arguments of transformers' models that forward's **kwargs would swallow silently.
NOT_TAKEN = ("inputs_embeds", "position_ids", "output_attentions", "cache_position")


# GenerationMixin again, because transformers looks for it among the direct bases.
class ViCAForConditionalGeneration(ViCAGeneration, ViCAPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    config: ViCAConfig

    def __init__(self, config: ViCAConfig) -> None:
        super().__init__(config)
        self.model = ViCAModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    @classmethod
    def from_pretrained(  # type: ignore[override]  # one class reads all formats, with settings of its own
        cls,
        path_or_repo: Any,
        *args: Any,
        config: ViCAConfig | None = None,
        variant: str | None = None,
        t2v_layers: Any = None,
        freeze_prefix: bool | int | None = None,
        recipe: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Returns the model of a checkpoint in any of the three formats. `variant` is ViCA's (accel, mask, dense);
        further arguments are transformers' own (dtype, device_map, quantization_config, attn_implementation, ...)."""
        if path_or_repo is None:  # transformers' way of building from a state dict
            return super().from_pretrained(
                None, *args, config=config, output_loading_info=output_loading_info, **kwargs
            )
        source = Source.at(path_or_repo, **files.pop_hub_arguments(kwargs))
        wiring = Wiring(variant, t2v_layers, freeze_prefix, recipe)
        model, info = cls.from_source(source, wiring, *args, config=config, **kwargs)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_source(
        cls, source: Source, wiring: Wiring, *args: Any, config: ViCAConfig | None = None, **kwargs: Any
    ) -> tuple[Any, dict]:
        """Returns a checkpoint's model and transformers' loading info. `config` replaces the checkpoint's own."""
        if config is None:
            config = source.config(wiring)
        else:
            config = wiring.on(with_tower(config, source.cache_dir))
            config.check()
        weights = source.weights(cls, config)
        loaded: Any = super().from_pretrained(
            None, *args, config=config, state_dict=weights, output_loading_info=True, **kwargs
        )
        model, info = loaded
        if left := {k: v for k, v in info.items() if v}:
            raise ViCAError(f"the weights of {source.folder} did not load whole: {left}")
        model.config.name_or_path = source.name
        model.generation_config = generation.read_generation(source.folder) or model.generation_config
        return model, info

    def save_pretrained(
        self, save_directory: Any, *args: Any, max_shard_size: int | str = SHARD_SIZE, **kwargs: Any
    ) -> None:
        """Writes the vica format: LLaVA's names and flat config.json, with the wiring and the tower inside."""
        kept, self.generation_config = self.generation_config, generation.savable(self.generation_config)
        try:
            kwargs["max_shard_size"] = max_shard_size
            super().save_pretrained(save_directory, *args, **kwargs)
        finally:
            self.generation_config = kept

    def load_projector(self, path: Any) -> None:
        """Fills the projector with the weights that stage 1 saved."""
        projector.load_projector(self.model.mm_projector, path)

    def set_variant(
        self, variant: str | None = None, t2v_layers: Any = None, freeze_prefix: bool | int | None = None
    ) -> None:
        """Rewires the model in place: the weights are the same for every variant. Naming layers, a prefix rule or dense
        replaces a custom plan; accel and mask both follow one."""
        Wiring(variant, t2v_layers, freeze_prefix).change(self.config)

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.encode_images(pixel_values)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: list[torch.Tensor] | None = None,
        labels: torch.Tensor | None = None,
        past_key_values: ViCACache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        skip_logits: bool = False,
        taps: Sequence[Tap] = (),
        **kwargs: Any,
    ) -> Any:
        """Returns logits [B, T, vocab], row for row with `input_ids` and zero at placeholders and padding; with
        `logits_to_keep=1`, [B, 1, vocab]: each row's last text token, wherever padding stands. `skip_logits`: only the
        loss, from the rows that have a label, which is what training needs. `taps` watch attention (scores.py)."""
        if refused := [k for k in NOT_TAKEN if kwargs.get(k) is not None and kwargs[k] is not False]:
            raise ViCAError(f"forward takes no {', '.join(refused)}")
        if pixel_values is not None and image_features is not None:
            raise ViCAError("give pixel_values or image_features, not both")
        if pixel_values is not None:
            image_features = self.model.encode_images(pixel_values.to(self.device, non_blocking=True))
        elif image_features is None and self.training and self.config.vision_config is not None:
            image_features = self.model.encode_no_image()
        cache = self._cache_for(past_key_values, use_cache)
        states: list[torch.Tensor] | None = [] if output_hidden_states else None
        hidden, tokens = self.model(input_ids, attention_mask, image_features, cache, states, taps)

        loss = None
        if labels is not None:
            rows, targets = scored_rows(tokens, labels)
            scored = self.lm_head(hidden[to_device(rows, hidden.device)])
            loss = mean_loss(scored, to_device(targets, hidden.device), num_items_in_batch)
        if skip_logits:
            logits = None
        elif logits_to_keep == 1:
            logits = self.lm_head(last_rows(hidden, tokens))
        else:
            logits = self.lm_head(unpack(hidden, tokens))[:, -logits_to_keep:]
        unpacked = None if states is None else tuple(unpack(x, tokens) for x in [*states, hidden])
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache, hidden_states=unpacked)
        return output if return_dict is not False else output.to_tuple()

    def _cache_for(self, cache: Any, use_cache: bool | None) -> ViCACache | None:
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        use_cache = use_cache or cache is not None
        if use_cache and self.training and self.model.layers[0].gradient_checkpointing:
            log.warning("gradient checkpointing runs layers twice, and a cache would count them twice: use_cache=False")
            use_cache = False
        if not use_cache:
            return None
        if cache is None:
            return ViCACache(self.config.text_config.num_hidden_layers)
        if not isinstance(cache, ViCACache):
            raise ViCAError(
                f"past_key_values is a {type(cache).__name__}; it must be one that a call of this model returned"
            )
        return cache


def unpack(hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Returns text tokens as [B, T, width], zero where no text stands."""
    if len(hidden) == tokens.batch * tokens.columns:
        return hidden.view(tokens.batch, tokens.columns, -1)
    flat = hidden.new_zeros(tokens.batch * tokens.columns, hidden.shape[-1])
    flat = flat.index_copy(0, to_device(tokens.text_columns, hidden.device), hidden)
    return flat.view(tokens.batch, tokens.columns, -1)


def last_rows(hidden: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Returns [B, 1, width]: the hidden states that predict the next token of each row."""
    last = last_text_tokens(tokens)
    if (dead := np.nonzero(last < 0)[0]).size:
        raise ViCAError(f"row {dead[0]} ends with an image (or is empty): the next token needs a text token to follow")
    rank = np.cumsum(~tokens.visual) - 1
    return hidden[to_device(rank[last], hidden.device)].unsqueeze(1)
