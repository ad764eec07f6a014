"""Measurements on held-out text: bits per byte, the MTP head's acceptance, the experts' load.

Letters: B batch, T tokens, E routed experts, k MTP depth from 1.
"""

import lzma
import math
from collections.abc import Iterable
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from ..modeling_deepseek_v3 import DeepseekV3ForCausalLM
from ..modeling_deepseek_v3.losses import cross_entropy_sum
from .balance import routers_of


def _windows(ids: list[int], length: int) -> Iterable[tuple[list[int], int]]:
    """Pieces of `length` tokens that overlap by half, each with how many of its tokens are not to be scored again."""
    step = max(1, length // 2)
    start = 0
    while True:
        yield ids[start : start + length], 0 if start == 0 else length - step
        if start + length >= len(ids):
            return
        start += step


@torch.inference_mode()
def bits_per_byte(model: Any, tokenizer: Any, texts: Iterable[str], length: int = 512) -> float:
    """Bits that the model needs for one byte of UTF-8 text, each document on its own, over overlapping windows.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer, with a BOS token, which the document starts from.
        texts: the documents.
        length: tokens in a window; a token sees at least `length // 2` earlier ones where there are as many.

    Raises:
        ValueError: there is no text.
    """
    nats, size = 0.0, 0
    for text in tqdm(list(texts), desc="Bits per byte", leave=False):
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        size += len(text.encode())
        for window, scored in _windows(ids, length):
            tokens = torch.tensor([window], device=model.device)
            logits = model(tokens, use_cache=False).logits[0, max(scored - 1, 0) : -1]
            nats += cross_entropy_sum(logits, tokens[0, max(scored, 1) :]).item()
    if size == 0:
        raise ValueError("bits_per_byte: there is no text to measure on")
    return nats / math.log(2) / size


def xz_bits_per_byte(texts: Iterable[str]) -> float:
    """Bits a byte of `xz -9` over the same texts in one file, which it may look through as a whole."""
    data = "".join(texts).encode()
    return 8 * len(lzma.compress(data, preset=9)) / len(data)


@torch.inference_mode()
def mtp_acceptance(model: DeepseekV3ForCausalLM, blocks: Iterable[list[int]]) -> list[float]:
    """Acceptance of each MTP depth by teacher forcing, one number a depth.

    A draft is accepted where its most likely token is the main model's most likely token at the same place, both
    having seen the true text, and all shallower drafts from the same row were accepted too (greedy verification).

    Args:
        model: a causal language model with MTP modules.
        blocks: token ids, each block on its own.
    """
    accepted: torch.Tensor | None = None
    rows = 0
    for block in blocks:
        tokens = torch.tensor([block], device=model.device)
        output = model(tokens, output_mtp_logits=True, use_cache=False)
        depths = len(output.mtp_logits)
        choices = output.logits[0].argmax(-1)  # [T], row i choosing token i + 1
        usable = len(block) - depths
        hits = torch.stack(
            [draft[0, :usable].argmax(-1) == choices[k : k + usable] for k, draft in enumerate(output.mtp_logits, 1)]
        )
        chain = hits.long().cumprod(dim=0).sum(dim=1)
        accepted = chain if accepted is None else accepted + chain
        rows += usable
    if accepted is None or rows <= 0:
        raise ValueError("mtp_acceptance: no block is longer than the model's number of MTP modules")
    before = [rows, *accepted.tolist()[:-1]]
    return [done / tried if tried else 0.0 for done, tried in zip(accepted.tolist(), before, strict=True)]


@torch.inference_mode()
def expert_shares(model: Any, blocks: Iterable[list[int]], biased: bool = True) -> list[list[float]]:
    """Share of the token-expert pairs that each expert gets, [E] for each router that the forward runs.

    Args:
        model: a model with routers.
        blocks: token ids, each block on its own.
        biased: False routes by the plain scores, as if the selection bias had never been learnt.
    """
    routers = routers_of(model)
    counts = [torch.zeros(router.num_experts) for router in routers]

    def count(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            counts[index] += torch.bincount(output[2].flatten().cpu(), minlength=module.num_experts)

        return hook

    hooks = [router.register_forward_hook(count(index)) for index, router in enumerate(routers)]
    try:
        with _biases(routers, biased):
            for block in blocks:
                model(torch.tensor([block], device=model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return [(count / count.sum()).tolist() for count in counts if count.sum() > 0]


@contextmanager
def _biases(routers: Any, kept: bool) -> Any:
    learnt = [router.e_score_correction_bias.clone() for router in routers]
    try:
        if not kept:
            for router in routers:
                router.e_score_correction_bias.zero_()
        yield
    finally:
        for router, bias in zip(routers, learnt, strict=True):
            router.e_score_correction_bias.copy_(bias)


def max_violation(shares: Iterable[list[float]]) -> float:
    """MaxVio: largest load over the mean load, minus 1, averaged over the layers; 0 is perfect balance."""
    violations = [max(layer) * len(layer) - 1 for layer in shares]
    return sum(violations) / len(violations)
