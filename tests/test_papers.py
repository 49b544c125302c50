"""More papers, each a patch of one script in papers/: its size, its numbers by hand, two whole training steps in plain form.

The agreement with TRL is in test_trl.py."""

import re
import subprocess
import sys

import pytest
import torch
from by_hand import load_module
from conftest import ROOT, SMALL, copy_project, read_metrics

PAPERS = sorted((ROOT / "tests" / "papers").glob("*.patch"))
FLAGS = {  # with which two steps show what the paper changes
    "gspo": ["--clip_low", "0.003", "--clip_high", "0.004"],  # in a few steps the mean of a response moves little
    # groups of unequal rewards: where all are equal the first rollout's KL, which is rounding, is all there is
    "rloo": "--kl_coef 0.5 --group_size 8 --prompts_per_step 2 --data hard --max_response_len 100 --tokens_per_gpu 400".split(),
    "tis": ["--old_logp", "recompute", "--top_p", "0.8"],  # so that trainer and engine differ
}


def name_of(path):
    return path.stem


def script_of(path):
    return re.search(r"^\+\+\+ b/(.+)$", path.read_text(), re.M)[1]


def patched(name, folder):
    """-> the script with this patch, as a module"""
    [path] = [path for path in PAPERS if path.stem == name]
    copy_project(folder, path)
    return load_module(folder / script_of(path))


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_a_paper_is_a_short_patch(path):
    text = path.read_text()
    changed = [line for line in text.splitlines() if re.match(r"[+-](?!\+\+ |-- )", line)]
    assert len(changed) <= (12 if path.stem == "gspo" else 20)
    assert [line.split(": ")[0] for line in text.splitlines()[:3]] == ["Paper", "What", "Equation"]
    assert re.search(r"^Paper: .*arXiv \d{4}\.\d{5}", text) and (path.with_suffix(".py")).is_file()


@pytest.mark.parametrize("path", PAPERS, ids=name_of)
def test_two_steps_of_a_paper_by_hand(path, tmp_path):
    """With the patch they are those of its plain form, and without it they are not."""
    for patch, status in ((path, 0), (None, 1)):
        folder = tmp_path / f"status_{status}"
        copy_project(folder, patch)
        command = [sys.executable, "tests/by_hand.py", script_of(path), "--changes", path.with_suffix(".py")]
        done = subprocess.run([*command, *FLAGS.get(path.stem, [])], cwd=folder, capture_output=True, text=True)
        said = done.stdout.splitlines()[-1]
        assert done.returncode == status and ("NOT" in said) == bool(status), done.stdout + done.stderr


def test_gspo_by_hand(tmp_path):
    """Sequence-level ratios: exp of the mean log-ratio of a response; clip 0.2 and 0.28."""
    gspo = patched("gspo", tmp_path)
    # two responses in a pack, of 2 and 4 tokens. Log-ratios 0.2, 0.4: mean 0.3, ratio 1.349859, clipped at 1.28; A = 1: loss -1.28.
    # -0.1, 0.1, 0.2, 0.2: mean 0.1, ratio 1.105171; A = -1: loss 1.105171, and a quarter of it is each token's gradient
    logp = torch.tensor([0.2, 0.4, -0.1, 0.1, 0.2, 0.2], requires_grad=True)
    row, adv = torch.tensor([0, 0, 1, 1, 1, 1]), torch.tensor([1.0, 1, -1, -1, -1, -1])
    loss, ratio, low, high = gspo.policy_loss(logp, torch.zeros(6), adv, 0.2, 0.28, row)
    assert high.tolist() == [True] * 2 + [False] * 4 and not low.any()
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.28] * 2 + [1.105171] * 4), atol=1e-5, rtol=0)
    torch.testing.assert_close(ratio.detach(), torch.tensor([1.349859] * 2 + [1.105171] * 4), atol=1e-5, rtol=0)
    weight = gspo.token_weights(torch.tensor([2.0, 4.0]), "seq_mean", 64)  # 1/4, 1/8: each response counts one half
    (loss * weight[row]).sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0.0] * 2 + [1.105171 / 2 / 4] * 4), atol=1e-5, rtol=0)


def test_cispo_by_hand(tmp_path):
    """A ratio of e^0.4 = 1.4918 is 1.2 as a factor, and its token keeps a gradient: -1.2 A. There is no lower bound."""
    cispo = patched("cispo", tmp_path)
    assert [cispo.DEFAULTS[k][1] for k in ("norm", "loss_agg", "clip_low")] == ["group_mean_group_std", "token_mean", 1]
    logp, adv = torch.tensor([0.4, 0.4, -2.0, 0.1], requires_grad=True), torch.tensor([1.0, -1, -1, 2])
    loss, _, low, high = cispo.policy_loss(logp, torch.zeros(4), adv, 1.0, 0.2)
    loss.sum().backward()
    want = torch.tensor([-1.2, 1.2, 0.135335, -2 * 1.105171])
    torch.testing.assert_close(logp.grad, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss.detach(), want * logp.detach(), atol=1e-5, rtol=0)
    assert high.tolist() == [True, True, False, False] and not low.any()


def test_rloo_by_hand(tmp_path):
    """Of rewards 1, 0, 0, 1 a right one has 1 - 1/3, a wrong one -2/3. Log-ratios of 0.2 and -0.1 are a ratio of e^0.1."""
    rloo = patched("rloo", tmp_path)
    adv = rloo.advantages(torch.tensor([[1.0, 0, 0, 1]]), "leave_one_out")
    torch.testing.assert_close(adv, torch.tensor([[2.0, -2, -2, 2]]) / 3)
    logp, row = torch.tensor([0.2, -0.1, 0.0], requires_grad=True), torch.tensor([0, 0, 1])
    loss, *_ = rloo.policy_loss(logp, torch.zeros(3), torch.ones(3), 0.2, 0.2, row)
    torch.testing.assert_close(loss.detach(), torch.tensor([-1.105171, -1.105171, -1]), atol=1e-5, rtol=0)
    (loss * rloo.token_weights(torch.tensor([2.0, 1.0]), "seq_mean", 64)[row]).sum().backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-0.552585, -0.552585, -0.5]), atol=1e-5, rtol=0)


def test_rloo_has_no_group_of_one(tmp_path, capsys):
    with pytest.raises(SystemExit):
        patched("rloo", tmp_path).parse_args(["--group_size", "1", "--minibatches", "1"])
    assert "has no advantage under --norm leave_one_out" in capsys.readouterr().err


def test_dr_grpo_by_hand(tmp_path):
    """Of rewards 1, 0, 0, 0 the advantages are 3/4 and -1/4; a token of two responses weighs 1 / (2 x 64), however long they are."""
    dr_grpo = patched("dr_grpo", tmp_path)
    norm, agg, kl = (dr_grpo.DEFAULTS[name][1] for name in ("norm", "loss_agg", "kl_coef"))
    assert dr_grpo.advantages(torch.tensor([[1.0, 0, 0, 0]]), norm).tolist() == [[0.75, -0.25, -0.25, -0.25]]
    assert dr_grpo.token_weights(torch.tensor([2.0, 60.0]), agg, 64).tolist() == [1 / 128] * 2 and kl == 0


def test_a_paper_runs_under_its_own_name(tmp_path):
    patched("gspo", tmp_path)
    (tmp_path / "lite_ppo.py").rename(tmp_path / "gspo.py")
    done = subprocess.run([sys.executable, "gspo.py", *SMALL], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [folder] = (tmp_path / "runs").iterdir()
    clipped = [row["train/clip_low"] + row["train/clip_high"] for row in read_metrics(folder)[:2]]
    assert folder.name.startswith("gspo__") and max(clipped) > 0.1  # of the tokens: whole responses, at these bounds
