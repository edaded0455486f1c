"""What Hugging Face transformers reaches on this machine with LLaVA-1.5's shapes: the peer that `bench` is set beside.

    python tools/gpu_transformers.py --mode eager --output eager.json             # also what torch.matmul and reading reach
    python tools/gpu_transformers.py --mode reduce-overhead --output graphs.json  # torch.compile, static cache, CUDA graphs
    python tools/gpu_transformers.py --train --mode eager --output train.json            # training steps instead; needs peft
    python tools/gpu_transformers.py --device cpu --size tiny --mode eager --output tiny.json

Random weights in bf16, SDPA attention, no network. The phases are those of `llava-engine bench`: encoding one picture with the projector,
reading a prompt of embeddings up to the logits of its last row, and greedy decoding, whose every token comes to the host; those of training
are steps of the projector alone and of it with LoRA (rank 128) in the decoder, with and without gradient checkpointing. Writes after each
phase, so that nothing is lost if it is stopped; a phase that fails or takes longer than --limit is recorded under `errors`, and the rest
goes on. Exit 1 if there were any.
"""

import argparse
import contextlib
import inspect
import json
import signal
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, StaticCache
from transformers.cache_utils import DynamicCache

DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Size:
    """A model, and how much work it is given."""

    text: dict
    vision: dict
    prompt_tokens: int
    new_tokens: int
    train_rows: int  # of prompt_tokens and answer_tokens each
    answer_tokens: int
    square: int  # rows and columns of the large square product
    read_bytes: int


SIZES = {
    "7b": Size(
        text=dict(vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336, patch_size=14),
        prompt_tokens=640, new_tokens=65, train_rows=24, answer_tokens=64, square=8192, read_bytes=1 << 30,
    ),
    "tiny": Size(
        text=dict(vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
        vision=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14),
        prompt_tokens=40, new_tokens=5, train_rows=2, answer_tokens=5, square=128, read_bytes=1 << 20,
    ),
}


def make_model(size, device):
    """LLaVA of this size with random weights, made where it runs."""
    text = LlamaConfig(**size.text, max_position_embeddings=4096, rms_norm_eps=1e-5)
    vision = CLIPVisionConfig(**size.vision, projection_dim=size.vision["hidden_size"])
    patches = (size.vision["image_size"] // size.vision["patch_size"]) ** 2
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=size.text["vocab_size"] - 64, image_seq_length=patches,
        vision_feature_layer=-2, vision_feature_select_strategy="default", attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(device):
            return LlavaForConditionalGeneration(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def at_most(seconds):
    """Ends what takes longer; compilers that run in C++ end when they come back to Python."""

    def stop(*_):
        raise TimeoutError(f"took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Bench:
    """Runs the phases of one configuration."""

    def __init__(self, args):
        self.args, self.size = args, SIZES[args.size]
        self.model = make_model(self.size, args.device)
        self.compiled = args.mode != "eager"
        name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
        self.report = {
            "machine": {"device": name, "torch": torch.__version__, "transformers": transformers.__version__},
            "configuration": {"mode": args.mode, "cache": "static" if self.compiled else "dynamic", "dtype": str(DTYPE),
                              "attention": self.model.config._attn_implementation, "size": args.size},
            "rows": [], "errors": [],
        }
        # Positions of the cache went through the call up to transformers 4; later it keeps them itself.
        self.takes_cache_position = "cache_position" in inspect.signature(self.model.forward).parameters

    def sync(self):
        if self.args.device == "cuda":
            torch.cuda.synchronize()

    def attempt(self, part, run):
        """Runs a part within the limit and writes what is known by then."""
        start = time.perf_counter()
        torch.compiler.reset()  # what one part compiled must not count against the next one's limit of recompilations
        try:
            with at_most(self.args.limit), torch.set_grad_enabled(self.args.train):
                run()
        except Exception as error:  # whatever a compiler may raise, the other parts are still wanted
            self.report["errors"].append({"part": part, "error": f"{type(error).__name__}: {error}"[:2000]})
        outcome = "failed" if self.report["errors"] and self.report["errors"][-1]["part"] == part else "done"
        print(f"{part}: {outcome}, {time.perf_counter() - start:.0f} s", flush=True)
        self.args.output.write_text(json.dumps(self.report, indent=1) + "\n")

    def compile(self, function):
        return torch.compile(function, mode=self.args.mode, dynamic=False) if self.compiled else function

    def times(self, run, prepare=lambda: None):
        """Milliseconds of each repeat; `prepare` is not timed. Compiling, recording of graphs and caches come before."""
        times = []
        for i in range(self.args.warm_up + self.args.repeat):
            prepared = prepare()
            if self.compiled:
                torch.compiler.cudagraph_mark_step_begin()
            self.sync()
            start = time.perf_counter()
            run(prepared) if prepared is not None else run()
            self.sync()
            if i >= self.args.warm_up:
                times.append((time.perf_counter() - start) * 1e3)
        return times

    def row(self, phase, batch_size, tokens, context, times):
        self.report["rows"].append({
            "phase": phase, "batch_size": batch_size, "tokens": tokens, "context": context,
            "ms_median": statistics.median(times), "ms_min": min(times), "ms_max": max(times),
        })

    def encode(self):
        side = self.size.vision["image_size"]
        pixels = torch.randn(1, 3, side, side, device=self.args.device, dtype=DTYPE)
        features = self.compile(lambda: self.model.get_image_features(pixel_values=pixels))
        self.row("encode", 1, self.model.config.image_seq_length, 0, self.times(features))

    def cache(self, batch_size):
        """An empty cache. A static one has its memory already: a compiled pass must not make it."""
        if not self.compiled:
            return DynamicCache()
        cache = StaticCache(config=self.model.config.get_text_config(), max_cache_len=self.size.prompt_tokens + self.size.new_tokens - 1)
        self.forward(self.model, cache, 0, inputs_embeds=self.prompt(batch_size)[:, :1])
        cache.reset()
        return cache

    def prompt(self, batch_size):
        """What a prompt's tokens and picture become: as many rows, whose values do not change the time."""
        shape = (batch_size, self.size.prompt_tokens, self.size.text["hidden_size"])
        return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self.args.device, DTYPE)

    def forward(self, call, cache, past, **inputs):
        """Logits of the last row of each sequence."""
        rows = next(iter(inputs.values()))
        positions = torch.arange(past, past + rows.shape[1], device=self.args.device)
        if self.takes_cache_position:
            inputs["cache_position"] = positions
        positions = positions.expand(rows.shape[0], -1)
        return call(**inputs, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]

    def empty(self, cache):
        """The same cache for a compiled pass, which is bound to its memory; a new one for eager."""
        if not self.compiled:
            return DynamicCache()
        cache.reset()
        return cache

    def prefill(self):
        cache, prompt, call = self.cache(1), self.prompt(1), self.compile(self.model.forward)
        n = self.size.prompt_tokens
        run = lambda cache: self.forward(call, cache, 0, inputs_embeds=prompt).argmax(-1).tolist()
        self.row("prefill", 1, n, n, self.times(run, lambda: self.empty(cache)))

    def decode(self, batch_size):
        past, steps = self.size.prompt_tokens, self.size.new_tokens - 1
        cache, prompt, call = self.cache(batch_size), self.prompt(batch_size), self.compile(self.model.forward)

        def prepare():
            empty = self.empty(cache)
            return empty, self.forward(self.model, empty, 0, inputs_embeds=prompt).argmax(-1, keepdim=True)

        def run(prepared):
            filled, tokens = prepared
            for step in range(steps):
                if self.compiled:
                    torch.compiler.cudagraph_mark_step_begin()
                tokens = self.forward(call, filled, past + step, input_ids=tokens).argmax(-1, keepdim=True)
                tokens.tolist()

        self.row("decode", batch_size, batch_size * steps, past + steps, self.times(run, prepare))

    def train(self, kind, checkpointing):
        """Steps over rows of a prompt with a picture and an answer to learn, with AdamW on parameters of bf16, which favours it."""
        size, device = self.size, self.args.device
        model = self.model = None  # one at a time
        model = make_model(size, device)
        if kind == "lora":
            from peft import LoraConfig, get_peft_model

            layers = "q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj"
            target = rf".*language_model.*\.({layers})"
            lora = LoraConfig(r=128, lora_alpha=256, lora_dropout=0.05, target_modules=target)
            model = get_peft_model(model, lora, autocast_adapter_dtype=False)
        self.model = model.train()
        for name, parameter in model.named_parameters():
            if "multi_modal_projector" in name:
                parameter.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        rows, length = size.train_rows, size.prompt_tokens + size.answer_tokens
        patches, side = model.config.image_seq_length, size.vision["image_size"]
        ids = (torch.arange(rows * length) * 31 % (size.text["vocab_size"] - 64)).reshape(rows, length)
        before = (size.prompt_tokens - patches) // 2
        ids[:, before : before + patches] = model.config.image_token_index
        labels = ids.clone()
        labels[:, : size.prompt_tokens] = -100
        ids, labels = ids.to(device), labels.to(device)
        pixels = torch.randn(rows, 3, side, side, device=device, dtype=DTYPE)
        learned = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=device == "cuda")

        def step():
            optimizer.zero_grad(set_to_none=True)
            model(input_ids=ids, pixel_values=pixels, labels=labels, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimizer.step()

        times = self.times(step)
        self.row(f"train {kind}", rows, rows * length, length, times)
        self.report["rows"][-1]["how"] = "checkpointing" if checkpointing else "all kept"

    def rate(self, work, run):
        """The best of some timings, in billions a second; each is of several calls, whose launches' own time is then little."""
        calls = 10
        many = lambda: [run() for _ in range(calls)] and None
        return work * calls / min(self.times(many)) / 1e6

    def matmul(self):
        text, vision, square = self.size.text, self.size.vision, self.size.square
        prompt, hidden, mlp = self.size.prompt_tokens, text["hidden_size"], text["intermediate_size"]
        clip, clip_mlp, clip_tokens = vision["hidden_size"], vision["intermediate_size"], self.model.config.image_seq_length + 1
        shapes = {
            "square": (square, square, square),
            "qkv": (prompt, 3 * hidden, hidden), "out": (prompt, hidden, hidden),
            "gate_up": (prompt, 2 * mlp, hidden), "down": (prompt, hidden, mlp),
            "clip qkv": (clip_tokens, 3 * clip, clip), "clip out": (clip_tokens, clip, clip),
            "clip fc1": (clip_tokens, clip_mlp, clip), "clip fc2": (clip_tokens, clip, clip_mlp),
        }
        self.report["matmul"] = []
        for name, (tokens, n, k) in shapes.items():
            x, w = (torch.randn(rows, k, device=self.args.device, dtype=DTYPE) for rows in (tokens, n))
            tflops = self.rate(2 * tokens * n * k, lambda: torch.matmul(x, w.T)) / 1e3
            self.report["matmul"].append({"name": name, "tokens": tokens, "n": n, "k": k, "tflops": tflops})

    def read(self):
        x = torch.zeros(self.size.read_bytes // 4, device=self.args.device)
        self.report["read_gbps"] = self.rate(self.size.read_bytes, x.sum)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--size", choices=SIZES, default="7b")
    parser.add_argument("--mode", choices=["eager", "reduce-overhead", "max-autotune"], required=True)
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--warm-up", type=int, default=3, help="runs before those that count")
    parser.add_argument("--limit", type=int, default=120, help="seconds that a part may take, compiling included")
    parser.add_argument("--train", action="store_true", help="measure steps of training instead; eager only")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    if args.train and args.mode != "eager":
        parser.error("--train goes with --mode eager")
    bench = Bench(args)
    if args.train:
        parts = [
            (f"train {kind}{', checkpointing' * checkpointing}", lambda kind=kind, checkpointing=checkpointing: bench.train(kind, checkpointing))
            for kind in ("projector", "lora")
            for checkpointing in (True, False)
        ]
        for part, run in parts:
            bench.attempt(part, run)
        sys.exit(1 if bench.report["errors"] else 0)
    parts = [("encode", bench.encode), ("prefill", bench.prefill)]
    parts += [(f"decode {n}", lambda n=n: bench.decode(n)) for n in args.batch_size]
    if not bench.compiled:
        parts += [("matmul", bench.matmul), ("read", bench.read)]
    for part, run in parts:
        bench.attempt(part, run)
    sys.exit(1 if bench.report["errors"] else 0)


if __name__ == "__main__":
    main()
