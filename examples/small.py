"""What the examples run on where no --model is given: a tiny model with a tokenizer, and conversations about sums."""

import json
from pathlib import Path
from typing import Any

import torch

import deepseek_v3
from deepseek_v3.configuration import preset
from deepseek_v3.training.data import train_tokenizer

NUMBERS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def sums() -> list[tuple[str, str]]:
    """Questions and their answers, in words."""
    pairs = [(i, j) for i in range(1, 6) for j in range(1, 6)]
    return [(f"{NUMBERS[i - 1]} and {NUMBERS[j - 1]}", NUMBERS[i + j - 1]) for i, j in pairs]


def write_chats(path: Path) -> Path:
    """The sums as conversations, one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    turns = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in sums()
    ]
    path.write_text("\n".join(map(json.dumps, turns)))
    return path


def make_tokenizer() -> Any:
    """A byte-level tokenizer of the sums' words, with a chat template."""
    tokenizer = train_tokenizer([f"{question} {answer} user: assistant:" for question, answer in sums()] * 4, 320)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_config(tokenizer: Any, **overrides: Any) -> Any:
    """The "tiny" preset at sizes that FP8 and 4-bit take, with the tokenizer's words.

    Its weights are wide enough that an adapter alone, under a frozen random head, can say something.
    """
    sizes = {"q_lora_rank": 64, "qk_rope_head_dim": 32, "vocab_size": len(tokenizer), "initializer_range": 0.12}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return preset("tiny", **{**sizes, **special, **overrides})


def make_base(folder: Path) -> str:
    """Write the tiny model, random, and its tokenizer; returns the folder."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    deepseek_v3.DeepseekV3ForCausalLM(make_config(tokenizer)).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
