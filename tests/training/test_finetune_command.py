"""`deepseek-v3 finetune` as a user types it: adapters, whole models, merged folders, and bad input."""

import importlib.util
import json

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import deepseek_v3
from deepseek_v3.cli import main
from deepseek_v3.configuration import preset
from deepseek_v3.quantization import BnbExperts
from deepseek_v3.training.balance import load_router_bias, routers_of
from deepseek_v3.training.data import train_tokenizer
from deepseek_v3.training.finetune import FinetuneSettings, load_base, with_adapter
from deepseek_v3.training.finetune_data import encode_chat
from twins import spread_weights

WORDS = ["two and two is four", "one and one is two", "three and one is four"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)
SHORT = ["--steps", "6", "--accumulation", "1", "--batch", "4", "--max-length", "48", "--learning-rate", "2e-2"]
SHORT += ["--warmup", "1", "--no-packing", "--rank", "4", "--alpha", "8"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model of sizes that 4-bit takes, in BF16 and FP8, with a tokenizer; and conversations."""
    root = tmp_path_factory.mktemp("finetune")
    tokenizer = train_tokenizer([*WORDS, "user: assistant:"] * 4, 300)
    tokenizer.chat_template = TEMPLATE
    sizes = {"q_lora_rank": 64, "qk_rope_head_dim": 32, "vocab_size": len(tokenizer)}
    model = deepseek_v3.DeepseekV3ForCausalLM(preset("tiny", **sizes))
    spread_weights(model).to(torch.bfloat16).save_pretrained(root / "bf16")
    model.save_pretrained(root / "fp8", quantize="fp8")
    for name in ("bf16", "fp8"):
        tokenizer.save_pretrained(root / name)
    rows = []
    for i in range(24):
        question, _, answer = WORDS[i % 3].partition(" is ")
        rows.append({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
    (root / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "asked.jsonl").write_text("\n".join(json.dumps({"messages": row["messages"][:1]}) for row in rows))
    (root / "wrong.jsonl").write_text('{"question": "x", "reply": "y"}')
    return root


def run(folders, output, *arguments, base="bf16", data="chat.jsonl"):
    command = ["finetune", "--model", str(folders / base), "--data", str(folders / data), "--output", str(output)]
    return main([*command, *SHORT, *arguments])


def logits(model, tokenizer):
    encoded = tokenizer(WORDS[0], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.eval()(encoded).logits.double()


def close(one, two):
    """Cosine at the median token: rounding sends some tokens to other experts, on each processor others."""
    return torch.cosine_similarity(one, two, dim=-1).median()


@pytest.mark.parametrize(
    ("base", "method"),
    [("bf16", "lora"), ("fp8", "lora"), ("bf16", "qlora"), ("fp8", "qlora")],
    ids=lambda value: value,
)
@pytest.mark.parametrize("merge", ["bf16", "fp8"])
def test_an_adapter_with_card_summary_and_plot_is_left_and_merged(base, method, merge, folders, tmp_path, capsys):
    assert run(folders, tmp_path, "--method", method, "--merge", merge, base=base) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["last_loss"] < summary["first_loss"] - 0.3 and summary["mtp_loss"] > 0
    assert summary["rows"] == 24 and 0 < summary["learnt_tokens"] < summary["tokens"]
    assert 0 < summary["trained_parameters"] < summary["parameters"] and summary["steps"] == 6
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: "peft"\nbase_model: ') and "PeftModel.from_pretrained" in card
    assert str(folders / base) == PeftConfig.from_pretrained(tmp_path).base_model_name_or_path
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    start = AutoModelForCausalLM.from_pretrained(folders / base)
    before = logits(start, tokenizer)
    adapted = logits(PeftModel.from_pretrained(start, tmp_path), tokenizer)
    merged = logits(
        AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), AutoTokenizer.from_pretrained(tmp_path / "merged")
    )
    assert close(before, adapted) < 0.9
    assert close(adapted, merged) > {"bf16": 0.999, "fp8": 0.98}[merge]
    quantization = json.loads((tmp_path / "merged" / "config.json").read_text()).get("quantization_config")
    assert (quantization or {}).get("quant_method") == ("fp8" if merge == "fp8" else None)
    assert ("rounding" in summary) == (merge == "fp8")
    if merge == "fp8":
        # The router, norms, embedding and head are no FP8 weights; every other one was adapted.
        assert "were changed and quantised again" in summary["rounding"] and "of the change survived" in card
    with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert {"model.layers.2.mlp.experts.7.up_proj.weight", "model.layers.3.eh_proj.weight"} <= names


def test_the_whole_model_is_trained_packed_from_a_stream(folders, tmp_path):
    assert run(folders, tmp_path, "--method", "full", "--stream", "--learning-rate", "1e-2", base="fp8") == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["last_loss"] < summary["first_loss"] - 0.3
    assert summary["trained_parameters"] == summary["parameters"] and "rows" not in summary
    assert "AutoModelForCausalLM.from_pretrained" in (tmp_path / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.dtype == torch.float32 and model.config.num_nextn_predict_layers == 1


def test_moved_router_biases_go_with_the_adapter_and_into_the_merged_model(folders, tmp_path):
    assert run(folders, tmp_path, "--router-bias-rate", "0.01", "--targets", "attention", "--merge", "bf16") == 0
    base = AutoModelForCausalLM.from_pretrained(folders / "bf16")
    before = [router.e_score_correction_bias.clone() for router in routers_of(base)]
    load_router_bias(base, tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    for start, one, two in zip(before, routers_of(base), routers_of(merged), strict=True):
        assert (one.e_score_correction_bias - start).abs().max() > 0.03
        assert torch.equal(one.e_score_correction_bias, two.e_score_correction_bias)
    assert "load_router_bias(model" in (tmp_path / "README.md").read_text()


def test_it_resumes_and_goes_on_with_an_adapter(folders, tmp_path, capsys):
    assert run(folders, tmp_path / "whole", "--save-steps", "3") == 0
    whole = json.loads((tmp_path / "whole" / "summary.json").read_text())
    again = tmp_path / "again"
    again.mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(again / "checkpoint-3")
    half = again / "checkpoint-4"  # what a killed run may leave
    half.mkdir()
    (half / "adapter_config.json").write_text("{}")
    assert run(folders, again, "--resume") == 0
    assert "checkpoint-4 is half written (no trainer_state.json): passed over" in capsys.readouterr().out
    assert json.loads((again / "summary.json").read_text())["last_loss"] == whole["last_loss"]
    assert run(folders, tmp_path / "more", "--adapter", str(again)) == 0
    more = json.loads((tmp_path / "more" / "summary.json").read_text())
    assert more["first_loss"] < whole["first_loss"] - 0.2


def test_nothing_to_resume_is_an_error(folders, tmp_path, capsys):
    assert run(folders, tmp_path / "new", "--resume") == 2
    assert "holds no complete checkpoint to resume from" in capsys.readouterr().err


def test_what_is_not_learnt_is_measured_before_and_after(folders, tmp_path, capsys):
    messages = [{"role": "user", "content": "three and one"}, {"role": "assistant", "content": "four"}]
    (tmp_path / "held.jsonl").write_text(json.dumps({"messages": messages}))
    assert run(folders, tmp_path / "out", "--eval-data", str(tmp_path / "held.jsonl")) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["last_eval_loss"] < summary["first_eval_loss"] - 0.1
    # Before any step it is the base's loss.
    tokenizer = AutoTokenizer.from_pretrained(folders / "bf16")
    row = encode_chat(messages, tokenizer)
    base = AutoModelForCausalLM.from_pretrained(folders / "bf16").eval()
    with torch.no_grad():
        expected = base(**{name: torch.tensor([values]) for name, values in row.items()}).loss
    assert summary["first_eval_loss"] == pytest.approx(float(expected), rel=1e-2)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the eval loss is on held.jsonl, which was not learnt" in card and "nothing else was" not in card
    plain = tmp_path / "plain"
    assert run(folders, plain) == 0
    assert (plain / "loss.png").read_bytes() != (tmp_path / "out" / "loss.png").read_bytes()
    assert json.loads((plain / "summary.json").read_text())["last_loss"] == summary["last_loss"]
    (tmp_path / "held.jsonl").write_text(json.dumps({"question": "x"}))
    assert run(folders, tmp_path / "no", "--eval-data", str(tmp_path / "held.jsonl")) == 2
    assert "--eval-data" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("stream", [[], ["--stream"]], ids=["whole", "stream"])
def test_long_documents_are_told_of(stream, folders, tmp_path, capsys):
    options = ["--max-length", "12", "--steps", "8", *stream]
    assert run(folders, tmp_path / "cut", *options) == 0
    said = capsys.readouterr().out
    cut = json.loads((tmp_path / "cut" / "summary.json").read_text())
    assert cut["long_documents"] > 0 and cut["documents"] >= 24
    told = f"{cut['long_documents']} of {cut['documents']} documents are longer than 12 tokens and were cut"
    assert told in said and "--long-documents split" in said
    assert run(folders, tmp_path / "split", *options, "--long-documents", "split") == 0
    assert "were cut" not in capsys.readouterr().out
    split = json.loads((tmp_path / "split" / "summary.json").read_text())
    assert split["long_documents"] > 0
    if not stream:
        assert split["learnt_tokens"] > cut["learnt_tokens"]


def test_named_targets_are_what_is_adapted(folders, tmp_path):
    assert run(folders, tmp_path, "--targets", "o_proj", "shared_experts.up_proj", "experts.down_proj") == 0
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        owners = {name.partition(".layers.")[2].partition(".lora_")[0].partition(".")[2] for name in file.keys()}
    assert owners == {"self_attn.o_proj", "mlp.shared_experts.up_proj", "mlp.experts"}


@pytest.mark.parametrize(
    ("arguments", "data", "message"),
    [
        ([], "asked.jsonl", "every label is masked"),
        ([], "wrong.jsonl", "columns 'question', 'reply'; needed is 'messages'"),
        ([], "nowhere.jsonl", "nowhere.jsonl does not exist"),
        (["--targets", "gate"], "chat.jsonl", "the target 'gate' matches no linear layer and no experts"),
        (["--targets", "o_proj", "w1"], "chat.jsonl", "the target 'w1' matches no linear"),
        (["--method", "dpo"], "chat.jsonl", "method = 'dpo': choose lora or qlora or full"),
        (["--long-documents", "drop"], "chat.jsonl", "long_documents = 'drop': choose cut or split"),
        (["--eval-data", "nowhere.jsonl"], "chat.jsonl", "nowhere.jsonl does not exist"),
        (["--merge", "int4"], "chat.jsonl", "merge = 'int4': choose bf16 or fp8"),
        (["--method", "full", "--targets", "all"], "chat.jsonl", "'full' trains every weight"),
        (["--adapter", "nowhere"], "chat.jsonl", "nowhere is no adapter folder"),
        (["--stream", "--steps", "0"], "chat.jsonl", "give --steps with --stream"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, data, message, folders, tmp_path, capsys):
    assert run(folders, tmp_path / "out", *arguments, data=data) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_qlora_adapts_the_packed_experts(folders, tmp_path):
    settings = FinetuneSettings(str(folders / "fp8"), [], str(tmp_path), method="qlora")
    base = load_base(settings)
    packed = [name for name, module in base.named_modules() if isinstance(module, BnbExperts)]
    assert packed == [f"model.layers.{layer}.mlp.experts" for layer in (1, 2, 3)]
    learnt = {name for name, weight in with_adapter(base, settings).named_parameters() if weight.requires_grad}
    assert all(sum(f"{name}." in weight for weight in learnt) == 4 for name in packed)
    assert sum("self_attn.o_proj" in weight for weight in learnt) == 8


def test_qlora_without_bitsandbytes_is_refused(folders, tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else found(name))
    assert run(folders, tmp_path / "out", "--method", "qlora") == 2
    assert "pip install bitsandbytes" in capsys.readouterr().err.strip().splitlines()[-1]


def test_an_adapter_of_another_base_is_refused(folders, tmp_path, capsys):
    assert run(folders, tmp_path / "first", "--steps", "1") == 0
    other = spread_weights(deepseek_v3.DeepseekV3ForCausalLM(preset("tiny", hidden_size=96)))
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(folders / "bf16").save_pretrained(tmp_path / "other")
    command = ["finetune", "--model", str(tmp_path / "other"), "--data", str(folders / "chat.jsonl"), *SHORT]
    assert main([*command, "--output", str(tmp_path / "out"), "--adapter", str(tmp_path / "first")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"is of another base ({folders / 'bf16'})" in error and "has shape" in error
