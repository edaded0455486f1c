"""Write a training checkpoint as a llava-hf folder: f16 weights under the hub's names, configs, tokenizer, chat template.

    python export.py --checkpoint run/checkpoint.pt --out ../../models/demo
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import build_model
from shape import write as write_shape
from tokenizer import build as build_tokenizer

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
    write_shape(out, tokenizer)
    print(f"{sum(w.numel() for w in weights.values()):,} parameters, {sum(f.stat().st_size for f in out.iterdir()):,} bytes in {out}")


if __name__ == "__main__":
    main()
