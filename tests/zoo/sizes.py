"""How to make each configuration of transformers tiny: sizes for all, what single types need besides, and which fail.

Plain data for zoo/models.py. A size holds for each configuration and sub-configuration that has a field of its name.
"""

SIZES = dict(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    intermediate_size=48, max_position_embeddings=64, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    decoder_start_token_id=1, sep_token_id=2, mask_token_id=3, cls_token_id=1,
    # other names for the same
    d_model=64, n_embd=64, n_layer=2, n_head=4, n_positions=64, n_ctx=64, max_seq_len=64, encoder_layers=2,
    decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    ffn_dim=48, n_inner=48, d_ff=48, rotary_dim=8, num_layers=2, num_heads=4, embedding_size=64, is_decoder=True,
    # mixtures of experts
    num_experts=4, num_experts_per_tok=2, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, moe_topk=2,
    moe_k=2, moe_intermediate_size=32, shared_expert_intermediate_size=32, shared_intermediate_size=32, n_group=1,
    topk_group=1, n_shared_experts=1, num_experts_per_token=2, num_shared_experts=1, num_expert_group=1,
    first_k_dense_replace=1, num_dense_layers=1, moe_num_shared_experts=1, shared_experts_intermediate_size=32,
    # latent attention and its indexer
    q_lora_rank=24, kv_lora_rank=24, qk_rope_head_dim=16, qk_nope_head_dim=16, v_head_dim=16, qk_head_dim=32,
    index_head_dim=16, index_n_heads=2, index_topk=8, sliding_window=8,
    # state-space and linear attention layers
    state_size=8, mamba_d_state=8, mamba_n_heads=8, mamba_d_head=16, mamba_chunk_size=8, chunk_size=8,
    mamba_n_groups=1, n_groups=1, time_step_rank=8, mamba_dt_rank=8, linear_num_key_heads=2, linear_num_value_heads=4,
    linear_key_head_dim=8, linear_value_head_dim=8, linear_head_dim=16, linear_num_heads=4, conv_L_cache=3,
    # images and sound are never given, so only their size matters
    image_token_id=120, video_token_id=121, audio_token_id=122, image_token_index=120, boi_token_id=123,
    eoi_token_id=124, boa_token_id=125, eoa_token_id=126, boi_token_index=123, eoi_token_index=124,
    eoa_token_index=126, vision_start_token_id=123, vision_end_token_id=124, depth=2, out_hidden_size=64,
)  # fmt: skip

_MLA = dict(num_key_value_heads=4)  # latent attention has one head of keys for each of queries
_SWA = dict(
    head_dim=32, swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=24, swa_kv_lora_rank=24,
    swa_head_dim=32, swa_qk_nope_head_dim=16, swa_v_head_dim=16,
)  # fmt: skip
_INDEXER = dict(
    indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=8, indexer_compress_ratio=4,
    hc_lowrank=16,
)  # fmt: skip
_GEMMA4 = dict(hidden_size_per_layer_input=16, vocab_size_per_layer_input=128, global_head_dim=32)
_LLAMA4 = dict(no_rope_layers=[1, 0], moe_layers=[1], attention_chunk_size=8, intermediate_size_mlp=48)
_DRAFT = dict(hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=0)
_INKLING = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=16, rel_extent=16, d_rel=4,
    sliding_window_size=8, unpadded_vocab_size=128,
)  # fmt: skip

OVERRIDES: dict[str, dict] = {
    **dict.fromkeys(["axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3"], _MLA),
    **dict.fromkeys(["deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear", "minicpm3", "youtu"], _MLA),
    "afmoe": dict(num_local_experts=4),
    "bamba": dict(attn_layer_indices=[1]),
    "blt": dict(
        encoder_hash_byte_group_size=[3, 4], encoder_hash_byte_group_vocab=64,
        encoder_config=dict(hidden_size_global=64), decoder_config=dict(hidden_size_global=64),
    ),
    "cohere_compass_text": dict(
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 3, 3]),
            "full_attention": None,
        },
    ),
    "cpmant": dict(dim_head=16, dim_ff=48, prompt_length=4, position_bias_num_buckets=32, init_std=0.02),
    "ctrl": dict(dff=48),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2)
    ),
    "dots3_note": _MLA | _SWA,
    "dots3_note_text": _MLA | _SWA,
    "falcon": dict(num_kv_heads=2, ffn_hidden_size=48),
    "falcon_h1": dict(mamba_d_ssm=128),
    "gemma3n_text": dict(
        num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
        hidden_size_per_layer_input=16, vocab_size_per_layer_input=128, laurel_rank=8, altup_num_inputs=2,
        activation_sparsity_pattern=[0.5, 0.5, 0.0, 0.0], intermediate_size=48,
    ),
    "gemma4": dict(text_config=_GEMMA4),
    "gemma4_assistant": dict(text_config=_DRAFT | dict(model_type="gemma4_text")),
    "gemma4_text": _GEMMA4,
    "gemma4_unified_assistant": dict(text_config=_DRAFT),
    "git": dict(vision_config=dict(image_size=16, patch_size=8)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]], attention_layers=["global", "local"], window_size=8),
    "granitemoehybrid": dict(layer_types=["linear_attention", "full_attention"]),
    "inkling2_text": _INKLING,
    "inkling_text": _INKLING,
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "llama4": _LLAMA4,
    "llama4_text": _LLAMA4,
    "longcat_flash": _MLA | dict(ffn_hidden_size=48, expert_ffn_hidden_size=32, zero_expert_num=2),
    "mamba2": dict(num_heads=8),
    "mllama": dict(cross_attention_layers=[1]),
    "musicgen": dict(num_codebooks=2),
    "musicgen_melody": dict(num_codebooks=2),
    "nemotron_h": dict(mamba_num_heads=8, mamba_head_dim=16, ssm_state_size=8, moe_shared_expert_intermediate_size=32),
    "prophetnet": dict(num_encoder_layers=2, num_decoder_layers=2, num_encoder_attention_heads=4,
                       num_decoder_attention_heads=4),
    "qwen4_exp": _INDEXER,
    "qwen4_exp_text": _INDEXER,
    "phi4_multimodal": dict(audio_config=dict(num_blocks=2, ext_pw_out_channel=64, nemo_conv_channels=64)),
    "recurrent_gemma": dict(num_hidden_layers=3, lru_width=64, attention_window_size=8),
    "reformer": dict(
        axial_pos_embds=False, attention_head_size=16, attn_layers=["local", "lsh"], local_attn_chunk_length=4,
        lsh_attn_chunk_length=4, num_buckets=2, feed_forward_size=48,
    ),
    "roc_bert": dict(pronunciation_vocab_size=128, shape_vocab_size=128, pronunciation_embed_dim=64,
                     shape_embed_dim=64),
    "smollm3": dict(no_rope_layers=[1, 0]),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid"] * 2, num_hidden_layers=4),
    "zaya": dict(num_experts_per_tok=1),
}  # fmt: skip

# type -> the part of its configuration that its causal language model is made from
PARTS = {
    **dict.fromkeys(["dots3_note", "emu3", "llama4", "mllama", "qwen3_5", "qwen3_5_moe", "qwen4_exp"], "text_config"),
    **dict.fromkeys(["musicgen", "musicgen_melody"], "decoder"),
}

# model_type of the model's configuration -> parallel streams of tokens
CODEBOOKS = {"musicgen_decoder": 2, "musicgen_melody_decoder": 2}

# model_type of the model's configuration -> inputs besides the tokens, as shapes behind the batch dimension
_ENCODED = {"encoder_hidden_states": (7, 64)}
EXTRA_INPUTS: dict[str, dict[str, tuple[int, ...]]] = {
    **dict.fromkeys(["bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart"], _ENCODED),
    **dict.fromkeys(["mvp", "pegasus", "plbart", "prophetnet", "trocr", "musicgen_decoder"], _ENCODED),
    "whisper": {"encoder_outputs": (7, 64)},
    "git": {"pixel_values": (3, 16, 16)},
    "mllama_text_model": {"cross_attention_states": (7, 64)},
}

# type -> what the number of tokens must be a multiple of in training
MULTIPLES = {"reformer": 4}

_DRAFTS = "reads keys and values of another model in place of tokens, takes no labels and gives no loss"

# type -> why it can't be built and trained at this size
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its image tower is a timm model, and timm and PIL are not among the tests' packages",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
}

_RETURNED = "its blocks return the probabilities after dropout, which nobody can compute again later"
_LOOP = "code in a loop over data-dependent lengths: Dynamo compiles its functions one by one, some by changing widths"

# type -> (kind -> places of the census that are not found, why)
MISSED: dict[str, tuple[dict[str, int], str]] = {
    "gpt_neox_japanese": ({"attention": 2}, _RETURNED),
    "hy_v4": ({"rms_norm": 5}, "not a norm: the factor of a row multiplies something else"),
    "longcat_flash": ({"glu": 2}, "a loop over experts that Dynamo leaves to Python, as it reads their numbers"),
    "megatron-bert": ({"attention": 2}, _RETURNED),
    "qwen4_exp": ({"rms_norm": 1, "rotary": 2}, _LOOP),
    "qwen4_exp_text": ({"rms_norm": 1, "rotary": 2}, _LOOP),
    "roformer": ({"attention": 2}, _RETURNED),
    "zaya": ({"other_norm": 2}, "named a norm, a 2-norm by the root of a sum in float32"),
}

# type -> why eager training itself is not the same twice, or jumps
UNSTEADY: dict[str, str] = {
    "reformer": "its reversible layers draw hashes and dropout from torch.seed(), which no manual seed fixes",
}
