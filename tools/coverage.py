"""Adds up for tools/coverage.sh which lines of src/cuda/ and kernels/ ran: a table, and the lines that did not.

    python tools/coverage.py --messages build.json --profile rust.profdata --llvm-cov PROGRAM --output lines.txt

Lines of kernels come from gcov, those of Rust from llvm-cov; what was built, cargo's messages say. A line is covered if any instantiation of its
template, in any program, ran it. Counted is what was compiled and can run, but for what ASIDE names and for `#[cfg(test)]` modules.
Lines that the host's compiler never sees (`#else` of LLAVA_SIM) are no part of the share: they are counted beside it, as for GPUs only.
"""

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("src/cuda", "kernels")
LEAST = 95.0
ASIDE = {
    "src/cuda/driver/nvidia.rs": "calls of NVIDIA's driver",
    "src/cuda/driver/cublaslt.rs": "calls of cuBLASLt, and what follows once it is open",
    "kernels/sim": "the simulator itself",
}


def is_aside(name):
    return any(name == prefix or name.startswith(prefix + "/") for prefix in ASIDE)


def built(messages):
    """The folder that build.rs wrote to, and the programs."""
    rows = [json.loads(row) for row in Path(messages).read_text().splitlines()]
    ours = [row for row in rows if "llava-engine" in row.get("package_id", "")]
    folders = [row["out_dir"] for row in ours if row["reason"] == "build-script-executed"]
    return folders[-1], [row["executable"] for row in ours if row.get("executable")]


def gcov_lines(folder):
    """{file: {line: count}} of every object that was compiled for gcov."""
    files = defaultdict(lambda: defaultdict(int))
    for notes in sorted(Path(folder).glob("*.gcno")):
        said = subprocess.run(["gcov", "--json-format", "--stdout", notes.name], cwd=notes.parent, check=True, capture_output=True, text=True)
        for document in filter(None, said.stdout.splitlines()):
            for file in json.loads(document)["files"]:
                for line in file["lines"]:
                    files[file["file"]][line["line_number"]] += line["count"]
    return files


def llvm_lines(llvm_cov, profile, programs):
    """The same of programs with an LLVM profile."""
    objects = [word for program in programs for word in ("-object", program)]
    command = [llvm_cov, "export", "-format=lcov", f"-instr-profile={profile}", *objects, "-sources", str(ROOT / "src/cuda")]
    files, file = defaultdict(lambda: defaultdict(int)), None
    for row in subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines():
        key, _, value = row.partition(":")
        if key == "SF":
            file = files[value]
        elif key == "DA":
            line, count = value.split(",")[:2]
            file[int(line)] += int(count)
    return files


def first_test_line(path):
    """Where a Rust file's own test module begins: modules of tests stand last."""
    text = path.read_text().splitlines()
    for number, (line, following) in enumerate(zip(text, text[1:]), 1):
        if line.startswith("#[cfg(") and "test" in line and following.startswith("mod "):
            return number
    return len(text) + 1


def gpu_only(path):
    """Lines of code that the simulator's build leaves out; conditionals on LLAVA_SIM are not nested."""
    lines, left_out = [], False
    for number, line in enumerate(path.read_text().splitlines(), 1):
        code = line.strip()
        if code.startswith(("#ifndef LLAVA_SIM", "#if !defined(LLAVA_SIM)")):
            left_out = True
        elif code.startswith(("#ifdef LLAVA_SIM", "#endif")):
            left_out = False
        elif code.startswith(("#else", "#elif")):
            left_out = not left_out
        elif left_out and code and not code.startswith("//"):
            lines.append(number)
    return lines


def spans(numbers):
    """1-3, 7: of sorted numbers."""
    text, start, last = [], None, None
    for number in [*numbers, None]:
        if start is not None and number != last + 1:
            text.append(str(start) if start == last else f"{start}-{last}")
            start = None
        start = number if start is None else start
        last = number
    return ", ".join(text)


def relative(files):
    """By the path within the project; what lies elsewhere, such as the standard library, falls away."""
    result = {}
    for name, lines in files.items():
        path = (ROOT / name).resolve()
        if path.is_relative_to(ROOT) and path.is_file():
            result[path.relative_to(ROOT).as_posix()] = lines
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag in ("--messages", "--profile", "--llvm-cov", "--output"):
        parser.add_argument(flag, required=True)
    args = parser.parse_args()
    folder, programs = built(args.messages)
    counts = relative({**gcov_lines(folder), **llvm_lines(args.llvm_cov, args.profile, programs)})

    details, short = [], False
    for folder in FOLDERS:
        total = covered = hidden = 0
        for path in sorted(p for p in (ROOT / folder).rglob("*.*") if p.suffix in (".rs", ".cu", ".cuh")):
            name = path.relative_to(ROOT).as_posix()
            if name == "src/cuda/tests.rs" or name.startswith("kernels/sim/"):
                continue
            end = first_test_line(path) if path.suffix == ".rs" else sys.maxsize
            lines = {n: count for n, count in counts.get(name, {}).items() if n < end}
            missed = sorted(n for n, count in lines.items() if count == 0)
            left_out = [] if path.suffix == ".rs" else gpu_only(path)
            note = f"  + {len(left_out)} for GPUs only" if left_out else ""
            if is_aside(name):
                print(f"{name:36} {len(lines) - len(missed):5} of {len(lines):5}  aside: {ASIDE[name]}")
                continue
            total, covered, hidden = total + len(lines), covered + len(lines) - len(missed), hidden + len(left_out)
            share = 100 * (len(lines) - len(missed)) / len(lines) if lines else 100
            print(f"{name:36} {len(lines) - len(missed):5} of {len(lines):5} {share:6.1f} %{note}")
            text = path.read_text().splitlines()
            details += [f"{name}:{n}: not run: {text[n - 1].strip()}" for n in missed]
            details += [f"{name}: for GPUs only: {spans(left_out)}"] if left_out else []
        # Nothing counted is nothing measured.
        share = 100 * covered / total if total else 0
        short |= share < LEAST
        print(f"{folder + '/':36} {covered:5} of {total:5} {share:6.1f} %" + (f"  + {hidden} for GPUs only" if hidden else ""), end="\n\n")
    Path(args.output).write_text("\n".join(details) + "\n")
    print(f"lines that did not run: {args.output}")
    sys.exit(f"less than {LEAST} %" if short else 0)


if __name__ == "__main__":
    main()
