"""What the pages say of sizes, tricks, metrics and constants is made from the code: this test fails when it is not.

`python tests/test_readme.py --write` writes it anew, between the marks `<!-- NAME -->` and `<!-- end -->` of every page, and
in the figures' docstrings what was found.
"""

import argparse
import ast
import difflib
import io
import json
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
from by_hand import load_module
from conftest import INFRA, ROOT, SCRIPTS, make_parser
from test_bugs import PATCHES, head
from test_papers import PAPERS as MORE_PAPERS
from test_papers import script_of
from test_plan import config
from test_structure import source
from test_trl import CASES, MODULES

import dapo
import lite_ppo
from data import evaluation
from infra import flags, plan, runs

# ------------------------------------------------------------------------------------------------------- the first page

PAPERS = {
    "grpo": ("GRPO", "2402.03300", "mean and std of the group, sequence mean, a KL"),
    "dapo": ("DAPO", "2503.14476", "Clip-Higher, token mean, dynamic sampling, length penalty"),
    "lite_ppo": ("Lite PPO", "2508.08221", "std of the batch, token mean, no KL"),
}


def sizes():
    rows = ["| arXiv | file | lines | what is in it | `diff grpo.py` |", "|---|---|---|---|---|"]
    for script in SCRIPTS:
        count = ["git", "diff", "--no-index", "--numstat", "grpo.py", f"{script}.py"]
        count = subprocess.run(count, cwd=ROOT, capture_output=True, text=True).stdout.split()
        changed = f"+{count[0]} -{count[1]}" if script != "grpo" else "-"
        paper, arxiv, what = PAPERS[script]
        rows.append(f"| {paper} [{arxiv}] | {counted(f'{script}.py', f'{script}.py')} | {what} | {changed} |")
    for patch in MORE_PAPERS:
        (paper, *_, arxiv), what = head(patch, "Paper").split(", "), head(patch, "What")
        changed = [len(re.findall(rf"^{mark}(?!{mark}{mark} )", patch.read_text(), re.M)) for mark in (r"\+", "-")]
        file = f"[{patch.stem}](tests/papers/{patch.name})"
        rows.append(
            f"| {paper} {arxiv.split()[1]} | {file} | | {what} | {script_of(patch)} +{changed[0]} -{changed[1]} |"
        )
    rows.append(f"| | {counted('rewards.py', 'rewards.py')} | the grader: text in, number out | |")
    rows.append(f"| | {counted('common.py', 'common.py')} | what a script calls, and the map of infra/ | |")
    infra = [f"infra/{name}.py" for name in INFRA]
    return rows + [f"| | {counted('infra/', *infra)} | {len(infra)} files, each with one subject | |"]


def counted(name, *files):
    return f"[{name}]({name}) | {sum(len(source(file).splitlines()) for file in files):,}"


def without_comments(text):
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]].rstrip()
    return lines


def math_of(script, choice):
    """-> the line of math that a choice stands for in a table of the script, or None"""
    lines = "\n".join(without_comments(source(f"{script}.py")))
    found = re.search(rf'^ +"{choice}": +lambda [^:]*: (.+),$', lines, re.M)
    return found and found[1]


def core(script):
    """What a script says, without comments, docstring and the making of flags: the defaults of its tricks, each with its
    line of math in the place of the table it is from, the functions and the loop"""
    text = source(f"{script}.py")
    lines, shown = without_comments(text), []
    for flag, (value, _) in MODULES[script].DEFAULTS.items():
        if flag not in flags.FLAGS:
            math = math_of(script, value)
            shown.append(f"--{flag} {value}".ljust(36) + math if math else f"--{flag} {value}")
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef) and node.name != "parse_args":
            shown += [line for line in lines[node.lineno - 1 : node.end_lineno] if line]
    return shown


def diff(script):
    changed = difflib.unified_diff(core("grpo"), core(script), n=0, lineterm="")
    shown = [line for line in list(changed)[2:] if not line.startswith("@@")]
    return [f"    {'<' if line[0] == '-' else '>'} {line[1:]}" for line in shown]


def ticks(names):
    return ", ".join(f"`{name}`" for name in names)


def tricks():
    """A row for each default of each flag: whose it is, the other choices, and what the flag is for"""
    rows = ["| flag | default | of | other choices; what it is |", "|---|---|---|---|"]
    for flag, actions in own_flags().items():
        text = max((re.sub(r" \[[^]]*\]$", "", a.help) for a in actions.values()), key=len)
        usual = {s: ", node ".join(map(str, dict.fromkeys(MODULES[s].DEFAULTS[flag]))) for s in actions}
        values = list(dict.fromkeys(usual.values()))
        others = dict.fromkeys(c for a in actions.values() for c in a.choices or [] if str(c) not in values)
        told = [x for x in (ticks(others), text) if x]
        told = told if len(values) > 1 else [". ".join(told)]
        for i, value in enumerate(values):
            mine = [s for s in actions if usual[s] == value]
            users = "all" if mine == SCRIPTS else ", ".join(mine)
            row = f"| {'' if i else f'`--{flag}`'} | `{value}` | {users} | "
            rows.append(f"{row}{cut(told[i], 118 - len(row)) if i < len(told) else ''} |")
    return rows


def cut(text, room):
    """The text, or its first clauses, as many as there is room for"""
    mark = ";" if ";" in text else ","
    clauses = text.split(mark)
    shorter = [mark.join(clauses[:n]) + "." for n in range(len(clauses) - 1, 0, -1)]
    return next((x for x in [text, *shorter] if len(x) <= room), text)


def own_flags():
    """-> for each flag of a trick the argparse actions of the scripts that have it"""
    found = {}
    for script in SCRIPTS:
        for action in make_parser(MODULES[script])._actions:
            if action.dest in MODULES[script].DEFAULTS and action.dest not in flags.FLAGS:
                found.setdefault(action.dest, {})[script] = action
    return found


# ------------------------------------------------------------------------------------------------------------- metrics

LOGGING = ["infra/runs.py", *(f"{script}.py" for script in SCRIPTS), "data/evaluation.py"]
PHASES = ["rollout", "reward", "adv", "train", "eval", "time", "perf"]
FILLED = {"rollout/repeat_ratio_{}": ["repeat_ratio_right", "repeat_ratio_wrong"], "rollout/prob_{}": ["prob_P"]}


def logged():
    """-> {metric: [(file, comment), ...]}, from log.mean("..."), sum, max and row["..."] = ...; {} where an f-string has one"""
    found = {}
    for file in LOGGING:
        text = source(file)
        tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type == tokenize.COMMENT]
        comments = {t.start[0]: t.string.removeprefix("# ") for t in tokens}
        alone = {t.start[0] for t in tokens if t.line.lstrip().startswith("#")}
        for node in ast.walk(ast.parse(text)):
            name = None
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args:
                if getattr(node.value.func, "attr", "") in {"mean", "sum", "max"}:
                    name = node.value.args[0]
            elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
                name = node.targets[0].slice
            parts = name.values if isinstance(name, ast.JoinedStr) else [name]
            name = "".join(str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts)
            if name.partition("/")[0] in PHASES and "/" in name:
                above = node.lineno - 1
                while above in alone:
                    above -= 1
                told = " ".join(comments[i] for i in range(above + 1, node.lineno))
                found.setdefault(name, []).append((file, comments.get(node.end_lineno, told)))
    return found


def phases():
    """-> the names of log.lap("..."), in the order of a step"""
    calls = [n for file in LOGGING for n in ast.walk(ast.parse(source(file))) if isinstance(n, ast.Call)]
    laps = [n for n in calls if getattr(n.func, "attr", "") == "lap" and isinstance(n.args[0], ast.Constant)]
    return list(dict.fromkeys(n.args[0].value for n in laps))


def told_of_evaluation():
    """-> [(metrics, meaning), ...] from the docstring of `summary`"""
    rows = re.findall(r"^    ([\w@]+)  +(.+)$", evaluation.summary.__doc__, re.M)
    return [([name, *re.findall(r"`(\w[^`]*)`", text.partition("likewise")[2])], text) for name, text in rows]


def metrics():
    rows = ["| metric | meaning (SET: an evaluation set, or `mean`, the plain mean of all) |", "|---|---|"]
    found, by_phase = logged(), {phase: [] for phase in PHASES}
    for name, places in found.items():
        phase, rest = name.split("/", 1)
        files, text = [file for file, _ in places], places[0][1]
        if phase in ("time", "eval"):
            continue
        only = f" ({', '.join(files)})" if set(files) < {f"{s}.py" for s in SCRIPTS} else ""
        first, *more = FILLED.get(name, [rest])
        by_phase[phase].append(f"| {ticks([f'{phase}/{first}', *more])}{only} | {text} |")
    by_phase["eval"] = [f"| `eval/SET/{names[0]}` | {text} |" for names, text in told_of_evaluation()]
    others = {n.removeprefix("time/"): p[0][1] for n, p in found.items() if n.startswith("time/") and "{" not in n}
    text = "; ".join([found["time/{}"][0][1], *(f"{name}: {text}" for name, text in others.items() if text)])
    first, *more = [*phases(), *others]
    by_phase["time"] = [f"| {ticks([f'time/{first}', *more])} | {text} |"]
    return rows + sum(by_phase.values(), [])


def test_every_metric_is_explained_once():
    told_elsewhere = {"eval/{}/{}", "time/step"}  # by the docstring of `summary`, by the comment of the phases
    for name, places in logged().items():
        texts = {text for _, text in places}
        assert name in told_elsewhere or (len(texts) == 1 and "" not in texts), f"{name} is explained as {texts}"
        assert "{" not in name or name in FILLED.keys() | {"time/{}", "eval/{}/{}"}, f"{name}: which ones?"
    sample = {"correct": True, "tokens": 1, "truncated": False, "error": ""}
    found = sorted(name.replace("@1", "@K") for name in evaluation.summary([sample] * 2, 1, 1))
    assert sorted(name for names, _ in told_of_evaluation() for name in names) == found


# ----------------------------------------------------------------------------------------------------- the other pages


def node_plan():
    """Of lite_ppo.py as the paper has it, from the configuration of Qwen3-4B"""
    args = argparse.Namespace(
        **{f: node for f, (_, node) in (flags.MACHINE | lite_ppo.DEFAULTS).items()}, reference=False
    )
    return [f"    {line}" for line in plan.report(args, plan.Shape(config("4B")), 8, 80).splitlines()]


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
        "std of the batch": f"of the raw rewards of the whole batch: {raw:.4f} on [[1,1,1,0],[1,0,0,0]]; the group-centred "
        f"ones have {centred:.4f}",
        "a group with equal rewards": f"advantage exactly {equal:g}, also where the rewards are no binary fractions",
        "token mean": "over one optimizer step: one mini-batch, all GPUs (DAPO's formula: over one group; its authors' recipe: as here)",
        "mini-batches": "stretches of the rollout, group after group; when dynamic sampling finds too few groups, as many and shorter",
        "a filtered response": f"{'counts neither' if filtered else 'COUNTS'} as tokens nor as a response; it still counts in the "
        "advantages' mean and std",
        "a dropped group": "counts nowhere but in the metrics of `rollout/` and `reward/`",
        "one problem twice in a batch": "where dynamic sampling passes the end of an epoch, with other samples",
        "soft overlong punishment": "with limit 20 and buffer 4: "
        + ", ".join(f"{p:g}" for p in penalty)
        + " at 16, 18, 20, 24 tokens. The limit is `--max_response_len`; EOS is counted",
        "KL": "of the sampled tokens at the sampling temperature, in the loss, without importance ratio; k1 has no pull, the gradient of "
        "k2 is that of KL(pi, ref), that of k3 is that of KL(ref, pi)",
        "the reference": "the model of `--model`, never updated; with LoRA the same model, adapter off",
        "LoRA": "all linear layers, alpha twice the rank, no dropout; the engine gets the sum",
        "EOS": "is trained",
        "a truncated response": "is graded like any other",
        "old log-probabilities": "the trainer's own, before the first update of a rollout; under `--old_logp rollout` the engine's, but of the fullest pack",
        "a mini-batch with no response left": "no optimizer step",
        "learning rate": "linear warm-up over training steps, then constant",
        "a sample's seed": "a function of (run seed, step, problem id, sample number): the same on any number of GPUs",
        "a stale engine": "stops the run: more than "
        + ", ".join(f"{limit:g} nats in {kind}" for kind, limit in limits.items()),
    }
    return ["| | here |", "|---|---|", *(f"| {what} | {value} |" for what, value in said.items())]


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


hunt = load_module(ROOT / "lab" / "hunt.py")


def museum():
    rows = ["| bug | in | what goes wrong |", "|---|---|---|"]
    for path in PATCHES:
        rows.append(f"| [{path.stem}](bugs/{path.name}) | {hunt.file_of(path)} | {head(path, 'What')} |")
    return rows


def answers():
    rows = ["| | level | in | what goes wrong | what shows it in 20 steps |", "|---|---|---|---|---|"]
    for number, path in hunt.bugs().items():
        told = (
            f"{hunt.file_of(path)}, [patch](../tests/bugs/{path.name}) | {head(path, 'What')} | {head(path, 'Curve')}"
        )
        rows.append(f"| {number} | {hunt.difficulty(path)} | {told} |")
    return rows


def log_index():
    """GitHub's anchor of a title has no marks, and hyphens for its spaces"""
    titles = re.findall(r"^## (\S+) (.+)$", source("LOG.md"), re.M)
    anchors = [re.sub(r"[^\w -]", "", f"{date} {title}".lower()).replace(" ", "-") for date, title in titles]
    return [f"- {date} [{title}](#{anchor})" for (date, title), anchor in zip(titles, anchors)]


# --------------------------------------------------------------------------------------------------------------- pages


def models():
    """From the tests that try each of them"""
    from test_models import REFUSED, TRAINED, VLLM

    kinds = lambda rows: ", ".join(dict.fromkeys(f"{name} (`{kind}`)" for name, (kind, *_) in rows.items()))
    lines = ["| | |", "|---|---|", f"| trained | {kinds(TRAINED)} |", f"| refused | {kinds(REFUSED)} |"]
    return [*lines, f"| sampled by vLLM too, in the gate | {'; '.join(VLLM)} |"]


def start():
    from data import tiny

    return tiny.start_table(json.loads((tiny.FOLDER / "start.json").read_text()))


def study():
    import study

    return study


PAGES = {
    "README.md": {
        "sizes": sizes,
        "diff grpo.py lite_ppo.py": lambda: diff("lite_ppo"),
        "tricks": tricks,
    },
    "plots/README.md": {
        "study": lambda: study().markdown(),
        "figures": lambda: study().figures_markdown(),
        "metrics": metrics,
    },
    "lab/README.md": {"lab": lambda: load_module(ROOT / "lab" / "runs.py").markdown()},
    "lab/answers.md": {"answers": answers},
    "data/README.md": {"data": data, "models": models, "start": start},
    "tests/README.md": {"plan": node_plan, "constants": constants, "agreement": agreement, "museum": museum},
    "LOG.md": {"index": log_index},
}


def replaced(text, name, lines):
    start, end = f"<!-- {name} -->\n", "<!-- end -->"
    before, after = text.split(start)
    return before + start + "\n".join(["", *lines, "", ""]) + end + after.split(end, 1)[1]


@pytest.mark.parametrize("page, name", [(page, name) for page in PAGES for name in PAGES[page]])
def test_the_pages_are_up_to_date(page, name):
    assert source(page) == replaced(source(page), name, PAGES[page][name]()), "python tests/test_readme.py --write"


def write():
    for page, sections in PAGES.items():
        text = source(page)
        for name, lines in sections.items():
            text = replaced(text, name, lines())
        (ROOT / page).write_text(text)
    for module in study().figures():
        Path(module.__file__).write_text(study().told(module))


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("python tests/test_readme.py --write")
    write()
