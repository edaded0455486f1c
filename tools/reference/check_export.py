"""Whether the world reads what `llava-engine export` writes: transformers the llava-hf folders, and the modules that LLaVA's own code is made
of the original ones.

    python check_export.py PATH_TO_LLAVA_ENGINE

Exports every checkpoint of tests/fixtures that the other layout has words for, both ways and there and back, and compares ids, pixels and
logits with what the fixtures expect of the source. Where the two layouts differ by design, what differs is named and counted.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece as spm
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import AutoProcessor, CLIPImageProcessor, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from transformers import LlavaForConditionalGeneration
from transformers.image_utils import load_image

import make_checkpoints as made
from common import FIXTURES
from llama_slow import IMAGE_TOKEN_INDEX, SlowLlamaTokenizer, encode_with_images
from preprocess import pixel_values
from stages import Reference, run_case
from weights import HF_CLASSIC, ORIGINAL, spell

# f32 sums in another order; logits reach 10.
TOLERANCE = 1e-4
# Keys that llava/model/builder.py, llava_arch.py, clip_encoder.py and mm_utils.py of the original read.
ORIGINAL_KEYS = {
    "mm_vision_tower", "mm_hidden_size", "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "mm_use_im_start_end",
    "mm_use_im_patch_token", "mm_patch_merge_type", "image_aspect_ratio", "unfreeze_mm_vision_tower", "max_sequence_length",
    "tune_mm_mlp_adapter",
}


def export(engine: Path, source: Path, to: str, output: Path, *flags: str) -> None:
    subprocess.run([engine, "export", "--model", source, "--to", to, "--output", output, *flags], check=True, capture_output=True)


def tensors_of(folder: Path) -> dict:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        if file.name != "expected.safetensors":
            with safe_open(file, "pt") as opened:
                assert opened.metadata() == {"format": "pt"}, "transformers asks for it"
            tensors |= load_file(file)
    return tensors


def differences(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.float() - expected.float()).abs().max())


def cases(name: str):
    folder = made.ROOT / name
    expected = load_file(folder / "expected.safetensors")
    for i, case in enumerate(json.loads((folder / "expected.json").read_text())["cases"]):
        yield case, {key.removeprefix(f"case{i}."): value for key, value in expected.items() if key.startswith(f"case{i}.")}


def check_hf(name: str, folder: Path, n_rows: int) -> None:
    """Opens the folder as anybody would; `n_rows` rows of the vocabulary are the source's, what comes after them is their mean."""
    model, info = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    model.eval()
    processor = AutoProcessor.from_pretrained(folder)
    image, is_original, other_ids = processor.tokenizer.convert_tokens_to_ids("<image>"), made.is_original(name), 0
    assert image == model.config.image_token_index and processor.tokenizer.pad_token_id == model.config.pad_token_id
    worst_logits, worst_pixels = 0.0, 0.0
    for case, expected in cases(name):
        ids = torch.where(expected["input_ids"] < 0, image, expected["input_ids"])
        pixels = expected.get("pixel_values")
        with torch.no_grad():
            logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
        worst_logits = max(worst_logits, differences(logits[:, :n_rows], expected["logits"][:, :n_rows]))
        if logits.shape[1] > n_rows:
            mean = logits[:, :n_rows].mean(1, keepdim=True).expand(-1, logits.shape[1] - n_rows)
            # Mean rows are rounded to the dtype of the head.
            assert differences(logits[:, n_rows:], mean) < (1e-4 if name.endswith("f32") else 3e-2)
        files = [str(made.ROOT / name / file) for file in case["images"]]
        batch = processor(images=[load_image(f) for f in files] or None, text=case["prompt"], return_tensors="pt")
        if batch["input_ids"][0].tolist() != ids.tolist():
            # The space that llava-hf puts behind `</s>` as well, unlike a tokenizer that is not `legacy`.
            assert is_original and "</s>" in case["prompt"], case["name"]
            other_ids += 1
        if pixels is not None:
            worst_pixels = max(worst_pixels, differences(batch["pixel_values"], pixels))
    print(f"{name} -> {'hf' if folder.name.endswith('hf') else 'original -> hf'}: transformers' logits off by {worst_logits:.1e}, pixels by {worst_pixels:.1e}; "
          f"{other_ids} prompts with `</s>` have other ids")
    assert worst_logits < TOLERANCE
    # Without torchvision, whose resizing is not Pillow's.
    assert worst_pixels < 1e-6


def check_template(folder: Path) -> None:
    """What transformers makes of the chat template, against the prompt of the original's own code."""
    processor = AutoProcessor.from_pretrained(folder)
    image, text = {"type": "image"}, lambda words: {"type": "text", "text": words}
    turns = [("user", [image, text("What is it?")]), ("assistant", [text("A cat.")]), ("user", [text("Sure?")])]
    messages = [{"role": role, "content": content} for role, content in turns]
    fixture = json.loads((FIXTURES / "templates.json").read_text(encoding="utf-8"))
    system = fixture["templates"]["v1"]["system"]
    expected = f"{system} USER: <image>\nWhat is it? ASSISTANT: A cat.</s>USER: Sure? ASSISTANT:"
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    flat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert processor.tokenizer.apply_chat_template(flat, add_generation_prompt=True, tokenize=False) == "Be brief. USER: Hi ASSISTANT:"
    print("chat template: as the original's own prompt")


def check_original(name: str, folder: Path) -> None:
    """Takes the folder apart as llava/model/builder.py and llava_arch.py do."""
    config = json.loads((folder / "config.json").read_text())
    assert ORIGINAL_KEYS <= config.keys(), ORIGINAL_KEYS - config.keys()
    assert config["model_type"] == "llava_llama" and config["architectures"] == ["LlavaLlamaForCausalLM"]
    spec = made.SPECS[name]
    tower = folder / config["mm_vision_tower"]
    vision = CLIPVisionModel.from_pretrained(tower, dtype=torch.float32, attn_implementation="eager").eval()
    state = {key: value.float() for key, value in tensors_of(folder).items()}
    # The names that the original's own files have, which the fixtures were made by.
    drawn = made.draw(name, spec, made.SEEDS[name])
    prefixes = ORIGINAL if spec.projector != "linear" else ORIGINAL | {"projector.": "model.mm_projector."}
    named = spell({key: value for key, value in drawn.items() if not key.startswith("vision.")}, prefixes)
    assert state.keys() == named.keys(), state.keys() ^ named.keys()
    assert set(tensors_of(tower)) == set(spell({k: v for k, v in drawn.items() if k.startswith("vision.")}, {"vision.": "vision_model."}))

    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k != "model_type"}, attn_implementation="eager")).eval()
    if config["tie_word_embeddings"]:
        assert "lm_head.weight" not in state
        llama.load_state_dict({k: v for k, v in state.items() if "mm_" not in k} | {"lm_head.weight": state["model.embed_tokens.weight"]})
    else:
        llama.load_state_dict({k: v for k, v in state.items() if "mm_" not in k})
    # llava/model/multimodal_projector/builder.py
    kind, hidden = config["mm_projector_type"], config["hidden_size"]
    if kind == "identity":
        project = nn.Identity()
    elif kind == "linear":
        project = nn.Linear(config["mm_hidden_size"], hidden)
    else:
        layers = [nn.Linear(config["mm_hidden_size"], hidden)]
        for _ in range(1, int(kind.removeprefix("mlp").removesuffix("x_gelu"))):
            layers += [nn.GELU(), nn.Linear(hidden, hidden)]
        project = nn.Sequential(*layers)
    prefix = "model.mm_projector."
    project.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    keep_cls = config["mm_vision_select_feature"] == "cls_patch"
    model = Reference(vision, config["mm_vision_select_layer"], keep_cls, project, llama.model, llama.lm_head, IMAGE_TOKEN_INDEX)

    settings = json.loads((folder / "tokenizer_config.json").read_text())
    pieces = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert pieces.get_piece_size() == config["vocab_size"] == len(state["model.embed_tokens.weight"])
    assert all(pieces.id_to_piece(config[f"{role}_token_id"]) == settings[f"{role}_token"] for role in ("bos", "eos", "pad"))
    tokenizer = SlowLlamaTokenizer(folder / "tokenizer.model", settings["legacy"])
    per_image = (spec.vision["image_size"] // spec.vision["patch_size"]) ** 2 + keep_cls
    worst_logits = worst_pixels = 0.0
    for case, expected in cases(name):
        image = expected["input_ids"] < 0 if made.is_original(name) else expected["input_ids"] == made.tiny_tokenizer.IMAGE_TOKEN_ID
        ids = torch.where(image, IMAGE_TOKEN_INDEX, expected["input_ids"]).tolist()
        own = [i for mark in encode_with_images(case["prompt"], tokenizer) for i in [mark] * (per_image if mark == IMAGE_TOKEN_INDEX else 1)]
        assert own == ids, (case["name"], own, ids)
        logits = run_case(model, ids, expected.get("pixel_values"))["logits"]
        worst_logits = max(worst_logits, differences(logits, expected["logits"][:, : logits.shape[1]]))
        if case["images"]:
            images = [load_image(str(made.ROOT / name / file)) for file in case["images"]]
            pixels = pixel_values(images, made.clip_processor(spec.vision["image_size"]), config["image_aspect_ratio"])
            worst_pixels = max(worst_pixels, differences(torch.from_numpy(pixels), expected["pixel_values"]))
            CLIPImageProcessor.from_pretrained(tower)
    print(f"{name} -> original: logits off by {worst_logits:.1e}, pixels by {worst_pixels:.1e}; names, ids and settings as LLaVA has them")
    assert worst_logits < TOLERANCE and worst_pixels < 1e-6


def check_pieces(folder: Path, name: str) -> None:
    """A tokenizer.model made of a tokenizer.json cuts the fixtures' lines as the one that that was made of."""
    got, expected = (spm.SentencePieceProcessor(model_file=str(f)) for f in (folder / "tokenizer.model", FIXTURES / "tokenizer/tokenizer.model"))
    lines = [json.loads(line) for line in (FIXTURES / "tokenizer/lines.jsonl").read_text(encoding="utf-8").split("\n") if line]
    other = [line for line in lines if got.encode(line) != expected.encode(line)]
    print(f"{name} -> original: its tokenizer.model cuts {len(lines) - len(other)} of {len(lines)} lines as SentencePiece's own")
    assert not other, other[:3]


def main() -> None:
    engine = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as home:
        for name in made.SPECS:
            source, hf, original, back = made.ROOT / name, *(Path(home) / f"{name}-llava-{to}" for to in ("hf", "original", "back"))
            export(engine, source, "original", original)
            check_original(name, original)
            if not made.is_original(name):
                check_pieces(original, name)
            if made.SPECS[name].projector == "mlp2x_gelu":
                export(engine, source, "hf", hf, "--max-shard-gb", "1e-4")
                check_hf(name, hf, made.SPECS[name].text["vocab_size"])
                export(engine, original, "hf", back)
                check_hf(name, back, made.tiny_tokenizer.VOCAB_SIZE)
                drawn = spell(made.draw(name, made.SPECS[name], made.SEEDS[name]), HF_CLASSIC)
                assert tensors_of(hf).keys() == tensors_of(back).keys() == drawn.keys()
        export(engine, made.ROOT / "orig_mha_f32", "hf", Path(home) / "v1", "--template", "v1")
        check_template(Path(home) / "v1")


if __name__ == "__main__":
    main()
