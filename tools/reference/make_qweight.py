"""Matrices and checkpoints in the packings of AutoGPTQ and AutoAWQ, packed and unpacked by those programs themselves.

    python make_qweight.py PATH/auto_gptq PATH/awq        their source, versions 0.7.1 and 0.2.9; it is run, not copied

Writes tests/fixtures/qweight/:
- matrices.safetensors: `<case>.{qweight,qzeros,scales,g_idx}` as stored, `<case>.weight` what the program makes of them, [n, k] in f32.
- matrices.json: what `quantization_config` would say of each case.
- gptq.safetensors, awq.safetensors: the matrices of a decoder, with the names of hf_mha_f32; rest.safetensors: all its other tensors;
  gptq_dense.safetensors, awq_dense.safetensors: the matrices as they are unpacked.
"""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import load_file, save_file

from common import FIXTURES, rng, write_json

OUT = FIXTURES / "qweight"
N, K = 64, 128


def load(root: Path, package: str, module: str):
    """A module of a package whose `__init__` files, which want all that the package wants, are passed over."""
    parts = [package, *module.split(".")]
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        sys.modules[name] = fake = ModuleType(name)
        fake.__path__ = [str(root.joinpath(*parts[1:depth]))]
    return importlib.import_module(".".join(parts))


def draw(name, bits, n, k, groups, symmetric):
    """Integers [n, k], zeros [n, groups] and scales [n, groups] of a matrix whose weights are about 1/sqrt(k)."""
    r = rng("qweight", name)
    q = torch.tensor(r.integers(0, 2**bits, (n, k)))
    zeros = torch.full((n, groups), 2 ** (bits - 1)) if symmetric else torch.tensor(r.integers(1, 2**bits, (n, groups)))
    scales = torch.tensor(r.uniform(0.5, 1.5, (n, groups)) * k**-0.5 / 2**(bits - 2)).half()
    return q, zeros, scales


def linear_of(q, zeros, scales, g_idx):
    """The layer whose weights are just on those integers."""
    linear = torch.nn.Linear(q.shape[1], q.shape[0], bias=False)
    linear.weight.data = (q - zeros[:, g_idx]) * scales[:, g_idx].float()
    return linear


def gptq(name, bits=4, n=N, k=K, group_size=32, symmetric=False, order=False, version=1):
    groups = k // (k if group_size == -1 else group_size)
    q, zeros, scales = draw(name, bits, n, k, groups, symmetric)
    if not symmetric and version == 1 and bits == 4 and not order:
        # Less one, that wraps around. Packing does it right for the last row of a word only, and of its two unpackers the older.
        zeros[7::8] = 0
    g_idx = torch.arange(k, dtype=torch.int32) // (k // groups)
    if order:
        g_idx = g_idx[torch.tensor(rng("g_idx", name).permutation(k))]
    layer = (GPTQ if order else GPTQ_OLD).QuantLinear(bits, group_size, k, n, False)
    layer.pack(linear_of(q, zeros, scales, g_idx.long()), scales.float(), zeros.clone(), g_idx)
    layer.scales = layer.scales.float()
    weight = layer(torch.eye(k)).T.contiguous()
    assert torch.equal(weight, ((q - zeros[:, g_idx.long()]) * scales[:, g_idx.long()].float())), name
    qzeros = layer.qzeros
    if version == 2:  # as GPTQModel converts them: every zero one more
        qzeros = qzeros + sum(1 << shift for shift in range(0, 32, bits))
    stored = {"qweight": layer.qweight, "qzeros": qzeros, "scales": layer.scales.half(), "g_idx": layer.g_idx.int()}
    config = {"quant_method": "gptq", "bits": bits, "group_size": group_size, "desc_act": order, "sym": symmetric}
    return stored, weight, config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {})


def awq(name, n=N, k=K, group_size=32):
    groups = k // group_size
    q, zeros, scales = draw(name, 4, n, k, groups, symmetric=False)
    zeros[3::5] = 0
    linear = linear_of(q, zeros, scales, torch.arange(k) // group_size)
    layer = AWQ.WQLinear_GEMM.from_linear(linear, 4, group_size, scales=scales.T.contiguous(), zeros=zeros.T.contiguous())
    unpacked = AWQ.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, group_size).T.contiguous()
    assert torch.equal(unpacked, linear.weight.data), name
    stored = {"qweight": layer.qweight, "qzeros": layer.qzeros, "scales": layer.scales}
    return stored, unpacked, {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}


def matrices():
    cases = {
        "gptq_symmetric": gptq("gptq_symmetric", symmetric=True),
        "gptq_groups_of_64": gptq("gptq_groups_of_64", group_size=64),
        "gptq_groups_of_96": gptq("gptq_groups_of_96", k=192, group_size=96),
        "gptq_whole_rows": gptq("gptq_whole_rows", group_size=-1),
        "gptq_v2": gptq("gptq_v2", version=2),
        "gptq_8_bits": gptq("gptq_8_bits", bits=8, symmetric=True),
        "gptq_8_bits_with_zeros": gptq("gptq_8_bits_with_zeros", bits=8),
        "gptq_groups_of_16": gptq("gptq_groups_of_16", group_size=16),
        "gptq_desc_act": gptq("gptq_desc_act", order=True),
        "awq": awq("awq"),
        "awq_groups_of_128": awq("awq_groups_of_128", group_size=128),
    }
    tensors, configs = {}, {}
    for name, (stored, weight, config) in cases.items():
        tensors |= {f"{name}.{kind}": t.contiguous() for kind, t in stored.items()} | {f"{name}.weight": weight}
        configs[name] = config
    save_file(tensors, OUT / "matrices.safetensors")
    write_json(OUT / "matrices.json", configs)


def checkpoints():
    """The decoder's matrices are drawn anew, with an MLP of 64, whose rows are whole groups."""
    twin = load_file(FIXTURES / "checkpoints" / "hf_mha_f32" / "model.safetensors")
    is_matrix = lambda name: "language_model.model.layers." in name and "_proj." in name
    rest = {name: t.half() for name, t in twin.items() if not is_matrix(name)}
    save_file(rest, OUT / "rest.safetensors")
    for kind, pack in ("gptq", gptq), ("awq", awq):
        packed, dense = {}, {}
        for name in sorted(filter(is_matrix, twin)):
            module = name.removesuffix(".weight")
            n, k = ((32, 64) if "down_proj" in name else (64, 32) if "mlp" in name else (32, 32))
            stored, dense[name], _ = pack(f"{kind} {module}", n=n, k=k, group_size=32)
            packed |= {f"{module}.{part}": t.contiguous() for part, t in stored.items()}
            if kind == "gptq":
                packed[f"{module}.bias"] = torch.zeros(n, dtype=torch.float16)  # as AutoGPTQ wrote to every layer
        save_file(packed, OUT / f"{kind}.safetensors")
        save_file(dense, OUT / f"{kind}_dense.safetensors")


if __name__ == "__main__":
    GPTQ = load(Path(sys.argv[1]), "auto_gptq", "nn_modules.qlinear.qlinear_cuda")
    GPTQ_OLD = load(Path(sys.argv[1]), "auto_gptq", "nn_modules.qlinear.qlinear_cuda_old")  # knows no g_idx
    # All that AutoAWQ's packing takes of this module, which wants accelerate.
    sys.modules["awq.utils.utils"] = utils = ModuleType("awq.utils.utils")
    utils.get_best_device = lambda: "cpu"
    AWQ = load(Path(sys.argv[2]), "awq", "modules.linear.gemm")
    OUT.mkdir(exist_ok=True)
    matrices()
    checkpoints()
