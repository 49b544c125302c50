"""Packing, chunking and splitting change nothing but the order of additions."""

import pytest
import torch
import torch.nn.functional as F
from conftest import BASE, WORDS, load_policy, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra import attention, engines, packs
from infra import policy as policy_module


def one_at_a_time(lm, response, temperature):
    """log-probabilities and entropies of a response, from the dense logits of its sequence alone"""
    ids = torch.cat([torch.tensor(response.problem["prompt_ids"]), response.ids])
    logits = lm(input_ids=ids[None]).logits[0, -len(response.ids) - 1 : -1] / temperature  # (T, V)
    logp = logits.log_softmax(-1)
    return logp.gather(1, response.ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_equals_one_sequence_at_a_time(policy, temperature, monkeypatch):
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(policy_module, "HEAD_CHUNK", 37)  # several chunks, the last one short
    plain = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32, attn_implementation="eager")
    batch = make_batch()
    pack = packs.Pack(batch, range(len(batch)))
    logp, entropy = policy(pack, temperature)
    want = [torch.cat(x) for x in zip(*[one_at_a_time(plain, r, temperature) for r in batch])]
    torch.testing.assert_close(logp, want[0], atol=1e-5, rtol=1e-5)  # of values down to -20 nats
    torch.testing.assert_close(entropy, want[1], atol=1e-5, rtol=1e-5)

    weights = torch.rand(2, len(logp), generator=torch.Generator().manual_seed(0))
    (weights[0] * logp + weights[1] * entropy).sum().backward()
    (weights[0] * want[0] + weights[1] * want[1]).sum().backward()
    got = dict(policy.lm.named_parameters())
    for name, p in plain.named_parameters():
        torch.testing.assert_close(got[name].grad, p.grad, atol=1e-5 * float(p.grad.abs().max()), rtol=1e-4, msg=name)


def head_of(h, weight, labels, temperature=1.0, dtype=torch.float32):
    return policy_module.LogprobEntropy.apply(h, weight, None, labels, (1 / temperature, 0.0), dtype)


@pytest.mark.parametrize("loss", ["logp", "entropy", "both"])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_chunked_head_equals_the_dense_one(tokens, temperature, loss, monkeypatch):
    monkeypatch.setattr(policy_module, "HEAD_CHUNK", 64)
    torch.manual_seed(0)
    head, h, labels = torch.nn.Linear(16, 50, bias=False), torch.randn(tokens, 16), torch.randint(50, (tokens,))
    sides = []
    for dense in (True, False):
        x = h.clone().requires_grad_()
        if dense:
            logits = F.linear(x, head.weight) / temperature
            all_logp = logits.log_softmax(-1)
            logp, entropy = all_logp.gather(1, labels[:, None])[:, 0], -(all_logp.exp() * all_logp).sum(-1)
        else:
            logp, entropy = head_of(x, head.weight, labels, temperature)
        total = {"logp": logp, "entropy": entropy, "both": logp + 0.3 * entropy}[loss].sum()
        sides.append([logp, entropy, *torch.autograd.grad(total, [x, head.weight])])
    for got, want in zip(*sides):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    head.requires_grad_(False)
    logp, entropy = head_of(x, head.weight, labels, temperature)
    total = {"logp": logp, "entropy": entropy, "both": logp + 0.3 * entropy}[loss].sum()
    torch.testing.assert_close(torch.autograd.grad(total, x)[0], sides[1][2])  # frozen, as with LoRA


def test_the_gradient_of_tokens_that_are_nearly_certain():
    """p = 1 - 1e-5, from logits of 30: the rounding of their log-sum-exp, 2e-6, would be a fifth of 1 - p. In double it is exact."""
    torch.manual_seed(0)
    labels = torch.arange(20)
    h = torch.zeros(20, 20).scatter_(1, labels[:, None], 1) * 30 - 0.1 * torch.rand(20, 20) + 15.4 * (1 - torch.eye(20))
    sides = []
    for dtype, head in ((torch.float64, None), (torch.float32, head_of)):
        x = h.to(dtype).requires_grad_()
        logp = head(x, torch.eye(20), labels)[0] if head else x.log_softmax(-1).diagonal()
        sides.append([logp.double(), torch.autograd.grad(logp.sum(), x)[0].double()])
    assert 1e-6 < -sides[0][0].max() < 1e-4
    for got, want in zip(*reversed(sides)):
        assert ((got - want).norm() / want.norm()) < 0.02


def test_chunked_head_agrees_with_torch():
    torch.manual_seed(0)
    head, h, labels = torch.nn.Linear(16, 50, bias=False), torch.randn(30, 16), torch.randint(50, (30,))
    want = -F.cross_entropy(head(h), labels, reduction="none")
    torch.testing.assert_close(head_of(h, head.weight, labels)[0], want, atol=1e-5, rtol=0)


def test_the_head_is_in_fp32_under_a_bf16_model():
    """Unless --head_dtype model."""
    head, h, labels = torch.nn.Linear(16, 50, bias=False).bfloat16(), torch.randn(30, 16), torch.randint(50, (30,))
    want = F.linear(h.bfloat16().float(), head.weight.float()).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    got, _ = head_of(h.bfloat16(), head.weight, labels)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    coarse, _ = head_of(h.bfloat16(), head.weight, labels, dtype=torch.bfloat16)
    assert coarse.dtype == torch.float32 and 1e-4 < (coarse - want).abs().max() < 0.05


def test_the_last_token_is_trained_and_the_prompt_is_not():
    batch = make_batch(3)
    pack = packs.Pack(batch, [2, 0])
    assert pack.labels.tolist() == batch[2].ids.tolist() + batch[0].ids.tolist()
    assert pack.rows.tolist() == [2] * len(batch[2].ids) + [0] * len(batch[0].ids)
    first = len(batch[2].problem["prompt_ids"])
    assert pack.select[0] == first - 1  # the last token of the prompt predicts the first of the response


def test_a_prompt_of_several_responses_stands_once():
    """The example in the docstring of Pack, and two responses that have a prompt of their own after it"""
    prompts, responses = ([1, 2, 3], [1, 2, 3], [4], [1, 2]), ([7, 8], [9], [5], [6, 6])
    batch = [
        engines.Response({"prompt_ids": prompt}, torch.tensor(ids), torch.zeros(len(ids)), False, "")
        for prompt, ids in zip(prompts, responses)
    ]
    pack = packs.Pack(batch, [0, 1])
    assert pack.ids.tolist() == [1, 2, 3, 7, 8, 9] and pack.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert pack.pieces == [3, 2, 1] and pack.layout == [0, 1, 0, 2]
    assert packs.spread(pack.ids, pack).tolist() == [1, 2, 3, 7, 8, 1, 2, 3, 9]
    marked = torch.tensor([1, 2, 3, 7, 8, -1, -2, -3, 9])
    assert packs.gather(marked, pack).tolist() == [1, 2, 3, 7, 8, 9]
    assert pack.starts.tolist() == [0, 5, 9] and pack.select.tolist() == [2, 3, 7] and pack.labels.tolist() == [7, 8, 9]
    pack = packs.Pack(batch, range(4))
    assert pack.ids.tolist() == [1, 2, 3, 7, 8, 9, 4, 5, 1, 2, 6, 6] and pack.lengths == [5, 4, 2, 4]
    assert pack.select.tolist() == [2, 3, 7, 9, 12, 13] and pack.labels.tolist() == [7, 8, 9, 5, 6, 6]


def test_a_shared_prompt_has_the_gradient_of_all_its_responses(policy):
    """Three responses to each of two prompts: in one pack, where a prompt stands once, and each in a pack of its own"""
    single, g = make_batch(2), torch.Generator().manual_seed(0)
    batch = []
    for r in single:
        for _ in range(3):
            ids = torch.randint(5, WORDS, (int(torch.randint(1, 20, (1,), generator=g)),), generator=g)
            batch.append(engines.Response(r.problem, ids, torch.zeros(len(ids)), False, ""))
    grads, found = [], []
    for parts in ([range(6)], [[i] for i in range(6)]):
        made = [packs.Pack(batch, part) for part in parts]
        assert (sum(len(p.ids) for p in made) < sum(map(sum, (p.lengths for p in made)))) == (len(parts) == 1)
        logps = [policy(pack, 1.0)[0] for pack in made]
        weights = torch.rand(sum(map(len, logps)), generator=torch.Generator().manual_seed(1))
        policy.zero_grad()
        (torch.cat(logps) * weights).sum().backward()
        found.append(torch.cat(logps).detach())
        grads.append([p.grad.clone() for p in policy.parameters()])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    for one, other in zip(*grads):
        torch.testing.assert_close(one, other, atol=1e-5 * float(other.abs().max()), rtol=1e-4)


def test_an_empty_pack_takes_part_and_changes_nothing(policy):
    logp, entropy = policy(packs.Pack([], []), 1.0)
    assert logp.shape == entropy.shape == (0,)
    logp.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in policy.parameters())


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 1000), st.sampled_from([1, 2, 3, 4, 5, 8, 13]), st.integers(1, 4), st.integers(80, 400), st.data()
)
def test_every_response_is_trained_once(seed, minibatches, processes, budget, data):
    batch = make_batch(12, seed)
    in_loss, has_gradient = (torch.tensor(data.draw(st.lists(st.booleans(), min_size=12, max_size=12))) for _ in "cl")
    plans = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "world", lambda: processes)
        for r in range(processes):
            patch.setattr(packs, "rank", lambda r=r: r)
            plans.append(packs.minibatches(batch, in_loss, has_gradient, minibatches, budget))
    for m in range(minibatches):
        made = [pack for plan in plans for pack in plan[m]]
        first = sum(12 // minibatches + (k < 12 % minibatches) for k in range(m))  # the first ones are longer by one
        part = range(first, first + 12 // minibatches + (m < 12 % minibatches))
        want = [i for i in part if in_loss[i] and has_gradient[i]]
        assert bool(made) == any(in_loss[i] for i in part)  # a step is taken, be it with a gradient of 0
        assert sorted({i for pack in made for i in pack.rows.tolist()}) == want
        assert sum(len(pack.labels) for pack in made) == sum(len(batch[i].ids) for i in want)
        assert (
            len({len(plan[m]) for plan in plans}) == 1
        )  # as many on every process, or they wait for each other forever
        assert all(len(pack.ids) <= budget for pack in made)
        # of like length side by side, so that a CPU, which pads a few at a time, pads little
        assert all(pack.lengths == sorted(pack.lengths, reverse=True) for pack in made)


def gradient(batch, minibatches, budget):
    policy = load_policy()
    weight = torch.rand(len(batch), generator=torch.Generator().manual_seed(1))
    for mini in packs.minibatches(batch, *torch.ones(2, 12), minibatches, budget):
        for pack in mini:
            logp, _ = policy(pack, 1.0)
            (logp * weight[pack.rows]).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters()])


def test_micro_batches_add_up():
    batch = make_batch()
    whole = gradient(batch, 1, 10_000)
    for budget in (80, 200, 333):
        torch.testing.assert_close(gradient(batch, 1, budget), whole, atol=1e-5 * float(whole.abs().max()), rtol=1e-4)


def test_this_torch_takes_the_call_of_the_gpu_branch():
    """Shapes and arguments alone, on the meta device; the numbers are for `-m gpu`."""
    q, k, v = (torch.empty(1, heads, 20, 64, device="meta") for heads in (8, 4, 4))
    starts = torch.tensor([0, 5, 20], dtype=torch.int32, device="meta")
    assert attention.varlen_attention(q, k, v, starts, 15, 0.125).shape == (1, 20, 8, 64)
