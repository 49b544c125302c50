"""The lab's pages: their numbers are the scripts'."""

import difflib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from by_hand import load_module
from conftest import ROOT, copy_project, read_metrics

import grpo
from grpo import advantages, kl, policy_loss, token_weights
from table import Table, read_table

LAB = ROOT / "lab"
loop, hunt, lab_runs = (load_module(LAB / f"{name}.py") for name in ("loop", "hunt", "runs"))


def table_under(heading):
    """-> the rows of the table of mathematics.md below this heading, as lists of cells"""
    part = (LAB / "mathematics.md").read_text().split(f"## {heading}. ")[1].split("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines() if line.startswith("|")]
    return rows[2:]


def number(cell):
    return float(Fraction(cell))


def test_the_advantages_of_the_page():
    rewards, rows = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]), table_under(3)
    assert {row[0].split("`")[1] for row in rows} == grpo.NORMS.keys()
    for name, *cells in rows:
        adv = advantages(rewards, name.split("`")[1])
        want = [adv[0, 0], adv[0, 3], adv[1, 0], adv[1, 3]]
        assert [number(cell) for cell in cells] == pytest.approx([float(x) for x in want], abs=5e-5)


def test_the_lone_failure_of_the_page():
    text = (LAB / "mathematics.md").read_text()
    r = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in (7, 1, 4, 0)])
    for number in (r[0].std(), r.std(), advantages(torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]]), "none").std()):
        assert f"{float(number):.4f}" in text
    for norm in ("group_mean_group_std", "group_mean_batch_std"):
        assert f"{float(advantages(r, norm)[0, 7]):.2f}" in text


def test_the_weights_of_the_page():
    lengths, rows = torch.tensor([2.0, 6.0]), table_under(5)
    assert {row[0].split("`")[1] for row in rows} == grpo.LOSS_AGGS.keys()
    for name, *cells in rows:
        w = token_weights(lengths, name.split("`")[1], 8)
        want = [*w.tolist(), float((w * torch.tensor([2.0 * 1, 6.0 * 4])).sum())]
        assert [number(cell) for cell in cells] == pytest.approx(want)


def test_the_clips_of_the_page():
    rows = table_under(6)
    assert len(rows) == 6
    for *cells, told in rows:
        ratio, adv, loss, gradient = map(number, cells)
        logp = torch.tensor([ratio]).log().requires_grad_()
        got, _, low, high = policy_loss(logp, torch.zeros(1), torch.tensor([adv]), 0.2, 0.28)
        got.sum().backward()
        assert (got.item(), logp.grad.item()) == pytest.approx((loss, gradient), abs=1e-6)
        assert told.startswith("clipped") == bool(low or high)


def test_the_kls_of_the_page():
    rows = table_under(7)
    assert {re.match("`(k[123])`", row[0])[1] for row in rows} == grpo.KLS.keys()
    for name, *cells in rows:
        logp = torch.tensor([0.693147], requires_grad=True)
        value = kl(logp, torch.zeros(1), name[1:3])
        value.sum().backward()
        assert [number(cell) for cell in cells] == pytest.approx([value.item(), logp.grad.item()], abs=5e-5)


def test_the_notebook(monkeypatch):
    """Its cells run one after the other, as in a notebook, and say what the text between them says."""
    cells = json.loads((LAB / "rollout.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # as it is opened; nothing of an older version
    monkeypatch.chdir(LAB)
    monkeypatch.setattr(sys, "path", [*sys.path])
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["rewards"].sum(1).tolist() == [1, 1, 4] and names["adv"][8:].tolist() == [0] * 4
    assert names["pack"].rows.unique().tolist() == [*range(8)] and any(r.truncated for r in names["batch"])
    moved, a = names["logp"] - names["pack"].old_logp, names["a"]
    assert moved[a > 0].mean() > 0 > moved[a < 0].mean() and (names["low"] | names["high"]).any()


def test_the_picture_of_the_loop():
    """It is drawn from the README's loop: who holds the GPU in which line"""
    phases = loop.phases()
    assert phases[0] == ("engine.wake()", {"W", "S"}) and ("backward", {"S", "A", "G"}) in phases
    assert [held for what, held in phases if what == "engine.generate(...)"] == [{"W", "K", "S"}]
    assert [held for what, held in phases if what == "engine.sleep()"] == [{"S"}]
    assert len(phases) == 15 and set().union(*(held for _, held in phases)) == loop.HOLDS.keys()


@pytest.mark.parametrize("number", hunt.bugs())
def test_a_bug_of_the_hunt(number, tmp_path, monkeypatch, capsys):
    """The copy differs from the project in one place, which is what --line calls right; nothing printed gives it away."""
    copy_project(tmp_path)
    for name in ("bugs", "papers"):
        (tmp_path / "tests" / name).symlink_to(ROOT / "tests" / name)
    monkeypatch.setattr(hunt, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setattr(sys, "argv", ["hunt.py", str(number)])
    hunt.main()
    said, name = capsys.readouterr().out, hunt.bugs()[number].stem
    assert name not in said and all(word not in said for word in ("patch", "tests/"))
    (tmp_path / "hunt" / f"{number:02d}" / "broken").mkdir()  # a run; a guess leaves it where it is
    file, line = hunt.wrong_line(number)
    healthy, broken = ((root / file).read_text().splitlines() for root in (ROOT, tmp_path / "hunt" / f"{number:02d}"))
    changed = [x for x in difflib.SequenceMatcher(None, healthy, broken, False).get_opcodes() if x[0] != "equal"]
    assert (
        len(changed) == 1
        and changed[0][1] == line - 1
        and all(b - a <= 1 for a, b in (changed[0][1:3], changed[0][3:]))
    )
    (tmp_path / "hunt" / f"{number:02d}" / file).write_text("print()\n" * 10)  # as one who searches may leave it
    for guess, status, told in ((line, 0, "that is it"), (line + 40, 1, "the file is right"), ("", 2, "")):
        monkeypatch.setattr(sys, "argv", ["hunt.py", str(number), "--line", f"hunt/{number:02d}/{file}:{guess}"])
        with pytest.raises(SystemExit) as ended:
            hunt.main()
        assert ended.value.code == status and capsys.readouterr().out.strip() == told
    assert (tmp_path / "hunt" / f"{number:02d}" / "broken").is_dir()


def test_the_hunts_numbers():
    numbers = hunt.bugs()
    levels = [hunt.difficulty(patch) for patch in numbers.values()]
    assert len(numbers) == len(set(numbers.values())) >= 33 and levels == sorted(levels) and set(levels) == {1, 2, 3}


def test_every_command_of_the_page(tmp_path):
    """As typed, but that a run has one training step and one evaluation set: what starts all runs, and a picture for each question."""
    copy_project(tmp_path)
    shutil.copytree(LAB, tmp_path / "lab")
    (tmp_path / "tests" / "bugs").symlink_to(ROOT / "tests" / "bugs")
    smaller = {
        '"steps": (80,': '"steps": (1,',
        '"eval_easy,eval_medium,eval_hard,eval_plus,eval_minus,eval_long"': '"eval_easy"',
    }
    for script in (tmp_path / "lite_ppo.py", tmp_path / "dapo.py"):
        for usual, small in smaller.items():
            assert usual in script.read_text()
            script.write_text(script.read_text().replace(usual, small))
    subprocess.run([sys.executable, "lab/runs.py", "--seeds", "1"], cwd=tmp_path, check=True)
    commands = re.findall(r"^ +(?:accelerate launch|python) (.+)$", lab_runs.PAGE, re.M)
    runs = [words for words in map(shlex.split, commands) if words[0] in ("lite_ppo.py", "dapo.py")]
    assert len(runs) == 11 == len(list((tmp_path / "runs").glob("*__s1/checkpoints")))
    assert {picture.name for picture in (tmp_path / "runs" / "lab").glob("*.png")} == {f"{n}.png" for n in range(1, 11)}
    for words in lab_runs.pictures():  # what a picture compares are two runs, and each metric is of one of them
        rows = [row for pattern in words[:2] for row in read_metrics(next(tmp_path.glob(pattern)))]
        assert set(words[3].split(",")) <= set().union(*rows)
    others = [words for words in map(shlex.split, commands) if words not in runs and words[0] != "plots/curves.py"]
    outside = os.environ | {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
    assert (
        others == [["lab/hunt.py", "1"]]
        and not subprocess.run([sys.executable, *others[0]], cwd=tmp_path, env=outside).returncode
    )


@pytest.mark.parametrize(
    "flags, metric, measure, more",
    [
        ("--lr 1e-3", "rollout/accuracy", "end", False),
        ("--lr 1e-3", "train/ratio_max", "area", True),
        ("--data easy", "reward/std", "end", False),
        ("--data easy", "adv/zero", "end", True),
        ("--data easy", "eval/mean/accuracy", "end", False),
        ("--wrong_reward -1", "reward/mean", "end", False),
        ("--norm none", "rollout/accuracy", "end", True),
        ("--norm none", "adv/zero", "end", False),
        ("--loss_agg seq_mean", "rollout/truncated", "area", True),
        ("--loss_agg seq_mean", "rollout/accuracy", "area", False),
        ("--max_response_len 56", "rollout/truncated", "end", True),
        ("--max_response_len 56", "rollout/accuracy", "end", False),
        ("--temperature 0.6", "rollout/accuracy", "end", True),
        ("--temperature 0.6", "rollout/entropy", "end", False),
        ("--temperature 0.6", "adv/zero", "end", True),
        ("--temperature 0.6", "eval/mean/accuracy", "end", False),
        ("--minibatches 1", "train/ratio_max", "area", False),
        ("--minibatches 1", "train/clip_low", "area", False),
        ("--minibatches 1", "rollout/accuracy", "area", False),
        ("--prompts_per_step 64 --group_size 2", "adv/zero", "end", True),
        ("--prompts_per_step 64 --group_size 2", "train/grad_norm", "area", False),
        ("dapo.py", "adv/zero", "end", False),
    ],
)
def test_what_an_answer_calls_visible(flags, metric, measure, more):
    """Both seeds are on the same side of both of the usual run, and further from them than they are from each other."""
    table = Table(read_table(LAB / "expected" / "lab.csv"))
    command = flags if flags.endswith(".py") else f"lite_ppo.py {flags}"
    usual, other = (sorted(table.value(c, metric, measure).values()) for c in ("lite_ppo.py", command))
    assert len(usual) == len(other) == 2
    assert other[0] > usual[1] if more else other[1] < usual[0]
    assert abs(sum(other) - sum(usual)) / 2 > max(usual[1] - usual[0], other[1] - other[0])
