"""Latent attention that keeps latents and a packed output for the backward, not queries, keys and values.

The attention itself, whichever implementation, stays untouched: what it saves is recognised by its memory, and in its
place goes a note how to compute it again (queries, keys, values: up-projections of the latents) or to unpack it (the
output, which `o_proj` keeps anyway). DeepSeek-V3 report, sections 3.2.3 and 3.3.3.

B batch, T tokens, H heads, D hidden, V v_head_dim.
"""

from collections.abc import Callable
from typing import Any

import torch

from ...kernels import joined_rms_norm, pack_e5m6
from ...modeling_deepseek_v3.attention import DeepseekV3Attention
from ...modeling_deepseek_v3.decoder import DeepseekV3DecoderLayer, DeepseekV3MTPLayer
from .linear import FP8TrainingLinear, Packed, is_hooked
from .norm import FP8TrainingRMSNorm
from .state import FP8Module

Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Again:
    """Tensors to be computed again in the backward: once for all that ask, and let go when each has had its own."""

    def __init__(self, compute: Callable[[], Heads], like: Heads) -> None:
        self._compute, self._kind = compute, like[0].device.type
        self._dtype, self._cast = torch.get_autocast_dtype(self._kind), torch.is_autocast_enabled(self._kind)
        self._made: dict[int, torch.Tensor] = {}

    def take(self, place: int) -> torch.Tensor:
        """The tensor at `place`."""
        if place not in self._made:
            with torch.no_grad(), torch.autocast(self._kind, self._dtype, self._cast):
                self._made = dict(enumerate(self._compute()))
        return self._made.pop(place)


class Kept:
    """A tensor that was saved as it is, until it turns out to be the output that is kept packed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor: torch.Tensor | None = tensor
        self.shape, self.stride = tensor.shape, tensor.stride()
        self.packed: Packed | None = None
        self.same_memory = True

    def replace(self, packed: Packed, same_memory: bool) -> None:
        """Keep `packed` instead: rows [B * T, H * V] that lie as the tensor does, or whose heads it has in front."""
        self.tensor, self.packed, self.same_memory = None, packed, same_memory

    def get(self) -> torch.Tensor:
        """The tensor, unpacked if it was replaced."""
        if self.tensor is not None:
            return self.tensor
        assert self.packed is not None
        values = self.packed.values()
        if self.same_memory:
            return values.as_strided(self.shape, self.stride)
        batch, heads, tokens, width = self.shape
        ordered = values.view(batch, tokens, heads, width).transpose(1, 2)
        return torch.empty_strided(self.shape, self.stride, dtype=values.dtype, device=values.device).copy_(ordered)


def saved_output(output: torch.Tensor) -> torch.Tensor | None:
    """The output that a fused attention saved for its backward, where `output` comes from one by moves alone."""
    node: Any = output.grad_fn
    for _ in range(6):
        if node is None or node.name().startswith("ScaledDotProduct"):
            break
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return None if node is None else getattr(node, "_saved_output", getattr(node, "_saved_out", None))


class Notes:
    """Saved-tensor hooks for one call of the attention."""

    def __init__(self, heads: Heads, again: Again | None) -> None:
        self._heads, self._again = heads if again else (), again
        self._kept: list[Kept] = []

    def pack(self, tensor: torch.Tensor) -> Any:
        """What is saved instead of `tensor`."""
        for place, known in enumerate(self._heads):
            if tensor.data_ptr() == known.data_ptr() and tensor.shape == known.shape:
                if tensor.stride() == known.stride() and tensor.dtype == known.dtype:
                    return self._again, place
        self._kept.append(Kept(tensor))
        return self._kept[-1]

    @staticmethod
    def unpack(note: Any) -> torch.Tensor:
        """The tensor that a note stands for."""
        return note.get() if isinstance(note, Kept) else note[0].take(note[1])

    def close(self, output: torch.Tensor) -> Kept | None:
        """The call is over; what it saved of its output [.., H * V], if it did."""
        saved = saved_output(output)
        own = (kept for kept in self._kept if saved is not None and kept.get().data_ptr() == saved.data_ptr())
        found = next(own, None)
        self._heads, self._kept = (), []
        return found


class FP8TrainingAttention(FP8Module, DeepseekV3Attention):
    """Latent attention whose layer keeps less; its linears are in FP8 by themselves."""

    # Set by the layer: its checkpoint computes everything again, there is nothing to save here.
    whole_layer_again = False

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: Any = None,
        past_key_values: Any = None,
        mla_form: str = "expanded",
        mla_spans: Any = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `DeepseekV3Attention.forward`."""
        usual = past_key_values is not None or mla_form != "expanded" or self.whole_layer_again
        if usual or not self.in_fp8(hidden_states) or not torch.is_grad_enabled():
            return super().forward(
                hidden_states, position_embeddings, attention_mask, past_key_values, mla_form, mla_spans, **kwargs
            )
        low = self.q_a_proj(hidden_states) if self._low_rank_query else hidden_states
        compressed = self.kv_a_proj_with_mqa(hidden_states)
        heads = self._up(low, compressed, position_embeddings)
        notes = Notes(heads, self._again(low, compressed, position_embeddings, heads))
        with torch.autograd.graph.saved_tensors_hooks(notes.pack, notes.unpack):
            output, shown = self._attend(*heads, attention_mask, **kwargs)
        flat = output.reshape(*hidden_states.shape[:-1], -1)
        packed = self._packed(flat, notes.close(flat))
        return self.o_proj(flat) if packed is None else self.o_proj.with_packed(flat, packed), shown

    def _up(self, low: torch.Tensor, compressed: torch.Tensor, angles: Any) -> Heads:
        """Queries, keys and values from the low-rank query (or, without one, the hidden states) and the latents."""
        latents = self._latents(compressed, angles)
        return self._heads(self._up_query(low), latents, angles, self.kv_b_proj(latents[0][:, 0]))

    def _again(self, low: torch.Tensor, compressed: torch.Tensor, angles: Any, heads: Heads) -> Again | None:
        # Without a low rank the query's input is not kept, and no latent either.
        if not self.fp8.recipe.recompute_up_projections or not self._low_rank_query:
            return None
        low, compressed = low.detach(), compressed.detach()

        def compute() -> Heads:
            mode = self.training
            self.train()
            try:
                return self._up(low, compressed, angles)
            finally:
                self.train(mode)

        return Again(compute, heads)

    def _packed(self, flat: torch.Tensor, kept: Kept | None) -> Packed | None:
        """The packed input of `o_proj`, put in place of what the attention keeps of it too."""
        if self.fp8.recipe.attention_output != "e5m6" or type(self.o_proj) is not FP8TrainingLinear:
            return None
        # An attention that keeps no output has nothing to share: codes are smaller.
        if kept is None or is_hooked(self.o_proj) or not self.o_proj.weight.requires_grad:
            return None
        rows = flat.detach().reshape(-1, flat.shape[-1])
        packed = Packed(*pack_e5m6(rows), rows.shape[1], rows.dtype)
        kept.replace(packed, kept.get().data_ptr() == flat.data_ptr())
        return packed


class _Layer(FP8Module):
    """A layer that tells its attention whether gradient checkpointing computes it again, and whose norms take the
    residual stream and its gradient with them."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As of the layer that it was."""
        self.self_attn.whole_layer_again = self.gradient_checkpointing  # type: ignore[assignment,union-attr]
        return super().forward(*args, **kwargs)

    def _normed(self, norm: Any, x: torch.Tensor, residual: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
        if self.training and type(norm) is FP8TrainingRMSNorm and not is_hooked(norm):
            return joined_rms_norm(x, residual, norm.weight, norm.variance_epsilon)
        return super()._normed(norm, x, residual)  # type: ignore[misc,no-any-return]


class FP8TrainingDecoderLayer(_Layer, DeepseekV3DecoderLayer):
    """A decoder layer in FP8 training."""


class FP8TrainingMTPLayer(_Layer, DeepseekV3MTPLayer):
    """An MTP module in FP8 training."""
