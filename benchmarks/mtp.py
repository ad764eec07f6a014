"""Speculative decoding with MTP: our plain decoding, ours with MTP, transformers' own plain decoding, in turns.

On a model folder (that of `make demo`, say), greedy, on prompts from its held-out text: tokens a forward of the main
model against the acceptance measured by teacher forcing, and wall time. What a small model writes after one prompt
says little, so smaller batches are decoded one after another until eight prompts are. Correctness comes first: all
three must give the same tokens, or nothing is timed.
"""

import argparse
import json
import sys
from itertools import zip_longest
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from transformers import AutoTokenizer
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3ForCausalLM as NativeForCausalLM

from benchmarks.common import alternate, finish, ratio
from deepseek_v3 import DeepseekV3ForCausalLM
from deepseek_v3.generation.statistics import MtpStatistics
from deepseek_v3.training.data import pack, read_texts, split_texts, text_files
from deepseek_v3.training.evaluation import mtp_acceptance


def held_out(tokenizer, sources, share, count, length):
    """`count` token blocks of held-out text."""
    _, pairs = split_texts(read_texts(text_files(sources)), share)
    return pack([text for _, text in pairs], tokenizer, length)["input_ids"][:count]


LEAST = 8  # prompts that each row of the table decodes


def generate(model, prompts, batch, new, **kwargs):
    """Outputs of `generate` for the prompts in batches."""
    settings = {"max_new_tokens": new, "eos_token_id": None, "do_sample": False, **kwargs}
    return [model.generate(part, attention_mask=torch.ones_like(part), **settings) for part in prompts.split(batch)]


def joined(outputs):
    """`MtpStatistics` of several calls as of one."""
    whole = MtpStatistics(depth=outputs[-1].mtp.depth)
    for statistics in (output.mtp for output in outputs):
        whole.steps += statistics.steps
        whole.row_steps += statistics.row_steps
        whole.tokens += statistics.tokens
        for name in ("drafted", "accepted"):
            pairs = zip_longest(getattr(whole, name), getattr(statistics, name), fillvalue=0)
            setattr(whole, name, [a + b for a, b in pairs])
    return whole


@torch.inference_mode()
def own_acceptance(model, prompts, sequences):
    """Acceptance of depth 1 by teacher forcing on what the model itself has written after the prompts, and the tokens
    a step that it allows: a right draft saves its row the next step."""
    output = model(sequences, output_mtp_logits=True, use_cache=False)
    # The main model's row i + 1 and the module's row i both predict token i + 2.
    start = prompts.shape[1] - 1
    chosen, drafts = output.logits[:, start + 1 :].argmax(-1), output.mtp_logits[0][:, start:].argmax(-1)
    count = min(chosen.shape[1], drafts.shape[1])
    hits = chosen[:, :count] == drafts[:, :count]
    steps = 0
    for row in hits.tolist():
        at = 0
        while at < count:
            at, steps = at + 1 + row[at], steps + 1
    return hits.float().mean().item(), hits.numel() / steps


def measure(ours, native, prompts, batch, new, depth, rounds):
    """Ratios of wall times, the statistics of the speculative run, and its drafts on the text that was written."""
    speculative = {"use_mtp": True, "num_assistant_tokens": depth}
    runs = {
        "plain": lambda: generate(ours, prompts, batch, new),
        "mtp": lambda: generate(ours, prompts, batch, new, **speculative),
        "native": lambda: generate(native, prompts, batch, new),
    }
    outputs = {name: torch.cat(run()) for name, run in runs.items()}
    for name, output in outputs.items():
        if not torch.equal(output, outputs["plain"]):
            sys.exit(f"{name} decoding gives other tokens; nothing is timed")
    seconds = alternate(runs, rounds)
    statistics = joined(generate(ours, prompts, batch, new, return_dict_in_generate=True, **speculative))
    own = own_acceptance(ours, prompts, outputs["plain"])
    return ratio(seconds["plain"], seconds["mtp"]), ratio(seconds["native"], seconds["mtp"]), statistics, own


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="runs/demo", help="model folder with MTP and a tokenizer")
    parser.add_argument("--data", nargs="+", help="text to take prompts from (default: the demo's)")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--depth", nargs="+", default=["1", "2", "auto"], help="num_assistant_tokens")
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output")
    options = parser.parse_args()
    ours = DeepseekV3ForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    native = NativeForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    if options.data is None:
        from deepseek_v3.training.demo import library_sources

        options.data = library_sources()
    blocks = held_out(tokenizer, options.data, 0.05, max(LEAST, *options.batch), options.prompt)
    forced = mtp_acceptance(ours, held_out(tokenizer, options.data, 0.05, 40, 256))
    rows, points = [], []
    for batch in options.batch:
        for depth in options.depth:
            asked = depth if depth == "auto" else int(depth)
            prompts = torch.tensor(blocks[: max(LEAST, batch)])
            plain, theirs, statistics, own = measure(ours, native, prompts, batch, options.new, asked, options.rounds)
            rows.append(
                [batch, depth, statistics.depth, statistics.tokens_per_step, *own, plain["median"], theirs["median"]]
            )
            point = {
                "batch": batch,
                "asked": depth,
                "depth": statistics.depth,
                "over_plain": plain,
                "over_native": theirs,
            }
            points.append(
                {
                    **point,
                    "tokens_per_step": statistics.tokens_per_step,
                    "acceptance": statistics.acceptance,
                    "teacher_forced_on_own_text": own[0],
                    "tokens_per_step_allowed_at_depth_1": own[1],
                }
            )
    columns = ["batch", "asked", "depth", "tokens a step", "acceptance", "allowed", "x our plain", "x native plain"]
    print(f"acceptance by teacher forcing: {json.dumps(forced)}")
    finish("mtp", columns, rows, {"teacher_forced_acceptance": forced, "points": points}, options.output)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
