"""The optimizer with bfloat16 moments and the guard rails, under transformers' Trainer."""

import pytest
import torch
from test_fp8_training import SHAPE, trainer

from deepseek_v3.training import AdamWBF16, FP8Recipe, FP8StatisticsCallback, enable_fp8_training
from twins import make_model


def converted(**recipe):
    return enable_fp8_training(make_model(**SHAPE).train(), FP8Recipe(**recipe))


def with_adam(model, folder, steps, callbacks=(), **options):
    made = trainer(model, folder, steps, **options)
    made.optimizer_cls_and_kwargs = (AdamWBF16, {"lr": 1e-3, "betas": (0.9, 0.95)})
    for callback in callbacks:
        made.add_callback(callback)
    return made


def test_updates_are_adamws_with_moments_rounded_at_rest():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(40, 3)), torch.nn.Parameter(torch.randn(7))]
    optimizer = AdamWBF16(parameters, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    want = [p.detach().double() for p in parameters]
    first, second = ([torch.zeros_like(w) for w in want] for _ in range(2))
    for step in range(1, 6):
        for i, parameter in enumerate(parameters):
            parameter.grad = torch.randn_like(parameter) * 10.0 ** (step - 3)
            g = parameter.grad.double()
            m, v = 0.9 * first[i] + 0.1 * g, 0.95 * second[i] + 0.05 * g * g
            direction = (m / (1 - 0.9**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
            want[i] = want[i] * (1 - 1e-2 * 0.1) - 1e-2 * direction
            first[i], second[i] = m.bfloat16().double(), v.bfloat16().double()
        optimizer.step()
    for parameter, expected in zip(parameters, want, strict=True):
        assert (parameter.double() - expected).abs().max() < 2e-5
        assert {optimizer.state[parameter][name].dtype for name in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_buckets_change_nothing(monkeypatch):
    from deepseek_v3.training.fp8 import optimizer as module

    def run():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(9, 5)) for _ in range(4)]
        optimizer = AdamWBF16(parameters)
        for _ in range(3):
            for parameter in parameters:
                parameter.grad = torch.randn_like(parameter)
            optimizer.step()
        return parameters

    whole = run()
    monkeypatch.setattr(module, "BUCKET", 50)
    assert all(torch.equal(a, b) for a, b in zip(whole, run(), strict=True))


@pytest.mark.parametrize("options", [{"lr": -1}, {"betas": (0.9, 1.0)}, {"eps": 0}, {"weight_decay": -0.1}])
def test_values_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        AdamWBF16([torch.nn.Parameter(torch.ones(2))], **options)


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_training_resumes_bit_for_bit_from_any_step(tmp_path, stop):
    whole = with_adam(converted(), tmp_path / "whole", 4)
    whole.args.save_steps = 1
    whole.train()
    assert {group["weight_decay"] for group in whole.optimizer.param_groups} == {0.0}
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    resumed = with_adam(converted(), tmp_path / "resumed", 4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    left, right = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(left[name], right[name]) for name in left)
    for name in ("exp_avg", "exp_avg_sq"):
        assert {state[name].dtype for state in resumed.optimizer.state.values()} == {torch.bfloat16}


def test_lost_numbers_are_logged_at_the_interval(tmp_path):
    training = with_adam(converted(statistics_interval=2), tmp_path, 4, [FP8StatisticsCallback()])
    training.train()
    logged = [{k: v for k, v in e.items() if k.startswith("fp8_")} for e in training.state.log_history if "loss" in e]
    assert [bool(entry) for entry in logged] == [True, False, True, False]
    names = {f"fp8_{kind}_{what}" for kind in ("activation", "gradient", "weight")
             for what in ("underflow", "overflow", "nan")}  # fmt: skip
    assert set(logged[0]) == names
    # Gradients of tokens span more than E4M3's range of 2^18; there are no infinities and no NaN.
    assert 0 < logged[0]["fp8_gradient_underflow"] < 0.2
    assert all(v == 0 for name, v in logged[0].items() if not name.endswith("underflow"))


def test_counts_are_the_numbers_that_became_zero():
    from deepseek_v3.training.fp8.quantise import Statistics, input_codes

    x = torch.ones(2, 128)
    x[0, :3], x[0, 3], x[1, 0] = 1e-6, 0, float("inf")
    statistics = Statistics(active=True)
    input_codes(x, None, statistics)
    counts = statistics.drain()["activation"]
    assert counts["elements"] == 256 and counts["overflow"] == 1 and counts["nan"] == 0
    # An infinity takes the other 127 numbers of its tile with it.
    assert counts["underflow"] == 3 + 127 and not statistics.drain()


def poison_forward(model):
    model.model.layers[1].mlp.shared_experts.down_proj.weight.data[3, 5] = float("nan")
    return "the output of model.layers.1.mlp.shared_experts.down_proj"


def poison_backward(model):
    def spoil(grad):
        return grad * float("nan")

    def hook(module, inputs, output):
        if output.requires_grad:
            output.register_hook(spoil)

    model.model.layers[1].self_attn.o_proj.register_forward_hook(hook)
    return "the gradient to the output of model.layers.1.self_attn.o_proj"


def poison_expert(model):
    moe = model.model.layers[1].mlp
    moe.experts.down_proj.data[3, 0, 7] = float("nan")
    moe.gate.e_score_correction_bias[3] = 50
    return "the output of model.layers.1.mlp.experts"


def poison_norm(model):
    model.model.layers[0].post_attention_layernorm.weight.data[5] = float("inf")
    return "the output of model.layers.0.post_attention_layernorm"


def poison_mtp(model):
    (module,) = model.model.mtp_layers
    module.eh_proj.weight.data[1, 1] = float("nan")
    return "the output of " + next(name for name, found in model.named_modules() if found is module.eh_proj)


def poison_gradient(model):
    """One infinity that no module's output shows; clipping makes zeros of all other gradients."""

    def spoil(grad):
        return grad.index_fill(0, torch.tensor([2]), float("inf"))

    model.model.layers[0].mlp.gate_proj.weight.register_hook(spoil)
    return "the gradient of model.layers.0.mlp.gate_proj.weight"


POISONS = [poison_forward, poison_backward, poison_expert, poison_norm, poison_mtp, poison_gradient]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("poison", POISONS)
def test_a_broken_number_stops_the_training_with_the_layers_name(tmp_path, poison, bf16):
    """Under accumulation; with and without autocast."""
    model = converted()
    training = with_adam(model, tmp_path, 4, [FP8StatisticsCallback()], bf16=bf16)
    name = poison(model)
    before = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(FloatingPointError, match=f"before optimizer step 1: .* first in {name}$"):
        training.train()
    assert torch.equal(model.model.embed_tokens.weight, before)


def test_an_infinite_gradient_is_found_without_clipping_too(tmp_path):
    model = converted()
    training = with_adam(model, tmp_path, 4, [FP8StatisticsCallback()], max_grad_norm=0)
    with pytest.raises(FloatingPointError, match=poison_gradient(model)):
        training.train()


def test_the_callback_wants_an_fp8_model(tmp_path):
    with pytest.raises(ValueError, match="enable_fp8_training"):
        with_adam(make_model(**SHAPE).train(), tmp_path, 1, [FP8StatisticsCallback()]).train()
