"""FP8 training of whole models: what stays the same, what is quantised how often, what is kept, the Trainer."""

import copy
import pickle

import pytest
import torch
from test_fp8_products import gradients, layer
from transformers import Trainer, TrainingArguments

from deepseek_v3 import DeepseekV3ForCausalLM, FP8Config
from deepseek_v3.training import FP8Recipe, disable_fp8_training, enable_fp8_training
from deepseek_v3.training.fp8 import weights as weight_codes
from deepseek_v3.training.fp8.enable import fp8_modules
from twins import make_model

SHAPE = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 64}
SHAPE |= {"kv_lora_rank": 64, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture
def small():
    return make_model(**SHAPE).train()


@pytest.fixture
def counted(monkeypatch):
    """How many weights were quantised so far."""
    calls = []
    original = weight_codes.quantize_weight

    def counting(weight, **options):
        calls.append(tuple(weight.shape))
        return original(weight, **options)

    monkeypatch.setattr(weight_codes, "quantize_weight", counting)
    return calls


def loss_of(model, tokens):
    return model(tokens, labels=tokens).loss


def test_state_dict_names_and_values_stay_and_there_is_a_way_back(small, tokens):
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    parameters = [id(p) for p in small.parameters()]
    classes = [type(module) for module in small.modules()]
    plain = small.eval()(tokens).logits
    assert enable_fp8_training(small.train()) is small
    assert [id(p) for p in small.parameters()] == parameters
    after = small.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(small(tokens).logits, plain)
    # In eval() it computes as it did: generation and evaluation see the master weights.
    assert torch.equal(small.eval()(tokens).logits, plain)
    assert disable_fp8_training(small) is small
    assert [type(module) for module in small.modules()] == classes
    assert torch.equal(small(tokens).logits, plain)


def test_exactly_the_reports_modules_are_converted(small):
    enable_fp8_training(small)
    linears = {n.rsplit(".", 1)[-1] for n, m in small.named_modules() if type(m).__name__ == "FP8TrainingLinear"}
    assert linears == {
        "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        "eh_proj",
    }  # fmt: skip
    assert type(small.lm_head) is torch.nn.Linear
    assert {type(m).__name__ for m in small.modules() if "Router" in type(m).__name__} == {"DeepseekV3TopkRouter"}


def test_generation_after_training_is_the_plain_models(small, tokens):
    want = small.eval().generate(tokens, max_new_tokens=6, do_sample=False)
    enable_fp8_training(small.train())
    loss_of(small, tokens).backward()
    assert torch.equal(small.eval().generate(tokens, max_new_tokens=6, do_sample=False), want)


def test_saved_models_load_anywhere(small, tokens, tmp_path):
    enable_fp8_training(small)
    loss_of(small, tokens).backward()
    small.save_pretrained(tmp_path / "plain")
    loaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "plain")
    want = small.eval().state_dict()
    assert all(torch.equal(tensor, want[name]) for name, tensor in loaded.state_dict().items())
    small.save_pretrained(tmp_path / "fp8", quantize="fp8")
    kept = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "fp8", quantization_config=FP8Config(keep=True))
    assert kept.model.layers[0].mlp.up_proj.weight.dtype == torch.float8_e4m3fn
    with pytest.raises(ValueError, match=r"keep=False"):
        enable_fp8_training(kept)


def test_weights_are_quantised_once_an_optimizer_step(small, tokens, counted):
    enable_fp8_training(small)
    optimizer = torch.optim.SGD(small.parameters(), lr=1e-3)
    small.gradient_checkpointing_enable()
    for _ in range(3):
        loss_of(small, tokens).backward()
    first = len(counted)
    # q_a, q_b, kv_a, kv_b, o; dense: gate with up, down; MoE: the same of the shared expert, and two stacks.
    layers = 3  # one dense, one MoE, the MTP module with eh_proj
    assert first == 5 * layers + 2 + 4 + 4 + 1
    optimizer.step()
    loss_of(small, tokens).backward()
    assert len(counted) == 2 * first


class Pointer(torch.optim.Optimizer):
    """Writes through `.data`, which leaves the version of a parameter as it was."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


def test_codes_follow_the_weights_however_they_change(counted):
    linear = layer(0, FP8Recipe()).mlp.down_proj
    x = torch.randn(8, 384)
    first = linear(x)
    assert torch.equal(linear(x), first) and len(counted) == 1
    version = linear.weight._version
    Pointer([linear.weight]).step()
    assert linear.weight._version == version
    assert torch.equal(linear(x), first / 2)
    with torch.no_grad():
        linear.weight.mul_(2)
    assert torch.equal(linear(x), first)
    linear.load_state_dict({"weight": linear.weight.detach() / 4})
    assert torch.equal(linear(x), first / 4)
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 4)
    assert torch.equal(linear(x), first)
    assert len(counted) == 5


@pytest.mark.parametrize("change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.to("cpu")])
def test_codes_are_dropped_by_copies_pickles_and_moves(small, tokens, change, counted):
    enable_fp8_training(small)
    want = loss_of(small, tokens)
    assert any(module.fp8.codes._kept for module in fp8_modules(small))
    other = change(small)
    assert not any(module.fp8.codes._kept for module in fp8_modules(other))
    before = len(counted)
    assert torch.equal(loss_of(other, tokens), want) and len(counted) == 2 * before


def saved_bytes(block, x):
    """Bytes of all tensors that autograd holds, each memory once, parameters aside."""
    own = {parameter.data_ptr() for parameter in block.parameters()}
    found = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        block(x, position_embeddings=block.rotary(x, torch.arange(x.shape[1])[None]))
    return sum(size for size, _ in found.values())


def held_by_notes(monkeypatch):
    """Bytes that the attention's notes hold: what it saved inside its own hooks, which hide it from others."""
    from deepseek_v3.training.fp8 import attention

    made = []
    original = attention.Notes.close

    def closing(self, output):
        made.extend(self._kept)
        return original(self, output)

    monkeypatch.setattr(attention.Notes, "close", closing)

    def size():
        tensors = [kept.tensor for kept in made if kept.tensor is not None]
        made.clear()
        return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())

    return size


@pytest.mark.parametrize("index", [0, 1])
def test_a_block_keeps_at_most_065_of_what_bfloat16_keeps(index, monkeypatch):
    x = torch.randn(1, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    plain = saved_bytes(layer(index, dtype=torch.bfloat16), x)
    held = held_by_notes(monkeypatch)
    converted = saved_bytes(layer(index, FP8Recipe(), dtype=torch.bfloat16), x)
    inside = held()
    assert inside and converted + inside <= 0.65 * plain, (converted + inside) / plain


def test_each_saving_saves(monkeypatch):
    x = torch.randn(1, 256, 256, dtype=torch.bfloat16, requires_grad=True)
    held = held_by_notes(monkeypatch)

    def kept(**options):
        block = layer(0, FP8Recipe(**options), dtype=torch.bfloat16, v_head_dim=96)
        return saved_bytes(block, x) + held()

    usual = kept()
    assert kept(recompute_up_projections=True) < usual
    for option in ({"swiglu_inputs": "input_dtype"}, {"attention_output": "input_dtype"}, {"recompute_norms": False}):
        assert kept(**option) > usual, option


@pytest.mark.parametrize("heads_first", [False, True])
def test_the_attention_reads_its_output_from_the_packed_one(heads_first, monkeypatch):
    """To the rounding of E5M6, whatever memory layout the attention gives its output."""
    from deepseek_v3.modeling_deepseek_v3 import attention

    def attend(module, q, k, v, mask, scaling, **kwargs):
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2)
        assert "FlashAttention" in out.grad_fn.next_functions[0][0].name()
        return (
            out.transpose(1, 2).contiguous().transpose(1, 2).contiguous() if heads_first else out.contiguous()
        ), None

    monkeypatch.setattr(attention.ALL_ATTENTION_FUNCTIONS, "get_interface", lambda *_: attend)
    x, dy = torch.randn(1, 64, 256), torch.randn(1, 64, 256)
    exact, packed = (
        gradients(layer(0, FP8Recipe(attention_output=kind), v_head_dim=96), x, dy) for kind in ("input_dtype", "e5m6")
    )
    assert torch.equal(exact["output"], packed["output"])
    # Of o_proj's gradient the rounding of one operand to E4M3 goes away; the others see E5M6's alone.
    for name, bound in (("self_attn.o_proj.weight", 0.06), ("self_attn.q_b_proj.weight", 0.03), ("input", 0.01)):
        difference = (exact[name] - packed[name]).norm() / exact[name].norm()
        assert 0 < difference < bound, f"{name} {difference}"


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_recomputed_queries_keys_and_values_are_the_same_bits(index, implementation):
    x, dy = torch.randn(1, 64, 256), torch.randn(1, 64, 256)
    found = []
    for again in (True, False):
        recipe = FP8Recipe(recompute_up_projections=again, attention_output="input_dtype")
        block = layer(index, recipe)
        block.self_attn.config._attn_implementation = implementation
        found.append(gradients(block, x, dy))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("recipe", [FP8Recipe(), FP8Recipe(scale_fmt="ue8m0")])
def test_gradient_checkpointing_changes_no_bit(recipe, tokens):
    recipe = FP8Recipe(scale_fmt=recipe.scale_fmt, attention_output="input_dtype")
    found = []
    for checkpointing in (False, True):
        model = enable_fp8_training(make_model(**SHAPE).train(), recipe)
        if checkpointing:
            model.gradient_checkpointing_enable()
        loss = loss_of(model, tokens)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_autocast_over_float32_master_weights(small, tokens):
    enable_fp8_training(small)
    exact = loss_of(small, tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(small, tokens)
    loss.backward()
    assert abs(loss - exact) < 0.05 * exact
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in small.parameters())


def test_adapters_learn_over_a_frozen_base_in_fp8(small, tokens):
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(small, LoraConfig(target_modules=["q_b_proj", "o_proj"], r=4))
    enable_fp8_training(wrapped)
    loss_of(wrapped, tokens).backward()
    grads = {name: p.grad is not None for name, p in wrapped.named_parameters()}
    assert all(found == ("lora_" in name) for name, found in grads.items()) and any(grads.values())


def test_weights_that_are_made_anew_each_forward_leave_no_codes_behind(small, tokens, counted):
    """Adapters on the experts' parameters: a sum for every forward, quantised for it, and dropped for the next."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(small, LoraConfig(target_modules=[], target_parameters=["experts.gate_up_proj"], r=4))
    enable_fp8_training(wrapped)
    kept = [torch.empty(8 + i) for i in range(3)]  # so that addresses differ
    for _ in range(4):
        loss_of(wrapped, tokens).backward()
        kept.append(torch.empty(1000))
    assert max(len(module.fp8.codes._kept) for module in fp8_modules(wrapped)) == 2
    stacks = [shape for shape in counted if len(shape) == 3]
    assert len(stacks) == 2 * (4 + 1)  # of two routed layers: gate and up each time, down once


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"scale_fmt": "e4m3"}, "scale_fmt"),
        ({"wgrad_dtype": "float16"}, "wgrad_dtype"),
        ({"swiglu_inputs": "bf16"}, "swiglu_inputs"),
        ({"attention_output": None}, "attention_output"),
        ({"recompute_norms": 1}, "recompute_norms"),
        ({"statistics_interval": -1}, "statistics_interval"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(options, name):
    with pytest.raises(ValueError, match=name):
        FP8Recipe(**options)


def test_what_cannot_be_converted_is_refused(small):
    with pytest.raises(ValueError, match="no DeepSeek-V3 layer"):
        enable_fp8_training(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="not in FP8 training"):
        disable_fp8_training(small)
    with pytest.raises(ValueError, match="FP8Recipe"):
        enable_fp8_training(small, {"scale_fmt": None})
    enable_fp8_training(small)
    with pytest.raises(ValueError, match="already"):
        enable_fp8_training(small)


def trainer(model, tmp_path, steps, **options):
    rows = torch.randint(3, 512, (4, 16), generator=torch.Generator().manual_seed(1)).tolist()
    data = [{"input_ids": row, "labels": row} for row in rows]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=steps, per_device_train_batch_size=2, gradient_accumulation_steps=2, logging_steps=1,
        learning_rate=1e-3, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, seed=3, **options,
    )  # fmt: skip
    return Trainer(model, arguments, train_dataset=data)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_learns_and_resumes_bit_for_bit(tmp_path, bf16):
    def fresh():
        return enable_fp8_training(make_model(**SHAPE).train())

    options = {"gradient_checkpointing": True, "bf16": bf16}
    whole = trainer(fresh(), tmp_path / "whole", 4, **options)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    resumed = trainer(fresh(), tmp_path / "resumed", 4, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
