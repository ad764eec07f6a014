"""FP8 product with fine-grained scales, dense: forward, input gradient and weight gradient of a linear layer.

M rows, N columns, K reduced. It takes codes (``torch.float8_e4m3fn``) and float32
scales, one for 128 reduced elements. Source: DeepSeek-V3 report, section 3.3: forward and input gradient multiply
1 x 128 tiles with 128 x 128 blocks, the weight gradient 1 x 128 with 1 x 128 along the tokens.
"""

import math
from types import ModuleType

import torch

from . import dispatch
from .reference import fp8 as reference

# The oldest cards whose tensor cores multiply E4M3, and the one whose cuBLAS takes these scales.
FP8_CARD = (8, 9)
OUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _cublas_reason(device: torch.device) -> str | None:
    reason = dispatch.cuda_reason(device, (9, 0))
    if reason is None and dispatch.capability(device.index) != (9, 0):
        reason = "cuBLAS takes these scales on compute capability 9.0 alone"
    if reason is None and tuple(int(part) for part in str(torch.version.cuda).split(".")[:2]) < (12, 9):
        reason = f"needs CUDA 12.9, torch has {torch.version.cuda}"
    return reason


def _reasons(device: torch.device) -> dispatch.Reasons:
    deep_gemm = None if dispatch.installed("deep_gemm") else "deep_gemm is not installed"
    return {
        "deep_gemm": deep_gemm or dispatch.cuda_reason(device, (9, 0)),
        "cublas": _cublas_reason(device),
        "triton": dispatch.triton_reason(device, FP8_CARD),
        "torch": None,
    }


dispatch.OPERATIONS["fp8_gemm"] = _reasons


def _column_major(scale: torch.Tensor) -> torch.Tensor:
    """The same scales stored by group, which is how the libraries read them."""
    return scale if scale.stride() == (1, scale.shape[0]) else scale.t().contiguous().t()


def _by_row(b: torch.Tensor, b_scale: torch.Tensor) -> bool:
    return b_scale.shape[0] == b.shape[0]


def _deep_gemm(library: ModuleType, a, a_scale, b, b_scale, out_dtype):
    out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    library.fp8_gemm_nt((a, _column_major(a_scale)), (b, b_scale.contiguous()), out)
    return out


def _choose(a, b, b_scale, out_dtype, add, backend) -> str:
    reasons = _reasons(a.device)
    rows, depth = a.shape
    library = None
    if add:
        library = "adds to no existing tensor"
    elif depth % 128 or b.shape[0] % 128 or rows % 4 or not rows:
        library = "needs K and N in multiples of 128 and M in multiples of 4"
    # It reads 128 x 128 scales with K / 128 filled up to a multiple of 4: dense ones of another width come out wrong.
    padded = "needs K in multiples of 512 for 128 x 128 scales" if depth % 512 and not _by_row(b, b_scale) else None
    reasons["cublas"] = reasons["cublas"] or library or padded
    if _by_row(b, b_scale) or out_dtype != torch.bfloat16:
        library = library or "takes 128 x 128 weight scales and gives bfloat16"
    reasons["deep_gemm"] = reasons["deep_gemm"] or library
    if out_dtype == torch.float16:
        reasons["cublas"] = reasons["cublas"] or "float16"
    return dispatch.choose("fp8_gemm", reasons, backend, a.device)


def _fake(a, a_scale, b, b_scale, out_dtype, backend):
    return a.new_empty(a.shape[0], b.shape[0], dtype=out_dtype)


@dispatch.define(
    "fp8_gemm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType out_dtype, str backend) -> Tensor", _fake
)
def _gemm(a, a_scale, b, b_scale, out_dtype, backend):
    chosen = _choose(a, b, b_scale, out_dtype, False, backend)
    if chosen == "torch":
        return reference.fp8_gemm(a, a_scale, b, b_scale, out_dtype)
    a, b = a.contiguous(), b.contiguous()
    if chosen == "deep_gemm":
        import deep_gemm

        return _deep_gemm(deep_gemm, a, a_scale, b, b_scale, out_dtype)
    if chosen == "cublas":
        right = _column_major(b_scale).t() if _by_row(b, b_scale) else b_scale.contiguous().t()
        return torch._scaled_mm(a, b.t(), _column_major(a_scale), right, out_dtype=out_dtype)
    from .triton.launch_fp8 import fp8_gemm as launch

    out = torch.empty(a.shape[0], b.shape[0], dtype=out_dtype, device=a.device)
    return launch(a, a_scale, b, b_scale, out, False)


@dispatch.define(
    "fp8_gemm_add_(Tensor(a!) out, Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, str backend) -> ()",
    lambda out, a, a_scale, b, b_scale, backend: None,
)
def _gemm_add(out, a, a_scale, b, b_scale, backend):
    if _choose(a, b, b_scale, out.dtype, True, backend) == "torch":
        out += reference.fp8_gemm(a, a_scale, b, b_scale, torch.float32)
        return
    from .triton.launch_fp8 import fp8_gemm as launch

    launch(a.contiguous(), a_scale, b.contiguous(), b_scale, out, True)


def check_operand(name: str, codes: torch.Tensor, scale: torch.Tensor, shapes: tuple[tuple[int, ...], ...]) -> None:
    if codes.dtype != torch.float8_e4m3fn or scale.dtype != torch.float32:
        raise ValueError(f"{name} must be float8_e4m3fn with float32 scales, got {codes.dtype} and {scale.dtype}")
    if tuple(scale.shape) not in shapes:
        raise ValueError(f"{name} {tuple(codes.shape)} needs a scale of shape {shapes}, got {tuple(scale.shape)}")


def fp8_gemm(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``a @ b.T`` of FP8 codes, each 128 products scaled and added in float32.

    Args:
        a: float8_e4m3fn [M, K]; a_scale: float32 [M, ceil(K / 128)], any strides.
        b: float8_e4m3fn [N, K]; b_scale: float32 [ceil(N / 128), ceil(K / 128)] (forward and input gradient), or
            [N, ceil(K / 128)] (weight gradient: a is dy, b is x, both quantised along the tokens and transposed).
        out_dtype: bfloat16, float16 or float32; of ``out`` where that is given.
        out: [M, N] to add the product to, in place, with dense rows (a float32 gradient).
        backend: "auto", "deep_gemm", "cublas", "triton" or "torch".

    Returns:
        [M, N] of out_dtype, or ``out``.

    Raises:
        ValueError: dtypes or shapes that do not fit. RuntimeError: a backend asked for that cannot run here.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"a {tuple(a.shape)} and b {tuple(b.shape)} must be [M, K] and [N, K]")
    groups = math.ceil(a.shape[1] / 128)
    check_operand("a", a, a_scale, ((a.shape[0], groups),))
    check_operand("b", b, b_scale, ((math.ceil(b.shape[0] / 128), groups), (b.shape[0], groups)))
    if (out_dtype if out is None else out.dtype) not in OUT_DTYPES:
        raise ValueError(f"the result must be one of {OUT_DTYPES}, not {out_dtype if out is None else out.dtype}")
    if out is None:
        return dispatch.ops.fp8_gemm(a, a_scale, b, b_scale, out_dtype, backend)
    if out.shape != (a.shape[0], b.shape[0]) or out.stride(1) != 1:
        raise ValueError(f"out must be [{a.shape[0]}, {b.shape[0]}] with dense rows, got {tuple(out.shape)}")
    dispatch.ops.fp8_gemm_add_(out, a, a_scale, b, b_scale, backend)
    return out
