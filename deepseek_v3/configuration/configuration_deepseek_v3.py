"""`DeepseekV3Config`: reads and writes the published config.json files verbatim.

Special about it: the keys that other readers drop (`scoring_func`, `topk_method`, `moe_layer_freq`, ...) are kept;
the RoPE settings are written back under their published names; every inconsistency is refused with the field, its
value and the remedy.
"""

from copy import deepcopy
from functools import wraps
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .validation import check

# What `quant_method: fp8` of a config.json is called in memory: under its own name transformers would build its FP8
# linear, which takes kernels from the Hub.
FP8_METHOD = "deepseek_fp8"

# Derived from other fields at every construction, hence never written.
_DERIVED = ("head_dim", "qk_head_dim")


def _plain_value_errors(cls: type) -> type:
    """Let a value of the wrong type raise the ValueError that every other bad value raises."""
    strict_init = cls.__init__  # type: ignore[misc]

    @wraps(strict_init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        try:
            strict_init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(f"{cls.__name__}: {' '.join(str(error).split())}") from error

    cls.__init__ = __init__  # type: ignore[misc]
    return cls


@_plain_value_errors
@strict
class DeepseekV3Config(PreTrainedConfig):
    r"""
    Configuration of a DeepSeek-V3-class model. The defaults are those of DeepSeek-V3 itself.

    Args:
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads: as in every transformers decoder.
        intermediate_size: inner width of the dense MLPs (the first `first_k_dense_replace` layers).
        moe_intermediate_size: inner width F of one expert.
        num_nextn_predict_layers: Multi-Token Prediction modules after the main layers; 0 for none.
        n_routed_experts, n_shared_experts, num_experts_per_tok: E, shared experts, K.
        n_group, topk_group: groups of experts, and how many of them a token may reach (node-limited routing).
        routed_scaling_factor, norm_topk_prob: applied to the chosen experts' unbiased scores.
        q_lora_rank: rank of the compressed query, None for a plain `q_proj`.
        kv_lora_rank, qk_rope_head_dim, qk_nope_head_dim, v_head_dim: C, R, N, V of the latent attention.
        rope_interleave: rotate interleaved pairs (the published weights) instead of half-split ones.
        mtp_loss_weight: lambda of the MTP loss (report: 0.3, then 0.1); 0 switches the MTP loss off.
        mtp_hidden_state: which hidden state enters an MTP module, "post_norm" (after the final norm) or "pre_norm".
        mtp_hidden_states_first: hidden half first in `eh_proj`; the published weights have the embedding first.
        seq_balance_loss_alpha: alpha of the sequence-wise balance loss (report: 1e-4); 0 switches it off.
        router_bias_update_rate: gamma of the bias update (report: 0.001); 0 switches it off.
        mla_form: "auto" (by the number of query tokens), "expanded" or "absorbed".

    Raises:
        ValueError: a value contradicts another; the message names field, value and remedy.
    """

    model_type: ClassVar[str] = "deepseek_v3"
    keys_to_ignore_at_inference: ClassVar[list[str]] = [
        "past_key_values",
        "router_logits",
        "main_loss",
        "mtp_loss",
        "balance_loss",
        "aux_loss",
        "mtp_logits",
    ]
    attribute_map: ClassVar[dict[str, str]] = {
        "num_local_experts": "n_routed_experts",
        "num_mtp_layers": "num_nextn_predict_layers",
    }
    base_model_tp_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
        "layers.*.mlp.shared_experts.gate_proj": "colwise",
        "layers.*.mlp.shared_experts.up_proj": "colwise",
        "layers.*.mlp.shared_experts.down_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_ep_plan: ClassVar[dict[str, Any] | None] = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 129280
    hidden_size: int = 7168
    intermediate_size: int = 18432
    moe_intermediate_size: int = 2048
    num_hidden_layers: int = 61
    num_nextn_predict_layers: int | None = 1
    num_attention_heads: int = 128
    num_key_value_heads: int | None = None
    n_shared_experts: int | None = 1
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 3
    n_group: int | None = 8
    topk_group: int | None = 4
    norm_topk_prob: bool = True
    routed_scaling_factor: float | int = 2.5
    scoring_func: str = "sigmoid"
    topk_method: str = "noaux_tc"
    ep_size: int = 1
    q_lora_rank: int | None = 1536
    kv_lora_rank: int = 512
    qk_rope_head_dim: int = 64
    qk_nope_head_dim: int = 128
    v_head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | list[int] | None = 0
    eos_token_id: int | list[int] | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    rope_interleave: bool = True
    attention_bias: bool = False
    attention_dropout: float | int = 0.0
    output_router_logits: bool = False
    mtp_loss_weight: float | int = 0.3
    mtp_hidden_state: Literal["post_norm", "pre_norm"] = "post_norm"
    mtp_hidden_states_first: bool = False
    seq_balance_loss_alpha: float | int = 1e-4
    router_bias_update_rate: float | int = 0.001
    mla_form: Literal["auto", "expanded", "absorbed"] = "auto"

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        self.num_nextn_predict_layers = self.num_nextn_predict_layers or 0
        self.n_shared_experts = self.n_shared_experts or 0
        self.n_group = self.n_group or 1
        self.topk_group = self.topk_group or 1
        self.qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.head_dim = self.qk_rope_head_dim
        # The base class completes these dictionaries in place; the caller's own stay as they were.
        self.rope_parameters = deepcopy(self.rope_parameters)
        super().__post_init__(**deepcopy(kwargs))
        self._rename_quantization("fp8", FP8_METHOD, self.__dict__)
        self.check()

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Nothing: the class belongs to this package, and saving must not copy its file into a folder."""

    def check(self) -> None:
        """Raise ValueError where values contradict each other; a model calls it too, since fields can be set."""
        check(self, rope_types=("default", *ROPE_INIT_FUNCTIONS))

    @property
    def absorbed_break_even(self) -> float:
        """Query tokens a forward below which the absorbed form costs fewer FLOPs than re-expanding the latents.

        Expanding costs 2 C H (N + V) a cached token, attention 2 H ((2C + R) - (N + R + V)) more a query and cached
        token in the absorbed form; 171 at the true sizes.
        """
        expanded, latent = self.qk_nope_head_dim + self.v_head_dim, self.kv_lora_rank
        saved = 2 * latent - expanded
        return latent * expanded / saved if saved > 0 else float("inf")

    @staticmethod
    def _rename_quantization(old: str, new: str, values: dict[str, Any]) -> None:
        quantization = values.get("quantization_config")
        if isinstance(quantization, dict) and quantization.get("quant_method") == old:
            values["quantization_config"] = {**quantization, "quant_method": new}

    def to_dict(self) -> dict[str, Any]:
        """The configuration with its RoPE settings and quantisation as the published files spell them."""
        output = super().to_dict()
        self._rename_quantization(FP8_METHOD, "fp8", output)
        for name in _DERIVED:
            output.pop(name, None)
        rope = dict(output.pop("rope_parameters", None) or {})
        output["rope_theta"] = rope.pop("rope_theta", self.default_theta)
        rope_type = rope.pop("rope_type", "default")
        if rope_type != "default":
            output["rope_scaling"] = {**rope, "type": rope_type}
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json holds; older readers know the dtype as `torch_dtype`, as in the published files."""
        output = super().to_diff_dict()
        self._rename_quantization(FP8_METHOD, "fp8", output)
        if output.get("dtype") is not None:
            output["torch_dtype"] = output["dtype"]
        return output


@_plain_value_errors
@strict
class KimiK2Config(DeepseekV3Config):
    """The same architecture under Kimi-K2's `model_type`, so that its config.json is read and written verbatim."""

    model_type: ClassVar[str] = "kimi_k2"
