"""Random weights for tiny LLaVAs, under neutral names, and the spellings that real checkpoints use for them.

Neutral names: `vision.*` as in transformers' CLIPVisionModel, `projector.{0,2,4}.*` as in the original's nn.Sequential,
`text.*` as in LlamaModel, and `lm_head.weight`.
"""

import torch

from common import rng

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Maker:
    """Every tensor is drawn by its own name; scales are such that no tensor can be dropped or swapped unnoticed."""

    def __init__(self, key):
        self.key, self.tensors = key, {}

    def draw(self, name, *shape, std, mean=0.0):
        values = rng(*self.key, name).standard_normal(shape) * std + mean
        self.tensors[name] = torch.tensor(values, dtype=torch.float32)

    def linear(self, name, rows, columns, bias=True, gain=1.0):
        self.draw(f"{name}.weight", rows, columns, std=gain * columns**-0.5)
        if bias:
            self.draw(f"{name}.bias", rows, std=0.2)

    def norm(self, name, size, bias=True):
        self.draw(f"{name}.weight", size, std=0.3, mean=1.0)
        if bias:
            self.draw(f"{name}.bias", size, std=0.2)


def vision_weights(c: dict, seed: int, name: str) -> dict[str, torch.Tensor]:
    m, d, p = Maker(("vision", name, seed)), c["hidden_size"], c["patch_size"]
    m.draw("vision.embeddings.class_embedding", d, std=0.5)
    # Pixels are correlated, so a patch sums coherently: a smaller scale than 1/sqrt(fan in) keeps it near 1.
    m.draw("vision.embeddings.patch_embedding.weight", d, 3, p, p, std=0.02)
    m.draw("vision.embeddings.position_embedding.weight", (c["image_size"] // p) ** 2 + 1, d, std=0.3)
    m.norm("vision.pre_layrnorm", d)
    for k in range(c["num_hidden_layers"]):
        layer = f"vision.encoder.layers.{k}"
        m.norm(f"{layer}.layer_norm1", d)
        m.norm(f"{layer}.layer_norm2", d)
        for part in "qkv":
            m.linear(f"{layer}.self_attn.{part}_proj", d, d, gain=1.0 if part == "v" else 1.5)
        m.linear(f"{layer}.self_attn.out_proj", d, d)
        m.linear(f"{layer}.mlp.fc1", c["intermediate_size"], d)
        m.linear(f"{layer}.mlp.fc2", d, c["intermediate_size"])
    m.norm("vision.post_layernorm", d)
    return m.tensors


def projector_weights(kind: str, vision_hidden: int, hidden: int, seed: int, name: str) -> dict[str, torch.Tensor]:
    m = Maker(("projector", name, seed))
    if kind == "linear":
        m.linear("projector", hidden, vision_hidden)
    elif kind.startswith("mlp"):
        for k in range(int(kind[3])):
            m.linear(f"projector.{2 * k}", hidden, vision_hidden if k == 0 else hidden)
    return m.tensors


def text_weights(c: dict, seed: int, name: str) -> dict[str, torch.Tensor]:
    m, d = Maker(("text", name, seed)), c["hidden_size"]
    head_dim = c.get("head_dim") or d // c["num_attention_heads"]
    kv_rows = c.get("num_key_value_heads", c["num_attention_heads"]) * head_dim
    tied = c.get("tie_word_embeddings", False)
    # Small token embeddings make the epsilon of the first RMSNorm count; tied ones must be large, being the head as well.
    m.draw("text.embed_tokens.weight", c["vocab_size"], d, std=4 * d**-0.5 if tied else 0.05)
    for k in range(c["num_hidden_layers"]):
        layer = f"text.layers.{k}"
        m.norm(f"{layer}.input_layernorm", d, bias=False)
        m.norm(f"{layer}.post_attention_layernorm", d, bias=False)
        m.linear(f"{layer}.self_attn.q_proj", c["num_attention_heads"] * head_dim, d, bias=False, gain=1.5)
        m.linear(f"{layer}.self_attn.k_proj", kv_rows, d, bias=False, gain=1.5)
        m.linear(f"{layer}.self_attn.v_proj", kv_rows, d, bias=False)
        m.linear(f"{layer}.self_attn.o_proj", d, c["num_attention_heads"] * head_dim, bias=False)
        m.linear(f"{layer}.mlp.gate_proj", c["intermediate_size"], d, bias=False)
        m.linear(f"{layer}.mlp.up_proj", c["intermediate_size"], d, bias=False)
        m.linear(f"{layer}.mlp.down_proj", d, c["intermediate_size"], bias=False)
    m.norm("text.norm", d, bias=False)
    if not tied:
        m.draw("lm_head.weight", c["vocab_size"], d, std=4 * d**-0.5)
    return m.tensors


def cast(tensors: dict, dtype: str) -> dict:
    return {name: t.to(DTYPES[dtype]).contiguous() for name, t in tensors.items()}


def spell(tensors: dict, prefixes: dict[str, str]) -> dict:
    """Renames by the longest matching prefix, e.g. {"vision.": "vision_tower.vision_model."}."""
    out = {}
    for name, tensor in tensors.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len)
        out[prefixes[prefix] + name[len(prefix):]] = tensor
    return out


HF_CLASSIC = {
    "vision.": "vision_tower.vision_model.",
    "projector.0.": "multi_modal_projector.linear_1.",
    "projector.2.": "multi_modal_projector.linear_2.",
    "text.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
}
HF_4_52 = {
    "vision.": "model.vision_tower.vision_model.",
    "projector.0.": "model.multi_modal_projector.linear_1.",
    "projector.2.": "model.multi_modal_projector.linear_2.",
    "text.": "model.language_model.",
    "lm_head.": "lm_head.",
}
ORIGINAL = {
    "vision.": "model.vision_tower.vision_tower.vision_model.",
    "projector.": "model.mm_projector.",
    "text.": "model.",
    "lm_head.": "lm_head.",
}


def shards(tensors: dict, count: int) -> list[dict]:
    """Cuts the tensors, in order, in `count` parts of about equal bytes."""
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    parts, size = [{} for _ in range(count)], 0
    for name, tensor in tensors.items():
        parts[min(count - 1, size * count // total)][name] = tensor
        size += tensor.numel() * tensor.element_size()
    return parts


def index_of(parts: list[dict], pattern: str) -> tuple[dict, list[str]]:
    """The index json of a sharded checkpoint and its file names."""
    files = [pattern.format(k + 1, len(parts)) for k in range(len(parts))]
    total = sum(t.numel() * t.element_size() for part in parts for t in part.values())
    return {
        "metadata": {"total_size": total},
        "weight_map": {name: file for file, part in zip(files, parts) for name in part},
    }, files
