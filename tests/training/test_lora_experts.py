"""LoRA on the routed experts: the factors multiply beside the stack, whatever it is held in, and what BF16 loses."""

import gc
import weakref

import pytest
import torch
from adapters import adapters, beside, change, float64_twin, randomise, reference, relative
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import layer as peft_layer
from test_lora_packed import float64_twin as packed_twin
from test_lora_packed import folder, load
from transformers import AutoModelForCausalLM

from deepseek_v3 import FP8Config, lora_target_modules
from deepseek_v3.modeling_deepseek_v3 import moe
from deepseek_v3.quantization import adapted as adapted_module
from deepseek_v3.quantization import bnb_experts, experts
from twins import make_model

__all__ = ["folder"]  # a fixture
TOKENS = torch.randint(3, 512, (2, 12), generator=torch.Generator().manual_seed(3))
STACKS = ("gate_up_proj", "down_proj")


def adapted(base, **kwargs):
    config = LoraConfig(r=4, lora_alpha=8, **lora_target_modules(base.config, "experts"), **kwargs)
    return randomise(get_peft_model(base, config))


@pytest.fixture
def sums(monkeypatch):
    """Shapes of stacks that a change was added to for somebody who read them, and of whole changes to experts.

    PEFT itself has the sum made once where it registers a parametrisation, looks at its shape, and drops it.
    """
    seen, registering = [], []
    register = torch.nn.utils.parametrize.register_parametrization

    def noted(*args, **kwargs):
        registering.append(True)
        try:
            return register(*args, **kwargs)
        finally:
            registering.pop()

    monkeypatch.setattr(torch.nn.utils.parametrize, "register_parametrization", noted)
    for proxy in (peft_layer._LoraFactorsProxy, peft_layer._LoraParameterProxy):

        def forward(self, stack, add=proxy.forward):
            seen.extend([] if registering else [tuple(stack.shape)])
            return add(self, stack)

        monkeypatch.setattr(proxy, "forward", forward)

    def whole(wrapper, adapter, change=peft_layer.ParamWrapper.get_delta_weight):
        seen.extend([tuple(wrapper.get_param().shape)] if wrapper.num_experts > 1 else [])
        return change(wrapper, adapter)

    monkeypatch.setattr(peft_layer.ParamWrapper, "get_delta_weight", whole)
    return seen


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "deepseek_v3"])
def test_no_sum_of_a_stacks_size_is_made(implementation, sums):
    base = make_model()
    twin, model = float64_twin(base), adapted(base)
    expected, leaves = reference(model, twin, TOKENS, labels=TOKENS)
    expected.loss.backward()
    base.set_experts_implementation(implementation)
    model(TOKENS, labels=TOKENS).loss.backward()
    for name, (a, b, _) in adapters(model).items():
        for parameter, leaf in zip((a, b), leaves[name], strict=True):
            assert relative(parameter.grad, leaf.grad) < 1e-5, name
    model.eval().generate(TOKENS[:, :4], max_new_tokens=3, do_sample=False, use_mtp=True)
    assert not sums


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    """Experts of a width with block grids of their own, in FP8."""
    folder = tmp_path_factory.mktemp("fp8")
    make_model(moe_intermediate_size=144).to(torch.bfloat16).save_pretrained(folder, quantize="fp8")
    return folder


def held_as(form, folder, fp8):
    """A base in float32, whatever its experts are held in, and its float64 twin."""
    if form == "fp8":
        keep = FP8Config(keep=True, compute="weight_only")
        base = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32, quantization_config=keep).eval()
    else:
        base = load(folder) if form == "nf4" else make_model()
    return base, packed_twin(base) if form == "nf4" else float64_twin(base)


@pytest.mark.parametrize("form", ["float32", "nf4", "fp8"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_adapters_at_once_multiply_beside_the_stack(form, checkpointing, folder, fp8, sums):
    base, twin = held_as(form, folder, fp8)
    model = adapted(base)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=5, **lora_target_modules(base.config, "experts")))
    randomise(model, seed=1)
    model.base_model.set_adapter(["default", "other"])
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
    weights, leaves = dict(twin.state_dict()), {}
    for adapter in ("default", "other"):
        for name, (a, b, scaling) in adapters(model, adapter).items():
            leaves[adapter, name] = [t.detach().double().requires_grad_() for t in (a, b)]
            weights[name] = weights[name] + change(*leaves[adapter, name], scaling, weights[name])
    expected = torch.func.functional_call(twin, weights, (TOKENS,), {"labels": TOKENS})
    expected.loss.backward()
    output = model(TOKENS, labels=TOKENS)
    output.loss.backward()
    assert relative(output.logits, expected.logits) < 1e-5 and not sums
    assert len(leaves) == 12
    for (adapter, name), leaf in leaves.items():
        for parameter, exact in zip(adapters(model, adapter)[name][:2], leaf, strict=True):
            assert exact.grad.abs().max() > 0 and relative(parameter.grad, exact.grad) < 1e-5, name


@pytest.mark.parametrize("form", ["float32", "nf4", "fp8"])
def test_wrappers_that_must_be_called_are(form, folder, fp8, sums):
    """Somebody's hook sees its module called, and PEFT's own way gives what factors beside the stack give."""
    base, _ = held_as(form, folder, fp8)
    model = adapted(base).eval()
    with torch.no_grad():
        beside = model(TOKENS).logits
        assert not sums
        seen = []
        wrapper = base.model.layers[1].mlp.experts
        wrapper.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        assert relative(model(TOKENS).logits, beside.double()) < 1e-5
        assert seen == [(24, 64)] and (form == "nf4" or sums)
        with model.disable_adapter():
            plain = model(TOKENS).logits
    assert relative(plain, beside.double()) > 1e-2 and len(seen) == 2
    assert relative(model(TOKENS, labels=TOKENS).logits, beside.double()) < 1e-5


def test_a_stack_that_learns_itself_gets_its_gradient(sums):
    model = adapted(make_model())
    stack = model.get_base_model().model.layers[1].mlp.experts.get_base_layer().down_proj
    stack.requires_grad_()
    model(TOKENS, labels=TOKENS).loss.backward()
    assert tuple(stack.shape) in sums and stack.grad.abs().max() > 0


@pytest.mark.parametrize("target", STACKS)
def test_one_of_two_stacks(target):
    base = make_model()
    twin = float64_twin(base)
    config = LoraConfig(r=4, lora_alpha=8, target_parameters=[f"mlp.experts.{target}"])
    model = randomise(get_peft_model(base, config))
    assert all(name.endswith(target) for name in adapters(model))
    with torch.no_grad():
        expected = reference(model, twin, TOKENS)[0]
        assert relative(model(TOKENS).logits, expected.logits) < 1e-5
        assert relative(twin(TOKENS).logits, expected.logits) > 1e-2


def test_compiled(sums):
    layer = adapted(make_model()).eval().get_base_model().model.layers[1].mlp
    x = torch.randn(2, 6, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer(x)
        assert relative(torch.compile(layer, backend="eager")(x), expected.double()) < 1e-5
    assert not sums


def one_layer(folder, held):
    """A layer's experts, the dtype of their tokens, and their stacks in float64."""
    if held == "nf4":
        experts = load(folder, 4, torch.bfloat16).model.layers[1].mlp.experts
        return experts, torch.bfloat16, {name: experts.widened(name, torch.bfloat16).double() for name in STACKS}
    experts = make_model().model.layers[1].mlp.experts.requires_grad_(False)
    experts = experts.float() if held == "autocast" else experts.to(torch.bfloat16)
    dtype = torch.float32 if held == "autocast" else torch.bfloat16
    return experts, dtype, {name: getattr(experts, name).detach().double() for name in STACKS}


def errors(model, stacks, dtype, seed):
    """Relative errors of the output and of every gradient, for new factors and tokens."""
    experts, generator = model.base_model.model["experts"], torch.Generator().manual_seed(seed)
    randomise(model, seed, size=0.1)
    x = torch.randn(5, 64, generator=generator).to(torch.bfloat16).to(dtype).requires_grad_()
    index = torch.rand(5, 8, generator=generator).topk(2).indices
    weights, given = torch.rand(5, 2, generator=generator), torch.randn(5, 64, generator=generator)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.float32):
        result = beside(experts, x, index, weights)
    (result.float() * given).sum().backward()
    pairs = adapters(model)
    leaves = {name: [t.detach().double().requires_grad_() for t in pair[:2]] for name, pair in pairs.items()}
    wide = {name: stack + change(*leaves[f"experts.{name}"], 2.0, stack) for name, stack in stacks.items()}
    exact = x.detach().double().requires_grad_()
    gate, up = torch.einsum("td,tknd->tkn", exact, wide["gate_up_proj"][index]).chunk(2, dim=-1)
    out = torch.einsum("tkf,tkdf->tkd", torch.nn.functional.silu(gate) * up, wide["down_proj"][index])
    expected = (weights[..., None].double() * out).sum(1)
    (expected * given).sum().backward()
    found = [relative(result, expected), relative(x.grad, exact.grad)]
    for name, pair in pairs.items():
        found += [relative(p.grad, leaf.grad) for p, leaf in zip(pair[:2], leaves[name], strict=True)]
    return found


@pytest.mark.parametrize(
    # measured: means of 0.47, 0.50 and 0.54 percent, worst 0.7, 1.0 and 1.5. With factors and what they give rounded
    # to BF16 too the mean is 0.8; over a BF16 stack PEFT rounds the factors before anybody sees them.
    ("held", "mean", "worst"),
    [("nf4", 6e-3, 1.2e-2), ("autocast", 6e-3, 1.5e-2), ("bf16", 6.5e-3, 2e-2)],
)
def test_what_bf16_loses(held, mean, worst, folder, sums):
    experts, dtype, stacks = one_layer(folder, held)
    targets = [f"experts.{name}" for name in STACKS]
    model = get_peft_model(
        torch.nn.ModuleDict({"experts": experts}), LoraConfig(r=4, lora_alpha=8, target_parameters=targets)
    )
    found = torch.tensor([errors(model, stacks, dtype, seed) for seed in range(20)])
    assert found.shape == (20, 6) and not sums
    assert found.mean() < mean and found.max() < worst
    if held == "bf16":
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(globals(), "beside", lambda wrapper, *arguments: wrapper(*arguments))
            theirs = torch.tensor([errors(model, stacks, dtype, seed) for seed in range(20)])
        assert found.mean() < theirs.mean() and sums


@pytest.mark.parametrize("form", ["float32", "nf4", "fp8"])
def test_under_checkpointing_no_rows_are_kept_for_the_gradient(form, folder, fp8, monkeypatch):
    """What a product keeps beside its saved tensors is out of checkpointing's reach, and would stay for each layer."""
    model = adapted(held_as(form, folder, fp8)[0]).train()
    model.activation_checkpointing_enable({"use_reentrant": False})
    kept, product = [], adapted_module.frozen_product

    def watched(rows, *arguments):
        kept.append(weakref.ref(rows.untyped_storage()))
        return product(rows, *arguments)

    for module in (adapted_module, bnb_experts, experts, moe):
        if hasattr(module, "frozen_product"):
            monkeypatch.setattr(module, "frozen_product", watched)
    loss = model(TOKENS, labels=TOKENS).loss
    gc.collect()
    assert len(kept) == 6 and all(storage() is None for storage in kept)
    loss.backward()
    assert len(kept) == 12
