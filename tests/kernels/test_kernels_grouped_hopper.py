"""The grouped products written for Hopper by hand, against loops in float64 written here."""

import math

import pytest
import torch

from deepseek_v3.kernels import grouped_fp8_gemm, grouped_gemm, grouped_wgrad, quantize_activation, quantize_weight

pytestmark = pytest.mark.gpu

# Rows by expert: empty groups first, in the middle and last; one row; each kind of last tile; dead rows behind.
GROUPS = {
    "ragged": ([0, 1, 63, 0, 129, 700, 64, 128, 65, 257, 0], 0),
    "all to one": ([0, 0, 1027, 0], 0),
    "one expert": ([33], 0),
    "dead rows": ([5, 0, 320, 130], 77),
    "many experts": ([17 * (e % 23) for e in range(260)], 3),
}
SHAPES = [(256, 64), (512, 384), (328, 208), (72, 16), (1040, 1168)]
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


def offsets_of(sizes):
    return torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int().cuda()


def assert_close(got, truth, dtype):
    assert got.isfinite().all()
    assert (got.double() - truth).abs().max() <= ROUNDING[dtype] * truth.abs().max()


def rows_truth(x, w, sizes):
    """[rows of any expert, N] of x [P, K] and w [E, N, K], in float64."""
    parts = x[: sum(sizes)].double().split(sizes)
    return torch.cat([part @ w[e].double().t() for e, part in enumerate(parts)])


@pytest.fixture
def by_hand(monkeypatch):
    """Takes the kernels that are written for Hopper for any size; counts their launches."""
    from deepseek_v3.kernels.triton import launch_grouped, launch_grouped_hopper, tilings

    calls = []

    def spy(name):
        launch = getattr(launch_grouped_hopper, name)
        monkeypatch.setattr(launch_grouped_hopper, name, lambda *inputs: calls.append(name) or launch(*inputs))

    spy("rows_by_hand")
    spy("columns_by_hand")
    monkeypatch.setattr(
        launch_grouped,
        "_rows_tiling",
        lambda x, w, out: tilings.MANY_BY_HAND if w.dtype.itemsize == 2 else tilings.FP8_MANY_BY_HAND,
    )
    monkeypatch.setattr(launch_grouped, "_columns_tiling", lambda dy, x, out: tilings.COLUMNS_BY_HAND)
    monkeypatch.setattr(launch_grouped, "is_few", lambda pairs, experts: False)
    return calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("columns, depth", SHAPES)
@pytest.mark.parametrize("name", GROUPS)
def test_rows(by_hand, name, columns, depth, transposed, dtype):
    sizes, dead = GROUPS[name]
    used = sum(sizes)
    x = torch.randn(used + dead, depth + 8).to(dtype).cuda()[:, :depth]
    x[used:] = math.nan
    # A stack in which neither the experts nor their rows lie close together.
    sides = (depth, columns) if transposed else (columns, depth)
    w = torch.randn(len(sizes), sides[0] + 3, sides[1] + 16).to(dtype).cuda()[:, 1:-2, 8:-8]
    got = grouped_gemm(x, w, offsets_of(sizes), transposed=transposed, backend="triton")
    assert by_hand == ["rows_by_hand"] and got.dtype == dtype
    assert_close(got[:used], rows_truth(x, w.transpose(1, 2) if transposed else w, sizes), dtype)
    # What no expert owns stays as it was: here the poison of fresh memory.
    assert got[used:].isnan().all()
    assert torch.equal(got[:used], grouped_gemm(x, w, offsets_of(sizes), transposed=transposed)[:used])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, depth", [*SHAPES, (384, 7168)])
@pytest.mark.parametrize("name", GROUPS)
def test_rows_in_fp8(by_hand, name, columns, depth, dtype):
    sizes, dead = GROUPS[name]
    used = sum(sizes)
    # Rows and blocks of scales that differ by orders of magnitude, and whose products float16 still holds.
    x = torch.randn(used + dead, depth, device="cuda") * torch.logspace(-2, 1, used + dead, device="cuda")[:, None]
    w = torch.randn(len(sizes), columns, depth, device="cuda")
    w *= torch.logspace(-2, 0, columns, device="cuda")[:, None]
    x8, x_scale = quantize_activation(x)
    w8, w_scale = quantize_weight(w)
    x_scale[used:] = math.nan
    got = grouped_fp8_gemm(x8, x_scale, w8, w_scale, offsets_of(sizes), out_dtype=dtype)
    assert by_hand == ["rows_by_hand"]
    wide_x = x8.double() * x_scale.double().repeat_interleave(128, 1)[:, :depth]
    blocks = w_scale.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
    truth = rows_truth(wide_x, w8.double() * blocks[:, :columns, :depth], sizes)
    # Each row by itself: a large one hides nothing of a small one.
    error = (got[:used].double() - truth).abs().amax(1)
    assert (error <= ROUNDING[dtype] * truth.abs().amax(1) + torch.finfo(dtype).tiny).all()
    assert got[used:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns, depth", SHAPES)
@pytest.mark.parametrize("name", GROUPS)
def test_columns(by_hand, name, columns, depth, dtype):
    sizes, dead = GROUPS[name]
    used = sum(sizes)
    dy, x = (torch.randn(used + dead, width + 8).to(dtype).cuda()[:, :width] for width in (columns, depth))
    dy[used:], x[used:] = math.nan, math.inf
    got = grouped_wgrad(dy, x, offsets_of(sizes), dtype=dtype)
    assert by_hand == ["columns_by_hand"] and got.dtype == dtype
    parts = zip(dy[:used].double().split(sizes), x[:used].double().split(sizes), strict=True)
    truth = torch.stack([left.t() @ right for left, right in parts])
    assert_close(got, truth, dtype)
    assert not got[[e for e, size in enumerate(sizes) if not size]].any()
    assert torch.equal(got, grouped_wgrad(dy, x, offsets_of(sizes), dtype=dtype))


def test_an_experts_nan_stays_with_it(by_hand):
    sizes = [40, 100, 130]
    x, w = torch.randn(270, 128).bfloat16().cuda(), torch.randn(3, 256, 128).bfloat16().cuda()
    dy = torch.randn(270, 256).bfloat16().cuda()
    x[40:140] = math.nan
    y, dw = grouped_gemm(x, w, offsets_of(sizes)), grouped_wgrad(dy, x, offsets_of(sizes), dtype=torch.bfloat16)
    assert by_hand == ["rows_by_hand", "columns_by_hand"]
    assert y[40:140].isnan().all() and y[:40].isfinite().all() and y[140:].isfinite().all()
    assert dw[1].isnan().all() and dw[[0, 2]].isfinite().all()


def test_beyond_two_to_the_31_elements(by_hand):
    rows, stride = 40_000, 65_536
    assert rows * stride > 1 << 31
    sizes = [rows // 2 + 5, rows // 2 - 5]
    x = torch.empty(rows, stride, dtype=torch.bfloat16, device="cuda")[:, :64]
    x.copy_(torch.randn(rows, 64))
    w, dy = torch.randn(2, 256, 64).bfloat16().cuda(), torch.randn(rows, 128).bfloat16().cuda()
    assert_close(grouped_gemm(x, w, offsets_of(sizes)), rows_truth(x, w, sizes), torch.bfloat16)
    dw = grouped_wgrad(dy, x, offsets_of(sizes), dtype=torch.bfloat16)
    parts = zip(dy.double().split(sizes), x.double().split(sizes), strict=True)
    assert_close(dw, torch.stack([left.t() @ right for left, right in parts]), torch.bfloat16)
    assert by_hand == ["rows_by_hand", "columns_by_hand"]


def test_a_replayed_graph_follows_the_offsets(by_hand):
    x, w = torch.randn(600, 128).bfloat16().cuda(), torch.randn(4, 256, 128).bfloat16().cuda()
    dy = torch.randn(600, 256).bfloat16().cuda()
    offsets = offsets_of([150] * 4)

    def run():
        return grouped_gemm(x, w, offsets), grouped_wgrad(dy, x, offsets, dtype=torch.bfloat16)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    offsets.copy_(offsets_of([3, 400, 0, 197]))
    for _ in range(2):
        graph.replay()
        for got, expected in zip(results, run(), strict=True):
            assert torch.equal(got, expected)


def test_they_are_chosen_where_there_is_work_for_all_of_the_card(monkeypatch):
    from deepseek_v3.kernels.triton import launch_grouped_hopper

    names = []
    for name in ("rows_by_hand", "columns_by_hand"):
        launch = getattr(launch_grouped_hopper, name)
        monkeypatch.setattr(
            launch_grouped_hopper,
            name,
            lambda *inputs, name=name, launch=launch: names.append(name) or launch(*inputs),
        )
    sizes = [1000, 3000, 2096, 2096]
    x, dy = torch.randn(8192, 128).bfloat16().cuda(), torch.randn(8192, 2304).bfloat16().cuda()
    w = torch.randn(4, 2304, 128).bfloat16().cuda()
    x8, w8 = quantize_activation(x), quantize_weight(w)
    grouped_gemm(x, w, offsets_of(sizes))
    grouped_fp8_gemm(*x8, *w8, offsets_of(sizes))
    assert names == ["rows_by_hand", "rows_by_hand"]
    deep = torch.randn(8192, 2048).bfloat16().cuda()
    grouped_wgrad(dy, deep, offsets_of(sizes), dtype=torch.bfloat16)
    assert names[2:] == ["columns_by_hand"]
    grouped_gemm(x[:200], w, offsets_of([50] * 4))
    grouped_gemm(x, w, offsets_of(sizes).clone(), backend="torch")
    grouped_wgrad(dy, deep, offsets_of(sizes), dtype=torch.float32)
    assert len(names) == 3
