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
from ..modeling_deepseek_v3.losses import IGNORE_INDEX, cross_entropy_sum
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
    counted = []
    for block in blocks:
        output = model(torch.tensor([block], device=model.device), output_mtp_logits=True, use_cache=False)
        counted.append(_accepted(output))
    return _rates(counted)


def _accepted(output: Any) -> list[int]:
    """Of one row: drafts that can be judged, then how many are accepted at depth 1, 2, ..."""
    choices = output.logits[0].argmax(-1)  # [T], row i choosing token i + 1
    usable = max(0, len(choices) - len(output.mtp_logits))
    drafts = [draft[0, :usable].argmax(-1) for draft in output.mtp_logits]
    hits = torch.stack([draft == choices[k : k + usable] for k, draft in enumerate(drafts, 1)])
    return [usable, *hits.long().cumprod(dim=0).sum(dim=1).tolist()]


def _rates(counted: list[list[int]]) -> list[float]:
    totals = [sum(column) for column in zip(*counted, strict=True)]
    if not totals or totals[0] <= 0:
        raise ValueError("mtp_acceptance: no block is longer than the model's number of MTP modules")
    return [done / tried if tried else 0.0 for tried, done in zip(totals, totals[1:], strict=False)]


@torch.inference_mode()
def expert_shares(model: Any, blocks: Iterable[list[int]], biased: bool = True) -> list[list[float]]:
    """Share of the token-expert pairs that each expert gets, [E] for each router that the forward runs.

    Args:
        model: a model with routers.
        blocks: token ids, each block on its own.
        biased: False routes by the plain scores, as if the selection bias had never been learnt.
    """
    with _expert_counts(model) as counts, _biases(routers_of(model), biased):
        for block in blocks:
            model(torch.tensor([block], device=model.device), use_cache=False)
    return _shares(counts)


def _shares(counts: list[torch.Tensor]) -> list[list[float]]:
    return [(count / count.sum()).tolist() for count in counts if count.sum() > 0]


@contextmanager
def _expert_counts(model: Any) -> Any:
    """Pairs of token and expert, [E] for each router, that are chosen inside of the context."""
    routers = routers_of(model)
    counts = [torch.zeros(router.num_experts) for router in routers]

    def count(index: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            counts[index] += torch.bincount(output[2].flatten().cpu(), minlength=module.num_experts)

        return hook

    hooks = [router.register_forward_hook(count(index)) for index, router in enumerate(routers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


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


@torch.no_grad()
def held_out_measures(model: Any, tokenizer: Any, texts: list[str], blocks: Iterable[Any]) -> dict[str, float]:
    """What a run logs about held-out text, the model as in `eval()`, its mode left as it was.

    Args:
        model: a causal language model, in training or not.
        tokenizer: its tokenizer, with a BOS token.
        texts: for the bits per byte.
        blocks: the same texts packed as for training: `input_ids` [T] and, with documents apart, `position_ids`.

    Returns:
        `main_loss`, nats a token; `bits_per_byte`; with MTP modules `mtp_acceptance_K` for each depth K from 1; with
        experts `max_vio`, over the MTP modules' routers too.
    """
    training = model.training
    model.eval()
    try:
        measures = _measure_blocks(model, blocks)
        length = max(len(block["input_ids"]) for block in blocks)
        return {**measures, "bits_per_byte": bits_per_byte(model, tokenizer, texts, length)}
    finally:
        model.train(training)


def _measure_blocks(model: Any, blocks: Iterable[Any]) -> dict[str, float]:
    nats, targets, accepted = 0.0, 0, []
    with _expert_counts(model) as counts:
        for block in blocks:
            names = [name for name in ("input_ids", "position_ids") if name in block]
            inputs = {name: torch.tensor([block[name]], device=model.device) for name in names}
            output = model(**inputs, output_mtp_logits=bool(model.config.num_nextn_predict_layers), use_cache=False)
            labels = inputs["input_ids"][0, 1:].clone()
            if "position_ids" in inputs:
                labels[inputs["position_ids"][0, 1:] == 0] = IGNORE_INDEX
            nats += cross_entropy_sum(output.logits[0, :-1], labels).item()
            targets += int((labels != IGNORE_INDEX).sum())
            if output.mtp_logits:
                accepted.append(_accepted(output))
    measures = {"main_loss": nats / max(1, targets)}
    if accepted:
        measures |= {f"mtp_acceptance_{depth}": rate for depth, rate in enumerate(_rates(accepted), 1)}
    shares = _shares(counts)
    return {**measures, "max_vio": max_violation(shares)} if shares else measures
