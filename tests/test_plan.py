"""Memory and work: what `--plan` says against what tensors really take, and what must never be allocated."""

import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from by_hand import load_module
from conftest import BASE, ROOT, engine_args, load_policy, make_batch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from infra import attention, engines, flags, packs, plan
from infra import policy as policy_module

GIB = plan.GIB
SIZES = {  # of Qwen3, from their configurations
    "0.6B": dict(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16),
    "4B": dict(hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32),
    "8B": dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32),
}


def config(size, **changes):
    from transformers import Qwen3Config

    shared = dict(num_key_value_heads=8, head_dim=128, vocab_size=151936, max_position_embeddings=32768)
    return Qwen3Config(**shared | SIZES[size] | dict(tie_word_embeddings=size != "8B") | changes)


def node_args(**changes):
    """The paper's settings on a node"""
    node = {name: value for name, (_, value) in flags.MACHINE.items()}
    paper = dict(
        model="Qwen/Qwen3-4B-Base", prompts_per_step=128, group_size=8, steps=500, old_logp="recompute", lora_rank=0
    )
    paper |= dict(max_prompt_len=2048, max_response_len=8192, eval_max_response_len=8192, reference=False)
    return engine_args(**node | paper | changes)


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors made within it while they live; `sizes`: of each that was made. Works without memory, too."""

    def __init__(self, known):
        super().__init__()
        self.now, self.peak, self.sizes = 0, 0, []
        self.seen = {t.untyped_storage()._cdata for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in self.seen:
                storage = t.untyped_storage()
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                self.sizes.append(storage.nbytes())
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.seen.discard(key)
        self.now -= size


def meta_policy(config, monkeypatch):
    """A bf16 policy as on a GPU, of tensors without memory"""
    from transformers import AttentionInterface, AutoModelForCausalLM

    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda positions: None)

    def attend(q, k, v, starts, longest, scaling, *_):
        return attention.varlen_attention(q, k, v, starts, longest, scaling)

    monkeypatch.setattr(attention, "attend", attend)  # what it is on a GPU
    AttentionInterface.register("varlen", attention.packed_attention)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="varlen")
    policy_module.checkpoint_activations(lm)
    return policy_module.Policy(lm)


def test_the_experts_that_a_token_meets():
    """Qwen3-30B-A3B: its authors count 30.5 billion parameters, 3.3 of them active."""
    from transformers import Qwen3MoeConfig

    sizes = dict(hidden_size=2048, num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128)
    experts = dict(num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768)
    s = plan.Shape(Qwen3MoeConfig(vocab_size=151936, max_position_embeddings=40960, **sizes, **experts))
    assert s.params == pytest.approx(30.5e9, rel=0.01)
    assert s.computed + s.head == pytest.approx(3.3e9, rel=0.02)  # with the embedding, which is looked up
    assert s.flops([1]) == pytest.approx(6 * s.computed, rel=0.01)


PASSES = [
    ("4B", 32768, 0),
    ("4B", 16384, 0),
    ("8B", 32768, 0),
    ("0.6B", 8192, 0),
    ("4B", 32768, 512),
    ("8B", 16384, 64),
]


@pytest.mark.parametrize("size, tokens, shared", PASSES)
def test_the_plans_activations_are_those_of_a_pass(size, tokens, shared, monkeypatch):
    """Forward and backward of one pack, tensor by tensor, within 15 %; weights and their gradients aside.

    shared: tokens of prompts that stand once and are repeated for attention alone"""
    policy = meta_policy(config(size), monkeypatch)
    ids, starts = (
        torch.empty(tokens - shared, dtype=torch.long, device="meta"),
        torch.empty(5, dtype=torch.int32, device="meta"),
    )
    parameters = list(policy.parameters())
    with Live([*parameters, *policy.buffers()]) as live:
        fields = dict(positions=ids, select=ids, labels=ids, starts=starts, longest=tokens // 4)
        layout = [0, 1, 0, 1] if shared else [0, 1]  # one prompt before two responses
        pieces = [shared, tokens - 2 * shared] if shared else [1, tokens - 1]
        logp, entropy = policy(SimpleNamespace(ids=ids, pieces=pieces, layout=layout, **fields), 1.0)
        logp.sum().backward()
    s = plan.Shape(config(size))
    assert s.params == sum(p.numel() for p in parameters)
    # here all weights' bf16 gradients are alive when the first layer is done; in a run they leave layer by layer
    gradients, kept = 2 * s.params, tokens * s.checkpointed
    in_a_layer, in_the_head = tokens * s.in_a_layer, s.in_the_head(False)
    want = max(kept + in_the_head, kept + in_a_layer + 2 * s.head, gradients + in_a_layer)
    print(f"{size}, {tokens} tokens: {live.peak / GIB:.2f} GiB, planned {want / GIB:.2f}")
    assert live.peak == pytest.approx(want, rel=0.15)


def test_no_tensor_of_all_tokens_and_words_is_made():
    """A vocabulary of 50,000 tokens: the largest tensor is a chunk's, and the chunks do not pile up."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    words, tokens = 50_000, 3 * policy_module.HEAD_CHUNK + 100
    small = Qwen3Config(
        vocab_size=words, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=True,
    )  # fmt: skip
    load_policy()  # transformers knows the packed attention from here on
    policy = policy_module.Policy(AutoModelForCausalLM.from_config(small, attn_implementation="packed"))
    long = engines.Response(
        {"id": "1", "prompt_ids": [1]}, torch.arange(tokens) % words, torch.zeros(tokens), False, ""
    )
    pack = packs.Pack([long], [0])
    with Live(policy.parameters()) as live:
        logp, entropy = policy(pack, 1.0)
        logp.sum().backward()
    chunk = 4 * policy_module.HEAD_CHUNK * words
    assert max(live.sizes) <= chunk < 4 * tokens * words
    assert live.peak < 2.5 * chunk  # two at a time: the words' log-probabilities, and what is made of them
    assert live.now < 0.2 * chunk  # nothing stays until the outputs go


def test_memory_by_hand():
    """Qwen3-4B on eight GPUs: 4,022,468,096 parameters, 4 + 8 + 4 bytes each, sharded over 8."""
    s = plan.Shape(config("4B"))
    assert s.params == 4_022_468_096 and s.head == 151936 * 2560 and s.tied and s.layers == 36
    rows = plan.memory(node_args(), s, 8)
    assert rows["weights, fp32"] == (4 * s.params / 8,) * 2
    assert rows["Adam's moments"] == (s.params,) * 2 and rows["gradients, fp32"] == (0, s.params / 2)
    assert rows["vLLM's weights"] == (2 * s.params, 0)
    _, token = plan.kv_cache(node_args(), s, 8, 80)
    assert token == 36 * 8 * 128 * 2 * 2  # layers, heads, their size, keys and values, two bytes: 144 KiB
    assert plan.memory(node_args(sharding="ddp"), s, 8)["weights, fp32"] == (4 * s.params,) * 2
    assert plan.memory(node_args(sleep="off"), s, 8)["vLLM's weights"] == (2 * s.params,) * 2
    assert plan.memory(node_args(vllm_tensor_parallel=2), s, 8)["vLLM's weights"] == (s.params, 0)
    assert plan.memory(node_args(reference=True), s, 8)["reference, bf16"] == (s.params / 4,) * 2
    lora = plan.memory(node_args(lora_rank=16, reference=True), s, 8)
    assert lora["Adam's moments"][0] == 16 * s.lora and "reference, bf16" not in lora  # 8 bytes, 8 GPUs
    linear = 2560 * (4096 + 1024 + 1024) + 4096 * 2560 + 3 * 2560 * 9728  # of a layer
    assert s.layer == linear + 2 * 2560 + 2 * 128  # norms
    assert s.lora == 36 * (2 * (2560 + 4096) + 2 * (2560 + 1024) + 3 * (2560 + 9728))


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_work_is_what_torch_counts(lora_rank):
    """Forward and backward of dense layers. Attention, which torch counts without the causal half, is put aside on both sides."""
    policy, batch = load_policy(lora_rank=lora_rank), make_batch(4)
    pack = packs.Pack(batch, range(4))
    with FlopCounterMode(display=False) as counter:
        logp, _ = policy(pack, 1.0)
        logp.sum().backward()
    dense = sum(n for op, n in counter.get_flop_counts()["Global"].items() if op.__name__.startswith(("mm", "addmm")))
    s = plan.Shape(load_policy().lm.config)
    attention = 6 * s.layers * s.q * sum(n * n for n in pack.lengths)
    planned = s.flops(pack.lengths, lora=lora_rank > 0) - attention
    # the output layer sees the responses alone, and its part is computed once more in the backward pass
    prompts, responses = (sum(len(r.problem["prompt_ids"]) for r in batch), sum(len(r.ids) for r in batch))
    planned += s.head * (2 * responses - (4 if lora_rank else 6) * prompts)
    # an adapter's own products, and the first layer's inputs, of which nobody asks the gradient
    planned += (6 * lora_rank * s.lora - 2 * s.hidden * (s.q + 2 * s.kv)) * (prompts + responses) * (lora_rank > 0)
    assert dense == pytest.approx(planned, rel=0.01)


REFUSED = {  # what does not fit on so many GPUs of so many GiB, and the flag to change
    "ddp": (8, 80, {"sharding": "ddp"}, "give --sharding fsdp"),
    "one_gpu": (1, 72, {"tokens_per_gpu": 12288}, "give --lora_rank 32, a smaller --model, or more GPUs"),
    "pack": (8, 40, {"tokens_per_gpu": 98304}, "lower --tokens_per_gpu to"),
    "one_gpu_pack": (1, 81, {"tokens_per_gpu": 32768}, "lower --tokens_per_gpu to"),
    "awake": (8, 40, {"sleep": "off", "kv_cache_gib": 20, "tokens_per_gpu": 10240}, "give --sleep on"),
    "cache": (8, 80, {"kv_cache_gib": 70}, "--kv_cache_gib 70: sampling needs"),
    "lora": (1, 24, {"lora_rank": 32, "tokens_per_gpu": 10240}, "give a smaller --model"),
    "small_cache": (8, 80, {"kv_cache_gib": 0.5}, "--kv_cache_gib 0.5: the longest response needs 1.4 GiB"),
    "no_cache": (
        1,
        29,
        {"lora_rank": 8, "tokens_per_gpu": 10240},
        "--max_response_len 8192: the longest response needs 1.4 GiB",
    ),
}


@pytest.mark.parametrize("gpus, gib, changes, advice", REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused(gpus, gib, changes, advice):
    s = plan.Shape(config("4B"))
    assert not plan.refusal(node_args(), s, 8, 80)
    args = node_args(**changes)
    said = plan.refusal(args, s, gpus, gib)
    assert advice in said and "\n" not in said
    if "lower --tokens_per_gpu to" in said:  # and what it says does help
        args.tokens_per_gpu = int(said.split()[-1])
        assert not plan.refusal(args, s, gpus, gib)


@pytest.mark.parametrize("size", SIZES)
def test_what_a_refusal_advises_helps(size):
    s, advised = plan.Shape(config(size)), 0
    for gpus in (1, 2, 4, 8):
        for gib in range(16, 81, 2):
            for tokens in (10240, 16384, 32768, 65536):
                said = plan.refusal(node_args(tokens_per_gpu=tokens), s, gpus, gib)
                if said and "lower --tokens_per_gpu to" in said:
                    advised += 1
                    again = plan.refusal(node_args(tokens_per_gpu=int(said.split()[-1])), s, gpus, gib)
                    assert not again or not again.startswith("--tokens_per_gpu"), (gpus, gib, tokens, said, again)
    assert advised > 5


def test_the_cache_fills_what_is_free():
    s = plan.Shape(config("4B"))
    for changes in ({}, {"sleep": "off"}, {"lora_rank": 8}, {"reference": True}):
        args = node_args(**changes)
        cache, _ = plan.kv_cache(args, s, 8, 80)
        held = max(plan.totals(args, s, 8)) if args.sleep == "off" else plan.totals(args, s, 8)[0]
        assert held + cache == pytest.approx(0.95 * 80 * GIB)
    tiny = plan.Shape(config("0.6B"))
    cache, token = plan.kv_cache(node_args(max_response_len=100, eval_max_response_len=100), tiny, 8, 80)
    assert cache == engines.MAX_SEQS * (2048 + 100) * token  # no more than can ever be used


def test_alone_vllm_gets_the_trainers_room(monkeypatch):
    """data/difficulty.py has no trainer and none of its flags."""
    difficulty, s = load_module(ROOT / "data" / "difficulty.py"), plan.Shape(config("4B"))
    args = difficulty.parse_args(
        ["--scale", "node", "--data", str(ROOT / "data" / "tiny" / "easy.jsonl"), "--model", BASE]
    )
    cache, token = plan.kv_cache(args, s, 8, 80, alone=True)
    room = 0.95 * 80 * GIB - 2 * s.params - plan.OVERHEAD
    assert cache == min(room, 128 * (2048 + 8192) * token) > plan.kv_cache(node_args(), s, 8, 80)[0]


def run_plan(*flags):
    tiny = ROOT / "data" / "tiny"
    data = ["--data", tiny / "easy.jsonl", "--eval_data", tiny / "eval_easy.jsonl"]
    command = [sys.executable, "lite_ppo.py", "--scale", "node", *data, *flags]
    return subprocess.run([str(c) for c in command], cwd=ROOT, capture_output=True, text=True)


def test_plan_from_the_command_line(tmp_path):
    """Of a folder with a configuration alone: no weights are read, nothing is written."""
    config("4B", architectures=["Qwen3ForCausalLM"]).save_pretrained(tmp_path / "model")
    done = run_plan("--plan", "8x80", "--model", tmp_path / "model", "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "4.02 billion parameters; 8 x 80 GiB, --sharding fsdp" in done.stdout and "a step in about" in done.stdout
    done = run_plan("--plan", "1x60", "--model", tmp_path / "model", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--lora_rank 32" in done.stderr
    assert "total" in done.stdout and "a step" not in done.stdout
    assert not (tmp_path / "run").exists()
    done = run_plan("--plan", "8", "--model", BASE)
    assert done.returncode == 2 and "like 8x80" in done.stderr


@pytest.mark.parametrize("budget", [16384, 32768])
def test_packing_wastes_little(budget, monkeypatch):
    """1,024 responses of the paper's law, log-normal with sigma 0.8, at most 8,192 tokens, on eight GPUs: the packs' empty room
    and the busiest GPU's work over the mean. One optimizer step; smaller ones end in a pack that is partly full."""
    g = torch.Generator().manual_seed(0)
    lengths = (3000 * (0.8 * torch.randn(1024, generator=g)).exp()).clamp(10, 8192).long().tolist()
    batch = [
        engines.Response({"prompt_ids": [0] * 100}, torch.zeros(n, dtype=torch.long), torch.zeros(n), False, "")
        for n in lengths
    ]
    monkeypatch.setattr(packs, "world", lambda: 8)
    plans = []
    for r in range(8):
        monkeypatch.setattr(packs, "rank", lambda r=r: r)
        [mini] = packs.minibatches(batch, *torch.ones(2, 1024), 1, budget)
        plans.append(mini)
    room = sum(len(packs) for packs in plans) * budget
    waste = 1 - sum(len(pack.ids) for packs in plans for pack in packs if pack.lengths) / room
    work = [sum(n * (24576 + n) for pack in packs for n in pack.lengths) for packs in plans]
    print(f"packs of {budget}: {waste:.1%} empty, busiest GPU {max(work) / sum(work) * 8:.3f}")
    assert waste < 0.1 and max(work) / sum(work) * 8 < 1.01
