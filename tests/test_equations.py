"""Every equation of lite_ppo.py against numbers worked out by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lite_ppo import LOSS_AGGS, NORMS, advantages, policy_loss, token_weights

R = torch.tensor([[1.0, 1, 1, 0], [1, 0, 0, 0]])  # group means 3/4 and 1/4, batch mean 1/2
# unbiased std of a group: (3 (1/4)^2 + (3/4)^2) / 3 = 1/4, so 1/2; of the batch: 8 (1/2)^2 / 7 = 2/7, so 0.53452


def near(got, want, atol=1e-4):
    torch.testing.assert_close(got, torch.tensor(want), atol=atol, rtol=0)


# ------------------------------------------------------------------------------------------------------- advantages


def test_none():
    near(advantages(R, "none"), [[1.0, 1, 1, 0], [1, 0, 0, 0]])


def test_group_mean():  # 1 - 3/4 = 1/4, 0 - 3/4; 1 - 1/4, 0 - 1/4
    near(advantages(R, "group_mean"), [[0.25, 0.25, 0.25, -0.75], [0.75, -0.25, -0.25, -0.25]])


def test_batch_mean():  # 1 - 1/2, 0 - 1/2
    near(advantages(R, "batch_mean"), [[0.5, 0.5, 0.5, -0.5], [0.5, -0.5, -0.5, -0.5]])


def test_group_mean_group_std():  # (1/4) / (1/2), (3/4) / (1/2)
    near(advantages(R, "group_mean_group_std"), [[0.5, 0.5, 0.5, -1.5], [1.5, -0.5, -0.5, -0.5]])


def test_batch_mean_batch_std():  # (1/2) / 0.53452 = 0.93541
    near(
        advantages(R, "batch_mean_batch_std"), [[0.9354, 0.9354, 0.9354, -0.9354], [0.9354, -0.9354, -0.9354, -0.9354]]
    )


def test_group_mean_batch_std():  # (1/4) / 0.53452 = 0.46771, (3/4) / 0.53452 = 1.40312
    near(
        advantages(R, "group_mean_batch_std"), [[0.4677, 0.4677, 0.4677, -1.4031], [1.4031, -0.4677, -0.4677, -0.4677]]
    )


def test_batch_std_is_of_the_raw_rewards():  # of the group-centred ones it would be sqrt(1.5 / 7) = 0.4629, and this 0.5401
    assert advantages(R, "group_mean_batch_std")[0, 0].item() == pytest.approx(0.25 / 0.53452, abs=1e-4)


def test_a_lone_failure_weighs_less_under_batch_std():
    # four prompts of 8, solved 7, 1, 4 and 0 times; the failure in the first group is 0 - 7/8 = -0.875 off its mean.
    # group std: (7 (1/8)^2 + (7/8)^2) / 7 = 1/8, so 0.35355: -2.4749.  batch: 12 of 32 right, 32 (3/8)(5/8) / 31 = 0.24194,
    # so 0.49187: -1.7789
    r = torch.tensor([[1.0] * k + [0.0] * (8 - k) for k in (7, 1, 4, 0)])
    near(advantages(r, "group_mean_group_std")[0, 7], -2.4749)
    near(advantages(r, "group_mean_batch_std")[0, 7], -1.7789)


@pytest.mark.parametrize("norm", [norm for norm in NORMS if norm.startswith("group_mean")])
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_a_group_with_equal_rewards_has_advantage_exactly_0(norm, value):
    assert advantages(torch.tensor([[value] * 8, [1.0, 0.0] * 4]), norm)[0].tolist() == [0.0] * 8
    assert (
        advantages(torch.tensor([[value] * 8] * 3), norm).abs().max() == 0
    )  # the whole batch equal: std 0, and no nan


def test_a_batch_with_equal_rewards_has_advantage_0():
    assert advantages(torch.ones(3, 8), "batch_mean_batch_std").abs().max() == 0


# ---------------------------------------------------------------------------------------------------- token weights

LENGTHS = torch.tensor([2.0, 6.0])  # two responses; say every token of the first has loss 1, of the second 4


def test_token_mean():  # (2 x 1 + 6 x 4) / 8 = 3.25
    near(token_weights(LENGTHS, "token_mean", 8), [1 / 8, 1 / 8])


def test_seq_mean():  # (1 + 4) / 2 = 2.5
    near(token_weights(LENGTHS, "seq_mean", 8), [1 / (2 * 2), 1 / (2 * 6)])


def test_constant():  # (2 x 1 + 6 x 4) / (2 x 8) = 1.625
    near(token_weights(LENGTHS, "constant", 8), [1 / 16, 1 / 16])


def test_aggregated_losses():
    losses = torch.tensor([2.0 * 1, 6.0 * 4])  # sum over the tokens of each response
    got = [(token_weights(LENGTHS, agg, 8) * losses).sum().item() for agg in ("token_mean", "seq_mean", "constant")]
    assert got == pytest.approx([3.25, 2.5, 1.625])


@pytest.mark.parametrize("agg", LOSS_AGGS)
def test_a_filtered_response_counts_neither_as_tokens_nor_as_a_response(agg):
    alone, among = token_weights(LENGTHS, agg, 8), token_weights(torch.tensor([2.0, 0.0, 6.0, 0.0]), agg, 8)
    assert among.tolist() == [alone[0], 0.0, alone[1], 0.0]


@pytest.mark.parametrize("agg", LOSS_AGGS)
def test_one_survivor_and_none(agg):
    assert token_weights(torch.tensor([0.0, 0, 0]), agg, 8).tolist() == [0.0, 0, 0]
    want = {"token_mean": 1 / 5, "seq_mean": 1 / 5, "constant": 1 / 8}[agg]
    near(token_weights(torch.tensor([0.0, 5, 0]), agg, 8), [0.0, want, 0.0])


@given(st.lists(st.integers(1, 9000), min_size=1, max_size=64))
def test_means_are_means(lengths):  # all losses equal to 1 must give a loss of 1
    lengths = torch.tensor(lengths, dtype=torch.float32)
    for agg in ("token_mean", "seq_mean"):
        assert (token_weights(lengths, agg, 9000) * lengths).sum().item() == pytest.approx(1, abs=1e-5)


# ------------------------------------------------------------------------------------------------------ policy loss

# clip_low 0.2, clip_high 0.28: the ratio may be 0.8 to 1.28. d loss / d logp = - ratio A where the first term of the min is taken,
# and 0 where the clipped constant is
CORNERS = [  # ratio, A, loss, gradient
    (1.0, 2.0, -2.0, -2.0),  # inside, A > 0: -1 x 2
    (1.0, -2.0, 2.0, 2.0),  # inside, A < 0
    (1.5, 2.0, -2.56, 0.0),  # above, A > 0: min(3, 1.28 x 2), clipped: enough of a good thing
    (1.5, -2.0, 3.0, 3.0),  # above, A < 0: min(-3, -2.56), not clipped: a bad token got likelier, push it back
    (0.5, 2.0, -1.0, -1.0),  # below, A > 0: min(1, 1.6), not clipped: a good token got rarer, pull it up
    (0.5, -2.0, 1.6, 0.0),  # below, A < 0: min(-1, -1.6), clipped: a bad token is rare enough
]


@pytest.mark.parametrize("ratio, adv, loss, gradient", CORNERS)
def test_policy_loss(ratio, adv, loss, gradient):
    old = torch.tensor([-1.0])
    logp = (old + torch.tensor([ratio]).log()).requires_grad_()
    got, got_ratio = policy_loss(logp, old, torch.tensor([adv]), 0.2, 0.28)
    got.sum().backward()
    near(got.detach(), [loss])
    near(got_ratio.detach(), [ratio])
    near(logp.grad, [gradient])
