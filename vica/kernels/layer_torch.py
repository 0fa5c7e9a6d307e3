"""What the engine's decoder is made of, in plain torch: the CPU's path, and the meaning of the CUDA kernels.

Shape legend: N rows, H query heads, G key heads, D head_dim, S slots of the text pool.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from .attention import sdpa_heads
from .pointwise import rotate
from .work import ImageWork, Step


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str

    @classmethod
    def of(cls, text_config) -> "Shape":
        return cls(
            text_config.num_attention_heads,
            text_config.num_key_value_heads,
            text_config.head_dim,
            text_config.rms_norm_eps,
            text_config.hidden_act,
        )

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5


class TorchOps:
    def __init__(self, shape: Shape, cos: torch.Tensor, sin: torch.Tensor):
        """`cos`, `sin`: rotary tables [positions, D] in float32."""
        self.shape, self.cos, self.sin = shape, cos, sin
        self.act = ACT2FN[shape.activation]

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.shape.eps)).to(x.dtype)

    def linear(self, x, weight, bias=None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def add_linear(self, hidden, x, weight, bias=None) -> None:
        """hidden += x @ weight.T + bias"""
        hidden.addmm_(x, weight.t())
        if bias is not None:
            hidden += bias

    def norm_linear(self, x, norm, weight, bias=None) -> torch.Tensor:
        return self.linear(self.norm(x, norm), weight, bias)

    def norm_gated(self, x, norm, weight, bias=None) -> torch.Tensor:
        """act(gate) * up, of [gate; up] in one weight."""
        gate, up = self.norm_linear(x, norm, weight, bias).chunk(2, -1)
        return self.act(gate) * up

    def rope_store(self, qkv: torch.Tensor, pos, slot, pool: torch.Tensor) -> torch.Tensor:
        """Rotates queries and keys of [N, H + 2G, D] and writes K/V to the slots of [S, 2, G, D]; the queries."""
        s = self.shape
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
        rope = self._rope(pos, qkv.dtype)
        pool[slot] = torch.stack([rotate(k, rope), v], 1)
        return rotate(q, rope)

    def image_store(self, kv: torch.Tensor, layer: int, place: dict, images: list[torch.Tensor]) -> None:
        """K and V of rows [rows, 2, G, D], keys rotated, to a layer's place in each image [.., 2, G, tokens, D]."""
        k, v = rotate(kv[:, 0], self._rope(place["pos"], kv.dtype)), kv[:, 1]
        for image, one in zip(images, torch.stack([k, v]).split([x.shape[3] for x in images], 1)):
            image[layer] = one.transpose(1, 2)

    def _rope(self, pos, dtype):
        return self.cos[pos].to(dtype), self.sin[pos].to(dtype)

    def attend(self, q: torch.Tensor, pool: torch.Tensor, step: Step, frozen: bool, image_layer: int | None):
        """[N - frozen rows, H * D]. `image_layer` None: this layer's text sees no image."""
        images = step.images if image_layer is not None else None
        tiles, first = (step.tiles[step.frozen_tiles :], step.frozen_rows) if frozen else (step.tiles, 0)
        if images is None:
            return self.plain_attention(q, pool, tiles, step)[first:].flatten(1)
        text, image = self.text_attention(q, pool, tiles, step), self.image_attention(q, images, image_layer)
        return merge(text, image, images.rows).to(q.dtype)[first:].flatten(1)

    def plain_attention(self, q, pool, tiles, step: Step) -> torch.Tensor:
        """Over text keys alone, by torch's own kernel: single rows of many lanes at once, else lane by lane."""
        out = torch.zeros_like(q)
        if step.block == 1:
            stretches = [(tiles[:, 0], tiles[:, 2])]
        else:  # tiles that go on where the one before ends
            first, count, lane = tiles.unbind(1)
            breaks = (first[1:] != first[:-1] + count[:-1]) | (lane[1:] != lane[:-1])
            pieces = tiles.tensor_split(breaks.nonzero().flatten().cpu() + 1)
            stretches = [(torch.arange(t[0, 0], t[-1, :2].sum()), t[:1, 2]) for t in pieces]
        for rows, lanes in stretches:
            limit = step.limit[rows].view(len(lanes), -1)  # [lanes, rows of each]
            slots = step.table[lanes, : int(limit.max()) + 1]
            mask = torch.arange(slots.shape[1], device=q.device) <= limit[..., None]
            queries = q[rows].view(*limit.shape, *q.shape[1:]).transpose(1, 2)
            k, v = (unseen_to_zero(pool[slots, i], mask).transpose(1, 2) for i in (0, 1))
            out[rows] = sdpa_heads(queries, k, v, mask[:, None]).transpose(1, 2).flatten(0, 1)
        return out

    def text_attention(self, q, pool, tiles, step: Step):
        """Partial results [N, H, D] and their LSE [N, H]."""
        out = torch.zeros_like(q, dtype=wide(q))
        lse = out.new_full(out.shape[:2], float("-inf"))
        block = torch.arange(int(tiles[:, 1].max()), device=q.device)
        rows = tiles[:, :1] + torch.minimum(block, tiles[:, 1:2] - 1)  # [T, M], the last one repeated
        limit = step.limit[rows]
        slots = step.table[tiles[:, 2], : int(limit.max()) + 1]
        mask = torch.arange(slots.shape[1], device=q.device) <= limit[..., None]
        k, v = (unseen_to_zero(pool[slots, i], mask) for i in (0, 1))
        got, got_lse = attend_heads(q[rows], k, v, self.shape.scale, mask)
        out[rows.flatten()], lse[rows.flatten()] = got.flatten(0, 1), got_lse.flatten(0, 1)
        return out, lse

    def image_attention(self, q, images: ImageWork, layer: int):
        """Partial results [P, H, D] and their LSE [P, H]."""
        out = q.new_empty(len(images.rows), *q.shape[1:], dtype=wide(q))
        lse = out.new_empty(out.shape[:2])
        for kv, item in zip(images.kvs, images.items.tolist()):
            _, _, low, high, first, count = item
            rows = images.rows[first : first + count]
            k, v = kv[layer, :, :, low:high].transpose(1, 2).unsqueeze(1)
            got, got_lse = attend_heads(q[rows][None], k, v, self.shape.scale)
            out[first : first + count], lse[first : first + count] = got[0], got_lse[0]
        return out, lse


def unseen_to_zero(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Keys or values [T, K, G, D] that no row of `mask` [T, M, K] sees: slots that another request left, and its NaN
    would pass a weight of zero."""
    return x.masked_fill(~mask.any(1)[..., None, None], 0)


def merge(text, image, rows) -> torch.Tensor:
    """Partial results weighed by exp(LSE): one of each row over its text, and those of `rows` over images."""
    (out, lse), (more, more_lse) = text, image
    top = lse.scatter_reduce(0, rows[:, None].expand_as(more_lse), more_lse, "amax")
    weight, more_weight = (lse - top).exp(), (more_lse - top[rows]).exp()
    total = weight.index_add(0, rows, more_weight)
    return (weight[..., None] * out).index_add(0, rows, more_weight[..., None] * more) / total[..., None]


def attend_heads(q, k, v, scale: float, mask=None) -> tuple[torch.Tensor, torch.Tensor]:
    """q [T, M, H, D] over k, v [T, K, G, D] -> [T, M, H, D] and LSE [T, M, H], in float32 or wider."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.to(wide(q)) for x in (q, k, v))
    if group > 1:
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
    scores = torch.einsum("tmhd,tkhd->tmhk", q, k) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask.unsqueeze(2), float("-inf"))
    lse = scores.logsumexp(-1)
    return torch.einsum("tmhk,tkhd->tmhd", (scores - lse[..., None]).exp(), v), lse


def wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
