"""What only a GPU shows: `pytest -m gpu`. Written for vLLM 0.26 with torch 2.11 up to the pinned versions.

vLLM's sleep mode, the trainer in bf16, the plan's peaks, whole runs. The model is made here, from a configuration, large enough
for its memory to show. tests/bench_gpu.py measures speed.
"""

import gc
import subprocess
import sys

import pytest
import torch
from conftest import BASE, ROOT, engine_args, load_policy, make_batch, read_metrics
from test_engine import generate, make_problems

from infra import engines, packs, plan, runs
from infra import policy as policy_module

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
GIB = 2**30


def free():
    """Bytes nobody holds on this GPU, once the trainer's allocator has given back what it does not use."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    config = Qwen3Config(
        vocab_size=4096, hidden_size=1024, intermediate_size=3072, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    lm = Qwen3ForCausalLM(config)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def policy(model):
    """As the trainer holds it: fp32 weights, computing in bf16"""
    return policy_module.shard(load_policy(model), engine_args(sharding="fsdp"))


@pytest.fixture(scope="module")
def engine(model):
    """The engine, and how much was free before it was made."""
    from transformers import AutoTokenizer

    before = free()  # no trainer on the GPU yet
    args = engine_args(model=model, max_response_len=256)
    engine = engines.VllmEngine(args, AutoTokenizer.from_pretrained(model), kv_cache_bytes=24 * GIB)
    yield engine, before
    engine.close()


def gap(policy, batch):
    pack = packs.Pack(batch, range(len(batch)))
    with torch.no_grad():
        return policy(pack, 1.0)[0] - pack.engine_logp


def k3(d):
    return (d.exp() - 1 - d).mean().item()


def shake(policy, model, seed):
    """A random change of every weight, away from the model as it is stored."""
    g = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for p, stored in zip(policy.parameters(), load_policy(model).cuda().parameters()):
            size = 0.3 * stored.std().clamp(min=1e-3)
            p.to_local().copy_(stored + size * torch.randn(p.shape, generator=g, device="cuda"))


def test_sleep_returns_the_memory(engine, policy):
    engine, before = engine
    before -= sum(p.numel() * 4 for p in policy.parameters())  # the trainer's
    engine.wake()
    engine.load(policy)
    awake = free()
    engine.sleep()
    asleep = free()
    print(f"vLLM awake holds {(before - awake) / GIB:.2f} GiB, asleep {(before - asleep) / GIB:.2f} GiB")
    assert before - awake > 24 * GIB
    assert asleep - awake >= 0.9 * (before - awake)


def test_load_after_wake_gives_the_trainers_log_probabilities(engine, policy, model):
    engine, _ = engine
    for seed in (1, 2, 3):
        batch = generate(engine, policy)
        fresh = gap(policy, batch)
        shake(policy, model, seed)
        stale = gap(policy, batch)
        print(f"k3 fresh {k3(fresh):.1e}, stale {k3(stale):.1e}; mean |gap| fresh {fresh.abs().mean():.4f}")
        assert k3(fresh) < 1e-3 and fresh.clamp(min=0).mean() < runs.STALE[torch.bfloat16]
        assert k3(stale) > 1e-2 and stale.clamp(min=0).mean() > runs.STALE[torch.bfloat16]


def test_twenty_cycles_leak_nothing(engine, policy, model):
    engine, _ = engine
    left = []
    for cycle in range(20):
        shake(policy, model, cycle)
        batch = generate(engine, policy, n=2)
        assert k3(gap(policy, batch)) < 1e-3
        left.append(free())
    print(f"free after cycle 2: {left[1] / GIB:.3f} GiB, after cycle 20: {left[-1] / GIB:.3f} GiB")
    assert left[1] - left[-1] < 0.05 * GIB


def test_same_seed_same_tokens(engine, policy):
    engine, _ = engine
    one, two = (generate(engine, policy, problems=make_problems(engine.tokenizer)) for _ in range(2))
    same = [a.ids.tolist() == b.ids.tolist() for a, b in zip(one, two)]
    assert sum(same) >= 0.9 * len(same)  # kernels that depend on the batch may flip a near tie


def test_varlen_equals_one_sequence_at_a_time(policy, model):
    """Log-probabilities and a gradient of the packed bf16 pass against dense attention, one sequence at a time."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="sdpa").cuda()
    batch, rows = make_batch(8), []
    logp, _ = policy(packs.Pack(batch, range(8)), 1.0)
    logp.sum().backward()
    for r in batch:
        ids = torch.cat([torch.tensor(r.problem["prompt_ids"]), r.ids]).cuda()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = plain(input_ids=ids[None]).logits[0, -len(r.ids) - 1 : -1].float()
        rows.append(logits.log_softmax(-1).gather(-1, r.ids.cuda()[:, None])[:, 0])
    torch.cat(rows).sum().backward()
    grads = [lm.get_submodule("model.layers.0.self_attn.q_proj").weight.grad for lm in (policy.lm, plain)]
    assert grads[0].dtype == torch.float32
    assert (logp - torch.cat(rows)).abs().mean() < 0.02  # bf16 on both sides
    assert torch.nn.functional.cosine_similarity(*(policy_module.unsharded(g).flatten() for g in grads), dim=0) > 0.99


@pytest.mark.parametrize("layers, tokens", [(2, 4096), (12, 32768)])
def test_the_plans_peak(layers, tokens, model, tmp_path):
    """Two updates of a full pack at Qwen3's 152k words: what torch allocates at most beside weights, gradients and Adam. In the small
    one the output layer needs the most, in the large one a decoder layer."""
    from transformers import AutoConfig, Qwen3ForCausalLM

    config = AutoConfig.from_pretrained(model)
    config.vocab_size, config.num_hidden_layers, config.layer_types = 151936, layers, None
    config = type(config).from_dict(config.to_dict())
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    args = engine_args(model=str(tmp_path), sharding="fsdp", tokens_per_gpu=tokens)
    free()
    before = torch.cuda.memory_allocated()
    policy = policy_module.load_policy(args)
    optimizer = policy_module.make_optimizer(args, policy)
    batch = make_batch(tokens // 16, longest=30)
    lengths = [len(r.problem["prompt_ids"]) + len(r.ids) for r in batch]
    pack = packs.Pack(batch, range(max(i for i in range(len(batch)) if sum(lengths[:i]) <= tokens)))
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for _ in range(2):  # the peak is in the second: the head's backward pass with all gradients there
            logp, _ = policy(pack, 1.0)
            logp.sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    s = plan.Shape(config)
    peak = torch.cuda.max_memory_allocated() - before - 16 * s.params
    planned = sum(row[1] for row in plan.trainer(args, s, 1).values()) - 16 * s.params
    print(
        f"{layers} layers, {tokens} tokens: peak {peak / GIB:.2f} GiB beside the weights, planned {planned / GIB:.2f}"
    )
    assert peak == pytest.approx(planned, rel=0.15)


RUNS = {
    "sleep": ["--sleep", "on"],
    "awake": ["--sleep", "off"],
    "lora": ["--lora_rank", "16", "--lr", "3e-3"],
    "compile": ["--compile", "on"],
    "model_head": ["--head_dtype", "model"],
    "ddp": ["--sharding", "ddp"],
    "trusting": ["--old_logp", "rollout"],
}


SEVERAL = {  # on two GPUs
    "fsdp": ["--sharding", "fsdp"],
    "ddp": ["--sharding", "ddp"],
    "tensor_parallel": ["--vllm_tensor_parallel", "2"],
}


def learns(tmp_path, launcher, more):
    """The real command on the laptop's model, sampled by vLLM, and once more after --resume."""
    tiny, folder = ROOT / "data" / "tiny", tmp_path / "run"
    flags = ["--scale", "node", "--model", BASE, "--data", tiny / "easy.jsonl", "--eval_data", tiny / "eval_easy.jsonl"]
    flags += ["--prompts_per_step", 16, "--minibatches", 4, "--lr", "3e-4", "--warmup_steps", 0, "--eval_samples", 2]
    flags += ["--temperature", 1, "--top_p", 1, "--top_k", 0, "--max_prompt_len", 64, "--max_response_len", 128]
    flags += ["--eval_max_response_len", 128, "--tokens_per_gpu", 4096, "--kv_cache_gib", 4, "--engine", "vllm"]
    for steps, these in ((10, [*flags, *more, "--out", folder]), (12, ["--resume", folder])):
        command = [sys.executable, *launcher, "lite_ppo.py", "--steps", steps, *these]
        done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    rows = read_metrics(folder)
    for row in rows[:12]:
        print({k: round(v, 4) for k, v in row.items() if "logp" in k or k.startswith(("time/", "perf/"))})
    assert [row["step"] for row in rows] == list(range(13))
    assert max(row["rollout/logp_k3"] for row in rows[:12] if "rollout/logp_k3" in row) < 1e-3
    first, last = (sum(row["rollout/accuracy"] for row in part) / 3 for part in (rows[:3], rows[9:12]))
    assert last > first + 0.1


@pytest.mark.parametrize("name", RUNS)
def test_a_run_learns(name, tmp_path):
    learns(tmp_path, [], RUNS[name])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("name", SEVERAL)
def test_a_run_on_two_gpus_learns(name, tmp_path):
    learns(tmp_path, ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2], SEVERAL[name])
