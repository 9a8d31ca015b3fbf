"""`QFormer`: BLIP-2's Querying Transformer, in which learned queries attend to an image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from vlm_fast.modules.parameter_access.module_calls import unwrap_checkpoint
from vlm_fast.modules.parameter_access.module_tree import why_not_direct_tree
from vlm_fast.modules.qformer.arguments import check_arguments
from vlm_fast.modules.qformer.build import build_layers
from vlm_fast.modules.qformer.encoder import (
    QFormerEncoder,
    mirrored_forward,
    raise_if_call_does_more,
    run_layers,
)
from vlm_fast.modules.qformer.layer_inputs import KeysValues, LayerInputs
from vlm_fast.modules.qformer.shared_inputs import (
    ImageKeyValues,
    as_bool_mask,
    causal_bias,
    has_active_dropout,
    image_readers,
    self_attention_masks,
)


class QFormerOutput(NamedTuple):
    """The result of `QFormer.forward`.

    Attributes:
        last_hidden_state: ``(batch, tokens, features)``, queries before text.
        pooler_output: ``(batch, features)``, the first token.
        past: with ``keep=True`` the keys and values ``(batch, heads, tokens, d)`` of each layer's
            self-attention; otherwise None.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor
    past: list[KeysValues] | None = None


# Needed to save an exported program that returns one.
_pytree._register_namedtuple(QFormerOutput, serialized_type_name="vlm_fast.modules.QFormerOutput")


class QFormer(nn.Module):
    """Drop-in for transformers' ``Blip2QFormerModel``, with its ``state_dict`` keys.

    Queries attend to each other (and to a text after them), then to the image, and then pass a
    feed-forward network of their own: BLIP-2, arXiv 2301.12597, section 3.1. Keys and values of the
    image come from one GEMM for all layers.

    Args:
        hidden_size: width of a token.
        num_hidden_layers, num_attention_heads, intermediate_size: as in BERT.
        encoder_hidden_size: width of an image feature.
        cross_attention_frequency: one in so many layers attends to the image, from the first on.
        hidden_act: "gelu" (exact), "gelu_tanh", "quick_gelu", "silu" or "relu".
        hidden_dropout_prob, attention_probs_dropout_prob: in training.
        layer_norm_eps: of every LayerNorm.
        use_qformer_text_input: whether layers have a feed-forward network for text tokens.
        compute_dtype: compute in this dtype, whatever that of the parameters, with float32
            statistics and accumulation; the result has the parameters' dtype.

    Raises:
        ValueError: ``num_attention_heads`` does not divide ``hidden_size``, or ``hidden_act`` is
            unknown.
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
        self.compute_dtype, self.wraps_other_encoder = compute_dtype, False
        self.layernorm = nn.LayerNorm(hidden_size, eps=layer_norm_eps, **factory)
        self.dropout = nn.Dropout(hidden_dropout_prob)
        layers = build_layers(
            hidden_size, num_hidden_layers, num_attention_heads, intermediate_size,
            encoder_hidden_size, cross_attention_frequency, hidden_act, hidden_dropout_prob,
            attention_probs_dropout_prob, layer_norm_eps, use_qformer_text_input, factory,
        )  # fmt: skip
        self.encoder: Any = QFormerEncoder(layers)

    @classmethod
    def from_module(cls, module: Any, *, compute_dtype: torch.dtype | None = None) -> QFormer:
        """A Q-Former that shares the children of ``module``, and so their parameters.

        The forwards of ``module``, its encoder and its layers are not called any more. Activation
        checkpointing that transformers has enabled for a layer stays.

        Args:
            module: a transformers ``Blip2QFormerModel``, or anything with its children.

        Raises:
            ValueError: ``module`` has no ``layernorm``, ``dropout`` or ``encoder``; or it has
                hooks, sharding or a wrapper, which would be skipped. If the encoder or a layer has
                them, the call of the Q-Former raises.
        """
        if isinstance(module, cls):
            return module
        for name in ("layernorm", "dropout", "encoder"):
            if not isinstance(getattr(module, name, None), nn.Module):
                raise ValueError(f"module is a {type(module).__name__} without {name!r}")
        raise_if_call_does_more(module)
        qformer = cls.__new__(cls)
        nn.Module.__init__(qformer)
        qformer.compute_dtype = compute_dtype
        qformer.layernorm, qformer.dropout = module.layernorm, module.dropout
        qformer.encoder, qformer.wraps_other_encoder = module.encoder, True
        qformer.training = module.training  # children keep their own mode
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
        """Run all layers; the result is cast to the dtype of the parameters.

        Args:
            query_embeds: ``(batch, tokens, hidden_size)``, queries before text. Queries with a
                batch of one (or with stride 0 over the batch) are shared by all images, and what
                does not depend on the image is computed once.
            query_length: the number of queries; all tokens by default.
            attention_mask: ``(batch, tokens)``, true or 1 where a token is seen; or additive or
                boolean ``(batch, 1, tokens, tokens)``.
            encoder_hidden_states: image features ``(images, keys, encoder_hidden_size)``. The
                batch may be a multiple of ``images``; the sequences of an image are consecutive.
            encoder_attention_mask: ``(images, keys)``, true or 1 where a feature is seen.
            image_key_values: the result of `image_key_values`, to use it in several calls.
            past: the ``past`` of an earlier result; every token attends to it too.
            keep: return the keys and values of the self-attentions.
            causal: a token attends only to itself, to earlier tokens and to ``past``.

        Raises:
            TypeError: an argument is not a tensor.
            ValueError: shapes do not fit, or image features for cross-attention are missing.
        """
        n, images = check_arguments(
            self, query_embeds, query_length, attention_mask, encoder_hidden_states,
            encoder_attention_mask, image_key_values, past,
        )  # fmt: skip
        hidden = query_embeds.to(self.layernorm.weight.dtype)
        batch, tokens = hidden.shape[:2]
        shared = batch == images and batch > 1 and hidden.stride(0) == 0 and n == tokens
        if (
            shared
            and attention_mask is None
            and past is None
            and not keep
            and not self._drops_before_image()
        ):
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
            query_length=n, image_mask=as_bool_mask(encoder_attention_mask), key_mask=key_mask,
            bias=bias, keep=keep,
        )  # fmt: skip
        given = (image, image_key_values, past, inputs)
        with self._autocast(hidden):
            if self.wraps_other_encoder:
                raise_if_call_does_more(self.encoder)
                hidden, kept = run_layers(self.encoder, hidden, *given, mirrored_forward)
            else:
                hidden, kept = self.encoder(hidden, *given)
        hidden = hidden.to(self.layernorm.weight.dtype)
        pooled = hidden[:, 0].clone()  # a unit of FSDP2 must not return a view
        return QFormerOutput(hidden, pooled, kept if keep else None)

    def image_key_values(self, encoder_hidden_states: Tensor) -> ImageKeyValues:
        """Project image features ``(images, keys, encoder_hidden_size)`` for all layers at once.

        For callers that use an image in several calls of `forward`.

        Raises:
            ValueError: the encoder is sharded.
        """
        x = encoder_hidden_states.to(self.layernorm.weight.dtype)
        plain = not any(
            why_not_direct_tree(unwrap_checkpoint(layer)) for layer in self.encoder.layer
        )
        if any(hasattr(p, "device_mesh") for p in self.encoder.parameters()):
            raise ValueError(
                "vlm_fast.QFormer.image_key_values: encoder is sharded, expected whole parameters; "
                "give forward the encoder_hidden_states instead"
            )
        with self._autocast(x):
            return ImageKeyValues(image_readers(self.encoder.layer).project(x, plain))

    def capture_graph(
        self,
        query_embeds: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
    ) -> Callable[..., Tensor]:
        """Capture a CUDA graph for serving; returns a function of these arguments that replays it.

        It uses ``torch.cuda.make_graphed_callables``. Later arguments must have the shapes, dtypes
        and devices of those given here. The function returns ``last_hidden_state``, which the next
        call overwrites, without gradients.

        Raises:
            RuntimeError: ``query_embeds`` is not on a GPU, or the module is in training mode.
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

    def _drops_before_image(self) -> bool:
        """Whether a dropout is active before the first cross-attention."""
        first = self.encoder.layer[:1]
        return (self.dropout.training and self.dropout.p > 0) or has_active_dropout(first)

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        if self.compute_dtype is None:
            return nullcontext()
        return torch.autocast(x.device.type, dtype=self.compute_dtype)
