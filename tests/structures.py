"""Tiny random models of many structures, each with inputs, and the sites that are adapted by default."""

import torch
import transformers as t

SIZES = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = {**SIZES, "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2}
GROUPED = {**TEXT, "num_key_value_heads": 2}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "initializer_range": 0.2}
TWO_STACKS = {
    **{"vocab_size": 40, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "decoder_ffn_dim": 32, "init_std": 0.2},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
}
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
T5 = {
    **{"vocab_size": 40, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4},
    **{"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2},
}


MAMBA = {
    **{"hidden_size": 24, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 12, "expand": 2, "n_groups": 1},
    **{"vocab_size": 40, "state_size": 8, "chunk_size": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
REFORMER = {
    **{"hidden_size": 24, "num_attention_heads": 4, "attention_head_size": 6, "feed_forward_size": 32},
    **{"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "local"], "vocab_size": 40},
    **{"local_attn_chunk_length": 2, "local_num_chunks_before": 1, "pad_token_id": 0, "eos_token_id": 2},
    **{"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0, "initializer_range": 0.2},
    "max_position_embeddings": 32,
}


def words(width: int = 6) -> torch.Tensor:
    return torch.randint(3, 40, (2, width), generator=torch.Generator().manual_seed(1))


def causal() -> dict:
    return {"input_ids": words(), "labels": words().flip(1)}


def classes() -> dict:
    return {"input_ids": words(), "attention_mask": torch.ones_like(words()), "labels": torch.tensor([0, 1])}


def pixels(size: int = 8) -> torch.Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def image(size: int = 8) -> dict:
    return {"pixel_values": pixels(size), "labels": torch.tensor([0, 1])}


def llava():
    text, vision = t.LlamaConfig(**GROUPED), t.CLIPVisionConfig(**IMAGE, projection_dim=24)
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(vision_config=vision, text_config=text, image_token_index=39, vision_feature_layer=-1)
    )


def image_to_text():
    decoder = t.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, n_positions=32, initializer_range=0.2)
    config = t.VisionEncoderDecoderConfig.from_encoder_decoder_configs(t.ViTConfig(**IMAGE), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return t.VisionEncoderDecoderModel(config)


def two_text_models():
    config = t.EncoderDecoderConfig.from_encoder_decoder_configs(t.BertConfig(**TEXT), t.BertConfig(**TEXT))
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return t.EncoderDecoderModel(config)


def wav2vec2():
    sound = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    position = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_prob": 0.0}
    drops = {"hidden_dropout": 0.0, "layerdrop": 0.0, "final_dropout": 0.0, "feat_proj_dropout": 0.0}
    return t.Wav2Vec2ForCTC(t.Wav2Vec2Config(**TEXT, **sound, **position, **drops))


def deepseek():
    latent = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    others = {"moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    return t.DeepseekV3ForCausalLM(t.DeepseekV3Config(**TEXT, **latent, **experts, **others))


def mobilevit():
    sizes = {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 16, 16, 24, 24, 32, 64], "num_attention_heads": 2}
    return t.MobileViTForImageClassification(t.MobileViTConfig(image_size=64, **sizes, initializer_range=0.2))


def spectrum() -> dict:
    return {"input_features": torch.randn(2, 8, 20, generator=torch.Generator().manual_seed(1)), "labels": words()}


def speech() -> dict:
    sound = torch.randn(2, 600, generator=torch.Generator().manual_seed(1))
    return {"input_values": sound, "labels": words(4)}


def distilbert():
    sizes = {"dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "initializer_range": 0.2}
    return t.DistilBertForSequenceClassification(t.DistilBertConfig(vocab_size=40, **sizes, seq_classif_dropout=0.0))


def albert():
    return t.AlbertForSequenceClassification(t.AlbertConfig(**TEXT, embedding_size=24, classifier_dropout_prob=0.0))


def switch():
    sparse = {"num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    config = t.SwitchTransformersConfig(**T5, **sparse, router_jitter_noise=0.0)
    return t.SwitchTransformersForConditionalGeneration(config)


# A structure: how its model is made, its inputs, and the ends of the names of its default sites.
QUICK = {
    "separate linears": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)), causal, {"q_proj", "v_proj"}),
    "names of its own": (distilbert, classes, {"q_lin", "v_lin"}),
    "fused by slices": (
        lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=40, n_embd=24, n_layer=2, n_head=4, initializer_range=0.2)),
        causal,
        {"c_attn.q", "c_attn.v"},
    ),
    "query beside a fused key-value": (deepseek, causal, {"q_b_proj", "kv_b_proj"}),
    "two stacks and a cross-attention": (
        lambda: t.BartForConditionalGeneration(t.BartConfig(**TWO_STACKS)),
        causal,
        {"q_proj", "v_proj"},
    ),
    "text model of several": (llava, causal, {"q_proj", "v_proj"}),
    "one layer many times": (albert, classes, {"query", "value"}),
    "statistics of batches": (mobilevit, lambda: image(64), {"query", "value"}),
    "fused experts": (
        lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**GROUPED, **MIXTURE, head_dim=8)),
        causal,
        {"q_proj", "v_proj"},
    ),
}
OTHERS = {
    "experts as modules": (switch, causal, {"q", "v"}),
    "image and text": (
        image_to_text,
        lambda: {"pixel_values": pixels(), "labels": words()},
        # The cross-attention has its query in a linear of its own.
        {"c_attn.q", "c_attn.v", "q_attn"},
    ),
    "two texts": (two_text_models, causal, {"query", "value"}),
    "decoder without its encoder": (
        lambda: t.BartForCausalLM(t.BartConfig(**TWO_STACKS)),
        causal,
        {"q_proj", "v_proj"},
    ),
    "sound": (wav2vec2, speech, {"q_proj", "v_proj"}),
    "speech to text": (
        lambda: t.WhisperForConditionalGeneration(
            t.WhisperConfig(**TWO_STACKS, num_mel_bins=8, max_source_positions=10, begin_suppress_tokens=None)
        ),
        spectrum,
        {"q_proj", "v_proj"},
    ),
    "image": (
        lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**IMAGE)),
        image,
        {"q_proj", "v_proj"},
    ),
    "rotated attention": (
        lambda: t.DebertaV2ForSequenceClassification(t.DebertaV2Config(**TEXT, pos_att_type=["c2p", "p2c"])),
        classes,
        {"query_proj", "value_proj"},
    ),
    "one type of heads": (
        lambda: t.GemmaForCausalLM(t.GemmaConfig(**{**GROUPED, "num_key_value_heads": 1}, head_dim=8)),
        causal,
        {"q_proj", "v_proj"},
    ),
    "no attention": (
        lambda: t.Mamba2ForCausalLM(t.Mamba2Config(**MAMBA)),
        causal,
        {"in_proj"},
    ),
    "layers computed again": (
        lambda: t.ReformerModelWithLMHead(t.ReformerConfig(**REFORMER)),
        causal,
        {"query", "value"},
    ),
    "relative positions": (lambda: t.T5ForConditionalGeneration(t.T5Config(**T5)), causal, {"q", "v"}),
    "experts beside a shared one": (
        lambda: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
        causal,
        {"q_proj", "v_proj"},
    ),
}
STRUCTURES = {**QUICK, **OTHERS}


def make(name: str):
    """A model and its inputs."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = STRUCTURES[name][0]()
    return model.eval(), STRUCTURES[name][1]()
