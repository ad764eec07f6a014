"""Classes of sequences and tokens, and rewards: trained whole and by LoRA, padded on either side, saved and loaded."""

import pytest
import torch
from adapters import relative
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    Trainer,
    TrainingArguments,
)

from deepseek_v3 import DeepseekV3ForCausalLM, FP8Config, RouterBalanceCallback, lora_target_modules
from deepseek_v3.configuration import preset
from deepseek_v3.training.data import train_tokenizer
from twins import spread_weights

PAD = 2
TASKS = {
    "sequence": (AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 2}),
    "token": (AutoModelForTokenClassification, "TOKEN_CLS", {"num_labels": 3}),
    "reward": (AutoModelForSequenceClassification, "SEQ_CLS", {"num_labels": 1}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A causal model with MTP, in float32 and in FP8."""
    root = tmp_path_factory.mktemp("bases")
    model = spread_weights(DeepseekV3ForCausalLM(preset("tiny", vocab_size=64, num_hidden_layers=2)))
    model.save_pretrained(root / "plain")
    model.save_pretrained(root / "fp8", quantize="fp8")
    return root


def load(folder, task):
    torch.manual_seed(0)
    auto, _, labels = TASKS[task]
    options = {"quantization_config": FP8Config(keep=True)} if folder.name == "fp8" else {}
    return auto.from_pretrained(folder, dtype=torch.float32, pad_token_id=PAD, **labels, **options)


def examples(task, count=64, seed=1):
    """Ids from 3 up. A sequence's class and reward are of its first token, a token's class is of the one before it."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for i in range(count):
        ids = torch.randint(3, 64, (5 + i % 4,), generator=generator)
        ids[0] = 3 + i % 8
        if task == "sequence":
            label = int(ids[0] > 6)
        elif task == "reward":
            label = float(ids[0] > 6)
        else:
            label = [-100, *(ids[:-1] % 3).tolist()]
        rows.append((ids.tolist(), label))
    return rows


def padded(rows, side="right"):
    """Inputs [B, T] and labels of the longest row's length."""
    longest = max(len(ids) for ids, _ in rows)

    def fill(values, filler):
        rest = [filler] * (longest - len(values))
        return values + rest if side == "right" else rest + values

    inputs = {"input_ids": torch.tensor([fill(ids, PAD) for ids, _ in rows])}
    inputs["attention_mask"] = torch.tensor([fill([1] * len(ids), 0) for ids, _ in rows])
    marks = [label for _, label in rows]
    return {**inputs, "labels": torch.tensor([fill(m, -100) if isinstance(m, list) else m for m in marks])}


def train(model, task, folder, side="right", steps=60, rate=5e-3):
    data = padded(examples(task), side)
    rows = Dataset.from_dict({name: tensor.tolist() for name, tensor in data.items()})
    # The rate falls to nothing: where a constant one stops, in mid-swing, is an accident of the order of sums.
    options = {"max_steps": steps, "learning_rate": rate, "lr_scheduler_type": "linear", "logging_steps": 10}
    args = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        **options,
    )
    callbacks = [RouterBalanceCallback(update_rate=0)]
    trainer = Trainer(model=model, args=args, train_dataset=rows, callbacks=callbacks)
    trainer.train()
    return model.eval()


def scores(model, task, side="right"):
    """What the model says of `examples`: logits of their own tokens, without padding."""
    rows = examples(task)
    batch = padded(rows, side)
    batch.pop("labels")
    with torch.no_grad():
        logits = model.eval()(**batch).logits
    return logits[batch["attention_mask"].bool()] if task == "token" else logits


def right(model, task):
    """The share of answers that are right."""
    logits, data = scores(model, task), padded(examples(task))
    if task == "reward":
        return float(((logits[:, 0] > 0.5) == (data["labels"] > 0.5)).float().mean())
    labels = data["labels"][data["attention_mask"].bool()] if task == "token" else data["labels"]
    counted = labels != -100
    return float((logits.argmax(-1) == labels)[counted].float().mean())


@pytest.mark.parametrize(("task", "side"), [(task, "right") for task in TASKS] + [("token", "left")])
def test_the_whole_model_learns_and_comes_back(task, side, folders, tmp_path):
    model = load(folders / "plain", task)
    assert model.config.num_nextn_predict_layers == 0 and len(model.model.layers) == 2
    assert right(model, task) < 0.75
    train(model, task, tmp_path / "run", side)
    assert right(model, task) > 0.9
    model.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved", task)
    assert torch.equal(scores(again, task), scores(model, task))


@pytest.mark.parametrize("base", ["plain", "fp8"])
@pytest.mark.parametrize("task", list(TASKS))
def test_an_adapter_learns_with_the_head_beside_it(task, base, folders, tmp_path):
    start = load(folders / base, task)
    config = LoraConfig(
        task_type=TASKS[task][1],
        r=8,
        lora_alpha=16,
        modules_to_save=["score"],
        **lora_target_modules(start.config, "all"),
    )
    model = get_peft_model(start, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert trained and all(".score.modules_to_save.default." in name for name in trained)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert right(model, task) < 0.7
    train(model, task, tmp_path / "run", rate=1e-2)
    assert right(model, task) > 0.9
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert torch.equal(parameter.view(torch.uint8), frozen[name].view(torch.uint8)), name
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(9)
    again = PeftModel.from_pretrained(load(folders / base, task), tmp_path / "adapter")
    assert torch.equal(scores(again, task), scores(model, task))
    if base == "fp8":
        model.dequantize()
    merged = model.merge_and_unload()
    assert relative(scores(merged, task), scores(again, task).double()) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(scores(load(tmp_path / "merged", task), task), scores(merged, task))


@pytest.mark.parametrize("task", list(TASKS))
def test_padding_on_either_side_changes_no_answer(task, folders):
    model = load(folders / "plain", task)
    alone = []
    for row in examples(task):
        with torch.no_grad():
            logits = model(torch.tensor([row[0]])).logits
        alone.append(logits[0] if task == "token" else logits)
    for side in ("right", "left"):
        assert relative(scores(model, task, side), torch.cat(alone).double()) < 1e-5


def test_trls_reward_trainer_prefers_what_was_chosen(folders, tmp_path):
    from trl import RewardConfig, RewardTrainer

    tokenizer = train_tokenizer(["good bad answer to the question"] * 4, 300)
    torch.manual_seed(0)
    base = spread_weights(DeepseekV3ForCausalLM(preset("tiny", vocab_size=len(tokenizer))))
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", dtype=torch.float32, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    pairs = [{"chosen": f"good {end}", "rejected": f"bad {end}"} for end in ("answer", "question", "to the")] * 4
    options = {"max_steps": 12, "learning_rate": 5e-3, "logging_steps": 1, "use_cpu": True, "report_to": []}
    args = RewardConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=6, bf16=False, save_strategy="no", **options
    )
    trainer = RewardTrainer(model=model, args=args, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.2 < 0.4 < losses[0]
    with torch.no_grad():
        better, worse = (model.eval()(**tokenizer(text, return_tensors="pt")).logits for text in ("good to", "bad to"))
    assert better > worse
