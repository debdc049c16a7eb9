"""Per-architecture data: config fields that generic shrinking does not know, or would get wrong.

A value that is a mapping, under the name of a nested config, changes that nested config; everywhere else a
mapping replaces the field. The reason stands beside a value where it is not the size alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["MAIN_ARCHS", "OVERRIDES", "UNBUILDABLE"]

MAIN_ARCHS = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "gpt_neox", "granite"),
    *("qwen3_moe", "mixtral", "gpt_oss"),
)
"""The architectures that the first release supports; the zoo's most used entries."""

_Fields = dict[str, Any]

_LINEAR, _FULL, _SLIDING = "linear_attention", "full_attention", "sliding_attention"
_ROPE_LLAMA3: _Fields = {
    "rope_parameters": {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0}
    | {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
}
_ROPE_YARN: _Fields = {
    "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "truncate": False}
    | {"beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 32}
}
_DECODER: _Fields = {"is_decoder": True}
_DENSE_THEN_SPARSE: _Fields = {"num_hidden_layers": 4, "first_k_dense_replace": 2}
_GEMMA: _Fields = {"query_pre_attn_scalar": 16}
_GRANITE: _Fields = {
    "attention_multiplier": 0.25,
    "residual_multiplier": 0.5,
    "embedding_multiplier": 2.0,
    "logits_scaling": 0.5,
}
_LLAMA4: _Fields = {
    "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 96,
    "no_rope_layers": [1, 0, 1, 0],
    "floor_scale": 16,
}
_QWEN4: _Fields = {
    # the sparse indexer and the n-gram embeddings of released checkpoints are off by default
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 64,
    "hc_lowrank": 8,
    "split_ngram_parts": 1,
    "eos_token_id": 2,
}
_DOTS3: _Fields = {
    "head_dim": 32,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "kv_lora_rank": 24,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 16,
    "swa_kv_lora_rank": 16,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
_SHARED_KV: _Fields = {"layer_types": [_SLIDING, _FULL] * 3, "num_kv_shared_layers": 2}
_GEMMA3N: _Fields = _SHARED_KV | {
    "activation_sparsity_pattern": [0.95] * 2 + [0.0] * 4,
    "intermediate_size": [96] * 6,
    "laurel_rank": 16,
}

OVERRIDES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "apertus": _ROPE_LLAMA3,
        "bailing_hybrid": {"layer_group_size": 2, "first_k_dense_replace": 2},
        "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3]},
        "bert": _DECODER,
        "bert-generation": _DECODER,
        "big_bird": {
            "is_decoder": True,
            "attention_type": "original_full",  # a decoder runs no block-sparse attention
        },
        "blt": {
            "num_hidden_layers": 2,  # not a field: read by the cache that its own forward makes
            "encoder_hash_byte_group_vocab": 64,
            "local_attention_window_len": 16,
            "patch_size": 4,
            "patcher_config": {"vocab_size": 128, "num_key_value_heads": 4},
            "encoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
            "decoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
            "global_config": {"num_key_value_heads": 4},
        },
        "camembert": _DECODER,
        "cohere": {"logit_scale": 0.5},
        "cohere2": {"logit_scale": 0.5},
        "cohere2_moe": {"logit_scale": 0.5, "num_shared_experts": 1},
        "cohere_compass_text": {
            "layer_types": [_SLIDING, _FULL] * 2,
            "rope_parameters": {
                _SLIDING: {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
                _FULL: None,
            },
        },
        "cpmant": {"position_bias_num_buckets": 32, "position_bias_max_distance": 64, "prompt_length": 4},
        "ctrl": {"n_positions": 512},
        "cwm": _ROPE_LLAMA3,
        "data2vec-text": _DECODER,
        "dbrx": {
            "attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 2.0},
            "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
        },
        "deepseek_v2": _DENSE_THEN_SPARSE | {"num_experts_per_tok": 2},
        "deepseek_v3": _DENSE_THEN_SPARSE,
        "deepseek_v4": {
            "o_lora_rank": 16,
            "o_groups": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "index_topk": 4,
            "partial_rotary_factor": 0.25,
            "hc_mult": 2,
            "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
            "layer_types": [_SLIDING, "heavily_compressed_attention", "compressed_sparse_attention"] * 2,
        },
        "doge": {"keep_window_size": 16},
        "dots1": _DENSE_THEN_SPARSE
        | {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
        "dots3_note": {
            "text_config": _DOTS3,
            "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64},
            "audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64},
        },
        "dots3_note_text": _DOTS3,
        "electra": _DECODER,
        "ernie": _DECODER,
        "ernie4_5_moe": {"num_hidden_layers": 4, "moe_layer_start_index": 2, "moe_layer_end_index": 3},
        "falcon_h1": {"mamba_d_ssm": 128, "mamba_n_heads": 8},
        "gemma2": _GEMMA,
        "gemma3": {"text_config": _GEMMA},
        "gemma3_text": _GEMMA,
        "gemma3n": {
            "text_config": _GEMMA3N,
            "vision_config": {"model_type": "fpcompile_gemma3n_tower", "vocab_size": 8, "vocab_offset": 112},
            "audio_config": {"vocab_size": 8, "vocab_offset": 120, "conf_num_attention_heads": 4}
            | {"conf_num_hidden_layers": 2, "sscp_conv_channel_size": [8, 4]},
        },
        "gemma3n_text": _GEMMA3N,
        "gemma4": {
            "text_config": {"global_head_dim": 32, "num_global_key_value_heads": 1, "attention_k_eq_v": True}
            | {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
        },
        "gemma4_text": _SHARED_KV | {"global_head_dim": 32},
        "gemma4_unified": {"text_config": {"global_head_dim": 32}},
        "gemma4_unified_text": {"global_head_dim": 32, "num_global_key_value_heads": 1},
        "glm4_moe": _DENSE_THEN_SPARSE,
        "glm_moe_dsa": {"indexer_types": ["full", "shared"] * 2},
        "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
        "gpt_neox": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
        },
        "gpt_oss": _ROPE_YARN,
        "granite": _GRANITE,
        "granite_swa": _GRANITE,
        "granitemoe": _GRANITE,
        "granitemoe_swa": _GRANITE | {"shared_intermediate_size": 48},
        "granitemoehybrid": _GRANITE | {"layer_types": [_LINEAR, _FULL] * 2},
        "granitemoeshared": _GRANITE | {"shared_intermediate_size": 48},
        "hunyuan_v1_dense": {"head_dim": 16},
        "hunyuan_v1_moe": {"head_dim": 16},
        "hy_v4": {"indexer_types": ["full", "shared"] * 2},
        "inkling2_text": {
            "unpadded_vocab_size": 120,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "d_rel": 8,
            "rel_extent": 24,
            "log_scaling_n_floor": 32,
            "n_layers_per_attn_res_block": 2,
        },
        "inkling_text": {
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 16,
            "d_rel": 8,
            "rel_extent": 24,
            "log_scaling_n_floor": 32,
            "logits_mup_width_multiplier": 2.0,
            "mlp_layer_types": ["dense", "dense", "sparse", "sparse"],
        },
        "jamba": {
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 0,
        },
        "laguna": {"layer_types": [_FULL, _SLIDING] * 2, "num_attention_heads_per_layer": [4, 4, 8, 8]},
        "lfm2": {"layer_types": ["conv", _FULL] * 2, "block_multiple_of": 32},
        "lfm2_moe": {"layer_types": ["conv", _FULL] * 2, "num_hidden_layers": 4},
        "llama4": {"text_config": _LLAMA4},
        "llama4_text": _LLAMA4,
        "longcat_flash": {"zero_expert_num": 2},
        "megatron-bert": _DECODER,
        "mamba2": {"num_heads": 8, "n_groups": 2},
        "mellum": {"layer_types": [_FULL, _SLIDING] * 2},
        "minicpm3": {"scale_emb": 2, "dim_model_base": 32},
        "minimax": {"head_dim": 16},
        "minimax_m3_vl_text": {
            "layer_types": [_FULL, "minimax_m3_sparse"] * 2,
            "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 2,
            "index_n_heads": 2,  # one to a key-value head
            "index_block_size": 8,
            "index_topk_blocks": 2,
            "dense_intermediate_size": 96,
        },
        "ministral": {"head_dim": 16},
        "ministral3": {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "beta_fast": 32.0}
            | {"beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1}
            | {"original_max_position_embeddings": 32}
        },
        "mixtral": {"head_dim": 16},
        "mllama": {"text_config": {"num_hidden_layers": 4, "cross_attention_layers": [1, 3]}},
        "moshi": {"sliding_window": 512},  # bounds its cache but not its mask: wrong beyond it
        "mpt": {"use_cache": True},
        "musicgen": {"decoder": {"num_codebooks": 1}},  # one code book: ids are a plain [batch, tokens]
        "musicgen_melody": {"decoder": {"num_codebooks": 1}},
        "nemotron": {"num_key_value_heads": 2},
        "nemotron_h": {"layers_block_type": [_LINEAR, "moe", _FULL, "mlp"] * 2},
        "phi3": {"sliding_window": 16},
        "phi4_multimodal": {
            "original_max_position_embeddings": 512,
            "audio_config": {
                "ext_pw_out_channel": 64,
                "depthwise_separable_out_channel": 64,
                "nemo_conv_channels": 16,
            },
        },
        "qwen4_exp": {"text_config": _QWEN4},
        "qwen4_exp_text": _QWEN4,
        "recurrent_gemma": {"num_hidden_layers": 6},
        "reformer": {
            "is_decoder": True,
            "attn_layers": ["local", "lsh"] * 2,
            "axial_pos_shape": [16, 32],
            "axial_pos_embds_dim": [16, 48],
            "local_attn_chunk_length": 16,
            "lsh_attn_chunk_length": 16,
            # unset, the number of buckets is chosen by the first forward and kept, the hash drawn at each one
            "num_buckets": 4,
            "hash_seed": 0,
        },
        "rembert": {**_DECODER, "input_embedding_size": 32, "output_embedding_size": 48},
        "roberta": _DECODER,
        "roberta-prelayernorm": _DECODER,
        "roc_bert": {**_DECODER, "pronunciation_vocab_size": 128, "shape_vocab_size": 128}
        | {"pronunciation_embed_dim": 32, "shape_embed_dim": 32},
        "roformer": _DECODER,
        "rwkv": {"num_hidden_layers": 4, "attention_hidden_size": 64, "rescale_every": 2},
        "smollm3": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0]},
        "xlm": {"causal": True},
        "xlm-roberta": _DECODER,
        "xlm-roberta-xl": _DECODER,
        "xlnet": {"attn_type": "uni"},  # the causal one of its two attention types
        "xlstm": {"hidden_size": 128, "embedding_dim": 128, "max_inference_chunksize": 32},
        "xmod": {**_DECODER, "default_language": "en_XX"},
        "zamba": {
            "layers_block_type": [_LINEAR, "hybrid"] * 2,
            "num_hidden_layers": 4,
            "attention_head_dim": 32,
        }
        | {"attention_hidden_size": 128},
        "zamba2": {"layers_block_type": [_LINEAR, "hybrid"] * 2, "num_hidden_layers": 4}
        | {"num_key_value_heads": 4, "num_mem_blocks": 1},
        "zaya": {
            "num_experts_per_tok": 1,
            "layer_types": ["hybrid", "hybrid_sliding"] * 2,
            "sliding_window": 16,
        }
        | {"router_hidden_size": 32},
    }
)

UNBUILDABLE: Mapping[str, str] = MappingProxyType(
    dict.fromkeys(
        ("gemma4_assistant", "gemma4_unified_assistant"),
        "a draft head: its forward needs the hidden states and the shared keys and values of a target model",
    )
)
"""Entries of the causal LM mapping that are no causal LM of their own, and why."""
