"""Whole runs of the real script: what it writes, how it stops, how it goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import BASE, ROOT, SMALL, read_metrics, run_main, without_times
from workers import gradient

import common
import lite_ppo


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A small run that nobody disturbed: four rollouts."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, lite_ppo, *SMALL, "--steps", 4, "--out", folder)
    return folder


def test_a_run_folder_has_everything(finished):
    rows = read_metrics(finished)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all("eval/easy/accuracy" in rows[i] for i in (0, 4)) and "eval/easy/accuracy" not in rows[1]
    for name in (
        "reward/mean",
        "rollout/logp_gap",
        "train/loss",
        "train/entropy",
        "adv/std",
        "time/generate",
        "time/step",
    ):
        assert name in rows[0]
    assert rows[0]["rollout/logp_gap"] < 1e-5  # the engine and the trainer are one model
    args = json.loads((finished / "args.json").read_text())
    assert args["steps"] == 4 and args["norm"] == "group_mean_batch_std" and args["script"] == "lite_ppo"
    assert "torch" in json.loads((finished / "versions.json").read_text())
    assert (finished / "source" / "lite_ppo.py").read_text() == (ROOT / "lite_ppo.py").read_text()
    assert {p.name for p in (finished / "source").iterdir()} == {"lite_ppo.py", "common.py", "rewards.py"}
    assert (finished / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert set(json.loads((finished / "samples.jsonl").read_text().splitlines()[0])) >= {
        "step",
        "problem",
        "response",
        "correct",
    }
    assert json.loads((finished / "result.json").read_text())["easy"] == [rows[i]["eval/easy/accuracy"] for i in (0, 4)]
    assert all(row["train/grad_norm"] > 0 and row["reward/std"] > 0 for row in rows[:4])  # it did learn from something


def test_the_checkpoint_is_a_model(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    [folder] = (finished / "checkpoints").iterdir()  # the last one only
    assert folder.name == "step_000004"
    assert AutoModelForCausalLM.from_pretrained(folder).config.hidden_size == 128
    assert AutoTokenizer.from_pretrained(folder).decode([5]) != ""


def test_the_node_column_runs_too(tmp_path, monkeypatch):
    """The paper's sampling and mini-batches, on the small model and small numbers: the same script at the other scale."""
    data = ROOT / "data" / "tiny"
    flags = ["--scale", "node", "--model", BASE, "--data", data / "easy.jsonl", "--eval_data", data / "eval_easy.jsonl"]
    small = [
        "--steps",
        2,
        "--prompts_per_step",
        8,
        "--max_prompt_len",
        64,
        "--max_response_len",
        40,
        "--eval_samples",
        1,
    ]
    rows = run_main(monkeypatch, lite_ppo, *flags, *small, "--tokens_per_gpu", 512, "--out", tmp_path / "run")
    assert [row["train/lr"] for row in rows[:2]] == pytest.approx([1e-6 * 1 / 50, 1e-6 * 2 / 50])  # the warm-up
    assert 0 < rows[0]["rollout/logp_gap"] < 0.02  # top-p 0.99: the engine shares out what was cut off


# ----------------------------------------------------------------------------------------------------- stop and go on

KILLS = {  # where a run is killed: at which call of what, and how many checkpoints there are then
    "before_first_checkpoint": ("common.Log.clear", 2, 0),
    "before_checkpoint": ("common.save", 2, 1),
    "within_checkpoint": ("transformers.PreTrainedModel.save_pretrained", 2, 1),
    "before_rename": ("pathlib.Path.rename", 3, 1),
    "before_old_one_goes": ("shutil.rmtree", 4, 2),
    "within_update": ("common.check_finite", 6, 1),
}
KILLER = """
import os, signal, sys, importlib
import transformers, pathlib, shutil, common, lite_ppo
owner, name = sys.argv.pop(1).rsplit(".", 1)
after = int(sys.argv.pop(1))
owner = eval(owner)
original, calls = getattr(owner, name), []
def kill(*args, **kwargs):
    calls.append(1)
    if len(calls) == after:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)
setattr(owner, name, kill)
lite_ppo.main()
"""


@pytest.mark.parametrize("what, call, checkpoints", KILLS.values(), ids=KILLS)
def test_killed_and_resumed_is_the_same_run(finished, what, call, checkpoints, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    command = [sys.executable, "-c", KILLER, what, str(call), *SMALL, "--steps", "4", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((folder / "checkpoints").glob("step_??????"))) == checkpoints
    run_main(monkeypatch, lite_ppo, "--resume", folder)
    got, want = ([without_times(row) for row in read_metrics(f)] for f in (folder, finished))
    assert got == want  # to the last bit
    assert (folder / "samples.jsonl").read_text() == (finished / "samples.jsonl").read_text()


def test_a_line_cut_short_is_forgotten(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    (folder / "result.json").unlink()
    checkpoint = folder / "checkpoints" / "step_000004"
    checkpoint.rename(checkpoint.with_suffix(".tmp"))  # killed before the rename, with nothing to go on from
    text = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(text[: len(text) // 2])
    run_main(monkeypatch, lite_ppo, "--resume", folder)
    assert [without_times(r) for r in read_metrics(folder)] == [without_times(r) for r in read_metrics(finished)]


def test_more_steps(finished, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    rows = run_main(monkeypatch, lite_ppo, "--resume", folder, "--steps", 5)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert json.loads((folder / "args.json").read_text())["steps"] == 5 and (folder / "result.json").exists()


# ------------------------------------------------------------------------------------------------------ two processes


def torchrun(processes, *command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr


FEW = [
    "--overlong",
    "filter",
    "--max_response_len",
    "12",
    "--norm",
    "none",
    "--wrong_reward",
    "-1",
    "--minibatches",
    "8",
]


@pytest.mark.parametrize("more", [["--max_response_len", "64"], FEW], ids=["all", "few_survive"])
def test_two_processes_give_the_same_rollout_and_step(more, tmp_path):
    """From the real command line. Where few responses survive the filter, a process may have none, or no mini-batch any."""
    flags = [*SMALL, "--steps", "1", "--prompts_per_step", "8", "--tokens_per_gpu", "256", *more]
    rows = []
    for processes in (1, 2):
        torchrun(processes, "lite_ppo.py", *flags, "--out", tmp_path / str(processes))
        rows.append(read_metrics(tmp_path / str(processes)))
    one, two = rows
    assert one[0]["adv/zero"] < 1 and one[0]["train/grad_norm"] > 0
    for name, value in without_times(one[0]).items():
        assert two[0][name] == pytest.approx(value, rel=1e-5, abs=1e-6), name


def test_any_split_gives_the_same_gradient(tmp_path):
    """One process or two, few packs or many; with a single response, the second process has an empty pack."""
    for processes, budget, survivors in [(1, 80, 12), (2, 10_000, 12), (2, 80, 12), (2, 10_000, 1)]:
        loss, whole = gradient(10_000, survivors)
        assert whole.abs().max() > 0
        torchrun(processes, "tests/workers.py", budget, survivors, tmp_path / "gradient.pt")
        got_loss, got = torch.load(tmp_path / "gradient.pt")
        assert got_loss == pytest.approx(loss, rel=1e-5)
        torch.testing.assert_close(got, whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-5)


LEARN = ["--scale", "laptop", "--data", "easy", "--eval_data", "eval_easy", "--steps", "10", "--lr", "3e-4"]
ENGINES = ["hf", pytest.param("vllm", marks=pytest.mark.vllm)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("processes", [1, 2])
def test_ten_steps_raise_the_reward(engine, processes, tmp_path):
    torchrun(processes, "lite_ppo.py", *LEARN, "--engine", engine, "--out", tmp_path / "run")
    rows = read_metrics(tmp_path / "run")
    accuracy = [rows[i]["eval/easy/accuracy"] for i in (0, -1)]
    first, last = (sum(row["reward/mean"] for row in part) / 3 for part in (rows[:3], rows[-4:-1]))
    print(
        f"{engine}, {processes} processes: reward {first:.3f} to {last:.3f}, accuracy {accuracy[0]:.3f} to {accuracy[1]:.3f}"
    )
    assert last > first + 0.1 and accuracy[1] > accuracy[0] + 0.1
    assert max(row["rollout/logp_gap"] for row in rows[:-1]) < 1e-4


@pytest.mark.vllm
def test_vllm_without_a_launcher_and_to_the_end(tmp_path):
    """`python lite_ppo.py --engine vllm` starts, samples, and leaves without an error on the way out."""
    command = [sys.executable, "lite_ppo.py", *SMALL, "--engine", "vllm", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and (tmp_path / "run" / "result.json").exists()


# --------------------------------------------------------------------------------------------------------- safeguards


def test_a_stale_engine_stops_the_run(tmp_path, monkeypatch):
    load = common.HfEngine.load
    monkeypatch.setattr(
        common.HfEngine,
        "load",
        lambda self, model: None if hasattr(self, "loaded") else (load(self, model), setattr(self, "loaded", 1)),
    )
    with pytest.raises(SystemExit, match="samples from other weights"):
        run_main(monkeypatch, lite_ppo, *SMALL, "--steps", 5, "--out", tmp_path / "run")
    assert len(read_metrics(tmp_path / "run")) >= 1  # the first rollout was fresh


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    def broken(*args):
        loss, ratio = policy_loss(*args)
        loss = loss.clone()
        loss[17] = float("nan")
        return loss, ratio

    policy_loss = lite_ppo.policy_loss
    monkeypatch.setattr(lite_ppo, "policy_loss", broken)
    with pytest.raises(SystemExit, match="step 0: the loss is nan"):
        run_main(monkeypatch, lite_ppo, *SMALL, "--out", tmp_path / "run")
    found = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert found["step"] == 0 and found["loss"] == "nan" and found["response"] and found["token"] < len(found["ids"])


# ------------------------------------------------------------------------------------------------------- overlong filter


@pytest.mark.parametrize("survivors", [0, 1])
def test_filter_leaves_none_or_one(survivors, tmp_path, monkeypatch):
    """With none, nothing moves; with one, the mini-batches without it do not move anything."""
    generate, stepped = common.Engine.generate, []

    def cut(self, problems, n, step):
        batch = generate(self, problems, n, step)
        for i, response in enumerate(batch):
            response.truncated = i >= survivors
        return batch

    monkeypatch.setattr(common.Engine, "generate", cut)
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (stepped.append(1), step(self, *a, **k))[1])
    flags = [*SMALL, "--steps", 1, "--overlong", "filter", "--norm", "none", "--wrong_reward", -1]
    rows = run_main(monkeypatch, lite_ppo, *flags, "--out", tmp_path / "run")
    assert len(stepped) == survivors
    assert ("train/loss" in rows[0]) == bool(survivors)
    assert rows[0]["rollout/truncated"] == 1 - survivors / 16


# -------------------------------------------------------------------------------------------------------- no dead flags

TRICKS = {"norm", "loss_agg", "clip_low", "clip_high", "overlong", "wrong_reward"}
OTHERS = {"clip_low": ["0.2", "0.01"], "clip_high": ["0.2", "0.01"]}  # flags without choices: two values


def trick_flags():
    parser = common.parser
    with pytest.MonkeyPatch.context() as patch:
        made = []
        patch.setattr(common, "parser", lambda *a: made.append(parser(*a)) or made[0])
        patch.setattr(common, "parse_args", lambda p, argv: exit())
        with pytest.raises(SystemExit):
            lite_ppo.parse_args([])
    actions = {
        a.dest: a for a in made[0]._actions if a.dest not in {"help", "scale", "engine", "out", "resume", *common.FLAGS}
    }
    return {name: [str(c) for c in a.choices or OTHERS[name]] for name, a in actions.items()}


def test_every_choice_of_every_trick_changes_the_update(tmp_path, monkeypatch):
    tricks = trick_flags()
    assert set(tricks) == TRICKS
    base = [*SMALL, "--steps", 1, "--data", "medium", "--max_response_len", 32, "--minibatches", 4, "--lr", 3e-3]
    weights = {}
    for flag, choices in tricks.items():
        for choice in choices:
            settings = {"norm": "none"} if flag == "wrong_reward" else {}  # a norm with a std undoes any reward scale
            settings |= {flag: choice}
            folder = tmp_path / f"{flag}={choice}"
            run_main(
                monkeypatch, lite_ppo, *base, *[x for k, v in settings.items() for x in (f"--{k}", v)], "--out", folder
            )
            from safetensors.torch import load_file

            state = load_file(folder / "checkpoints" / "step_000001" / "model.safetensors")
            weights[flag, choice] = torch.cat([p.flatten() for p in state.values()])
    for flag, choices in tricks.items():
        for i, a in enumerate(choices):
            for b in choices[:i]:
                assert (weights[flag, a] - weights[flag, b]).abs().max() > 1e-6, f"--{flag} {a} and {b} do the same"


# ------------------------------------------------------------------------------------------------------ copy and modify


def test_copy_and_modify(tmp_path):
    """`cp lite_ppo.py mine.py`, another line of advantages, run: the run is called after the copy."""
    for name in ("common.py", "rewards.py", "plots", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    text = (ROOT / "lite_ppo.py").read_text()
    line = "lambda r: (r - group_mean(r)) / batch_std(r)"
    assert line in text
    (tmp_path / "mine.py").write_text(text.replace(line, "lambda r: (r - r.median()) / batch_std(r)"))
    done = subprocess.run(
        [sys.executable, "mine.py", *SMALL, "--steps", "1"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("mine__") and folder.name.endswith("__s1")
