"""Speed of the kernels on one GPU: correctness first, then time, rates, share of the floor and ratio to peers.

Each time is the median of CUDA-graph replays, over copies of the inputs that together do not fit the L2. The floor is
the larger of bytes over the copy bandwidth and operations over the matmul rate, both measured in the same run. A
ratio above 1 says that ours is the faster one. A row whose error is over its bound prints no speed.

    python benchmarks/kernels.py [--only mla fp8 grouped experts quantize permute norm] [--output FILE]
"""

import argparse
import datetime
import json
import math
import platform
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from deepseek_v3 import kernels
from deepseek_v3.kernels import dispatch

L2_BYTES = 128 << 20


@dataclass
class Row:
    """us: microseconds a call; share: floor over time; peers: name -> (microseconds, their time over ours)."""

    operation: str
    shape: str
    error: float
    bound: float
    us: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    share: float | None = None
    peers: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Ceilings:
    """copy: bytes a second; bf16, fp8: operations a second."""

    copy: float
    bf16: float
    fp8: float


def seconds(calls: list[Callable[[], object]], replays: int = 9) -> float:
    """Median seconds of one of ``calls``, all of them captured in one graph."""
    # What made the inputs ran on another stream.
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    times = []
    for _ in range(replays):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3 / len(calls))
    return statistics.median(times)


def over(function: Callable, *arguments, least: int = 4, most: int = 24) -> list[Callable[[], object]]:
    """Calls of ``function`` on copies of its tensors, enough of them to pass the L2."""
    size = sum(x.numel() * x.element_size() for x in arguments if isinstance(x, torch.Tensor))
    count = 1 if size > 4 * L2_BYTES else max(least, min(most, math.ceil(L2_BYTES * 2 / max(size, 1))))

    def copy(x):
        return x if not isinstance(x, torch.Tensor) or count == 1 else x.clone(memory_format=torch.preserve_format)

    sets = [[copy(x) for x in arguments] for _ in range(count)]
    calls = [lambda inputs=inputs: function(*inputs) for inputs in sets]
    return calls if count > 1 else calls * 2


def measure_ceilings() -> Ceilings:
    source = torch.zeros(1 << 29, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    # A kernel that reads and writes: a copy node of a graph would go through the slower copy engine.
    copy = 8 * source.numel() / seconds([lambda: torch.neg(source, out=target)] * 4)
    a, b = (torch.randn(8192, 8192, device="cuda").bfloat16() for _ in range(2))
    bf16 = 2 * 8192**3 / seconds([lambda: a @ b] * 4)
    if dispatch.capability(0) >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        fp8 = 2 * 8192**3 / seconds([lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16)] * 4)
    else:
        fp8 = bf16
    return Ceilings(copy, bf16, fp8)


def error_of(got: torch.Tensor, truth: torch.Tensor) -> float:
    """Relative error in the Frobenius norm."""
    if not got.isfinite().all():
        return math.inf
    return ((got.double() - truth.double()).norm() / truth.double().norm()).item()


def finish(row: Row, calls, peers: dict, moved: float, flops: float, peak: float, ceilings: Ceilings) -> Row:
    """Fill in the speeds where the row is right."""
    if not row.error <= row.bound:
        return row
    time = seconds(calls)
    row.us, row.tflops, row.gbs = time * 1e6, flops / time / 1e12, moved / time / 1e9
    row.share = max(moved / ceilings.copy, flops / peak) / time
    for name, other in peers.items():
        theirs = seconds(other)
        row.peers[name] = (theirs * 1e6, theirs / time)
    return row


def bench_mla(ceilings: Ceilings) -> Iterator[Row]:
    points = [(h, t, b, s) for h in (128, 16) for b, s in ((1, 8192), (1, 32768), (16, 8192), (64, 4096), (128, 4096))
              for t in (1, 2)]  # fmt: skip
    for heads, queries, batch, slots in points:
        q = torch.randn(batch, queries, heads, 576, device="cuda").bfloat16()
        cache = torch.randn(batch, slots, 576, device="cuda").bfloat16()
        lengths = torch.full((batch,), slots, dtype=torch.int32, device="cuda")

        def run(q, cache, lengths):
            return kernels.mla_decode(
                q[..., :512], q[..., 512:], cache[..., :512], cache[..., 512:], scale=0.1352, lengths=lengths
            )

        few = min(batch, 2)
        parts = (q[:few, ..., :512], q[:few, ..., 512:], cache[:few, :, :512], cache[:few, :, 512:])
        truth = kernels.mla_decode(*parts, scale=0.1352, backend="torch")[0]
        error = error_of(run(q, cache, lengths)[0][:few], truth)
        flops = 2 * batch * queries * heads * slots * (576 + 512)
        moved = cache.numel() * 2 + q.numel() * 4
        shape = f"H{heads} T{queries} {batch}x{slots}"

        def sdpa(q, cache):
            keys = cache[:, None]
            return F.scaled_dot_product_attention(
                q.transpose(1, 2), keys, keys[..., :512], enable_gqa=True, scale=0.1352
            )

        peers = {"torch sdpa": over(sdpa, q, cache, least=1)} if queries == 1 and batch <= 16 else {}
        yield finish(Row("mla_decode bf16", shape, error, 4e-3), over(run, q, cache, lengths), peers, moved, flops,
                     ceilings.bf16, ceilings)  # fmt: skip
        if queries == 1:
            yield bench_mla_fp8(ceilings, q, cache, lengths, flops, shape)


def bench_mla_fp8(ceilings, q, cache, lengths, flops, shape) -> Row:
    # As a `LatentCache` holds them: a token's codes, four scales and roped key side by side.
    storage = torch.empty(*cache.shape[:2], 512 + 16 + 128, dtype=torch.uint8, device="cuda")

    def parts(storage):
        codes, scale, rope = storage.split([512, 16, 128], dim=-1)
        return codes.view(torch.float8_e4m3fn), scale.view(torch.float32), rope.view(torch.bfloat16)

    codes, scale = kernels.quantize_activation(cache[..., :512])
    for place, value in zip(parts(storage), (codes, scale, cache[..., 512:]), strict=True):
        place.copy_(value)

    def run(q, storage, lengths, backend="auto"):
        codes, scale, rope = parts(storage)
        return kernels.mla_decode(
            q[..., :512], q[..., 512:], codes, rope, scale=0.1352, lengths=lengths, latent_scale=scale, backend=backend
        )

    few = min(q.shape[0], 2)
    truth = run(q[:few], storage[:few], lengths[:few], "torch")[0]
    error = error_of(run(q, storage, lengths)[0][:few], truth)
    moved = storage.numel() + q.numel() * 4
    # Many heads read the latents rounded to bfloat16, which on random data costs 4.5e-3.
    row = Row("mla_decode fp8", shape, error, 6e-3)
    return finish(row, over(run, q, storage, lengths), {}, moved, flops, ceilings.bf16, ceilings)


GEMMS = [(4096, 4096, 7168), (4096, 7168, 2048), (4096, 24576, 1536), (4096, 7168, 16384), (64, 4096, 7168),
         (128, 7168, 2048)]  # fmt: skip


def bench_fp8(ceilings: Ceilings) -> Iterator[Row]:
    for m, n, k in GEMMS:
        x, w = torch.randn(m, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
        a, a_scale = kernels.quantize_activation(x)
        b, b_scale = kernels.quantize_weight(w)
        truth = kernels.fp8_gemm(a, a_scale, b, b_scale, out_dtype=torch.float32, backend="torch")
        flops, moved = 2 * m * n * k, a.numel() + b.numel() + 2 * m * n
        times = {}
        for backend in ("cublas", "triton"):

            def run(a, a_scale, b, b_scale, backend=backend):
                return kernels.fp8_gemm(a, a_scale, b, b_scale, backend=backend)

            error = error_of(run(a, a_scale, b, b_scale), truth)
            times[backend] = over(run, a, a_scale, b, b_scale)
            peers = {"cublas fp8": times["cublas"]} if backend == "triton" else {}
            peers["cublas bf16"] = over(lambda x, w: x @ w.t(), x, w)
            yield finish(Row(f"fp8_gemm {backend}", f"{m},{n},{k}", error, 4e-3), times[backend], peers, moved, flops,
                         ceilings.fp8, ceilings)  # fmt: skip
    for m, n, k in ((4096, 7168, 4096), (7168, 2048, 4096)):
        a, a_scale = kernels.quantize_activation_transposed(torch.randn(k, m, device="cuda").bfloat16())
        b, b_scale = kernels.quantize_activation_transposed(torch.randn(k, n, device="cuda").bfloat16())
        truth = kernels.fp8_gemm(a, a_scale, b, b_scale, out_dtype=torch.float32, backend="torch")

        def wgrad(a, a_scale, b, b_scale, out):
            return kernels.fp8_gemm(a, a_scale, b, b_scale, out=out)

        out = torch.zeros(m, n, device="cuda")
        error = error_of(wgrad(a, a_scale, b, b_scale, out), truth)
        yield finish(Row("fp8 wgrad +=", f"{m},{n},{k}", error, 1e-3), over(wgrad, a, a_scale, b, b_scale, out), {},
                     a.numel() + b.numel() + 8 * m * n, 2 * m * n * k, ceilings.fp8, ceilings)  # fmt: skip


def grouped_inputs(experts, rows, n, k):
    x = torch.randn(experts * rows, k, device="cuda").bfloat16()
    w = torch.randn(experts, n, k, device="cuda").bfloat16()
    offsets = torch.arange(0, experts * rows + 1, rows, dtype=torch.int32, device="cuda")
    return x, w, offsets


def bench_grouped(ceilings: Ceilings) -> Iterator[Row]:
    for experts, rows, n, k in (
        (64, 256, 4096, 7168),
        (64, 256, 7168, 2048),
        (64, 4, 4096, 7168),
        (64, 4, 7168, 2048),
    ):
        x, w, offsets = grouped_inputs(experts, rows, n, k)
        flops, pairs = 2 * x.shape[0] * n * k, x.shape[0]
        shape = f"{experts}x{rows} N{n} K{k}"
        truth = kernels.grouped_gemm(x, w, offsets, backend="torch")
        peers = {
            "grouped_mm": over(lambda x, w, o: kernels.grouped_gemm(x, w, o, backend="grouped_mm"), x, w, offsets)
        }
        moved = 2 * (x.numel() + w.numel() + pairs * n)

        def fprop(x, w, o):
            return kernels.grouped_gemm(x, w, o, backend="triton")

        yield finish(Row("grouped bf16 fprop", shape, error_of(fprop(x, w, offsets), truth), 4e-3),
                     over(fprop, x, w, offsets), peers, moved, flops, ceilings.bf16, ceilings)  # fmt: skip
        x8, xs = kernels.quantize_activation(x)
        w8, ws = kernels.quantize_weight(w)
        truth = kernels.grouped_fp8_gemm(x8, xs, w8, ws, offsets, backend="torch")
        error = error_of(kernels.grouped_fp8_gemm(x8, xs, w8, ws, offsets), truth)
        calls = over(kernels.grouped_fp8_gemm, x8, xs, w8, ws, offsets)
        row = Row("grouped fp8 fprop", shape, error, 4e-3)
        yield finish(row, calls, {}, moved / 2, flops, ceilings.fp8, ceilings)
        if rows == 256:
            yield bench_dgrad(ceilings, w, offsets, pairs, shape, flops, moved)
        del x, w, x8, w8, truth
    for experts, rows, n, k in ((16, 2048, 4096, 7168), (16, 2048, 7168, 2048)):
        yield from bench_wgrad(ceilings, experts, rows, n, k)


def bench_dgrad(ceilings, w, offsets, pairs, shape, flops, moved) -> Row:
    dy = torch.randn(pairs, w.shape[1], device="cuda").bfloat16()

    def dgrad(dy, w, o, backend="triton"):
        return kernels.grouped_gemm(dy, w, o, transposed=True, backend=backend)

    error = error_of(dgrad(dy, w, offsets), dgrad(dy, w, offsets, "torch"))
    peers = {"grouped_mm": over(lambda *inputs: dgrad(*inputs, "grouped_mm"), dy, w, offsets)}
    row = Row("grouped bf16 dgrad", shape, error, 4e-3)
    return finish(row, over(dgrad, dy, w, offsets), peers, moved, flops, ceilings.bf16, ceilings)


def bench_wgrad(ceilings, experts, rows, n, k) -> Iterator[Row]:
    x, _, offsets = grouped_inputs(experts, rows, 1, k)
    dy = torch.randn(experts * rows, n, device="cuda").bfloat16()
    flops, shape = 2 * x.shape[0] * n * k, f"{experts}x{rows} N{n} K{k}"

    def wgrad(dy, x, o, backend="triton"):
        return kernels.grouped_wgrad(dy, x, o, dtype=torch.bfloat16, backend=backend)

    error = error_of(wgrad(dy, x, offsets), wgrad(dy, x, offsets, "torch"))
    peers = {"grouped_mm": over(lambda *inputs: wgrad(*inputs, "grouped_mm"), dy, x, offsets)}
    moved = 2 * (x.numel() + dy.numel() + experts * n * k)
    yield finish(Row("grouped bf16 wgrad", shape, error, 4e-3), over(wgrad, dy, x, offsets), peers, moved, flops,
                 ceilings.bf16, ceilings)  # fmt: skip
    parts = [t for v in (dy, x) for t in kernels.quantize_grouped_transposed(v, offsets)]
    truth = kernels.grouped_fp8_wgrad(*parts, offsets, backend="torch")
    error = error_of(kernels.grouped_fp8_wgrad(*parts, offsets), truth)
    moved = x.numel() + dy.numel() + 4 * experts * n * k
    yield finish(Row("grouped fp8 wgrad", shape, error, 1e-3), over(kernels.grouped_fp8_wgrad, *parts, offsets), {},
                 moved, flops, ceilings.fp8, ceilings)  # fmt: skip


def bench_experts(ceilings: Ceilings) -> Iterator[Row]:
    experts, hidden, width, top_k = 256, 7168, 2048, 8
    gate_up = torch.randn(experts, 2 * width, hidden, device="cuda", dtype=torch.bfloat16) / hidden**0.5
    down = torch.randn(experts, hidden, width, device="cuda", dtype=torch.bfloat16) / width**0.5
    module = SimpleNamespace(gate_up_proj=gate_up, down_proj=down, act_fn=F.silu, num_experts=experts)
    for tokens in (1, 16, 128):
        x = torch.randn(tokens, hidden, device="cuda").bfloat16()
        logits = torch.randn(tokens, experts, device="cuda")
        index, weights = kernels.route(logits, groups=8, kept_groups=4, top_k=top_k, scaling=2.5)
        with torch.no_grad():
            truth = kernels.experts_forward(module, x, index, weights, "torch")
            error = error_of(kernels.experts_forward(module, x, index, weights), truth)
            hit = index.unique().numel()
            moved = hit * 3 * width * hidden * 2
            # Of one token enough calls that the start of the graph is little beside them.
            count = 16 if tokens == 1 else 2
            calls = [lambda x=x, i=index, w=weights: kernels.experts_forward(module, x, i, w)] * count
            row = Row("experts decode bf16", f"B{tokens} hit {hit}", error, 6e-3)
            yield finish(row, calls, {}, moved, 2 * tokens * top_k * 3 * width * hidden, ceilings.bf16, ceilings)


def bench_quantize(ceilings: Ceilings) -> Iterator[Row]:
    x = torch.randn(8192, 7168, device="cuda").bfloat16()
    both = torch.randn(16384, 4096, device="cuda").bfloat16()
    w = torch.randn(8, 4096, 7168, device="cuda").bfloat16()
    cases = {
        "quantize 1x128": (kernels.quantize_activation, (x,)),
        "quantize 128x1": (kernels.quantize_activation_transposed, (x,)),
        "quantize 128x128": (kernels.quantize_weight, (w,)),
        "swiglu + quantize": (lambda t: kernels.quantize_swiglu(*t.chunk(2, dim=-1)), (both,)),
    }
    for name, (function, inputs) in cases.items():
        got, scale = function(*inputs)
        truth = function(*(t.cpu() for t in inputs))[0]
        error = (got.cpu().view(torch.uint8) != truth.view(torch.uint8)).double().mean().item()
        bound = 1e-2 if "swiglu" in name else 0.0
        moved = sum(t.numel() * 2 for t in inputs) + got.numel() + scale.numel() * 4
        shape = "x".join(str(size) for size in inputs[0].shape)
        yield finish(Row(name, shape, error, bound), over(function, *inputs), {}, moved, 0, ceilings.bf16, ceilings)


def bench_permute(ceilings: Ceilings) -> Iterator[Row]:
    tokens, experts, top_k, hidden = 4096, 256, 8, 7168
    logits = torch.randn(tokens, experts, device="cuda")

    def choose():
        return kernels.route(logits, groups=8, kept_groups=4, top_k=top_k)

    index, weights = choose()
    truth = kernels.route(logits.cpu(), groups=8, kept_groups=4, top_k=top_k)[0]
    row = Row("route", f"{tokens}x{experts}", (index.cpu() != truth).double().mean().item(), 1e-4)
    moved = logits.numel() * 4 + index.numel() * 12
    yield finish(row, [choose] * 4, {}, moved, 0, ceilings.bf16, ceilings)
    order, inverse, offsets = kernels.sort_pairs(index, experts)
    wrong = not torch.equal(order.cpu(), kernels.sort_pairs(index.cpu(), experts)[0])
    row = Row("sort_pairs", f"{tokens}x{top_k}", float(wrong), 0.0)
    calls = [lambda: kernels.sort_pairs(index, experts)] * 4
    yield finish(row, calls, {}, index.numel() * 16, 0, ceilings.bf16, ceilings)
    y = torch.randn(tokens * top_k, hidden, device="cuda").bfloat16()

    def combine(backend="auto"):
        return kernels.combine_pairs(y, inverse, offsets, weights, backend=backend)

    row = Row("combine_pairs", f"{tokens}x{top_k}x{hidden}", error_of(combine(), combine("torch")), 4e-3)
    moved = y.numel() * 2 + tokens * hidden * 2
    yield finish(row, [combine] * 2, {}, moved, 0, ceilings.bf16, ceilings)


def bench_norm(ceilings: Ceilings) -> Iterator[Row]:
    for tokens in (1, 4096):
        x, weight = torch.randn(tokens, 7168, device="cuda").bfloat16(), torch.rand(7168, device="cuda").bfloat16()
        truth = kernels.rms_norm(x, weight, backend="torch")
        row = Row("rms_norm", f"{tokens}x7168", error_of(kernels.rms_norm(x, weight), truth), 4e-3)
        peers = {"torch": over(lambda x, w: kernels.rms_norm(x, w, backend="torch"), x, weight)}
        calls = over(kernels.rms_norm, x, weight)
        yield finish(row, calls, peers, x.numel() * 4 + 2 * 7168, 0, ceilings.bf16, ceilings)
    batch, slots = 64, 256
    compressed = torch.randn(batch, 1, 576, device="cuda").bfloat16()
    weight = torch.rand(512, device="cuda").bfloat16()
    cos, sin = (torch.randn(batch, 1, 64, device="cuda").bfloat16() for _ in range(2))
    place = torch.randint(0, slots, (batch, 1), device="cuda")
    caches = {backend: torch.zeros(batch, slots, 576, device="cuda").bfloat16() for backend in ("auto", "torch")}

    def write(backend="auto"):
        cache = caches[backend]
        kernels.write_latents(
            cache[..., :512], cache[..., 512:], compressed, weight, cos, sin, place, backend=backend
        )  # fmt: skip

    write(), write("torch")
    row = Row("write_latents", f"B{batch}", error_of(caches["auto"], caches["torch"]), 4e-3)
    moved = compressed.numel() * 4 + cos.numel() * 2
    peers = {"torch": [lambda: write("torch")] * 8}
    yield finish(row, [write] * 8, peers, moved, 0, ceilings.bf16, ceilings)


SECTIONS = {
    "mla": bench_mla,
    "fp8": bench_fp8,
    "grouped": bench_grouped,
    "experts": bench_experts,
    "quantize": bench_quantize,
    "permute": bench_permute,
    "norm": bench_norm,
}


def line_of(row: Row) -> str:
    if row.us is None:
        return f"{row.operation:22} {row.shape:24} WRONG: error {row.error:.2e}, bound {row.bound:.0e}"
    peers = "  ".join(f"{name} {theirs:.1f} ({ratio:.2f})" for name, (theirs, ratio) in row.peers.items())
    return (f"{row.operation:22} {row.shape:24} {row.error:8.1e} {row.us:9.1f} {row.tflops:8.0f} {row.gbs:8.0f} "
            f"{row.share:6.2f}  {peers}").rstrip()  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--output", help="JSON file for the results")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks/kernels.py needs an NVIDIA GPU; none is visible to torch")
    import triton

    torch.manual_seed(0)
    ceilings = measure_ceilings()
    machine = {
        "gpu": torch.cuda.get_device_name(0), "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": triton.__version__, "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(), **asdict(ceilings),
    }  # fmt: skip
    print(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, CUDA {machine['cuda']}: copy "
          f"{ceilings.copy / 1e12:.2f} TB/s, matmul {ceilings.bf16 / 1e12:.0f} TFLOP/s BF16, "
          f"{ceilings.fp8 / 1e12:.0f} FP8")  # fmt: skip
    print(kernels.backends(), end="\n\n")
    head = f"{'operation':22} {'shape':24} {'error':>8} {'us':>9} {'TFLOP/s':>8} {'GB/s':>8} {'floor':>6}"
    print(head + "  peers: us (ratio)")
    rows = []
    for name in arguments.only:
        for row in SECTIONS[name](ceilings):
            rows.append(row)
            print(line_of(row), flush=True)
            torch.cuda.empty_cache()
    result = {"machine": machine, "rows": [asdict(row) for row in rows]}
    if arguments.output:
        with open(arguments.output, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    print(json.dumps(result))
    if any(row.us is None for row in rows):
        raise SystemExit("some results were wrong")


if __name__ == "__main__":
    main()
