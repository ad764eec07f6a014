"""What the router bias update does: the same small model, seed and data with it and without it, on the source of
Python's standard library. MaxVio is the largest load of an expert over the mean load, minus 1, averaged over the
routers: of each batch in the last quarter of the run, of the whole last quarter, and on held-out text. The main loss
is the mean over the last quarter. Under plain `transformers.Trainer`, where there is no GPU ten minutes of one core.
Gamma is larger than the report's 0.001, with which the biases need more steps than so short a run has.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import tempfile
import time

import torch
from transformers import Trainer, TrainingArguments, set_seed

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3ForCausalLM, RouterBalanceCallback
from deepseek_v3.configuration import preset
from deepseek_v3.training.data import head, pack, read_texts, split_texts, text_files, train_tokenizer
from deepseek_v3.training.demo import library_sources
from deepseek_v3.training.evaluation import held_out_measures


def load(options):
    """Tokenizer, training blocks, held-out texts and their blocks."""
    files = text_files(library_sources())
    train, kept = split_texts(read_texts(files, options.limit_bytes), 0.05)
    tokenizer = train_tokenizer(train, options.vocab_size)
    held_out = head((text for _, text in kept), 60_000)
    return tokenizer, pack(train, tokenizer, options.block), held_out, pack(held_out, tokenizer, options.block)


def run(gamma, seed, options, data):
    """One run; each step is logged, so that a log entry's load is that of one batch."""
    tokenizer, dataset, held_out, blocks = data
    set_seed(seed)
    words = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = preset(options.preset, vocab_size=len(tokenizer), **words, **options.fields)
    model = DeepseekV3ForCausalLM(config)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=options.steps, per_device_train_batch_size=options.batch, seed=seed,
            learning_rate=options.learning_rate, lr_scheduler_type="cosine_with_min_lr", warmup_steps=20,
            lr_scheduler_kwargs={"min_lr_rate": 0.1}, adam_beta2=0.95, weight_decay=0.1, logging_steps=1,
            save_strategy="no", report_to=[], use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
        )  # fmt: skip
        trainer = Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[RouterBalanceCallback(gamma)])
        start = time.perf_counter()
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "main_loss" in entry]
    return summary(entries, held_out_measures(model, tokenizer, held_out, blocks), time.perf_counter() - start)


def summary(entries, held_out, seconds):
    last = entries[len(entries) * 3 // 4 :]
    loads = torch.tensor([entry["expert_load"] for entry in last])  # [steps, routers, E], shares of a batch
    whole = loads.mean(0)
    quarter = (whole.amax(-1) / whole.mean(-1) - 1).mean().item()
    return {
        "main_loss": sum(entry["main_loss"] for entry in last) / len(last),
        "max_vio_batch": sum(entry["max_vio"] for entry in last) / len(last),
        "max_vio_quarter": quarter,
        "held_out": held_out,
        "curve": [round(entry["max_vio"], 3) for entry in entries[:: max(1, len(entries) // 40)]],
        "seconds": round(seconds, 1),
    }


def main():
    args = parser(__doc__)
    args.add_argument("--preset", default="tiny")
    args.add_argument("--steps", type=int, default=400)
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--gamma", type=float, default=0.004)
    args.add_argument("--batch", type=int, default=8)
    args.add_argument("--block", type=int, default=128)
    args.add_argument("--vocab-size", type=int, default=1024)
    args.add_argument("--limit-bytes", type=int, default=6_000_000)
    args.add_argument("--learning-rate", type=float, default=3e-3)
    options = args.parse_args()
    options.fields = {"seq_balance_loss_alpha": 0.0}  # the bias alone
    data = load(options)
    runs, rows = [], []
    for seed in range(options.seeds):
        for gamma in (0.0, options.gamma):
            result = run(gamma, seed, options, data)
            runs.append({"seed": seed, "gamma": gamma, **result})
            cells = [result[name] for name in ("max_vio_batch", "max_vio_quarter", "main_loss")]
            held_out = [result["held_out"][name] for name in ("max_vio", "main_loss")]
            rows.append([seed, gamma, *cells, *held_out, result["seconds"]])
        print(rows[-2:], flush=True)
    names = ("preset", "steps", "gamma", "batch", "block", "vocab_size", "limit_bytes", "learning_rate", "fields")
    columns = ["seed", "gamma", "MaxVio a batch", "MaxVio the quarter", "main loss", "held out: MaxVio", "main loss"]
    shape = {name: getattr(options, name) for name in names}
    finish("balance", [*columns, "s"], rows, {**shape, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
