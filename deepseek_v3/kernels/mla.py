"""Absorbed multi-head latent attention (MLA) for decode: queries in latent space against the cached latents.

B batch, T query tokens, S cached tokens, H heads, C kv_lora_rank, R qk_rope_head_dim. Source: DeepSeek-V2 report
(arXiv 2405.04434), section 2.1: with the up-projections absorbed into query and output, MLA is multi-query
attention with one key of C + R numbers and one value, the latent itself.
"""

import torch

from . import dispatch
from .fp8 import FP8_CARD
from .reference import mla as reference
from .reference.mla import SCALE_GROUP

OPERATION = "mla_decode"
QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def reasons(device: torch.device) -> dispatch.Reasons:
    """Back ends of the MLA decode on ``device``, best first."""
    flash_mla = None if dispatch.installed("flash_mla") else "flash_mla is not installed"
    return {
        "flash_mla": flash_mla or dispatch.cuda_reason(device, (9, 0)),
        "triton": dispatch.triton_reason(device),
        "torch": None,
    }


dispatch.OPERATIONS[OPERATION] = reasons


def shape_reason(q_latent: torch.Tensor, rope: torch.Tensor, latent: torch.Tensor) -> str | None:
    """Why these inputs are none for the Triton kernel."""
    if latent.dtype == torch.float8_e4m3fn and latent.shape[2] % SCALE_GROUP:
        return f"an FP8 latent whose kv_lora_rank {latent.shape[2]} is not a multiple of {SCALE_GROUP}"
    if q_latent.dtype not in (torch.bfloat16, torch.float16):
        return f"queries of {q_latent.dtype}; the kernel takes bfloat16 and float16"
    for name, size in (("kv_lora_rank", latent.shape[2]), ("qk_rope_head_dim", rope.shape[2])):
        if size < 16 or size & (size - 1):
            return f"{name} {size} is not a power of two from 16 up"
    if not q_latent.numel() or not latent.numel():
        return "an empty tensor"
    # Within a tile of 64 slots the kernels count in 32 bits.
    if max(latent.stride(1), rope.stride(1)) >= 1 << 25:
        return "slots 2**25 elements or more apart; make the cache contiguous"
    if latent.dtype == torch.float8_e4m3fn and latent.is_cuda:
        card = dispatch.cuda_reason(latent.device, FP8_CARD)
        return card and f"FP8 latents: {card}"
    return None


def _flash_mla_reason(q_latent, q_rope, latent, rope, starts, latent_scale, sliding_window) -> str | None:
    """Why these inputs are none for FlashMLA: it reads whole pages of 64 tokens with latent and key side by side."""
    batch, slots, rank = latent.shape
    width = rank + rope.shape[2]
    if (
        (rank, width) != (512, 576)
        or latent_scale is not None
        or q_latent.dtype not in (torch.bfloat16, torch.float16)
    ):
        return "takes a 16-bit cache of 512 + 64 numbers a token"
    if starts is not None or sliding_window is not None:
        return "has neither left padding nor a sliding window"
    side_by_side = rope.data_ptr() == latent.data_ptr() + rank * latent.element_size()
    if (
        not side_by_side
        or slots % 64
        or latent.stride() != rope.stride()
        or latent.stride() != (slots * width, width, 1)
    ):
        return "needs latent and rope side by side in one dense buffer of whole pages of 64 tokens"
    return None


def _flash_mla(q_latent, q_rope, latent, scale, lengths):
    """FlashMLA over the cache as it lies, taken for pages in order."""
    import flash_mla

    batch, queries, heads, rank = q_latent.shape
    slots, width = latent.shape[1], rank + q_rope.shape[3]
    pages = latent.as_strided((batch * slots // 64, 64, 1, width), (64 * width, width, width, 1))
    table = torch.arange(pages.shape[0], dtype=torch.int32, device=latent.device).view(batch, -1)
    if lengths is None:
        lengths = torch.full((batch,), slots, dtype=torch.int32, device=latent.device)
    lengths = lengths.int()
    schedule, splits = flash_mla.get_mla_metadata(lengths, queries * heads, 1)
    out, lse = flash_mla.flash_mla_with_kvcache(
        torch.cat((q_latent, q_rope), dim=-1), pages, table, lengths, rank, schedule, splits,
        softmax_scale=scale, causal=True,
    )  # fmt: skip
    return out, lse.transpose(1, 2).contiguous()


def _fake(q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window, backend):
    return q_latent.new_empty(q_latent.shape), q_latent.new_empty(q_latent.shape[:3], dtype=torch.float32)


@dispatch.define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor rope, float scale, Tensor? lengths,"
    " Tensor? starts, Tensor? latent_scale, int? sliding_window, str backend) -> (Tensor, Tensor)",
    _fake,
)
def _run(q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window, backend):
    table = reasons(q_latent.device)
    table["triton"] = table["triton"] or shape_reason(q_latent, rope, latent)
    table["flash_mla"] = table["flash_mla"] or _flash_mla_reason(
        q_latent, q_rope, latent, rope, starts, latent_scale, sliding_window
    )
    chosen = dispatch.choose(OPERATION, table, backend, q_latent.device)
    if chosen == "flash_mla":
        return _flash_mla(q_latent, q_rope, latent, scale, lengths)
    if chosen == "torch":
        out, lse = reference.mla_decode(
            q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window
        )
        return out.contiguous(), lse.contiguous()
    from .triton.launch_mla import mla_decode as launch

    tensors = (q_latent, q_rope, latent, rope, latent_scale)
    ql, qr, c, r, of_groups = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors)
    return launch(ql, qr, c, r, scale, lengths, starts, of_groups, sliding_window)


def _check(q_latent, q_rope, latent, rope, lengths, starts, latent_scale, sliding_window) -> None:
    if q_latent.dim() != 4 or q_rope.dim() != 4 or latent.dim() != 3 or rope.dim() != 3:
        raise ValueError("mla_decode takes q_latent [B,T,H,C], q_rope [B,T,H,R], latent [B,S,C], rope [B,S,R]")
    batch, _, _, rank = q_latent.shape
    if q_rope.shape[:3] != q_latent.shape[:3] or latent.shape[0] != batch or latent.shape[2] != rank:
        raise ValueError(f"q_latent {tuple(q_latent.shape)}, q_rope {tuple(q_rope.shape)} and latent "
                         f"{tuple(latent.shape)} disagree on B, T, H or C")  # fmt: skip
    if rope.shape != (*latent.shape[:2], q_rope.shape[3]):
        raise ValueError(f"rope {tuple(rope.shape)} must be [B, S, R] = {(*latent.shape[:2], q_rope.shape[3])}")
    if q_latent.dtype not in QUERY_DTYPES or q_rope.dtype != q_latent.dtype:
        raise ValueError(f"queries must share one floating dtype, got {q_latent.dtype} and {q_rope.dtype}")
    if (latent.dtype == torch.float8_e4m3fn) != (latent_scale is not None):
        raise ValueError("latent_scale belongs to a float8_e4m3fn latent, and to no other")
    if latent_scale is None and (latent.dtype != q_latent.dtype or rope.dtype != q_latent.dtype):
        raise ValueError(f"cache of {latent.dtype} and {rope.dtype} does not fit queries of {q_latent.dtype}")
    if latent_scale is not None:
        if latent_scale.shape != (*latent.shape[:2], -(-rank // SCALE_GROUP)):
            raise ValueError(f"latent_scale {tuple(latent_scale.shape)} must be [B, S, ceil(C / {SCALE_GROUP})]")
        if latent_scale.dtype != torch.float32:
            raise ValueError(f"latent_scale must be float32, got {latent_scale.dtype}")
    for name, tensor in (("lengths", lengths), ("starts", starts)):
        if tensor is not None and (tensor.shape != (batch,) or tensor.is_floating_point()):
            raise ValueError(f"{name} must be an integer tensor [B] = [{batch}], got {tuple(tensor.shape)}")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"sliding_window must be at least 1, got {sliding_window}")


def mla_decode(
    q_latent: torch.Tensor,
    q_rope: torch.Tensor,
    latent: torch.Tensor,
    rope: torch.Tensor,
    *,
    scale: float,
    lengths: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    latent_scale: torch.Tensor | None = None,
    sliding_window: int | None = None,
    backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the T newest tokens over the cached latents, causal among themselves.

    Args:
        q_latent: [B, T, H, C] queries times the key up-projection; bfloat16, float16, float32 or float64.
        q_rope: [B, T, H, R] roped part of the queries, same dtype.
        latent: [B, S, C] cached latents, the T new ones among them; the queries' dtype, or float8_e4m3fn.
        rope: [B, S, R] cached roped keys; the queries' dtype (with an FP8 latent any floating dtype).
        scale: multiplies the logits (the softmax scale, YaRN's factor included).
        lengths: int32 [B], slots in use of each row, the T new ones included; None for S. Stays on the device.
        starts: int32 [B], first slot in use of each row (left padding); None for 0.
        latent_scale: float32 [B, S, ceil(C / 128)], for an FP8 latent alone.
        sliding_window: a query reads at most this many slots, itself included; None for all.
        backend: "auto", "flash_mla" (where installed, on Hopper), "triton" or "torch".

    Query t of row b reads the slots from ``starts[b]`` up to, not including, ``lengths[b] - (T - 1 - t)``. What lies
    in other slots does not matter, NaN included. Strided views are read in place. Where a gradient is wanted the
    torch path runs: the kernels have none.

    Returns:
        out: [B, T, H, C] of the queries' dtype, in latent space; zeros for a query that reads nothing.
        lse: float32 [B, T, H], log-sum-exp of the scaled logits in base e; -inf for such a query.

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown backend.
        RuntimeError: a backend asked for that cannot run here, with the reason.
    """
    _check(q_latent, q_rope, latent, rope, lengths, starts, latent_scale, sliding_window)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q_latent, q_rope, latent, rope)):
        if dispatch.requested(OPERATION, backend)[0] not in ("auto", "torch"):
            raise RuntimeError(f"mla_decode on {backend!r} has no gradient; use backend='torch' or torch.no_grad()")
        return reference.mla_decode(
            q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window
        )
    return dispatch.ops.mla_decode(
        q_latent, q_rope, latent, rope, scale, lengths, starts, latent_scale, sliding_window, backend
    )
