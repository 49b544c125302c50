"""Seconds a training step on the laptop's cores: alone, beside a second run, beside a busy core.

    python tests/bench_cores.py [STEPS]

Two runs at once should take at most 2.5 times as long each as one alone, one beside a busy core at most 2 times, and one
alone not more than 5 % longer than with threads that spin for as long as OpenMP lets them by itself."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROUNDS = 3
USUAL = "300000"  # of GNU's OpenMP, which torch brings along


def start(folder, steps, root=ROOT, **environment):
    flags = ["--steps", steps, "--eval_data", "eval_easy", "--save_every", steps, "--scale", "laptop", "--out", folder]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ | environment, cwd=root)
    return subprocess.Popen([sys.executable, "lite_ppo.py", *map(str, flags)], **quiet)


def seconds(folder):
    """The median step of a run, without its first two and its evaluations"""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["time/step"] - row.get("time/eval", 0) for row in rows[2:-1])


def measure(steps, count=1, busy=False, **environment):
    """-> seconds a step, the mean over `count` runs at once"""
    with tempfile.TemporaryDirectory() as scratch:
        folders = [Path(scratch) / str(i) for i in range(count)]
        load = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
        try:
            for run in [start(folder, steps, **environment) for folder in folders]:
                assert run.wait() == 0
        finally:
            if load:
                load.kill()
                load.wait()
        return statistics.mean(map(seconds, folders))


def main():
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    ratios = {"two at once": [], "beside a busy core": [], "alone, against spinning threads": []}
    for _ in range(ROUNDS):
        alone = measure(steps)
        ratios["two at once"].append(measure(steps, 2) / alone)
        ratios["beside a busy core"].append(measure(steps, busy=True) / alone)
        ratios["alone, against spinning threads"].append(alone / measure(steps, GOMP_SPINCOUNT=USUAL))
    for name, values in ratios.items():
        each = ", ".join(f"{value:.2f}" for value in values)
        print(f"{name:32s} {statistics.median(values):.2f} times as long ({each})")


if __name__ == "__main__":
    main()
