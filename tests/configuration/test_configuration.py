"""Reading, writing, checking and accounting, against the published files and counts."""

import json

import pytest
from transformers import AutoConfig

import deepseek_v3
from deepseek_v3 import DeepseekV3Config, KimiK2Config
from deepseek_v3.configuration import PRESETS, account, official_tensors, preset, recognise

PUBLISHED_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V31 = {**PUBLISHED_V3, "quantization_config": {**PUBLISHED_V3["quantization_config"], "scale_fmt": "ue8m0"}}


@pytest.mark.parametrize(
    "published",
    [PUBLISHED_V3, V31, PRESETS["kimi-k2"], PRESETS["moonlight-16b-a3b"]],
    ids=["v3", "v3.1", "kimi-k2", "moonlight"],
)
def test_published_config_is_read_and_written_verbatim(published, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(published))
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, KimiK2Config if published["model_type"] == "kimi_k2" else DeepseekV3Config)
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written.get(key) for key in published} == published
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert again.to_diff_dict() == config.to_diff_dict()


def test_reading_leaves_the_callers_dictionary_alone():
    values = json.loads(json.dumps(PUBLISHED_V3))
    DeepseekV3Config.from_dict(values)
    assert values["rope_scaling"] == PUBLISHED_V3["rope_scaling"]


def test_accounting_reproduces_the_published_counts_of_v3():
    bill = account(preset("deepseek-v3"))
    assert bill.main_parameters == 671_026_419_200
    assert bill.mtp_parameters == 11_610_068_224
    assert bill.checkpoint_parameters == 684_489_845_504
    assert bill.activated_parameters == 36_625_618_432
    assert bill.activated_parameters_with_embedding == 37_552_297_472
    assert bill.mtp_activated_parameters == 688_100_608
    assert bill.parts["routed_experts"] == 653_908_770_816
    assert bill.parts["attention"] == 11_413_422_080
    assert sum(bill.parts.values()) == bill.main_parameters


def test_accounting_of_bytes_and_flops():
    bill = account(preset("deepseek-v3"))
    assert bill.cache_bytes_per_token() == 70_272
    assert bill.expanded_cache_bytes_per_token() == 4_997_120
    assert bill.grouped_query_cache_bytes_per_token(128) == 3_997_696
    assert bill.cache_bytes_per_token("float8_e4m3fn") == 61 * 656
    assert bill.weight_bytes("float8_e4m3fn") == 688_574_839_360
    assert bill.weight_bytes("bfloat16") == 1_368_979_721_216
    assert round(bill.flops_per_token(4096, training=True) / 1e9, 2) == 250.46
    assert round(bill.flops_per_token(4096, training=True, causal=False) / 1e9, 1) == 281.2
    # What absorbing saves over re-expanding the latents: 33,554,432 - (278,528 - 81,920) a layer and cached token.
    saved = bill.decode_flops_per_token(1000, absorbed=False) - bill.decode_flops_per_token(1000)
    assert saved == 61 * 1000 * (33_554_432 - (278_528 - 81_920))


def test_accounting_of_the_other_models():
    kimi, moonlight = account(preset("kimi-k2")), account(preset("moonlight-16b-a3b"))
    assert (kimi.main_parameters, kimi.activated_parameters) == (1_026_408_232_448, 31_687_095_808)
    assert (moonlight.main_parameters, moonlight.activated_parameters) == (15_960_110_208, 2_579_231_872)
    assert moonlight.cache_bytes_per_token() == 31_104


def test_official_layout_of_v3_has_the_published_number_of_tensors():
    tensors = list(official_tensors(preset("deepseek-v3"), quantized=True))
    assert len(tensors) == 91_991
    assert sum(spec.kind == "fp8" for spec in tensors) == sum(spec.kind == "scale" for spec in tensors) == 45_808
    shapes = {spec.name: spec.shape for spec in tensors}
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14336)
    assert len(list(official_tensors(preset("deepseek-v3")))) == 46_183


def test_accounting_equals_the_weights_of_a_built_model(model):
    bill = account(model.config)
    main = sum(t.numel() for name, t in model.state_dict().items() if "layers.3." not in name)
    assert bill.main_parameters == main
    assert bill.main_parameters + bill.mtp_parameters == sum(t.numel() for t in model.state_dict().values())


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ({"n_group": 3}, "n_routed_experts = 8"),
        ({"topk_group": 9}, "topk_group = 9"),
        ({"n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "num_experts_per_tok = 3"),
        ({"n_group": 8, "topk_group": 4}, "n_group = 8"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers = -1"),
        ({"rope_scaling": {"type": "yarnn", "factor": 2.0}}, "yarnn"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling['factor']"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax'"),
        ({"topk_method": "greedy"}, "topk_method = 'greedy'"),
        ({"num_key_value_heads": 2}, "num_key_value_heads = 2"),
        ({"hidden_size": 0}, "hidden_size = 0"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"mtp_loss_weight": -0.1}, "mtp_loss_weight = -0.1"),
        ({"mla_form": "folded"}, "mla_form"),
        ({"attention_dropout": 1.5}, "attention_dropout = 1.5"),
    ],
)
def test_inconsistent_values_are_refused_by_name(overrides, named):
    with pytest.raises(ValueError, match=".") as error:
        preset("tiny", **overrides)
    assert named in str(error.value)


def test_a_field_set_after_construction_is_checked_by_the_model():
    config = preset("tiny")
    config.n_group = 3
    with pytest.raises(ValueError, match="n_group = 3"):
        deepseek_v3.DeepseekV3Model(config)


def test_presets_are_recognised_and_unknown_names_refused():
    assert [recognise(preset(name)) for name in PRESETS] == list(PRESETS)
    assert recognise(preset("tiny", hidden_size=128)) is None
    with pytest.raises(ValueError, match="deepseek-v3"):
        preset("deepseek-v4")


def test_break_even_of_the_two_forms_at_true_size():
    assert round(preset("deepseek-v3").absorbed_break_even) == 171
