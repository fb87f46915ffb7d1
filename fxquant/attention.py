"""Attention and transformer layers of ``torch.nn``, spelt out so that a trace sees their linears.

PyTorch computes each of these modules as a whole, on a fast path of fused kernels in evaluation. To
a trace they are leaves, in which nothing can be quantized. :func:`spell_out` gives those of a
copied model another class with the same parameters, whose ``forward`` is the definition in plain
ops::

    MultiheadAttention(x, x, x)  =  Linear_out(concat(softmax(Q K^T / sqrt(d) + mask) V))
    Q, K, V  =  chunk(Linear_in(x), 3)

(Vaswani et al. 2017, section 3.2). Positions that ``src_key_padding_mask`` hides have values here,
where PyTorch's fast path leaves zeros; nothing should read either.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn


def spell_out(model: nn.Module, leaves: Collection[str] = ()) -> None:
    """Let the attention and transformer modules of ``model`` trace, in place.

    Args:
        model: a copy.
        leaves: paths of modules that stay as they are, with all in them.

    Modules of derived classes stay, and so do those with forward hooks, with forms that no kernel
    serves (``bias_k``, ``add_zero_attn``), and those that train with dropout.
    """
    for path, module in model.named_modules(remove_duplicate=False):
        if any(path == leaf or path.startswith(f"{leaf}.") for leaf in leaves):
            continue
        spelt = _SPELT.get(type(module))
        kind = type(module)
        if f"{kind.__module__}.{kind.__qualname__}" == _WINDOWED and not module.training:
            spelt = type("SpeltWindowAttention", (_Windows, kind), {"__module__": __name__})
        if spelt is not None and _is_plain(module):
            module.__class__ = spelt
            if isinstance(module, SpeltAttention):
                projection: nn.Module = module.out_proj
                projection.__class__ = nn.Linear  # of a subclass that marks it for torch.ao


def drop_unread(graph: fx.Graph) -> None:
    """Take out attention weights and masks that nobody reads."""
    for node in reversed(graph.nodes):
        if node.target in (attention_weights, merged_mask) and not node.users:
            graph.erase_node(node)


def _is_plain(module: nn.Module) -> bool:
    for part in module.modules():
        if part._forward_hooks or part._forward_pre_hooks:
            return False
        if isinstance(part, nn.Dropout) and part.training and part.p:
            return False
        if isinstance(part, nn.MultiheadAttention) and (
            part.bias_k is not None
            or part.bias_v is not None
            or part.add_zero_attn
            or (part.training and part.dropout)
        ):
            return False
    return True


def merged_mask(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, heads: int, query: Tensor
) -> Tensor | None:
    """One mask to be added to the scores.

    Args:
        attn_mask: ``[L, S]``, ``[N * heads, L, S]`` or ``[heads, L, S]``; where boolean, true
            hides.
        key_padding_mask: ``[N, S]`` or ``[S]``, likewise.
        heads: number of heads.
        query: ``[N, heads, L, D]`` or ``[heads, L, D]``.

    Returns:
        A mask that broadcasts to ``[N, heads, L, S]`` or ``[heads, L, S]``.
    """
    mask = None if attn_mask is None else _added(attn_mask, query)
    if mask is not None and mask.dim() == 3 and query.dim() == 4:
        mask = mask.unflatten(0, (-1, heads))
    if key_padding_mask is None:
        return mask
    padding = _added(key_padding_mask, query)[..., None, None, :]
    if query.dim() == 3:
        padding = padding.reshape(1, 1, -1)
    return padding if mask is None else mask + padding


def _added(mask: Tensor, query: Tensor) -> Tensor:
    """A boolean mask as numbers that are added to scores."""
    if mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=query.dtype).masked_fill(mask, -math.inf)


def attention_weights(query: Tensor, key: Tensor, mask: Tensor | None, average: bool) -> Tensor:
    """The weights that attention gives beside its result, of all heads or their mean."""
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
    weights = torch.softmax(scores if mask is None else scores + mask, -1)
    return weights.mean(-3) if average else weights


def window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    position_bias: Tensor,
    window: list[int],
    shift: list[int],
    heads: int,
) -> Tensor:
    """Attention in shifted windows (Liu et al. 2021, section 3.2), between its two linears.

    Args:
        qkv: ``[N, H, W, 3 * E]``.
        bias: of the linear that gave it, which is what it gives for padding.
        position_bias: ``[1, heads, L, L]``, of windows of ``L`` pixels.
        window: height and width.
        shift: of the windows, down and to the right.
        heads: number of heads.

    Returns:
        ``[N, H, W, E]``.
    """
    batch, height, width, features = qkv.shape
    below, right = -height % window[0], -width % window[1]
    if below or right:
        qkv = F.pad(qkv, (0, 0, 0, right, 0, below))
        if bias is not None:
            qkv[:, height:] = bias
            qkv[:, :, width:] = bias
    sizes = (height + below, width + right)
    shift = [0 if w >= n else s for w, n, s in zip(window, sizes, shift, strict=True)]
    qkv = torch.roll(qkv, (-shift[0], -shift[1]), (1, 2)) if any(shift) else qkv
    rows, columns = sizes[0] // window[0], sizes[1] // window[1]
    parts = qkv.view(batch, rows, window[0], columns, window[1], 3, heads, features // 3 // heads)
    q, k, v = parts.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(1, 3).unbind()
    mask = position_bias
    if any(shift):
        mask = mask + _regions_apart(sizes, window, shift, qkv).repeat(batch, 1, 1, 1)
    made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    made = made.reshape(batch, rows, columns, heads, *window, -1).permute(0, 1, 4, 2, 5, 3, 6)
    made = made.reshape(batch, *sizes, -1)
    made = torch.roll(made, (shift[0], shift[1]), (1, 2)) if any(shift) else made
    return made[:, :height, :width].contiguous()


def _regions_apart(
    sizes: tuple[int, int], window: list[int], shift: list[int], like: Tensor
) -> Tensor:
    """-100 between pixels of one window that lay apart before the shift, ``[windows, 1, L, L]``."""
    region = like.new_zeros(sizes)
    for axis, factor in ((0, 3), (1, 1)):
        index = torch.arange(sizes[axis], device=like.device)
        part = (index >= sizes[axis] - window[axis]).to(like.dtype)
        part = part + (index >= sizes[axis] - shift[axis])
        region = region + factor * (part[:, None] if axis == 0 else part)
    blocks = region.view(sizes[0] // window[0], window[0], sizes[1] // window[1], window[1])
    pixels = blocks.transpose(1, 2).flatten(2).flatten(0, 1)
    apart = pixels[:, None, :] != pixels[:, :, None]
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)[:, None]


def _recorded(function: Any, like: Any, *args: Any) -> Any:
    """A call of ``function`` as one node, while ``like`` is traced."""
    if isinstance(like, fx.Proxy):
        return like.tracer.create_proxy("call_function", function, args, {})
    return function(*args)


def _rank(x: Any) -> int | None:
    """The number of dimensions, also while ``x`` is traced; ``None`` where nothing tells it."""
    if not isinstance(x, fx.Proxy):
        return int(x.dim())
    example = getattr(x.tracer, "example_value", lambda _: None)(x)
    return example.dim() if isinstance(example, Tensor) else None


class SpeltAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` by its definition."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As that of the base class; ``is_causal`` only says what ``attn_mask`` is."""
        rank = _rank(query)
        if rank is None and not self.batch_first:
            raise TypeError(
                "without example inputs it is unknown whether the input has a batch dimension"
                " (batch_first=False)"
            )
        first = self.batch_first or rank == 2
        q, k, v = (self._heads(x, first=first) for x in self._projected(query, key, value))
        mask = None
        if attn_mask is not None or key_padding_mask is not None:
            mask = _recorded(merged_mask, q, attn_mask, key_padding_mask, self.num_heads, q)
        made = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        made = made.transpose(-3, -2) if first else made.permute(2, 0, 1, 3)
        result: Tensor = self.out_proj(made.flatten(-2))
        if not need_weights:
            return result, None
        return result, _recorded(attention_weights, q, q, k, mask, average_attn_weights)

    def _heads(self, x: Tensor, *, first: bool) -> Tensor:
        """``[N, L, E] -> [N, heads, L, E / heads]``; ``[L, N, E]`` where not batch first."""
        split: Tensor = x.unflatten(-1, (self.num_heads, self.head_dim))
        return split.transpose(-3, -2) if first else split.permute(1, 2, 0, 3)

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        weight, bias = (self._parameters[name] for name in ("in_proj_weight", "in_proj_bias"))
        if weight is not None and query is key and key is value:
            made = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return made[0], made[1], made[2]
        if weight is None:
            weights: list[Any] = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        else:
            weights = _thirds(weight)
        biases: list[Any] = [None] * 3 if bias is None else _thirds(bias)
        given = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(given, weights, biases, strict=True))


def _thirds(parameter: Tensor) -> list[Any]:
    """Constants for queries, keys and values of one parameter (a trace would record its chunk)."""
    return [part.detach().clone() for part in parameter.chunk(3)]


class SpeltEncoderLayer(nn.TransformerEncoderLayer):
    """``nn.TransformerEncoderLayer`` without its fast path."""

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As that of the base class."""
        masks = (src_mask, src_key_padding_mask)
        if self.norm_first:
            x = src + self._sa_block(self.norm1(src), *masks, is_causal=is_causal)
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + self._sa_block(src, *masks, is_causal=is_causal))
        made: Tensor = self.norm2(x + self._ff_block(x))
        return made


class SpeltDecoderLayer(nn.TransformerDecoderLayer):
    """``nn.TransformerDecoderLayer``, which is plain already, but a leaf to a trace."""


class SpeltEncoder(nn.TransformerEncoder):
    """``nn.TransformerEncoder`` without nested tensors."""

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As that of the base class; ``is_causal`` only says what ``mask`` is."""
        x = src
        for layer in self.layers:
            x = layer(x, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        made: Tensor = x if self.norm is None else self.norm(x)
        return made


class SpeltDecoder(nn.TransformerDecoder):
    """``nn.TransformerDecoder`` without looking at its masks."""

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As that of the base class; ``*_is_causal`` only say what the masks are."""
        x = tgt
        for layer in self.layers:
            x = layer(
                x,
                memory,
                tgt_mask=tgt_mask,
                memory_mask=memory_mask,
                tgt_key_padding_mask=tgt_key_padding_mask,
                memory_key_padding_mask=memory_key_padding_mask,
            )
        made: Tensor = x if self.norm is None else self.norm(x)
        return made


class SpeltTransformer(nn.Transformer):
    """``nn.Transformer`` without comparing the shapes of its inputs."""

    def forward(
        self,
        src: Tensor,
        tgt: Tensor,
        src_mask: Tensor | None = None,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        src_is_causal: bool | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        """As that of the base class; ``*_is_causal`` only say what the masks are."""
        memory = self.encoder(src, mask=src_mask, src_key_padding_mask=src_key_padding_mask)
        made: Tensor = self.decoder(
            tgt,
            memory,
            tgt_mask=tgt_mask,
            memory_mask=memory_mask,
            tgt_key_padding_mask=tgt_key_padding_mask,
            memory_key_padding_mask=memory_key_padding_mask,
        )
        return made


class _Windows(nn.Module):
    """Windowed attention of torchvision's Swin transformer: its linears work pixel by pixel."""

    def forward(self, x: Tensor) -> Tensor:
        """``[N, H, W, E]`` to the same."""
        own: Any = self
        bias = own.get_relative_position_bias()
        sizes = (list(own.window_size), list(own.shift_size), own.num_heads)
        made: Tensor = own.proj(
            _recorded(window_attention, x, own.qkv(x), own.qkv.bias, bias, *sizes)
        )
        return made


_WINDOWED: Final = "torchvision.models.swin_transformer.ShiftedWindowAttention"
_SPELT: Final[dict[type[nn.Module], type[nn.Module]]] = {
    nn.MultiheadAttention: SpeltAttention,
    nn.TransformerEncoderLayer: SpeltEncoderLayer,
    nn.TransformerDecoderLayer: SpeltDecoderLayer,
    nn.TransformerEncoder: SpeltEncoder,
    nn.TransformerDecoder: SpeltDecoder,
    nn.Transformer: SpeltTransformer,
}


def written_as(kind: type) -> type | None:
    """The class in the user's model of a module that is spelt out, ``None`` for all others."""
    if kind in _SPELT.values():
        return kind.__bases__[0]
    return kind.__bases__[1] if issubclass(kind, _Windows) else None
