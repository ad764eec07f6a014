"""The official checkpoint's tensors, named and shaped from a configuration alone.

Nothing here imports torch or transformers: any object that carries the configuration's attributes will do, so a
tool can read 163 shards' headers without loading a framework. Source of names, shapes and dtypes: the published
DeepSeek-V3/R1 files.

Letters: D hidden_size, F expert width, E routed experts, C kv_lora_rank, R qk_rope_head_dim, N qk_nope_head_dim,
V v_head_dim, H heads, Q q_lora_rank.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

FP8_BLOCK = 128
Kind = Literal["fp8", "scale", "bf16", "f32"]


class TensorSpec(NamedTuple):
    """One tensor of the official layout.

    Attributes:
        name: the official name, e.g. `model.layers.3.mlp.experts.0.up_proj.weight`.
        shape: its shape as stored.
        kind: "fp8" (E4M3 codes), "scale" (float32, one per 128x128 block), "bf16" or "f32".
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind


def is_moe_layer(config: Any, layer_idx: int) -> bool:
    """Whether decoder layer `layer_idx` holds experts; layers from `num_hidden_layers` on (MTP) always do."""
    if layer_idx >= config.num_hidden_layers:
        return True
    frequency = getattr(config, "moe_layer_freq", 1) or 1
    return layer_idx >= config.first_k_dense_replace and layer_idx % frequency == 0


def scale_shape(rows: int, columns: int) -> tuple[int, int]:
    """Shape of `weight_scale_inv` for a [rows, columns] matrix: ceil-division by the 128x128 block."""
    return -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)


def attention_matrices(config: Any) -> list[tuple[str, tuple[int, int]]]:
    """(name below `self_attn`, [out, in]) of the MLA projections of one layer, in the files' order."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    q_head = config.qk_nope_head_dim + config.qk_rope_head_dim
    matrices: list[tuple[str, tuple[int, int]]] = []
    if config.q_lora_rank is None:
        matrices.append(("q_proj", (heads * q_head, hidden)))
    else:
        matrices.append(("q_a_proj", (config.q_lora_rank, hidden)))
        matrices.append(("q_b_proj", (heads * q_head, config.q_lora_rank)))
    matrices.append(("kv_a_proj_with_mqa", (config.kv_lora_rank + config.qk_rope_head_dim, hidden)))
    matrices.append(("kv_b_proj", (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank)))
    matrices.append(("o_proj", (hidden, heads * config.v_head_dim)))
    return matrices


def mlp_matrices(config: Any, width: int) -> list[tuple[str, tuple[int, int]]]:
    """(name, [out, in]) of one SwiGLU MLP of inner width `width`."""
    hidden = config.hidden_size
    return [("gate_proj", (width, hidden)), ("up_proj", (width, hidden)), ("down_proj", (hidden, width))]


def _matrix(name: str, shape: tuple[int, int], quantized: bool) -> Iterator[TensorSpec]:
    if not quantized:
        yield TensorSpec(f"{name}.weight", shape, "bf16")
        return
    yield TensorSpec(f"{name}.weight", shape, "fp8")
    yield TensorSpec(f"{name}.weight_scale_inv", scale_shape(*shape), "scale")


def _attention(config: Any, prefix: str, quantized: bool) -> Iterator[TensorSpec]:
    bias = getattr(config, "attention_bias", False)
    for name, shape in attention_matrices(config):
        yield from _matrix(f"{prefix}.{name}", shape, quantized)
        if bias and name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj"):
            yield TensorSpec(f"{prefix}.{name}.bias", shape[:1], "bf16")
    if config.q_lora_rank is not None:
        yield TensorSpec(f"{prefix}.q_a_layernorm.weight", (config.q_lora_rank,), "bf16")
    yield TensorSpec(f"{prefix}.kv_a_layernorm.weight", (config.kv_lora_rank,), "bf16")


def _feed_forward(config: Any, layer_idx: int, prefix: str, quantized: bool) -> Iterator[TensorSpec]:
    if not is_moe_layer(config, layer_idx):
        for name, shape in mlp_matrices(config, config.intermediate_size):
            yield from _matrix(f"{prefix}.{name}", shape, quantized)
        return
    yield TensorSpec(f"{prefix}.gate.weight", (config.n_routed_experts, config.hidden_size), "bf16")
    yield TensorSpec(f"{prefix}.gate.e_score_correction_bias", (config.n_routed_experts,), "f32")
    matrices = mlp_matrices(config, config.moe_intermediate_size)
    one = [spec for name, shape in matrices for spec in _matrix(f".{name}", shape, quantized)]
    for expert in range(config.n_routed_experts):
        before = f"{prefix}.experts.{expert}"
        for part in one:
            yield TensorSpec(before + part.name, part.shape, part.kind)
    if config.n_shared_experts:
        for name, shape in mlp_matrices(config, config.moe_intermediate_size * config.n_shared_experts):
            yield from _matrix(f"{prefix}.shared_experts.{name}", shape, quantized)


def layer_tensors(config: Any, layer_idx: int, quantized: bool = False) -> Iterator[TensorSpec]:
    """The tensors of one decoder layer, or of one MTP module where `layer_idx >= num_hidden_layers`.

    An MTP module stores the embedding and the head a second time, as the official files do.
    """
    prefix, hidden = f"model.layers.{layer_idx}", config.hidden_size
    if layer_idx >= config.num_hidden_layers:
        yield TensorSpec(f"{prefix}.embed_tokens.weight", (config.vocab_size, hidden), "bf16")
        for norm in ("enorm", "hnorm"):
            yield TensorSpec(f"{prefix}.{norm}.weight", (hidden,), "bf16")
        yield TensorSpec(f"{prefix}.eh_proj.weight", (hidden, 2 * hidden), "bf16")
        yield TensorSpec(f"{prefix}.shared_head.norm.weight", (hidden,), "bf16")
        yield TensorSpec(f"{prefix}.shared_head.head.weight", (config.vocab_size, hidden), "bf16")
    yield from _attention(config, f"{prefix}.self_attn", quantized)
    yield from _feed_forward(config, layer_idx, f"{prefix}.mlp", quantized)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        yield TensorSpec(f"{prefix}.{norm}.weight", (hidden,), "bf16")


def outer_tensors(config: Any) -> list[TensorSpec]:
    """What lies around the layers: embedding, last norm and, where it is not the embedding, the head."""
    table = (config.vocab_size, config.hidden_size)
    specs = [
        TensorSpec("model.embed_tokens.weight", table, "bf16"),
        TensorSpec("model.norm.weight", table[1:], "bf16"),
    ]
    if not getattr(config, "tie_word_embeddings", False):
        specs.append(TensorSpec("lm_head.weight", table, "bf16"))
    return specs


def official_tensors(config: Any, quantized: bool = False) -> Iterator[TensorSpec]:
    """Every tensor of the official checkpoint of `config`, in the order of the layers.

    Args:
        config: a `DeepseekV3Config`, or any object with its attributes.
        quantized: True for the FP8 files (codes and scales), False for the BF16 ones.
    """
    embedding, *last = outer_tensors(config)
    yield embedding
    for layer_idx in range(config.num_hidden_layers):
        yield from layer_tensors(config, layer_idx, quantized)
    yield from last
    for depth in range(config.num_nextn_predict_layers or 0):
        yield from layer_tensors(config, config.num_hidden_layers + depth, quantized)
