"""What the figures share: their runs are started, read, smoothed and compared here.

A figure is a file plots/figNN_name.py. Its docstring holds the commands of its runs; figures that name the same command share its
runs. `python plots/figNN_name.py` draws it from its table, plots/figures/figNN_name.csv; with --run the missing runs are started and
the table is made from them first.
"""

import argparse
import contextlib
import csv
import fcntl
import importlib
import io
import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).parent.parent
FIGURES = ROOT / "plots" / "figures"
SCORE = "eval/mean/accuracy"  # plain mean of the six evaluation sets
ENOUGH = 5  # seeds for a verdict
SMALL = 0.02  # of an accuracy: less is no gain
LAST = 2  # evaluations whose mean is a run's final score
sys.path.append(str(ROOT))  # the scripts are asked for the names of their runs

# ------------------------------------------------------------------------------------------------------------- commands

USUAL = {  # what a command has where it does not say: the scripts' own defaults
    "model": "data/tiny/base",
    "norm": "group_mean_batch_std",
    "loss_agg": "token_mean",
    "clip_high": "0.2",
    "overlong": "keep",
    "wrong_reward": "0",
    "max_response_len": "128",
}
LAPTOP_ONLY = "minibatches", "steps", "eval_every", "lr"  # on a node these are the paper's, the scripts' defaults
MODELS = {"data/tiny/base": "Qwen/Qwen3-{}-Base", "data/tiny/aligned": "Qwen/Qwen3-{}"}
LIMITS = {"56": "8192", "72": "16384", "128": "20480"}  # tokens, figure 13; laptop: node
BENCH = (  # puts grpo.py and dapo.py on the study's bench; lite_ppo.py stands on it
    "--prompts_per_step 128 --group_size 8 --minibatches 8 --warmup_steps 50 --weight_decay 0 --temperature 0.99 "
    "--top_p 0.99 --top_k 100 --max_response_len 8192 --eval_max_response_len 8192"
)
ON_BENCH = {"grpo.py": [BENCH], "dapo.py": [BENCH, "--overlong_buffer 2048"]}  # a quarter of the limit, as on a laptop


def commands(module):
    """The commands in a figure's docstring, without `accelerate launch`"""
    return re.findall(r"^ +accelerate launch (.+)$", module.__doc__, re.M)


def given(command):
    """`lite_ppo.py --norm none` -> "lite_ppo.py", {"norm": "none"}"""
    script, *words = shlex.split(command)
    return script, {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}


def flags(command):
    """-> {"script": "lite_ppo", its flags, what is usual, and what follows: kind, size (a laptop's one model is small), limit}"""
    script, said = given(command)
    f = USUAL | {"script": script.removesuffix(".py")} | said
    f["kind"] = "base" if f["model"].lower().endswith("base") else "aligned"
    f["size"] = "8B" if "-8B" in f["model"] else "4B"
    f["limit"] = {"56": "short", "8192": "short", "72": "middle", "16384": "middle"}.get(f["max_response_len"], "long")
    return f


def at_node(command, size):
    """The same command with the paper's settings, for models of this size ("4B", "8B")"""
    script, said = given(command)
    said = {name: value for name, value in said.items() if name not in LAPTOP_ONLY}
    said["model"] = MODELS[said.get("model", USUAL["model"])].format(size)
    said |= {name: LIMITS[value] for name, value in said.items() if name.endswith("max_response_len")}
    return " ".join([script, *(f"--{name} {value}" for name, value in said.items()), *ON_BENCH.get(script, [])])


def panel(command):
    """What is the same for all lines of one panel: model and data"""
    f = flags(command)
    return f"{Path(f['model']).name}, {f['data']}"


# ------------------------------------------------------------------------------------------------------------- starting


def name(command):
    """The name of a command's run folder, such as `lite_ppo__norm=none__s1`; the script checks the flags first"""
    import common

    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()):
        args = module.parse_args([*argv, "--out", os.devnull + "/none"])
    return common.run_name(args, common.MACHINE | module.DEFAULTS)


def finished(run):
    return (run / "result.json").is_file()


def launch(todo, jobs, launcher=(sys.executable,)):
    """Starts those runs of todo [(command with its seed, run folder)] that are not finished, `jobs` at a time, each on its
    share of the cores; -> how many failed. A run that was stopped is resumed. What it prints is in <run folder>.log.
    """
    waiting = [(command, run) for command, run in todo if not finished(run)]
    bar = tqdm(total=len(todo), initial=len(todo) - len(waiting), unit="run", smoothing=0.05)
    going, failed = {}, 0  # slot: (process, run folder)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    try:
        while waiting or going:
            for slot in set(range(jobs)) - going.keys():
                if waiting:
                    command, run = waiting.pop(0)
                    if process := start(command, run, launcher, slot, jobs):
                        going[slot] = process, run
            time.sleep(0.2)
            for slot, (process, run) in list(going.items()):
                if process.poll() is not None:
                    del going[slot]
                    if process.returncode or not finished(run):
                        failed += 1
                        tqdm.write(f"{run.name}: ended with {process.returncode}; see {run}.log", file=sys.stderr)
                    bar.update()
    finally:
        for process, _ in going.values():
            process.terminate()
        for process, _ in going.values():
            process.wait()
        bar.close()
        signal.signal(signal.SIGTERM, before)
    return failed


def start(command, run, launcher, slot, jobs):
    """-> the process; None of a run that another command has started: its log is locked as long as it goes on"""
    script, *words = shlex.split(command)
    words = ["--resume", str(run)] if run.exists() else [*words, "--out", str(run)]
    run.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{run}.log", "a") as log, share_of_cores(slot, jobs):
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tqdm.write(f"{run}: left out; another command is running it", file=sys.stderr)
            return None
        full = [*launcher, str(ROOT / script), *words]
        return subprocess.Popen(full, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def share_of_cores(slot, jobs):
    """What is started in here is held to every jobs-th core from this one on, where the system can do that."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[slot % len(cores) :: jobs])
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


# -------------------------------------------------------------------------------------------------------------- reading


def read_metrics(run):
    """-> the rows of a run's metrics.jsonl; of a folder where they cannot be read none, and a line that says why"""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        if not rows or not all("step" in row for row in rows):
            raise ValueError("metrics.jsonl is empty, or not of a run")
        return rows
    except (OSError, ValueError, TypeError) as error:
        print(f"{run}: left out; {error}", file=sys.stderr)
        return []


def table_of(runs, metrics):
    """-> a row {"command", "seed", "step", metric: value or None} for each step of each run, one without a step where it cannot be read

    runs: [(command, seed, folder)]; metrics: regular expressions of what is wanted, besides the accuracy of the evaluations.
    """
    late = [run for _, _, run in runs if not finished(run)]
    for run in late:
        print(f"{run}: left out; " + ("not finished" if run.exists() else "not there"), file=sys.stderr)
    found = [(command, seed, run, [] if run in late else read_metrics(run)) for command, seed, run in runs]
    pattern = "|".join([*metrics, "eval/.+/accuracy"])
    names = dict.fromkeys(k for *_, rows in found for row in rows for k in row if re.fullmatch(pattern, k))
    for _, _, run, rows in found:
        lacks = [m for m in metrics if rows and not any(re.fullmatch(m, k) for row in rows for k in row)]
        if lacks:
            print(f"{run}: has no {', '.join(lacks)}; it is of another version, or logged less", file=sys.stderr)
    return [
        {"command": command, "seed": seed, "step": row.get("step")} | {name: row.get(name) for name in names}
        for command, seed, _, rows in found
        for row in rows or [{}]  # so that the table knows of a run that is missing
    ]


def read_lines(path):
    """-> the rows of a .jsonl file; none where it is missing, and of a damaged line nothing but a word"""
    rows = []
    for number, text in enumerate(path.read_text().splitlines() if path.is_file() else [], start=1):
        try:
            rows.append(json.loads(text))
        except ValueError:
            print(f"{path}, line {number}: left out; not JSON", file=sys.stderr)
    return rows


def write_table(path, rows):
    """A number has four digits, an empty cell is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as f:
        table = csv.DictWriter(f, rows[0].keys(), lineterminator="\n")
        table.writeheader()
        table.writerows({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def read_table(path):
    """-> the rows; a cell is a number where it can be one, but for a token, which is text"""

    def value(column, text):
        with contextlib.suppress(ValueError):
            return text if column == "token" else float(text)
        return text or None

    with open(path, newline="") as f:
        return [{k: value(k, v) for k, v in row.items()} for row in csv.DictReader(f)]


# ---------------------------------------------------------------------------------------------------------- arithmetics


def smooth(values, window=11, factor=0.8):
    """(n,) -> (n,): mean over the last `window` steps, fewer at the start, then y_t = factor y_(t-1) + (1 - factor) x_t.

    Window and factor are the paper's (caption of figure 3); the order, and that the window looks back, are ours.
    """
    smoothed = []
    for i in range(len(values)):
        x = np.mean(values[max(0, i - window + 1) : i + 1])
        smoothed.append(factor * smoothed[-1] + (1 - factor) * x if smoothed else x)
    return np.array(smoothed)


# quantile .975 of Student's t with 1, 2, ... 9 degrees of freedom
T975 = [12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26]


def interval(values, draws=20_000):
    """-> (low, high), 95 % for the mean of one number a seed: a percentile bootstrap, its quantiles widened for few seeds.

    Of five values the plain percentile bootstrap covers the mean in 83 % of all cases, this one in 93 % (tests/test_plots.py); of
    fewer it cannot, as it never leaves their range. After T. Hesterberg, What teachers should know about the bootstrap, arXiv
    1411.5279. One value has no interval.
    """
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return math.nan, math.nan
    means = np.random.default_rng(0).choice(values, (draws, n)).mean(1)
    tail = statistics.NormalDist().cdf(-((n / (n - 1)) ** 0.5) * T975[min(n - 2, len(T975) - 1)])
    return tuple(np.quantile(means, [tail, 1 - tail]).tolist())


def iqm(values):
    """The mean of the middle half: of n sorted values without n / 4 at each end, of which the last may count in part"""
    x = np.sort(np.ravel(values))
    edges = np.arange(len(x) + 1) / len(x)  # value i stands for edges[i] to edges[i + 1]
    share = np.clip(np.minimum(edges[1:], 0.75) - np.maximum(edges[:-1], 0.25), 0, None)
    return float((share * x).sum() / share.sum())


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
                if name not in ("command", "seed", "step") and value is not None:
                    steps, values = mine.setdefault(name, ([], []))
                    steps.append(int(row["step"]))
                    values.append(value)
        self.commands = list(self.series)

    def curves(self, command, metric, smoothed=False):
        """-> steps (n,), values (seeds, n), of the steps that all seeds have"""
        found = [dict(zip(*s[metric])) for s in self.series[command].values() if metric in s]
        steps = sorted(set.intersection(*map(set, found))) if found else []
        values = [[one[step] for step in steps] for one in found]
        return np.array(steps), np.array([smooth(v) for v in values] if smoothed else values)

    def last(self, command, metric=SCORE, count=LAST, change=False):
        """-> {seed: mean of the last `count` values}, of evaluations without that of the untrained model where there are others.

        change: less the mean of the first `count`, of evaluations the first.
        """
        found, evaluation = {}, metric.startswith("eval/")
        for seed, one in self.series.get(command, {}).items():
            if metric in one:
                values = one[metric][1]
                ends = values[1:] or values if evaluation else values
                first = np.mean(values[: 1 if evaluation else count]) if change else 0.0
                found[seed] = float(np.mean(ends[-count:]) - first)
        return found


# --------------------------------------------------------------------------------------------------------------- claims


@dataclass
class Claim:
    """A sentence of the paper as a difference: `better` minus `worse`, two values of a flag, all else being equal.

    where: which of the commands count, {flag: value}; of several panels the mean is taken in each seed.
    """

    text: str
    flag: str
    better: str
    worse: str
    where: dict = field(default_factory=dict)
    metric: str = SCORE
    count: int = LAST  # the mean of this many last values counts
    change: bool = False  # less the first ones
    takeaway: int = 0  # the paper's number; 9: its claim for Lite PPO
    expect: str = "more"  # or "no more", or "the same": what the paper says
    small: float = SMALL  # a difference below it is none

    def pairs(self, table):
        def rest(command):
            if self.flag == "script":  # on a node, their other flags put them on one bench
                return panel(command)
            same = {"kind": "model", "limit": "max_response_len"}.get(self.flag)  # what they follow from
            return {k: v for k, v in flags(command).items() if k not in (self.flag, same, f"eval_{same}")}

        chosen = [c for c in table.commands if all(flags(c)[k] == v for k, v in self.where.items())]
        sides = [[c for c in chosen if flags(c)[self.flag] == value] for value in (self.better, self.worse)]
        return [(a, b) for a in sides[0] for b in sides[1] if rest(a) == rest(b)]

    def differences(self, table):
        """-> one number a seed: the mean over the pairs that this seed has all of"""
        ends = [[table.last(c, self.metric, self.count, self.change) for c in pair] for pair in self.pairs(table)]
        seeds = set.intersection(*(a.keys() & b.keys() for a, b in ends)) if ends else ()
        return [float(np.mean([a[seed] - b[seed] for a, b in ends])) for seed in sorted(seeds)]

    def effect(self, table):
        values = self.differences(table)
        return (float(np.mean(values)) if values else math.nan, *interval(values), len(values))

    def verdict(self, table):
        """By the interval. more: seen above 0, opposite below. no more: seen below `small`, opposite above 0. the same: seen within
        `small` of 0, opposite where it does not hold 0. Open with few seeds.
        """
        _, low, high, n = self.effect(table)
        if n < ENOUGH:
            return "open"
        if self.expect == "more":
            return "seen" if low > 0 else "opposite" if high < 0 else "not seen"
        if self.expect == "no more":
            return "seen" if high < self.small else "opposite" if low > 0 else "not seen"
        return "seen" if max(-low, high) < self.small else "opposite" if low > 0 or high < 0 else "not seen"

    def sentence(self, table):
        mean, low, high, n = self.effect(table)
        if n < ENOUGH:
            return f"{self.text}: open, " + (f"{mean:+.3f} in {n} seed{'s' * (n > 1)}" if n else "no runs")
        return f"{self.text}: {self.verdict(table)}, {mean:+.3f} [{low:+.3f}, {high:+.3f}]"


# -------------------------------------------------------------------------------------------------------------- drawing

STYLES = {  # value of a flag: label, colour, dashes, marker. Black is the study's baseline, or what takes its place
    "none": ("no normalization", "#E69F00", (0, (1, 1)), "^"),
    "batch_mean": ("batch mean, no std", "#882255", (0, (1, 1)), "D"),
    "batch_mean_batch_std": ("batch mean, batch std", "#56B4E9", (0, (4, 1.5)), "s"),
    "group_mean_group_std": ("group mean, group std", "black", "-", "o"),
    "group_mean_batch_std": ("group mean, batch std", "#D55E00", (0, (6, 1, 1, 1)), "v"),
    "seq_mean": ("sequence mean", "black", "-", "o"),
    "token_mean": ("token mean", "#0072B2", (0, (4, 1.5)), "s"),
    "keep": ("all responses", "black", "-", "o"),
    "filter": ("overlong filter", "#009E73", (0, (4, 1.5)), "s"),
    "0.2": ("upper clip 0.20", "black", "-", "o"),
    "0.24": ("upper clip 0.24", "#56B4E9", (0, (1, 1)), "^"),
    "0.28": ("upper clip 0.28", "#D55E00", (0, (4, 1.5)), "s"),
    "0.32": ("upper clip 0.32", "#E69F00", (0, (6, 1, 1, 1)), "v"),
    "0": ("reward 1 / 0", "black", "-", "o"),
    "-1": ("reward 1 / -1", "#D55E00", (0, (4, 1.5)), "s"),
    "grpo": ("GRPO", "black", "-", "o"),
    "dapo": ("DAPO", "#56B4E9", (0, (4, 1.5)), "s"),
    "lite_ppo": ("Lite PPO", "#D55E00", (0, (6, 1, 1, 1)), "v"),
    "easy": ("easy", "#56B4E9", (0, (1, 1)), "^"),
    "medium": ("medium", "#D55E00", (0, (4, 1.5)), "s"),
    "hard": ("hard", "black", "-", "o"),
}
NAMES = {  # metric: the label of its axis
    "rollout/accuracy": "training accuracy",
    SCORE: "accuracy, mean of six sets",
    "rollout/response_len": "response length (tokens)",
    "rollout/entropy": "entropy (nats a token)",
    "reward/std": "std of the rewards of a batch",
    "train/clip_high": "cut by the upper bound (share)",
}


def style(value):
    return dict(zip(("label", "color", "linestyle", "marker"), STYLES[value]))


def line(ax, table, command, value, metric, smoothed=True):
    """Mean over seeds, and their standard deviation as a band"""
    steps, values = table.curves(command, metric, smoothed)
    if len(steps):
        mean, look = values.mean(0), style(value)
        ax.plot(steps, mean, lw=1.6, markersize=4, markevery=max(1, len(steps) // 4), **look)
        if len(values) > 1:
            sd = values.std(0, ddof=1)
            ax.fill_between(steps, mean - sd, mean + sd, color=look["color"], alpha=0.15, lw=0)


def finals(ax, table, series, names):
    """Final scores on each evaluation set: mean over seeds, with its 95 % interval where there are enough; the interquartile mean of all.

    series: [(command, value)]
    """
    for k, (command, value) in enumerate(series):
        _, colour, _, marker = STYLES[value]
        at = (k - (len(series) - 1) / 2) * 0.8 / len(series)
        every = []
        for x, name in enumerate(names):
            if scores := list(table.last(command, f"eval/{name}/accuracy").values()):
                ax.plot(x + at, np.mean(scores), marker, color=colour, markersize=4)
                if len(scores) >= ENOUGH:
                    ax.plot([x + at] * 2, interval(scores), color=colour, lw=1.2)
                every += scores
        if every:
            ax.plot(len(names) + at, iqm(every), marker, color=colour, markersize=4, markerfacecolor="white")
    look = {"rotation": 40, "ha": "right", "rotation_mode": "anchor", "fontsize": 8}
    ax.set_xticks(range(len(names) + 1), [*names, "IQM"], **look)


def grid(rows, columns, width=9.5, height=2.3):
    figure, axes = plt.subplots(rows, columns, figsize=(width, height * rows + 1), squeeze=False, layout="constrained")
    for ax in axes.flat:
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    return figure, axes


def entitle(figure, table, subject, claims, legend=True):
    """The title says what was found, the legend stands below."""
    lines = [subject, *(claim.sentence(table) for claim in claims)]
    figure.suptitle("\n".join(lines), fontsize=10, x=0.01, ha="left")
    found = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels())}
    if legend:
        figure.legend(found.values(), found.keys(), loc="outside lower center", ncol=4, fontsize=9, frameon=False)


def evals(table):
    """The evaluation sets that are in a table, in its order"""
    metrics = dict.fromkeys(m for seeds in table.series.values() for one in seeds.values() for m in one)
    return [m.split("/")[1] for m in metrics if m.startswith("eval/") and m != SCORE]


def compare(table, flag, metrics=("rollout/accuracy",), key=panel):
    """A row a panel: curves of the metrics, of the evaluations, and final scores; a line for each value of `flag`"""
    panels = {}
    for command in table.commands:
        panels.setdefault(key(command), []).append((command, flags(command)[flag]))
    figure, axes = grid(len(panels), len(metrics) + 2)
    for row, (name, series) in zip(axes, panels.items()):
        for command, value in series:
            for ax, metric in zip(row, metrics):
                line(ax, table, command, value, metric)
            line(row[-2], table, command, value, SCORE, smoothed=False)
        finals(row[-1], table, series, evals(table))
        row[0].set_ylabel(name, fontsize=9)
    for ax, metric in zip(axes[0], [*metrics, SCORE]):
        ax.set_title(NAMES[metric], fontsize=9)
    enough = any(len(seeds) >= ENOUGH for seeds in table.series.values())
    axes[0, -1].set_title("final accuracy" + ", 95 % interval" * enough, fontsize=9)
    for ax in axes[-1, :-1]:
        ax.set_xlabel("rollouts trained on", fontsize=9)
    axes[-1, 0].set_xlabel("rollouts trained on\n(bands: ± s.d. over seeds)", fontsize=9)
    return figure


# ----------------------------------------------------------------------------------------------------- one figure's file


def count(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 1 or more")
    return int(text)


def parse(doc):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", action="store_true", help="start the runs that are missing, and make the table from them")
    p.add_argument(
        "--seeds", type=count, help="how many of each command: 1, 2, ... on a laptop [5], 42, 43, ... on a node [1]"
    )
    p.add_argument(
        "--jobs", type=count, default=1, help="with --run: runs at a time, which share the cores [%(default)s]"
    )
    p.add_argument("--steps", type=count, help="with --run: rollouts of a run, in the place of what its command says")
    text = "node: the same runs with the paper's settings, printed, or with --run started one by one on all GPUs"
    p.add_argument("--scale", choices=["laptop", "node"], default="laptop", help=text)
    p.add_argument("--runs", type=Path, default=ROOT / "runs", help="with --run: where the run folders are [runs]")
    p.add_argument(
        "--out",
        type=Path,
        help="folder of tables and pictures [plots/figures; with --run RUNS/figures, RUNS/figures_node, RUNS/figures_STEPS]",
    )
    args = p.parse_args()
    args.seeds = args.seeds or {"laptop": 5, "node": 1}[args.scale]
    other = ["node"] * (args.scale == "node") + [str(args.steps)] * bool(args.steps)
    args.out = args.out or (args.runs / "_".join(["figures", *other]) if args.run else FIGURES)
    return args


def commands_at(module, scale):
    found = commands(module)
    return found if scale == "laptop" else list(dict.fromkeys(at_node(c, size) for c in found for size in module.SIZES))


def runs_of(modules, args):
    """-> [(command, seed, the command with all its flags)], each once, all of a seed before the next seed"""
    more = f" --steps {args.steps}" * bool(args.steps and args.run) + f" --scale {args.scale}"
    every = dict.fromkeys(c for module in modules for c in commands_at(module, args.scale))
    first = {"laptop": 1, "node": 42}[args.scale]  # the paper's seed
    return [(c, seed, f"{c}{more} --seed {seed}") for seed in range(first, first + args.seeds) for c in every]


def pasteable(modules, args):
    return [f"accelerate launch {full}" for _, _, full in runs_of(modules, args)]


def run(modules, args):
    """Starts what is missing and makes the tables; -> how many runs failed"""
    node = args.scale == "node"
    usual = [module for module in modules if not hasattr(module, "run")]
    found = [(command, seed, full, args.runs.absolute() / name(full)) for command, seed, full in runs_of(usual, args)]
    todo = [(full, out) for out, full in {out: full for _, _, full, out in found}.items()]  # no folder twice
    failed = launch(todo, 1 if node else args.jobs, ("accelerate", "launch") if node else (sys.executable,))
    for module in modules:
        mine = [(c, seed, out) for c, seed, _, out in found if c in commands_at(module, args.scale)]
        make = getattr(module, "collect", lambda mine, module=module: table_of(mine, module.METRICS))
        try:
            write_table(table_path(module, args.out), make(mine) if module in usual else module.run(args))
        except (OSError, ValueError, LookupError, subprocess.CalledProcessError) as error:  # of one figure, not of all
            print(f"{module.__name__}: no table; {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return failed


def table_path(module, folder):
    return folder / f"{Path(module.__file__).stem}.csv"


def draw(module, out):
    """-> the picture of a figure, drawn from its table in the folder `out`"""
    path = table_path(module, out)
    figure = module.draw(read_table(path))
    figure.savefig(path.with_suffix(".png"), dpi=100)
    plt.close(figure)
    return path.with_suffix(".png")


def work(modules, args):
    """What a figure's file and the whole study do; -> how many runs and figures failed"""
    if args.scale == "node" and not args.run:
        print("\n".join(pasteable(modules, args)))
        return 0
    try:
        failed = run(modules, args) if args.run else 0
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")
    for module in modules:
        if table_path(module, args.out).is_file():
            print(draw(module, args.out))
        else:
            print(f"{table_path(module, args.out)}: is not there; make it with --run", file=sys.stderr)
            failed += 1
    return failed


def main(module):
    raise SystemExit(work([module], parse(module.__doc__)) > 0)
