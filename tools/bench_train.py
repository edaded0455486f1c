"""A training step of the demo model in PyTorch: all of it in f32, 16 conversations with a picture each, AdamW. Ours is

    llava-engine bench --model models/demo --device cpu --train tune=full --train tune_vision=full --train dtype=f32 \\
      --train recompute=selective --prompt-tokens 104 --new-tokens 24 --batch-size 16 --repeat 7

    python tools/bench_train.py [--threads 2] [--compile]

Needs torch and transformers (tools/reference/requirements.txt).
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from transformers import LlavaForConditionalGeneration

SEQUENCES, TEXT, LEARNED, STEPS = 16, 64, 24, 7


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(__file__).resolve().parents[1] / "models" / "demo"
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").train()
    config = model.config
    size, n_features = config.vision_config.image_size, (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    at = torch.arange(n_features + TEXT)
    ids = torch.arange(SEQUENCES * len(at)).reshape(SEQUENCES, -1) * 7 % 600
    ids[:, :n_features] = config.image_token_id
    labels = torch.where(at >= len(at) - LEARNED, ids, -100)
    pixels = (torch.arange(SEQUENCES * 3 * size * size) % 97 / 48 - 1).reshape(SEQUENCES, 3, size, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if args.compile else model

    def step():
        start = time.perf_counter()
        optimizer.zero_grad()
        forward(input_ids=ids, pixel_values=pixels, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return 1e3 * (time.perf_counter() - start)

    step()
    times = [step() for _ in range(STEPS)]
    print(f"torch {torch.__version__}: {statistics.median(times):.1f} ms a step ({min(times):.1f} to {max(times):.1f})")


if __name__ == "__main__":
    main()
