"""The demo: the whole life of a small DeepSeek-V3 on the source of Python's standard library.

Every stage is a public function or a command that works on one's own text; nothing is downloaded.
"""

import json
import sysconfig
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from transformers.utils import logging

from ..configuration import account
from .data import pack
from .demo_decoding import compare_decoding
from .distill import DistillSettings, distill_on_texts
from .evaluation import bits_per_byte, expert_shares, max_violation, mtp_acceptance, xz_bits_per_byte
from .train import TrainResult, TrainSettings, load_texts, train

STEPS = 600
_PROMPTS = 3
_EVALUATED_BYTES = 150_000


def library_sources() -> list[str]:
    """The packages and modules of the running Python's standard library: several MB of source on every machine, under
    the PSF licence. What is installed below it, its tests and its tables are left out."""
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "encodings"}
    return sorted(
        str(path)
        for path in Path(sysconfig.get_path("stdlib")).iterdir()
        if path.name not in skipped and not path.name.startswith("config-") and (path.is_dir() or path.suffix == ".py")
    )


def run_demo(output: str, steps: int = STEPS, seed: int = 0) -> dict[str, Any]:
    """Train, save, load, complete and measure; writes `report.png` and `report.json` into `output`.

    Args:
        output: folder for everything.
        steps: optimizer steps.
        seed: of initialisation and data order.

    Returns:
        The measurements, as in `report.json`.
    """
    started = time.perf_counter()
    print("1. Train a tokenizer and a model on the source of Python's standard library")
    settings = TrainSettings(
        data=library_sources(),
        output=output,
        vocab_size=2048,
        held_out=0.05,
        batch=4,
        learning_rate=4e-3,
        steps=steps,
        seed=seed,
    )
    result = train(settings)
    trained = time.perf_counter() - started
    print(f"   {trained:.0f} s; saved in {output}\n")

    print("2. Let its MTP module learn to draft what the trained model writes itself")
    accepted = mtp_acceptance(result.model, _blocks(result))
    _distill(result, settings)
    distilled = time.perf_counter() - started - trained
    print(f"   {distilled:.0f} s; the main model is as it was\n")

    print("3. Load it with AutoModelForCausalLM.from_pretrained and complete held-out code with pipeline()")
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(output)
    tokenizer = AutoTokenizer.from_pretrained(output)
    _check_same(result, model)
    completions = _complete(model, tokenizer, result.held_out)

    print("4. Decode the same prompts with the model's own MTP module drafting")
    decoding = compare_decoding(model, tokenizer, [one["prompt"] for one in completions])
    _print_decoding(decoding)

    print("5. Measure on held-out files")
    report = _measure(model, tokenizer, result)
    report |= {"seconds_training": round(trained, 1), "seconds_distilling": round(distilled, 1)}
    report |= {"mtp_acceptance_before_distilling": [round(rate, 4) for rate in accepted]}
    report |= {"steps": steps, "completions": completions}
    report["decoding"] = decoding
    _draw(Path(output, "report.png"), result, report)
    report["seconds"] = round(time.perf_counter() - started, 1)
    Path(output, "report.json").write_text(json.dumps(report, indent=2))
    _print_report(report, output)
    return report


def _distill(result: TrainResult, trained: TrainSettings) -> None:
    """The MTP module's second stage, in place and in the folder, on prompts from the texts that were trained on."""
    steps = max(1, (trained.steps or 0) // 3)
    settings = DistillSettings(output=trained.output, steps=steps, seed=trained.seed)
    distill_on_texts(result.model, result.tokenizer, load_texts(trained).train, settings)
    result.model.save_pretrained(trained.output)


def _blocks(result: TrainResult) -> list[list[int]]:
    blocks: list[list[int]] = pack(_some_text(result), result.tokenizer, 256)["input_ids"][:48]
    return blocks


def _check_same(result: TrainResult, loaded: Any) -> None:
    tokens = torch.arange(3, 40)[None]
    with torch.inference_mode():
        before, after = (model(tokens, output_mtp_logits=True) for model in (result.model, loaded.eval()))
    same = torch.equal(before.logits, after.logits) and torch.equal(before.mtp_logits[0], after.mtp_logits[0])
    if not same:
        raise RuntimeError("the saved model does not give back the trained model's logits")
    print("   logits and MTP logits of the loaded model are bit-identical to the trained one's")


def _complete(model: Any, tokenizer: Any, held_out: list[tuple[Path, str]]) -> list[dict[str, str]]:
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    completions = []
    for path, text in [pair for pair in held_out if len(pair[1]) > 2000][:_PROMPTS]:
        start = text.find("\n    def ", 400)
        prompt = text[max(0, start - 240) : start + 30] if start > 0 else text[:240]
        completed = generate(prompt, max_new_tokens=48, do_sample=False, return_full_text=False)[0]["generated_text"]
        completions.append({"file": path.name, "prompt": prompt, "completion": completed})
        shown = "\n".join(f"   | {line}" for line in (prompt[-120:] + "\033[1m" + completed + "\033[0m").splitlines())
        print(f"   {path.name}:\n{shown}\n")
    return completions


def _print_decoding(decoding: dict[str, Any]) -> None:
    if not decoding["same_text"]:
        raise RuntimeError("speculative decoding gives another text than plain decoding")
    rates = ", ".join(f"{rate:.0%}" for rate in decoding["acceptance"]) or "none made"
    plain, mtp = decoding["seconds"]["plain"], decoding["seconds"]["mtp"]
    print(f"   the same text, {decoding['tokens_per_step']:.2f} tokens a step; drafts accepted by depth: {rates}")
    print(f"   plain {plain:.1f} s, with MTP {mtp:.1f} s: {plain / mtp:.2f} times as fast\n")


def _some_text(result: TrainResult) -> list[str]:
    texts, total = [], 0
    for _, text in result.held_out:
        if total >= _EVALUATED_BYTES:
            break
        texts.append(text)
        total += len(text.encode())
    return texts


def _measure(model: Any, tokenizer: Any, result: TrainResult) -> dict[str, Any]:
    texts, blocks = _some_text(result), _blocks(result)
    config = model.config
    bill = account(config)
    shares = {"without the learnt bias": expert_shares(model, blocks, biased=False)}
    shares["with the learnt bias"] = expert_shares(model, blocks)
    heads, grouped = config.num_attention_heads, max(1, config.num_attention_heads // 3)
    return {
        "bits_per_byte": round(bits_per_byte(model, tokenizer, texts), 4),
        "bits_per_byte_xz9": round(xz_bits_per_byte(texts), 4),
        "evaluated_bytes": sum(len(text.encode()) for text in texts),
        "mtp_acceptance": [round(rate, 4) for rate in mtp_acceptance(model, blocks)],
        "expert_shares": shares,
        "max_vio": {name: round(max_violation(layers), 3) for name, layers in shares.items()},
        "cache_bytes_per_token": {
            "latent (this model)": bill.cache_bytes_per_token("float32"),
            f"grouped-query, {grouped} of {heads} heads": bill.grouped_query_cache_bytes_per_token(grouped, "float32"),
            f"multi-head, {heads} heads": bill.grouped_query_cache_bytes_per_token(heads, "float32"),
        },
    }


def _draw(path: Path, result: TrainResult, report: dict[str, Any]) -> None:
    from .report import plot_run

    bits = {"this model": report["bits_per_byte"], "xz -9": report["bits_per_byte_xz9"]}
    plot_run(str(path), result.history, report["expert_shares"], bits, report["cache_bytes_per_token"])


def _print_report(report: dict[str, Any], output: str) -> None:
    vio = report["max_vio"]
    bits, xz = report["bits_per_byte"], report["bits_per_byte_xz9"]
    print(f"   bits a byte            {bits:.3f}   (xz -9 on the same bytes: {xz:.3f})")
    before, after = report["mtp_acceptance_before_distilling"][0], report["mtp_acceptance"][0]
    print(f"   MTP acceptance         {after:.1%}  (teacher forcing on held-out text; before distilling {before:.1%})")
    balanced, plain = vio["with the learnt bias"], vio["without the learnt bias"]
    print(f"   MaxVio of the experts  {balanced:.2f}   (without the learnt bias: {plain:.2f})")
    for name, size in report["cache_bytes_per_token"].items():
        print(f"   cache bytes a token    {size:>6,}  {name}")
    print(f"\n   {report['seconds']:.0f} s in all. Figures: {output}/report.png, numbers: {output}/report.json")
