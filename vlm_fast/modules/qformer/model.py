"""BLIP-2's Querying Transformer: a few learned queries read an image, with or without a text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from vlm_fast.modules.parameter_access.activation import activation_module
from vlm_fast.modules.parameter_access.module_tree import unwrapped, why_not_plain_tree
from vlm_fast.modules.qformer.encoder import (
    QFormerEncoder,
    QFormerLayer,
    refuse_unless_plainly_called,
    restated,
    run_layers,
)
from vlm_fast.modules.qformer.layer import KeysValues, LayerInputs
from vlm_fast.modules.qformer.shared_inputs import (
    OP,
    ImageKeyValues,
    boolean,
    causal_bias,
    check_image,
    drops,
    keys_and_values,
    self_attention_masks,
)
from vlm_fast.ops.argument_errors import not_a_tensor, wrong_value


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


# So that an exported program which returns one can be saved.
_pytree._register_namedtuple(QFormerOutput, serialized_type_name="vlm_fast.modules.QFormerOutput")


class QFormer(nn.Module):
    """Drop-in for transformers' ``Blip2QFormerModel``, with its ``state_dict`` keys.

    Queries attend to each other (and to a text behind them), then to the image, then pass a feed
    forward network of their own: arXiv 2301.12597, section 3.1. Keys and values of the image come
    from one GEMM for all layers.

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
        self.compute_dtype, self.restates = compute_dtype, False
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
            projections.scaling = (hidden_size // num_attention_heads) ** -0.5
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
            layers.append(QFormerLayer(**children))
        self.encoder: Any = QFormerEncoder(layers)

    @classmethod
    def of(cls, module: Any, *, compute_dtype: torch.dtype | None = None) -> QFormer:
        """A Q-Former that shares the children, and so the parameters, of ``module``.

        The forwards of ``module``, its encoder and its layers are restated, not called. Activation
        checkpointing that transformers switched on for a layer holds.

        Args:
            module: a transformers ``Blip2QFormerModel``, or anything with its children.

        Raises:
            ValueError: ``module`` has no ``layernorm``, ``dropout`` or ``encoder.layer``; hooks,
                sharding or a wrapper stand around the module, or by the call around its encoder or
                a layer, which would then be left out.
        """
        if isinstance(module, cls):
            return module
        for name in ("layernorm", "dropout", "encoder"):
            if not isinstance(getattr(module, name, None), nn.Module):
                raise ValueError(f"module is a {type(module).__name__} without {name!r}")
        refuse_unless_plainly_called(module)
        qformer = cls.__new__(cls)
        nn.Module.__init__(qformer)
        qformer.compute_dtype = compute_dtype
        qformer.layernorm, qformer.dropout = module.layernorm, module.dropout
        qformer.encoder, qformer.restates = module.encoder, True
        qformer.training = module.training  # that of the children is theirs
        return qformer

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
        n, images = self._check(query_embeds, query_length, attention_mask, encoder_hidden_states,
                                encoder_attention_mask, image_key_values, past)  # fmt: skip
        hidden = query_embeds.to(self.layernorm.weight.dtype)
        batch, tokens = hidden.shape[:2]
        shared = batch == images and batch > 1 and hidden.stride(0) == 0 and n == tokens
        if shared and attention_mask is None and past is None and not keep and not self._drops():
            hidden = hidden[:1]
        hidden = self.dropout(self.layernorm(hidden))
        image = encoder_hidden_states
        if image is not None and image.dtype != hidden.dtype:
            image = image.to(hidden.dtype)
        key_mask, bias = self_attention_masks(attention_mask, hidden)
        past_tokens = 0 if past is None else past[0][0].shape[2]
        if past_tokens and key_mask is not None:
            seen = key_mask.new_ones(key_mask.shape[0], past_tokens)
            key_mask = torch.cat((key_mask, seen), dim=1)
        if causal:
            bias = causal_bias(tokens, past_tokens, hidden) + (0 if bias is None else bias)
        inputs = LayerInputs(
            query_length=n, image_mask=boolean(encoder_attention_mask), key_mask=key_mask,
            bias=bias, keep=keep,
        )  # fmt: skip
        given = (image, image_key_values, past, inputs)
        with self._computing(hidden):
            if self.restates:
                refuse_unless_plainly_called(self.encoder)
                hidden, kept = run_layers(self.encoder, hidden, *given, restated)
            else:
                hidden, kept = self.encoder(hidden, *given)
        hidden = hidden.to(self.layernorm.weight.dtype)
        pooled = hidden[:, 0].clone()  # FSDP2 wants what a unit returns to be no view
        return QFormerOutput(hidden, pooled, kept if keep else None)

    def image_key_values(self, encoder_hidden_states: Tensor) -> ImageKeyValues:
        """Keys and values ``(batch, keys, encoder_hidden_size)`` give, for all layers, at once.

        For callers that read an image several times; a single forward finds out by itself whether
        it needs them.
        """
        x = encoder_hidden_states.to(self.layernorm.weight.dtype)
        plain = not any(why_not_plain_tree(unwrapped(layer)) for layer in self.encoder.layer)
        if any(hasattr(p, "device_mesh") for p in self.encoder.parameters()):
            raise ValueError(
                "vlm_fast.QFormer.image_key_values: encoder is sharded, expected whole parameters; "
                "give forward the encoder_hidden_states instead"
            )
        with self._computing(x):
            return ImageKeyValues(keys_and_values(self.encoder, x, plain))

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
        graphed: Any = torch.cuda.make_graphed_callables(run, sample)
        return graphed

    def _drops(self) -> bool:
        # What lies before the image is read is all that can be shared.
        first = self.encoder.layer[:1]
        return (self.dropout.training and self.dropout.p > 0) or drops(first)

    def _computing(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.compute_dtype)

    def _check(
        self, query: Tensor, query_length: int | None, mask: Tensor | None, image: Tensor | None,
        image_mask: Tensor | None, projected: ImageKeyValues | None, past: Any,
    ) -> tuple[int, int]:  # fmt: skip
        """How many tokens are queries, and how many images they read."""
        width = self.layernorm.weight.shape[0]
        if not isinstance(query, Tensor):
            raise not_a_tensor(OP, "query_embeds", query)
        if query.ndim != 3 or query.shape[2] != width:
            raise wrong_value(OP, "query_embeds", query, f"(batch, tokens, {width})")
        batch, tokens = query.shape[:2]
        n = tokens if query_length is None else query_length
        if not 0 <= n <= tokens:
            raise wrong_value(OP, "query_length", n, f"0 to {tokens}, the tokens of query_embeds")
        images = check_image(self.encoder, n, batch, image, image_mask, projected)
        if mask is not None and mask.shape[-1] != tokens:
            raise wrong_value(OP, "attention_mask", mask, f"({batch}, {tokens})")
        if past is not None and len(past) != len(self.encoder.layer):
            raise wrong_value(OP, "past", len(past), f"{len(self.encoder.layer)}, one per layer")
        first = self.encoder.layer[0]
        if n < tokens and not hasattr(first, "intermediate"):
            raise wrong_value(OP, "query_length", n, f"{tokens}: it was made without text input")
        return n, images


class _Names(nn.Module):
    """A module that only names its children, as the checkpoints do."""

    def __init__(self, **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
