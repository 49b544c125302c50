"""The runs of the figures: the commands in their docstrings, the folders of these, and how many are started side by side."""

import contextlib
import fcntl
import importlib
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # the scripts are asked for the names of their runs
from infra import flags  # noqa: E402
from infra.runs import finished  # noqa: E402

USUAL = {  # what a command has where it does not say: the scripts' own defaults
    "model": "data/tiny/base",
    "norm": "group_mean_batch_std",
    "loss_agg": "token_mean",
    "clip_low": "0.2",
    "clip_high": "0.2",
    "overlong": "keep",
    "wrong_reward": "0",
    "max_response_len": "192",
}
LAPTOP_ONLY = (
    "prompts_per_step",
    "minibatches",
    "steps",
    "eval_every",
    "lr",
)  # on a node these are the paper's, the scripts' defaults
MODELS = {"data/tiny/base": "Qwen/Qwen3-{}-Base", "data/tiny/aligned": "Qwen/Qwen3-{}"}
LIMITS = {"56": "8192", "96": "16384", "192": "20480"}  # tokens, figure 13; laptop: node
BENCH = (  # puts grpo.py and dapo.py on the study's bench; lite_ppo.py stands on it
    "--prompts_per_step 128 --group_size 8 --minibatches 8 --warmup_steps 50 --weight_decay 0 --temperature 0.99 "
    "--top_p 0.99 --top_k 100 --max_response_len 8192 --eval_max_response_len 8192"
)
ON_BENCH = {
    "grpo.py": [BENCH],
    "dapo.py": [BENCH, "--overlong_buffer 1638"],
}  # a fifth of the limit, as DAPO has and a laptop


def commands(module):
    """The commands in a figure's docstring, without `accelerate launch`"""
    return re.findall(r"^ +accelerate launch (.+)$", module.__doc__, re.M)


def given(command):
    """`lite_ppo.py --norm none` -> "lite_ppo.py", {"norm": "none"}"""
    script, *words = shlex.split(command)
    return script, {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2])}


def flags_of(command):
    """-> {"script": "lite_ppo", its flags, what is usual, and what follows: kind, size (a laptop's one model is small), limit}"""
    script, said = given(command)
    f = USUAL | {"script": script.removesuffix(".py")} | said
    f["kind"] = "base" if f["model"].lower().endswith("base") else "aligned"
    f["size"] = "8B" if "-8B" in f["model"] else "4B"
    f["limit"] = {"56": "short", "8192": "short", "96": "middle", "16384": "middle"}.get(f["max_response_len"], "long")
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
    f = flags_of(command)
    return f"{Path(f['model']).name}, {'all tiers' if ',' in f['data'] else f['data']}"


def folder_name(command):
    """-> the name of a command's run folder, such as `lite_ppo__norm=none__s1`; the script checks the flags first"""
    script, *argv = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py"))
    with contextlib.redirect_stdout(io.StringIO()):
        args = module.parse_args([*argv, "--out", os.devnull + "/none"])
    return flags.run_name(args, flags.MACHINE | module.DEFAULTS)


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
                    if process := start_run(command, run, launcher, slot, jobs):
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


def start_run(command, run, launcher, slot, jobs):
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
