"""GGUF checkpoints, written by the `gguf` package from checkpoints that are fixtures already, so that what they must answer is known.

    python make_gguf.py        after make_checkpoints.py

Writes tests/fixtures/gguf/:
- mha_f32/, gqa_bf16/: the weights of orig_mha_f32 and orig_gqa_bf16, bit for bit; the former's mmproj as files of before 2025 are, the
  latter's linear stretching of frequencies as the tensor `rope_freqs`.
- mha_q/: the former's in Q4_0, Q8_0 and F16, with `dense.safetensors`: what `gguf.quants.dequantize` makes of them, as a checkpoint
  of the original layout has it.
- blocks.gguf, blocks.safetensors: random blocks of all types that are read, and what `gguf.quants.dequantize` makes of them.
"""

import json
import struct

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize, quantize
from safetensors.numpy import save_file
from safetensors.torch import load_file

from common import CLIP_MEAN, CLIP_STD, FIXTURES, rng

CHECKPOINTS, OUT = FIXTURES / "checkpoints", FIXTURES / "gguf"
TOWER_PREFIX = "model.vision_tower.vision_tower.vision_model."
LLAMA_MODULES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
CLIP_MODULES = {
    "ln1": "layer_norm1", "ln2": "layer_norm2", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
}


def load_torch(path) -> dict:
    """A pickle of plain tensors, or a safetensors file."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def tensors_of(folder, patterns) -> dict:
    """The tensors of all files of a folder that match."""
    merged = {}
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            merged |= load_torch(path)
    return merged


def pieces(path) -> list[tuple[str, float, int]]:
    """Text, score and type of each piece of a SentencePiece model, whose protobuf is walked by hand: no package needed."""
    def fields(data):
        at = 0

        def varint():
            nonlocal at
            value = shift = 0
            while True:
                byte = data[at]
                at += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while at < len(data):
            key = varint()
            match key & 7:
                case 0: yield key >> 3, varint()
                case 2:
                    n = varint()
                    at += n
                    yield key >> 3, data[at - n:at]
                case 5:
                    at += 4
                    yield key >> 3, data[at - 4:at]
                case other: raise ValueError(f"wire type {other}")

    found = []
    for number, message in fields(path.read_bytes()):
        if number == 1:
            piece = {1: b"", 2: b"\0\0\0\0", 3: 1} | dict(fields(message))
            found.append((piece[1].decode(), struct.unpack("<f", piece[2])[0], piece[3]))
    return found


def rotary_pairs(weight, n_heads):
    """Rows as llama.cpp's rotation pairs them: it turns neighbours, transformers a row and the one half a head on."""
    n, k = weight.shape
    return weight.reshape(n_heads, 2, n // n_heads // 2, k).transpose(1, 2).reshape(n, k)


class File:
    """A GGUF file that is being written; `kinds` says what a tensor of this name is stored as."""

    def __init__(self, path, architecture, kinds):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.writer, self.kinds, self.dense = gguf.GGUFWriter(path, architecture), kinds, {}

    def tensor(self, name, tensor):
        values = tensor.float().numpy()
        kind = self.kinds(name, values)
        if kind in (Type.F32, Type.F16):
            data = values.astype(np.float32 if kind == Type.F32 else np.float16)
            self.writer.add_tensor(name, data)
            self.dense[name] = data.astype(np.float32)
        else:
            data = quantize(values, kind)
            self.writer.add_tensor(name, data, raw_dtype=kind)
            self.dense[name] = dequantize(data, kind).reshape(values.shape)

    def close(self):
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()


def write_text(path, config, weights, kinds):
    file = File(path, "llama", kinds)
    w, n_heads, n_kv_heads = file.writer, config["num_attention_heads"], config["num_key_value_heads"]
    w.add_context_length(config["max_position_embeddings"])
    w.add_embedding_length(config["hidden_size"])
    w.add_block_count(config["num_hidden_layers"])
    w.add_feed_forward_length(config["intermediate_size"])
    w.add_head_count(n_heads)
    w.add_head_count_kv(n_kv_heads)
    w.add_layer_norm_rms_eps(config["rms_norm_eps"])
    w.add_rope_freq_base(config.get("rope_theta", 10000.0))
    w.add_rope_dimension_count(config["hidden_size"] // n_heads)
    w.add_vocab_size(config["vocab_size"])
    if scaling := config.get("rope_scaling"):
        # Linear stretching, in the way in which converters write the others: a divisor for each frequency.
        file.tensor("rope_freqs.weight", torch.full((config["hidden_size"] // n_heads // 2,), scaling["factor"]))
    vocabulary = pieces(FIXTURES / "tokenizer" / "tokenizer.model")
    w.add_tokenizer_model("llama")
    w.add_token_list([text for text, _, _ in vocabulary])
    w.add_token_scores([score for _, score, _ in vocabulary])
    w.add_token_types([kind for _, _, kind in vocabulary])
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    w.add_unk_token_id(0)
    w.add_add_bos_token(True)
    w.add_add_eos_token(False)
    file.tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    file.tensor("output_norm.weight", weights["model.norm.weight"])
    file.tensor("output.weight", weights["lm_head.weight"])
    for k in range(config["num_hidden_layers"]):
        for ours, theirs in LLAMA_MODULES.items():
            weight = weights[f"model.layers.{k}.{theirs}.weight"]
            if ours in ("attn_q", "attn_k"):
                weight = rotary_pairs(weight, n_heads if ours == "attn_q" else n_kv_heads)
            file.tensor(f"blk.{k}.{ours}.weight", weight)
    file.close()
    return file.dense


def write_mmproj(path, tower, weights, projector, kinds, legacy, selected):
    """`legacy` swaps the names of the MLP and drops what lies behind the selected layer without a word, as the first converter did."""
    file = File(path, "clip", kinds)
    w, n_layers = file.writer, selected if legacy else tower["num_hidden_layers"]
    w.add_bool("clip.has_vision_encoder", True)
    w.add_bool("clip.has_llava_projector", True)
    w.add_string("clip.projector_type", "mlp")
    w.add_bool("clip.use_gelu", False)
    for key, value in {
        "image_size": tower["image_size"], "patch_size": tower["patch_size"], "embedding_length": tower["hidden_size"],
        "feed_forward_length": tower["intermediate_size"], "projection_dim": tower["projection_dim"],
        "block_count": n_layers, "attention.head_count": tower["num_attention_heads"],
    }.items():
        w.add_uint32(f"clip.vision.{key}", value)
    w.add_float32("clip.vision.attention.layer_norm_epsilon", tower.get("layer_norm_eps", 1e-5))
    w.add_array("clip.vision.image_mean", CLIP_MEAN)
    w.add_array("clip.vision.image_std", CLIP_STD)
    if not legacy:
        w.add_array("clip.vision.feature_layer", [selected])
        w.add_string("clip.vision.image_aspect_ratio", "square")
    file.tensor("v.class_embd", weights["embeddings.class_embedding"])
    file.tensor("v.patch_embd.weight", weights["embeddings.patch_embedding.weight"])
    file.tensor("v.position_embd.weight", weights["embeddings.position_embedding.weight"])
    for kind in ("weight", "bias"):
        file.tensor(f"v.pre_ln.{kind}", weights[f"pre_layrnorm.{kind}"])
        for k in range(n_layers):
            for ours, theirs in CLIP_MODULES.items():
                if legacy:
                    ours = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}.get(ours, ours)
                file.tensor(f"v.blk.{k}.{ours}.{kind}", weights[f"encoder.layers.{k}.{theirs}.{kind}"])
        for n in (0, 2):
            file.tensor(f"mm.{n}.{kind}", projector[f"model.mm_projector.{n}.{kind}"])
    file.close()
    return file.dense


def of_one_dtype(kind):
    """All in `kind`, but for what ggml's operators want in f32: norms, biases, embeddings of the tower."""
    return lambda name, values: Type.F32 if values.ndim == 1 or kind == Type.F32 or "embd" in name and name[0] == "v" else kind


def mixed(name, values):
    """As files of Q4_0 are: the head finer, what does not divide in blocks of 32 in f16; and one matrix of the decoder in Q8_0."""
    if values.ndim == 1 or name == "v.position_embd.weight":
        return Type.F32
    if values.ndim > 2 or values.shape[-1] % 32:
        return Type.F16
    if name == "output.weight" or ".attn_v." in name or name.startswith("v."):
        return Type.Q8_0
    return Type.F16 if name.startswith("mm.") else Type.Q4_0


def dense_checkpoint(text, tower, config):
    """What the two files hold, in the original's names and order of rows."""
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    dense = {"model.embed_tokens.weight": text["token_embd.weight"], "model.norm.weight": text["output_norm.weight"],
             "lm_head.weight": text["output.weight"]}
    for k in range(config["num_hidden_layers"]):
        for ours, theirs in LLAMA_MODULES.items():
            weight = text[f"blk.{k}.{ours}.weight"]
            if ours in heads:
                n, columns = weight.shape
                weight = weight.reshape(heads[ours], -1, 2, columns).swapaxes(1, 2).reshape(n, columns)
            dense[f"model.layers.{k}.{theirs}.weight"] = weight
    swapped = CLIP_MODULES | {"ffn_down": "mlp.fc1", "ffn_up": "mlp.fc2"}
    for name, weight in tower.items():
        match name.split("."):
            case ["mm", n, kind]: dense[f"model.mm_projector.{n}.{kind}"] = weight
            case ["v", "blk", k, module, kind]: dense[f"{TOWER_PREFIX}encoder.layers.{k}.{swapped[module]}.{kind}"] = weight
            case ["v", "pre_ln", kind]: dense[f"{TOWER_PREFIX}pre_layrnorm.{kind}"] = weight
            case ["v", "class_embd"]: dense[f"{TOWER_PREFIX}embeddings.class_embedding"] = weight
            case ["v", module, "weight"]:
                dense[f"{TOWER_PREFIX}embeddings.{module.replace('embd', 'embedding')}.weight"] = weight
    return {name: np.ascontiguousarray(weight) for name, weight in dense.items()}


def random_blocks(kind, rows, columns):
    """Blocks of any bits, but for their f16 scales, which are those of weights of about 1."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    r = rng("blocks", kind.name, rows, columns)
    blocks = r.integers(0, 256, (rows, columns // weights, size), dtype=np.uint8)
    places = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q4_1: (0, 2), Type.Q5_1: (0, 2)}
    factors = {Type.Q4_K: 2e-3, Type.Q5_K: 1e-3, Type.Q6_K: 5e-4}
    for at in places.get(kind, (0,)):
        scales = (r.uniform(0.2, 1.0, blocks.shape[:2]) * factors.get(kind, 0.05)).astype(np.float16)
        blocks[:, :, at:at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write_blocks():
    writer, dense = gguf.GGUFWriter(OUT / "blocks.gguf", "llama"), {}
    for name, kind, rows, columns in [
        ("blk.0.attn_v.weight", Type.Q4_K, 19, 512), ("blk.0.attn_q.weight", Type.Q4_K, 16, 256),
        ("blk.0.ffn_down.weight", Type.Q6_K, 19, 512), ("blk.0.attn_k.weight", Type.Q6_K, 16, 256),
        ("blk.0.ffn_up.weight", Type.Q4_0, 19, 96), ("blk.0.ffn_gate.weight", Type.Q8_0, 19, 96),
        ("blk.1.attn_v.weight", Type.Q4_1, 19, 96), ("blk.1.attn_output.weight", Type.Q5_0, 19, 96),
        ("blk.1.ffn_up.weight", Type.Q5_1, 19, 96), ("blk.1.ffn_down.weight", Type.Q5_K, 19, 512),
        ("token_embd.weight", Type.Q4_K, 5, 256), ("output.weight", Type.Q6_K, 5, 256),
    ]:
        data = random_blocks(kind, rows, columns)
        writer.add_tensor(name, data, raw_dtype=kind)
        dense[name] = dequantize(data, kind).astype(np.float32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(dense, OUT / "blocks.safetensors")


def main():
    read = lambda path: json.loads(path.read_text())
    config = read(CHECKPOINTS / "orig_mha_f32" / "config.json")
    weights = tensors_of(CHECKPOINTS / "orig_mha_f32", ["pytorch_model*.bin"])
    clip = tensors_of(CHECKPOINTS / "clip-tower", ["pytorch_model.bin"])
    clip = {name.removeprefix("vision_model."): t for name, t in clip.items() if name.startswith("vision_model.")}
    tower = read(CHECKPOINTS / "clip-tower" / "config.json")["vision_config"]
    write_text(OUT / "mha_f32" / "model.gguf", config, weights, of_one_dtype(Type.F32))
    write_mmproj(OUT / "mha_f32" / "mmproj.gguf", tower, clip, weights, of_one_dtype(Type.F32), legacy=True, selected=3)
    text = write_text(OUT / "mha_q" / "model.gguf", config, weights, mixed)
    vision = write_mmproj(OUT / "mha_q" / "mmproj.gguf", tower, clip, weights, mixed, legacy=True, selected=3)
    save_file(dense_checkpoint(text, vision, config), OUT / "mha_q" / "dense.safetensors")

    folder = CHECKPOINTS / "orig_gqa_bf16"
    config, tower = read(folder / "config.json"), read(folder / "clip" / "config.json")
    weights = tensors_of(folder, ["pytorch_model.bin"])
    clip = {name.removeprefix(TOWER_PREFIX): t for name, t in weights.items() if name.startswith(TOWER_PREFIX)}
    tower = tower.get("vision_config", tower)
    write_text(OUT / "gqa_bf16" / "model.gguf", config, weights, of_one_dtype(Type.BF16))
    write_mmproj(OUT / "gqa_bf16" / "mmproj.gguf", tower, clip, weights, of_one_dtype(Type.BF16), legacy=False, selected=3)
    write_blocks()


if __name__ == "__main__":
    main()
