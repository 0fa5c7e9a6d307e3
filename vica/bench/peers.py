"""transformers' own LLaVA on the weights of the measured model, which it shares."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, StaticCache

from ..plan import formats
from ..plan.config import ViCAConfig
from ..utils.errors import ViCAError

Config = TypeVar("Config")
Net = TypeVar("Net", bound=nn.Module)


def share(
    make: Callable[[Config], Net], config: Config, weights: dict[str, nn.Parameter], device, renamed=lambda name: name
) -> Net:
    """Returns a model that holds these very parameters, so that it follows them when an engine fuses them."""
    with torch.device("meta"):
        model = make(config)
    model.load_state_dict({name: weights[renamed(name)] for name in model.state_dict()}, assign=True)
    fill_tables(model, device)
    return model.eval()


def fill_tables(model: nn.Module, device) -> None:
    """Refills the buffers that neither a checkpoint nor the meta device holds."""
    for module in model.modules():
        tables = module._buffers
        if (places := tables.get("position_ids")) is not None:
            tables["position_ids"] = torch.arange(places.shape[-1], device=device)[None]
        if "inv_freq" in tables:
            fresh = type(module)(module.config)
            tables.update(fresh.named_buffers())
        for name, table in tables.items():
            if table is not None and not table.is_meta:
                tables[name] = table.to(device)
    if empty := [name for name, table in model.named_buffers() if table.is_meta]:
        raise ViCAError(f"tables that this program cannot make: {', '.join(empty)}")


def llava_config(config: ViCAConfig) -> LlavaConfig:
    """Returns transformers' config. The placeholder is the last word of the vocabulary, which prompts here never use,
    so the weights fit as they are."""
    tower = None if config.vision_config is None else config.vision_config.model_type
    if tower not in formats.CLASS_TOKENS or config.mm_projector_type != "mlp2x_gelu":
        raise ViCAError("transformers' LLaVA wants a CLIP or SigLIP tower and an mlp2x_gelu projector")
    vocabulary = config.text_config.vocab_size
    return LlavaConfig.from_dict(formats.hf_config(config, vocabulary, vocabulary - 1))


class Transformers:
    """transformers' stock forward with SDPA, on prepared tensors."""

    def __init__(self, config: ViCAConfig, weights: dict[str, nn.Parameter], device):
        settings = llava_config(config)
        settings._attn_implementation = "sdpa"
        self.model = share(
            LlavaForConditionalGeneration, settings, weights, device, lambda name: formats.our_name(name, "hf")
        )
        self.model.generation_config.eos_token_id = None  # answers have a forced length
        self.language = self.model.model.language_model
        self.image_token = settings.image_token_index

    @torch.no_grad()
    def features(self, pixels: torch.Tensor) -> list[torch.Tensor]:
        return list(self.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output)

    @torch.no_grad()
    def prefill(self, ids: torch.Tensor, features: torch.Tensor | None = None, cache=None) -> tuple:
        """Returns first tokens [B] and the cache. `ids` hold one placeholder for each token of `features` [B, tokens,
        width]."""
        hidden = self.language.embed_tokens(ids)
        if features is not None:
            hidden = hidden.masked_scatter((ids == self.image_token)[..., None], features)
        cache = DynamicCache(config=self.model.config.get_text_config()) if cache is None else cache
        return self._choose(self.language(inputs_embeds=hidden, past_key_values=cache, use_cache=True)), cache

    @torch.no_grad()
    def from_pixels(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits[:, -1].argmax(-1)

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, cache, steps: int, step: Callable | None = None) -> torch.Tensor:
        for _ in range(steps):
            tokens = (step or self.next_token)(tokens, cache)
        return tokens

    def next_token(self, tokens: torch.Tensor, cache) -> torch.Tensor:
        return self._choose(self.language(input_ids=tokens[:, None], past_key_values=cache, use_cache=True))

    def _choose(self, out) -> torch.Tensor:
        return self.model.lm_head(out.last_hidden_state[:, -1]).argmax(-1)

    def static_cache(self, room: int) -> StaticCache:
        return StaticCache(config=self.model.config.get_text_config(), max_cache_len=room)

    def compiled(self) -> Callable:
        """Returns `next_token` compiled and captured."""
        step = torch.compile(self.next_token, mode="reduce-overhead", dynamic=False)

        def call(tokens, cache):
            torch.compiler.cudagraph_mark_step_begin()
            return step(tokens.clone(), cache)  # the next step overwrites the token's memory

        return call

    @torch.no_grad()
    def generate(self, ids: torch.Tensor, pixels: torch.Tensor, new_tokens: int) -> torch.Tensor:
        out = self.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels, do_sample=False,
            max_new_tokens=new_tokens, min_new_tokens=new_tokens, pad_token_id=0,
        )  # fmt: skip
        return out[:, ids.shape[1] :]
