"""What cannot work with adapters is one clear error, before anything is trained or changed."""

import json
from types import SimpleNamespace

import pytest
import torch
from adapters import randomise
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import deepseek_v3
from deepseek_v3 import FP8Config, RouterBalanceCallback, lora_target_modules
from deepseek_v3.cli import main
from deepseek_v3.configuration import preset
from deepseek_v3.conversion import write_checkpoint
from deepseek_v3.training.checks import base_fingerprint, check_base, check_dtypes, save_fingerprint
from deepseek_v3.training.data import train_tokenizer
from deepseek_v3.training.lora import named_targets
from twins import make_model, spread_weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two bases of equal shapes, one of them also in FP8, with a tokenizer and texts."""
    root = tmp_path_factory.mktemp("bases")
    tokenizer = train_tokenizer(["one and one is two"] * 4, 280)
    for seed, name in enumerate(("base", "other")):
        model = deepseek_v3.DeepseekV3ForCausalLM(preset("tiny", vocab_size=len(tokenizer)))
        spread_weights(model, seed).to(torch.bfloat16).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
        if seed == 0:
            model.save_pretrained(root / "fp8", quantize="fp8")
    (root / "data.jsonl").write_text("\n".join([json.dumps({"text": "one and one is two"})] * 8))
    return root


def finetune(folders, base, output, *arguments):
    command = ["finetune", "--model", str(folders / base), "--data", str(folders / "data.jsonl"), "--steps", "1"]
    return main([*command, "--accumulation", "1", "--rank", "2", "--output", str(output), *arguments])


def test_an_adapter_of_another_base_of_equal_shapes_is_refused(folders, tmp_path, capsys):
    assert finetune(folders, "base", tmp_path / "first") == 0
    assert finetune(folders, "base", tmp_path / "more", "--adapter", str(tmp_path / "first")) == 0
    capsys.readouterr()
    assert finetune(folders, "other", tmp_path / "out", "--adapter", str(tmp_path / "first")) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"the adapter {tmp_path / 'first'} is of another base" in error and "fingerprint" in error
    assert not (tmp_path / "out").exists()


def test_peft_leaves_out_no_part_of_an_adapter_in_silence(tmp_path, caplog):
    base = make_model(first_k_dense_replace=1)
    model = randomise(get_peft_model(base, LoraConfig(r=2, **lora_target_modules(base.config, "all"))))
    model.save_pretrained(tmp_path)
    PeftModel.from_pretrained(make_model(first_k_dense_replace=1), tmp_path)
    assert "left out" not in caplog.text
    # One layer more is dense here: its routed and shared experts are not found.
    with pytest.raises(RuntimeError, match=r"the adapter is of another base: .* the first is model\.layers\.1\.mlp\."):
        PeftModel.from_pretrained(make_model(first_k_dense_replace=2), tmp_path)
    caplog.clear()
    PeftModel.from_pretrained(make_model(first_k_dense_replace=1, num_nextn_predict_layers=0), tmp_path)
    assert "weights of the adapter are left out: they are for MTP modules that were not loaded" in caplog.text


def test_a_fingerprint_is_of_the_weights_and_not_of_how_they_are_held(folders, tmp_path):
    def load(name, **options):
        return AutoModelForCausalLM.from_pretrained(folders / name, **options)

    base = load("base", dtype=torch.bfloat16)
    expected = base_fingerprint(base)
    assert len(expected) == 64 and expected != base_fingerprint(load("other"))
    held = [
        load("base", dtype=torch.float32),
        load("fp8", quantization_config=FP8Config(keep=True)),
        load("fp8", quantization_config=FP8Config(keep=False)),
        get_peft_model(
            load("base"), LoraConfig(r=2, modules_to_save=["lm_head"], **lora_target_modules(base.config, "all"))
        ),
    ]
    assert {base_fingerprint(model) for model in held} == {expected}
    save_fingerprint(expected, tmp_path)
    check_base(held[0], tmp_path)
    for name in ("model.norm.weight", "model.embed_tokens.weight", "model.layers.2.mlp.gate.weight", "lm_head.weight"):
        weight = base.state_dict()[name]
        before = weight.clone()
        weight[:1] += 1
        with pytest.raises(ValueError, match="is of another base"):
            check_base(base, tmp_path)
        weight.copy_(before)
    check_base(base, tmp_path)
    check_base(load("other"), folders)  # an adapter of other tools has no fingerprint


@pytest.mark.parametrize("part", ["lm_head", "model.norm", "model.embed_tokens", "model.layers.1.self_attn.o_proj"])
def test_layers_of_two_dtypes_are_named(part, tmp_path):
    base = make_model().to(torch.bfloat16)
    base.get_submodule(part).float()
    with pytest.raises(ValueError, match=r"is torch\.\w+ and model.embed_tokens.weight is torch\.\w+: .*autocast"):
        check_dtypes(base)
    rows = Dataset.from_dict({"input_ids": [[3, 4, 5]] * 4, "labels": [[3, 4, 5]] * 4})

    def train(**options):
        base = make_model().to(torch.bfloat16)
        base.get_submodule(part).float()
        model = get_peft_model(base, LoraConfig(r=2, **lora_target_modules(base.config, "all")))
        args = TrainingArguments(output_dir=tmp_path, max_steps=1, use_cpu=True, report_to=[], **options)
        Trainer(model=model, args=args, train_dataset=rows, callbacks=[RouterBalanceCallback()]).train()

    with pytest.raises(ValueError, match="their products do not mix"):
        train()
    train(bf16=True)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fp8_codes_are_not_cast_by_fsdp(precision, folders):
    base = AutoModelForCausalLM.from_pretrained(folders / "fp8", quantization_config=FP8Config(keep=True))
    model = get_peft_model(base, LoraConfig(r=2, **lora_target_modules(base.config, "all")))
    state = SimpleNamespace(global_step=0)
    args = SimpleNamespace(fsdp=True, bf16=False, fp16=False)
    RouterBalanceCallback().on_train_begin(args, state, None, model=model)
    setattr(args, precision, True)
    with pytest.raises(ValueError, match=r"would cast the FP8 codes.*dtype=torch\.bfloat16"):
        RouterBalanceCallback().on_train_begin(args, state, None, model=model)
    RouterBalanceCallback().on_train_begin(args, state, None, model=make_model())
    args.fsdp = False
    RouterBalanceCallback().on_train_begin(args, state, None, model=model)


def test_adapters_routers_and_codes_bring_dtypes_of_their_own(folders):
    base = AutoModelForCausalLM.from_pretrained(
        folders / "fp8", dtype=torch.bfloat16, quantization_config=FP8Config(keep=True)
    )
    model = get_peft_model(base, LoraConfig(r=2, **lora_target_modules(base.config, "all")))
    for name, module in model.named_modules():
        if name.endswith("mlp.gate"):
            module.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32, torch.bfloat16, torch.float8_e4m3fn}
    check_dtypes(model)
    assert torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all()


@pytest.mark.parametrize("name", ["w1", "mlp.experts.w1", "gate"])
def test_targets_that_match_nothing(name, folders, capsys, tmp_path):
    with pytest.raises(ValueError, match=f"the target '{name}' matches no linear layer and no experts.*o_proj"):
        named_targets(make_model(), ["o_proj", name])
    assert finetune(folders, "base", tmp_path / "out", "--targets", name) == 2
    assert f"the target {name!r} matches no linear layer and no experts" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("which", ["attention", "experts", "all"])
def test_merging_into_fp8_codes(merge, safe, which, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fp8")
    write_checkpoint(preset("tiny"), folder)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=FP8Config(keep=True))
    config = LoraConfig(r=2, **lora_target_modules(base.config, which))
    model = randomise(get_peft_model(base, config)).eval()
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        before = model(tokens).logits
    with pytest.raises(ValueError, match=r"FP8 codes.*model\.dequantize\(\)"):
        getattr(model, merge)(safe_merge=safe)
    with torch.no_grad():
        assert torch.equal(model(tokens).logits, before)
    model.dequantize()
    getattr(model, merge)(safe_merge=safe)
