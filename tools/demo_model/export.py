"""Write a training checkpoint as a llava-hf folder: f16 weights under the hub's names, configs, tokenizer, chat template.

    python export.py --checkpoint run/checkpoint.pt --out ../../models/demo
"""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from make_data import IMAGE_SIZE
from model import CLIP_MEAN, CLIP_STD, N_PATCHES, PATCH_SIZE, VOCAB_SIZE, build_model
from tokenizer import build as build_tokenizer

# llava-1.5-hf's own template (its `generation` marks, which only training uses, left out)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

# The names that checkpoints on the hub carry, whatever transformers calls its modules today.
HUB_NAMES = [
    ("model.language_model.", "language_model.model."),
    ("lm_head.", "language_model.lm_head."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.vision_tower.vision_model.", "vision_tower.vision_model."),
    ("model.vision_tower.", "vision_tower.vision_model."),
]


def hub_name(name):
    for ours, hub in HUB_NAMES:
        if name.startswith(ours):
            return hub + name[len(ours) :]
    raise ValueError(f"no hub name for {name}")


def configs(model, tokenizer):
    image, pad = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")
    vision, text = model.config.vision_config, model.config.text_config
    yield "config.json", {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_seq_length": N_PATCHES,
        "image_token_index": image,
        "model_type": "llava",
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "head_dim": text.head_dim,
            "hidden_act": text.hidden_act,
            "hidden_size": text.hidden_size,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position_embeddings,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": text.num_attention_heads,
            "num_hidden_layers": text.num_hidden_layers,
            "num_key_value_heads": text.num_key_value_heads,
            "pad_token_id": pad,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": VOCAB_SIZE,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_act": vision.hidden_act,
            "hidden_size": vision.hidden_size,
            "image_size": IMAGE_SIZE,
            "intermediate_size": vision.intermediate_size,
            "layer_norm_eps": vision.layer_norm_eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": vision.num_attention_heads,
            "num_hidden_layers": vision.num_hidden_layers,
            "patch_size": PATCH_SIZE,
            "projection_dim": vision.projection_dim,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": VOCAB_SIZE,
    }
    yield "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad, "max_length": text.max_position_embeddings}
    yield "preprocessor_config.json", {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [round(float(v), 8) for v in CLIP_MEAN],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [round(float(v), 8) for v in CLIP_STD],
        "processor_class": "LlavaProcessor",
        "resample": 3,
        "rescale_factor": 0.00392156862745098,
        "size": {"shortest_edge": IMAGE_SIZE},
    }
    yield "processor_config.json", {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": PATCH_SIZE,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": "default",
    }
    names = {0: "<unk>", 1: "<s>", 2: "</s>", image: "<image>", pad: "<pad>"}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    yield "tokenizer_config.json", {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(i): {"content": name, **flags} for i, name in names.items()},
        "bos_token": "<s>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "</s>",
        "extra_special_tokens": {"image_token": "<image>"},
        "image_token": "<image>",
        "model_max_length": text.max_position_embeddings,
        "pad_token": "<pad>",
        "padding_side": "left",
        "processor_class": "LlavaProcessor",
        # not LlamaTokenizer: transformers 5 would then rebuild the normalizer instead of reading tokenizer.json's
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    yield "special_tokens_map.json", {
        **{key: {"content": name, **{k: v for k, v in flags.items() if k != "special"}} for key, name in
           [("bos_token", "<s>"), ("eos_token", "</s>"), ("pad_token", "<pad>"), ("unk_token", "<unk>")]},
        "image_token": "<image>",
    }  # fmt: skip
    yield "chat_template.json", {"chat_template": CHAT_TEMPLATE}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>"), 0)
    model.load_state_dict(torch.load(args.checkpoint, weights_only=True)["model"])
    weights = {hub_name(k): v.detach().half().contiguous() for k, v in model.state_dict().items()}
    assert all(torch.isfinite(w).all() for w in weights.values()), "a weight is beyond f16's range"
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in configs(model, tokenizer):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")
    print(f"{sum(w.numel() for w in weights.values()):,} parameters, {sum(f.stat().st_size for f in out.iterdir()):,} bytes in {out}")


if __name__ == "__main__":
    main()
