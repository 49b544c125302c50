"""The processes of a run, one for each GPU: the rank of this one, what they tell each other, where this one computes."""

import contextlib
import datetime
import functools
import os
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

ROOT = Path(__file__).parent.parent
TIMEOUT = datetime.timedelta(hours=2)  # of one process that waits for another, which may sample for long
CPU_THREADS = 8  # at most, for all processes together; a tiny model has no work for more


def without_accelerate_config():
    """What `accelerate config` once wrote into a file changes no run: precision, accumulation, another sharding."""
    for name in [n for n in os.environ if n.startswith(("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"))]:
        del os.environ[name]


def rank():
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", 0))


def world():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", 1))


def fail(message, everywhere=False):
    """For a user's mistake: one line that says what to change, status 2. everywhere: other processes may know of none"""
    if rank() == 0 or everywhere:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def refused(what):
    """Turns what a library stumbles over, at the start of a run, into one line with the place, and status 2."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        if isinstance(error, SystemExit | KeyboardInterrupt) or "out of memory" in str(error):  # the latter: `explain`
            raise
        place = traceback.extract_tb(error.__traceback__)[-1]
        says = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        fail(f"{what}: {type(error).__name__}: {says} ({Path(place.filename).name}, line {place.lineno})", True)


@functools.cache
def host_group():
    """The processes again, over the machine's memory: under NCCL a pickled object would need room on the GPU."""
    return dist.new_group(backend="gloo", timeout=TIMEOUT)


def all_gather(thing):
    """-> the list of every process's `thing`, in rank order"""
    things = [thing] * world()
    if world() > 1:
        dist.all_gather_object(things, thing, group=host_group() if torch.cuda.is_available() else None)
    return things


def interleave(shares):
    """The lists [i :: len(shares)] of a list, i = 0, 1, ... -> the whole list"""
    return [shares[i % len(shares)][i // len(shares)] for i in range(sum(map(len, shares)))]


def distributed_map(function, items):
    """-> function(items), a list as long as `items`, of which each process computes its share; the same list on all"""
    return interleave(all_gather(function(items[rank() :: world()])))


def join_group():
    """A process group of this process alone where nothing launched several: vLLM and FSDP2 want one."""
    if not dist.is_initialized():
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 0}
        os.environ.update({name: str(value) for name, value in alone.items()})  # vLLM reads them
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def use_cores(most=CPU_THREADS):
    if not torch.cuda.is_available():
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # Linux; elsewhere
        torch.set_num_threads(max(1, min(most, cores) // world()))  # accelerate launch says 1


def use_tf32():
    """Products of fp32 on a GPU: exact where both sides were rounded to bf16, as in the output layer."""
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")


def device():
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def compute_dtype():
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32
