"""python -m unittest tools/gpu_table_test.py: that each time stands beside the same work, and what is missing says so."""

import unittest

from tools.gpu_table import NONE, table


def row(phase, batch_size, tokens, context, ms, **more):
    return dict(phase=phase, batch_size=batch_size, tokens=tokens, context=context, ms_median=ms, ms_min=ms / 2, ms_max=ms * 2, **more)


def peer(mode, rows, errors=()):
    machine = {"device": "a GPU", "torch": "2.11", "transformers": "5.0"}
    return {"machine": machine, "configuration": {"mode": mode}, "rows": rows, "errors": list(errors)}


OURS = {
    "machine": {"device": "a GPU", "simulated": False, "read_gbps": 4000.0,
                "peaks": {"probes": [{"dtype": "bf16", "how": "our own GEMM, 8192 x 8192 x 8192", "gflops": 600e3}]}},
    "model": {"name": "llava-1.5-7b", "weights": "bf16"},
    "rows": [
        row("encode", 1, 576, 0, 1.0, limit_ms=0.5, percent_of_limit=50.0),
        row("prefill", 1, 640, 640, 20.0, limit_ms=10.0, percent_of_limit=50.0),
        row("decode", 1, 64, 704, 256.0, limit_ms=192.0, percent_of_limit=75.0),
        row("decode", 8, 512, 704, 320.0, limit_ms=None, percent_of_limit=None),
    ],
    "time_to_first_token": {"ms_median": 21.0, "ms_min": 20.0, "ms_max": 22.0},
}


def cells(peers):
    lines = table(OURS, peers, "a-gpu", "2026-01-31").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][2:]


class TableTest(unittest.TestCase):
    def test_the_same_work_is_compared(self):
        eager = peer("eager", [row("encode", 1, 576, 0, 3.0), row("prefill", 1, 640, 640, 30.0), row("decode", 1, 64, 704, 1280.0)])
        slow = peer("max-autotune", [row("decode", 1, 64, 704, 640.0), row("decode", 8, 512, 700, 1.0)])
        fast = peer("reduce-overhead", [row("decode", 1, 64, 704, 384.0), row("prefill", 1, 600, 600, 1.0)])
        encode, prefill, first, decode, batch = cells([eager, slow, fast])
        self.assertEqual(encode[1:], ["1 (0.5 to 2)", "0.5", "50.0", "3", NONE, "3.00", NONE])
        self.assertEqual(prefill[4:], ["30.0", NONE, "1.50", NONE])  # a prompt of 600 tokens is no prompt of 640
        self.assertEqual(first[1:], ["21.0 (20.0 to 22.0)", "10.5", "50.0", "33.0", NONE, "1.57", NONE])
        self.assertEqual(decode[1:], ["4 (2 to 8)", "3", "75.0", "20.0", "6 (reduce-overhead)", "5.00", "1.50"])  # of a step
        self.assertEqual(batch[1:], ["5 (2.5 to 10.0)", NONE, NONE, NONE, NONE, NONE, NONE])

    def test_training_stands_beside_the_fastest_of_its_kind(self):
        train = {"training": ["tune=lora", "recompute=selective"],
                 "rows": [row("train", 24, 16896, 704, 1000.0, limit_ms=600.0, percent_of_limit=60.0)]}
        theirs = [row("train lora", 24, 16896, 704, 3000.0, how="checkpointing"), row("train lora", 24, 16896, 704, 2500.0, how="all kept"),
                  row("train projector", 24, 16896, 704, 1.0, how="all kept"), row("train lora", 8, 5632, 704, 1.0, how="all kept")]
        lines = table(OURS, [peer("eager", theirs)], "a-gpu", "2026-01-31", [train]).splitlines()
        line = next(line for line in lines if line.startswith("| train"))
        self.assertEqual([cell.strip() for cell in line.strip("|").split("|")],
                         ["train lora, 24 rows of 704, recompute selective", "1000.0 (500.0 to 2000.0)", "600.0", "60.0", "2500.0 (all kept)", "2.50"])
        alone = table(OURS, [], "a-gpu", "2026-01-31", [train])
        self.assertIn(f"| 60.0 | {NONE} | {NONE} |", alone)

    def test_failures_and_simulations_are_named(self):
        failed = peer("max-autotune", [], [{"part": "decode 8", "error": "TimeoutError: took longer\nmore"}])
        self.assertIn("decode 8 failed: `TimeoutError: took longer`", table(OURS, [failed], "a-gpu", "2026-01-31"))
        simulated = {**OURS, "machine": {**OURS["machine"], "simulated": True}}
        self.assertIn("say nothing about a GPU", table(simulated, [], "simulator", "2026-01-31"))


if __name__ == "__main__":
    unittest.main()
