import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from infra import engines, flags, runs
from infra import policy as policy_module


def pytest_configure(config):
    """The tests are about the laptop scale: without `-m gpu` no GPU is seen."""
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


ROOT = Path(__file__).parent.parent
SCRIPTS = ["grpo", "dapo", "lite_ppo"]
INFRA = sorted(path.stem for path in ROOT.glob("infra/*.py"))
SHARED = ["common.py", *(f"infra/{name}.py" for name in INFRA)]
BASE = str(ROOT / "data" / "tiny" / "base")
WORDS = json.loads(Path(BASE, "config.json").read_text())["vocab_size"]
SMALL = [  # a run of seconds: two steps of sixteen short responses, that learns
    *("--data", "easy", "--lr", "1e-3"),
    *("--scale", "laptop", "--steps", "2", "--prompts_per_step", "4", "--group_size", "4", "--minibatches", "2"),
    *("--max_response_len", "40", "--eval_data", "eval_easy", "--save_every", "1"),
]


@pytest.fixture
def policy():
    """The laptop's base model as the trainer holds it."""
    return load_policy()


def load_policy(model=BASE, lora_rank=0):
    """Not sharded. With a rank: an adapter that is not 0, the same every time"""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(policy_module, "shard", lambda model, args: model)
        policy = policy_module.load_policy(engine_args(model=model, lora_rank=lora_rank))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if ".lora_" in name:
                p.copy_(0.02 * torch.randn(p.shape, generator=g))
    return policy


def make_batch(count=12, seed=0, longest=60):
    """Responses of random tokens and very different lengths."""
    g = torch.Generator().manual_seed(seed)
    batch = []
    for i in range(count):
        length = int(torch.randint(1, longest, (1,), generator=g))
        prompt = torch.randint(5, WORDS, (int(torch.randint(3, 20, (1,), generator=g)),), generator=g).tolist()
        ids = torch.randint(5, WORDS, (length,), generator=g)
        batch.append(engines.Response({"id": str(i), "prompt_ids": prompt}, ids, torch.zeros(length), i % 5 == 0, ""))
    return batch


def engine_args(**changes):
    settings = dict(
        model=BASE,
        template="chat",
        enable_thinking="on",
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        max_prompt_len=64,
        max_response_len=64,
        seed=1,
    )
    settings |= {"engine": "auto", "lora_rank": 0, "reference": False, "lr": 1e-4, "weight_decay": 0.0}
    machine = {name: laptop for name, (laptop, _) in flags.MACHINE.items()}
    return Namespace(**(machine | settings | dict(eval_max_response_len=64) | changes))


def run_main(monkeypatch, script, *flags):
    """Runs a script's main() in this process with these flags; -> its metrics"""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    script.main()
    return read_metrics(flags[flags.index("--resume" if "--resume" in flags else "--out") + 1])


def read_metrics(folder):
    return [row for _, row in runs.read_jsonl(Path(folder) / "metrics.jsonl")]


def without_times(row):
    return {k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))}


def make_parser(script):
    """The parser of a script's parse_args(), with all its flags."""
    made, parse_args = [], flags.Parser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags.Parser, "parse_args", lambda p, argv: made.append(p) or parse_args(p, argv))
        script.parse_args(["--scale", "laptop"])
    return made[0]


def copy_project(folder, patch=None):
    """The scripts, their tests and what they need in another folder, with this patch applied."""
    for pattern in ("*.py", "pyproject.toml", "infra/*.py", "data/*.py", "plots/*.py", "tests/*.py"):
        for file in ROOT.glob(pattern):
            (folder / file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, folder / file.relative_to(ROOT))
    (folder / "data" / "tiny").symlink_to(ROOT / "data" / "tiny")
    if patch:
        outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(folder.parent)}  # git looks for no repository around it
        subprocess.run(["git", "apply", patch], cwd=folder, env=outside, check=True)
