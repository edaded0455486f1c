"""Whether PEFT reads what `llava-engine finetune --tune lora` wrote: the logits of its model against those of the engine.

    python check_lora.py CHECKPOINT ADAPTER DUMP       CHECKPOINT: a name in tests/fixtures/checkpoints

DUMP is what `llava-engine score --model CHECKPOINT --lora ADAPTER --dtype f32 --image ... --raw-prompt ... --dump DUMP` leaves. Over an
original LLaVA the projector comes out of non_lora_trainables.bin, by the steps of its llava/model/builder.py.
"""

import sys
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

import make_checkpoints
from make_lora import Original, open_hf, reference
from stages import run_case


def whole(model, adapter: Path) -> None:
    """What builder.py does with non_lora_trainables.bin, before the adapter is put on."""
    state = torch.load(adapter / "non_lora_trainables.bin", map_location="cpu", weights_only=True)
    state = {(k[11:] if k.startswith("base_model.") else k): v for k, v in state.items()}
    if any(k.startswith("model.model.") for k in state):
        state = {(k[6:] if k.startswith("model.") else k): v for k, v in state.items()}
    # Names within CLIP are those of transformers 4 there.
    state = {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in state.items()}
    unexpected = model.load_state_dict(state, strict=False).unexpected_keys
    assert state and not unexpected, unexpected


def main() -> None:
    name, adapter, dump = sys.argv[1], Path(sys.argv[2]), load_file(sys.argv[3])
    spec, folder = make_checkpoints.SPECS[name], make_checkpoints.ROOT / name
    if make_checkpoints.is_original(name):
        parts = make_checkpoints.load_original(name, spec, folder)
        model = Original(parts)
        whole(model, adapter)
        state = load_file(adapter / "adapter_model.safetensors")
        spelt = {k.replace("vision_tower.vision_model.", "vision_tower."): v for k, v in state.items()}
        config = LoraConfig.from_pretrained(adapter)
        config.task_type, config.inference_mode = None, False
        model = get_peft_model(model, config).eval()
        result = set_peft_model_state_dict(model, spelt)
    else:
        _, _, base = open_hf(name)
        model = PeftModel.from_pretrained(base, adapter)
        result = model.load_adapter(adapter, "default")
        parts = reference(spec, model.base_model.model.eval())
    assert not result.unexpected_keys, result.unexpected_keys
    missing = [k for k in result.missing_keys if "lora_" in k]
    print("factors of PEFT's model that the folder does not have:", sorted({k.split(".lora_")[0] for k in missing}))
    ids, pixels = dump["input_ids"].tolist(), dump.get("pixel_values")
    logits = run_case(parts, ids, pixels)["logits"][-1]
    difference = float((logits - dump["last_logits"]).abs().max())
    print(f"{adapter}: logits up to {float(logits.abs().max()):.2f}, off by {difference:.1e} at most")
    assert difference < 1e-3


if __name__ == "__main__":
    main()
