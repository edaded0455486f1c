"""Tiny random LLaVA checkpoints in every layout, each with the output of every stage by transformers in f32.

    python make_checkpoints.py [NAME ...]        all of them, or those named

Writes tests/fixtures/checkpoints/<name>/ with the checkpoint, `expected.safetensors` and `expected.json`.
"""

import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, LlavaConfig
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from transformers.image_utils import load_image

import make_images
import tiny_tokenizer
from common import CLIP_MEAN, CLIP_STD, FIXTURES, write_json
from llama_slow import IMAGE_TOKEN_INDEX, SlowLlamaTokenizer, encode_with_images
from preprocess import clip_processor, pixel_values
from stages import Reference, run_case
from weights import (HF_4_52, HF_CLASSIC, ORIGINAL, cast, index_of, projector_weights, shards, spell, text_weights,
                     vision_weights)

ROOT = FIXTURES / "checkpoints"
# A test compares greedy tokens exactly; a smaller gap between the two best logits could flip by rounding alone.
MIN_MARGIN = 2e-2

HF_TEMPLATE = "USER: <image>\nWhat is this? ASSISTANT:"
CASES = {
    "template": (["square.png"], HF_TEMPLATE),
    "image_first": (["odd.png"], "<image>What is in the image?"),
    "two_images_glued": (["odd.png", "tall_rgba.png"], "a<image>b<image>c"),
    "text_only": ([], "How many? 42"),
    "two_turns": (["odd.png"], "USER: <image>\nHow? ASSISTANT: red</s>USER: Where? ASSISTANT:"),
    "mistral_instruct": (["grey.png"], "[INST] <image>\nWhat? [/INST]"),
    "palette": (["palette.png"], "USER: <image>\nWhere is  the cat?\n"),
    "unicode": (["tall_rgba.png"], "привет <image> naïve 世界 🦙"),
    "image_only": (["odd.png"], "<image>"),
    "spaces_around": (["photo_444.jpg"], "  the <image>  dog "),
}


@dataclass
class Spec:
    vision: dict
    text: dict
    projector: str = "mlp2x_gelu"
    dtype: str = "f32"
    layer: int = -2
    keep_cls: bool = False
    cases: list = field(default_factory=lambda: ["template", "image_first"])


def clip_config(**changes) -> dict:
    return {
        "hidden_size": 32, "image_size": 56, "intermediate_size": 48, "model_type": "clip_vision_model",
        "num_attention_heads": 4, "num_hidden_layers": 4, "patch_size": 14, "projection_dim": 16, **changes,
    }


def llama_config(**changes) -> dict:
    return {
        "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 512, "model_type": "llama",
        "num_attention_heads": 4, "num_hidden_layers": 2, "rms_norm_eps": 1e-5,
        "vocab_size": tiny_tokenizer.HF_VOCAB_SIZE, **changes,
    }


ORIGINAL_VOCAB = {"vocab_size": tiny_tokenizer.VOCAB_SIZE}
TOWER = clip_config()

SPECS = {
    "hf_mha_f32": Spec(
        TOWER, llama_config(), cases=["template", "image_first", "two_images_glued", "text_only"],
    ),
    "hf_gqa_bf16": Spec(
        clip_config(image_size=42, num_attention_heads=2, num_hidden_layers=5, layer_norm_eps=1e-3),
        llama_config(hidden_size=48, num_attention_heads=6, num_key_value_heads=2, rope_theta=500000.0, num_hidden_layers=3),
        dtype="bf16", cases=["two_turns", "palette"],
    ),
    "hf_gqa_f16": Spec(
        clip_config(image_size=28),
        llama_config(
            num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-4,
            # Wavelengths of head_dim 8 are 6, 63, 628 and 6283: one kept, one blended, two divided.
            rope_parameters={
                "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
            },
        ),
        dtype="f16", layer=-1, keep_cls=True, cases=["unicode", "spaces_around", "image_only"],
    ),
    "hf_linear_rope_f32": Spec(
        clip_config(image_size=70, num_hidden_layers=5, hidden_size=24, num_attention_heads=3),
        llama_config(
            hidden_size=40, head_dim=16, num_key_value_heads=1, rope_theta=10000.0,
            rope_scaling={"type": "linear", "factor": 4.0},
        ),
        layer=3, cases=["template", "text_only"],
    ),
    "orig_mha_f32": Spec(
        TOWER, llama_config(**ORIGINAL_VOCAB), cases=["image_first", "two_images_glued", "text_only", "two_turns"],
    ),
    "orig_gqa_bf16": Spec(
        clip_config(image_size=42, num_attention_heads=2, hidden_size=48),
        llama_config(
            num_key_value_heads=2, rope_theta=1000000.0, rope_scaling={"type": "linear", "factor": 2.0}, **ORIGINAL_VOCAB,
        ),
        dtype="bf16", cases=["two_turns", "mistral_instruct"],
    ),
    "orig_f16_safetensors": Spec(
        TOWER, llama_config(hidden_size=48, num_attention_heads=2, num_hidden_layers=3, **ORIGINAL_VOCAB),
        projector="linear", dtype="f16", layer=-1, keep_cls=True, cases=["palette", "two_images_glued"],
    ),
    "orig_projector_over_base": Spec(
        TOWER, llama_config(num_attention_heads=2, rms_norm_eps=1e-6, **ORIGINAL_VOCAB),
        projector="mlp3x_gelu", dtype="f16", cases=["template", "unicode"],
    ),
    "orig_identity_f16": Spec(
        TOWER, llama_config(num_key_value_heads=1, **ORIGINAL_VOCAB),
        projector="identity", dtype="f16", layer=-3, cases=["image_first", "spaces_around"],
    ),
}


def is_original(name: str) -> bool:
    return name.startswith("orig")


# ---------------------------------------------------------------- writing the files


def draw(name: str, spec: Spec, seed: int) -> dict:
    """All tensors of a checkpoint, already rounded to its storage dtype.

    orig_mha_f32 holds the very weights of hf_mha_f32 (less the rows of the added tokens); every checkpoint on the shared
    CLIP tower draws that tower under the name of its first owner, with its seed.
    """
    family = "mha_f32" if name.endswith("mha_f32") else name
    shared = spec.vision is TOWER
    tensors = vision_weights(spec.vision, SEEDS["hf_mha_f32"] if shared and family != "mha_f32" else seed,
                             "mha_f32" if shared else family)
    vision = cast(tensors, "f32" if shared else spec.dtype)
    rest = projector_weights(spec.projector, spec.vision["hidden_size"], spec.text["hidden_size"], seed, family)
    rows = dict(spec.text, vocab_size=tiny_tokenizer.HF_VOCAB_SIZE)
    rest |= text_weights(rows, seed, family)
    for key in ("text.embed_tokens.weight", "lm_head.weight"):
        if key in rest:
            rest[key] = rest[key][: spec.text["vocab_size"]]
    return vision | cast(rest, spec.dtype)


def preprocessor_config(size: int) -> dict:
    return {
        "crop_size": {"height": size, "width": size}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True,
        "do_rescale": True, "do_resize": True, "image_mean": CLIP_MEAN, "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD, "processor_class": "LlavaProcessor", "resample": 3, "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": size},
    }


TORCH_NAMES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def hf_config(spec: Spec) -> dict:
    """config.json as transformers 4.x wrote it: `torch_dtype`, `rope_theta` and `rope_scaling` apart."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": tiny_tokenizer.IMAGE_TOKEN_ID,
        "model_type": "llava",
        "pad_token_id": tiny_tokenizer.PAD_TOKEN_ID,
        "projector_hidden_act": "gelu",
        "text_config": spec.text,
        "tie_word_embeddings": False,
        "torch_dtype": TORCH_NAMES[spec.dtype],
        "transformers_version": "4.36.0.dev0",
        "vision_config": spec.vision,
        "vision_feature_layer": spec.layer,
        "vision_feature_select_strategy": "full" if spec.keep_cls else "default",
    }


def hf_tokenizer_files(folder: Path) -> None:
    tokenizer = tiny_tokenizer.tokenizer_json_4x(tiny_tokenizer.ensure_model())
    folder.joinpath("tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tiny_tokenizer.tokenizer_config())


def write_hf(name: str, spec: Spec, tensors: dict, folder: Path) -> None:
    size = spec.vision["image_size"]
    hf_tokenizer_files(folder)
    if name == "hf_gqa_f16":
        write_hf_newest(spec, tensors, folder)
        return
    write_json(folder / "config.json", hf_config(spec))
    write_json(folder / "preprocessor_config.json", preprocessor_config(size))
    write_json(folder / "processor_config.json", {
        "image_token": "<image>", "num_additional_image_tokens": 1, "patch_size": spec.vision["patch_size"],
        "processor_class": "LlavaProcessor", "vision_feature_select_strategy": "full" if spec.keep_cls else "default",
    })
    parts = shards(spell(tensors, HF_4_52 if name == "hf_gqa_bf16" else HF_CLASSIC), 3 if name == "hf_gqa_bf16" else 1)
    if len(parts) == 1:
        save_file(parts[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    index, files = index_of(parts, "model-{:05}-of-{:05}.safetensors")
    write_json(folder / "model.safetensors.index.json", index)
    for file, part in zip(files, parts):
        save_file(part, folder / file, metadata={"format": "pt"})


def write_hf_newest(spec: Spec, tensors: dict, folder: Path) -> None:
    """Whatever the installed transformers' own `save_pretrained` writes: config, processor, key spelling."""
    config = LlavaConfig(
        vision_config=spec.vision, text_config=spec.text, image_token_index=tiny_tokenizer.IMAGE_TOKEN_ID,
        vision_feature_layer=spec.layer, vision_feature_select_strategy="full" if spec.keep_cls else "default",
        tie_word_embeddings=True, pad_token_id=tiny_tokenizer.PAD_TOKEN_ID,
    )
    model = LlavaForConditionalGeneration(config)
    live = {"vision.": "model.vision_tower.", "projector.0.": "model.multi_modal_projector.linear_1.",
            "projector.2.": "model.multi_modal_projector.linear_2.", "text.": "model.language_model."}
    state = {k: v.float() for k, v in spell(tensors, live).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert missing == ["lm_head.weight"] and not unexpected, (missing, unexpected)
    model.tie_weights()
    model.half().save_pretrained(folder)
    hf_processor(spec, folder).save_pretrained(folder)


def hf_processor(spec: Spec, folder: Path) -> LlavaProcessor:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    return LlavaProcessor(
        image_processor=clip_processor(spec.vision["image_size"]), tokenizer=tokenizer,
        patch_size=spec.vision["patch_size"], vision_feature_select_strategy="full" if spec.keep_cls else "default",
        num_additional_image_tokens=1,
    )


def write_tower(folder: Path, vision: dict, tensors: dict | None) -> None:
    """A CLIP repository as openai/clip-vit-large-patch14-336: nested config, integer sizes, a pickle with both towers."""
    write_json(folder / "config.json", {
        "architectures": ["CLIPModel"], "initializer_factor": 1.0, "logit_scale_init_value": 2.6592, "model_type": "clip",
        "projection_dim": vision["projection_dim"],
        "text_config": {
            "hidden_size": 8, "intermediate_size": 16, "model_type": "clip_text_model", "num_attention_heads": 2,
            "num_hidden_layers": 1, "vocab_size": 16, "max_position_embeddings": 8, "projection_dim": vision["projection_dim"],
        },
        "torch_dtype": "float32",
        "vision_config": vision,
    })
    size = vision["image_size"]
    write_json(folder / "preprocessor_config.json", {
        "crop_size": size, "do_center_crop": True, "do_normalize": True, "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3,
        "size": size,
    })
    if tensors is None:
        return
    state = spell({k: v for k, v in tensors.items() if k.startswith("vision.")}, {"vision.": "vision_model."})
    positions = state["vision_model.embeddings.position_embedding.weight"].shape[0]
    state["vision_model.embeddings.position_ids"] = torch.arange(positions)[None]
    state["logit_scale"] = torch.tensor(2.6592)
    state["text_model.embeddings.token_embedding.weight"] = torch.full((16, 8), 7.0)
    state["text_model.final_layer_norm.weight"] = torch.full((8,), 7.0)
    state["visual_projection.weight"] = torch.full((vision["projection_dim"], vision["hidden_size"]), 7.0)
    torch.save(state, folder / "pytorch_model.bin")


def original_config(name: str, spec: Spec) -> dict:
    config = {
        "_name_or_path": "llava", "architectures": ["LlavaLlamaForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
        "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False, "hidden_act": "silu",
        "initializer_range": 0.02, "max_length": 512, "mm_hidden_size": spec.vision["hidden_size"],
        "mm_projector_type": spec.projector, "mm_resampler_type": None, "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False, "mm_vision_select_feature": "cls_patch" if spec.keep_cls else "patch",
        "mm_vision_select_layer": spec.layer, "mm_vision_tower": "clip-tower", "pad_token_id": 0, "pretraining_tp": 1,
        "rope_scaling": None, "tie_word_embeddings": False, "torch_dtype": TORCH_NAMES[spec.dtype],
        "transformers_version": "4.31.0", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, **spec.text, "model_type": "llava",
    }
    config.setdefault("num_key_value_heads", spec.text["num_attention_heads"])
    if name in ("orig_mha_f32", "orig_projector_over_base"):
        config["image_aspect_ratio"] = "pad"
    if name == "orig_mha_f32":
        config["mm_vision_tower"] = "../clip-tower"
        del config["mm_vision_select_feature"]  # older files lack it; "patch" is the default
    if name == "orig_gqa_bf16":
        config["mm_vision_tower"] = "./clip"
        config["unfreeze_mm_vision_tower"] = True  # as in v1.6: the checkpoint's own tower replaces the one named
    if name == "orig_f16_safetensors":
        config["image_aspect_ratio"] = "square"
    if name == "orig_projector_over_base":
        config["_name_or_path"] = "../base-llama"
    return config


# `legacy` decides how text after `</s>` is cut: absent or true in v1 and v1.1 files, false in v1.5's.
LEGACY = {"orig_mha_f32": False, "orig_gqa_bf16": None, "orig_f16_safetensors": True, "orig_projector_over_base": None,
          "orig_identity_f16": False}


def slow_tokenizer_files(folder: Path, legacy: bool | None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(tiny_tokenizer.ensure_model(), folder / "tokenizer.model")
    token = {"__type": "AddedToken", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(folder / "tokenizer_config.json", {
        "add_bos_token": True, "add_eos_token": False, "bos_token": token | {"content": "<s>"},
        "clean_up_tokenization_spaces": False, "eos_token": token | {"content": "</s>"},
        **({} if legacy is None else {"legacy": legacy}), "model_max_length": 2048, "pad_token": None,
        "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer",
        "unk_token": token | {"content": "<unk>"},
    })


def write_original(name: str, spec: Spec, tensors: dict, folder: Path) -> None:
    write_json(folder / "config.json", original_config(name, spec))
    rest = {k: v for k, v in tensors.items() if not k.startswith("vision.")}
    if name != "orig_projector_over_base":
        slow_tokenizer_files(folder, LEGACY[name])
    if name == "orig_mha_f32":
        write_tower(ROOT / "clip-tower", spec.vision, tensors)
        parts = shards(spell(rest, ORIGINAL), 2)
        index, files = index_of(parts, "pytorch_model-{:05}-of-{:05}.bin")
        write_json(folder / "pytorch_model.bin.index.json", index)
        for file, part in zip(files, parts):
            # Old files carry the rotary frequencies as a buffer; loaders skip them.
            part = dict(part)
            if "model.layers.0.self_attn.q_proj.weight" in part:
                part["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
            torch.save(part, folder / file)
    elif name == "orig_gqa_bf16":
        write_tower(folder / "clip", spec.vision, None)
        torch.save(spell(tensors, ORIGINAL), folder / "pytorch_model.bin")
    elif name == "orig_projector_over_base":
        torch.save(awkward_views(spell({k: v for k, v in rest.items() if k.startswith("projector.")}, ORIGINAL)),
                   folder / "mm_projector.bin")
        base = ROOT / "base-llama"
        slow_tokenizer_files(base, LEGACY[name])
        write_json(base / "config.json", {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", **spec.text})
        llama = {k: v for k, v in rest.items() if not k.startswith("projector.")}
        save_file(spell(llama, {"text.": "model.", "lm_head.": "lm_head."}), base / "model.safetensors",
                  metadata={"format": "pt"})
    else:
        save_file(spell(rest, ORIGINAL), folder / "model.safetensors", metadata={"format": "pt"})


def awkward_views(tensors: dict) -> dict:
    """The same values as views with an offset into one storage, the first one transposed: legal in a torch pickle."""
    flat = torch.cat([torch.zeros(5, dtype=next(iter(tensors.values())).dtype)]
                     + [(t.T if t.dim() == 2 and k == 0 else t).reshape(-1) for k, t in enumerate(tensors.values())])
    views, offset = {}, 5
    for k, (name, t) in enumerate(tensors.items()):
        if t.dim() == 2 and k == 0:
            views[name] = flat[offset : offset + t.numel()].view(t.shape[1], t.shape[0]).T
        else:
            views[name] = flat[offset : offset + t.numel()].view(t.shape)
        assert torch.equal(views[name], t)
        offset += t.numel()
    return views


# ---------------------------------------------------------------- reading them back with transformers


def load_hf(spec: Spec, folder: Path, dtype=torch.float32) -> Reference:
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True,
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    inner = model.model
    return Reference(inner.vision_tower, spec.layer, spec.keep_cls, inner.multi_modal_projector, inner.language_model,
                     model.lm_head, tiny_tokenizer.IMAGE_TOKEN_ID), model


def load_original(name: str, spec: Spec, folder: Path) -> Reference:
    """transformers has no class for this layout: its CLIP and LLaMA modules, and the projector as nn.Sequential."""
    state = {}
    for file in sorted(folder.glob("*.bin")):
        state |= torch.load(file, weights_only=True)
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "expected.safetensors":
            state |= load_file(file)
    if name == "orig_projector_over_base":
        state |= load_file(ROOT / "base-llama" / "model.safetensors")
    state = {k: v.float() for k, v in state.items() if not k.endswith("inv_freq")}

    if name == "orig_gqa_bf16":
        vision = CLIPVisionModel(CLIPVisionConfig(**spec.vision, attn_implementation="eager"))
        prefix = ORIGINAL["vision."]
        vision.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    else:
        vision = CLIPVisionModel.from_pretrained(ROOT / "clip-tower", dtype=torch.float32, attn_implementation="eager")
    llama = LlamaForCausalLM(LlamaConfig(**spec.text, attn_implementation="eager"))
    llama.load_state_dict({k: v for k, v in state.items() if "mm_projector" not in k and "vision_tower" not in k})

    hidden, vision_hidden = spec.text["hidden_size"], spec.vision["hidden_size"]
    if spec.projector == "identity":
        project = nn.Identity()
    elif spec.projector == "linear":
        project = nn.Linear(vision_hidden, hidden)
    else:
        layers = [nn.Linear(vision_hidden, hidden)]
        for _ in range(int(spec.projector[3]) - 1):
            layers += [nn.GELU(), nn.Linear(hidden, hidden)]
        project = nn.Sequential(*layers)
    project.load_state_dict(
        {k.removeprefix("model.mm_projector."): v for k, v in state.items() if k.startswith("model.mm_projector.")})
    return Reference(vision.eval(), spec.layer, spec.keep_cls, project, llama.model.eval(), llama.lm_head, IMAGE_TOKEN_INDEX)


# ---------------------------------------------------------------- inputs and outputs


def hf_inputs(spec: Spec, folder: Path, files: list[str], prompt: str):
    # Files are opened by transformers' own load_image (EXIF applied, alpha dropped), then taken through the processor.
    images = [load_image(str(FIXTURES / "images" / f)) for f in files]
    batch = hf_processor(spec, folder)(images=images or None, text=prompt, return_tensors="pt")
    return batch["input_ids"][0].tolist(), batch.get("pixel_values")


def original_inputs(name: str, spec: Spec, folder: Path, files: list[str], prompt: str):
    images = [Image.open(FIXTURES / "images" / f).convert("RGB") for f in files]
    home = ROOT / "base-llama" if name == "orig_projector_over_base" else folder
    tokenizer = SlowLlamaTokenizer(home / "tokenizer.model", LEGACY[name] is not False)
    per_image = (spec.vision["image_size"] // spec.vision["patch_size"]) ** 2 + spec.keep_cls
    ids = []
    for i in encode_with_images(prompt, tokenizer):
        ids += [i] * (per_image if i == IMAGE_TOKEN_INDEX else 1)
    if not images:
        return ids, None
    config = json.loads((folder / "config.json").read_text())
    pixels = pixel_values(images, clip_processor(spec.vision["image_size"]), config.get("image_aspect_ratio"))
    return ids, torch.from_numpy(pixels)


def greedy_text(name: str, folder: Path, ids: list[int]) -> str:
    """The greedy tokens as text, special tokens left out, not stripped."""
    if not is_original(name):
        return transformers.AutoTokenizer.from_pretrained(folder).decode(ids, skip_special_tokens=True)
    home = ROOT / "base-llama" if name == "orig_projector_over_base" else folder
    return SlowLlamaTokenizer(home / "tokenizer.model", LEGACY[name] is not False).decode(ids)


def build(name: str, seed: int) -> float:
    """Writes one checkpoint and what is expected of it; returns the smallest greedy margin."""
    spec, folder = SPECS[name], ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tensors = draw(name, spec, seed)
    (write_original if is_original(name) else write_hf)(name, spec, tensors, folder)

    if is_original(name):
        model, whole = load_original(name, spec, folder), None
    else:
        model, whole = load_hf(spec, folder)
    expected, cases = {}, []
    for i, case in enumerate(spec.cases):
        files, prompt = CASES[case]
        case_json = {"name": case, "images": [f"../../images/{f}" for f in files], "prompt": prompt, "template": None}
        if is_original(name):
            ids, pixels = original_inputs(name, spec, folder, files, prompt)
        else:
            ids, pixels = hf_inputs(spec, folder, files, prompt)
        out = run_case(model, ids, pixels)
        if not is_original(name):
            check_against_whole(whole, out)
        if case == "template":
            case_json["template"] = {"name": "llava-1.5-hf", "question": "What is this?"}
        if case == "mistral_instruct":
            case_json["template"] = {"name": "mistral_instruct", "question": "What?"}
        if spec.dtype == "bf16" and not is_original(name):
            half, _ = load_hf(spec, folder, torch.bfloat16)
            out["last_logits_bf16"] = run_case(half, ids, None if pixels is None else pixels.bfloat16())["last_logits"].float()
        cases.append(case_json | {
            "tokens": len(ids), "min_margin": round(float(out["margins"].min()), 4),
            "greedy_text": greedy_text(name, folder, out["greedy"].tolist()),
        })
        expected |= {f"case{i}.{key}": value for key, value in out.items()}
    save_file(expected, folder / "expected.safetensors")
    write_json(folder / "expected.json", {
        "profile": "original" if is_original(name) else "hf",
        "seed": seed,
        "oracle": f"transformers {transformers.__version__}, torch {torch.__version__.split('+')[0]}, f32, eager attention",
        "image_token_id": model.image_token_id,
        "new_tokens": len(out["greedy"]),
        "cases": cases,
    })
    for path in ROOT.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors creates its files unreadable to others
    return min(case["min_margin"] for case in cases)


def check_against_whole(model, out: dict) -> None:
    """The stages put together here must be what LlavaForConditionalGeneration computes in one call."""
    with torch.no_grad():
        logits = model(input_ids=out["input_ids"][None], pixel_values=out.get("pixel_values")).logits[0]
    assert torch.allclose(logits, out["logits"], atol=1e-4, rtol=1e-4), float((logits - out["logits"]).abs().max())


# The first seeds whose greedy margins all exceed MIN_MARGIN, as `--search` prints them. The two mha checkpoints share one,
# and every owner of the shared tower must be searched again when it changes.
SEEDS = {
    "hf_mha_f32": 7, "hf_gqa_bf16": 3, "hf_gqa_f16": 0, "hf_linear_rope_f32": 1, "orig_mha_f32": 7, "orig_gqa_bf16": 1,
    "orig_f16_safetensors": 4, "orig_projector_over_base": 2, "orig_identity_f16": 1,
}


def search() -> None:
    """Finds new seeds, pair by pair where two checkpoints hold the same weights."""
    groups = [["hf_mha_f32", "orig_mha_f32"]] + [[name] for name in SPECS if not name.endswith("mha_f32")]
    for group in groups:
        seed = 0
        while True:
            SEEDS.update({name: seed for name in group})
            if all(build(name, seed) > MIN_MARGIN for name in group):
                break
            seed += 1
    print(f"SEEDS = {SEEDS}")


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    make_images.main()
    if sys.argv[1:] == ["--search"]:
        search()
        return
    for name in sys.argv[1:] or list(SPECS):
        margin = build(name, SEEDS[name])
        size = sum(p.stat().st_size for p in (ROOT / name).rglob("*") if p.is_file())
        print(f"{name}: {size // 1024} KiB, smallest greedy margin {margin:.4f}", flush=True)
        assert margin > MIN_MARGIN, "run --search and take its seeds"


if __name__ == "__main__":
    main()
