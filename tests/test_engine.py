"""What both engines owe the trainer: fresh weights, the right log-probabilities, samples that depend on the request alone.

`pytest -m vllm` runs it on the real vLLM, `pytest` on the transformers engine.
"""

import functools

import pytest
import torch
from conftest import BASE, engine_args, load_policy

from infra import engines, packs

PROMPTS = ["what is 1 + 2?", "what is 17 - 5 + 3?", "what is 40 + 20 - 13 + 9?", "what is 7 + 7 + 7?"]


def make_problems(tokenizer, prompts=PROMPTS):
    texts = [f"<|user|>{p}<|assistant|>" for p in prompts]
    return [{"id": f"p{i}", "prompt_ids": tokenizer.encode(text)} for i, text in enumerate(texts)]


@pytest.fixture(scope="module", params=["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request):
    from transformers import AutoTokenizer

    kind = {"hf": engines.HfEngine, "vllm": engines.VllmEngine}[request.param]
    engine = kind(engine_args(max_prompt_len=400), AutoTokenizer.from_pretrained(BASE))
    yield engine
    engine.close()


def shaken(seed, size=0.3):
    """The laptop's base model after a random change of every weight."""
    policy, g = load_policy(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in policy.parameters():
            p += size * p.std().clamp(min=1e-3) * torch.randn(p.shape, generator=g)
    return policy


def generate(engine, policy, n=8, problems=None, step=0, sampling=None):
    engine.wake()
    engine.load(policy)
    batch = engine.generate(problems or make_problems(engine.tokenizer), n, step, sampling)
    assert not any(r.ids.is_inference() or r.engine_logp.is_inference() for r in batch)  # one may change them in place
    engine.sleep()
    return batch


def gap(policy, batch, temperature=1.0):
    pack = packs.Pack(batch, range(len(batch)))
    with torch.no_grad():
        return policy(pack, temperature)[0] - pack.engine_logp


def test_weights_that_are_no_numbers(engine):
    """They end the run before a response is graded; the next weights are sampled from as ever."""
    broken = load_policy()
    with torch.no_grad():
        broken.lm.get_decoder().norm.weight[0] = torch.nan
    with pytest.raises(SystemExit, match="go on from a checkpoint, with a lower --lr"):
        generate(engine, broken)
    fine = shaken(1)
    assert gap(fine, generate(engine, fine)).abs().max() < 1e-4


def test_load_brings_the_weights(engine):
    old, new = shaken(1), shaken(2)
    batch = generate(engine, old)
    assert len(batch) == 32
    print(f"gap after load: {gap(old, batch).abs().max():.1e}, before: mean {gap(new, batch).abs().mean():.3f}")
    assert gap(old, batch).abs().max() < 1e-4
    assert gap(new, batch).abs().mean() > 1e-2  # the trainer has moved on, the engine was not told
    batch = generate(engine, new)
    assert gap(new, batch).abs().max() < 1e-4


def test_the_tied_head_is_loaded_too(engine):
    policy = load_policy()
    generate(engine, policy)
    with torch.no_grad():
        policy.lm.get_output_embeddings().weight.mul_(1.5)
    assert policy.lm.get_input_embeddings().weight is policy.lm.get_output_embeddings().weight
    assert gap(policy, generate(engine, policy)).abs().max() < 1e-4


def test_the_prefix_cache_does_not_survive_a_load(engine):
    """A prompt of more than two cache blocks (of 128 tokens on a CPU), and no sleep in between, which would empty the cache."""
    problems = make_problems(engine.tokenizer, ["what is " + " + ".join(["7"] * 150) + "?"])
    assert len(problems[0]["prompt_ids"]) > 300
    engine.wake()
    for seed in (3, 4):
        policy = shaken(seed)
        engine.load(policy)
        assert gap(policy, engine.generate(problems, 8, 0)).abs().max() < 1e-4
    engine.sleep()


def fill_with_nan(worker):
    for cache in worker.model_runner.kv_caches:
        cache.fill_(torch.nan)


def test_what_was_in_the_caches_memory_does_no_harm(engine):
    """After a wake it is undefined; NaN times a weight of 0 is NaN."""
    policy = shaken(4)
    engine.wake()
    if isinstance(engine, engines.VllmEngine):
        engine.llm.collective_rpc(fill_with_nan)
    engine.load(policy)
    assert gap(policy, engine.generate(make_problems(engine.tokenizer), 8, 0)).abs().max() < 1e-4
    engine.sleep()


def test_more_prompt_tokens_than_one_pass_takes(engine):
    """9,000 tokens of prompts, so that vLLM, which takes 8,192 at a time, has to leave some for later."""
    policy, sums = shaken(5), [" + ".join([str(i)] + ["7"] * 145) for i in range(30)]
    problems = make_problems(engine.tokenizer, [f"what is {s}?" for s in sums])
    for i, problem in enumerate(problems):
        problem["id"] = f"long{i}"
    assert 8192 < sum(len(p["prompt_ids"]) for p in problems)
    batch = generate(engine, policy, n=1, problems=problems, sampling=engines.Sampling(1.0, 1.0, 0, 20))
    assert len(batch) == 30 and gap(policy, batch).abs().max() < 1e-4


def test_a_bar_of_what_takes_long(engine, monkeypatch, capsys):
    monkeypatch.setattr(engines, "progress", functools.partial(engines.progress, delay=0, mininterval=0, miniters=1))
    generate(engine, load_policy(), n=2)
    said = capsys.readouterr().err
    assert "8/8" in said and "toks/s" in said.replace("tokens/s", "toks/s")
    engine.wake()
    engine.load(load_policy())
    capsys.readouterr()
    monkeypatch.setattr(engines, "rank", lambda: 1)
    assert len(engine.sample([[5, 6, 7]], [1], engines.Sampling(1.0, 1.0, 0, 8))) == 1
    engine.sleep()
    assert "1/1" not in capsys.readouterr().err


def test_temperature(engine):
    policy = load_policy()
    batch = generate(engine, policy, sampling=engines.Sampling(0.6, 1.0, 0, 64))
    assert gap(policy, batch, 0.6).abs().max() < 1e-4
    assert gap(policy, batch, 1.0).abs().mean() > 1e-3


def test_top_k_and_top_p(engine):
    policy = shaken(6, 1.0)
    batch = generate(engine, policy, sampling=engines.Sampling(1.0, 0.8, 3, 64))
    assert gap(policy, batch).max() < 1e-4  # never more probable to the trainer: the engine renormalizes
    assert gap(policy, batch).mean() < -0.05


def test_greedy_and_length(engine):
    batch = generate(engine, shaken(6, 1.0), sampling=engines.Sampling(1.0, 1.0, 1, 20))
    assert all(r.engine_logp.abs().max() < 1e-6 and len(r.ids) <= 20 for r in batch)
    assert all(len({tuple(ids) for ids in tokens(batch)[8 * i : 8 * i + 8]}) == 1 for i in range(4))


def tokens(batch):
    return [r.ids.tolist() for r in batch]


def test_same_seed_same_tokens(engine):
    policy = shaken(7)
    assert tokens(generate(engine, policy)) == tokens(generate(engine, policy))
    assert tokens(generate(engine, policy)) != tokens(generate(engine, policy, step=1))


def test_the_responses_of_a_prompt_differ(engine):
    batch = generate(engine, shaken(8, 1.0))
    for i in range(4):
        assert len({tuple(ids) for ids in tokens(batch)[8 * i : 8 * i + 8]}) == 8


def test_a_response_does_not_depend_on_its_company(engine):
    policy, problems = shaken(9), make_problems(engine.tokenizer)
    together = tokens(generate(engine, policy))
    alone = [ids for p in reversed(problems) for ids in tokens(generate(engine, policy, problems=[p]))]
    assert sum(together[8 * i : 8 * i + 8] == alone[24 - 8 * i : 32 - 8 * i] for i in range(4)) == 4


def test_order_and_ends(engine):
    batch = generate(engine, load_policy())
    assert [r.problem["id"] for r in batch] == [f"p{i}" for i in range(4) for _ in range(8)]
    for r in batch:
        assert len(r.ids) == len(r.engine_logp) <= 64
        assert r.truncated == (r.ids[-1] != engine.tokenizer.eos_token_id)
        assert not r.truncated or len(r.ids) == 64
        assert engine.tokenizer.eos_token_id not in r.ids[:-1]
        assert r.text == engine.tokenizer.decode(r.ids, skip_special_tokens=True)
    assert any(not r.truncated for r in batch)
