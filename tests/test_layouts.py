"""Each row of the table of layouts, against what the model's own attention does with the output of the module."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import COMMON, GPT, WIDE
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import GPTBigCodeConfig, GPTBigCodeForCausalLM

from hf_sara import SaraArguments
from hf_sara.layouts import LAYOUTS, OutputSlice
from hf_sara.sites import all_sites
from hf_sara.targets import find_sites


def ids(model):
    return model(input_ids=torch.arange(3, 9)[None])


def ids_and_states(model):
    return model(input_ids=torch.arange(3, 9)[None], encoder_hidden_states=torch.randn(1, 5, 24), use_cache=False)


def states(model):
    return model(inputs_embeds=torch.randn(1, 6, 24), encoder_hidden_states=torch.randn(1, 5, 24), use_cache=False)


def codes(model):
    return model(1, torch.arange(3, 21).view(1, 6, 3))


def image(model):
    return model(torch.randn(1, 3, 16, 16))


def video(model):
    return model(torch.randn(1, 2, 3, 8, 8))


def prompted_image(model):
    return model(torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8), torch.zeros(1, 3, 8, 8))


def patches(model):
    """The patches of an image of 4 x 4 of them."""
    layers = (module for name, module in model.named_modules() if "patch" in name)
    layer = next(layer for layer in layers if isinstance(layer, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    return model(torch.randn(16, layer.weight[0].numel()), torch.tensor([[1, 4, 4]]))


def feature_map(model):
    return model(torch.randn(1, model.conv_block[0].convolution.in_channels, 3, 4))


def sound(model):
    return model(torch.randn(1, 6, 32))


def protein(model):
    return model.protein_encoder.sequence_compressor_resampler(torch.randn(1, 5, 24), torch.ones(1, 5))


def words_of_a_page(model):
    return model(torch.randn(1, 6, 24), torch.zeros(1, 1, 1, 6))


@dataclass(frozen=True)
class Case:
    """
    A tiny model with fused modules.

    Args:
        model (`str`): Its folder in transformers, and its class there.
        values (`dict`): Its configuration.
        run (`Callable`): Calls it.
    """

    model: str
    values: dict[str, Any]
    run: Callable = ids

    @property
    def source(self) -> ModuleType:
        """The code of the model."""
        folder = self.model.split(".")[0]
        return importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")

    def build(self) -> nn.Module:
        """The model with its own implementation of the attention, which has a softmax that can be seen."""
        model_class = getattr(self.source, self.model.split(".")[1])
        # LayoutLMv2's model needs detectron2, and the encoder of it names no class of its configuration.
        config_class = getattr(model_class, "config_class", None) or self.source.LayoutLMv2Config
        torch.manual_seed(0)
        return model_class(config_class(**self.values, attn_implementation="eager")).eval()


def alike(leaf: str, values: dict[str, Any], run: Callable, models: dict[str, str]) -> dict[tuple[str, ...], Case]:
    """Cases of models that take the same configuration, which are given by their type."""
    return {(model_type, leaf): Case(model, values, run) for model_type, model in models.items()}


FEWER = {**WIDE, "num_key_value_heads": 2}
MIXED = {**FEWER, "head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
MOE = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
DELTA = {
    **MIXED,
    **MOE,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 8,
}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8}
FALCON = {**WIDE, "ffn_hidden_size": 32, "new_decoder_architecture": False}
CROSS = {**GPT, "add_cross_attention": True}
MPT = {"d_model": 24, "n_heads": 4, "n_layers": 2, "vocab_size": 40}
BARK = {"input_vocab_size": 40, "output_vocab_size": 40, "hidden_size": 24, "num_layers": 2, "num_heads": 4}
VISION = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 32}
BLIP = {**VISION, "image_size": 16, "patch_size": 8}
SAM = {**VISION, "image_size": 16, "patch_size": 4, "mlp_dim": 32, "global_attn_indexes": [1], "window_size": 2}
QWEN = {"hidden_size": 32, "num_heads": 4, "depth": 2, "intermediate_size": 32, "patch_size": 2, "out_hidden_size": 32}
STRIDED = {"patch_stride": [2, 2], "patch_padding": [1, 1]}
PYRAMID = {**STRIDED, "patch_size": [3, 3], "depths": [1, 1], "num_heads": [2, 4]}
FLORENCE = {"patch_prenorm": [False, True], "embed_dim": [8, 16], "num_groups": [2, 4], "window_size": 2}
HIERA = {"embed_dim": 8, "image_size": [16, 16], "num_query_pool": 1, "masked_unit_size": [4, 4]}
RESAMPLER = {"resampler_depth": 2, "resampler_dim_head": 4, "resampler_heads": 2, "resampler_num_latents": 3}

# One of each layout, and of each option that decides about it: by the type of a model, the name of its fused module
# and the option.
CASES = {
    ("mpt", "Wqkv"): Case("mpt.MptForCausalLM", MPT),
    ("gpt2", "c_attn", "cross"): Case("gpt2.GPT2LMHeadModel", CROSS, ids_and_states),
    ("jetmoe", "kv_proj"): Case(
        "jetmoe.JetMoeForCausalLM",
        {**WIDE, "kv_channels": 8, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 2},
    ),
    ("gpt_neox", "query_key_value"): Case("gpt_neox.GPTNeoXForCausalLM", WIDE),
    ("minimax", "qkv_proj"): Case("minimax.MiniMaxForCausalLM", {**MIXED, "num_local_experts": 2}),
    ("phi3", "qkv_proj"): Case("phi3.Phi3ForCausalLM", {**FEWER, "head_dim": 8}),
    ("exaone4_5_vision", "qkv"): Case("exaone4_5.Exaone4_5_VisionModel", {**QWEN, "num_key_value_heads": 2}, patches),
    ("gpt_bigcode", "c_attn", "multi_query"): Case("gpt_bigcode.GPTBigCodeForCausalLM", GPT),
    ("gpt_bigcode", "c_attn", "old"): Case("gpt_bigcode.GPTBigCodeForCausalLM", {**GPT, "multi_query": False}),
    ("falcon", "query_key_value", "new"): Case(
        "falcon.FalconForCausalLM", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}
    ),
    ("falcon", "query_key_value", "multi_query"): Case("falcon.FalconForCausalLM", {**FALCON, "multi_query": True}),
    ("falcon", "query_key_value", "old"): Case("falcon.FalconForCausalLM", {**FALCON, "multi_query": False}),
    ("codegen", "qkv_proj"): Case("codegen.CodeGenForCausalLM", {**GPT, "n_embd": 32, "rotary_dim": 4}),
    ("qwen3_5_text", "in_proj_qkv"): Case("qwen3_5.Qwen3_5ForCausalLM", DELTA),
    ("qwen3_next", "in_proj_qkvz"): Case("qwen3_next.Qwen3NextForCausalLM", DELTA),
}

# The other models of the table.
MORE = {
    ("modernbert", "Wqkv"): Case("modernbert.ModernBertModel", WIDE),
    ("openai-gpt", "c_attn"): Case("openai.OpenAIGPTLMHeadModel", GPT),
    ("imagegpt", "c_attn", "cross"): Case("imagegpt.ImageGPTForCausalImageModeling", CROSS, ids_and_states),
    ("decision_transformer", "c_attn", "cross"): Case(
        "decision_transformer.DecisionTransformerGPT2Model",
        {"hidden_size": 24, "n_layer": 2, "n_head": 4, "add_cross_attention": True},
        states,
    ),
    ("bloom", "query_key_value"): Case("bloom.BloomForCausalLM", {**COMMON, "hidden_size": 24, "n_head": 4}),
    ("gpt_neox_japanese", "query_key_value"): Case("gpt_neox_japanese.GPTNeoXJapaneseForCausalLM", WIDE),
    ("persimmon", "query_key_value"): Case("persimmon.PersimmonForCausalLM", {**WIDE, "hidden_size": 32}),
    ("deberta", "in_proj"): Case(
        "deberta.DebertaModel", {**WIDE, "relative_attention": True, "pos_att_type": "c2p|p2c"}
    ),
    ("layoutlmv2", "qkv_linear"): Case(
        "layoutlmv2.LayoutLMv2Encoder",
        {**WIDE, "fast_qkv": True, "has_relative_attention_bias": False, "has_spatial_attention_bias": False},
        words_of_a_page,
    ),
    ("dbrx", "Wqkv"): Case(
        "dbrx.DbrxForCausalLM",
        {
            **MPT,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        },
    ),
    ("phi4_multimodal", "qkv_proj"): Case(
        "phi4_multimodal.Phi4MultimodalForCausalLM",
        {**FEWER, "vision_config": VISION, "audio_config": {**VISION, "num_blocks": 2}},
    ),
    ("lara_mini", "in_proj_qkv"): Case("lara_mini.LaraMiniForCausalLM", DELTA),
    ("qwen3_5_moe_text", "in_proj_qkv"): Case("qwen3_5_moe.Qwen3_5MoeForCausalLM", DELTA),
    ("qwen4_exp_text", "in_proj_qkv"): Case(
        "qwen4_exp.Qwen4ExpForCausalLM", {**DELTA, **INDEXER, "indexer_compress_ratio": 2}
    ),
    ("semantic", "att_proj"): Case("bark.BarkSemanticModel", BARK),
    ("coarse_acoustics", "att_proj"): Case("bark.BarkCoarseModel", BARK),
    ("fine_acoustics", "att_proj"): Case("bark.BarkFineModel", {**BARK, "n_codes_total": 3}, codes),
    ("evolla", "to_kv"): Case(
        "evolla.EvollaModel",
        {**FEWER, **RESAMPLER, "protein_encoder_config": WIDE, "aligner_num_add_layers": 1},
        protein,
    ),
    **alike(
        "to_kv",
        {"input_dim": 32, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "dim_head": 4, "context_size": 6},
        sound,
        {
            "granite_speech_encoder": "granite_speech.GraniteSpeechCTCEncoder",
            "granite_speech_plus_encoder": "granite_speech_plus.GraniteSpeechPlusCTCEncoder",
        },
    ),
    **alike(
        "qkv",
        BLIP,
        image,
        {
            "blip_vision_model": "blip.BlipVisionModel",
            "blip_2_vision_model": "blip_2.Blip2VisionModel",
            "instructblip_vision_model": "instructblip.InstructBlipVisionModel",
            "instructblipvideo_vision_model": "instructblipvideo.InstructBlipVideoVisionModel",
        },
    ),
    **alike(
        "qkv",
        SAM,
        image,
        {
            "deepseek_ocr2_sam_vision_model": "deepseek_ocr2.DeepseekOcr2SamVisionEncoder",
            "got_ocr2_vision": "got_ocr2.GotOcr2VisionEncoder",
            "pp_formulanet_vision": "pp_formulanet.PPFormulaNetVisionModel",
            "sam_hq_vision_model": "sam_hq.SamHQVisionEncoder",
            "sam_vision_model": "sam.SamVisionEncoder",
            "slanext_vision": "slanext.SLANeXtVisionEncoder",
            "unlimited_ocr_sam_vision_model": "unlimited_ocr.UnlimitedOcrSamVisionEncoder",
            "vitdet": "vitdet.VitDetModel",
        },
    ),
    **alike(
        "qkv",
        QWEN,
        patches,
        {
            "cohere_compass_vision": "cohere_compass.CohereCompassVisionModel",
            "ernie4_5_vl_moe_vision": "ernie4_5_vl_moe.Ernie4_5_VLMoeVisionTransformerPretrainedModel",
            "glm4v_moe_vision": "glm4v_moe.Glm4vMoeVisionModel",
            "glm4v_vision": "glm4v.Glm4vVisionModel",
            "glm5_next_vision": "glm5_next.Glm5NextVisionModel",
            "glm_image_vision": "glm_image.GlmImageVisionModel",
            "glm_ocr_vision": "glm_ocr.GlmOcrVisionModel",
            "qwen2_5_vl_vision": "qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
            "qwen2_vl_vision": "qwen2_vl.Qwen2VisionTransformerPretrainedModel",
            "qwen3_5_moe_vision": "qwen3_5_moe.Qwen3_5MoeVisionModel",
            "qwen3_5_vision": "qwen3_5.Qwen3_5VisionModel",
            "qwen3_omni_moe_vision_encoder": "qwen3_omni_moe.Qwen3OmniMoeVisionEncoder",
            "qwen3_vl_moe_vision": "qwen3_vl_moe.Qwen3VLMoeVisionModel",
            "qwen3_vl_vision": "qwen3_vl.Qwen3VLVisionModel",
            "qwen4_exp_vision": "qwen4_exp.Qwen4ExpVisionModel",
        },
    ),
    ("dots3_note_vision_encoder", "qkv"): Case(
        "dots3_note.Dots3NoteVisionModel",
        {**VISION, "patch_size": 2, "adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense"] * 2},
        patches,
    ),
    **alike(
        "qkv",
        {"hidden_size": 32, "num_attention_heads": 4, "depth": 2},
        feature_map,
        {
            "pp_ocrv5_mobile_rec": "pp_ocrv5_mobile_rec.PPOCRV5MobileRecEncoderWithSVTR",
            "pp_ocrv5_server_rec": "pp_ocrv5_server_rec.PPOCRV5ServerRecEncoderWithSVTR",
            "pp_ocrv6_small_rec": "pp_ocrv6_small_rec.PPOCRV6SmallRecEncoderWithSVTR",
        },
    ),
    ("florence_vision", "qkv"): Case("florence2.Florence2VisionBackbone", {**PYRAMID, **FLORENCE}, image),
    ("hiera", "qkv"): Case("hiera.HieraModel", {**PYRAMID, **HIERA, "masked_unit_attention": [True, False]}, image),
    ("sam2_hiera_det_model", "qkv"): Case(
        "sam2.Sam2HieraDetModel",
        {
            "hidden_size": 8,
            "image_size": [16, 16],
            "patch_kernel_size": [3, 3],
            **STRIDED,
            "blocks_per_stage": [1, 1],
            "embed_dim_per_stage": [8, 16],
            "num_attention_heads_per_stage": [1, 2],
            "window_size_per_stage": [4, 4],
            "num_query_pool_stages": 1,
            "global_attention_blocks": [],
            "window_positional_embedding_background_size": [4, 4],
        },
        image,
    ),
    ("mgp-str", "qkv"): Case("mgp_str.MgpstrModel", {**BLIP, "image_size": (16, 16)}, image),
    ("timesformer", "qkv"): Case("timesformer.TimesformerModel", {**BLIP, "image_size": 8, "num_frames": 2}, video),
    ("seggpt", "qkv"): Case(
        "seggpt.SegGptModel",
        {
            **VISION,
            "image_size": [16, 8],
            "patch_size": 4,
            "pretrain_image_size": 8,
            "mlp_dim": 32,
            "intermediate_hidden_state_indices": [1],
            "merge_index": 0,
        },
        prompted_image,
    ),
}


@dataclass
class Record:
    """What one call of an attention made out of the output of its fused module."""

    output: torch.Tensor
    scores: torch.Tensor | None = None
    given: tuple[torch.Tensor, ...] = ()
    result: torch.Tensor | None = None


class Spy(TorchFunctionMode):
    """Keeps what every attention with a fused module of this name computes, from the module to its end."""

    def __init__(self, model, leaf: str):
        super().__init__()
        self.records: dict[str, Record] = {}
        self.current: Record | None = None
        for name, module in model.named_modules():
            if name.endswith(f".{leaf}"):
                module.register_forward_hook(lambda module, args, output, name=name: self.start(name, output))
                model.get_submodule(name.rpartition(".")[0]).register_forward_hook(self.stop)

    def start(self, name, output):
        self.current = self.records[name] = Record(output)

    def stop(self, module, args, output):
        self.current.result = output if isinstance(output, torch.Tensor) else output[0]
        self.current = None

    def given(self, function):
        """The function, which now keeps the queries, keys and values that it is called with."""

        def call(query, key, value, **others):
            self.current.given = (query, key, value)
            return function(query, key, value, **others)

        return call

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if self.current is not None:
            if name == "softmax":
                self.current.scores = args[0]
            elif name == "scaled_dot_product_attention":
                self.current.scores = args[0] @ args[1].mT
            elif name == "matmul" and self.current.scores is None:
                # An attention without a softmax multiplies queries with keys before all else.
                self.current.scores = args[0] @ args[1]
        return function(*args, **(kwargs or {}))


def watch(case: Case, model, leaf: str, patch) -> dict[str, Record]:
    """What the model's attentions made out of the outputs of their fused modules, by the names of these."""
    spy = Spy(model, leaf)
    if hasattr(case.source, "torch_chunk_gated_delta_rule"):
        patch.setattr(case.source, "torch_chunk_gated_delta_rule", spy.given(case.source.torch_chunk_gated_delta_rule))
    with spy:
        case.run(model)
    return spy.records


def columns(*parts: torch.Tensor, of: torch.Tensor) -> set[int]:
    """The columns that have an element that each of the parts depends on."""
    reached = torch.ones_like(of, dtype=torch.bool)
    for part in parts:
        (gradient,) = torch.autograd.grad(part.sum(), of, retain_graph=True, allow_unused=True)
        reached &= torch.zeros_like(reached) if gradient is None else gradient != 0
    return set(reached.flatten(0, -2).any(0).nonzero().flatten().tolist())


def taken(record: Record) -> dict[str, set[int]]:
    """Which columns of the module's output the attention takes for what."""
    output, scores = record.output, record.scores
    if record.given:
        found = {label: columns(part, of=output) for label, part in zip("qkv", record.given, strict=True)}
    else:
        # The scores of two keys have the queries in common, and those of two queries have the keys in common.
        found = {
            "q": columns(scores[..., 0], scores[..., 1], of=output),
            "k": columns(scores[..., -1, :], scores[..., -2, :], of=output),
        }
    # The result depends on the value, and on a gate if there is one, beside query and key.
    found["z" if record.given else "v"] = columns(record.result, of=output) - set().union(*found.values())
    return {label: part for label, part in found.items() if part}


def check(key, case, patch):
    model_type, leaf = key[:2]
    assert (model_type, leaf) in LAYOUTS
    model = case.build()
    records = watch(case, model, leaf, patch)
    sites = [site for site in all_sites(model) if site.module.endswith(f".{leaf}")]
    assert records.keys() == {site.module for site in sites}
    for name, record in records.items():
        every = torch.arange(record.output.shape[-1])
        owned = {site.label: set(site.slice.view(every).flatten().tolist()) for site in sites if site.module == name}
        assert taken(record) == owned, name


@pytest.mark.parametrize(("key", "case"), CASES.items(), ids=["-".join(key) for key in CASES])
def test_the_slices_are_what_the_attention_takes_for_query_key_and_value(key, case, monkeypatch):
    check(key, case, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "case"), MORE.items(), ids=["-".join(key) for key in MORE])
def test_the_slices_of_the_other_models(key, case, monkeypatch):
    check(key, case, monkeypatch)


def test_every_row_of_the_table_has_a_case():
    assert {key[:2] for key in (*CASES, *MORE)} == set(LAYOUTS)


def test_by_default_the_query_and_value_of_a_linear_attention_are_adapted():
    found = [site.name for site in find_sites(CASES["qwen3_next", "in_proj_qkvz"].build(), SaraArguments())]
    linear, full = "model.layers.0.linear_attn.in_proj_qkvz", "model.layers.1.self_attn"
    assert found == [f"{linear}.q", f"{linear}.v", f"{full}.q_proj", f"{full}.v_proj"]


def test_a_module_whose_code_does_not_run_is_one_site():
    # In transformers 5.24, this cross-attention splits its c_attn into sizes that it does not have.
    config = GPTBigCodeConfig(**CROSS, multi_query=False)
    sites = {site.name: site.slice for site in all_sites(GPTBigCodeForCausalLM(config))}
    assert sites["transformer.h.0.crossattention.c_attn"] is None
    assert sites["transformer.h.0.attn.c_attn.q"] == OutputSlice(groups=4, start=0, stop=6)
