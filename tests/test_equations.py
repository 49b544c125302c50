"""Every equation of the scripts against numbers worked out by hand. What all three have is the same text in each
(tests/test_structure.py); it is tested in each all the same, for whoever changes one.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dapo
import grpo
import lite_ppo
from dapo import KEEPS, overlong_penalty
from grpo import KLS, kl
from lite_ppo import advantages, policy_loss, token_weights

NORMS, LOSS_AGGS = lite_ppo.NORMS, lite_ppo.LOSS_AGGS
SCRIPTS = [grpo, dapo, lite_ppo]


@pytest.fixture(params=SCRIPTS, ids=lambda script: script.__name__, autouse=True)
def script(request, monkeypatch):
    """Each test sees the functions of each script in turn."""
    for name in ("advantages", "token_weights", "policy_loss"):
        monkeypatch.setitem(globals(), name, getattr(request.param, name))


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


@pytest.mark.parametrize("norm", ["group_mean_group_std", "batch_mean_batch_std", "group_mean_batch_std"])
def test_a_standard_deviation_undoes_the_scale_of_the_rewards(norm):
    # (2 r - 1 - mean of it) / std of it = 2 (r - mean) / (2 std): rewards 1 and -1 have the advantages of 1 and 0, but for EPS
    torch.testing.assert_close(advantages(2 * R - 1, norm), advantages(R, norm), atol=1e-5, rtol=0)
    assert (advantages(2 * R - 1, "none") - advantages(R, "none")).abs().max() == 1


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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    got, got_ratio, low, high = policy_loss(logp, old, torch.tensor([adv]), 0.2, 0.28)
    got.sum().backward()
    near(got.detach(), [loss])
    near(got_ratio.detach(), [ratio])
    near(logp.grad, [gradient])
    assert (low.item(), high.item()) == (gradient == 0 and ratio < 1, gradient == 0 and ratio > 1)  # what was clipped


# --------------------------------------------------------------------------------------------------------- kl (grpo.py)

LN2 = 0.693147


@pytest.mark.parametrize(
    "estimator, d, value, gradient",
    [  # d = log pi - log pi_ref, so that exp(-d) = pi_ref / pi
        ("k1", LN2, LN2, 1.0),
        ("k2", LN2, 0.240227, LN2),  # d^2 / 2, and d
        ("k3", LN2, 0.193147, 0.5),  # 1/2 - 1 + 0.693147, and 1 - 1/2
        ("k1", -LN2, -LN2, 1.0),
        ("k2", -LN2, 0.240227, -LN2),
        ("k3", -LN2, 0.306853, -1.0),  # 2 - 1 - 0.693147, and 1 - 2
        ("k1", 0.0, 0.0, 1.0),
        ("k2", 0.0, 0.0, 0.0),
        ("k3", 0.0, 0.0, 0.0),
    ],
)
def test_kl(estimator, d, value, gradient):
    ref_logp = torch.tensor([-1.5])
    logp = (ref_logp + d).requires_grad_()
    got = kl(logp, ref_logp, estimator)
    got.sum().backward()
    near(got.detach(), [value], atol=1e-5)
    near(logp.grad, [gradient], atol=1e-5)


def test_kl_means():
    # two tokens, pi = (1/2, 1/2), ref = (1/4, 3/4): d = ln 2, ln(2/3) = 0.693147, -0.405465
    # KL(pi, ref) = (0.693147 - 0.405465) / 2 = 0.143841;  k2: (0.240227 + 0.082201) / 2 = 0.161214
    # k3: (0.193147 + 3/2 - 1 - 0.405465) / 2 = (0.193147 + 0.094535) / 2 = 0.143841
    logit = torch.zeros(1, requires_grad=True)  # pi = softmax(logit, 0), so that d pi_1 / d logit = pi_1 pi_2 = 1/4
    ref = torch.tensor([0.25, 0.75]).log()
    logp = torch.cat([logit, torch.zeros(1)]).log_softmax(0)
    means = {"k1": 0.143841, "k2": 0.161214, "k3": 0.143841}
    # gradients by the logit, the tokens weighted by pi held still; d log pi / d logit = 1/2, -1/2
    # k1: (1/2 - 1/2) / 2 = 0;  k2: (ln 2 - ln(2/3)) / 4 = 0.274653 = d KL(pi, ref);  k3: ((1 - 1/2) - (1 - 3/2)) / 4 = 1/4
    # = d KL(ref, pi) = pi_1 - ref_1
    gradients = {"k1": 0.0, "k2": 0.274653, "k3": 0.25}
    for estimator in KLS:
        mean = (0.5 * kl(logp, ref, estimator)).sum()
        near(mean.detach(), means[estimator], atol=1e-5)
        near(torch.autograd.grad(mean, logit, retain_graph=True)[0], [gradients[estimator]], atol=1e-5)
    exact = (logp.exp() * (logp - ref)).sum()  # KL(pi, ref) with its gradient through pi
    near(torch.autograd.grad(exact, logit)[0], [gradients["k2"]], atol=1e-5)


# ------------------------------------------------------------------------------------- overlong_penalty, KEEPS (dapo.py)


def test_overlong_penalty():
    # limit 20, buffer 4: nothing up to 16 tokens, then a quarter more each, all of it at 20 and beyond
    lengths = torch.tensor([1.0, 15, 16, 17, 18, 19, 20, 21, 400])
    near(overlong_penalty(lengths, 20, 4), [0.0, 0, 0, -0.25, -0.5, -0.75, -1, -1, -1])


def test_overlong_penalty_of_the_paper():  # 16,384 expected, 4,096 of buffer, 20,480 at most; (16384 - 17408) / 4096 = -1/4
    lengths = torch.tensor([16384.0, 17408, 18432, 20479, 20480])
    near(overlong_penalty(lengths, 20480, 4096), [0.0, -0.25, -0.5, -4095 / 4096, -1.0], atol=1e-6)


def test_a_buffer_as_long_as_the_limit():  # every token costs
    near(overlong_penalty(torch.tensor([1.0, 5, 10]), 10, 10), [-0.1, -0.5, -1.0])


def test_dynamic_sampling():
    right = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], dtype=torch.bool)
    assert KEEPS["on"](right).tolist() == [False, False, True, True, True]  # 0 < number right < 3
    assert KEEPS["off"](right).tolist() == [True] * 5


def test_equal_rewards_that_are_no_binary_fractions():
    # a group all wrong with the same penalty: -1.3 seven times sums to something else than 7 x -1.3 in fp32, and what is
    # left of r - mean, divided by a std of 1e-6, was an advantage of 0.1
    for size in range(2, 17):
        r = torch.full((3, size), -1.3)
        for norm in (
            "group_mean",
            "batch_mean",
            "group_mean_group_std",
            "batch_mean_batch_std",
            "group_mean_batch_std",
        ):
            assert advantages(r, norm).abs().max() == 0
        assert advantages(torch.cat([r, r + torch.arange(size)]), "group_mean_group_std")[:3].abs().max() == 0
