"""What the README says of flags, metrics, constants, sizes and differences is made from the code: this test fails when it is not.

`python tests/test_readme.py --write` writes it anew, between the marks `<!-- NAME -->` and `<!-- end -->`, and in the figures'
docstrings what was found.
"""

import argparse
import ast
import difflib
import io
import re
import subprocess
import sys
import tokenize
from pathlib import Path

sys.path[:0] = [
    str(Path(__file__).parent.parent / folder) for folder in ("", "tests", "plots")
]  # when it is run as a program

import pytest
import torch
from conftest import ROOT, SCRIPTS, SHARED, load_module, make_parser
from test_bugs import PATCHES, head
from test_plan import config
from test_structure import DIFFERENT, TABLES, definitions, source
from test_trl import CASES, MODULES

import common
import dapo
import lite_ppo
import plan
import study

README = ROOT / "README.md"

PAPERS = {
    "grpo": ("GRPO, [arXiv 2402.03300](https://arxiv.org/abs/2402.03300)", "-"),
    "dapo": (
        "DAPO, [arXiv 2503.14476](https://arxiv.org/abs/2503.14476)",
        "Clip-Higher, token mean, dynamic sampling, soft overlong punishment, reward 1/-1, no KL",
    ),
    "lite_ppo": (
        "Lite PPO, [arXiv 2508.08221](https://arxiv.org/abs/2508.08221)",
        "standard deviation of the batch, token mean, no KL; the study's other switches",
    ),
}

METRICS = {  # every name that is logged, each once
    "rollout/response_len, truncated, truncated_right": "tokens; share cut at `--max_response_len`; share cut there and right all the same",
    "rollout/accuracy": "share of the sampled responses that are right, whatever the rewards",
    "rollout/repeat_ratio, repeat_ratio_right, repeat_ratio_wrong": "of the truncated, of those with a right and with a wrong answer: "
    "share that ends in a loop",
    "rollout/entropy": "of the next token, nats, from all sampled tokens: minus the mean of their log-probabilities as they were sampled",
    "rollout/prob_P": "share of the sampled tokens whose probability was P % or more, and less than the next P: 0, 30, 60, 85, 95, 99",
    "rollout/sampled_responses, kept": "responses sampled for this step, those of dropped groups too; groups that are trained on",
    "rollout/logp_gap, logp_k3": "trainer against engine, before any update: mean absolute difference (nats), and KL by "
    "exp(d) - 1 - d. The canary: a run stops when the engine evidently samples from other weights (in fp32 one missed load "
    "shows; in bf16 at a small learning rate it takes many)",
    "reward/mean, std": "of all that was sampled, before dynamic sampling drops groups",
    "reward/solved_all, solved_none": "share of the sampled groups all right, all wrong",
    "reward/grader_errors, grader_timeouts": "share of responses the grader could not compare; had no time to compare",
    "adv/std, max, zero": "of the advantages that are trained on; largest absolute value; share that is 0",
    "train/loss, grad_norm, lr": "mean over the mini-batches; the norm before it is cut; read from the optimizer after the last update",
    "train/entropy": "of the next token, nats, mean over trained tokens: those with a gradient, so without an advantage or a KL a response is left out",
    "train/kl": "to the first policy, by `--kl_estimator`, mean over trained tokens; only with `--kl_coef` above 0",
    "train/clip_low, clip_high, ratio_max": "share of tokens whose gradient the lower, upper bound cuts; largest ratio",
    "eval/SET/accuracy, accuracy_se": "avg@n, n = `--eval_samples`; its standard error, were the problems drawn from more of the kind. `eval/mean`: the plain mean of the sets",
    "eval/SET/pass@K, pass@K_se": "is one of K = `--eval_pass_k` responses right? Unbiased, from n",
    "eval/SET/response_len, truncated, grader_errors": "mean over problems and responses",
    "time/save, wake, sync, eval, generate, reward, old_logp, update, idle, step": "seconds in each phase; save is the one after the "
    "step before; idle: waiting for the samples of slower processes; step is their sum",
    "perf/generate_tokens_per_s, train_tokens_per_s": "response tokens sampled, and trained on, over the time of that phase",
    "perf/padding, imbalance": "share of the packs' room (`--tokens_per_gpu`) that is empty; work of the busiest process over the mean, "
    "by mini-batch",
    "perf/mfu": "FLOPs of the update, what is computed twice counted once, over the GPUs' bf16 peak; where the peak is known",
    "perf/peak_gpu_gb": "memory taken on the fullest GPU at the end of any phase of the step, vLLM's and torch's cache included",
}


WHAT = {
    "rewards": "text in, number out",
    "common": "flags, problems, start-up, log, checkpoints, evaluation",
    "engines": "who samples: vLLM, or transformers' `generate`",
    "training": "what is trained: packs, the forward pass, weights over several GPUs",
    "plan": "memory and time of a command, before anything is loaded",
}


def sizes():
    rows = ["| paper | script | lines | what it changes | `diff grpo.py` |", "|---|---|---|---|---|"]
    for script in SCRIPTS:
        count = ["git", "diff", "--no-index", "--numstat", "grpo.py", f"{script}.py"]
        count = subprocess.run(count, cwd=ROOT, capture_output=True, text=True).stdout.split()
        diff = f"+{count[0]} -{count[1]}" if script != "grpo" else "-"
        paper, what = PAPERS[script]
        rows.append(f"| {paper} | [{script}.py]({script}.py) | {len(source(script).splitlines())} | {what} | {diff} |")
    for name, what in WHAT.items():
        rows.append(f"| | [{name}.py]({name}.py) | {len(source(name).splitlines())} | {what} | |")
    return rows


def core(script):
    """What a script says: the defaults of its tricks, the math and the loop, without comments, docstring and the making of flags"""
    text, module = source(script), MODULES[script]
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]].rstrip()
    tricks = {f: v[0] for f, v in module.DEFAULTS.items() if f not in flags.FLAGS}
    math = {f: re.search(rf'^ +"{v}": +lambda [^:]*: (.+),$', "\n".join(lines), re.M) for f, v in tricks.items()}
    defaults = [
        f"--{f} {v}".ljust(36) * bool(math[f]) + (math[f][1] if math[f] else f"--{f} {v}") for f, v in tricks.items()
    ]
    for node in ast.parse(text).body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if name and name not in {"parse_args", "DEFAULTS"}:
            defaults += [line for line in lines[node.lineno - 1 : node.end_lineno] if line]
    return defaults


def diff(script):
    hunks = list(difflib.unified_diff(core("grpo"), core(script), n=0, lineterm=""))[2:]
    shown = ["" if line.startswith("@@") else {"-": "< ", "+": "> "}[line[0]] + line[1:] for line in hunks]
    return [f"    {line}".rstrip() for line in shown[1:]]


def differences():
    """Names that stand for different code in two scripts: those that may (tests/test_structure.py), and no others"""
    found = {s: definitions(s) for s in SCRIPTS}
    names = dict.fromkeys(name for s in SCRIPTS for name in found[s])
    where = {name: [s for s in SCRIPTS if name in found[s]] for name in names}
    same = [n for n in names if len(where[n]) == 3 and len({found[s][n] for s in SCRIPTS}) == 1]
    differ = [n for n in names if len({found[s][n] for s in where[n]}) > 1]
    assert set(differ) <= DIFFERENT | TABLES
    rows = [
        "| | |",
        "|---|---|",
        f"| the same in all three scripts | {ticks(same)} |",
        f"| different | {ticks(differ)} |",
    ]
    return rows + [
        f"| only in {s}.py | {ticks([n for n in names if where[n] == [s]])} |" for s in SCRIPTS if s != "lite_ppo"
    ]


def ticks(names):
    return ", ".join(f"`{name}`" for name in names)


def tricks():
    rows = ["| flag | choices | grpo | dapo | lite_ppo | |", "|---|---|---|---|---|---|"]
    for flag, actions in flags().items():
        if flag in flags.FLAGS:
            continue
        choices = dict.fromkeys(str(c) for a in actions.values() for c in a.choices or [])
        values = {s: MODULES[s].DEFAULTS[flag] for s in actions}  # (laptop, node)
        cells = [" / ".join(f"`{v}`" for v in dict.fromkeys(values[s])) if s in values else "-" for s in SCRIPTS]
        help = max((a.help for a in actions.values()), key=len)
        rows.append(f"| `--{flag}` | {ticks(choices) or 'a number'} | {' | '.join(cells)} | {help} |")
    return rows


def shared():
    rows = ["| flag | laptop | node: grpo | dapo | lite_ppo | |", "|---|---|---|---|---|---|"]
    for flag, (_, help) in flags.FLAGS.items():
        if flag in flags.MACHINE:
            continue
        laptop, node = zip(*(MODULES[s].DEFAULTS[flag] for s in SCRIPTS))
        assert len(set(laptop)) == 1, f"--{flag}: the laptop is one bench for all scripts"
        cells = [str(v).replace(",", ", ") for v in (laptop[0], *node)]
        rows.append(f"| `--{flag}` | {' | '.join(cells)} | {help} |")
    return rows


def flags():
    """-> for each flag the argparse actions of the scripts that have it"""
    found = {}
    for script in SCRIPTS:
        for action in make_parser(MODULES[script])._actions:
            if action.dest in MODULES[script].DEFAULTS:
                found.setdefault(action.dest, {})[script] = action
    return found


def node_plan():
    """Of lite_ppo.py as the paper has it, from the configuration of Qwen3-4B"""
    args = argparse.Namespace(
        **{f: node for f, (_, node) in (flags.MACHINE | lite_ppo.DEFAULTS).items()}, reference=False
    )
    return [f"    {line}" for line in plan.report(args, plan.Shape(config("4B")), 8, 80).splitlines()]


def machine():
    rows = ["| flag | laptop | node | |", "|---|---|---|---|"]
    for flag, (laptop, node) in flags.MACHINE.items():
        rows.append(f"| `--{flag}` | {laptop} | {node} | {flags.FLAGS[flag][1]} |")
    return rows


def constants():
    r = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])
    unbiased = float(lite_ppo.group_std(torch.tensor([[0.0, 1]]))) > 0.7  # sqrt(1/2), not 1/2
    raw, centred = (float(lite_ppo.batch_std(x)) - lite_ppo.EPS for x in (r, r - lite_ppo.group_mean(r)))
    penalty = [float(dapo.overlong_penalty(torch.tensor(n), 20.0, 4.0)) for n in (16.0, 18.0, 20.0, 24.0)]
    equal = max(
        float(lite_ppo.advantages(torch.full((2, 8), -1.3), n).abs().max()) for n in lite_ppo.NORMS if "mean" in n
    )
    filtered = lite_ppo.token_weights(torch.tensor([2.0, 0, 6]), "seq_mean", 8)[0] == 1 / 4
    limits = {str(k).removeprefix("torch."): v for k, v in runs.STALE.items()}
    said = {
        "standard deviations": f"{'unbiased (n - 1)' if unbiased else 'biased (n)'}, plus {lite_ppo.EPS:g}",
        "batch std": f"of the raw rewards of the whole rollout: {raw:.4f} on [[1,1,1,0],[1,0,0,0]]; the group-centred "
        f"ones have {centred:.4f}",
        "a group with equal rewards": f"advantage exactly {equal:g}, also where the rewards are no binary fractions",
        "token mean": "over one optimizer step: one mini-batch, all GPUs (DAPO's formula: over one group; its authors' recipe: as here)",
        "mini-batches": "stretches of the rollout, group after group; when dynamic sampling finds too few groups, as many and shorter",
        "a filtered response": f"{'counts neither' if filtered else 'COUNTS'} as tokens nor as a response; it still counts in the "
        "advantages' mean and std",
        "a dropped group": "counts nowhere but in the metrics of `rollout/` and `reward/`",
        "one problem twice in a batch": "where dynamic sampling passes the end of an epoch, with other samples",
        "overlong punishment": "with limit 20 and buffer 4: "
        + ", ".join(f"{p:g}" for p in penalty)
        + " at 16, 18, 20, 24 tokens. The limit is "
        "`--max_response_len`; the end token is counted",
        "KL": "of the sampled tokens at the sampling temperature, in the loss, without importance ratio; k1 has no pull, the gradient of "
        "k2 is that of KL(pi, ref), that of k3 is that of KL(ref, pi)",
        "the reference": "the model of `--model`, never updated; with LoRA the same model, adapter off",
        "LoRA": "all linear layers, alpha twice the rank, no dropout; the engine gets the sum",
        "the end token": "is trained",
        "a truncated response": "is graded like any other",
        "old log-probabilities": "the trainer's own, computed before the first update of a rollout",
        "a mini-batch with no response left": "no optimizer step",
        "learning rate": "linear warm-up over rollouts, then constant",
        "a sample's seed": "a function of (run seed, step, problem id, sample number): the same on any number of GPUs",
        "the canary's limits": ", ".join(f"{limit:g} nats in {kind}" for kind, limit in limits.items()),
    }
    return ["| | here |", "|---|---|", *(f"| {what} | {value} |" for what, value in said.items())]


def metrics():
    rows = ["| metric | meaning |", "|---|---|"]
    logged = {name: [s for s in SCRIPTS if name in names(s)] for s in SCRIPTS for name in names(s)}
    for key, meaning in METRICS.items():
        prefix, rest = key.rsplit("/", 1)[0], key.rsplit("/", 1)[1].split(", ")
        mine = logged.get(f"{prefix}/{rest[0]}", SCRIPTS)
        only = (
            "" if len(mine) == 3 or set().union(*map(names, SHARED)) & {f"{prefix}/{rest[0]}"} else f" ({mine[0]}.py)"
        )
        shown = [f"{prefix}/{rest[0]}", *rest[1:]]
        rows.append(f"| {ticks(shown)}{only} | {meaning} |")
    return rows


def names(script):
    """The metrics a file logs, from its calls log.mean("..."), row["..."] and so on; a name within {} stands as SET"""
    found = set()
    for node in ast.walk(ast.parse(source(script))):
        text = None
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in {"mean", "sum", "max", "lap"} and node.args:
            text = node.args[0]
        elif isinstance(node, ast.Subscript):
            text = node.slice
        if isinstance(text, ast.JoinedStr):
            text = "".join(part.value if isinstance(part, ast.Constant) else "SET" for part in text.values)
        elif isinstance(text, ast.Constant) and isinstance(text.value, str):
            text = f"time/{text.value}" if getattr(getattr(node, "func", None), "attr", "") == "lap" else text.value
        if isinstance(text, str) and re.fullmatch(r"(rollout|reward|adv|train|eval|time|perf)/[\w/]+", text):
            found.add(text)
    if "eval/SET/SET" in found:  # what `summary` finds of a set
        sample = {"correct": True, "tokens": 1, "truncated": False, "error": ""}
        found |= {f"eval/SET/{metric.replace('@1', '@K')}" for metric in evaluation.summary([sample] * 2, 1, 1)}
    found = {name.replace("prob_SET", "prob_P") for name in found}
    return found - {"time/SET", "eval/mean/accuracy", "eval/SET/SET", "eval/SET/SET_se"}


def agreement():
    rows = ["| ours | TRL 1.16's GRPOConfig |", "|---|---|"]
    for ours, theirs in CASES:
        rows.append("| {} | {} |".format(*(ticks(f"{k}={v}" for k, v in s.items()) for s in (ours, theirs))))
    return rows


def data():
    prepare, rows = load_module(ROOT / "data" / "prepare.py"), ["| set | problems | from | |", "|---|---|---|---|"]
    chosen = {
        "easy": "uniformly; as a stand-in for `--from`: gsm8k_train and level 1 of math_train",
        "medium": "the easiest by `difficulty`",
        "hard": "with probability proportional to `difficulty`",
        "dapo": "all",
    }
    for name in [*prepare.EVAL, *prepare.TIERS]:
        hub = prepare.SOURCES[prepare.TIERS.get(name, [name])[0]][0]
        link = f"[{hub}](https://huggingface.co/datasets/{hub})"
        rows.append(f"| `{name}` | {prepare.EXPECTED[name][0]:,} | {link} | {chosen.get(name, 'evaluation: all')} |")
    return rows


def museum():
    rows = ["| bug | in | what goes wrong | the test that turns red |", "|---|---|---|---|"]
    for path in PATCHES:
        file = re.search(r"^\+\+\+ b/(.+)$", path.read_text(), re.M)[1]
        test = head(path, "Test").removeprefix("tests/")
        rows.append(f"| [{path.stem}](tests/bugs/{path.name}) | {file} | {head(path, 'What')} | `{test}` |")
    return rows


def example():
    return [f"    {line}".rstrip() for line in (ROOT / "tests" / "gspo.patch").read_text().splitlines()]


def figures():
    rows = ["| figure | | picture |", "|---|---|---|"]
    for module in study.figures():
        name, title = module.__name__, module.__doc__.split("\n")[0].split(": ", 1)[1]
        rows.append(f"| [{name[3:5]}](plots/{name}.py) | {title} | [{name}.png](plots/figures/{name}.png) |")
    return rows


SECTIONS = {
    "study": study.markdown,
    "figures": figures,
    "sizes": sizes,
    "diff grpo.py lite_ppo.py": lambda: diff("lite_ppo"),
    "diff grpo.py dapo.py": lambda: diff("dapo"),
    "differences": differences,
    "tricks": tricks,
    "shared": shared,
    "machine": machine,
    "plan": node_plan,
    "data": data,
    "constants": constants,
    "metrics": metrics,
    "agreement": agreement,
    "museum": museum,
    "example": example,
}


def replaced(text, name, lines):
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, after = text.split(start)
    return before + start + "\n".join(["", *lines, "", ""]) + end + after.split(end, 1)[1]


@pytest.mark.parametrize("name", SECTIONS)
def test_the_readme_is_up_to_date(name):
    text = README.read_text()
    assert text == replaced(text, name, SECTIONS[name]()), "run `python tests/test_readme.py --write`"


def test_every_metric_is_explained_once():
    told = [f"{key.rsplit('/', 1)[0]}/{name}" for key in METRICS for name in key.rsplit("/", 1)[1].split(", ")]
    logged = set().union(*(names(s) for s in [*SCRIPTS, *SHARED]))
    assert len(told) == len(set(told)) and set(told) == logged


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_readme.py --write")
    text = README.read_text()
    for name, lines in SECTIONS.items():
        text = replaced(text, name, lines())
    README.write_text(text)
    for module in study.figures():
        Path(module.__file__).write_text(study.told(module))
