"""Router, permutation, grouped products and the experts' forward, each against loops in float64 written here."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from deepseek_v3.kernels import (
    combine_pairs,
    experts_forward,
    experts_step,
    gather_pairs,
    grouped_gemm,
    grouped_wgrad,
    is_step,
    route,
    sort_pairs,
)

# Rows by expert: empty first, middle and last groups; one row; ragged tiles; everything with one expert.
GROUPS = {
    "ragged": [0, 1, 63, 0, 129, 7, 0],
    "all to one": [0, 0, 127, 0],
    "one expert": [33],
    "nothing": [0, 0],
    "three and dead rows": [5, 0, 20],
}


def offsets_of(sizes, device):
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int().to(device)


def rounding(dtype):
    return {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def assert_close(got, truth, dtype, factor=1.0):
    """Within ``factor`` roundings of the dtype, relative to the largest element of the truth."""
    assert got.isfinite().all()
    assert (got.cpu().double() - truth).abs().max() <= factor * rounding(dtype) * max(truth.abs().max(), 1e-30)


def chosen(scores, bias, groups, kept, top_k):
    """Indices by sorting python tuples: larger first, then the lower index."""
    out = []
    for row in scores.tolist():
        sel = [s + b for s, b in zip(row, bias, strict=True)]
        size = len(sel) // groups
        strength = [sum(sorted(sel[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
        keep = sorted(range(groups), key=lambda g: (-strength[g], g))[:kept]
        open_to = [i for g in keep for i in range(g * size, (g + 1) * size)] if groups > 1 else range(len(sel))
        out.append(sorted(open_to, key=lambda i: (-sel[i], i))[:top_k])
    return torch.tensor(out)


@pytest.mark.parametrize(
    "tokens, experts, groups, kept, top_k, shift",
    [
        (1, 8, 1, 1, 2, 0.0),
        (5, 256, 8, 4, 8, 0.0),
        (33, 64, 4, 2, 6, -5.0),
        (3, 24, 3, 2, 5, -5.0),
        (7, 6, 1, 1, 6, 0.0),
    ],
)
def test_route(target, tokens, experts, groups, kept, top_k, shift):
    logits = torch.randn(tokens, experts + 3)[:, :experts]
    bias = torch.randn(experts) * 0.1 + shift
    index, weights = route(
        logits.to(target.device), bias.to(target.device),
        groups=groups, kept_groups=kept, top_k=top_k, scaling=2.5, backend=target.backend,
    )  # fmt: skip
    scores = logits.sigmoid()
    expected = chosen(scores, bias.tolist(), groups, kept, top_k)
    assert torch.equal(index.cpu(), expected)
    exact = scores.double().gather(1, expected)
    assert torch.allclose(weights.cpu().double(), exact / exact.sum(1, keepdim=True) * 2.5, rtol=1e-5)


def test_route_gives_equals_to_the_lower_index(target):
    logits = torch.zeros(2, 16, device=target.device)
    logits[1, 9] = 1.0
    index, weights = route(logits, groups=4, kept_groups=2, top_k=3, normalise=False, backend=target.backend)
    assert index.tolist() == [[0, 1, 2], [9, 0, 1]]
    assert torch.allclose(weights[0].cpu(), torch.full((3,), 0.5))


def test_route_has_gradients_and_no_gradient_through_the_choice():
    logits = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: route(x, groups=2, kept_groups=1, top_k=2)[1], (logits,))


@pytest.mark.parametrize("tokens, top_k, experts", [(1, 8, 256), (3, 2, 4), (40, 8, 16), (300, 4, 7), (129, 1, 1)])
def test_sort_is_stable_and_its_inverse_inverts(target, tokens, top_k, experts):
    # An index of E or more is an expert that lives elsewhere.
    index = torch.randint(0, experts + 2, (tokens, top_k)).to(target.device)
    order, inverse, offsets = (x.cpu() for x in sort_pairs(index, experts, backend=target.backend))
    flat = index.cpu().reshape(-1).clamp(max=experts).tolist()
    expected = sorted(range(len(flat)), key=lambda p: (flat[p], p))
    assert order.tolist() == expected and order.dtype == torch.int32
    assert inverse[order.long()].tolist() == list(range(len(flat)))
    assert offsets.tolist() == [sum(e < bound for e in flat) for bound in range(experts + 1)]


def test_gather_and_combine(target):
    tokens, top_k, experts, width = 21, 3, 5, 70
    index = torch.randint(0, experts + 1, (tokens, top_k))
    order, inverse, offsets = sort_pairs(index.to(target.device), experts, backend=target.backend)
    x = torch.randn(tokens, width).to(target.dtype)
    y = gather_pairs(x.to(target.device), order, inverse, offsets, backend=target.backend)
    assert torch.equal(y.cpu(), x[order.cpu().long() // top_k])
    y[offsets[-1].item() :] = math.nan
    weights = torch.rand(tokens, top_k)
    got = combine_pairs(y, inverse, offsets, weights.to(target.device), backend=target.backend)
    assert_close(got, x.double() * (weights.double() * (index < experts)).sum(1, keepdim=True), target.dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("columns, depth", [(64, 128), (72, 40)])
def test_grouped_gemm(target, name, transposed, columns, depth):
    sizes = GROUPS[name]
    used, dead = sum(sizes), 9 if "dead" in name else 0
    x = torch.randn(used + dead, depth + 8).to(target.dtype)[:, :depth]
    x[used:] = math.nan
    w = torch.randn(len(sizes), columns, depth).to(target.dtype)
    stack = (w.transpose(1, 2).contiguous() if transposed else w).to(target.device)
    got = grouped_gemm(
        x.to(target.device), stack, offsets_of(sizes, target.device), transposed=transposed, backend=target.backend
    )
    truth = torch.cat([part.double() @ w[e].double().t() for e, part in enumerate(x[:used].split(sizes))])
    assert got.shape == (used + dead, columns) and got.dtype == target.dtype
    if used:
        assert_close(got[:used], truth, target.dtype)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("columns, depth", [(16, 128), (72, 5), (72, 40)])
def test_float32_factors_multiply_narrow_rows_as_they_are(target, name, transposed, columns, depth):
    sizes = GROUPS[name]
    x = torch.randn(sum(sizes), depth).to(target.dtype)
    w = torch.randn(len(sizes), columns, depth)
    stack = (w.transpose(1, 2) if transposed else w).to(target.device)
    offsets = offsets_of(sizes, target.device)
    rows, stack = x.to(target.device).requires_grad_(), stack.requires_grad_()
    got = grouped_gemm(rows, stack, offsets, transposed=transposed, backend=target.backend)
    parts = list(zip(w.double(), x.double().split(sizes), strict=True))
    assert got.dtype == torch.float32 and got.shape == (sum(sizes), columns)
    if not sizes or not sum(sizes):
        return
    assert_close(got, torch.cat([part @ matrix.t() for matrix, part in parts]), torch.float32)
    dy = torch.randn(got.shape)
    got.backward(dy.to(target.device))
    # Of a pair in two dtypes either may be the narrow one.
    given = dy.double().split(sizes)
    assert rows.grad.dtype == target.dtype
    assert_close(rows.grad, torch.cat([g @ matrix for g, (matrix, _) in zip(given, parts, strict=True)]), target.dtype)
    exact = torch.stack([g.t() @ part for g, (_, part) in zip(given, parts, strict=True)])
    assert_close(stack.grad, exact.mT if transposed else exact, torch.float32)


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("columns, depth", [(64, 128), (72, 40)])
def test_grouped_wgrad(target, name, columns, depth):
    sizes = GROUPS[name]
    used, dead = sum(sizes), 9 if "dead" in name else 0
    dy, x = (torch.randn(used + dead, size).to(target.dtype) for size in (columns, depth))
    dy[used:] = x[used:] = math.nan
    got = grouped_wgrad(
        dy.to(target.device), x.to(target.device), offsets_of(sizes, target.device), backend=target.backend
    )
    assert got.dtype == torch.float32 and got.shape == (len(sizes), columns, depth)
    parts = zip(dy[:used].double().split(sizes), x[:used].double().split(sizes), strict=True)
    assert_close(got, torch.stack([a.t() @ b for a, b in parts]), target.dtype)


def make_experts(experts, hidden, width, dtype, device, act_fn=F.silu):
    gate_up = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(dtype).to(device)
    down = (torch.randn(experts, hidden, width) / width**0.5).to(dtype).to(device)
    return SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=act_fn, num_experts=experts)


def experts_truth(module, x, index, weights):
    """One token and one expert at a time, in float64."""
    gate_up, down = module.gate_up_proj.cpu().double(), module.down_proj.cpu().double()
    rows = []
    for t in range(x.shape[0]):
        row = torch.zeros(x.shape[1], dtype=torch.float64)
        for k in range(index.shape[1]):
            e = int(index[t, k])
            if e < gate_up.shape[0]:
                gate, up = (gate_up[e] @ x[t].double()).chunk(2)
                row = row + weights[t, k].double() * (down[e] @ (module.act_fn(gate) * up))
        rows.append(row)
    return torch.stack(rows)


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 16, 4), (5, 8, 2), (90, 4, 2), (3, 2, 1)])
def test_experts_forward(target, tokens, experts, top_k):
    module = make_experts(experts, 72, 40, target.dtype, target.device)
    x = torch.randn(tokens, 72).to(target.dtype)
    index = torch.stack([torch.randperm(experts + 1)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k)
    truth = experts_truth(module, x, index, weights)
    inputs = [t.to(target.device) for t in (x, index, weights)]
    with torch.no_grad():
        assert_close(experts_forward(module, *inputs, backend=target.backend), truth, target.dtype, 3.0)
    module.act_fn = lambda gate: F.silu(gate)
    other = experts_forward(module, *inputs, backend=target.backend)
    assert_close(other, truth, target.dtype, 3.0)


def test_experts_gradients_match_float64(target):
    module = make_experts(5, 48, 24, target.dtype, target.device)
    x, index, weights = torch.randn(30, 48).to(target.dtype), torch.randint(0, 6, (30, 2)), torch.rand(30, 2)
    module.act_fn = F.silu
    leaves = [module.gate_up_proj, module.down_proj, x.to(target.device), weights.to(target.device)]
    for leaf in leaves:
        leaf.requires_grad_()
    grad = torch.randn(30, 48).to(target.dtype)
    out = experts_forward(module, leaves[2], index.to(target.device), leaves[3], backend=target.backend)
    out.backward(grad.to(target.device))
    exact = [leaf.detach().cpu().double().requires_grad_() for leaf in leaves]
    twin = SimpleNamespace(gate_up_proj=exact[0], down_proj=exact[1], act_fn=F.silu)
    experts_truth(twin, exact[2], index, exact[3]).backward(grad.double())
    for leaf, other in zip(leaves, exact, strict=True):
        assert_close(leaf.grad, other.grad, target.dtype, 4.0)


@pytest.mark.parametrize("learns", [True, False])
def test_float32_experts_follow_autocast_as_linears_do(learns):
    module = make_experts(5, 48, 24, torch.float32, "cpu")
    x, index, weights = torch.randn(30, 48), torch.randint(0, 5, (30, 2)), torch.rand(30, 2)
    leaves = [module.gate_up_proj.requires_grad_(learns), module.down_proj.requires_grad_(learns)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts_forward(module, x, index, weights)
    low = SimpleNamespace(gate_up_proj=leaves[0].bfloat16(), down_proj=leaves[1].bfloat16(), act_fn=module.act_fn)
    assert torch.equal(out, experts_forward(low, x.bfloat16(), index, weights))
    if learns:
        out.sum().backward()
        assert all(leaf.grad.dtype == torch.float32 and leaf.grad.any() for leaf in leaves)


def test_gradcheck_of_the_whole_forward():
    index = torch.tensor([[0, 2], [1, 3], [2, 0]])

    def call(x, gate_up, down, weights):
        module = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=F.silu)
        return experts_forward(module, x, index, weights)

    shapes = ((3, 4), (3, 6, 4), (3, 4, 3), (3, 2))
    assert torch.autograd.gradcheck(call, [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes])


def test_experts_compile_without_a_break(target):
    module = make_experts(4, 64, 32, target.dtype, target.device)
    x, index, weights = torch.randn(6, 64).to(target.dtype), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    inputs = [t.to(target.device) for t in (x, index, weights)]

    def call(x, index, weights):
        return experts_forward(module, x, index, weights, backend=target.backend)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(*inputs), call(*inputs))
    inputs[0].requires_grad_()
    compiled(*inputs).sum().backward()
    compiled_grad, inputs[0].grad = inputs[0].grad, None
    call(*inputs).sum().backward()
    assert torch.equal(compiled_grad, inputs[0].grad)


@pytest.mark.gpu
def test_a_training_step_of_the_experts_never_waits_for_the_device():
    module = make_experts(8, 256, 128, torch.bfloat16, "cuda")
    module.gate_up_proj.requires_grad_()
    x, index, weights = torch.randn(600, 256), torch.randint(0, 8, (600, 4)), torch.rand(600, 4)
    x, index, weights = (t.to("cuda") for t in (x.bfloat16(), index, weights))
    experts_forward(module, x, index, weights).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts_forward(module, x, index, weights).sum().backward()
        with torch.no_grad():
            experts_forward(module, x[:2], index[:2], weights[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_experts_are_captured_in_a_graph():
    module = make_experts(8, 256, 128, torch.bfloat16, "cuda")
    x, index, weights = torch.randn(4, 256), torch.randint(0, 8, (4, 2)), torch.rand(4, 2)
    x, index, weights = (t.to("cuda") for t in (x.bfloat16(), index, weights))
    with torch.no_grad():
        experts_forward(module, x, index, weights)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = experts_forward(module, x, index, weights)
        index.copy_(torch.randint(0, 8, (4, 2)))
        graph.replay()
        assert torch.equal(out, experts_forward(module, x, index, weights))


def small_forward(tokens, backend="auto"):
    module = make_experts(2, 4, 4, torch.float32, "cpu")
    return experts_forward(module, torch.randn(tokens, 4), torch.zeros(2, 1).long(), torch.zeros(2, 1), backend)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: route(torch.randn(2, 8), groups=3, top_k=1), "groups"),
        (lambda: route(torch.randn(2, 8), groups=4, kept_groups=1, top_k=3), "top_k"),
        (lambda: route(torch.randn(2, 8), torch.zeros(4), top_k=1), "bias"),
        (lambda: sort_pairs(torch.randn(2, 2), 4), "integers"),
        (lambda: grouped_gemm(torch.randn(2, 4), torch.randn(3, 5, 6), offsets_of([2, 0, 0], "cpu")), "does not fit"),
        (lambda: grouped_gemm(torch.randn(2, 4), torch.randn(3, 5, 4), torch.zeros(3).int()), "offsets"),
        (lambda: grouped_wgrad(torch.randn(2, 4), torch.randn(3, 4), offsets_of([2], "cpu")), "does not fit"),
        (lambda: small_forward(3), "top_k_index"),
        (lambda: small_forward(2, "cuda"), "no back end"),
    ],
)
def test_mistakes_are_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize("tokens, experts, top_k", [(1, 6, 2), (1, 2, 2), (5, 6, 2), (19, 3, 2)])
@pytest.mark.parametrize("shared_width", [24, 40])
def test_a_step_adds_shared_experts_and_residual(target, tokens, experts, top_k, shared_width):
    """Against a float64 sum over each token's experts; an expert past the last one adds nothing."""
    hidden, width = 48, 32
    shapes = {"x": (tokens, hidden), "residual": (tokens, hidden), "gate_up": (experts, 2 * width, hidden)}
    shapes |= {"down": (experts, hidden, width), "gate": (shared_width, hidden), "up": (shared_width, hidden)}
    shapes |= {"shared_down": (hidden, shared_width)}
    t = {name: (torch.randn(shape) / 4).to(target.dtype) for name, shape in shapes.items()}
    index = torch.stack([torch.randperm(experts + 1)[:top_k] for _ in range(tokens)])
    weights = torch.rand(tokens, top_k)
    wide = {name: value.double() for name, value in t.items()}
    truth = wide["residual"].clone()
    for row in range(tokens):
        x = wide["x"][row]
        for e, weight in zip(index[row].tolist(), weights[row].double(), strict=True):
            if e < experts:
                gate, up = (wide["gate_up"][e] @ x).chunk(2)
                truth[row] += weight * (wide["down"][e] @ (torch.nn.functional.silu(gate) * up))
        act = torch.nn.functional.silu(wide["gate"] @ x) * (wide["up"] @ x)
        truth[row] += wide["shared_down"] @ act
    given = {name: value.to(target.device) for name, value in t.items()}
    module = SimpleNamespace(gate_up_proj=given["gate_up"], down_proj=given["down"], act_fn=torch.nn.functional.silu)
    index, weights = index.to(target.device), weights.to(target.device)
    few = tokens * top_k <= 16 * experts
    assert is_step(module, given["x"], index, weights, given["gate"]) == few
    own = given["gate"], given["up"], given["shared_down"]
    with torch.no_grad():
        got = experts_step(module, given["x"], index, weights, own, given["residual"], backend=target.backend)
    assert got.dtype == target.dtype and got.isfinite().all()
    bound = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}[target.dtype]
    assert (got.cpu().double() - truth).norm() / truth.norm() < bound
