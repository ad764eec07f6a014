"""Trainer runs on tiny models: of one process where a test calls `run`, of several where this file is launched."""

import json
import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from accelerate.state import DistributedType, PartialState
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from deepseek_v3 import DeepseekV3ForCausalLM, FP8Config, RouterBalanceCallback, lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.training.balance import routers_of

FSDP2 = {"version": 2, "transformer_layer_cls_to_wrap": ["DeepseekV3DecoderLayer", "DeepseekV3MTPLayer"]}
GLOBAL_BATCH = 4


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


def make(kind, base):
    """The whole model, LoRA on everything, or LoRA over the FP8 weights of the folder `base`."""
    if kind == "fp8":
        wanted = FP8Config(keep=True)
        model = AutoModelForCausalLM.from_pretrained(base, quantization_config=wanted, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        model = DeepseekV3ForCausalLM(preset("tiny", vocab_size=64, initializer_range=0.08))
    if kind == "full":
        return model
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=4, lora_alpha=8, **lora_target_modules(model.config, "all")))


def trainer_of(folder, model, **arguments):
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
    return Trainer(model=model, args=args, train_dataset=data, eval_dataset=evaluated, callbacks=callbacks)


def run(folder, model, resume=None, **arguments):
    """Train; returns the trainer and what its rank knows afterwards."""
    trainer = trainer_of(folder, model, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "main_loss", "mtp_loss", "balance_loss", "max_vio", "expert_load", "router_bias")
    known = {name: [entry[name] for entry in entries] for name in names}
    known["biases"] = [router.e_score_correction_bias.tolist() for router in routers_of(trainer.model)]
    known["sharded"] = [name for name, p in trainer.model.named_parameters() if isinstance(p, DTensor)]
    return trainer, known


def sharding(how):
    """Arguments for Trainer, made anew: TrainingArguments writes into the dictionary that it is given."""
    return {"fsdp": True, "fsdp_config": dict(FSDP2)} if how == "fsdp2" else {}


def main(folder, base, how):
    """Everything that one launch is for; each rank leaves what it knows in a file."""
    results = {}
    for kind in ("full", "lora"):
        trainer, results[kind] = run(folder / kind, make(kind, base), **sharding(how))
        results[kind]["eval_loss"] = trainer.evaluate()["eval_loss"]
        trainer.save_model(str(folder / kind / "final"))
        checkpoint = str(folder / kind / "checkpoint-2")
        results[f"{kind} resumed"] = run(folder / "again", make(kind, base), checkpoint, **sharding(how))[1]
    if how == "fsdp2":  # gloo sends no FP8: DDP starts with a broadcast of it, a whole file is gathered
        results["fp8"] = run(folder / "fp8", make("fp8", base), save_strategy="no", **sharding(how))[1]
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
