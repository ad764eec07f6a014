"""Multi-Token Prediction over a whole sequence: hidden states, logits and loss of every depth.

Depth k joins, in row i, the previous depth's state at token i with the embedding of token i + k, and predicts token
i + k + 1 (report, section 2.2). A row whose tokens cross a document's border counts nothing.

Letters: B batch, T tokens, D hidden, k depth from 1.
"""

from typing import Any

import torch

from .attention import Spans, step_spans
from .decoder import DeepseekV3MTPLayer
from .losses import IGNORE_INDEX, head_cross_entropy_sum, shifted
from .model import DeepseekV3Model


def mtp_hidden_states(
    model: DeepseekV3Model,
    hidden_states: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    **kwargs: Any,
) -> list[torch.Tensor]:
    """What the shared head reads at each depth.

    Args:
        model: the base model, whose MTP modules are run.
        hidden_states: [B, T, D], the main model's state that enters depth 1.
        inputs_embeds: [B, T, D], the tokens' embeddings.
        attention_mask: [B, T] with 0 for padding, or None.
        token_mask: [B, T], True for what is no padding; None where `attention_mask` tells it.
        position_ids: [B, T] or [1, T], or None for 0 .. T - 1.

    Returns:
        One [B, T - k, D] for each depth k, after `shared_head.norm`; fewer where the sequence is too short.
    """
    batch, length = inputs_embeds.shape[:2]
    documents = None
    if position_ids is not None and model.training:
        documents = _documents(position_ids).expand(batch, -1)
    if token_mask is None and attention_mask is not None and attention_mask.dim() == 2:
        token_mask = attention_mask.bool()
    counted = position_ids is None
    if position_ids is None:
        position_ids = torch.arange(length, device=inputs_embeds.device).unsqueeze(0)
    states = []
    for depth, layer in enumerate(model.mtp_layers, start=1):
        rows = length - depth
        if rows < 1:
            break
        residual, normed = run_depth(
            model,
            layer,
            hidden_states[:, :rows],
            inputs_embeds[:, depth:],
            _first(attention_mask, rows),
            position_ids[:, :rows],
            counted=position_ids[:, :rows] if counted else None,
            token_mask=_joined(token_mask, documents, depth),
            **kwargs,
        )
        states.append(normed)
        hidden_states = residual if model.config.mtp_hidden_state == "pre_norm" else normed
    return states


def run_depth(
    model: DeepseekV3Model,
    layer: DeepseekV3MTPLayer,
    previous: torch.Tensor,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One MTP module over [B, T, D] states and embeddings: the residual stream before and after `shared_head.norm`.
    `counted` among `kwargs`: as of `LatentCache.extension`."""
    step = kwargs.pop("mla_spans", None)
    if step is not None:
        residual = _depth_step(model, layer, (previous, inputs_embeds, position_ids), kwargs["past_key_values"], step)
        return residual, layer.shared_head.norm(residual)
    past_key_values, layer_idx = kwargs.get("past_key_values"), layer.self_attn.layer_idx
    given = (previous, attention_mask, position_ids, past_key_values, layer_idx)
    form, counted = kwargs.pop("mla_form", None), kwargs.pop("counted", None)
    form, mask, spans = model.mask(*given, form=form, counted=counted)
    residual, normed, load = layer(
        previous,
        inputs_embeds,
        normed=True,
        position_embeddings=model.rotary_emb(previous, position_ids),
        attention_mask=mask,
        mla_form=form,
        mla_spans=spans,
        router_statistics=model.training,
        **kwargs,
    )
    if model.training:
        layer.mlp.router.count(load)
    return residual, normed


def _depth_step(
    model: DeepseekV3Model, layer: DeepseekV3MTPLayer, rows: tuple[torch.Tensor, ...], cache: Any, spans: Spans
) -> torch.Tensor:
    """One MTP module in a decode step, replayed from a graph; `rows` are states, embeddings and positions."""
    given, extension, index = spans, spans.extension, layer.self_attn.layer_idx
    assert extension is not None

    def run(
        previous: torch.Tensor,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor | None,
    ) -> torch.Tensor:
        spans = step_spans(slots, starts, given)
        kwargs = {"position_embeddings": model.rotary_emb(previous, positions), "past_key_values": cache}
        return layer(previous, embeds, mla_form="absorbed", mla_spans=spans, **kwargs)

    where = (extension.slots, spans.starts)
    return cache.graphs.run(index, [cache.layers[index]], extension.extent, run, (*rows, *where))


def mtp_loss(
    states: list[torch.Tensor],
    head: Any,
    labels: torch.Tensor,
    position_ids: torch.Tensor | None,
    depths: int,
    tokens: torch.Tensor | int,
    vocabulary: int,
) -> torch.Tensor:
    """Mean over the depths of -(1 / tokens) * sum of log P(token), before lambda (report, equations 24 and 25).

    Args:
        states: `mtp_hidden_states`' result.
        head: the shared output projection.
        labels: [B, T], label i standing for token i, -100 where nothing is to be learnt.
        position_ids: [B, T] or [1, T]; a restart is a document's border.
        depths: how many MTP modules the model has.
        tokens: what the main loss is divided by; depth k has up to k fewer terms for each sequence.
        vocabulary: its size.
    """
    total = states[0].new_zeros((), dtype=torch.float32)
    for depth, state in enumerate(states, start=1):
        targets = depth_labels(labels, position_ids, depth)[:, : state.shape[1]]
        total = total + head_cross_entropy_sum(
            head, state.reshape(-1, state.shape[-1]), targets.reshape(-1).to(state.device), vocabulary
        )
    return total / (depths * tokens)


def depth_labels(labels: torch.Tensor, position_ids: torch.Tensor | None, depth: int) -> torch.Tensor:
    """[B, T]: in row i the label of token i + depth + 1, -100 past the end or in another document."""
    targets = shifted(labels, depth + 1)
    if position_ids is None:
        return targets
    document = _documents(position_ids)
    other = document != shifted(document, depth + 1)
    return targets.masked_fill(other.to(targets.device), IGNORE_INDEX)


def _documents(position_ids: torch.Tensor) -> torch.Tensor:
    """[B, T] position_ids to the number of each token's document."""
    starts = torch.zeros_like(position_ids)
    starts[:, 1:] = (position_ids[:, 1:] != position_ids[:, :-1] + 1).to(starts.dtype)
    return starts.cumsum(dim=1)


def _joined(token_mask: torch.Tensor | None, documents: torch.Tensor | None, depth: int) -> torch.Tensor | None:
    """[B, T - depth], True where a row joins two tokens of one document that are no padding: the rows that the
    experts' load counts, however a batch is padded or packed. None where every row does."""
    joined = None if documents is None else documents[:, :-depth] == documents[:, depth:]
    if token_mask is None:
        return joined
    real = token_mask[:, :-depth] & token_mask[:, depth:]
    return real if joined is None else real & joined


def _first(attention_mask: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    """The part of a [B, T] or [B, 1, T, T] mask that concerns the first `rows` tokens."""
    if attention_mask is None:
        return None
    return attention_mask[:, :rows] if attention_mask.dim() == 2 else attention_mask[:, :, :rows, :rows]
