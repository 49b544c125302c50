"""What every figure's file does when it is run: it starts the runs that are missing, makes the table, draws the picture."""

import argparse
import contextlib
import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt

from launch import ROOT, at_node, commands, folder_name, launch
from table import collect_rows, finished, read_table, write_table

FIGURES = ROOT / "plots" / "figures"


def positive(text):
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is out of range; give 1 or more")
    return int(text)


def parse(doc, takeaways=()):
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", action="store_true", help="start the runs that are missing, and make the table from them")
    p.add_argument(
        "--seeds", type=positive, help="how many of each command: 1, 2, ... on a laptop [5], 42, 43, ... on a node [1]"
    )
    p.add_argument(
        "--jobs", type=positive, default=1, help="with --run: runs at a time, which share the cores [%(default)s]"
    )
    p.add_argument(
        "--steps", type=positive, help="with --run: training steps of a run, in the place of what its command says"
    )
    text = "node: the same runs with the paper's settings, printed, or with --run started one by one on all GPUs"
    p.add_argument("--scale", choices=["laptop", "node"], default="laptop", help=text)
    p.add_argument("--runs", type=Path, default=ROOT / "runs", help="with --run: where the run folders are [runs]")
    p.add_argument(
        "--out",
        type=Path,
        help="folder of tables and pictures [plots/figures; with --run RUNS/figures, RUNS/figures_node, RUNS/figures_STEPS]",
    )
    if takeaways:

        def some(text):
            if not (found := {int(number) for number in text.split(",")}) <= set(takeaways):
                raise argparse.ArgumentTypeError(f"{text}: give some of {','.join(map(str, takeaways))}")
            return found

        p.add_argument("--claims", type=some, help="only the figures of these takeaways, such as 1,4; 9 is Lite PPO")
        text = "run and draw the three largest effects alone, with three seeds, two runs at a time; for a class"
        p.add_argument("--quick", action="store_true", help=text)
    args = p.parse_args()
    if takeaways and args.quick:
        args.run, args.seeds, args.jobs = True, 3, 2
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


@contextlib.contextmanager
def stoppable():
    try:
        yield
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on from here")


@stoppable()
def run(modules, args):
    """Starts what is missing and makes the tables; -> how many runs failed"""
    node = args.scale == "node"
    usual = [module for module in modules if not hasattr(module, "run")]
    found = [
        (command, seed, full, args.runs.absolute() / folder_name(full)) for command, seed, full in runs_of(usual, args)
    ]
    shown = {module: set(commands_at(module, args.scale)) for module in usual}
    mine = {module: [(c, seed, out) for c, seed, _, out in found if c in shown[module]] for module in usual}
    kept = {module: rows_of_runs(module, args) for module in usual}
    missing = {run[:2] for module in usual for run in mine[module] if run[:2] not in kept[module]}
    todo = {out: full for c, seed, full, out in found if (c, seed) in missing}
    todo = [(full, out) for out, full in todo.items()]  # no folder twice
    failed = launch(todo, 1 if node else args.jobs, ("accelerate", "launch") if node else (sys.executable,))
    for module in modules:
        try:
            rows = merged_rows(module, mine[module], kept[module], args) if module in usual else module.run(args)
            write_table(table_path(module, args.out), rows)
        except (OSError, ValueError, LookupError, subprocess.CalledProcessError) as error:  # of one figure, not of all
            print(f"{module.__name__}: no table; {type(error).__name__}: {error}", file=sys.stderr)
            failed += 1
    return failed


def rows_of_runs(module, args):
    """-> {(command, seed): its rows} of the runs that a figure's table has; one of which nothing but its name is there is missing"""
    found, path, commands = {}, table_path(module, args.out), commands_at(module, args.scale)
    for row in read_table(path) if path.is_file() else []:
        values = [value for name, value in row.items() if name not in ("command", "seed", "commit")]
        if set(values) != {None} and row["command"] in commands:
            found.setdefault((row["command"], int(row["seed"])), []).append(row)
    return found


def merged_rows(module, mine, kept, args):
    """-> the rows of a figure's table: of the runs that are there, and of those that only the table has"""
    kept = {run: rows for run, rows in kept.items() if run not in {(c, seed) for c, seed, out in mine if finished(out)}}
    make = getattr(module, "collect", lambda mine: collect_rows(mine, module.METRICS))
    rows = make([run for run in mine if run[:2] not in kept]) + [row for rows in kept.values() for row in rows]
    order = commands_at(module, args.scale)
    return sorted(rows, key=lambda row: (row["seed"], order.index(row["command"])))


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
    failed = run(modules, args) if args.run else 0
    for module in modules:
        if table_path(module, args.out).is_file():
            print(draw(module, args.out))
        else:
            print(f"{table_path(module, args.out)}: is not there; make it with --run", file=sys.stderr)
            failed += 1
    return failed


def main(module):
    raise SystemExit(work([module], parse(module.__doc__)) > 0)
