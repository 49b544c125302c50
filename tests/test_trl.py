"""The same responses, rewards and log-probabilities through TRL's GRPOTrainer and through the scripts: the same loss and gradient.

TRL is run, not read: `pip install --no-deps --target .trl trl==1.16.0`, then `PYTHONPATH=.trl python -m pytest -m trl`.
"""

import dataclasses
import inspect

import pytest
import torch
from conftest import BASE, load_policy, make_batch
from test_papers import patched

import dapo
import grpo
import lite_ppo
from infra import packs

pytestmark = pytest.mark.trl

MODULES = {"grpo": grpo, "dapo": dapo, "lite_ppo": lite_ppo}
P, G, LIMIT, TRL_EPS = 4, 4, 48, 1e-4  # prompts, responses to each; TRL adds 1e-4 to a standard deviation, we add 1e-6
REWARDS = [[1.0, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]  # unequal, and one group with equal rewards
NORMS = {"group_mean": "none", "group_mean_group_std": "group", "group_mean_batch_std": "batch"}  # TRL's scale_rewards
LOSS_AGGS = {"token_mean": "dapo", "seq_mean": "grpo", "constant": "dr_grpo"}  # TRL's loss_type
SCRIPTS = [  # the loss of a whole script, with the defaults of its paper
    (
        {"script": "grpo"},
        {"scale_rewards": "group", "loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
    ),
    ({"script": "dapo"}, {"scale_rewards": "group", "loss_type": "dapo", "epsilon_high": 0.28}),
    ({"script": "lite_ppo"}, {"scale_rewards": "batch", "loss_type": "dapo"}),
]
CASES = [  # ours, TRL's
    *SCRIPTS,
    *[({"norm": ours}, {"scale_rewards": theirs}) for ours, theirs in NORMS.items()],
    *[({"loss_agg": ours}, {"loss_type": theirs}) for ours, theirs in LOSS_AGGS.items()],
    ({"clip_low": 0.1, "clip_high": 0.28}, {"epsilon": 0.1, "epsilon_high": 0.28}),
    ({"kl_coef": 0.5, "kl_estimator": "k3"}, {"beta": 0.5, "use_bias_correction_kl": False}),
    ({"temperature": 0.7}, {"temperature": 0.7}),
    ({"overlong": "filter", "loss_agg": "token_mean"}, {"mask_truncated_completions": True, "loss_type": "dapo"}),
]
DEFAULTS = dict(
    norm="group_mean_group_std", loss_agg="seq_mean", clip_low=0.2, clip_high=0.2, kl_coef=0.0, temperature=1.0
)


@pytest.fixture(scope="module")
def batch():
    """16 responses of random tokens, every fifth without EOS, the others with one at their end only"""
    batch = make_batch(P * G, longest=LIMIT)
    for i, response in enumerate(batch):
        response.problem = batch[i - i % G].problem  # four responses to one prompt
        if not response.truncated:
            response.ids[-1] = 1
    return batch


def shaken_model():
    from transformers import AutoModelForCausalLM

    model, g = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * p.std() * torch.randn(p.shape, generator=g)
    return model


def drift(batch):  # -> by how much the old log-probabilities differ from the new: ratios of about 0.6 to 1.7
    g = torch.Generator().manual_seed(1)
    return [0.3 * torch.randn(len(r.ids), generator=g) for r in batch]


def make_trainer(folder, kind, settings, **how):
    """-> TRL's trainer of this kind ("GRPO"), its rows"""
    import datasets
    import transformers
    import trl

    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    assert tokenizer.eos_token_id == 1
    config = getattr(trl, f"{kind}Config")(
        output_dir=str(folder), use_cpu=True, report_to=[], bf16=False, num_generations=G, max_completion_length=LIMIT,
        per_device_train_batch_size=P * G, gradient_accumulation_steps=1, gradient_checkpointing=False, **settings,
    )  # fmt: skip
    rows = [{"prompt": f"problem {i // G}"} for i in range(P * G)]
    trainer = getattr(trl, f"{kind}Trainer")(
        shaken_model(),
        reward_funcs=lambda completions, **_: [r for group in REWARDS for r in group],
        args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer, **how,
    )  # fmt: skip
    trainer.model.train()
    return trainer, rows


def theirs(batch, folder, engine_logps=None, **settings):
    """-> TRL's advantages, loss and gradient. engine_logps: of a vLLM that is not there"""

    def rollout(prompts, trainer):
        ids = [[r.problem["prompt_ids"] for r in batch], [r.ids.tolist() for r in batch]]
        return {"prompt_ids": ids[0], "completion_ids": ids[1], "logprobs": engine_logps}

    settings = {"beta": 0.0, "epsilon": 0.2, "loss_type": "grpo", "scale_rewards": "group"} | settings
    trainer, rows = make_trainer(folder, "GRPO", settings, rollout_func=rollout)
    trainer.use_vllm, trainer._last_loaded_step = engine_logps is not None, 0
    trainer.current_gradient_accumulation_steps = 1  # train() would set it
    inputs = trainer._generate_and_score_completions(rows)
    with torch.no_grad():
        pair = [torch.cat([inputs[f"prompt_{x}"], inputs[f"completion_{x}"]], dim=1) for x in ("ids", "mask")]
        logp = trainer._get_per_token_logps_and_entropies(trainer.model, *pair, inputs["completion_ids"].shape[1])[0]
    padded = torch.nn.utils.rnn.pad_sequence(drift(batch), batch_first=True)
    inputs["old_per_token_logps"] = logp - padded
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    return inputs["advantages"], loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}


def ours(batch, policy_loss=None, bias_correction=False, adv=None, engine_logps=None, **settings):
    """-> our advantages, loss and gradient, from the functions of the scripts in the order of their main()"""
    script = MODULES[settings.get("script", "grpo")]
    stated = {k: v[0] for k, v in script.DEFAULTS.items() if k in DEFAULTS or k == "kl_estimator"}
    a = DEFAULTS | (stated if "script" in settings else {}) | settings
    policy, ref_model = shaken_policy(), load_policy()
    adv = script.advantages(torch.tensor(REWARDS), a["norm"]).flatten() if adv is None else adv
    lengths = torch.tensor([float(len(r.ids)) for r in batch])
    if a.get("overlong") == "filter":
        lengths[torch.tensor([r.truncated for r in batch])] = 0
    weight, total = script.token_weights(lengths, a["loss_agg"], LIMIT), 0
    [mini] = packs.minibatches(batch, lengths > 0, torch.ones(P * G), 1, 200)
    for pack in mini:
        logp, _ = policy(pack, a["temperature"])
        old_logp = logp.detach() - torch.cat([drift(batch)[i] for i in pack.rows.unique_consecutive()])
        f = policy_loss or script.policy_loss
        more = [pack.local_rows] if "row" in inspect.signature(f).parameters else []
        loss, ratio, *_ = f(logp, old_logp, adv[pack.rows], a["clip_low"], a["clip_high"], *more)
        if a["kl_coef"]:
            ref_logp = ref_model(pack, a["temperature"])[0].detach()
            divergence = grpo.kl(logp, ref_logp, a["kl_estimator"])
            loss = loss + a["kl_coef"] * divergence * (ratio if bias_correction else 1)
        if engine_logps:
            engine_logp = torch.cat([torch.tensor(engine_logps[i]) for i in pack.rows.unique_consecutive()])
            loss = loss * (logp.detach() - engine_logp).exp().clamp(max=2)
        loss = (loss * weight[pack.rows]).sum()
        loss.backward()
        total += loss.detach()
    return adv, total, {n: p.grad for n, p in policy.lm.named_parameters()}


def shaken_policy():
    policy = load_policy()
    policy.lm.load_state_dict(shaken_model().state_dict())
    return policy


def assert_same(got, want):
    (adv, loss, gradient), (their_adv, their_loss, their_gradient) = got, want
    torch.testing.assert_close(adv, their_adv, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(loss, their_loss, atol=1e-5, rtol=1e-5)
    assert gradient.keys() == their_gradient.keys()
    largest = max(float(g.abs().max()) for g in their_gradient.values())
    assert largest > 1e-2
    off = max(float((gradient[n] - g).abs().max()) for n, g in their_gradient.items())
    print(
        f"loss {float(loss):.5f}, off by {abs(float(loss - their_loss)):.0e}; gradient off by {off:.0e} of {largest:.2f}"
    )
    assert off < 1e-5 * max(1, largest)


@pytest.mark.parametrize("our_settings, their_settings", CASES)
def test_the_same_loss_and_gradient(our_settings, their_settings, batch, tmp_path, monkeypatch):
    for script in MODULES.values():
        monkeypatch.setattr(script, "EPS", TRL_EPS)
    assert_same(ours(batch, **our_settings), theirs(batch, tmp_path, **their_settings))


@pytest.mark.parametrize("norm", NORMS)
def test_the_stated_difference(norm, batch, tmp_path):
    """Without changing EPS the advantages differ by the factor (std + 1e-4) / (std + 1e-6), and by nothing else."""
    adv, their_adv = ours(batch, norm=norm)[0], theirs(batch, tmp_path, scale_rewards=NORMS[norm])[0]
    rewards = torch.tensor(REWARDS)
    std = {"group_mean": None, "group_mean_group_std": rewards.std(1, keepdim=True).expand(P, G).flatten()}
    std = std.get(norm, rewards.std().expand(P * G))
    factor = 1 if std is None else (std + 1e-4) / (std + 1e-6)
    torch.testing.assert_close(adv, their_adv * factor, atol=1e-6, rtol=1e-6)


def test_trl_multiplies_the_kl_with_the_ratio(batch, tmp_path, monkeypatch):
    """By default; GRPO's paper does not, nor do we."""
    monkeypatch.setattr(grpo, "EPS", TRL_EPS)
    got = ours(batch, kl_coef=0.5, kl_estimator="k3", bias_correction=True)
    assert_same(got, theirs(batch, tmp_path, beta=0.5))
    assert abs(float(got[1] - ours(batch, kl_coef=0.5, kl_estimator="k3")[1])) > 1e-3


def test_a_filtered_response_counts_differently_in_a_sequence_mean(batch, tmp_path, monkeypatch):
    """TRL's mask takes the tokens away and keeps the response in the mean; ours takes both."""
    monkeypatch.setattr(grpo, "EPS", TRL_EPS)
    adv, loss, gradient = ours(batch, overlong="filter")
    left = sum(not r.truncated for r in batch) / len(batch)
    gradient = {n: g * left for n, g in gradient.items()}
    assert_same((adv, loss * left, gradient), theirs(batch, tmp_path, mask_truncated_completions=True))


def of_paper(paper, name):
    return paper.DEFAULTS[name][0]


def test_gspo(batch, tmp_path, monkeypatch):
    monkeypatch.setattr(grpo, "EPS", TRL_EPS)
    gspo = patched("gspo", tmp_path / "copy")
    got = ours(batch, gspo.policy_loss, loss_agg=of_paper(gspo, "loss_agg"), clip_low=0.05, clip_high=0.05)
    settings = {"importance_sampling_level": "sequence", "epsilon": 0.05, "epsilon_high": 0.05}
    assert_same(got, theirs(batch, tmp_path, **settings))


def test_cispo(batch, tmp_path, monkeypatch):
    """TRL's epsilon_high is the bound itself, not its distance from 1."""
    monkeypatch.setattr(grpo, "EPS", TRL_EPS)
    cispo = patched("cispo", tmp_path / "copy")
    settings = {name: of_paper(cispo, name) for name in ("norm", "loss_agg", "clip_low", "clip_high")}
    got = ours(batch, cispo.policy_loss, **settings)
    assert_same(got, theirs(batch, tmp_path, loss_type="cispo", epsilon_high=1 + settings["clip_high"]))


def test_dr_grpo(batch, tmp_path):
    paper = patched("dr_grpo", tmp_path / "copy")
    got = ours(batch, **{name: of_paper(paper, name) for name in ("norm", "loss_agg", "kl_coef")})
    assert_same(got, theirs(batch, tmp_path, loss_type="dr_grpo", scale_rewards="none"))


def test_truncated_importance_sampling(batch, tmp_path, monkeypatch):
    """The engine samples from the model before it was shaken; its ratios reach from below 0.5 to the bound of 2."""
    monkeypatch.setattr(grpo, "EPS", TRL_EPS)
    (pack,), engine = (
        packs.minibatches(batch, torch.ones(P * G) > 0, torch.ones(P * G) > 0, 1, 10_000)[0],
        load_policy(),
    )
    logp, shaken = (model(pack, 1.0)[0].detach() for model in (engine, shaken_policy()))
    ratio = (shaken - logp).exp()
    assert ratio.min() < 0.5 and ratio.max() > 2
    logps = [logp[pack.rows == i].tolist() for i in range(P * G)]
    settings = {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 2.0}
    assert_same(ours(batch, engine_logps=logps), theirs(batch, tmp_path, engine_logps=logps, **settings))


def test_rloo(batch, tmp_path):
    """Of responses of up to eight tokens: a ratio is e to a sum over all of them, which rounds by as much as it is large."""
    batch = [dataclasses.replace(r, ids=r.ids[-8:]) for r in batch]
    paper, kl_coef = patched("rloo", tmp_path / "copy"), 0.05
    trainer, rows = make_trainer(tmp_path, "RLOO", {"beta": kl_coef, "epsilon": 0.2})
    trainer._tokenize_prompts = lambda prompts: ([r.problem["prompt_ids"] for r in batch], None, {})
    trainer._generate_single_turn = lambda *_: [r.ids.tolist() for r in batch]
    inputs = trainer._generate_and_score_completions(rows)
    inputs["old_logps"] = inputs["old_logps"] - torch.stack([d.sum() for d in drift(batch)]) / 10
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    want = inputs["advantages"], loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters()}

    made, policy, ref_model = (
        packs.minibatches(batch, *[torch.ones(P * G) > 0] * 2, 1, 200),
        shaken_policy(),
        load_policy(),
    )
    gaps = [(policy(pack, 1.0)[0] - ref_model(pack, 1.0)[0]).detach() for pack in made[0]]
    rewards = torch.tensor(REWARDS) - kl_coef * packs.per_response(made[0], gaps, P * G).view(P, G)
    adv = paper.advantages(rewards, of_paper(paper, "norm")).flatten()
    with pytest.MonkeyPatch.context() as patch:
        tenth = [d / 10 for d in drift(batch)]
        patch.setitem(globals(), "drift", lambda _: tenth)
        got = ours(batch, paper.policy_loss, adv=adv, loss_agg=of_paper(paper, "loss_agg"))
    assert_same(got, want)
