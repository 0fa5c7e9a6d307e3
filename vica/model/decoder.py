"""The language model with its tower and projector: one call's ids and image features to hidden states of its text."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..kernels.attention import Kernel
from ..kernels.pointwise import RMSNorm
from ..kernels.transfer import to_device
from ..plan.config import ViCAConfig
from ..plan.layer import LayerPlan
from ..plan.sizes import visual_tokens
from ..utils.errors import ViCAError
from ..vision.projectors import build_projector
from ..vision.towers import VisionTower
from .backbone_llama import Block, Rotary
from .cache import ViCACache
from .call import Call, Flow, among_ranks, run_layers
from .flow_accel import AccelFlow
from .flow_mask import MaskFlow
from .layout import Tokens, expand
from .scores import Tap

FLOWS: dict[str, Callable[[Call], Flow]] = {"accel": AccelFlow, "dense": AccelFlow, "mask": MaskFlow}


class ViCAPreTrainedModel(PreTrainedModel):
    config_class = ViCAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")  # type: ignore[assignment]
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "CLIPEncoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class ViCAModel(ViCAPreTrainedModel):
    """Follows the plan and the variant that its config names at the time of a call."""

    config: ViCAConfig

    def __init__(self, config: ViCAConfig) -> None:
        super().__init__(config)
        text = config.text_config
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(Block(text, i) for i in range(text.num_hidden_layers))
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary = Rotary(text)
        if config.vision_config is not None:
            self.vision_tower = VisionTower(
                config.vision_config, config.mm_vision_select_layer, config.mm_vision_select_feature
            )
        if config.mm_hidden_size is not None:
            self.mm_projector = build_projector(config.mm_projector_type, config.mm_hidden_size, text.hidden_size)
        self.kernel_name: str | None = None  # a kernel of kernels/attention.py by name; None: the best for the device
        self.post_init()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Returns projected features [N, tokens, width] of pixels [N, 3, H, W]: all that the language model sees."""
        if not hasattr(self, "vision_tower"):
            raise ViCAError("this model has no vision tower (vision_config is None): give image_features instead")
        return self.mm_projector(self._tower_features(pixel_values))

    def encode_no_image(self) -> torch.Tensor:
        """Returns features of no image, [0, tokens, width], for text-only batches in training: the projector and a
        tower that learns get gradients of zero instead of none. Such a tower, and any tower among ranks, runs on a
        blank picture, whose features are not used."""
        config: Any = self.config  # a model that gets here has a tower
        if among_ranks() or self._tower_learns():
            side = config.vision_config.image_size
            features = self._tower_features(self._zeros(1, 3, side, side))[:0]
        else:
            features = self._zeros(0, visual_tokens(config), config.mm_hidden_size)
        return self.mm_projector(features)

    def _tower_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Runs a frozen tower under no_grad: gradient checkpointing sets requires_grad on its inputs."""
        with torch.set_grad_enabled(self._tower_learns() and torch.is_grad_enabled()):
            return self.vision_tower(pixel_values)

    def _tower_learns(self) -> bool:
        return any(p.requires_grad for p in self.vision_tower.parameters())

    def _zeros(self, *shape: int) -> torch.Tensor:
        """Returns zeros without touching a weight: ZeRO-3 would gather it, and the other ranks would not."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_features: torch.Tensor | list[torch.Tensor] | None = None,
        cache: ViCACache | None = None,
        states: list | None = None,
        taps: Sequence[Tap] = (),
    ) -> tuple[torch.Tensor, Tokens]:
        """Returns normed hidden states of the call's text tokens, [text, width] in reading order, and the layout."""
        ids, plan = input_ids.cpu().numpy(), self.config.plan
        features = self._checked_features(image_features)
        tokens, valid = self._lay_out(ids, attention_mask, features, cache, plan)
        if cache is not None:
            self._replay_prefixes(plan, tokens, cache)
        if isinstance(image_features, torch.Tensor):  # also those of no image: they keep the projector in the graph
            visual = image_features.flatten(0, 1)
        else:
            visual = torch.cat(features) if features else self._no_image()
        hidden, flow = self._run(plan, tokens, ids, visual, cache, states, taps)
        if cache is not None:
            cache.commit(tokens, ids, valid, flow.gaps)
        return self.norm(hidden), tokens

    def _lay_out(
        self,
        ids: np.ndarray,
        attention_mask: torch.Tensor | None,
        features: list[torch.Tensor],
        cache: ViCACache | None,
        plan: list[LayerPlan],
    ) -> tuple[Tokens, np.ndarray]:
        """Checks the inputs against each other and the cache; returns the layout and the valid columns."""
        if features:
            self.config.require_layers()
        if cache is not None:
            cache.open(len(ids), self.config.variant, plan)
        valid = new_columns(attention_mask, cache, ids.shape)
        past = (cache.next_pos, cache.seen_image) if cache is not None else ()
        tokens = expand(ids, valid, [len(x) for x in features], self._placeholder(ids, features, cache), *past)
        self._check_vocabulary(ids, valid)
        return tokens, valid

    def _run(
        self,
        plan: list[LayerPlan],
        tokens: Tokens,
        ids: np.ndarray,
        visual: torch.Tensor,
        cache: ViCACache | None,
        states: list | None = None,
        taps: Sequence[Tap] = (),
    ) -> tuple[torch.Tensor, Flow]:
        kernel = Kernel(self.kernel_name, self.config._attn_implementation)
        device = self.embed_tokens.weight.device
        flow = FLOWS[self.config.variant](Call(plan, tokens, cache, self.rotary, kernel, device, taps))
        text = self.embed_tokens(to_device(ids.ravel()[tokens.text_columns], device))
        return run_layers(self.layers, flow, text, visual.to(text), states), flow

    def _no_image(self) -> torch.Tensor:
        return self._zeros(0, self.embed_tokens.embedding_dim)

    def _placeholder(self, ids: np.ndarray, features: list, cache: ViCACache | None) -> int | None:
        """Returns the id that stands for an image, None where none can. If it is a real vocabulary id, generate() may
        produce it: a single new token after a cached prompt is therefore text."""
        generated = ids.shape[1] == 1 and not features and cache is not None and cache.get_seq_length() > 0
        return None if generated and self.config.image_token_index >= 0 else self.config.image_token_index

    def _checked_features(self, image_features: torch.Tensor | list[torch.Tensor] | None) -> list[torch.Tensor]:
        width = self.embed_tokens.embedding_dim
        features = list(image_features) if image_features is not None else []
        for i, x in enumerate(features):
            if x.dim() != 2 or x.shape[1] != width or not len(x):
                raise ViCAError(
                    f"image_features[{i}] is {list(x.shape)}; it must be [tokens, {width}], already projected"
                )
        return features

    def _check_vocabulary(self, ids: np.ndarray, valid: np.ndarray) -> None:
        text = ids[valid & (ids != self.config.image_token_index)]  # the placeholder may lie outside
        wrong = text[(text < 0) | (text >= self.embed_tokens.num_embeddings)]
        if len(wrong):
            raise ViCAError(
                f"input_ids hold {wrong[0]}; ids are 0 to {self.embed_tokens.num_embeddings - 1}, "
                f"and {self.config.image_token_index} for an image"
            )

    def _replay_prefixes(self, plan: list[LayerPlan], tokens: Tokens, cache: ViCACache) -> None:
        """Computes the K/V of text again that turns out to be a prefix: earlier calls took it for plain text, because
        no image was in sight, and this plan freezes prefixes. So pieces equal the whole."""
        rows = (tokens.visual_counts > 0) & ~cache.seen_image & cache.valid.any(1)
        if not rows.any() or all(p.prefix_attends for p in plan):
            return
        valid = cache.valid & rows[:, None]
        past = expand(cache.ids, valid, [], image_token=None)  # no image so far: every id is text
        past.prefix[:] = True
        scratch = ViCACache(len(self.layers))
        scratch.open(len(rows), self.config.variant, plan)
        self._run(plan, past, cache.ids, self._no_image(), scratch)
        cache.replace_rows(scratch, np.nonzero(rows)[0])


def new_columns(attention_mask: torch.Tensor | None, cache: ViCACache | None, shape: tuple[int, int]) -> np.ndarray:
    """Returns the call's own columns of the mask, [B, T] bool."""
    if attention_mask is None:
        return np.ones(shape, bool)
    past = cache.get_seq_length() if cache is not None else 0
    expected = (shape[0], past + shape[1])
    if tuple(attention_mask.shape) != expected:
        raise ViCAError(
            f"attention_mask is {list(attention_mask.shape)}; with a column for each id so far it is {list(expected)}"
        )
    return attention_mask[:, past:].cpu().numpy() != 0
