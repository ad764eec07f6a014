"""Plain against speculative decoding of held-out prompts, for the demo."""

import time
from typing import Any

import torch


def compare_decoding(model: Any, tokenizer: Any, prompts: list[str], new_tokens: int = 128) -> dict[str, Any]:
    """Decode each prompt greedily, plainly and with the model's MTP modules at the depth that pays.

    Args:
        model: a causal language model with MTP modules.
        tokenizer: its tokenizer.
        prompts: texts, each decoded on its own.
        new_tokens: for each.

    Returns:
        `same_text`; `seconds` of "plain" and "mtp"; `tokens_per_step` and `acceptance` by depth of the latter.
    """
    seconds, texts = {"plain": 0.0, "mtp": 0.0}, {"plain": [], "mtp": []}  # type: ignore[var-annotated]
    tokens = steps = 0
    drafted, accepted = [0] * 8, [0] * 8
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids.to(model.device)
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": new_tokens, "do_sample": False}
        speculative = {"use_mtp": True, "num_assistant_tokens": "auto"}
        for name, more in (("plain", {}), ("mtp", speculative)):
            started = time.perf_counter()
            output = model.generate(ids, return_dict_in_generate=True, **options, **more)
            seconds[name] += time.perf_counter() - started
            texts[name].append(output.sequences[0].tolist())
        tokens, steps = tokens + output.mtp.tokens, steps + output.mtp.row_steps
        for depth, (tried, right) in enumerate(zip(output.mtp.drafted, output.mtp.accepted, strict=True)):
            drafted[depth] += tried
            accepted[depth] += right
    return {
        "prompts": len(prompts),
        "same_text": texts["plain"] == texts["mtp"],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "tokens_per_step": round(tokens / max(steps, 1), 2),
        "acceptance": [round(right / tried, 3) for right, tried in zip(accepted, drafted, strict=True) if tried],
    }
