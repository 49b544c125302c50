"""Whole training steps by hand: two of them by the real script, and again by tests/by_hand.py."""

import by_hand
import pytest
from conftest import read_metrics

import dapo
import grpo
import lite_ppo

CASES = {
    "grpo": (grpo, {"kl_coef": 0.5}),
    "grpo_k2": (grpo, {"kl_coef": 0.5, "kl_estimator": "k2", "wrong_reward": -1}),
    "grpo_k1": (grpo, {"kl_coef": 0.5, "kl_estimator": "k1", "norm": "batch_mean_batch_std", "loss_agg": "constant"}),
    "dapo": (dapo, {"overlong_buffer": 20}),
    "dapo_filter": (dapo, {"overlong": "filter", "max_resample": 1, "loss_agg": "seq_mean"}),
    "dapo_plain": (dapo, {"dynamic_sampling": "off", "overlong": "keep", "norm": "batch_mean"}),
    "lite_ppo": (lite_ppo, {}),
    "lite_ppo_filter": (
        lite_ppo,
        {"overlong": "filter", "wrong_reward": -1, "norm": "group_mean", "loss_agg": "constant", "max_grad_norm": 0.1},
    ),
    "lite_ppo_none": (lite_ppo, {"overlong": "filter", "norm": "none", "loss_agg": "seq_mean"}),
}


@pytest.mark.parametrize("script, settings", CASES.values(), ids=CASES)
def test_two_steps_by_hand(script, settings, tmp_path):
    flags = [x for k, v in settings.items() for x in (f"--{k}", v)]
    off, args = by_hand.compare_updates(script, flags, tmp_path / "run")
    print(f"{script.__name__} {settings}: the update differs by {off:.1e} of its length")
    assert off < by_hand.LIMIT
    # every part had something to do
    rows = read_metrics(tmp_path / "run")
    assert rows[1]["train/clip_low"] + rows[1]["train/clip_high"] > 0
    norms = [args.minibatches * row["train/grad_norm"] for row in rows[:2]]  # of a mini-batch, where the other has none
    assert max(norms) > args.max_grad_norm
    assert 0 < rows[0]["rollout/truncated"] < 1
    if getattr(args, "dynamic_sampling", "off") == "on":
        assert rows[0]["rollout/sampled_responses"] > 16
    assert [row["train/lr"] for row in rows[:2]] == pytest.approx([2e-3 / 3, 4e-3 / 3])
