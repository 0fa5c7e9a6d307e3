"""The language model with its tower and projector: one call's ids and image features to hidden states of its text."""

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
from .backbone_llama import Block, Call, Rotary, among_ranks, run_layers
from .cache import ViCACache
from .flow_accel import AccelFlow
from .flow_mask import MaskFlow
from .layout import Tokens, expand

FLOWS = {"accel": AccelFlow, "dense": AccelFlow, "mask": MaskFlow}


class ViCAPreTrainedModel(PreTrainedModel):
    config_class = ViCAConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block", "CLIPEncoderLayer", "SiglipEncoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True


class ViCAModel(ViCAPreTrainedModel):
    """Ids and image features to text hidden states, by the variant that `config.variant` names at the time."""

    def __init__(self, config: ViCAConfig):
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
        self.kernel_name: str | None = None  # a kernel of attention.py by name; None: the best for the device
        self.post_init()

    def encode_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[N, 3, H, W] to projected features [N, tokens, width]: all that the language model sees of an image."""
        if not hasattr(self, "vision_tower"):
            raise ViCAError("this model has no vision tower (vision_config is None): give image_features instead")
        return self.mm_projector(self._look(pixel_values))

    def encode_no_image(self) -> torch.Tensor:
        """Features of no image, [0, tokens, width], for text-only batches in training: the gradients of the projector,
        and of a tower that learns, are zeros instead of missing. Such a tower, and any among ranks, sees a blank
        picture, of which nothing is kept."""
        config = self.config
        if among_ranks() or self._tower_learns():
            side = config.vision_config.image_size
            features = self._look(self._zeros(1, 3, side, side))[:0]
        else:
            features = self._zeros(0, visual_tokens(config), config.mm_hidden_size)
        return self.mm_projector(features)

    def _look(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Checkpointing makes a tower's inputs want gradients, be it frozen: a frozen one is called without any."""
        with torch.set_grad_enabled(self._tower_learns() and torch.is_grad_enabled()):
            return self.vision_tower(pixel_values)

    def _tower_learns(self) -> bool:
        return any(p.requires_grad for p in self.vision_tower.parameters())

    def _zeros(self, *shape: int) -> torch.Tensor:
        """Made without a look at any weight: ZeRO-3 would gather it, and the other ranks would not."""
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_features: list[torch.Tensor] | None = None,
        cache: ViCACache | None = None,
        states: list | None = None,
    ) -> tuple[torch.Tensor, Tokens]:
        """Normed hidden states of the call's text tokens, [text, width] in reading order, and where they stand."""
        ids, plan = input_ids.cpu().numpy(), self.config.plan
        features = self._checked_features(image_features)
        if features:
            self.config.require_layers()
        if cache is not None:
            cache.open(len(ids), self.config.variant, plan)
        valid = new_columns(attention_mask, cache, ids.shape)
        tokens = expand(
            ids,
            valid,
            [len(x) for x in features],
            self._placeholder(ids, features, cache),
            *((cache.next_pos, cache.seen_image) if cache is not None else ()),
        )
        self._check_vocabulary(ids, valid)
        if cache is not None:
            self._replay_prefixes(plan, tokens, cache)
        if isinstance(image_features, torch.Tensor):  # also those of no image: they keep the projector in the graph
            visual = image_features.flatten(0, 1)
        else:
            visual = torch.cat(features) if features else self._no_image()
        hidden = self._run(plan, tokens, ids, visual, cache, states)
        if cache is not None:
            cache.enter(tokens, ids, valid)
        return self.norm(hidden), tokens

    def _run(self, plan: list[LayerPlan], tokens: Tokens, ids: np.ndarray, visual, cache, states=None) -> torch.Tensor:
        kernel = Kernel(self.kernel_name, self.config._attn_implementation)
        device = self.embed_tokens.weight.device
        flow = FLOWS[self.config.variant](Call(plan, tokens, cache, self.rotary, kernel, device))
        text = self.embed_tokens(to_device(ids.ravel()[tokens.text_columns], device))
        return run_layers(self.layers, flow, text, visual.to(text), states)

    def _no_image(self) -> torch.Tensor:
        return self._zeros(0, self.embed_tokens.embedding_dim)

    def _placeholder(self, ids: np.ndarray, features: list, cache: ViCACache | None) -> int | None:
        """Where the placeholder is a word of the vocabulary, generate may utter it: a lone new token is text."""
        uttered = ids.shape[1] == 1 and not features and cache is not None and cache.get_seq_length() > 0
        return None if uttered and self.config.image_token_index >= 0 else self.config.image_token_index

    def _checked_features(self, image_features) -> list[torch.Tensor]:
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
        """Text that went before a row's first image is prefix, but it was computed as plain text while no image was
        in sight. Where the plan freezes prefixes, its K/V are made again, so that pieces equal the whole."""
        first_image = np.bincount(tokens.row[tokens.visual], minlength=tokens.batch) > 0
        rows = first_image & ~cache.seen_image & cache.valid.any(1)
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
    """The call's own columns of the mask, [B, T] bool."""
    if attention_mask is None:
        return np.ones(shape, bool)
    past = cache.get_seq_length() if cache is not None else 0
    expected = (shape[0], past + shape[1])
    if tuple(attention_mask.shape) != expected:
        raise ViCAError(
            f"attention_mask is {list(attention_mask.shape)}; with a column for each id so far it is {list(expected)}"
        )
    return attention_mask[:, past:].cpu().numpy() != 0
