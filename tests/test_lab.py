"""The lab's pages: their numbers are the scripts'."""

import difflib
import json
import re
import shlex
import shutil
import subprocess
import sys
from fractions import Fraction

import pytest
import torch
from by_hand import load_module
from conftest import ROOT, copy_project

import grpo
from grpo import advantages, kl, policy_loss, token_weights

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
    for guess, status, told in ((line, 0, "that is it"), (line + 40, 1, "the file is right")):
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
    """As typed, but that a run has one training step: what starts all runs, and a picture for each question."""
    copy_project(tmp_path)
    shutil.copytree(LAB, tmp_path / "lab")
    for script in ("lite_ppo.py", "dapo.py"):
        text = (tmp_path / script).read_text()
        assert '"steps": (80,' in text
        (tmp_path / script).write_text(text.replace('"steps": (80,', '"steps": (1,'))
    subprocess.run([sys.executable, "lab/runs.py", "--seeds", "1"], cwd=tmp_path, check=True)
    commands = re.findall(r"^ +(?:accelerate launch|python) (.+)$", lab_runs.PAGE, re.M)
    runs = [words for words in map(shlex.split, commands) if words[0] in ("lite_ppo.py", "dapo.py")]
    assert len(runs) == 11 == len(list((tmp_path / "runs").glob("*__s1/checkpoints")))
    assert {picture.name for picture in (tmp_path / "runs" / "lab").glob("*.png")} == {f"{n}.png" for n in range(1, 11)}
    for words in lab_runs.pictures():  # what a picture compares are two runs, and each metric is of one of them
        metrics = [
            json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
            for run in (next(tmp_path.glob(pattern)) for pattern in words[:2])
        ]
        assert all(any(name in row for row in metrics) for name in words[3].split(","))
    others = [words for words in map(shlex.split, commands) if words not in runs and words[0] != "plots/curves.py"]
    for words in others:
        assert subprocess.run([sys.executable, *words], cwd=tmp_path).returncode in (
            (0, 1) if "--line" in words else (0,)
        ), words
