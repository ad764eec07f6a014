"""Cross-entropy over a large vocabulary without a second copy of the logits.

The plain form holds the logits in their dtype, in float32, and their log-softmax, before the first gradient. Here
float32 exists a chunk of rows at a time, and the MTP loss never holds its logits at all: each chunk goes through the
head, and again in the backward.

Letters: n rows, D hidden, W vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100
_CHUNK_ELEMENTS = 1 << 24  # logits in flight: 64 MB in float32, 129 rows of a 129,280-word vocabulary


def _row_chunks(rows: int, vocabulary: int) -> list[slice]:
    step = max(1, _CHUNK_ELEMENTS // vocabulary)
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


class _CrossEntropySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        normalisers = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
        for rows in _row_chunks(*logits.shape):
            chunk = logits[rows].float()
            normalisers[rows] = torch.logsumexp(chunk, dim=-1)
            target = chunk.gather(1, labels[rows].clamp(min=0)[:, None])[:, 0]
            total = total + torch.where(labels[rows] == IGNORE_INDEX, 0.0, normalisers[rows] - target).sum()
        ctx.save_for_backward(logits, labels, normalisers)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits, labels, normalisers = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        for rows in _row_chunks(*logits.shape):
            # softmax minus one-hot, on the rows that count
            chunk = (logits[rows].float() - normalisers[rows, None]).exp_()
            counted = (labels[rows] != IGNORE_INDEX)[:, None]
            chunk.scatter_add_(1, labels[rows].clamp(min=0)[:, None], -torch.ones_like(chunk[:, :1]))
            grad_logits[rows] = (chunk * (counted * grads[0])).to(logits.dtype)
        return grad_logits, None


def cross_entropy_sum(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum of the rows' cross-entropies, float32.

    Args:
        logits: [n, W], any float dtype; the only full-size tensor saved for backward.
        labels: [n], int64; rows of -100 count nothing.
    """
    return _CrossEntropySum.apply(logits, labels)  # type: ignore[no-any-return]


def head_cross_entropy_sum(
    head: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, labels: torch.Tensor, vocabulary: int
) -> torch.Tensor:
    """`cross_entropy_sum(head(hidden), labels)` with the logits of one chunk of rows at a time.

    Args:
        head: the output projection, any module that maps [n, D] to [n, W].
        hidden: [n, D].
        labels: [n], int64, -100 for rows that count nothing.
        vocabulary: W.
    """
    chunks = _row_chunks(hidden.shape[0], vocabulary)
    if len(chunks) == 1:  # small enough to keep: no second way through the head
        return _head_loss(head, hidden, labels)
    total = hidden.new_zeros((), dtype=torch.float32)
    for rows in chunks:
        total = total + checkpoint(_head_loss, head, hidden[rows], labels[rows], use_reentrant=False)  # type: ignore[operator]
    return total


def _head_loss(head: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy_sum(head(hidden), labels)


def shifted(labels: torch.Tensor, by: int) -> torch.Tensor:
    """`labels` [B, T] moved `by` places to the left, the tail filled with -100."""
    return torch.nn.functional.pad(labels[:, by:], (0, min(by, labels.shape[1])), value=IGNORE_INDEX)


def check_labels(labels: torch.Tensor, vocabulary: int) -> None:
    """Refuse labels that no logit stands for.

    Raises:
        ValueError: a label is neither -100 nor in [0, vocabulary). On a GPU the check is asynchronous, so that a
            training step never waits for it, and surfaces as a device-side assertion.
    """
    valid = ((labels >= 0) & (labels < vocabulary)) | (labels == IGNORE_INDEX)
    if labels.device.type != "cpu":
        torch._assert_async(valid.all(), f"a label is outside of [0, {vocabulary}) and not {IGNORE_INDEX}")
    elif not bool(valid.all()):
        worst = labels[~valid].flatten()[0].item()
        raise ValueError(
            f"labels hold {worst}, outside of the vocabulary [0, {vocabulary}). Check the tokenizer against "
            f"config.vocab_size, and mark what is not to be learnt with {IGNORE_INDEX}"
        )
