"""Tiny processors of the other patched models, with the tokenizer of tiny_processors.py."""

import importlib

import transformers
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from tests.support import tiny_processors

SIDE = 28
SQUARE = {"height": SIDE, "width": SIDE}
CROPPED = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
PATCHED = {"patch_size": 7, "merge_size": 2}
PIXELS = {"size": {"shortest_edge": SIDE**2, "longest_edge": 4 * SIDE**2}}
TILES = {"image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]]}
QWEN = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
GLM = ("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>")
ROWS = tuple(f"<row_{row}_col_{column}>" for row in (1, 2, 3) for column in (1, 2, 3))
SPLIT = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", *ROWS)


class Videos(transformers.BaseVideoProcessor):
    """A video processor for processors that require one although tests have no videos."""

    temporal_patch_size = merge_size = 2

    def __init__(self):
        pass


class Lfm2Images(transformers.ImageProcessingMixin):
    """A fake of LFM2-VL's image processor, which needs torchvision."""

    use_thumbnail = False
    tile_size, encoder_patch_size, downsample_factor = 28, 7, 2

    def fetch_images(self, images):
        return images

    def __call__(self, images, **options):
        import torch

        sizes = [image.size[::-1] for row in images for image in row]
        one = [1] * len(sizes)
        return {"pixel_values": torch.zeros(len(sizes), 16, 3 * 7 * 7), "image_rows": one,
                "image_cols": one, "image_sizes": [[28, 28] for _ in sizes]}  # fmt: skip


def words(*tokens, **named):
    """A tokenizer with these special tokens, some also as named attributes."""
    trained = tiny_processors.tokenizer(300).backend_tokenizer
    made = PreTrainedTokenizerFast(
        tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", extra_special_tokens=named,
    )  # fmt: skip
    made.add_tokens(list(tokens), special_tokens=True)
    return made


def of(model, name):
    """A class imported from its module; transformers hides it without torchvision."""
    return getattr(importlib.import_module(f"transformers.models.{model}"), name)


def pictures(model, name, **options):
    module = f"{model}.image_processing_pil_{model}"
    return of(module, f"{name}ImageProcessorPil")(**options)


def qwen(model, name, tokens=QWEN, **named):
    images = pictures("qwen2_vl", "Qwen2VL", **PATCHED, min_pixels=784, max_pixels=3136)
    return of(f"{model}.processing_{model}", f"{name}Processor")(
        images, words(*tokens, **named), Videos()
    )


def omni(model, name):
    named = dict(image_token="<|IMAGE|>", video_token="<|VIDEO|>", audio_token="<|AUDIO|>",
                 vision_bos_token="<|vision_bos|>", vision_eos_token="<|vision_eos|>",
                 audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>")  # fmt: skip
    images = pictures("qwen2_vl", "Qwen2VL", **PATCHED, min_pixels=784, max_pixels=3136)
    return of(f"{model}.processing_{model}", f"{name}Processor")(
        images, Videos(), transformers.WhisperFeatureExtractor(), words(**named)
    )


def glm(model, name):
    return of(f"{model}.processing_{model}", f"{name}Processor")(
        pictures(model, name, **PATCHED, **PIXELS), words(*GLM), Videos()
    )


def got():
    return pictures("got_ocr2", "GotOcr2", size=SQUARE, crop_to_patches=True, max_patches=4)


def siglip():
    return pictures("siglip", "Siglip", size=SQUARE)


def clip():
    return pictures("clip", "CLIP", **CROPPED)


def gemma3(**options):
    named = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>",
                 image_token="<image_soft_token>")  # fmt: skip
    images = pictures("gemma3", "Gemma3", size=SQUARE, **options)
    return transformers.Gemma3Processor(images, words(**named), image_seq_length=4)


def gemma3n():
    named = dict(boa_token="<a>", eoa_token="</a>", audio_token="<au>", boi_token="<i>",
                 eoi_token="</i>", image_token="<im>")  # fmt: skip
    hearing = transformers.Gemma3nAudioFeatureExtractor()
    return transformers.Gemma3nProcessor(hearing, siglip(), words(**named), image_seq_length=4)


def paligemma():
    images = siglip()
    images.image_seq_length = 4
    return transformers.PaliGemmaProcessor(images, words())


def smolvlm():
    module = importlib.import_module("transformers.models.smolvlm.processing_smolvlm")
    module.num2words = module.num2words or str  # for the numbers of a video's frames
    images = pictures("smolvlm", "SmolVLM", size={"longest_edge": 56},
                      max_image_size={"longest_edge": SIDE})  # fmt: skip
    return module.SmolVLMProcessor(images, words(*SPLIT), Videos(), image_seq_len=4)


def idefics3():
    images = pictures("idefics3", "Idefics3", size={"longest_edge": 56},
                      max_image_size={"longest_edge": SIDE})  # fmt: skip
    return transformers.Idefics3Processor(images, words(*SPLIT), image_seq_len=4)


def idefics2(split):
    images = pictures("idefics2", "Idefics2", do_image_splitting=split,
                      size={"shortest_edge": SIDE, "longest_edge": 56})  # fmt: skip
    return transformers.Idefics2Processor(images, words(), image_seq_len=4)


def pixtral(patch):
    return pictures("pixtral", "Pixtral", size={"longest_edge": 56},
                    patch_size={"height": patch, "width": patch})  # fmt: skip


def lighton():
    named = dict(image_token="<|image_pad|>", image_break_token="<|vision_pad|>",
                 image_end_token="<|vision_end|>")  # fmt: skip
    return transformers.LightOnOcrProcessor(pixtral(14), words(**named), patch_size=7)


def internvl():
    named = dict(start_image_token="<img>", end_image_token="</img>",
                 context_image_token="<IMG_CONTEXT>", video_token="<video>")  # fmt: skip
    return transformers.InternVLProcessor(got(), words(**named), Videos(), image_seq_length=4)


def qianfan():
    named = dict(start_image_token="<img>", end_image_token="</img>",
                 context_image_token="<IMG_CONTEXT>")  # fmt: skip
    return transformers.QianfanOCRProcessor(got(), words(**named), image_seq_length=4)


def aya():
    tokens = ("<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE",
              "TILE_GLOBAL", *(f"TILE_{number}" for number in range(1, 5)))  # fmt: skip
    return transformers.AyaVisionProcessor(got(), words(*tokens), patch_size=7, img_size=SIDE)


def janus():
    named = dict(image_token="<image_placeholder>", boi_token="<boi>", eoi_token="<eoi>")
    images = pictures("janus", "Janus", size=SQUARE)
    return transformers.JanusProcessor(images, words(**named), num_image_tokens=4)


def ernie():
    named = {f"{kind}{part}_token": f"<|{kind}{part}|>"
             for kind in ("image", "video") for part in ("", "_start", "_end")}  # fmt: skip
    images = pictures("ernie4_5_vl_moe", "Ernie4_5_VLMoe", **PATCHED, **PIXELS)
    return transformers.Ernie4_5_VLMoeProcessor(images, words(**named), Videos())


def emu3():
    named = dict(image_token="<im>", boi_token="<boi>", eoi_token="<eoi>",
                 image_wrapper_token="<wrap>", eof_token="<eof>")  # fmt: skip
    images = transformers.Emu3ImageProcessor(min_pixels=64**2, max_pixels=128**2)
    return transformers.Emu3Processor(images, words(**named))


def lfm2():
    named = dict(image_token="<image>", image_start_token="<|image_start|>",
                 image_end_token="<|image_end|>", image_thumbnail_token="<|thumb|>")  # fmt: skip
    return of("lfm2_vl.processing_lfm2_vl", "Lfm2VlProcessor")(Lfm2Images(), words(**named))


def next_tiles():
    return pictures("llava_next", "LlavaNext", **CROPPED, **TILES)


TILED = dict(patch_size=7, vision_feature_select_strategy="default", num_additional_image_tokens=1)
PROCESSORS = {
    "LlavaNextVideo": lambda: transformers.LlavaNextVideoProcessor(
        Videos(), next_tiles(), words("<video>"), **TILED
    ),
    "LlavaOnevision": lambda: transformers.LlavaOnevisionProcessor(
        pictures("llava_onevision", "LlavaOnevision", size=SQUARE, **TILES), words("<video>"),
        Videos(), num_image_tokens=16, vision_feature_select_strategy="full",
    ),
    "VideoLlava": lambda: transformers.VideoLlavaProcessor(
        transformers.VideoLlavaImageProcessor(**CROPPED), Videos(), words("<video>"), patch_size=7
    ),
    "Granite4Vision": lambda: transformers.Granite4VisionProcessor(
        next_tiles(), words(), patch_size=7, vision_feature_select_strategy="full",
        downsample_rate="1/2",
    ),
    "InternVL": internvl, "QianfanOCR": qianfan,
    "Qwen2VL": lambda: qwen("qwen2_vl", "Qwen2VL"),
    "Qwen2_5_VL": lambda: qwen("qwen2_5_vl", "Qwen2_5_VL"),
    "Qwen3VL": lambda: qwen("qwen3_vl", "Qwen3VL"),
    "Qwen2_5Omni": lambda: omni("qwen2_5_omni", "Qwen2_5Omni"),
    "Qwen3OmniMoe": lambda: omni("qwen3_omni_moe", "Qwen3OmniMoe"),
    "Exaone4_5": lambda: qwen("exaone4_5", "Exaone4_5_"),
    "LightOnOcr": lighton, "Idefics3": idefics3, "SmolVLM": smolvlm,
    "Idefics2": lambda: idefics2(False), "Idefics2, split": lambda: idefics2(True),
    "AyaVision": aya, "Gemma3": gemma3, "Gemma3n": gemma3n,
    "Gemma3, pan and scan": lambda: gemma3(
        do_pan_and_scan=True, pan_and_scan_min_crop_size=8, pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    ),
    "Aria": lambda: transformers.AriaProcessor(
        pictures("aria", "Aria", max_image_size=490, min_image_size=SIDE),
        words(image_token="<image>"), size_conversion={490: 4, 980: 8},
    ),
    "Chameleon": lambda: transformers.ChameleonProcessor(
        pictures("chameleon", "Chameleon", **CROPPED),
        words("<racm3:break>", "<eoss>", sep_token="<sep>"), image_seq_length=4,
    ),
    "Emu3": emu3, "Lfm2Vl": lfm2, "Janus": janus,
    "DeepseekVL": lambda: transformers.DeepseekVLProcessor(
        pictures("deepseek_vl", "DeepseekVL", size=SQUARE),
        words(image_token="<image_placeholder>"), num_image_tokens=4,
    ),
    "Ernie4_5_VLMoe": ernie,
    "Glm4v": lambda: glm("glm4v", "Glm4v"), "Glm46V": lambda: glm("glm46v", "Glm46V"),
    "Ovis2": lambda: transformers.Ovis2Processor(
        pictures("ovis2", "Ovis2", size=SQUARE), words("<image>"), image_seq_length=4
    ),
    "PaddleOCRVL": lambda: transformers.PaddleOCRVLProcessor(
        pictures("paddleocr_vl", "PaddleOCRVL", **PATCHED, **PIXELS),
        words(image_token="<|IMAGE_PLACEHOLDER|>"),
    ),
    "VideoLlama3": lambda: transformers.VideoLlama3Processor(
        pictures("video_llama_3", "VideoLlama3", patch_size=7, min_pixels=784, max_pixels=3136),
        words(image_token="<image>", video_token="<video>"), Videos(),
    ),
    "Llava": lambda: tiny_processors.llava(words()),
    "LlavaNext": lambda: tiny_processors.llava_next(words()),
    "Idefics": lambda: tiny_processors.idefics(words()),
}  # fmt: skip
if is_torchvision_available():  # which these need
    PROCESSORS |= {
        "Pixtral": lambda: transformers.PixtralProcessor(
            pixtral(7), words("[IMG]", "[IMG_BREAK]", "[IMG_END]"), patch_size=7
        ),
        "Llama4": lambda: transformers.Llama4Processor(
            transformers.Llama4ImageProcessor(size=SQUARE, max_patches=4),
            words("<|image|>", "<|image_start|>", "<|image_end|>", "<|patch|>",
                  "<|tile_x_separator|>", "<|tile_y_separator|>"), patch_size=7,
        ),
        "Cohere2Vision": lambda: transformers.Cohere2VisionProcessor(
            transformers.Cohere2VisionImageProcessor(size=SQUARE, patch_size=7),
            words(image_token="<|IMG_PATCH|>", boi_token="<|START_OF_IMG|>",
                  eoi_token="<|END_OF_IMG|>", img_line_break_token="<|IMG_LINE_BREAK|>"),
        ),
        "PerceptionLM": lambda: transformers.PerceptionLMProcessor(
            Videos(), transformers.PerceptionLMImageProcessor(tile_size=SIDE, max_num_tiles=1),
            words(image_token="<|image|>", video_token="<|video|>"), patch_size=7,
        ),
        "KimiK25": lambda: transformers.Kimi_K25Processor(
            transformers.Kimi_K25ImageProcessor(patch_size=7, merge_kernel_size=[2, 2]),
            words(image_token="<|media_pad|>", video_token="<|video|>"), Videos(),
        ),
    }  # fmt: skip
# Each text must have a picture.
PICTURED_ROWS = {
    "PaliGemma": paligemma,
    "Kosmos2": lambda: transformers.Kosmos2Processor(clip(), words("<image>", "</image>"), 4),
    "Kosmos2_5": lambda: transformers.Kosmos2_5Processor(
        pictures("kosmos2_5", "Kosmos2_5", patch_size={"height": 7, "width": 7}, max_patches=16),
        words(boi_token="<image>", eoi_token="</image>", image_token="<image>"), 4,
    ),
    "GotOcr2": lambda: transformers.GotOcr2Processor(
        got(), words("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
    ),
    "DeepseekOcr2": lambda: transformers.DeepseekOcr2Processor(
        pictures("deepseek_ocr2", "DeepseekOcr2", size={"height": 64, "width": 64}, tile_size=32),
        words(image_token="<image>"),
    ),
    "Blip2": lambda: tiny_processors.blip2(words()),
    "InstructBlip": lambda: transformers.InstructBlipProcessor(
        pictures("blip", "Blip", size=SQUARE), words(), tiny_processors.tokenizer(300), 4
    ),
    "Mllama": lambda: tiny_processors.mllama(words()),
}  # fmt: skip
# Their rows hold no question with its answer.
REFUSED = {
    "Florence2": lambda: transformers.Florence2Processor(clip(), words(image_token="<image>")),
    "Fuyu": lambda: transformers.FuyuProcessor(
        pictures("fuyu", "Fuyu", size={"height": 60, "width": 60}),
        words("|SPEAKER|", "|NEWLINE|", "<0x04>", "<0x00>"),
    ),
    "InstructBlipVideo": lambda: transformers.InstructBlipVideoProcessor(
        Videos(), words(), tiny_processors.tokenizer(300), 4
    ),
    "Voxtral": lambda: transformers.VoxtralProcessor(
        transformers.WhisperFeatureExtractor(), words()
    ),
}  # fmt: skip
