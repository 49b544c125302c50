"""What the figures share: their runs are started, read, smoothed and compared here.

A figure is a file plots/figNN_name.py. Its docstring holds the commands of its runs, each of which is started once a seed; figures
that name the same command share its runs.
"""

import contextlib
import importlib
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # the scripts are asked for the names of their runs


# ------------------------------------------------------------------------------------------------------------- starting


def folder(command, seed, *more):
    """The run folder of a command such as `lite_ppo.py --norm none`, whose flags the script checks first"""
    import common

    script, *argv = [*shlex.split(command), *more, "--seed", str(seed)]
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()):
        args = module.parse_args([*argv, "--out", os.devnull + "/none"])
    return ROOT / "runs" / common.run_name(args, common.MACHINE | module.DEFAULTS)


def finished(run):
    return (run / "result.json").is_file()


def launch(commands, seeds, jobs, more=(), launcher=(sys.executable,)):
    """Starts the runs that are not finished, `jobs` at a time, each on its share of the cores; -> how many failed.

    All commands of a seed come before the next seed. A run that was stopped is resumed. What a run prints is in runs/<name>.log.
    """
    todo = [(command, seed, folder(command, seed, *more)) for seed in seeds for command in commands]
    waiting = [run for run in todo if not finished(run[2])]
    bar = tqdm(total=len(todo), initial=len(todo) - len(waiting), unit="run", smoothing=0.05)
    going, failed = {}, 0  # slot: (process, run folder)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through `finally`
    try:
        while waiting or going:
            for slot in set(range(jobs)) - going.keys():
                if waiting:
                    command, seed, out = waiting.pop(0)
                    going[slot] = start(command, seed, out, more, launcher, slot, jobs), out
            time.sleep(0.2)
            for slot, (process, out) in list(going.items()):
                if process.poll() is not None:
                    del going[slot]
                    if process.returncode or not finished(out):
                        failed += 1
                        tqdm.write(f"{out.name}: ended with {process.returncode}; see {out}.log", file=sys.stderr)
                    bar.update()
            bar.set_postfix_str(", ".join(out.name.split("__")[-1] for _, out in going.values()))
    finally:
        for process, _ in going.values():
            process.terminate()
        for process, _ in going.values():
            process.wait()
        bar.close()
    return failed


def start(command, seed, out, more, launcher, slot, jobs):
    script, *flags = shlex.split(command)
    flags += [*more, "--seed", str(seed)]
    if out.exists():
        flags = ["--resume", str(out)]
    out.parent.mkdir(exist_ok=True)
    with open(f"{out}.log", "a") as log, share_of_cores(slot, jobs):
        full = [*launcher, str(ROOT / script), *flags]
        return subprocess.Popen(full, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)


@contextlib.contextmanager
def share_of_cores(slot, jobs):
    """What is started in here is held to every jobs-th core from this one on, where the system can do that."""
    if jobs == 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(cores)[slot % len(cores) :: jobs])
    yield
    os.sched_setaffinity(0, cores)
