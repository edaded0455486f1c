"""Checks our reimplementations and the committed fixtures against the original itself: LLaVA's code on transformers 4.37.2.

    python check_original.py PATH_TO_LLAVA_CHECKOUT [LLAMA_TOKENIZER_MODEL]

Needs the second environment of README.md (requirements-original.txt). Nothing of the original is copied; it is run in place.
"""

import json
import os
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from tokenizers import Tokenizer
from transformers import CLIPImageProcessor, LlamaTokenizer, LlamaTokenizerFast

from common import FIXTURES
from llama_slow import SlowLlamaTokenizer
from tiny_tokenizer import tokenizer_json_4x

ROOT = FIXTURES / "checkpoints"


def open_original(checkout: Path):
    """llava.mm_utils and its LLaMA model, past the package's __init__, which would ask for far more."""
    for name in ("llava", "llava.model"):
        package = types.ModuleType(name)
        package.__path__ = [str(checkout / name.replace(".", "/"))]
        sys.modules[name] = package
    from llava import mm_utils
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    return mm_utils, LlavaLlamaForCausalLM


def collapse(ids: list[int], per_image: int) -> list[int]:
    """Undoes the expansion: a run of -200 as long as one image's features stands for one mark."""
    marks, k = [], 0
    while k < len(ids):
        marks.append(ids[k])
        k += per_image if ids[k] == -200 else 1
    return marks


def features_per_image(expected: dict, i: int, case: dict) -> int:
    return len(expected[f"case{i}.image_features"]) // len(case["images"]) if case["images"] else 1


def check_logits(folder: Path, model_class) -> None:
    expected = load_file(folder / "expected.safetensors")
    # The original takes mm_vision_tower as a path from the working directory.
    tower = json.loads((folder / "config.json").read_text())["mm_vision_tower"]
    os.chdir(folder if tower.startswith(".") else ROOT)
    model = model_class.from_pretrained(folder, torch_dtype=torch.float32)
    model.get_vision_tower().load_model()
    model.float().eval()
    worst = 0.0
    for i, case in enumerate(json.loads((folder / "expected.json").read_text())["cases"]):
        ids = collapse(expected[f"case{i}.input_ids"].tolist(), features_per_image(expected, i, case))
        images = {"images": torch.from_numpy(expected[f"case{i}.pixel_values"])} if case["images"] else {}
        with torch.no_grad():
            logits = model(torch.tensor([ids]), **images).logits[0].numpy()
        worst = max(worst, float(np.abs(logits - expected[f"case{i}.logits"]).max()))
    print(f"{folder.name}: logits within {worst:.1e} of the original's own model")
    assert worst < 1e-4


def check_checkpoint(folder: Path, mm_utils) -> None:
    expected = load_file(folder / "expected.safetensors")
    cases = json.loads((folder / "expected.json").read_text())["cases"]
    config = json.loads((folder / "config.json").read_text())
    tower = folder / "clip" if (folder / "clip").exists() else ROOT / "clip-tower"
    home = folder if (folder / "tokenizer.model").exists() else ROOT / "base-llama"
    processor = CLIPImageProcessor.from_pretrained(tower)
    tokenizer = LlamaTokenizer.from_pretrained(home)
    for i, case in enumerate(cases):
        ids = mm_utils.tokenizer_image_token(case["prompt"], tokenizer)
        got = expected[f"case{i}.input_ids"].tolist()
        greedy = expected[f"case{i}.greedy"].tolist()
        assert tokenizer.decode(greedy, skip_special_tokens=True) == case["greedy_text"], (folder.name, case["name"])
        collapsed = collapse(got, features_per_image(expected, i, case))
        assert collapsed == ids, (folder.name, case["name"], collapsed, ids)
        if case["images"]:
            images = [Image.open(folder / f).convert("RGB") for f in case["images"]]
            pixels = mm_utils.process_images(images, processor, types.SimpleNamespace(**config))
            assert np.array_equal(np.asarray(pixels), expected[f"case{i}.pixel_values"]), (folder.name, case["name"])
    print(f"{folder.name}: ids, pixels and decoded text as the original's, bit for bit")


def check_hf_checkpoint(folder: Path) -> None:
    """Pixels, ids and decoded text of the hf profile by transformers 4.37.2."""
    expected = load_file(folder / "expected.safetensors")
    processor = CLIPImageProcessor.from_pretrained(folder)
    tokenizer = LlamaTokenizerFast.from_pretrained(folder)
    for i, case in enumerate(json.loads((folder / "expected.json").read_text())["cases"]):
        prompt = case["prompt"]
        if case["images"]:
            images = [Image.open(folder / f).convert("RGB") for f in case["images"]]
            pixels = processor(images, return_tensors="np")["pixel_values"]
            assert np.array_equal(pixels, expected[f"case{i}.pixel_values"]), (folder.name, case["name"])
            prompt = prompt.replace("<image>", "<image>" * features_per_image(expected, i, case))
        ids = expected[f"case{i}.input_ids"].tolist()
        greedy = expected[f"case{i}.greedy"].tolist()
        assert tokenizer.decode(greedy, skip_special_tokens=True) == case["greedy_text"], (folder.name, case["name"])
        assert tokenizer(prompt).input_ids == ids, (folder.name, case["name"], tokenizer(prompt).input_ids, ids)
    print(f"{folder.name}: ids, pixels and decoded text as those of transformers 4.37.2, bit for bit")


def check_tokenizer(model: Path, lines: list[str]) -> None:
    with tempfile.TemporaryDirectory() as home:
        (Path(home) / "tokenizer.model").write_bytes(model.read_bytes())
        for legacy in (True, False):
            theirs = LlamaTokenizer.from_pretrained(home, legacy=legacy)
            ours = SlowLlamaTokenizer(model, legacy)
            bad = [line for line in lines if theirs(line).input_ids != ours(line)]
            print(f"{model.name} legacy={legacy}: {len(lines) - len(bad)} of {len(lines)} lines agree")
            assert not bad, [(line, theirs(line).input_ids, ours(line)) for line in bad[:3]]

        # Our tokenizer.json against the one 4.37.2 converts from the model; `<image>` and `<pad>` are added in ours only.
        converted = LlamaTokenizerFast(vocab_file=str(Path(home) / "tokenizer.model")).backend_tokenizer
        ours = Tokenizer.from_str(json.dumps(tokenizer_json_4x(model)))
        plain = [line for line in lines if "<image>" not in line and "<pad>" not in line]
        bad = [line for line in plain if converted.encode(line).ids != ours.encode(line).ids]
        print(f"{model.name} tokenizer.json: {len(plain) - len(bad)} of {len(plain)} lines agree")
        assert not bad, bad[:3]


def main() -> None:
    mm_utils, model_class = open_original(Path(sys.argv[1]).resolve())
    llama_model = Path(sys.argv[2]).resolve() if len(sys.argv) > 2 else None
    for folder in sorted(ROOT.iterdir()):
        if folder.name.startswith("orig"):
            check_checkpoint(folder, mm_utils)
            if folder.name in ("orig_mha_f32", "orig_f16_safetensors", "orig_identity_f16"):
                check_logits(folder, model_class)
        elif folder.name.startswith("hf") and (folder / "preprocessor_config.json").exists():
            check_hf_checkpoint(folder)
    lines_file = FIXTURES / "tokenizer" / "lines.jsonl"
    if lines_file.exists():
        lines = [json.loads(line) for line in lines_file.read_text(encoding="utf-8").split("\n") if line]
        check_tokenizer(FIXTURES / "tokenizer" / "tokenizer.model", lines)
        if llama_model:
            check_tokenizer(llama_model, lines)


if __name__ == "__main__":
    main()
