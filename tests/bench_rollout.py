"""Seconds a training step and an evaluation of the laptop's size, on one core as in the study, against another checkout; and
tokens a second, which count where the responses have become longer or shorter.

    git worktree add ../before COMMIT
    python tests/bench_rollout.py ../before [STEPS]

Runs alternate, so that what else the machine does is shared; a ratio is of medians over ROUNDS runs."""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from bench_cores import ROOT, start

ROUNDS = 3
PHASES = "time/generate", "time/old_logp", "time/update", "time/step", "time/eval"
RATES = "perf/generate_tokens_per_s", "perf/train_tokens_per_s", "tokens_per_s of a step"


def measure(root, steps):
    """-> {phase: seconds, rate: tokens/s}, of a step the median, of an evaluation the last"""
    with tempfile.TemporaryDirectory() as scratch:
        assert start(Path(scratch) / "run", steps, root).wait() == 0
        rows = [json.loads(line) for line in (Path(scratch) / "run" / "metrics.jsonl").read_text().splitlines()]
    for row in rows[1:-1]:
        row[RATES[-1]] = row["perf/generate_tokens_per_s"] * row["time/generate"] / row["time/step"]
    found = {name: statistics.median(row.get(name, 0) for row in rows[1:-1]) for name in PHASES[:-1] + RATES}
    return found | {PHASES[-1]: rows[-1][PHASES[-1]]}


def main():
    other, steps = Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 8
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    pairs = [[measure(root, steps) for root in (other, ROOT)] for _ in range(ROUNDS)]
    for phase in PHASES:
        before, after = (statistics.median(pair[i][phase] for pair in pairs) for i in (0, 1))
        each = ", ".join(f"{pair[0][phase] / pair[1][phase]:.2f}" for pair in pairs)
        print(f"{phase:14s} {before:6.2f} s there, {after:6.2f} s here: {before / after:.2f} times as fast ({each})")
    for rate in RATES:
        before, after = (statistics.median(pair[i][rate] for pair in pairs) for i in (0, 1))
        print(f"{rate} {before:,.0f} there, {after:,.0f} here: {after / before:.2f} times as many")


if __name__ == "__main__":
    main()
