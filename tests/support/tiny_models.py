"""Small transformers models of every kind that has a connector, with random weights.

`MODELS` maps a name to a class, a config, and the placeholders that its prompts need. Two rows, one
image (or video, or sound) each; `build` gives the model and its inputs.
"""

import inspect
from typing import NamedTuple

import torch
import transformers

from tests.support.older_configs import adapted_config

START, END, IMAGE, VIDEO, AUDIO = 91, 92, 95, 96, 97

# ---- text ----

TEXT = dict(
    vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
    bos_token_id=1, eos_token_id=None, pad_token_id=0,
)  # fmt: skip
QWEN = TEXT | dict(head_dim=8)
ROPE = dict(rope_type="default", rope_theta=1e4)
MROPE = QWEN | dict(rope_parameters=ROPE | dict(mrope_section=[1, 1, 2]))
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=16)
MOE = EXPERTS | dict(num_experts=4)
GATED_DELTA = dict(
    layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
    linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2,
)  # fmt: skip
DEEPSEEK_V3 = TEXT | EXPERTS | dict(
    model_type="deepseek_v3", num_key_value_heads=4, n_routed_experts=4, n_group=1, topk_group=1,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    first_k_dense_replace=1,
)  # fmt: skip
BART = dict(
    vocab_size=99, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, dropout=0.0,
    max_position_embeddings=128, decoder_start_token_id=2, pad_token_id=1, eos_token_id=None,
    forced_eos_token_id=None,
)  # fmt: skip

# ---- vision and audio ----

VISION = dict(
    hidden_size=24, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
    image_size=16, patch_size=4,
)  # fmt: skip
CLIP = VISION | dict(model_type="clip_vision_model")
SIGLIP = VISION | dict(model_type="siglip_vision_model", vision_use_head=False)
SIGLIP2 = VISION | dict(model_type="siglip2_vision_model", num_patches=16)
PIXTRAL = VISION | dict(model_type="pixtral", head_dim=12)
INTERN = VISION | dict(image_size=[16, 16], patch_size=[4, 4])
SAM = VISION | dict(output_channels=8, mlp_dim=40, global_attn_indexes=[1], window_size=2)
GRID = VISION | dict(hidden_size=48, pos_emb_height=4, pos_emb_width=4)
LLAMA4 = VISION | dict(
    vision_output_dim=24, projector_input_dim=24, projector_output_dim=24, rope_parameters=ROPE
)
RESNET = dict(
    model_type="resnet", embedding_size=8, hidden_sizes=[8, 24], depths=[1, 1],
    layer_type="basic", hidden_size=24,
)  # fmt: skip
DAVIT = dict(
    depths=[1], patch_size=[7], patch_stride=[4], patch_padding=[3], patch_prenorm=[False],
    embed_dim=[16], num_heads=[2], num_groups=[2], window_size=2, projection_dim=32,
    drop_path_rate=0.0,
)  # fmt: skip
# Patches arrive flattened, in blocks of 2 x 2.
BLOCKS = dict(depth=2, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
MERGING = BLOCKS | dict(hidden_size=48, intermediate_size=40, out_hidden_size=32)
WINDOWS = MERGING | dict(fullatt_block_indexes=[1], window_size=16)
POSITIONS = MERGING | dict(num_position_embeddings=16)
DEEPSTACK = POSITIONS | dict(deepstack_visual_indexes=[0])
GLM_VISION = MERGING | dict(image_size=16)
JANUS_VQ = dict(
    base_channels=32, channel_multiplier=[1], num_res_blocks=1, num_embeddings=16,
    latent_channels=8, projection_dim=32, image_token_embed_dim=32,
)  # fmt: skip
CHAMELEON_VQ = dict(
    embed_dim=8, num_embeddings=20, latent_channels=8, resolution=16, base_channels=32,
    channel_multiplier=[1, 1, 1], num_res_blocks=1,
)  # fmt: skip
EMU3_VQ = dict(
    codebook_size=20, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
    hidden_size=32, attn_resolutions=[],
)  # fmt: skip
WHISPER = VISION | dict(max_source_positions=16, num_mel_bins=8)
CONV_AUDIO = dict(
    num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=32, d_model=24,
    max_source_positions=32, output_dim=32, downsample_hidden_size=8,
)  # fmt: skip


def images():
    return {"pixel_values": torch.randn(2, 3, 16, 16)}


def square_images():
    return images() | {"image_sizes": torch.tensor([[16, 16], [16, 16]])}


def oblong_images():
    return images() | {"image_sizes": torch.tensor([[16, 8], [8, 16]])}


def image_sets():
    """One image in each row's set."""
    return {"pixel_values": torch.randn(2, 1, 3, 16, 16)}


def tiled_images():
    """Two images of three tiles."""
    sizes = torch.tensor([[16, 32], [16, 32]])
    return {"pixel_values": torch.randn(2, 3, 3, 16, 16), "image_sizes": sizes}


def double_images():
    return images() | {"high_res_pixel_values": torch.randn(2, 3, 16, 16)}


def flat_images():
    """Patches in blocks, two frames each."""
    grids = torch.tensor([[1, 4, 4], [1, 2, 8]])
    return {"pixel_values": torch.randn(32, 2 * 48), "image_grid_thw": grids}


def flat_frames():
    return flat_images() | {"pixel_values": torch.randn(32, 48)}


def square_patches():
    return flat_images() | {"pixel_values": torch.randn(32, 3, 4, 4)}


def merged_frames():
    return flat_frames() | {"image_merge_sizes": torch.tensor([2, 2])}


def padded_patches():
    shapes, valid = torch.tensor([[4, 4], [4, 4]]), torch.ones(2, 16, dtype=torch.long)
    pixels = torch.randn(2, 16, 48)
    return dict(pixel_values=pixels, spatial_shapes=shapes, pixel_attention_mask=valid)


def videos():
    return {"pixel_values_videos": torch.randn(2, 2, 3, 16, 16)}


def flat_videos():
    flat = flat_images()
    return {"pixel_values_videos": flat["pixel_values"], "video_grid_thw": flat["image_grid_thw"]}


def sounds(mels=8, frames=32, mask="input_features_mask"):
    sound = {"input_features": torch.randn(2, mels, frames)}
    return sound | ({mask: torch.ones(2, frames, dtype=torch.long)} if mask else {})


class Placeholders(NamedTuple):
    """Model inputs, and the number of placeholders of each token per row."""

    inputs: object
    count: int
    token: int = IMAGE


class Tiny(NamedTuple):
    model: str
    config: dict
    placeholders: list


SET = Placeholders(image_sets, 4)
TILES = Placeholders(tiled_images, 52)
FLAT = [Placeholders(flat_images, 4), Placeholders(flat_videos, 4, VIDEO)]
SOUND = Placeholders(sounds, 8, AUDIO)
SHORT_SOUND = Placeholders(sounds, 4, AUDIO)


def vision(model, tower, text, placeholders, **options):
    """A class, its towers, and the placeholders: a number for those of plain images."""
    if isinstance(placeholders, int):
        placeholders = [Placeholders(images, placeholders)]
    name = model if "For" in model else f"{model}ForConditionalGeneration"
    return Tiny(name, dict(vision_config=tower, text_config=text, **options), placeholders)


def audio(model, tower, placeholders, **options):
    options = dict(audio_config=tower, text_config=QWEN, audio_token_id=AUDIO) | options
    return Tiny(f"{model}ForConditionalGeneration", options, [placeholders])


INDEX = dict(image_token_index=IMAGE)
INDICES = dict(image_token_index=IMAGE, video_token_index=VIDEO)
ID = dict(image_token_id=IMAGE)
IDS = dict(image_token_id=IMAGE, video_token_id=VIDEO)
SPAN = dict(vision_start_token_id=START, vision_end_token_id=END)
GLM = dict(
    **IDS, image_start_token_id=START, image_end_token_id=END, video_start_token_id=93,
    video_end_token_id=94,
)  # fmt: skip
OMNI = dict(**SPAN, audio_start_token_id=93, audio_end_token_id=94)
PINPOINTS = dict(image_grid_pinpoints=[[16, 32], [32, 16]])
CHAMELEON_MAP = {"<image>": IMAGE} | {
    f"IMGIMG{'AB'[k // 10]}{'ABCDEFGHIJ'[k % 10]}Z": 30 + k for k in range(20)
}
EMU3_MAP = {"<image>": IMAGE, "<|extra_200|>": 90} | {
    f"<|visual token {k:06d}|>": 30 + k for k in range(20)
}

MODELS = {
    "llava": vision("Llava", CLIP, TEXT, 16, **INDEX),
    "llava of two layers": vision("Llava", CLIP, TEXT, 16, vision_feature_layer=[-2, -1], **INDEX),
    "llava of pixtral": vision(
        "Llava", PIXTRAL, TEXT, [Placeholders(oblong_images, 8)], vision_feature_layer=-1,
        vision_feature_select_strategy="full", **INDEX,
    ),
    "llava_next": vision("LlavaNext", CLIP, TEXT, [TILES], **INDEX, **PINPOINTS),
    "llava_next_video": vision(
        "LlavaNextVideo", CLIP, TEXT, [TILES, Placeholders(videos, 8, VIDEO)],
        **INDICES, **PINPOINTS,
    ),
    "llava_onevision": vision(
        "LlavaOnevision", SIGLIP, TEXT, [TILES, Placeholders(videos, 9, VIDEO)],
        **INDICES, **PINPOINTS,
    ),
    "vipllava": vision("VipLlava", CLIP, TEXT, 16, vision_feature_layers=[-1, -2], **INDEX),
    "video_llava": vision(
        "VideoLlava", CLIP, TEXT | dict(model_type="llama"),
        [
            Placeholders(lambda: {"pixel_values_images": images()["pixel_values"]}, 16),
            Placeholders(videos, 34, VIDEO),
        ],
        **INDICES,
    ),
    "fast_vlm": vision("FastVlm", RESNET, TEXT, 4, **INDEX),
    "internvl": vision("InternVL", INTERN, TEXT, 4, **ID),
    "qianfan_ocr": vision("QianfanOCR", INTERN | dict(drop_path_rate=0.0), QWEN, 4, **ID),
    "qwen2_vl": vision(
        "Qwen2VL", BLOCKS | dict(embed_dim=48, hidden_size=32), MROPE, FLAT, **IDS, **SPAN
    ),
    "qwen2_5_vl": vision("Qwen2_5_VL", WINDOWS, MROPE, FLAT, **IDS, **SPAN),
    "qwen3_vl": vision("Qwen3VL", DEEPSTACK, MROPE, FLAT, **IDS, **SPAN),
    "qwen3_vl of images": vision("Qwen3VL", DEEPSTACK, MROPE, FLAT[:1], **IDS, **SPAN),
    "qwen3_vl_moe": vision("Qwen3VLMoe", DEEPSTACK, MROPE | MOE, FLAT, **IDS, **SPAN),
    "qwen3_5": vision("Qwen3_5", POSITIONS, MROPE | GATED_DELTA, FLAT, **IDS, **SPAN),
    "qwen3_5_moe": vision(
        "Qwen3_5Moe", POSITIONS,
        MROPE | GATED_DELTA | MOE | dict(shared_expert_intermediate_size=16), FLAT, **IDS, **SPAN,
    ),
    "qwen2_5_omni": vision(
        "Qwen2_5OmniThinkerForConditionalGeneration", WINDOWS, MROPE,
        [FLAT[0], Placeholders(lambda: sounds(16, 16, "feature_attention_mask"), 4, AUDIO)],
        audio_config=CONV_AUDIO | dict(n_window=8), audio_token_index=AUDIO, **INDICES, **OMNI,
    ),
    "qwen3_omni_moe": vision(
        "Qwen3OmniMoeThinkerForConditionalGeneration", DEEPSTACK | dict(image_size=16),
        MROPE | MOE,
        [FLAT[0], Placeholders(lambda: sounds(16, 100, "feature_attention_mask"), 13, AUDIO)],
        audio_config=CONV_AUDIO, audio_token_id=AUDIO, **IDS, **OMNI,
    ),
    "mistral3": vision(
        "Mistral3", PIXTRAL, QWEN | dict(model_type="mistral"), [Placeholders(oblong_images, 2)],
        **INDEX,
    ),
    "lighton_ocr": vision("LightOnOcr", PIXTRAL, QWEN, [Placeholders(oblong_images, 2)], **ID),
    "gemma3": vision(
        "Gemma3", SIGLIP, QWEN, 4, mm_tokens_per_image=4, boi_token_index=START,
        eoi_token_index=END, **INDEX,
    ),
    "paligemma": vision("PaliGemma", SIGLIP, QWEN, 16, projection_dim=32, **INDEX),
    "idefics3": vision("Idefics3", VISION, TEXT, [SET], scale_factor=2, **ID),
    "smolvlm": vision("SmolVLM", VISION, TEXT, [SET], scale_factor=2, **ID),
    "aria": vision(
        "Aria", VISION, TEXT | dict(model_type="aria_text", moe_num_experts=4), 8,
        projector_patch_to_query_dict={16: 8}, **INDEX,
    ),
    "aya_vision": vision("AyaVision", SIGLIP, TEXT, 4, **INDEX),
    "cohere2_vision": vision(
        "Cohere2Vision", SIGLIP, TEXT, 4, alignment_intermediate_size=32, **ID
    ),
    "janus": vision(
        "Janus", VISION | dict(projection_dim=32, num_image_tokens=16), TEXT, 16,
        vq_config=JANUS_VQ, **ID,
    ),
    "deepseek_vl": vision("DeepseekVL", SIGLIP, TEXT, 16, **ID),
    "deepseek_vl_hybrid": vision(
        "DeepseekVLHybrid", SIGLIP, TEXT, [Placeholders(double_images, 16)],
        high_res_vision_config=SAM | dict(model_type="sam_vision_model"), **ID,
    ),
    "deepseek_ocr2": Tiny(
        "DeepseekOcr2ForConditionalGeneration",
        dict(
            vision_config=dict(
                sam_config=SAM | dict(downsample_channels=[16, 24]),
                encoder_config=TEXT | dict(hidden_size=24, rope_parameters=ROPE),
            ),
            text_config=TEXT | EXPERTS | dict(
                num_key_value_heads=4, n_routed_experts=4, mlp_layer_types=["dense", "dense"]
            ),
            **ID,
        ),
        [Placeholders(images, 145)],
    ),
    "got_ocr2": vision("GotOcr2", SAM, TEXT, 1, **INDEX),
    "llama4": vision(
        "Llama4", LLAMA4, QWEN | dict(intermediate_size_mlp=48, num_local_experts=2), 4,
        pad_token_id=0, **INDEX,
    ),
    "glm4v": vision("Glm4v", GLM_VISION, MROPE, FLAT[:1], **GLM),
    "glm4v_moe": vision(
        "Glm4vMoe", GLM_VISION,
        QWEN | EXPERTS | dict(
            rope_parameters=MROPE["rope_parameters"] | dict(partial_rotary_factor=1.0),
            n_routed_experts=4, n_shared_experts=1,
        ),
        FLAT[:1], **GLM,
    ),
    "glm46v": vision(
        "Glm46V", GLM_VISION | dict(model_type="glm4v_vision"), MROPE, FLAT[:1], **GLM
    ),
    "glm_ocr": vision("GlmOcr", GLM_VISION, MROPE, FLAT[:1], **GLM),
    "ernie4_5_vl_moe": vision(
        "Ernie4_5_VLMoe", BLOCKS | dict(hidden_size=32, intermediate_size=40),
        MROPE | dict(
            moe_intermediate_size=[16, 16], moe_k=2, moe_num_experts=4,
            mlp_layer_types=["dense", "sparse"],
        ),
        [Placeholders(flat_frames, 4)], **GLM,
    ),
    "exaone4_5": vision(
        "Exaone4_5_",
        WINDOWS | dict(model_type="exaone4_5_vision", num_key_value_heads=2),
        QWEN | dict(model_type="exaone4"), FLAT, **IDS,
    ),
    "cosmos3_edge": vision(
        "Cosmos3Edge", VISION | dict(num_patches=16), MROPE, [Placeholders(flat_frames, 4)],
        projector_hidden_size=32, **IDS, **SPAN,
    ),
    "cosmos3_omni": vision("Cosmos3Omni", DEEPSTACK, MROPE, FLAT, **IDS, **SPAN),
    "kimi_k25": vision(
        "Kimi_K25", GRID, DEEPSEEK_V3, [Placeholders(square_patches, 4)],
        projection_hidden_size=48, **IDS, **SPAN,
    ),
    "muse_glimmer": vision(
        "MuseGlimmer", GRID | dict(max_position_embeddings=16), QWEN, FLAT[:1],
        out_hidden_size=192, projector_hidden_size=32, **IDS,
    ),
    "video_llama_3": vision(
        "VideoLlama3", VISION, TEXT | dict(model_type="qwen2"),
        [Placeholders(merged_frames, 4)], **IDS,
    ),
    "lfm2_vl": vision(
        "Lfm2Vl", SIGLIP2, TEXT | dict(layer_types=["full_attention", "conv"]),
        [Placeholders(padded_patches, 4)], projector_hidden_size=32, **ID,
    ),
    "paddleocr_vl": vision(
        "PaddleOCRVL", VISION | dict(spatial_merge_size=2), MROPE,
        [Placeholders(square_patches, 4)], **IDS, **SPAN,
    ),
    "step3p7": vision(
        "Step3p7", VISION | dict(width=48, heads=2, layers=2, max_position_embeddings=16),
        QWEN | EXPERTS | dict(
            n_routed_experts=4, share_expert_dim=16, sliding_window=8,
            mlp_layer_types=["dense", "sparse"],
        ),
        1, **ID,
    ),
    "ovis2": vision(
        "Ovis2", VISION | dict(vocab_size=24, num_visual_indicator_tokens=2), TEXT, 16,
        visual_indicator_token_ids=[93, 94], vocab_size=99, hidden_size=32, **ID,
    ),
    "minimax_m3_vl": vision(
        "MiniMaxM3SparseForConditionalGeneration", VISION | dict(hidden_size=48),
        QWEN | dict(
            num_local_experts=4, num_experts_per_tok=2, dense_intermediate_size=32,
            shared_intermediate_size=16, intermediate_size=16, rotary_dim=4,
        ),
        FLAT[:1], projector_hidden_size=32, **INDICES,
    ),
    "florence2": vision("Florence2", DAVIT, BART, 17, **ID),
    "fuyu": Tiny(
        "FuyuForCausalLM",
        TEXT | ID | dict(text_config=TEXT | dict(model_type="persimmon"), patch_size=4),
        [Placeholders(lambda: {"image_patches": torch.randn(2, 4, 48)}, 4)],
    ),
    "chameleon": Tiny(
        "ChameleonForConditionalGeneration",
        TEXT | dict(vq_config=CHAMELEON_VQ, vocabulary_map=CHAMELEON_MAP),
        [Placeholders(images, 16)],
    ),
    "emu3": Tiny(
        "Emu3ForConditionalGeneration",
        dict(
            text_config=QWEN | dict(attention_dropout=0.0), vq_config=EMU3_VQ,
            vocabulary_map=EMU3_MAP,
        ),
        [Placeholders(square_images, 72)],
    ),
    "voxtral": audio("Voxtral", WHISPER, SHORT_SOUND._replace(inputs=lambda: sounds(mask=None))),
    "audioflamingo3": audio("AudioFlamingo3", WHISPER, SOUND),
    "musicflamingo": audio(
        "MusicFlamingo", WHISPER | dict(model_type="audioflamingo3_encoder"), SOUND,
        audio_bos_token_id=93, audio_eos_token_id=94,
    ),
    "glmasr": audio("GlmAsr", WHISPER, SHORT_SOUND),
    "qwen3_asr": audio(
        "Qwen3ASR", CONV_AUDIO | dict(hidden_size=24),
        Placeholders(lambda: sounds(16, 100), 13, AUDIO),
    ),
}  # fmt: skip


def build(name):
    """A model, and inputs with as many features as placeholders."""
    model_class, config, placeholders = MODELS[name]
    model_class = getattr(transformers, model_class)
    torch.manual_seed(0)
    config_class = model_class.config_class
    config = config_class(**adapted_config(config, config_class), attn_implementation="eager")
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide mistakes
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model, prompt(model, placeholders)


def prompt(model, placeholders):
    """Two rows of text with placeholders at different positions."""
    rows, inputs = [[5, 6, 7], [8]], {}
    for make, count, token in placeholders:
        inputs |= make()
        for row in rows:
            row += [START, *[token] * count, END, 20 + len(row) % 7]
    rows[0] += [11]
    rows[1] += [12, 13, 14]
    ids = torch.tensor(rows)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    accepted = inspect.signature(getattr(model, "model", model).forward).parameters
    names = {"mm_token_type_ids", "token_type_ids"} & accepted.keys()
    if "image_patches_indices" in accepted:  # of Fuyu, once
        places = (ids == IMAGE).cumsum(1) - 1
        inputs["image_patches_indices"] = places.masked_fill(ids != IMAGE, -1)
    return inputs | dict.fromkeys(names, types)
