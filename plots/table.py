"""A figure's table: its rows from the run folders, as a .csv file, and the arithmetic of curves, seeds and intervals."""

import contextlib
import csv
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
from scipy import stats

sys.path.append(str(Path(__file__).parent.parent))
from infra.runs import finished, read_metrics, read_rows  # noqa: E402, F401

SCORE = "eval/mean/accuracy"  # plain mean of the six evaluation sets
TEXTS = "token", "commit"
LAST, STEPS = 2, 10  # evaluations whose mean is a run's final score; training steps at its end, or beginning
MEASURES = {  # of a curve with and without its untrained beginning, n values at an end -> a number
    # under the curve, over its length: learning fast counts, a collapse too
    "area": lambda curve, trained, n: trained.mean(),
    "end": lambda curve, trained, n: trained[-n:].mean(),
    "gain": lambda curve, trained, n: trained[-n:].mean() - curve[: 1 if len(curve) > len(trained) else n].mean(),
    # the worst, from the highest point before
    "drop": lambda curve, trained, n: (np.maximum.accumulate(curve) - curve).max(),
}


def read_finished(run):
    """-> the rows of a finished run's metrics.jsonl; none where they are damaged to the last evaluation, and a line"""
    rows = read_metrics(run)
    if rows and rows[-1].get(SCORE) is None:
        print(f"{run}: left out; its last evaluation cannot be read", file=sys.stderr)
        return []
    return rows


def collect_rows(runs, metrics):
    """-> a row {"command", "seed", "step", metric: value or None} for each step of each run, one without a step where it cannot be read

    runs: [(command, seed, folder)]; metrics: regular expressions of what is wanted, besides the accuracy of the evaluations.
    """
    late = [run for _, _, run in runs if not finished(run)]
    for run in late:
        print(f"{run}: left out; " + ("not finished" if run.exists() else "not there"), file=sys.stderr)
    found = [(command, seed, run, [] if run in late else read_finished(run)) for command, seed, run in runs]
    pattern = "|".join([*metrics, "eval/.+/accuracy"])
    names = dict.fromkeys(k for *_, rows in found for row in rows for k in row if re.fullmatch(pattern, k))
    for _, _, run, rows in found:
        lacks = [m for m in metrics if rows and not any(re.fullmatch(m, k) for row in rows for k in row)]
        if lacks:
            print(f"{run}: has no {', '.join(lacks)}; it is of another version, or logged less", file=sys.stderr)
    return [
        {"command": command, "seed": seed, "commit": commit(run), "step": row.get("step")}
        | {n: row.get(n) for n in names}
        for command, seed, run, rows in found
        for row in rows or [{}]  # so that the table knows of a run that is missing
    ]


def commit(run):
    """-> the commit of the code that a run's folder is of, where it is known"""
    with contextlib.suppress(OSError, ValueError):
        return json.loads((run / "versions.json").read_text()).get("git")


def write_table(path, rows):
    """A number has four digits, an empty cell is none; but a command stands in the first of its rows alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
        table.writeheader()
        for row, above in zip(rows, [{}, *rows]):
            again = {"command": None} if "command" in row and row["command"] == above.get("command") else {}
            table.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in (row | again).items()})


def read_table(path):
    """-> the rows; a cell is a number where it can be one, but for those that are always text"""

    def value(column, text):
        with contextlib.suppress(ValueError):
            return text if column in TEXTS else float(text)
        return text or None

    with open(path, newline="") as f:
        rows = [{k: value(k, v) for k, v in row.items()} for row in csv.DictReader(f)]
    for above, row in zip(rows, rows[1:]):
        if "command" in row:
            row["command"] = row["command"] or above["command"]
    return rows


def smooth(values, window=11, factor=0.8):
    """(n,) -> (n,): mean over the last `window` steps, fewer at the start, then y_t = factor y_(t-1) + (1 - factor) x_t.

    Window and factor are the paper's (caption of figure 3); the order, and that the window looks back, are ours.
    """
    smoothed = []
    for i in range(len(values)):
        x = np.mean(values[max(0, i - window + 1) : i + 1])
        smoothed.append(factor * smoothed[-1] + (1 - factor) * x if smoothed else x)
    return np.array(smoothed)


def interval(values, level=0.95):
    """-> (low, high), of Student's t, for the mean of one number a seed; one value has none"""
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return values[0], values[0]
    return tuple(map(float, stats.t.interval(level, len(values) - 1, np.mean(values), stats.sem(values))))


def iqm(values):
    """The mean of the middle half: of n sorted values without n / 4 at each end, of which the last may count in part"""
    x = np.sort(np.ravel(values))
    edges = np.arange(len(x) + 1) / len(x)  # value i stands for edges[i] to edges[i + 1]
    share = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return float((share * x).sum() / share.sum())


def aligned(series):
    """[{step: value}, ...] -> steps (n,), values (series, n), of the steps that all have"""
    steps = sorted(set.intersection(*map(set, series))) if series else []
    return np.array(steps), np.array([[one[step] for step in steps] for one in series])


class Table:
    """A figure's rows by command, seed and metric."""

    def __init__(self, rows):
        self.series = {}  # command: {seed: {metric: ([step, ...], [value, ...])}}
        for row in rows:
            seeds = self.series.setdefault(row["command"], {})
            if row["step"] is None:  # a missing run
                continue
            mine = seeds.setdefault(int(row["seed"]), {})
            for name, value in row.items():
                if name not in ("command", "seed", "commit", "step") and value is not None:
                    steps, values = mine.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(value)
        self.commands = list(self.series)

    def curves(self, command, metric, smoothed=False):
        """-> steps (n,), values (seeds, n), of the steps that all seeds have"""
        steps, values = aligned([dict(zip(*s[metric])) for s in self.series[command].values() if metric in s])
        return steps, np.array([smooth(v) for v in values]) if smoothed else values

    def value(self, command, metric=SCORE, measure="end"):
        """-> {seed: a measure of its curve}; of evaluations without that of the untrained model, where there are others"""
        found, evaluation = {}, metric.startswith("eval/")
        for seed, one in self.series.get(command, {}).items():
            if metric in one:
                values = np.array(one[metric][1])
                trained = values[1:] if evaluation and len(values) > 1 else values
                found[seed] = float(MEASURES[measure](values, trained, LAST if evaluation else STEPS))
        return found
