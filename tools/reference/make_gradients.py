"""Gradients of whole tiny models by PyTorch's autograd, and their losses under its AdamW, in f64: tests/fixtures/gradients/NAME.safetensors.

Two sequences, one with a picture and one of text alone, some tokens of which are to be learned; the loss is the sum over these, times
SCALE. Names are the engine's own; biases of Q, K and V are one tensor, as the engine has them.
"""

import torch
from safetensors.torch import save_file
from transformers import LlavaForConditionalGeneration, get_scheduler

from common import FIXTURES, rng

MODELS = ["hf_mha_f32", "hf_gqa_bf16"]
TOKENS = [13, 9]  # besides the picture
SCALE = 0.125
STEPS, WARMUP, MAX_NORM = 50, 5, 1.0
RENAMED = [
    ("model.vision_tower.vision_model.", "model.vision_tower."), ("model.vision_tower.embeddings.", "clip."),
    ("model.vision_tower.pre_layrnorm", "clip.pre_layernorm"), ("model.vision_tower.encoder.", "clip."),
    ("model.multi_modal_projector.", "projector."), ("model.language_model.", "llama."), ("lm_head.", "llama.lm_head."),
]


def canonical(name: str) -> str:
    for old, new in RENAMED:
        if name.startswith(old):
            name = new + name[len(old):]
    return name


def sum_of_losses(model, ids, learned, pixels) -> torch.Tensor:
    logits = model(input_ids=ids[None], pixel_values=pixels).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1], ids[1:], reduction="none")[learned[1:]].sum()


def joined(model) -> dict[str, torch.Tensor]:
    """Gradients by the engine's names."""
    grads = {canonical(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    for q in [n for n in grads if n.endswith("q_proj.bias")]:
        names = [q.replace("q_proj", part) for part in ("q_proj", "k_proj", "v_proj")]
        grads["+".join(n.removesuffix(".bias") for n in names) + ".bias"] = torch.cat([grads.pop(n) for n in names])
    return grads


def train(model, sequences, dtype: torch.dtype | None = None, scaler: torch.amp.GradScaler | None = None) -> list[float]:
    """The mean loss before each of STEPS steps on the same batch, all of the model trained, the parts at rates of their own; under autocast to
    `dtype`, the loss scaled by `scaler`, if there are any."""
    groups = {}
    for name, param in model.named_parameters():
        name = canonical(name)
        lr = {"projector": 4e-3, "clip": 5e-4}.get(name.split(".")[0], 1e-3)
        decay = 0.0 if name.endswith(".bias") or "norm" in name else 0.1
        groups.setdefault((lr, decay), []).append(param)
    optimizer = torch.optim.AdamW(
        [{"params": params, "lr": lr, "weight_decay": decay} for (lr, decay), params in groups.items()],
        betas=(0.9, 0.99), eps=1e-8)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=WARMUP, num_training_steps=STEPS)
    n_learned = sum(learned[1:].sum().item() for _, learned, _ in sequences)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = sum(sum_of_losses(model, *sequence) for sequence in sequences) / n_learned
        (scaler.scale(loss) if scaler else loss).backward()
        losses.append(loss.item())
        if scaler:
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        scheduler.step()
    return losses


def make(name: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(
        FIXTURES / "checkpoints" / name, dtype=torch.float64, attn_implementation="eager")
    config, random = model.config, rng("gradients", name)
    size, patch = config.vision_config.image_size, config.vision_config.patch_size
    n_features = (size // patch) ** 2 + (config.vision_feature_select_strategy == "full")
    pixels = torch.from_numpy(random.standard_normal((1, 3, size, size))).float()
    out = {"pixels": pixels}
    loss, sequences = 0, []
    for i, n in enumerate(TOKENS):
        ids = random.integers(3, config.text_config.vocab_size, n)
        ids[ids == config.image_token_id] = 3
        learned = random.random(n) < 0.6
        learned[:3], learned[-1] = False, True
        ids, learned = torch.from_numpy(ids), torch.from_numpy(learned)
        if i == 0:
            image = torch.full((n_features,), config.image_token_id)
            ids = torch.cat([ids[:2], image, ids[2:]])
            learned = torch.cat([learned[:2], torch.zeros(n_features, dtype=torch.bool), learned[2:]])
        sequences.append((ids, learned, pixels.double() if i == 0 else None))
        loss = loss + sum_of_losses(model, *sequences[-1])
        out[f"ids.{i}"], out[f"is_learned.{i}"] = ids.int(), learned.int()
    (loss * SCALE).backward()
    out["loss"], out["scale"] = loss.detach().float().reshape(1), torch.tensor([SCALE])
    out["image_token_id"] = torch.tensor([config.image_token_id]).int()
    out |= {"grad." + n: g.float().contiguous() for n, g in joined(model).items()}
    out["losses"] = torch.tensor(train(model, sequences)).float()
    (FIXTURES / "gradients").mkdir(exist_ok=True)
    save_file(out, FIXTURES / "gradients" / f"{name}.safetensors")
    print(name, loss.item(), len(grads), out["losses"][[0, 10, 25, 49]].tolist())


if __name__ == "__main__":
    for name in MODELS:
        make(name)
