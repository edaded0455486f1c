"""Training in 16 bits as PyTorch does it, by its autocast over f32 parameters: tests/fixtures/gradients/mixed.json.

Of the models and sequences of make_gradients.py, for bf16 and f16: how far each gradient is from that in f64, as a share of its length; the losses
of the same 50 steps, in f16 with PyTorch's GradScaler and where that ends. And what that scaler makes of steps with gradients that are not finite.
"""

import json

import torch
from safetensors import safe_open
from transformers import LlavaForConditionalGeneration

from common import FIXTURES
from make_gradients import MODELS, SCALE, TOKENS, canonical, joined, sum_of_losses, train

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def load(name: str):
    return LlavaForConditionalGeneration.from_pretrained(
        FIXTURES / "checkpoints" / name, dtype=torch.float32, attn_implementation="eager")


def of_model(name: str, dtype: torch.dtype) -> dict:
    with safe_open(FIXTURES / "gradients" / f"{name}.safetensors", "pt") as file:
        reference = {key: file.get_tensor(key) for key in file.keys()}
    sequences = [
        (reference[f"ids.{i}"].long(), reference[f"is_learned.{i}"].bool(), reference["pixels"] if i == 0 else None)
        for i in range(len(TOKENS))
    ]
    model = load(name)
    with torch.autocast("cpu", dtype):
        loss = sum(sum_of_losses(model, *sequence) for sequence in sequences)
    (loss * SCALE).backward()
    errors = {}
    for param, grad in joined(model).items():
        expected = reference["grad." + param].double()
        errors[param] = float(f"{((grad.double().reshape(expected.shape) - expected).norm() / expected.norm()).item():.3g}")
    scaler = torch.amp.GradScaler("cpu") if dtype == torch.float16 else None
    losses = train(load(name), sequences, dtype, scaler)
    worst = max(abs(a - b) for a, b in zip(losses, reference["losses"].tolist()))
    print(name, dtype, f"loss {loss.item():.4f} of {reference['loss'].item():.4f},",
          f"errors up to {max(errors.values())}, losses of steps within {worst:.4f} of those in f64",
          f"scale {scaler.get_scale()}" if scaler else "")
    return {"errors": errors, "losses": [round(loss, 5) for loss in losses], "scale": scaler.get_scale() if scaler else None}


def scales(first: float, runs: list[int]) -> list[list[float]]:
    """After each run of so many steps with finite gradients, and after the step with others that follows it: the scale."""
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer, scaler = torch.optim.SGD([param], lr=0.0), torch.amp.GradScaler("cpu", init_scale=first)

    def step(grad: float) -> float:
        scaler.scale(param.sum())
        param.grad = torch.tensor([grad])
        scaler.step(optimizer)
        scaler.update()
        return scaler.get_scale()

    out = []
    for n in runs:
        for _ in range(n):
            scale = step(1.0)
        out.append([n, scale, step(float("inf"))])
    return out


if __name__ == "__main__":
    out = {name: {key: of_model(name, dtype) for key, dtype in DTYPES.items()} for name in MODELS}
    out["scales"] = [scales(65536.0, [1, 1999, 2000, 2001, 6001]), scales(2.0**127, [2000])]
    (FIXTURES / "gradients" / "mixed.json").write_text(json.dumps(out, indent=1) + "\n")
