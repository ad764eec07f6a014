"""Trainer runs on tiny models: of one process where a test calls `run`, of several where `main` is called in each."""

import json
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from deepseek_v3 import DeepseekV3ForCausalLM, FP8Config, RouterBalanceCallback, lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.training.balance import routers_of

GLOBAL_BATCH = 4
FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]}
ZERO3 = {
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
}


def write_bases(folder):
    """`folder`/plain and `folder`/fp8, which `make` reads."""
    write_checkpoint(preset("tiny", vocab_size=64), folder / "fp8")
    torch.manual_seed(0)
    DeepseekV3ForCausalLM(preset("tiny", vocab_size=64, initializer_range=0.08)).save_pretrained(folder / "plain")
    return folder


def make(kind, bases, **options):
    """The whole model ("full"), LoRA on everything ("lora"), or LoRA over weights that stay FP8 ("fp8")."""
    options |= {"quantization_config": FP8Config(keep=True)} if kind == "fp8" else {}
    folder = Path(bases, "fp8" if kind == "fp8" else "plain")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if kind == "full":
        return model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **lora_target_modules(model.config, "all")))


def rows():
    """Documents of several lengths, some of them without labels at their start: no two ranks have the same share."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for i in range(32):
        start, length = int(torch.randint(0, 57, (), generator=generator)), 12 + i % 5
        ids = [3 + (start + 5 * j) % 57 for j in range(length)]
        empty = 16 - length
        labels = [-100] * (i % 7) + ids[i % 7 :] + [-100] * empty
        made.append({"input_ids": ids + [2] * empty, "labels": labels, "attention_mask": [1] * length + [0] * empty})
    return Dataset.from_list(made)


def trainer_of(folder, load, **arguments):
    """A Trainer of the model that `load()` gives, called once the arguments are known, as ZeRO-3 wants it."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    defaults = {"max_steps": 3, "per_device_train_batch_size": GLOBAL_BATCH // world, "learning_rate": 1e-3}
    defaults |= {"logging_steps": 1, "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True}
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    if args.fsdp:
        # accelerate shards on accelerators alone and says nothing where it does not: here the processes have none.
        assert args.parallel_mode.value == "distributed"
        PartialState().distributed_type = DistributedType.MULTI_GPU
    data, callbacks = rows(), [RouterBalanceCallback(update_rate=0.01)]
    # Two equal batches: evaluation weighs batches alike in one process and by their tokens over several.
    evaluated = data.select([*range(8), *range(8)])
    return Trainer(model=load(), args=args, train_dataset=data, eval_dataset=evaluated, callbacks=callbacks)


def run(folder, load, resume=None, **arguments):
    """Train; returns the trainer and what its rank knows afterwards."""
    trainer = trainer_of(folder, load, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "main_loss", "mtp_loss", "balance_loss", "max_vio", "expert_load", "router_bias")
    known = {name: [entry[name] for entry in entries] for name in names}
    known["biases"] = [router.e_score_correction_bias.tolist() for router in routers_of(trainer.model)]
    known["sharded"] = [n for n, p in trainer.model.named_parameters() if isinstance(p, DTensor) or not p.numel()]
    return trainer, known


def arguments_of(how):
    """What Trainer is told, made anew: TrainingArguments writes into the dictionary that it is given."""
    return {"ddp": {}, "fsdp2": {"fsdp": True, "fsdp_config": {**FSDP2}}, "zero3": {"deepspeed": {**ZERO3}}}[how]


def main(folder, bases, how):
    """Everything that one launch is for; each rank leaves what it knows in a file."""
    results = {}
    for kind in ("full", "lora"):
        load = lambda kind=kind: make(kind, bases)  # noqa: E731
        trainer, results[kind] = run(folder / kind, load, **arguments_of(how))
        results[kind]["eval_loss"] = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(folder / kind / "final"))
        checkpoint = str(folder / kind / "checkpoint-2")
        results[f"{kind} resumed"] = run(folder / "again", load, checkpoint, **arguments_of(how))[1]
    if how == "fsdp2":  # gloo sends no FP8: DDP starts with a broadcast of it, and a whole file is gathered
        results["fp8"] = run(folder / "fp8", lambda: make("fp8", bases), save_strategy="no", **arguments_of(how))[1]
    if how == "ddp":  # transformers' own sharding, which is none of accelerate's and saves no checkpoints
        sharded = DistributedConfig(fsdp_size=2)
        load = lambda: make("full", bases, distributed_config=sharded)  # noqa: E731
        trainer, results["loaded"] = run(folder / "loaded", load, save_strategy="no")
        trainer.model.save_pretrained(folder / "loaded" / "final")
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))
