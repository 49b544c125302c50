"""How good a model is on the evaluation sets: avg@n and pass@k, each with its standard error."""

import json
import math
import re
import shutil

import numpy as np

from infra import trackers
from infra.engines import Sampling
from infra.policy import find
from infra.processes import distributed_map, rank
from infra.runs import append_jsonl, finite, jsonl, last_checkpoint, read_metrics, write_whole

SHOWN = 8  # responses of each set that samples.jsonl has of every evaluation
EVAL_SETTINGS = "eval_samples", "eval_pass_k", "eval_temperature", "eval_top_p", "eval_top_k", "eval_max_response_len"


def pass_at_k(n, right, k):
    """-> the chance that k of n responses, drawn without replacement, hold one of the `right` (arXiv 2107.03374)"""
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def summary(samples, n, k):
    """-> the metrics of one evaluation set. samples: n of each problem in a row

    accuracy       avg@n, n = `--eval_samples`
    pass@K         is one of K = `--eval_pass_k` responses right? Unbiased, from n
    accuracy_se    standard error, were the problems drawn from more of the kind; likewise `pass@K_se`
    response_len   tokens, mean over problems and responses; likewise `truncated`, `grader_errors`, shares"""
    right = np.reshape([s["correct"] for s in samples], (-1, n)).sum(1).tolist()  # of each problem
    found = {"accuracy": [c / n for c in right], f"pass@{k}": [pass_at_k(n, c, k) for c in right]}
    se = lambda values: np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan  # of one: none
    found |= {f"{name}_se": se(values) for name, values in found.items()}
    for name, key in (("response_len", "tokens"), ("truncated", "truncated"), ("grader_errors", "error")):
        found[name] = [s[key] if key == "tokens" else bool(s[key]) for s in samples]
    return {name: float(np.mean(value)) for name, value in found.items()}


def evaluate(engine, pool, log, step):
    """Logs avg@n and pass@k of every evaluation set, and their plain mean. Same seeds at every step.

    The last evaluation of a run leaves eval.json, and eval_samples.jsonl with every response and its grade."""
    a, n = log.args, log.args.eval_samples
    k = a.eval_pass_k or n
    how = Sampling(a.eval_temperature, a.eval_top_p, a.eval_top_k, a.eval_max_response_len)
    batch = engine.generate(log.eval_problems, n, "eval", how)
    grades = distributed_map(pool.grade, [(r.text, r.problem["answer"]) for r in batch])
    sets = {name: [] for name in dict.fromkeys(p["set"] for p in log.eval_problems)}
    for i, (r, grade) in enumerate(zip(batch, grades)):
        sample = {"step": step, "set": r.problem["set"], "id": r.problem["id"], "sample": i % n}
        sample |= {"problem": r.problem["problem"], "response": r.text, "answer": r.problem["answer"]}
        sample |= {"correct": grade.correct, "error": grade.error, "tokens": len(r.ids), "truncated": r.truncated}
        sets[r.problem["set"]].append(sample)
    scores = {name: summary(samples, n, k) for name, samples in sets.items()}
    mean = {name: np.mean([s[name] for s in scores.values()]) for name in ("accuracy", f"pass@{k}")}
    mean |= {f"{name}_se": math.hypot(*(s[f"{name}_se"] for s in scores.values())) / len(scores) for name in mean}
    scores["mean"] = mean
    for name, score in scores.items():
        for metric, value in score.items():
            log.mean(f"eval/{name}/{metric}", value)
    if rank() == 0:
        append_jsonl(log.folder / "samples.jsonl", shown := [s for some in sets.values() for s in some[:SHOWN]])
        trackers.log_samples(log.trackers, shown)
        if step == a.steps:
            how = {name: getattr(a, name) for name in EVAL_SETTINGS}
            found = {"model": a.model, "step": step, "settings": how}
            found["sets"] = {name: finite(score) for name, score in scores.items()}
            write_whole(log.folder / "eval.json", json.dumps(found, indent=1))
            write_whole(log.folder / "eval_samples.jsonl", jsonl(s for samples in sets.values() for s in samples))
    line = [f"{name} {s['accuracy']:.3f} ± {s['accuracy_se']:.3f}" for name, s in scores.items()]
    log.say(f"after {step} steps | " + " | ".join(line))
    for s in [samples[0] for samples in sets.values()][:2]:
        text = s["response"] if len(s["response"]) <= 600 else f"{s['response'][:300]} [...] {s['response'][-300:]}"
        log.say(f"  {s['problem']}  ->  {text}  ({'right' if s['correct'] else 'wrong'})")
    log.lap("eval", engine.waited())


def summarize(log):
    """Prints each set's accuracy in the first and the last evaluation, and the last one's pass@k, with standard errors.

    It leaves result.json, which marks the run as finished."""
    rows, names = evaluations_of(log.folder)
    result = {n: [rows[i][f"eval/{n}/accuracy"] for i in (0, -1)] for n in names}
    write_whole(log.folder / "result.json", json.dumps(result, indent=1))
    several, k = len(rows) > 1, log.args.eval_pass_k or log.args.eval_samples
    columns = {"before": (rows[0], "accuracy")} if several else {}
    columns |= {"after" if several else "accuracy": (rows[-1], "accuracy")}
    columns |= {f"pass@{k}": (rows[-1], f"pass@{k}")} if k > 1 else {}
    print(f"{'accuracy' if several else '':16s}" + "".join(f"{title:>17s}" for title in columns))
    for name in names:
        print(f"{name:16s}" + "".join(f"    {with_error(row, name, metric)}" for row, metric in columns.values()))


def evaluations_of(folder):
    """-> the rows of a run's evaluations, the names of its sets"""
    rows = [row for row in read_metrics(folder) if "eval/mean/accuracy" in row]
    return rows, [name.split("/")[1] for name in rows[0] if re.fullmatch("eval/.*/accuracy", name)]


def with_error(row, name, metric="accuracy"):
    error = row[f"eval/{name}/{metric}_se"]
    return f"{row[f'eval/{name}/{metric}']:.3f} ± {math.nan if error is None else error:.3f}"


def write_card(log):
    """A model card beside the weights of the last checkpoint: from what, how, how good with standard errors, the curves"""
    a, folder = log.args, last_checkpoint(log.folder)[1]
    if not folder:
        return
    rows, names = evaluations_of(log.folder)
    commit = json.loads((log.folder / "versions.json").read_text()).get("git", "of no git repository")
    head = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    head |= {} if find(a.model).is_dir() else {"base_model": a.model}
    head["tags"] = ["reinforcement-learning", a.script]
    how = ", ".join(f"{name} {getattr(a, name)}" for name in EVAL_SETTINGS)
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in head.items()), "---", f"# {log.folder.name}", ""]
    lines += [f"{a.model}, trained for {a.steps} steps on {a.data} by {a.script}.py ({commit}).", ""]
    lines += ["![curves](curves.png)", ""]
    lines += [f"Accuracy, avg@{a.eval_samples}, ± a standard error over problems ({how}):", ""]
    lines += ["| set | before | after |", "|---|---|---|"]
    lines += [f"| {name} | {with_error(rows[0], name)} | {with_error(rows[-1], name)} |" for name in names]
    lines += ["", "| setting | |", "|---|---|", *(f"| {k} | {v} |" for k, v in sorted(vars(a).items()))]
    write_whole(folder / "README.md", "\n".join(lines) + "\n")
    if (curves := log.folder / "curves.png").is_file():
        shutil.copy(curves, folder)
