"""The figures: their commands, their arithmetic, how runs are started and read, and what is said of them."""

import importlib
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

import claims
import curves
import figure
import launch
import quick
import report
import study
import table as tables
from infra.runs import PROBABILITIES, finished
from trouble import troubles

FIGURES = study.figures()
USUAL = [module for module in FIGURES if not hasattr(module, "run")]  # all but figure 2, which trains nothing
COMMANDS = list(dict.fromkeys(c for module in USUAL for c in launch.commands(module)))


def id_of(module):
    return module.__name__


def settings(folder, **more):
    more = {"scale": "laptop", "seeds": 2, "jobs": 2, "steps": None} | more
    return Namespace(**more, runs=folder / "runs", out=folder / "figures")


def fake_run(folder, seed=1, steps=12, tokens=20):
    """A finished run's folder with the metrics, the clipped tokens and the shown responses of `steps` rollouts"""
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(seed), []
    for step in range(steps + 1):
        row = {"step": step}
        if step % 4 == 0:
            row |= {f"eval/{name}/accuracy": rng.uniform() for name in ("easy", "hard", "mean")}
            row |= {f"eval/{name}/accuracy_se": 0.02 for name in ("easy", "hard", "mean")}
        if step < steps:
            bins = {f"prob_{100 * low:.0f}": rng.uniform() for low in PROBABILITIES}
            rollout = {"accuracy", "response_len", "entropy", "repeat_ratio_right", "repeat_ratio_wrong"}
            row |= {f"rollout/{name}": value for name, value in (bins | {n: rng.uniform() for n in rollout}).items()}
            row |= {"rollout/truncated": 0.5, "rollout/truncated_right": 0.125}
            row |= {"reward/std": rng.uniform(), "train/clip_high": 0.001, "time/generate": 1.0, "time/update": 2.0}
        rows.append(row)
    clipped = [
        {"step": s, "low": [[" wait", 7, 2]], "high": [["so", 5, 3], ["2", 34, 1], [",", 9, 1]]} for s in range(steps)
    ]
    shown = {
        "problem": "what is 1 + 1? </script>",
        "answer": "2",
        "adv": 0.5,
        "tokens": ["<so>", " it"] * (tokens // 2),
    }
    shown |= {"ratio": [1.3, 0.9] * (tokens // 2), "entropy": [0.2, 1.1] * (tokens // 2), "low": [1], "high": [0]}
    sample = {"step": steps, "set": "easy", "id": "easy-1", "sample": 0, "problem": "p", "response": "r" * tokens}
    sample |= {"answer": "2", "correct": True}
    wrong = sample | {"step": 0, "set": "</script>", "correct": False, "response": "I do not know"}
    files = {
        "metrics": rows,
        "clipped": clipped,
        "tokens": [shown | {"step": s} for s in range(0, steps, 4)],
        "samples": [wrong, sample],
        "eval_samples": [sample, sample | {"sample": 1}],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("args", "result", "versions"):
        (folder / f"{name}.json").write_text("{}")
    return folder


# ------------------------------------------------------------------------------------------------------------- commands


def test_there_is_a_file_for_every_figure_that_is_no_text():
    named = [m.__name__ for m in FIGURES if m.__name__.startswith("fig")]
    assert [name[3:5] for name in named] == [f"{n:02d}" for n in (*range(1, 16), 18)]
    assert all(m.__name__[:4] in {f"why{n}" for n in study.TAKEAWAYS} for m in FIGURES[len(named) :])


def test_what_is_usual_are_the_scripts_defaults():
    import lite_ppo

    assert launch.USUAL == {flag: str(lite_ppo.DEFAULTS[flag][0]) for flag in launch.USUAL}


def test_every_command_is_one_of_a_script_and_all_runs_differ():
    """A folder's name is that of the pasted command, so that a run started by hand is found."""
    names = [launch.folder_name(f"{command} --seed 3") for command in COMMANDS]
    assert len(set(names)) == len(COMMANDS) - 1  # the limit of 128 tokens is said in figure 13 alone
    assert all(name.endswith("__s3") for name in names)
    assert launch.folder_name("lite_ppo.py --norm none --clip_high 0.20 --seed 2") == "lite_ppo__norm=none__s2"
    args = importlib.import_module("lite_ppo").parse_args(["--norm", "none", "--scale", "laptop"])
    assert args.out == "runs/" + launch.folder_name("lite_ppo.py --norm none")


def test_a_wrong_command_says_so(capsys):
    with pytest.raises(SystemExit):
        launch.folder_name("lite_ppo.py --norm nonsense")
    assert "invalid choice: 'nonsense'" in capsys.readouterr().err


def test_the_papers_runs(monkeypatch):
    """Only what the figure switches is left of the laptop's flags, and the scripts take it."""
    command = (
        "lite_ppo.py --norm none --model data/tiny/aligned --max_response_len 56 --minibatches 16 --lr 2e-4 --steps 40"
    )
    assert launch.at_node(command, "8B") == "lite_ppo.py --norm none --model Qwen/Qwen3-8B --max_response_len 8192"
    for module in USUAL:
        for at in figure.commands_at(module, "node"):
            launch.folder_name(f"{at} --scale node")
    bench = launch.at_node("dapo.py --data easy", "4B")
    args = importlib.import_module("dapo").parse_args([*bench.split()[1:], "--scale", "node"])
    study_of = importlib.import_module("lite_ppo").DEFAULTS
    same = "prompts_per_step group_size minibatches warmup_steps weight_decay temperature top_p top_k max_response_len lr".split()
    assert {flag: getattr(args, flag) for flag in same} == {flag: study_of[flag][1] for flag in same}


def test_node_prints_what_to_paste():
    done = subprocess.run(
        [sys.executable, "plots/fig06_std_scope.py", "--scale", "node"], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 8 and all(
        line.startswith("accelerate launch lite_ppo.py --norm group_mean_") for line in lines
    )
    assert sum("Qwen/Qwen3-8B-Base" in line for line in lines) == 4 and "--steps" not in done.stdout


# ---------------------------------------------------------------------------------------------------------- arithmetics


def test_smooth_by_hand():
    """2, 0, 1, 1 with a window of 3: means 2, 1, 1, 2/3; with factor 0.5 then 2, 3/2, 5/4, 23/24"""
    assert np.allclose(tables.smooth([2, 0, 1, 1], window=3, factor=0.5), [2, 3 / 2, 5 / 4, 23 / 24])


def test_measures_by_hand():
    """Of evaluations 0.2, 0.6, 0.8, 0.5, 0.7 the first is that of the untrained model, and two are an end; of steps here one is all"""
    values = {"eval/x": {0: 0.2, 10: 0.6, 20: 0.8, 30: 0.5, 40: 0.7}, "y": {s: float(s) for s in range(30)}}
    steps = sorted({step for one in values.values() for step in one})
    rows = [{"command": "a.py", "seed": 1, "step": s} | {m: v.get(s) for m, v in values.items()} for s in steps]
    t = tables.Table(rows)
    for metric, expected in {
        "eval/x": {"area": 0.65, "end": 0.6, "gain": 0.4, "drop": 0.3},
        "y": {"area": 14.5, "end": 24.5, "gain": 20.0, "drop": 0.0},
    }.items():
        assert {name: t.value("a.py", metric, name)[1] for name in tables.MEASURES} == pytest.approx(expected)
    assert tables.Table(rows[:1]).value("a.py", "eval/x", "end") == {1: pytest.approx(0.2)}


def test_iqm_by_hand():
    """Of eight values the middle four; of five, 1.25 go at each end: (0.75 x 2 + 3 + 0.75 x 10) / 2.5"""
    assert tables.iqm([9, 1, 2, 3, 4, 5, 6, 100]) == pytest.approx((3 + 4 + 5 + 6) / 4)
    assert tables.iqm([1, 2, 3, 10, 99]) == pytest.approx((1.5 + 3 + 7.5) / 2.5)


def test_the_interval_covers_the_mean_of_five_seeds():
    """Of 2,000 draws of five normal numbers 95 % have the true mean in their interval, 27 at once in 99.8 %"""
    draws = np.random.default_rng(1).normal(size=(2000, 5))
    for level in (0.95, 1 - 0.05 / 27):
        found = [tables.interval(values, level) for values in draws]
        assert np.mean([low <= 0 <= high for low, high in found]) == pytest.approx(level, abs=0.01)
    assert tables.interval([1, 2, 3, 4, 5]) == pytest.approx((3 - 1.963, 3 + 1.963), abs=1e-3)  # 2.776 sqrt(2.5 / 5)


def test_one_seed_has_no_interval():
    assert np.isnan(tables.interval([0.5])).all()


def test_seeds_that_agree_to_the_last_digit():
    assert tables.interval([0.25, 0.25, 0.25]) == (0.25, 0.25)


def scores(ends):
    """{command: final scores of its seeds} -> evaluations of which the last two have that mean"""
    rows = []
    for command, scores in ends.items():
        for seed, score in enumerate(scores, start=1):
            values = {0: 0.0, 10: score - 0.05, 15: None, 20: score + 0.05}
            rows += [{"command": command, "seed": seed, "step": step, tables.SCORE: v} for step, v in values.items()]
    return tables.Table(rows)


def t_rows(t):
    """A table's rows again"""
    made = [{"command": c, "seed": 1, "step": None} for c in t.commands if not t.series[c]]
    for command, seeds in t.series.items():
        for seed, one in seeds.items():
            made += [{"command": command, "seed": seed, "step": s, tables.SCORE: v} for s, v in zip(*one[tables.SCORE])]
    return made


def test_claims():
    """The differences are taken seed by seed and averaged over the panels; what is not comparable takes no part."""
    group, batch = "lite_ppo.py --norm group_mean_group_std", "lite_ppo.py --norm batch_mean_batch_std"
    ends = {
        f"{group} --data easy": [0.520, 0.521, 0.519, 0.520, 0.520],
        f"{batch} --data easy": [0.4, 0.4, 0.4, 0.4, 0.4],
        f"{group} --data hard": [0.5, 0.5, 0.5, 0.5, 0.5],
        f"{batch} --data hard": [0.4, 0.5, 0.4, 0.4, 0.6],
        f"{batch} --data hard --wrong_reward -1": [0.9] * 5,
    }
    t, norm = scores(ends), {"flag": "norm", "better": "group_mean_group_std", "worse": "batch_mean_batch_std"}
    swapped = norm | {"better": norm["worse"], "worse": norm["better"]}
    easy, hard = {"where": {"data": "easy"}}, {"where": {"data": "hard"}}

    def verdict(**how):
        return claims.Claim("", **how).verdict(t)

    claim = claims.Claim("better", **norm)
    assert len(claim.sides(t)) == 2
    assert claim.differences(t) == pytest.approx([0.11, 0.0605, 0.1095, 0.11, 0.01])
    assert claims.Claim("", **norm, **hard).differences(t) == pytest.approx([0.1, 0, 0.1, 0.1, -0.1])
    assert verdict(**norm, **hard) == "not seen"
    assert claims.Claim("better", **norm, **easy).sentence(t) == "better: seen, +0.120 [+0.119, +0.121]"
    assert verdict(**swapped, **easy) == "opposite" and verdict(**swapped, **easy, expect="no more") == "seen"
    assert verdict(**swapped, **easy, expect="the same") == "opposite"
    assert verdict(**norm, **easy, expect="no more") == "opposite"
    assert verdict(**norm, **hard, expect="the same", small=0.5) == "seen"
    assert verdict(**norm, **hard, small=0.2) == "excluded"
    assert re.fullmatch(r"x: not seen \(less than 0\.15\d\), .*", claims.Claim("x", **norm, **hard).sentence(t))
    assert claims.Claim("better", "norm", "none", claim.better).sentence(t) == "better: open, no runs"
    missing = tables.Table([*t_rows(t), {"command": f"{group} --data medium", "seed": 1, "step": None}])
    assert claim.verdict(missing) != "open"  # nothing to compare it with
    missing = tables.Table([*t_rows(missing), {"command": f"{batch} --data medium", "seed": 1, "step": None}])
    assert claim.verdict(missing) == "open"  # a panel that should be there is not
    few = scores({command: scores[:4] for command, scores in ends.items()})
    assert claims.Claim("better", **norm, **easy).sentence(few) == "better: open, +0.120 in 4 seeds"


def test_a_verdict_holds_for_all_claims_at_once():
    """0.02 with a standard deviation of 0.01 over five seeds: 95 % alone would call that seen"""
    ends = {f"lite_ppo.py --norm {n} --data easy": [0.5] * 5 for n in ("none", "batch_mean")}
    ends["lite_ppo.py --norm batch_mean --data easy"] = [0.51, 0.515, 0.52, 0.525, 0.53]
    claim = claims.Claim("", "norm", "batch_mean", "none", small=0.01)
    t = scores(ends)
    assert claim.effect(t)[1] > 0 and claim.verdict(t) == "not seen"
    assert claims.FAMILY == sum(claim.takeaway > 0 for module in FIGURES for claim in module.CLAIMS)


def test_a_line_through_four_bounds():
    """Of 0.20, 0.24, 0.28, 0.32 the slope of least squares: weights -0.9, -0.3, 0.3, 0.9 over the whole range"""
    found = dict(zip(("0.2", "0.24", "0.28", "0.32"), (0.50, 0.56, 0.52, 0.58)))
    t = scores({f"lite_ppo.py --data easy --clip_high {high}": [end] for high, end in found.items()})
    claim = claims.Claim("", "clip_high", "0.32", "0.2", between=("0.28", "0.24"))
    assert claim.differences(t) == pytest.approx([0.9 * (0.58 - 0.50) + 0.3 * (0.52 - 0.56)])


def test_every_claim_finds_its_pairs():
    """At both scales; and each is between runs of one panel"""
    for module in USUAL:
        for scale in ("laptop", "node"):
            every = tables.Table([{"command": c, "seed": 1, "step": 0} for c in figure.commands_at(module, scale)])
            for claim in module.CLAIMS:
                sides = claim.sides(every)
                assert sides, (module, scale, claim)
                same = {"kind", "model", "size"} if claim.flag != "kind" else {"data"}
                assert all(
                    launch.flags_of(a)[k] == launch.flags_of(b)[k]
                    for a, *others in sides
                    for b in others
                    for k in same - {claim.flag}
                ), claim


# ------------------------------------------------------------------------------------------------------------- starting


FAKE = """
import json, pathlib, sys, time
args = sys.argv[2:]
folder = pathlib.Path(args[args.index("--resume" if "--resume" in args else "--out") + 1])
folder.mkdir(exist_ok=True)
with open(folder / "calls", "a") as f: f.write(" ".join(args) + chr(10))
if "bad" in folder.name: sys.exit("no good")
time.sleep(float(args[args.index("--sleep") + 1]) if "--sleep" in args else 0)
(folder / "result.json").write_text("{}")
"""


def test_launch(tmp_path, capfd):
    """Finished runs are not started again, one that was stopped goes on, one that fails is told and the others run."""
    (tmp_path / "fake.py").write_text(FAKE)
    done, begun, fresh, bad = (tmp_path / name for name in ("done", "begun", "fresh", "bad"))
    done.mkdir()
    begun.mkdir()
    (done / "result.json").write_text("{}")
    todo = [("x.py --a 1", run) for run in (done, bad, begun, fresh)]
    assert launch.launch(todo, 2, (sys.executable, str(tmp_path / "fake.py"))) == 1
    assert not (done / "calls").exists()
    assert (begun / "calls").read_text() == f"--resume {begun}\n"
    assert (fresh / "calls").read_text() == f"--a 1 --out {fresh}\n"
    assert finished(fresh) and finished(begun)
    assert "bad: ended with 1" in capfd.readouterr().err and "no good" in (tmp_path / "bad.log").read_text()


def test_jobs_run_side_by_side_and_end_with_the_program(tmp_path):
    (tmp_path / "fake.py").write_text(FAKE)
    code = "import sys, pathlib, launch; folder = pathlib.Path(sys.argv[1]); "
    code += (
        "launch.launch([('x.py --sleep 60', folder / n) for n in 'abc'], 2, (sys.executable, sys.argv[1] + '/fake.py'))"
    )
    env = os.environ | {"PYTHONPATH": str(ROOT / "plots")}
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], env=env, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*/calls"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    assert not (tmp_path / "c").exists() and not list(tmp_path.glob("*/result.json"))
    left = subprocess.run(["pgrep", "-f", str(tmp_path / "fake.py")], capture_output=True, text=True).stdout
    assert not left.strip()


def test_a_run_that_another_command_has_started_is_left_alone(tmp_path, capfd):
    (tmp_path / "fake.py").write_text(FAKE)
    launcher = (sys.executable, str(tmp_path / "fake.py"))
    process = launch.start_run("x.py --sleep 60", tmp_path / "a", launcher, 0, 1)
    assert launch.launch([("x.py", tmp_path / "a"), ("x.py", tmp_path / "b")], 2, launcher) == 0
    assert finished(tmp_path / "b") and not finished(tmp_path / "a")
    assert "a: left out; another command is running it" in capfd.readouterr().err
    process.kill()
    process.wait()


def test_jobs_share_the_cores():
    before = os.sched_getaffinity(0)
    with launch.share_of_cores(0, 2):
        first = os.sched_getaffinity(0)
    with launch.share_of_cores(1, 2):
        second = os.sched_getaffinity(0)
    assert os.sched_getaffinity(0) == before
    if len(before) > 1:
        assert first | second == before and not first & second


def test_real_runs_become_a_figure(tmp_path):
    """The two commands of figure 10 with one seed and two steps, stopped after the first, and resumed"""
    command = [
        sys.executable,
        "plots/fig10_clipped_tokens.py",
        "--run",
        "--seeds",
        "1",
        "--steps",
        "2",
        "--runs",
        str(tmp_path),
    ]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 200
    while not list(tmp_path.glob("*/result.json")):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    process.terminate()
    process.communicate()
    first = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/result.json")}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(first) == 1 and len(list(tmp_path.glob("*/result.json"))) == 2
    assert all(path.stat().st_mtime_ns == then for path, then in first.items())  # they were not run again
    rows = tables.read_table(tmp_path / "figures_2" / "fig10_clipped_tokens.csv")
    assert {row["command"] for row in rows} == set(launch.commands(sys.modules["fig10_clipped_tokens"]))
    assert sum(row["count"] or 0 for row in rows if row["kind"] == "low") > 10  # of real runs
    assert (tmp_path / "figures_2" / "fig10_clipped_tokens.png").stat().st_size > 10_000


# -------------------------------------------------------------------------------------------------------------- reading


def assert_drawn(figure, module):
    """Every axis shows numbers: a line, a bar, or of figure 10 the words of a response"""
    for ax in figure.axes:
        lines = [
            line
            for line in ax.lines
            if len(line.get_xdata()) and np.isfinite(np.asarray(line.get_ydata(), float)).any()
        ]
        assert lines or any(bar.get_width() and bar.get_height() for bar in ax.patches) or len(ax.texts) > 10, module


@pytest.mark.parametrize("module", USUAL, ids=id_of)
def test_a_figure_from_run_folders(module, tmp_path):
    """Collected from folders of two seeds, of which one is missing; drawn from the table that this makes"""
    args = settings(tmp_path)
    made = figure.runs_of([module], args)
    for _, seed, full in made[:-1]:
        fake_run(args.runs / launch.folder_name(full), seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "launch", lambda *_: 0)
        assert figure.run([module], args) == 0
    rows = tables.read_table(args.out / f"{module.__name__}.csv")
    assert set(tables.Table(rows).commands) == set(launch.commands(module))
    assert_drawn(module.draw(rows), module)
    assert figure.draw(module, args.out).stat().st_size > 10_000


def test_a_response_is_shown_of_any_seed(tmp_path, monkeypatch):
    """On a node, whose seeds begin at 42, figure 10 shows of each command and model the response with most tokens clipped above"""
    monkeypatch.setattr(figure, "launch", lambda *_: 0)
    module, args = sys.modules["fig10_clipped_tokens"], settings(tmp_path, scale="node")
    for _, seed, full in figure.runs_of([module], args):
        run = fake_run(args.runs / launch.folder_name(full), seed)
        if seed == 43:
            (run / "tokens.jsonl").write_text(
                (run / "tokens.jsonl").read_text().replace('"high": [0]', '"high": [0, 2]')
            )
    assert figure.run([module], args) == 0
    shown = [row for row in tables.read_table(args.out / "fig10_clipped_tokens.csv") if "shown" in (row["kind"] or "")]
    assert len(shown) == 4 * 20 and {row["seed"] for row in shown} == {43}
    assert sum(row["kind"] == "shown high" for row in shown) == 4 * 2


def test_loops_are_pooled(tmp_path, monkeypatch):
    """A rollout with one truncated response counts for less than one with many; what is missing counts for nothing."""
    monkeypatch.setattr(figure, "launch", lambda *_: 0)
    module, args = sys.modules["fig14_repeat_ratio"], settings(tmp_path, seeds=1)
    many = {"truncated": 0.5, "truncated_right": 0.1, "repeat_ratio_right": 0.5, "repeat_ratio_wrong": 0.25}
    one = {"truncated": 0.1, "truncated_right": 0.0, "repeat_ratio_wrong": 1.0}
    for _, _, full in figure.runs_of([module], args):
        run = fake_run(args.runs / launch.folder_name(full))
        rows = [{"step": s} | {f"rollout/{k}": v for k, v in row.items()} for s, row in enumerate((many, one, {}))]
        rows[-1][tables.SCORE] = 0.5
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert figure.run([module], args) == 0
    rows = tables.read_table(args.out / "fig14_repeat_ratio.csv")
    assert [row[module.WRONG] for row in rows[:3]] == [pytest.approx((0.4 * 0.25 + 0.1) / 0.5), None, None]
    assert "5.00% truncated with a right answer, of which 50% loop" in module.found(rows)
    assert "25.00% truncated with a wrong answer, of which 40% loop" in module.found(rows)
    drawn = module.draw(rows).axes[0].lines[0]
    assert drawn.get_label() == "limit 56, right answer" and drawn.get_ydata() == pytest.approx([0.5, 0.5])


def test_what_cannot_be_read_is_told_in_a_line_and_the_rest_is_drawn(tmp_path, capsys):
    """Damaged, empty, unfinished, of another version, not there: one line each"""
    module = sys.modules["fig03_dynamics"]
    args = settings(tmp_path, seeds=1)
    folders = [args.runs / launch.folder_name(full) for _, _, full in figure.runs_of([module], args)]
    for folder in folders[:5]:
        fake_run(folder)
    good, damaged, empty, begun, old, missing = folders
    text = (damaged / "metrics.jsonl").read_text()
    (damaged / "metrics.jsonl").write_text(text[: len(text) // 2])
    (empty / "metrics.jsonl").write_text("")
    (begun / "result.json").unlink()
    rows = [json.loads(line) for line in (old / "metrics.jsonl").read_text().splitlines()]
    rows = [{k.replace("rollout/response_len", "length"): v for k, v in row.items()} for row in rows]
    (old / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "launch", lambda *_: 0)
        figure.run([module], args)
    lines = capsys.readouterr().err.splitlines()
    told = {
        folder: [line.removeprefix(f"{folder}: ") for line in lines if line.startswith(f"{folder}:")]
        for folder in folders
    }
    assert told[good] == [] and told[begun] == ["left out; not finished"] and told[missing] == ["left out; not there"]
    assert told[empty] == ["left out; metrics.jsonl is missing, empty, or not of a run"]
    assert [line.startswith(f"{damaged}/metrics.jsonl, line ") for line in lines].count(True) == 1
    assert told[damaged] == ["left out; its last evaluation cannot be read"]
    assert told[old] == ["has no rollout/response_len; it is of another version, or logged less"] and len(lines) == 6
    rows = tables.read_table(args.out / "fig03_dynamics.csv")
    assert len({row["command"] for row in rows if row["step"] is not None}) == 2
    figure.draw(module, args.out)
    curves.draw(folders, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_of_several_runs(tmp_path):
    """Seeds are one line with a band, lines are named by the flags that differ, and a value that is null is no point."""
    folders = []
    for norm, seed in (("none", 1), ("none", 2), ("none", 3), ("group_mean", 1)):
        folder = fake_run(tmp_path / f"{norm}{seed}", seed)
        flags = {"script": "lite_ppo", "norm": norm, "lr": 1e-4, "seed": seed}
        (folder / "args.json").write_text(json.dumps(flags))
        folders.append(folder)
    rows = [json.loads(line) for line in (folders[1] / "metrics.jsonl").read_text().splitlines()]
    rows[3]["rollout/accuracy"] = None
    (folders[1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    named = curves.lines(folders)
    assert list(named) == ["norm=none (3 seeds)", "norm=group_mean"]
    steps, values = curves.curve(named["norm=none (3 seeds)"], "rollout/accuracy")
    assert list(steps) == [s for s in range(12) if s != 3] and values.shape == (3, 11)
    assert list(curves.PANELS)[0] == "rollout/accuracy" and "reward/mean" not in curves.PANELS
    (folders[3] / "args.json").write_text(json.dumps({"script": "grpo", "kl_coef": 0.04, "seed": 1}))
    assert list(curves.lines(folders)) == ["lite_ppo (3 seeds)", "grpo"]
    assert list(curves.lines(folders[:1])) == ["lite_ppo"]
    again = Path(shutil.copytree(folders[0], tmp_path / "broken"))  # by changed code, the same flags and seed
    assert list(curves.lines([folders[0], again])) == [f"lite_ppo: {folders[0]}", f"lite_ppo: {again}"]
    (folders[0] / "args.json").write_text('{"script": "li')
    (folders[1] / "args.json").unlink()
    assert list(curves.lines(folders[:2])) == [str(folder) for folder in folders[:2]]  # each stands for itself
    assert curves.draw(folders, tmp_path / "curves.png") and (tmp_path / "curves.png").stat().st_size > 10_000


def test_curves_by_a_pattern_as_a_table(tmp_path):
    """What a launcher left beside a run's folder, its log, is none; numbers are mean and deviation over the seeds."""
    for seed in (1, 2):
        folder = fake_run(tmp_path / f"run__s{seed}", seed)
        (folder / "args.json").write_text(json.dumps({"script": "lite_ppo", "seed": seed}))
        (tmp_path / f"run__s{seed}.log").write_text("")
    where = ["--out", tmp_path / "c.png", "--csv", tmp_path / "c.csv", "--metrics", "reward/std,eval/easy/accuracy"]
    command = [sys.executable, "plots/curves.py", f"{tmp_path}/run__*", *where]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    rows = tables.read_table(tmp_path / "c.csv")
    assert {row["metric"] for row in rows} == {"reward/std", "eval/easy/accuracy"} and len(rows) == 12 + 4
    ends = [curves.read_metrics(tmp_path / f"run__s{seed}")[8]["reward/std"] for seed in (1, 2)]
    [row] = [row for row in rows if row["step"] == 8 and row["metric"] == "reward/std"]
    assert row["runs"] == "lite_ppo (2 seeds)" and row["seeds"] == 2
    assert row["mean"] == pytest.approx(np.mean(ends), rel=1e-3)
    assert row["sd"] == pytest.approx(np.std(ends, ddof=1), rel=1e-3)
    short = tmp_path / "run__s2" / "metrics.jsonl"  # a run that goes on
    short.write_text("".join(short.read_text().splitlines(True)[:5]))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "(2 seeds), reward/std: to step 4, where one of the runs ends, not 11" in done.stderr


@pytest.mark.parametrize("where", ["launch", "fig02_difficulty.run"])
def test_ctrl_c_ends_in_a_line(where, tmp_path, monkeypatch):
    """While the runs go on, and in what a figure starts by itself"""

    def stopped(*_):
        raise KeyboardInterrupt

    name, _, call = where.rpartition(".")
    monkeypatch.setattr(sys.modules[name or "figure"], call, stopped)
    with pytest.raises(SystemExit, match="stopped; the same command goes on"):
        figure.run([sys.modules["fig02_difficulty"]], settings(tmp_path))


def test_curves_of_nothing(tmp_path):
    """A folder that is no run, a metric that nobody logged: a line each, status 1 and no empty picture"""
    run, out = fake_run(tmp_path / "run"), tmp_path / "curves.png"
    for folders, metrics, said in (
        ([tmp_path / "nowhere"], "train/kl", [f"{tmp_path}/nowhere: left out", "nothing to draw"]),
        ([run], "train/kl", ["train/kl: no run has it", "nothing to draw"]),
    ):
        command = [sys.executable, "plots/curves.py", *folders, "--metrics", metrics, "--out", out]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        lines = done.stderr.splitlines()
        assert done.returncode == 1 and len(lines) == 2 and not out.exists(), done.stderr
        assert all(line.startswith(start) for line, start in zip(lines, said))


@pytest.mark.parametrize("name", ["fig09_token_prob", "fig10_clipped_tokens", "fig14_repeat_ratio"])
def test_figures_of_tokens_from_runs_that_logged_none(name, tmp_path, capsys):
    """One run of --log_tokens off, one without the files, one truncated: they are told, the others are drawn"""
    module, args = sys.modules[name], settings(tmp_path, seeds=2)
    folders = [fake_run(args.runs / launch.folder_name(full)) for _, _, full in figure.runs_of([module], args)]
    for file in ("clipped.jsonl", "tokens.jsonl"):
        (folders[0] / file).write_text("")
        (folders[1] / file).unlink()
        (folders[-1] / file).write_text('{"step": 0, "lo')
    rows = [json.loads(line) for line in (folders[0] / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if not k.startswith(("rollout/prob", "rollout/repeat"))} for row in rows]
    (folders[0] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "launch", lambda *_: 0)
        assert figure.run([module], args) == 0
    assert figure.draw(module, args.out).stat().st_size > 10_000
    assert str(folders[0 if name != "fig10_clipped_tokens" else -1]) in capsys.readouterr().err


def test_a_figure_that_fails_does_not_take_the_others_with_it(tmp_path, capsys):
    good, bad, args = sys.modules["fig06_std_scope"], sys.modules["fig05_std"], settings(tmp_path, seeds=1)
    for _, _, full in figure.runs_of([good, bad], args):
        if not (args.runs / launch.folder_name(full)).exists():
            fake_run(args.runs / launch.folder_name(full))
    args.run = True
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure, "launch", lambda *_: 0)
        patch.setattr(bad, "collect", lambda mine: [][0], raising=False)
        assert figure.work([bad, good], args) == 2  # its table and its picture
    assert "fig05_std: no table; IndexError" in capsys.readouterr().err
    assert (args.out / "fig06_std_scope.png").is_file()


@pytest.mark.parametrize("name", ["fig06_std_scope", "fig10_clipped_tokens", "fig14_repeat_ratio"])
def test_a_run_that_a_table_has_is_not_run_again(name, tmp_path, monkeypatch):
    """Its folder is gone, as on another machine: its rows stay, those of a new seed are added, those of another command go."""
    module, started = sys.modules[name], []
    monkeypatch.setattr(figure, "launch", lambda todo, *_: started.extend(run for _, run in todo) or 0)
    args = settings(tmp_path, seeds=1)
    for _, _, full in figure.runs_of([module], args):
        fake_run(args.runs / launch.folder_name(full))
    assert figure.run([module], args) == 0 and len(started) == len(launch.commands(module))
    path = figure.table_path(module, args.out)
    first, lines = tables.read_table(path), path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[1].replace("--data", "--lr 1 --data")]) + "\n")
    args.runs.rename(tmp_path / "gone")
    args.seeds, started[:] = 2, []
    assert figure.run([module], args) == 0
    assert len(started) == len(launch.commands(module)) and all(run.name.endswith("__s2") for run in started)
    now = tables.read_table(path)
    assert [row for row in now if row["seed"] == 1] == first and {row["seed"] for row in now} == {1, 2}
    assert {row["command"] for row in now} == set(launch.commands(module))
    assert figure.draw(module, args.out).stat().st_size > 10_000


def test_the_figures_of_some_takeaways(monkeypatch, capsys):
    monkeypatch.setattr(study, "work", lambda modules, args: print(*(m.__name__[:5] for m in modules)) or 0)
    monkeypatch.setattr(study, "overview", lambda *_: "")
    for flags, said in (["--claims", "3,9"], "fig06 fig15 why9_"), ([], "fig01 fig02 fig03"):
        monkeypatch.setattr(sys, "argv", ["study.py", *flags])
        with pytest.raises(SystemExit, match="False"):
            study.main()
        assert capsys.readouterr().out.startswith(said)
    monkeypatch.setattr(sys, "argv", ["study.py", "--claims", "3,12"])
    with pytest.raises(SystemExit):
        study.main()
    assert "give some of 1,2,3,4,5,6,7,8,9" in capsys.readouterr().err


def test_the_largest_effects():
    """In standard deviations over the seeds, of decided claims, each of another takeaway, and the pair that shows it most"""
    group, batch = "lite_ppo.py --norm group_mean_group_std", "lite_ppo.py --norm batch_mean_batch_std"
    high = group + " --data hard --clip_high"
    ends = {
        f"{group} --data easy": [0.51, 0.52, 0.53, 0.54, 0.55],
        f"{batch} --data easy": [0.4] * 5,
        f"{group} --data hard": [0.51, 0.52, 0.53, 0.54, 0.55],
        f"{batch} --data hard": [0.4, 0.41, 0.42, 0.43, 0.441],
        f"{high} 0.28": [0.5, 0.6, 0.4, 0.3, 0.5],
        f"{high} 0.32": [0.3, 0.301, 0.3, 0.3, 0.301],
    }
    t = scores(ends)
    norm = {"flag": "norm", "better": "batch_mean_batch_std", "worse": "group_mean_group_std"}
    clip = {"flag": "clip_high", "worse": "0.2"}
    found = [
        (4, None, claims.Claim("nothing", better="0.28", **clip), t),
        (6, None, claims.Claim("by a line", better="0.32", between=("0.28",), **clip), t),
        (0, None, claims.Claim("of no takeaway", better="0.32", **clip), t),
        (1, None, claims.Claim("worse", **norm), t),
        (2, None, claims.Claim("no curve", **norm, metric="connectives"), t),
    ]
    assert [(claim.text, pair[0]) for claim, pair in quick.largest(found)] == [("worse", f"{batch} --data hard")]
    found += [(4, None, claims.Claim("larger", better="0.32", **clip), t)]
    assert [claim.text for claim, _ in quick.largest(found)] == ["worse", "larger"]
    assert [claim.text for claim, _ in quick.largest(found, 1)] == ["worse"]


def test_a_quick_study(tmp_path, monkeypatch, capsys):
    """Three pairs of commands that the study has too, three seeds each, in one picture"""
    monkeypatch.setattr(sys, "argv", ["study.py", "--quick", "--runs", str(tmp_path)])
    fake = lambda todo, jobs, _: [fake_run(run, int(command.split()[-1])) for command, run in todo] and jobs - 2
    monkeypatch.setattr(figure, "launch", fake)
    with pytest.raises(SystemExit, match="False"):
        study.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "figures" / "quick.png")
    rows = tables.read_table(tmp_path / "figures" / "quick.csv")
    effects = quick.largest(study.all_claims())
    assert {row["command"] for row in rows} == {command for _, pair in effects for command in pair} <= set(COMMANDS)
    assert {row["seed"] for row in rows} == {1, 2, 3}
    assert_drawn(quick.draw(rows, effects), "quick")


def test_tables_of_other_runs_do_not_replace_the_laptops(monkeypatch):
    for flags, folder in {
        "": figure.FIGURES,
        "--run": ROOT / "runs" / "figures",
        "--run --runs x --steps 10": Path("x/figures_10"),
        "--run --scale node": ROOT / "runs" / "figures_node",
        "--run --scale node --steps 10": ROOT / "runs" / "figures_node_10",
    }.items():
        monkeypatch.setattr(sys, "argv", ["fig", *flags.split()])
        assert figure.parse("").out == folder


@pytest.mark.parametrize(
    "flags, said", [(["--jobs", "0"], "--jobs: 0 is out of range"), (["--seeds", "-1"], "--seeds: -1 is")]
)
def test_wrong_numbers(flags, said):
    done = subprocess.run(
        [sys.executable, "plots/fig06_std_scope.py", "--run", *flags], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and said in done.stderr


def test_a_table_is_read_as_it_was_written(tmp_path):
    rows = [
        {"command": "a.py", "seed": 1, "token": "3", "x": 0.12345678},
        {"command": "a.py", "seed": 2, "token": None, "x": None},
    ]
    tables.write_table(tmp_path / "t.csv", rows)
    assert tables.read_table(tmp_path / "t.csv") == [
        {"command": "a.py", "seed": 1.0, "token": "3", "x": 0.1235},
        {"command": "a.py", "seed": 2.0, "token": "", "x": None},
    ]


# ------------------------------------------------------------------------------------------------------ what is committed


@pytest.mark.parametrize("module", FIGURES, ids=id_of)
def test_a_figure_is_drawn_from_its_committed_table_in_ten_seconds(module, tmp_path):
    path = figure.FIGURES / f"{module.__name__}.csv"
    (tmp_path / path.name).write_bytes(path.read_bytes())
    begun = time.monotonic()
    command = [sys.executable, module.__file__, "--out", tmp_path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert time.monotonic() - begun < 10
    assert (tmp_path / path.with_suffix(".png").name).stat().st_size > 10_000


@pytest.mark.parametrize("module", FIGURES, ids=id_of)
def test_a_figure_says_what_its_table_says(module):
    source = open(module.__file__).read()
    assert "\nQuestion: " in source and "\nPaper: " in source and "\nHere: not run" not in source
    assert source == study.told(module), "run `python tests/test_readme.py --write`"


def test_the_committed_tables_are_of_these_commands_and_small():
    for module in USUAL:
        rows = tables.read_table(figure.FIGURES / f"{module.__name__}.csv")
        assert {row["command"] for row in rows} == set(launch.commands(module)), module
    assert sum(path.stat().st_size for path in figure.FIGURES.iterdir()) < 10e6


def test_the_study_is_drawn(tmp_path):
    for path in figure.FIGURES.glob("*.csv"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert study.overview(tmp_path, "laptop").stat().st_size > 10_000


# --------------------------------------------------------------------------------------------------------------- report


def test_a_report_is_one_file_below_five_megabytes(tmp_path):
    """Of 500 steps, and responses of 8,192 tokens; it names no other file and no address"""
    run = fake_run(tmp_path / "run", steps=500, tokens=8192)
    page = report.page(run)
    assert len(page) < 5e6
    assert not re.search(r"""(src|href)=["'](?!data:)|https?://|@import|url\(""", page)
    assert page.count("</script>") == 1 and "what is 1 + 1? &lt;/script&gt;" in page
    assert (
        page.count('"grade": ') == 3 and page.count('"grade": "wrong"') == 1
    )  # one of the last evaluation is in both files


def test_what_went_wrong():
    """A rule is told once, with the first step at which the mean of five steps breaks it; a healthy run breaks none."""
    healthy = [
        {"step": s, "rollout/truncated": 0.04, "rollout/entropy": 0.3 - 0.01 * s, "reward/std": 0.4} for s in range(20)
    ]
    healthy = [row | {"rollout/logp_gap": 1e-6, "rollout/accuracy": 0.5 + 0.01 * row["step"]} for row in healthy]
    assert troubles(healthy) == [] and troubles([]) == [] and troubles(healthy[:3]) == []
    sick = [dict(row) for row in healthy]
    for row in sick[10:]:
        row |= {"rollout/truncated": 0.04 + 0.05 * (row["step"] - 9), "reward/std": 0.0, "rollout/entropy": 0.01}
    sick[12]["train/grad_norm"] = sick[15]["train/grad_norm"] = None
    found = troubles(sick)
    assert [(step, metric) for step, metric, *_ in found] == [
        (12, "train/grad_norm"),
        (13, "rollout/truncated"),  # 0.04, 0.09, 0.14, 0.19, 0.24 have a mean of 0.14; a step before it is 0.098
        (14, "rollout/entropy"),
        (14, "reward/std"),
    ]
    assert found[1][2] == pytest.approx(0.14) and found[0][2] is None
    fallen = [row | {"rollout/accuracy": 0.2} if row["step"] > 15 else row for row in healthy]
    assert [step for step, *_ in troubles(fallen)] == [18]  # 0.63 at its best; with three of five at 0.2 it is 0.378


def test_a_report_of_a_folder_that_is_no_run(tmp_path, capsys):
    with pytest.raises(SystemExit, match="nothing to show"):
        report.page(tmp_path)
    run = fake_run(tmp_path / "run")
    (run / "tokens.jsonl").write_text('{"step": 0,')
    (run / "versions.json").unlink()
    for name in ("samples", "eval_samples"):
        (run / f"{name}.jsonl").unlink()
    assert "none were logged" in report.page(run) and "tokens.jsonl, line 1" in capsys.readouterr().err


BROWSER = """
import os, sys
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": "--no-sandbox --disable-gpu"}
from PyQt6.QtCore import QTimer, QUrl
from PyQt6.QtWebEngineWidgets import QWebEngineView
from PyQt6.QtWidgets import QApplication
app = QApplication(sys.argv)
view = QWebEngineView()
view.resize(1000, 2000)
ask = '''[document.images.length, [...document.images].every(i => i.complete && i.naturalWidth > 400),
  document.querySelectorAll('#r0 span').length, document.querySelectorAll('#r0 .clipped').length,
  document.querySelector('#r0 span').style.background, (document.querySelector('input[value=entropy]').click(),
  document.querySelector('#r0 span').style.background), document.querySelector('#r0').textContent.slice(0, 7),
  (page(1), document.querySelector('#place').textContent), (document.querySelector('select[name=grade]').value = 'wrong',
  page(0), page(1), document.querySelector('#place').textContent + document.querySelector('#response').textContent)].join('|')'''
def answer(said):
    print(said)
    view.grab().save(sys.argv[2])
    app.quit()
view.loadFinished.connect(lambda ok: QTimer.singleShot(500, lambda: view.page().runJavaScript(ask, answer)))
view.load(QUrl.fromLocalFile(sys.argv[1]))
view.show()
app.exec()
"""


@pytest.mark.browser
def test_a_report_in_a_browser(tmp_path):
    """Both pictures are there, tokens are coloured by ratio, then by entropy, clipped ones marked; a screenshot is not empty."""
    page = tmp_path / "report.html"
    page.write_text(report.page(fake_run(tmp_path / "run", steps=500)))
    command = [sys.executable, "-c", BROWSER, page, tmp_path / "shot.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "|" in done.stdout, done.stderr
    images, loaded, spans, clipped, by_ratio, by_entropy, text, second, wrong = done.stdout.strip().split("|")
    assert (second, wrong) == ("2 of 3: easy, step 500, right", "1 of 1: </script>, step 0, wrongI do not know")
    assert (images, loaded, spans, clipped, text) == ("2", "true", "20", "2", "<so> it"), done.stderr
    assert by_ratio.startswith("rgba(213, 94, 0") and by_entropy.startswith("rgba(0, 158, 115")
    pixels = importlib.import_module("matplotlib.image").imread(tmp_path / "shot.png")
    assert pixels.shape[:2] == (2000, 1000) and statistics.pstdev(pixels[..., 0].ravel()[::997].tolist()) > 0.05


def test_what_the_explanations_leave():
    """plots/README.md's numbers of the four: the difference that is left, over that of the study"""
    modules, page = {module.__name__: module for module in study.figures()}, (ROOT / "plots" / "README.md").read_text()

    def effect(name, claim):
        return modules[name].CLAIMS[claim].effect(study.load_table(modules[name], figure.FIGURES))[0]

    left = {
        1: -effect("why1_greedy", 0) / effect("fig04_norm", 1),
        2: -effect("why2_steps", 0) / effect("fig05_std", 1),
        8: effect("why8_limit", 0) / effect("fig13_overlong", 0),
        9: -effect("why9_sampling", 0) / effect("fig15_lite_ppo", 1),
    }
    aligned = effect("why8_limit", 1) / effect("fig13_overlong", 1)
    for text in (
        f"{left[1]:.2f} of the lead",
        f"{left[2]:.2f} of its lead",
        f"{left[8]:.2f} and {aligned:.2f}",
        f"{left[9]:.2f} is left",
    ):
        assert text in page.replace("\n  ", " ")
    assert max(left[1], left[9]) < 1 / 3 and min(left[2], left[8], aligned) >= 2 / 3  # what each was decided by
