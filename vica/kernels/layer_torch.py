"""Compute the parts of the engine's decoder layers in plain torch: the CPU's path, and the meaning of the CUDA kernels.

Shape legend: N rows, H query heads, G key heads, D head_dim, S places of the text pool, T tiles, M rows of a tile, K
keys, R partial results over images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import ACT2FN

from .attention import sdpa_heads
from .pointwise import Rope, rotate
from .work import ImageWork, Step

Partial = tuple[torch.Tensor, torch.Tensor]  # attention outputs [.., H, D] and their LSE [.., H]


@dataclass(frozen=True)
class Shape:
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    activation: str

    @classmethod
    def of(cls, text_config: Any) -> "Shape":
        """Returns the shape of a transformers text config."""
        return cls(
            text_config.num_attention_heads,
            text_config.num_key_value_heads,
            text_config.head_dim,
            text_config.rms_norm_eps,
            text_config.hidden_act,
        )

    @property
    def scale(self) -> float:
        scale: float = self.head_dim**-0.5
        return scale


class TorchOps:
    """The operations of a layer. `weight` is [out, in], as in nn.Linear."""

    def __init__(self, shape: Shape, cos: torch.Tensor, sin: torch.Tensor):
        """`cos`, `sin`: rotary tables [positions, D] in float32."""
        self.shape, self.cos, self.sin = shape, cos, sin
        self.act = ACT2FN[shape.activation]

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Returns the RMS norm, computed in float32."""
        x32 = x.float()
        return weight * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.shape.eps)).to(x.dtype)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def add_linear(
        self, hidden: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Computes hidden += x @ weight.T + bias in place."""
        hidden.addmm_(x, weight.t())
        if bias is not None:
            hidden += bias

    def norm_linear(
        self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.linear(self.norm(x, norm), weight, bias)

    def norm_gated(
        self, x: torch.Tensor, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns act(gate) * up of the normed rows; `weight` holds [gate; up]."""
        gate, up = self.norm_linear(x, norm, weight, bias).chunk(2, -1)
        gated: torch.Tensor = self.act(gate) * up
        return gated

    def rope_store(
        self, qkv: torch.Tensor, positions: torch.Tensor, kv_index: torch.Tensor, pool: torch.Tensor
    ) -> torch.Tensor:
        """Rotates queries and keys of [N, H + 2G, D], writes K/V to `kv_index` of the pool [S, 2, G, D], and returns
        the queries [N, H, D]."""
        s = self.shape
        q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
        rope = self._rope(positions, qkv.dtype)
        pool[kv_index] = torch.stack([rotate(k, rope), v], 1)
        return rotate(q, rope)

    def image_store(
        self, kv: torch.Tensor, layer: int, place: Mapping[str, torch.Tensor], images: Sequence[torch.Tensor]
    ) -> None:
        """Rotates the keys of [rows, 2, G, D] and writes K and V to a layer of each image [layers, 2, G, tokens, D].
        `place` is what `work.image_places` returns."""
        k, v = rotate(kv[:, 0], self._rope(place["positions"], kv.dtype)), kv[:, 1]
        for image, one in zip(images, torch.stack([k, v]).split([x.shape[3] for x in images], 1)):
            image[layer] = one.transpose(1, 2)

    def _rope(self, positions: torch.Tensor, dtype: torch.dtype) -> Rope:
        return self.cos[positions].to(dtype), self.sin[positions].to(dtype)

    def attend(
        self, q: torch.Tensor, pool: torch.Tensor, step: Step, frozen: bool, image_layer: int | None
    ) -> torch.Tensor:
        """Returns the attention of [N, H, D] queries over text and images, [N - frozen rows, H * D].

        `frozen`: this layer leaves out the step's frozen rows. `image_layer`: this layer's place in the images' K/V;
        None where its text reads no image.
        """
        images = step.images if image_layer is not None else None
        tiles, first = (step.tiles[step.frozen_tiles :], step.frozen_rows) if frozen else (step.tiles, 0)
        if images is None or image_layer is None:
            return self.plain_attention(q, pool, tiles, step)[first:].flatten(1)
        text, image = self.text_attention(q, pool, tiles, step), self.image_attention(q, images, image_layer)
        return merge(text, image, images.rows).to(q.dtype)[first:].flatten(1)

    def plain_attention(self, q: torch.Tensor, pool: torch.Tensor, tiles: torch.Tensor, step: Step) -> torch.Tensor:
        """Returns attention over text keys alone, by torch's own kernel: single rows of many prompts at once, longer
        stretches prompt by prompt."""
        out = torch.zeros_like(q)
        if step.block == 1:
            stretches = [(tiles[:, 0], tiles[:, 2])]
        else:  # join tiles that continue the tile before
            first, count, batch_slot = tiles.unbind(1)
            breaks = (first[1:] != first[:-1] + count[:-1]) | (batch_slot[1:] != batch_slot[:-1])
            pieces = tiles.tensor_split(breaks.nonzero().flatten().cpu() + 1)
            stretches = [(torch.arange(int(t[0, 0]), int(t[-1, :2].sum())), t[:1, 2]) for t in pieces]
        for rows, batch_slots in stretches:
            limit = step.limit[rows].view(len(batch_slots), -1)  # [prompts, rows of each]
            kv_index = step.kv_table[batch_slots, : int(limit.max()) + 1]
            mask = torch.arange(kv_index.shape[1], device=q.device) <= limit[..., None]
            queries = q[rows].view(*limit.shape, *q.shape[1:]).transpose(1, 2)
            k, v = (zero_unseen(pool[kv_index, i], mask).transpose(1, 2) for i in (0, 1))
            out[rows] = sdpa_heads(queries, k, v, mask[:, None]).transpose(1, 2).flatten(0, 1)
        return out

    def text_attention(self, q: torch.Tensor, pool: torch.Tensor, tiles: torch.Tensor, step: Step) -> Partial:
        """Returns one partial result of each row, [N, H, D] and LSE [N, H]."""
        out = torch.zeros_like(q, dtype=wide(q))
        lse = out.new_full(out.shape[:2], float("-inf"))
        block = torch.arange(int(tiles[:, 1].max()), device=q.device)
        rows = tiles[:, :1] + torch.minimum(block, tiles[:, 1:2] - 1)  # [T, M]; short tiles repeat their last row
        limit = step.limit[rows]
        kv_index = step.kv_table[tiles[:, 2], : int(limit.max()) + 1]
        mask = torch.arange(kv_index.shape[1], device=q.device) <= limit[..., None]
        k, v = (zero_unseen(pool[kv_index, i], mask) for i in (0, 1))
        mixed, mixed_lse = attend_heads(q[rows], k, v, self.shape.scale, mask)
        out[rows.flatten()], lse[rows.flatten()] = mixed.flatten(0, 1), mixed_lse.flatten(0, 1)
        return out, lse

    def image_attention(self, q: torch.Tensor, images: ImageWork, layer: int) -> Partial:
        """Returns the partial results of the items' rows, [R, H, D] and LSE [R, H]."""
        out = q.new_empty(len(images.rows), *q.shape[1:], dtype=wide(q))
        lse = out.new_empty(out.shape[:2])
        for kv, item in zip(images.kvs, images.items.tolist()):
            _, _, low, high, first, count = item
            rows = images.rows[first : first + count]
            k, v = kv[layer, :, :, low:high].transpose(1, 2).unsqueeze(1)
            mixed, mixed_lse = attend_heads(q[rows][None], k, v, self.shape.scale)
            out[first : first + count], lse[first : first + count] = mixed[0], mixed_lse[0]
        return out, lse


def zero_unseen(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Returns keys or values [T, K, G, D] with zeros where no row of `mask` [T, M, K] sees them. Another request may
    have left NaN there, which a weight of zero would not hide."""
    return x.masked_fill(~mask.any(1)[..., None, None], 0)


def merge(text: Partial, image: Partial, rows: torch.Tensor) -> torch.Tensor:
    """Returns the partial results of each row, weighted by exp(LSE): one over its text, those of `rows` over images."""
    (out, lse), (image_out, image_lse) = text, image
    top = lse.scatter_reduce(0, rows[:, None].expand_as(image_lse), image_lse, "amax")
    weight, image_weight = (lse - top).exp(), (image_lse - top[rows]).exp()
    total = weight.index_add(0, rows, image_weight)
    return (weight[..., None] * out).index_add(0, rows, image_weight[..., None] * image_out) / total[..., None]


def attend_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, mask: torch.Tensor | None = None
) -> Partial:
    """Returns the attention of q [T, M, H, D] over k, v [T, K, G, D] as [T, M, H, D], and its LSE [T, M, H], in float32
    or wider."""
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
    """Returns the type to accumulate in: float32, or the tensor's own if that is wider."""
    return torch.promote_types(x.dtype, torch.float32)
