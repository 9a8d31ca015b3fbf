"""BLIP-2's Querying Transformer: a few learned queries read an image, with or without a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlm_fast import ops
from vlm_fast.kernels._stacking import lay_side_by_side
from vlm_fast.modules.activation import activation_module
from vlm_fast.modules.plain_tree import why_not_plain_tree
from vlm_fast.modules.qformer_layer import (
    SEEDS,
    KeysValues,
    LayerInputs,
    dropout_of,
    parameters_of,
    qformer_layer,
)
from vlm_fast.ops.absorbed_cross_attention import absorbs
from vlm_fast.policy import fell_back
from vlm_fast.refusal import not_a_tensor, wrong_value

OP = "QFormer"


class QFormerOutput(NamedTuple):
    """What a Q-Former returns.

    Attributes:
        last_hidden_state: ``(batch, tokens, features)``, queries before text.
        pooler_output: ``(batch, features)``, the first token's.
        past: with ``keep=True``, keys and values of each layer's self-attention, else None.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    past: list[KeysValues] | None = None


@dataclass(frozen=True)
class ImageKeyValues:
    """Keys and values of an image for all cross-attention layers; see `QFormer`.

    Attributes:
        layers: one ``(batch, keys, 2 * features)`` per cross-attention layer, keys before values.
    """

    layers: Sequence[Tensor]

    def select(self, rows: Tensor) -> ImageKeyValues:
        """Those of the images with these indices, int64 ``(count,)``."""
        return ImageKeyValues([layer.index_select(0, rows) for layer in self.layers])


class QFormerEncoder(nn.Module):
    """The layers, under the names of the checkpoints; `QFormer` runs them."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class QFormer(nn.Module):
    """Drop-in for transformers' ``Blip2QFormerModel``, with its ``state_dict`` keys.

    Queries attend to each other (and to a text behind them), then to the image, then pass a feed
    forward network of their own: arXiv 2301.12597, section 3.1. Keys and values of the image come
    from one GEMM for all layers, or are absorbed into the queries where that is less work.

    Args:
        hidden_size: features of a token; num_hidden_layers, num_attention_heads,
            intermediate_size: as in BERT.
        encoder_hidden_size: features of an image token.
        cross_attention_frequency: every how many layers, from the first, the image is read.
        hidden_act: "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu".
        hidden_dropout_prob, attention_probs_dropout_prob: in training.
        layer_norm_eps: of every LayerNorm.
        use_qformer_text_input: whether text tokens have their feed forward networks.
        compute_dtype: run in this dtype whatever that of the parameters, with fp32 statistics and
            accumulation; the result comes back in the parameters' dtype.

    Raises:
        ValueError: sizes that do not divide, an unknown activation.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        encoder_hidden_size: int = 1408,
        cross_attention_frequency: int = 2,
        hidden_act: str = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        layer_norm_eps: float = 1e-12,
        use_qformer_text_input: bool = False,
        *,
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if hidden_size % num_attention_heads:
            raise ValueError(
                f"num_attention_heads is {num_attention_heads}, expected a divisor of hidden_size "
                f"({hidden_size})"
            )
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.compute_dtype = compute_dtype
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, **factory)
        self.dropout = nn.Dropout(hidden_dropout_prob)

        def output(inputs: int) -> nn.Module:
            return _Names(
                dense=nn.Linear(inputs, hidden_size, **factory),
                LayerNorm=nn.LayerNorm(hidden_size, eps=layer_norm_eps, **factory),
                dropout=nn.Dropout(hidden_dropout_prob),
            )

        def intermediate() -> nn.Module:
            return _Names(
                dense=nn.Linear(hidden_size, intermediate_size, **factory),
                intermediate_act_fn=activation_module(hidden_act),
            )

        def attention(keys_from: int) -> nn.Module:
            projections = _Names(
                query=nn.Linear(hidden_size, hidden_size, **factory),
                key=nn.Linear(keys_from, hidden_size, **factory),
                value=nn.Linear(keys_from, hidden_size, **factory),
            )
            projections.num_attention_heads = num_attention_heads  # type: ignore[assignment]
            projections.scaling = (hidden_size // num_attention_heads) ** -0.5  # type: ignore
            projections.attention_dropout = attention_probs_dropout_prob  # type: ignore
            return _Names(attention=projections, output=output(hidden_size))

        layers = []
        for i in range(num_hidden_layers):
            children = dict(attention=attention(hidden_size))
            if i % cross_attention_frequency == 0:
                children["crossattention"] = attention(encoder_hidden_size)
            if use_qformer_text_input:
                children |= dict(intermediate=intermediate(), output=output(intermediate_size))
            children |= dict(
                intermediate_query=intermediate(), output_query=output(intermediate_size)
            )
            layers.append(_Names(**children))
        self.encoder: Any = QFormerEncoder(layers)
        pack(self.encoder)

    @classmethod
    def of(cls, module: Any, *, compute_dtype: torch.dtype | None = None) -> QFormer:
        """A Q-Former that shares the children, and so the parameters, of ``module``.

        Args:
            module: a transformers ``Blip2QFormerModel``, or anything with its children.

        Raises:
            ValueError: ``module`` has no ``layernorm``, ``dropout`` or ``encoder.layer``.
        """
        if isinstance(module, cls):
            return module
        for name in ("layernorm", "dropout", "encoder"):
            if not isinstance(getattr(module, name, None), nn.Module):
                raise ValueError(f"module is a {type(module).__name__} without {name!r}")
        qformer = cls.__new__(cls)
        nn.Module.__init__(qformer)
        qformer.compute_dtype = compute_dtype
        qformer.layernorm, qformer.dropout = module.layernorm, module.dropout
        qformer.encoder = module.encoder
        qformer.train(module.training)
        pack(qformer.encoder)
        return qformer

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        pack(self.encoder)  # .to() and .cuda() make every parameter anew
        return self

    def forward(
        self,
        query_embeds: Tensor,
        query_length: int | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        *,
        image_key_values: ImageKeyValues | None = None,
        past: Sequence[KeysValues] | None = None,
        keep: bool = False,
        causal: bool = False,
    ) -> QFormerOutput:
        """Run all layers.

        Args:
            query_embeds: ``(batch, tokens, hidden_size)``: queries, then text. Queries of a batch
                of one (or of stride 0 over the batch) are read by every image, and what does not
                depend on the image is computed once.
            query_length: how many of the tokens are queries, by default all.
            attention_mask: ``(batch, tokens)``, true or 1 where a token is seen; or additive or
                boolean ``(batch, 1, tokens, tokens)``.
            encoder_hidden_states: image features ``(images, keys, encoder_hidden_size)``. The
                batch may be a multiple of ``images``, if the sequences of an image are neighbours.
            encoder_attention_mask: ``(images, keys)``, true or 1 where a feature is seen.
            image_key_values: from `image_key_values`, to share them between passes.
            past: keys and values that every token sees besides those here, from ``keep=True``.
            keep: return keys and values of the self-attentions.
            causal: a token sees none that come after it (but all of ``past``).

        Raises:
            TypeError: an argument is no tensor.
            ValueError: shapes do not fit; image features missing for cross-attention layers.
        """
        n = self._check(query_embeds, query_length, attention_mask, encoder_hidden_states,
                        encoder_attention_mask, image_key_values, past)  # fmt: skip
        hidden = query_embeds.to(self.layernorm.weight.dtype)
        shared = hidden.shape[0] > 1 and hidden.stride(0) == 0 and n == hidden.shape[1]
        if shared and attention_mask is None and past is None and not keep and not self._drops():
            hidden = hidden[:1]
        hidden = self.dropout(self.layernorm(hidden))
        _batch, tokens = hidden.shape[:2]
        image = encoder_hidden_states
        if image is not None and image.dtype != hidden.dtype:
            image = image.to(hidden.dtype)
        key_mask, bias = self_attention_masks(attention_mask, hidden)
        past_tokens = 0 if past is None else past[0][0].shape[2]
        if past_tokens and key_mask is not None:
            seen = key_mask.new_ones(key_mask.shape[0], past_tokens)
            key_mask = torch.cat((key_mask, seen), dim=1)
        if causal:
            bias = _causal(tokens, past_tokens, hidden) + (0 if bias is None else bias)
        inputs = LayerInputs(
            query_length=n, image_mask=_boolean(encoder_attention_mask), key_mask=key_mask,
            bias=bias, keep=keep,
        )  # fmt: skip
        kept: list[KeysValues] = []
        with self._computing(hidden):
            images = images_of_layers(self.encoder, hidden, image, image_key_values, n)
            seeds = dropout_seeds(self.encoder.layer, hidden)
            for i, layer in enumerate(self.encoder.layer):
                reason = why_not_plain_tree(layer)
                if reason is not None:
                    fell_back(OP, f"layer {i} calls its children: {reason}")
                inputs.plain = reason is None
                inputs.image, inputs.projected = images[i]
                inputs.past = None if past is None else past[i]
                inputs.seeds = None if seeds is None else seeds[i]
                inputs.kept = kept
                hidden = qformer_layer(layer, hidden, inputs)
        hidden = hidden.to(self.layernorm.weight.dtype)
        return QFormerOutput(hidden, hidden[:, 0], kept if keep else None)

    def image_key_values(self, encoder_hidden_states: Tensor) -> ImageKeyValues:
        """Keys and values ``(batch, keys, encoder_hidden_size)`` give, for all layers, at once.

        For callers that read an image several times; a single forward finds out by itself whether
        it needs them.
        """
        x = encoder_hidden_states.to(self.layernorm.weight.dtype)
        with self._computing(x):
            return ImageKeyValues(_project(self.encoder, x))

    def capture_graph(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Callable[..., Tensor]:
        """A function of these arguments that replays one CUDA graph: for serving.

        Through ``torch.cuda.make_graphed_callables``; later arguments must have the shapes, dtypes
        and devices given here, and the result, ``last_hidden_state``, is overwritten by the next
        call. No gradients.

        Raises:
            RuntimeError: not on a GPU, or in training mode.
        """
        if not query_embeds.is_cuda:
            raise RuntimeError("QFormer.capture_graph: query_embeds is not on a CUDA device")
        if self.training:
            raise RuntimeError("QFormer.capture_graph: in training mode; call eval() first")

        def run(query: Tensor, image: Tensor, *mask: Tensor) -> Tensor:
            with torch.no_grad():
                return self(query, None, None, image, *mask).last_hidden_state

        mask = () if encoder_attention_mask is None else (encoder_attention_mask,)
        sample = tuple(t.detach() for t in (query_embeds, encoder_hidden_states, *mask))
        return torch.cuda.make_graphed_callables(run, sample)  # type: ignore[no-any-return]

    def _drops(self) -> bool:
        return self.training and (self.dropout.p > 0 or dropout_of(self.encoder.layer[0]) > 0)

    def _computing(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.compute_dtype)

    def _check(
        self, query: Tensor, query_length: int | None, mask: Tensor | None, image: Tensor | None,
        image_mask: Tensor | None, projected: ImageKeyValues | None, past: Any,
    ) -> int:  # fmt: skip
        width = self.layernorm.weight.shape[0]
        if not isinstance(query, Tensor):
            raise not_a_tensor(OP, "query_embeds", query)
        if query.ndim != 3 or query.shape[2] != width:
            raise wrong_value(OP, "query_embeds", query, f"(batch, tokens, {width})")
        batch, tokens = query.shape[:2]
        n = tokens if query_length is None else query_length
        if not 0 <= n <= tokens:
            raise wrong_value(OP, "query_length", n, f"0 to {tokens}, the tokens of query_embeds")
        check_image(self.encoder, n, batch, image, image_mask, projected)
        if mask is not None and mask.shape[-1] != tokens:
            raise wrong_value(OP, "attention_mask", mask, f"({batch}, {tokens})")
        if past is not None and len(past) != len(self.encoder.layer):
            raise wrong_value(OP, "past", len(past), f"{len(self.encoder.layer)}, one per layer")
        first = self.encoder.layer[0]
        if n < tokens and not hasattr(first, "intermediate"):
            raise wrong_value(OP, "query_length", n, f"{tokens}: it was made without text input")
        return n


class _Names(nn.Module):
    """A module that only names its children, as the checkpoints do."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)


def check_image(
    encoder: Any, queries: int, batch: int, image: Tensor | None, image_mask: Tensor | None,
    projected: ImageKeyValues | None,
) -> None:  # fmt: skip
    """Raise ValueError or TypeError unless the image fits the cross-attention layers."""
    crossing = [m for m in map(_crossattention, encoder.layer) if m is not None]
    if not crossing or queries == 0:
        return
    if image is None and projected is None:
        raise ValueError(
            f"vlm_fast.{OP}: encoder_hidden_states is None, expected image features for "
            f"{len(crossing)} cross-attention layers"
        )
    if projected is not None:
        if len(projected.layers) != len(crossing):
            got, wanted = len(projected.layers), f"{len(crossing)}, one per cross-attention layer"
            raise wrong_value(OP, "image_key_values.layers", got, wanted)
        image = projected.layers[0]
    else:
        if not isinstance(image, Tensor):
            raise not_a_tensor(OP, "encoder_hidden_states", image)
        width = getattr(crossing[0].attention.key, "in_features", image.shape[-1])
        if image.ndim != 3 or image.shape[2] != width:
            raise wrong_value(OP, "encoder_hidden_states", image, f"(images, keys, {width})")
    images, keys = image.shape[:2]
    if (images == 0 or (batch % images and batch != 1)) and (batch or images):
        wanted = f"as many images as sequences ({batch}), or a divisor of that"
        raise wrong_value(OP, "encoder_hidden_states", image, wanted)
    if image_mask is not None and image_mask.shape != (images, keys):
        raise wrong_value(OP, "encoder_attention_mask", image_mask, f"({images}, {keys})")


def images_of_layers(
    encoder: Any, hidden: Tensor, image: Tensor | None, projected: ImageKeyValues | None,
    queries: int,
) -> list[tuple[Tensor | None, bool]]:  # fmt: skip
    """What each layer reads of the image, and whether that is keys and values already."""
    if image is None and projected is None:
        return [(None, False)] * len(encoder.layer)
    if projected is None and image is not None:
        crossing = next(filter(None, map(_crossattention, encoder.layer)), None)
        plain = all(why_not_plain_tree(layer) is None for layer in encoder.layer)
        if crossing is None or not plain:
            return [(image, False)] * len(encoder.layer)
        heads, features = crossing.attention.num_attention_heads, hidden.shape[2]
        images, keys, width = image.shape
        of_an_image = queries * max(hidden.shape[0] // max(images, 1), 1)
        if absorbs(of_an_image, keys, width, features // heads, images, on_gpu=image.is_cuda):
            return [(image, False)] * len(encoder.layer)
    layers = iter(_project(encoder, image) if projected is None else projected.layers)
    return [
        (None, False) if _crossattention(layer) is None else (next(layers), True)
        for layer in encoder.layer
    ]


def _project(encoder: Any, image: Any) -> Sequence[Tensor]:
    """Keys and values of all cross-attention layers in one GEMM."""
    crossing = [m for m in map(_crossattention, encoder.layer) if m is not None]
    linears = [child for m in crossing for child in (m.attention.key, m.attention.value)]
    if any(why_not_plain_tree(layer) is not None for layer in encoder.layer):
        return [torch.cat((k(image), v(image)), dim=-1)
                for k, v in zip(linears[::2], linears[1::2], strict=True)]  # fmt: skip
    return ops.stacked_linear(image, parameters_of(linears)).chunk(len(crossing), dim=-1)


def _crossattention(layer: Any) -> Any:
    return getattr(layer, "crossattention", None)


def dropout_seeds(layers: Sequence[Any], hidden: Tensor) -> Tensor | None:
    """One int64 for each dropout of each layer, drawn on the device; None if none is active."""
    if not any(dropout_of(layer) > 0 for layer in layers):
        return None
    shape = (len(layers), SEEDS)
    return torch.randint(2**62, shape, dtype=torch.int64, device=hidden.device)


def self_attention_masks(
    mask: Tensor | None, hidden: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """A mask as the ops take it: seen keys, or an additive bias."""
    if mask is None:
        return None, None
    if mask.ndim == 2:
        return _boolean(mask), None
    if mask.ndim == 3:
        mask = mask[:, None]
    if mask.ndim != 4:
        raise wrong_value(OP, "attention_mask", mask, "two to four dimensions")
    if mask.is_floating_point():
        return None, mask
    mask = _boolean(mask)
    if mask.shape[1] == mask.shape[2] == 1:
        return mask[:, 0, 0], None
    return None, torch.zeros_like(mask, dtype=hidden.dtype).masked_fill_(~mask, -torch.inf)


def _boolean(mask: Any) -> Any:
    return mask if mask is None or mask.dtype == torch.bool else mask != 0


def _causal(tokens: int, past_tokens: int, hidden: Tensor) -> Tensor:
    """``(1, 1, tokens, tokens + past)``: own tokens come first among the keys."""
    bias = hidden.new_full((tokens, tokens), -torch.inf).triu_(1)
    return torch.nn.functional.pad(bias, (0, past_tokens))[None, None]


def pack(encoder: Any) -> None:
    """Lay weights that one GEMM reads side by side; values, names and objects stay."""
    crossing: list[nn.Module] = []
    for layer in encoder.layer:
        attention = layer.attention.attention
        _pack([attention.query, attention.key, attention.value])
        if _crossattention(layer) is not None:
            attention = layer.crossattention.attention
            crossing += [attention.key, attention.value]
    _pack(crossing)


def _pack(linears: Sequence[Any]) -> None:
    if linears and all(type(linear) is nn.Linear and linear.bias is not None for linear in linears):
        lay_side_by_side([linear.weight for linear in linears])
        lay_side_by_side([linear.bias for linear in linears])
