"""Write the demo model's folder but for its weights: configuration, preprocessing, tokenizer, chat template.

    python shape.py ../../models/demo
"""

import argparse
import json
from pathlib import Path

from make_data import IMAGE_SIZE, N_PATCHES, PATCH_SIZE
from tokenizer import build as build_tokenizer

# More rows than the tokenizer has tokens, as in llava-hf's checkpoints (64 | rows).
VOCAB_SIZE = 768
CONTEXT = 1024
# About 128^-1/2. With 0.02, meant for thousands of columns, queries and keys start so small that attention stays even for hundreds of steps.
INITIALIZER_RANGE = 0.08
CLIP_MEAN = [0.48145466, 0.4578275, 0.40821073]
CLIP_STD = [0.26862954, 0.26130258, 0.27577711]
# llava-1.5-hf's own template (its `generation` marks, which only training uses, left out)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\\n' }}{% endfor %}{# Render all text next #}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' '}}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def configs(tokenizer):
    image, pad = tokenizer.token_to_id("<image>"), tokenizer.token_to_id("<pad>")
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
            "head_dim": 32,
            "hidden_act": "silu",
            "hidden_size": 128,
            "initializer_range": INITIALIZER_RANGE,
            "intermediate_size": 384,
            "max_position_embeddings": CONTEXT,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": 4,
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "pad_token_id": pad,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "vocab_size": VOCAB_SIZE,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": 256,
            "image_size": IMAGE_SIZE,
            "intermediate_size": 512,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": 8,
            "num_hidden_layers": 5,
            "patch_size": PATCH_SIZE,
            "projection_dim": 256,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": VOCAB_SIZE,
    }
    yield "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad, "max_length": CONTEXT}
    yield "preprocessor_config.json", {
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": CLIP_MEAN,
        "image_processor_type": "CLIPImageProcessor",
        "image_std": CLIP_STD,
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
        "model_max_length": CONTEXT,
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


def write(out, tokenizer):
    """All but the weights, into the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    for name, content in configs(tokenizer):
        (out / name).write_text(json.dumps(content, indent=2) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write(parser.parse_args().out, build_tokenizer())


if __name__ == "__main__":
    main()
