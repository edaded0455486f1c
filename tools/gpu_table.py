"""Joins what tools/gpu_check.sh measured into one document and one table for docs/PERFORMANCE.md.

    python tools/gpu_table.py --ours bench.json --training train-*.json --peers transformers-*.json --gpu NAME --date 2026-01-31 \
      --output-dir docs/results

Writes <gpu>-<date>.json, with both sides as they are, and <gpu>-<date>.md. What was not measured is said to be so; of the compiled
configurations the fastest counts, phase by phase. Needs nothing but Python.
"""

import argparse
import json
from pathlib import Path

NONE = "not measured"


def steps(row):
    """Passes of a row: a token is a pass when decoding, else there is one."""
    return row["tokens"] / row["batch_size"] if row["phase"] == "decode" else 1


def work(row):
    return row["phase"], row["batch_size"], row["tokens"], row["context"]


def per_pass(row, key="ms_median"):
    """Milliseconds of a pass; none if it was not measured."""
    return None if row is None or row.get(key) is None else row[key] / steps(row)


def fastest(peers, compiled, of):
    """The fastest row of the same work among peers that are compiled, or eager, with the mode that it was measured in."""
    found = [
        (row["ms_median"], peer["configuration"]["mode"], row)
        for peer in peers
        if (peer["configuration"]["mode"] != "eager") == compiled
        for row in peer["rows"]
        if work(row) == work(of)
    ]
    return min(found, key=lambda f: f[0])[1:] if found else (None, None)


def milliseconds(ms):
    return NONE if ms is None else f"{ms:.3g}" if ms < 10 else f"{ms:.1f}"


def ratio(peer_ms, our_ms):
    return NONE if peer_ms is None else f"{peer_ms / our_ms:.2f}"


def phase_line(row, peers):
    """One phase: ours, its limit, and the peer's."""
    ours, limit = per_pass(row), per_pass(row, "limit_ms")
    eager, (mode, compiled) = per_pass(fastest(peers, False, row)[1]), fastest(peers, True, row)
    compiled = per_pass(compiled)
    name = f"{row['phase']}, {row['tokens']} tokens"
    if row["phase"] == "decode":
        name = f"decode, {row['batch_size']} sequences, to context {row['context']}, a step"
    percent = row.get("percent_of_limit")
    spread = f"{milliseconds(ours)} ({milliseconds(per_pass(row, 'ms_min'))} to {milliseconds(per_pass(row, 'ms_max'))})"
    by = f" ({mode})" if mode else ""
    return [name, spread, milliseconds(limit), NONE if percent is None else f"{percent:.1f}", milliseconds(eager),
            milliseconds(compiled) + by, ratio(eager, ours), ratio(compiled, ours)]


def first_token_line(ours, peers):
    """From pixels to the first token: encoding and reading the prompt."""
    rows = [row for row in ours["rows"] if row["phase"] in ("encode", "prefill")]

    def total(values):
        values = list(values)
        return sum(values) if values and None not in values else None

    limit = total(per_pass(row, "limit_ms") for row in rows)
    eager, compiled = (total(per_pass(fastest(peers, c, row)[1]) for row in rows) for c in (False, True))
    time = ours["time_to_first_token"]
    spread = f"{milliseconds(time['ms_median'])} ({milliseconds(time['ms_min'])} to {milliseconds(time['ms_max'])})"
    percent = NONE if limit is None else f"{limit / time['ms_median'] * 100:.1f}"
    return ["time to first token", spread, milliseconds(limit), percent, milliseconds(eager), milliseconds(compiled),
            ratio(eager, time["ms_median"]), ratio(compiled, time["ms_median"])]


def training_lines(trainings, peers):
    """Steps of training: ours by their settings, each beside the peer's fastest of the same kind and rows."""
    for document in trainings:
        settings = dict(setting.split("=", 1) for setting in document["training"])
        for row in document["rows"]:
            row = {**row, "phase": f"train {settings['tune']}"}
            ms, limit, percent = row["ms_median"], row.get("limit_ms"), row.get("percent_of_limit")
            peer = fastest(peers, False, row)[1]
            how = f" ({peer['how']})" if peer else ""
            yield [f"{row['phase']}, {row['batch_size']} rows of {row['context']}, recompute {settings.get('recompute', 'full')}",
                   f"{milliseconds(ms)} ({milliseconds(row['ms_min'])} to {milliseconds(row['ms_max'])})", milliseconds(limit),
                   NONE if percent is None else f"{percent:.1f}", milliseconds(per_pass(peer)) + how, ratio(per_pass(peer), ms)]


def table(ours, peers, gpu, date, trainings=()):
    """The page."""
    model, machine = ours["model"], ours["machine"]
    lines = [f"# {gpu}, {date}", ""]
    if machine["simulated"]:
        lines += ["Simulated: times and shares say nothing about a GPU.", ""]
    lines += [f"{model['name']}, {model['weights']}, random weights where only a shape is named; {machine['device']}. Milliseconds,",
              "medians and ranges; ratios above 1 are in our favour.", ""]
    head = ["", "ours", "limit", "% of limit", "transformers eager", "transformers compiled", "eager / ours", "compiled / ours"]
    phases = [phase_line(row, peers) for row in ours["rows"]]
    at = sum(row["phase"] != "decode" for row in ours["rows"])
    phases.insert(at, first_token_line(ours, peers))
    lines += ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *phases]]
    if trainings:
        head = ["a step", "ours", "limit", "% of limit", "transformers with PEFT", "theirs / ours"]
        lines += ["", "Training: the limit is what is to be learned at the best product's rate; what is computed again does not count.", ""]
        lines += ["| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *training_lines(trainings, peers)]]
    lines += ["", "What the device reaches at best:", ""]
    if machine["read_gbps"] is not None:
        lines.append(f"- reading, our probe: {machine['read_gbps']:.0f} GB/s")
        lines += [f"- {p['how']}, {p['dtype']}: {p['gflops'] / 1e3:.4g} TFLOP/s" for p in machine["peaks"]["probes"]]
    for peer in peers:
        if "read_gbps" in peer:
            lines.append(f"- reading, torch.sum: {peer['read_gbps']:.0f} GB/s")
        for m in peer.get("matmul", []):
            lines.append(f"- torch.matmul, {m['name']} {m['tokens']} x {m['n']} x {m['k']}, bf16: {m['tflops']:.4g} TFLOP/s")
    for peer in peers:
        machine, mode = peer["machine"], peer["configuration"]["mode"]
        lines += ["", f"transformers {machine['transformers']}, torch {machine['torch']}, {mode}, on {machine['device']}"]
        lines += [f"- {e['part']} failed: `{e['error'].splitlines()[0]}`" for e in peer["errors"]]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", type=Path, required=True)
    parser.add_argument("--peers", type=Path, nargs="*", default=[])
    parser.add_argument("--training", type=Path, nargs="*", default=[])
    parser.add_argument("--gpu", required=True)
    parser.add_argument("--date", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    ours = json.loads(args.ours.read_text())
    peers, trainings = ([json.loads(p.read_text()) for p in paths] for paths in (args.peers, args.training))
    document = {"gpu": args.gpu, "date": args.date, "ours": ours, "training": trainings, "transformers": peers}
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stem = args.output_dir / f"{args.gpu}-{args.date}"
    Path(f"{stem}.json").write_text(json.dumps(document, indent=1) + "\n")
    page = table(ours, peers, args.gpu, args.date, trainings)
    Path(f"{stem}.md").write_text(page)
    print(page, end="")


if __name__ == "__main__":
    main()
