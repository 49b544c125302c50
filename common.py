"""What a script calls. It holds no trick and no loop: what two papers could disagree about stands in the scripts.

A run starts and finishes here. Its parts stand in infra/, each with one subject; a file imports only from those below:

    flags.py        the shared flags, what they may not be, the name of a run
    runs.py         a run's metrics, folder and checkpoints; what stops it: a stale engine, a NaN, no memory
    trackers.py     experiment trackers, which get the metrics too: --log_with
    plan.py         memory and time of a command, before anything is loaded: --plan
    selftest.py     whether this model is trained right, tried before a run begins
    engines.py      sampling: vLLM, which sleeps while the trainer works, or transformers; the seed of a sample
    policy.py       the model that is trained: its forward pass, log-probabilities, optimizer, sharding
    attention.py    its attention within the sequences of a pack
    packs.py        which responses go to which optimizer step, process and pass; sums over the tokens of a response
    processes.py    the processes of a run, and what they tell each other

In data/ problems.py is what a model is asked, evaluation.py how good it is; rewards.py is what a response is worth."""

import functools
import subprocess
import sys
import tempfile
import time
import warnings

import torch

from data.evaluation import evaluate, summarize, write_card
from data.problems import data_files, load_data, load_tokenizer
from infra import plan, processes, trackers
from infra.engines import HfEngine, VllmEngine, uses_vllm
from infra.flags import COUNT, Parser, number, parse_args
from infra.packs import minibatches, per_response
from infra.policy import load_policy, load_reference, make_optimizer
from infra.processes import ROOT, distributed_map, fail, rank, refused, world
from infra.runs import Log, check_finite, explain, freeze_old_logp, open_run, restore, save
from infra.selftest import check_bos, self_test

GLOO_REST = 0.5  # seconds for gloo's thread to drop the last barrier; see `finish`


def start(args):
    """-> accelerator, model, optimizer, engine, problems, log. A resumed run stands at its last checkpoint."""
    files = data_files(args, "data", args.data) if args.steps else [], data_files(args, "eval_data", args.eval_data)
    import transformers  # takes seconds; a wrong name of a file is answered before

    shape = plan.read_shape(args)
    with refused(f"--model {args.model}: its tokenizer cannot be loaded"):
        tokenizer = load_tokenizer(args)
    problems, eval_problems = load_data(args, *files, tokenizer)
    if any(max(row["prompt_ids"], default=0) >= shape.words for row in problems.rows + eval_problems):
        fail(f"--model {args.model}: its tokenizer has more tokens than its embedding, {shape.words}, in prompts too")
    sys.excepthook = functools.partial(explain, args, shape)
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process saves a checkpoint alone
    accelerator = join_processes(args, shape, **trackers.wanted(args))
    with refused(f"--model {args.model}: it cannot be loaded"):
        model = load_policy(args)
    with refused(f"--model {args.model}: a checkpoint of it cannot be saved"), tempfile.TemporaryDirectory() as scratch:
        for part in (model.lm.config, model.lm.generation_config, tokenizer) if args.steps and rank() == 0 else ():
            part.save_pretrained(scratch)
    prompts = [row["prompt_ids"] for row in problems.rows or eval_problems]
    if args.steps:
        self_test(args, model, prompts)
    check_bos(args, model, tokenizer, prompts)
    optimizer = make_optimizer(args, model)
    with refused(f"--model {args.model}: the engine cannot load it"):
        engine = make_engine(args, tokenizer, shape)
    if rank() == 0:
        open_run(args)
    accelerator.wait_for_everyone()
    transformers.utils.logging.disable_progress_bar()  # from here on there is ours
    first_step = restore(args, model, optimizer, problems)
    log = Log(args, first_step, eval_problems, shape, tokenizer)
    trackers.start_trackers(accelerator, args, first_step)
    log.trackers = accelerator.trackers
    return accelerator, model, optimizer, engine, problems, log


def join_processes(args, shape, alone=False, **how):
    """-> accelerator. alone: nobody trains beside the engine; how: more that Accelerate is told"""
    processes.without_accelerate_config()
    import accelerate

    cuda, timeout = torch.cuda.is_available(), accelerate.InitProcessGroupKwargs(timeout=processes.TIMEOUT)
    accelerator = accelerate.Accelerator(cpu=not cuda, mixed_precision="no", kwargs_handlers=[timeout], **how)
    if cuda and uses_vllm(args) and (wrong := plan.refusal(args, shape, world(), plan.local_gpus()[1], alone)):
        fail(wrong)
    processes.use_cores()
    accelerate.utils.set_seed(args.seed)
    return accelerator


def make_engine(args, tokenizer, shape, alone=False):
    kind = VllmEngine if uses_vllm(args) else HfEngine
    return kind(args, tokenizer, int(plan.kv_cache(args, shape, world(), plan.local_gpus()[1], alone)[0]))


def finish(log, accelerator, engine):
    """The table of the first and the last evaluation, result.json, which marks a run as finished, and its picture."""
    log.bar.close()
    if rank() == 0:
        summarize(log)
        draw = [sys.executable, ROOT / "plots" / "curves.py", log.folder, "--out", log.folder / "curves.png"]
        subprocess.run(draw, stdout=subprocess.DEVNULL)  # as anybody could: a run does not know the pictures of it
        write_card(log)
        print(f"metrics, samples, evaluation, checkpoint and curves.png are in {log.folder}")
    accelerator.wait_for_everyone()
    time.sleep(GLOO_REST)  # it needs the interpreter for that, which the end of the process group holds while it waits
    engine.close()
    accelerator.end_training()
