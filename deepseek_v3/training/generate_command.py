"""The generate command: prompts completed in the terminal as they are decoded, with the MTP modules' drafts."""

import argparse
import os
import sys
import time
from typing import Any


def add_command(commands: Any) -> None:
    """Add `generate` to an argparse sub-parser collection; it sets `func(args) -> int`."""
    generate = commands.add_parser(
        "generate",
        help="complete prompts with a model folder",
        description="Complete each prompt, printed as it is decoded; tokens a second and what became of the MTP "
        "drafts go to standard error. Example: deepseek-v3 generate --model runs/demo --prompt 'def main('",
    )
    generate.add_argument("--model", required=True, help="model folder")
    generate.add_argument("--prompt", nargs="+", required=True, help="one completion for each; - reads standard input")
    generate.add_argument("--chat", action="store_true", help="a prompt is a user's message of the chat template")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="default: %(default)s")
    generate.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    generate.add_argument("--top-p", type=float, default=1.0, help="with a temperature (default: %(default)s)")
    generate.add_argument(
        "--drafts",
        type=_drafts,
        default=None,
        metavar="N",
        help="MTP drafts a step: a number, auto, or 0 for plain decoding (default: auto where the model has MTP)",
    )
    generate.add_argument("--dtype", default="auto", help="of the weights (default: as stored)")
    generate.add_argument(
        "--cache-dtype", metavar="DTYPE", help="float8_e4m3fn keeps latents in FP8 (default: the model's dtype)"
    )
    generate.add_argument(
        "--sliding-window", type=int, metavar="W", help="let each token see the last W tokens (default: all)"
    )
    generate.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    generate.set_defaults(func=_generate)


def _drafts(text: str) -> int | str:
    if text == "auto" or text.isdecimal():
        return text if text == "auto" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto")


def _generate(args: argparse.Namespace) -> int:
    if not os.path.isfile(os.path.join(args.model, "config.json")):
        raise FileNotFoundError(f"{args.model} is no model folder (it has no config.json); train or convert one")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    if args.chat and not tokenizer.chat_template:
        raise ValueError(f"--chat: the tokenizer in {args.model} has no chat template; leave --chat out")
    placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype, **placed)
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.temperature > 0}
    if args.temperature > 0:
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    kind = {"dtype": args.cache_dtype, "sliding_window": args.sliding_window}
    kind = {name: value for name, value in kind.items() if value is not None}
    if kind:
        options["cache_config"] = kind
    drafts = args.drafts
    if drafts is None:
        drafts = "auto" if model.config.num_nextn_predict_layers else 0
    if drafts:
        options |= {"use_mtp": True, "num_assistant_tokens": drafts}
    for prompt in args.prompt:
        _complete(model, tokenizer, sys.stdin.read() if prompt == "-" else prompt, args.chat, options)
    return 0


def _complete(model: Any, tokenizer: Any, prompt: str, chat: bool, options: dict[str, Any]) -> None:
    """Stream one completion to standard output after its prompt; figures to standard error."""
    from transformers import TextStreamer

    if chat:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
        print(prompt, end="", flush=True)
    # A tokenizer may also name types of segments, which this model has not.
    inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
    started = time.perf_counter()
    output = model.generate(
        **inputs, streamer=TextStreamer(tokenizer, skip_prompt=True), return_dict_in_generate=True, **options
    )
    seconds = time.perf_counter() - started
    new = output.sequences.shape[1] - inputs["input_ids"].shape[1]
    print(f"[{new} tokens, {new / seconds:.1f} a second{_of_drafts(getattr(output, 'mtp', None))}]", file=sys.stderr)


def _of_drafts(statistics: Any) -> str:
    if statistics is None:
        return ""
    rates = ", ".join(f"{rate:.0%}" for rate in statistics.acceptance)
    return f"; {statistics.tokens_per_step:.2f} a step, drafts accepted by depth: {rates or 'none made'}"
