"""Small files of torch.save in every form that a tensor can take in them, each with a safetensors twin of the same values.

    python make_pickles.py

Writes tests/fixtures/pickles/. The names are those of LLaMA tensors, because only those are ever looked up.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import save_file

FOLDER = Path(__file__).resolve().parents[2] / "tests/fixtures/pickles"


def layer(i: int, name: str) -> str:
    return f"model.layers.{i}.{name}.weight"


def views() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    base = torch.randn(6, 10)
    cube = torch.randn(3, 4, 5).to(torch.bfloat16)
    return OrderedDict({
        layer(0, "self_attn.q_proj"): base,
        layer(0, "self_attn.k_proj"): base[2:5],  # shares the storage of the first, at an offset
        layer(0, "self_attn.v_proj"): base.t(),  # transposed
        layer(0, "self_attn.o_proj"): base[1::2, 3:9:3],  # strided in both dimensions
        layer(0, "mlp.gate_proj"): torch.nn.Parameter(torch.randn(4, 3).half()),
        layer(0, "mlp.up_proj"): cube.permute(2, 0, 1),
        layer(0, "mlp.down_proj"): cube[:, 1:2, :],  # a dimension of one element
        layer(0, "input_layernorm"): torch.tensor(1.5),  # no dimensions
        layer(0, "post_attention_layernorm"): torch.zeros(0, 4),  # no elements
        "model.norm.weight": torch.arange(5, dtype=torch.int64),  # a number format that weights do not have
    })


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    tensors = views()
    save_file({name: t.detach().clone().contiguous() for name, t in tensors.items()}, FOLDER / "views.safetensors")
    torch.save(tensors, FOLDER / "views.bin")
    torch.save(tensors, FOLDER / "protocol4.bin", pickle_protocol=4)
    module = torch.nn.Module()
    module.mm_projector = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.GELU(), torch.nn.Linear(4, 2))
    torch.save(module.state_dict(), FOLDER / "state_dict.bin")  # an OrderedDict with the attribute `_metadata`
    save_file(module.state_dict(), FOLDER / "state_dict.safetensors")
    torch.save(tensors, FOLDER / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({layer(0, "self_attn.q_proj"): torch.ones(1).expand(1000, 1000)}, FOLDER / "expanded.bin")
    torch.save({"a": torch.nn.Linear(2, 2)}, FOLDER / "module.bin")  # a pickled class


if __name__ == "__main__":
    main()
