"""LoRA by PEFT: gradients of adapters, and adapter folders with what they make of a model, in tests/fixtures/lora/.

Gradients are autograd's in f64, of the two sequences in tests/fixtures/gradients/NAME.safetensors: without dropout, and with masks that
are known because they are made here as the engine makes its own.

    NAME_gradients.safetensors
        value.MODULE.lora_{a,b}.weight      the factors
        seed.MODULE                         what its mask is drawn by (i32)
        {kept,dropped}.loss                 with nothing dropped, and with DROPOUT of PASS
        {kept,dropped}.grad.PARAMETER       of the factors, and of the projector

Folders are what PEFT's save_pretrained writes, or LLaVA's own trainer; `expected.safetensors` in each has logits over a checkpoint.
"""

import json
import shutil

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaForConditionalGeneration

import make_checkpoints
from common import FIXTURES, rng, write_json
from make_gradients import MODELS, canonical, sum_of_losses
from stages import Reference, run_case

ROOT = FIXTURES / "lora"
DECODER = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOWER = ["out_proj", "fc1", "fc2"]
RANK, ALPHA = 4, 10.0
DROPOUT, PASS = 0.25, 3
MASK64 = (1 << 64) - 1


def splitmix(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) & MASK64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK64
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK64
    return z ^ z >> 31


def philox_words(first: int, n: int, key: int) -> np.ndarray:
    """Words first .. first + n of Philox4x32-10: word i is number i % 4 of the block with counter i / 4."""
    blocks = np.arange(first // 4, (first + n + 3) // 4 + 1, dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c = [blocks & low, blocks >> shift, np.zeros_like(blocks), np.zeros_like(blocks)]
    k = [key & 0xFFFFFFFF, key >> 32]
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(b >> shift) ^ c[1] ^ np.uint64(k[0]), b & low, (a >> shift) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c, axis=1).reshape(-1)[first % 4 :][:n]


class KnownDropout(nn.Module):
    """Dropout by the engine's bits. `row` is where the sequence at hand begins in the batch."""

    row = 0

    def __init__(self, seed: int, in_decoder: bool):
        super().__init__()
        self.key, self.in_decoder = splitmix(seed ^ splitmix(PASS)), in_decoder

    def forward(self, x):
        n_rows, k = x.reshape(-1, x.shape[-1]).shape
        first = (KnownDropout.row if self.in_decoder else 0) * k
        words = philox_words(first, n_rows * k, self.key)
        kept = torch.from_numpy(words >= round(DROPOUT * 2**32)).reshape(x.shape)
        return torch.where(kept, x / (1 - DROPOUT), 0)


def randomize(model, key: str) -> None:
    """Factors that are no beginning: B is not zero, but what they add is less than what they add to, as f32 can follow."""
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_" in name:
                std = param.shape[1] ** -0.5 * (0.3 if "lora_B" in name else 1)
                param.copy_(torch.from_numpy(rng("lora", key, name).standard_normal(param.shape) * std))


def engine_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".default", "").replace(".base_layer", "")
    return canonical(name.replace("lora_A", "lora_a").replace("lora_B", "lora_b"))


def gradients(name: str) -> None:
    model = LlavaForConditionalGeneration.from_pretrained(FIXTURES / "checkpoints" / name, dtype=torch.float32,
                                                          attn_implementation="eager").double().eval()
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=DECODER + TOWER)).double()
    randomize(model, name)
    # What the engine starts from is f32.
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(param.float())
    for parameter, value in model.named_parameters():
        value.requires_grad_("lora_" in parameter or "multi_modal_projector" in parameter)
    model.train()
    given = load_file(FIXTURES / "gradients" / f"{name}.safetensors")
    out = {"value." + engine_name(n): p.detach().float().contiguous() for n, p in model.named_parameters() if "lora_" in n}
    layers = {engine_name(n): m for n, m in model.named_modules() if hasattr(m, "lora_dropout")}
    seeds = {module: i for i, module in enumerate(sorted(layers))}
    out |= {"seed." + module: torch.tensor([seed]).int() for module, seed in seeds.items()}
    for kind in ("kept", "dropped"):
        if kind == "dropped":
            for module, layer in layers.items():
                layer.lora_dropout["default"] = KnownDropout(seeds[module], module.startswith("llama"))
        model.zero_grad()
        loss, row = 0, 0
        for i in range(2):
            ids, learned = given[f"ids.{i}"].long(), given[f"is_learned.{i}"].bool()
            KnownDropout.row = row
            loss = loss + sum_of_losses(model, ids, learned, given["pixels"].double() if i == 0 else None)
            row += len(ids)
        (loss * given["scale"].double()[0]).backward()
        out[f"{kind}.loss"] = loss.detach().float().reshape(1)
        out |= {f"{kind}.grad." + engine_name(n): p.grad.float().contiguous()
                for n, p in model.named_parameters() if p.grad is not None}
    path = ROOT / f"{name}_gradients.safetensors"
    save_file(out, path)
    path.chmod(0o644)
    print(name, {k: v.item() for k, v in out.items() if k.endswith("loss")}, len(out))


# ---------------------------------------------------------------- folders


def expect(folder, checkpoint: str, case: str, logits) -> None:
    files, prompt = make_checkpoints.CASES[case]
    save_file({"logits": logits}, folder / "expected.safetensors")
    write_json(folder / "expected.json", {"checkpoint": checkpoint, "images": files, "prompt": prompt})
    # PEFT's are a set: in another order each time.
    config = json.loads((folder / "adapter_config.json").read_text())
    if isinstance(config["target_modules"], list):
        config["target_modules"].sort()
    write_json(folder / "adapter_config.json", config)
    for path in folder.iterdir():
        path.chmod(0o644)
    print(folder.name, [float(x) for x in logits[-1][:3]])


def open_hf(name: str):
    spec, folder = make_checkpoints.SPECS[name], make_checkpoints.ROOT / name
    _, model = make_checkpoints.load_hf(spec, folder)
    return spec, folder, model


def reference(spec, model) -> Reference:
    inner = model.model
    return Reference(inner.vision_tower, spec.layer, spec.keep_cls, inner.multi_modal_projector, inner.language_model,
                     model.lm_head, make_checkpoints.tiny_tokenizer.IMAGE_TOKEN_ID)


def new_folder(name: str):
    folder = ROOT / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def hf_logits(spec, folder, peft_model, case: str):
    ids, pixels = make_checkpoints.hf_inputs(spec, folder, *make_checkpoints.CASES[case])
    return run_case(reference(spec, peft_model.base_model.model.eval()), ids, pixels)["logits"]


def change_projector(projector, key: str) -> None:
    with torch.no_grad():
        for name, param in projector.named_parameters():
            noise = rng("lora", key, "projector", name).standard_normal(param.shape)
            param.copy_((param + torch.from_numpy(0.1 * noise)).bfloat16())


def peft_folder() -> None:
    """As PEFT writes it today: the head among what is added to, patterns for rank and alpha, suffixes that hit the vision tower as well, a projector of its own."""
    name, case = "hf_mha_f32", "template"
    spec, checkpoint, model = open_hf(name)
    config = LoraConfig(r=3, lora_alpha=7, lora_dropout=0.05, target_modules=DECODER + ["lm_head"], modules_to_save=["multi_modal_projector"],
                        rank_pattern={"down_proj": 2}, alpha_pattern={"layers.1.self_attn.q_proj": 12, "up_proj": 5})
    model = get_peft_model(model, config)
    model.peft_config["default"].base_model_name_or_path = name  # not where it lies on this machine
    randomize(model, "peft")
    change_projector(model.base_model.model.model.multi_modal_projector.modules_to_save["default"], "peft")
    folder = new_folder("peft")
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    logits = hf_logits(spec, checkpoint, model, case)
    _, _, again = open_hf(name)
    assert torch.equal(logits, hf_logits(spec, checkpoint, PeftModel.from_pretrained(again, folder), case))
    expect(folder, name, case, logits)


def rslora_folder() -> None:
    """All linear layers but the head, the projector's among them, with the scale of rsLoRA; names as under transformers 4, in a pickle."""
    name, case = "hf_mha_f32", "image_first"
    spec, checkpoint, model = open_hf(name)
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules="all-linear"))
    model.peft_config["default"].base_model_name_or_path = name  # not where it lies on this machine
    randomize(model, "rslora")
    folder = new_folder("rslora")
    model.save_pretrained(folder)
    logits = hf_logits(spec, checkpoint, model, case)
    renamed = {}
    for key, value in load_file(folder / "adapter_model.safetensors").items():
        key = key.replace("model.model.language_model.", "model.language_model.model.")
        key = key.replace("model.model.multi_modal_projector.", "model.multi_modal_projector.")
        key = key.replace("model.model.vision_tower.", "model.vision_tower.")
        renamed[key.replace("vision_tower.encoder.", "vision_tower.vision_model.encoder.")] = value
    (folder / "README.md").unlink()
    (folder / "adapter_model.safetensors").unlink()
    torch.save(renamed, folder / "adapter_model.bin")
    expect(folder, name, case, logits)


class Tower(nn.Module):
    def __init__(self, clip):
        super().__init__()
        self.vision_tower = clip


class Original(nn.Module):
    """The original LLaVA's modules under their names."""

    def __init__(self, parts: Reference):
        super().__init__()
        self.model, self.lm_head = parts.text, parts.lm_head
        self.model.vision_tower, self.model.mm_projector = Tower(parts.vision), parts.project


def official_folder() -> None:
    """As llava/train/train.py of haotian-liu/LLaVA (commit c121f04) leaves it: the adapter by PEFT, whose suffixes hit the tower as well, and
    the projector in non_lora_trainables.bin, by its name within the PEFT model."""
    name, case = "orig_mha_f32", "image_first"
    spec, checkpoint = make_checkpoints.SPECS[name], make_checkpoints.ROOT / name
    parts = make_checkpoints.load_original(name, spec, checkpoint)
    model = get_peft_model(Original(parts), LoraConfig(r=4, lora_alpha=6, lora_dropout=0.05, target_modules=DECODER))
    randomize(model, "official")
    change_projector(parts.project, "official")
    folder = new_folder("official")
    adapter = get_peft_model_state_dict(model)
    spelt = {k.replace("vision_tower.encoder.", "vision_tower.vision_model.encoder."): v for k, v in adapter.items()}
    assert any("vision_tower.vision_model" in key for key in spelt) and all(key.startswith("base_model.model.") for key in spelt)
    save_file({k: v.contiguous() for k, v in spelt.items()}, folder / "adapter_model.safetensors")
    config = model.peft_config["default"]
    config.task_type = "CAUSAL_LM"
    config.save_pretrained(folder)
    rest = {n: p.detach().clone() for n, p in model.named_parameters() if "mm_projector" in n}
    assert all(n.startswith("base_model.model.model.mm_projector.") for n in rest), rest.keys()
    torch.save({n: p.bfloat16() for n, p in rest.items()}, folder / "non_lora_trainables.bin")
    shutil.copyfile(checkpoint / "config.json", folder / "config.json")
    model.eval()
    ids, pixels = make_checkpoints.original_inputs(name, spec, checkpoint, *make_checkpoints.CASES[case])
    expect(folder, name, case, run_case(parts, ids, pixels)["logits"])


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    ROOT.mkdir(exist_ok=True)
    for name in MODELS:
        gradients(name)
    peft_folder()
    rslora_folder()
    official_folder()


if __name__ == "__main__":
    main()
