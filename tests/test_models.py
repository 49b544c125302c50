"""Every kind of model is trained right, or refused in one line before a run begins. data/README.md shows the table.

Models are tiny and random, of transformers' own configurations, with windows that sequences of 40 tokens pass."""

import functools
import json
import os

import pytest
import torch
from conftest import BASE, ROOT, SMALL, WORDS, engine_args, load_policy, run_main
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

import lite_ppo
from data.problems import load_problems
from infra import attention, engines, packs, plan, runs, selftest
from infra import policy as policy_module
from infra.processes import refused

TINY = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    max_position_embeddings=512, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    n_group=1, topk_group=1, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
    first_k_dense_replace=1, n_shared_experts=1, sliding_window=16, final_logit_softcapping=5.0,
    attn_logit_softcapping=2.0, logit_scale=0.3, logits_scaling=3.0,
)  # fmt: skip
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
WINDOW = dict(layer_types=["sliding_attention", "full_attention"])
TRAINED = {  # name: model type and what it is given beside TINY
    "Llama 3": ("llama", dict(attention_bias=True, rope_parameters=LLAMA3 | dict(original_max_position_embeddings=16))),
    "Llama, linear RoPE": ("llama", dict(rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=1e4))),
    "Llama, YaRN": ("llama", dict(rope_parameters=dict(rope_type="yarn", factor=4.0, rope_theta=1e4))),
    "Qwen2, Qwen2.5": ("qwen2", {}),
    "Qwen2, window": ("qwen2", dict(use_sliding_window=True, max_window_layers=0) | WINDOW),
    "Qwen2-MoE": ("qwen2_moe", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3-MoE": ("qwen3_moe", {}),
    "Mistral": ("mistral", {}),
    "Ministral": ("ministral", WINDOW),
    "Ministral 3": ("ministral3", {}),
    "Mixtral": ("mixtral", {}),
    "Gemma": ("gemma", {}),
    "Gemma 2": ("gemma2", WINDOW),
    "Gemma 3": ("gemma3_text", WINDOW),
    "VaultGemma": ("vaultgemma", WINDOW),
    "Phi-2": ("phi", dict(resid_pdrop=0.1)),
    "Phi-3, Phi-4": ("phi3", {}),
    "OLMo": ("olmo", {}),
    "OLMo 2": ("olmo2", {}),
    "OLMo 3": ("olmo3", WINDOW),
    "OLMoE": ("olmoe", {}),
    "SmolLM3": ("smollm3", {}),
    "Granite 3": ("granite", dict(attention_multiplier=0.3, embedding_multiplier=2.0, residual_multiplier=0.5)),
    "Granite MoE": ("granitemoe", {}),
    "Granite, sinks": ("granite_swa", {}),
    "Cohere": ("cohere", {}),
    "Cohere 2": ("cohere2", WINDOW),
    "GLM-4": ("glm4", {}),
    "GLM-4, first": ("glm", {}),
    "GLM-4.5": ("glm4_moe", {}),
    "EXAONE 4": ("exaone4", WINDOW),
    "StarCoder2": ("starcoder2", {}),
    "GPT-2": ("gpt2", {}),
    "GPT-NeoX": ("gpt_neox", {}),
    "gpt-oss": ("gpt_oss", WINDOW),
    "OPT": ("opt", dict(dropout=0.1, ffn_dim=96, word_embed_proj_dim=64)),
    "DeepSeek-V2": ("deepseek_v2", dict(num_key_value_heads=4, head_dim=8)),
    "DeepSeek-V3": ("deepseek_v3", dict(num_key_value_heads=4, head_dim=8)),
    "MiniMax-M2": ("minimax_m2", {}),
    "MiniCPM3": ("minicpm3", dict(num_key_value_heads=4, head_dim=8)),
    "HyperCLOVA X": ("hyperclovax", {}),
    "nanochat": ("nanochat", {}),
    "Apertus": ("apertus", {}),
    "Seed-OSS": ("seed_oss", {}),
    "Hunyuan": ("hunyuan_v1_dense", {}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "Arcee": ("arcee", {}),
    "Helium": ("helium", {}),
}
LONG = dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 8, long_factor=[4.0] * 8)
LINEAR = ["linear_attention", "full_attention"]
LINEAR_SIZES = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16)
MIXED = "log-probabilities of packed sequences differ"
REFUSED = {  # name: model type, what it is given, what the line says
    "Phi-3, past its first context": (
        "phi3", dict(original_max_position_embeddings=16, rope_parameters=LONG), MIXED),
    "Qwen3-Next": ("qwen3_next", dict(layer_types=LINEAR) | LINEAR_SIZES, MIXED),
    "Qwen3.5": ("qwen3_5_text", dict(layer_types=LINEAR) | LINEAR_SIZES, MIXED),
    "LFM2": ("lfm2", dict(layer_types=["conv", "full_attention"]), MIXED),
    "Mamba": ("mamba", {}, ""),
    "Mamba 2": ("mamba2", dict(num_heads=8, n_groups=2, expand=2), ""),
    "Jamba": ("jamba", dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2), ""),
    "Bamba": ("bamba", dict(attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16), ""),
    "Granite 4": (
        "granitemoehybrid", dict(layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=16), MIXED),
    "RecurrentGemma": ("recurrent_gemma", {}, ""),
    "BLOOM": ("bloom", {}, ""),
    "Falcon": ("falcon", {}, ""),
    "Falcon, alibi": ("falcon", dict(alibi=True), ""),
    "MPT": ("mpt", dict(d_model=64, n_heads=4, n_layers=2), ""),
    "GPT": ("openai-gpt", dict(n_embd=64, n_head=4, n_layer=2), ""),
    "GPT-J": ("gptj", dict(n_embd=64, n_head=4, n_layer=2, rotary_dim=8), ""),
    "CodeGen": ("codegen", dict(n_embd=64, n_head=4, n_layer=2, rotary_dim=8), ""),
    "GPT-Neo": ("gpt_neo", dict(num_layers=2, attention_types=[[["global", "local"], 1]], window_size=16), ""),
    "StableLM": ("stablelm", {}, "does not tell its attention where a sequence begins"),
    "Nemotron": ("nemotron", {}, "does not tell its attention where a sequence begins"),
    "Llama 4": ("llama4_text", dict(intermediate_size_mlp=96), ""),
    "Doge": ("doge", {}, MIXED),
    "Phi-MoE": ("phimoe", {}, MIXED),
    "BERT": ("bert", {}, MIXED),
}  # fmt: skip


@pytest.fixture(scope="session")
def make_model(tmp_path_factory):
    """-> a function: model type, settings -> a folder with random weights large enough that each of them matters"""
    tokenizer = AutoTokenizer.from_pretrained(BASE)

    def make(kind, changes, seed=0):
        known = AutoConfig.for_model(kind)
        settings = TINY | {"vocab_size": len(tokenizer)} | changes
        names = known.to_dict().keys() | known.attribute_map.keys() | changes.keys()
        config = AutoConfig.for_model(kind, **{name: value for name, value in settings.items() if name in names})
        torch.manual_seed(seed)
        lm, folder = AutoModelForCausalLM.from_config(config), tmp_path_factory.mktemp(kind)
        with torch.no_grad():
            for name, p in lm.named_parameters():
                p.copy_(
                    torch.randn(p.shape) * (1 if "embed" in name else 0.2)
                    if p.dim() > 1
                    else p + 0.1 * torch.randn(p.shape)
                )
            for name, buffer in lm.named_buffers():
                if "correction_bias" in name:
                    buffer.copy_(torch.randn(buffer.shape))
        lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def prompts(count=8):
    g = torch.Generator().manual_seed(1)
    return [torch.randint(5, WORDS, (n,), generator=g).tolist() for n in range(3, 3 + 3 * count, 3)]


def start_of_a_run(folder, lora_rank=0):
    """What `common.start` does with a model -> the policy"""
    args = engine_args(model=str(folder), max_prompt_len=32, max_response_len=32, eval_max_response_len=32)
    plan.read_shape(args)
    with refused(f"--model {args.model}: it cannot be loaded"):
        policy = load_policy(args.model, lora_rank)
    selftest.self_test(args, policy, prompts())
    return args, policy


def by_itself(lm, batch):
    """-> log-probabilities of all responses, from transformers' dense logits of one sequence at a time"""
    found = []
    for r in batch:
        logits = lm(input_ids=torch.cat([torch.tensor(r.problem["prompt_ids"]), r.ids])[None], use_cache=False).logits
        logp = logits[0, -len(r.ids) - 1 : -1].float().log_softmax(-1)
        found.append(logp.gather(1, r.ids[:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize("name", TRAINED)
def test_trained_right(name, make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "SCORE_ROWS", 16)  # less than a sequence
    folder = make_model(*TRAINED[name])
    args, policy = start_of_a_run(folder)

    engine = engines.HfEngine(args, AutoTokenizer.from_pretrained(folder))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    engine.stop = list(range(6))  # so that some end early
    engine.load(policy)
    batch = engine.generate([{"id": str(i), "prompt_ids": ids} for i, ids in enumerate(prompts())], 2, 0)
    pack = packs.Pack(batch, range(len(batch)))
    assert len({len(r.ids) for r in batch}) > 1 and pack.longest > 30
    logp, _ = policy(pack, 1.0)
    torch.testing.assert_close(logp, pack.engine_logp, atol=2e-4, rtol=1e-4)

    runs.save_model(args, policy, tmp_path)
    lm = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    alone = by_itself(lm, batch)
    torch.testing.assert_close(logp, alone, atol=2e-4, rtol=1e-4)

    weight = torch.rand(len(logp), generator=torch.Generator().manual_seed(2))
    (weight * logp).sum().backward()
    (weight * alone).sum().backward()
    got = dict(policy.lm.named_parameters())
    scale = max(float(p.grad.abs().max()) for p in lm.parameters())
    for name, p in lm.named_parameters():
        atol = 2e-4 * float(p.grad.abs().max()) + 1e-6 * scale  # the latter of a key's bias, whose gradient is 0
        torch.testing.assert_close(got[name].grad, p.grad, atol=atol, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(name, make_model, capsys):
    kind, changes, says = REFUSED[name]
    folder = make_model(kind, changes)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        start_of_a_run(folder)
    line = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and f"--model {folder}: " in line and kind in line and says in line


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Mixtral", "OLMoE", "gpt-oss"])
@pytest.mark.parametrize("flags", [dict(lora_rank=4), dict(engine="vllm")])
def test_experts_are_refused(name, flags, make_model, capsys):
    args = engine_args(model=str(make_model(*TRAINED[name])), **flags)
    with pytest.raises(SystemExit):
        plan.read_shape(args)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert args.model in line and f"--{next(iter(flags))} " in line and "experts" in line


WITH_DROPOUT = ["Phi-2", "GPT-2", "OPT", "StarCoder2", "Qwen3"]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_recomputed_activations_without_dropout(name, make_model, monkeypatch):
    """As on a GPU: each layer is computed twice, and its dropout and a router's noise stay off."""
    kind, changes = TRAINED[name]
    folder = make_model(kind, changes | dict(attention_dropout=0.1))
    (_, plain), (args, policy) = start_of_a_run(folder), start_of_a_run(folder)
    policy_module.checkpoint_activations(policy.lm)
    selftest.self_test(args, policy, prompts())
    calls, pack = [], selftest.make_pack(prompts(), [40, 20])
    for layer in policy.lm.modules():
        if "_gradient_checkpointing_func" in vars(layer) and type(layer).__name__ in policy.lm._no_split_modules:
            again = layer._gradient_checkpointing_func
            monkeypatch.setattr(layer, "_gradient_checkpointing_func", lambda *a, f=again: calls.append(1) or f(*a))
    for model in (plain, policy):
        model(pack, 1.0)[0].sum().backward()
    assert len(calls) == 2
    for (name, p), other in zip(plain.named_parameters(), policy.parameters()):
        torch.testing.assert_close(other.grad, p.grad, msg=name)


def ignore(**what):
    """packed_attention that is not told some things"""
    return lambda *args, **how: attention.packed_attention(*args, **(how | what))


FAULTS = {
    "window": ("Gemma 3", lambda m: set_attention(sliding_window=None), MIXED),
    "soft-capping": ("Gemma 2", lambda m: set_attention(softcap=None), MIXED),
    "sinks": ("gpt-oss", lambda m: set_attention(s_aux=None), MIXED),
    "a scale of the logits": ("Granite 3", lambda m: setattr(m, "scale", 1.0), MIXED),
    "their cap": ("Gemma 3", lambda m: setattr(m, "cap", 0.0), MIXED),
    "dropout": ("GPT-2", lambda m: m.train(), "two passes of the same weights differ"),
    "no number": ("Qwen3", lambda m: next(m.parameters()).data.fill_(torch.nan), "nan nats"),
    "a weight nobody reads": (
        "Qwen3", lambda m: setattr(m.lm, "lost", torch.nn.Parameter(torch.ones(3))), "no gradient, lost first"),
}  # fmt: skip


def set_attention(**what):
    AttentionInterface.register("packed", ignore(**what))


@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_finds(fault, make_model, capsys):
    name, breaks, says = FAULTS[fault]
    args, policy = start_of_a_run(make_model(*TRAINED[name]))
    breaks(policy)
    try:
        with pytest.raises(SystemExit) as stopped:
            selftest.self_test(args, policy, prompts())
    finally:
        AttentionInterface.register("packed", attention.packed_attention)
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stopped.value.code == 2 and TRAINED[name][0] in line and says in line


def edit(name, **changes):
    """-> a change of a JSON file of a model's folder"""

    def damage(folder):
        path = folder / name
        found = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(found | changes))

    return damage


def drop_weights(*names, value=None):
    def damage(folder):
        state = load_file(folder / "model.safetensors")
        for name in names:
            state[name] = torch.full_like(state[name], value) if value else None
        save_file({k: v for k, v in state.items() if v is not None}, folder / "model.safetensors", {"format": "pt"})

    return damage


def no_eos(folder):
    edit("config.json", eos_token_id=None)(folder)
    edit("generation_config.json", eos_token_id=None)(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    edit("tokenizer_config.json", eos_token=None)(folder)
    template("{% for m in messages %}{{ m.content }}{% endfor %}")(folder)


def no_tokenizer(folder):
    for path in [*folder.glob("token*"), *folder.glob("chat_template*"), *folder.glob("special*")]:
        path.unlink()


def template(text):
    return lambda folder: (folder / "chat_template.jinja").write_text(text)


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 7\n")


def hard_prompts(folder):
    tokenizer, path = AutoTokenizer.from_pretrained(folder), ROOT / "data" / "tiny" / "hard.jsonl"
    return [row["prompt_ids"] for row in load_problems(path, tokenizer, engine_args(model=str(folder)))[:16]]


def trained_with_bos(folder):
    """Token 0 in front of a text says that it is one of ours; without it nothing is probable."""
    lm, found = AutoModelForCausalLM.from_pretrained(folder), hard_prompts(folder)
    ids = torch.tensor([p[: min(map(len, found))] for p in found])
    optimizer = torch.optim.Adam(lm.parameters(), 3e-3)
    nats = lambda ids: lm(input_ids=ids, labels=ids).loss
    for _ in range(60):
        (nats(torch.nn.functional.pad(ids, (1, 0))) + (nats(ids) - 6).abs()).backward()
        optimizer.step()
        optimizer.zero_grad()
    lm.save_pretrained(folder)


FOLDERS = {  # what is wrong with it, and what the line says
    "no output layer": (drop_weights("lm_head.weight"), "1 of its weights are in no file, lm_head.weight first"),
    "no layer": (drop_weights("model.layers.0.mlp.up_proj.weight"), "model.layers.0.mlp.up_proj.weight first"),
    "NaN": (drop_weights("model.norm.weight", value=torch.nan), "NaN or infinite weights, in model.norm.weight"),
    "infinite": (drop_weights("lm_head.weight", value=torch.inf), "NaN or infinite weights, in lm_head.weight"),
    "another shape": (edit("config.json", intermediate_size=100), "cannot be loaded"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: OSError"),
    "a pointer": (pointer, "cannot be loaded: Safetensor"),
    "generation settings": (edit("generation_config.json", temperature=0.6, do_sample=False), "cannot be saved"),
    "no EOS": (no_eos, "would never end"),
    "no tokenizer": (no_tokenizer, "its tokenizer has no vocabulary"),
    "a small embedding": (edit("config.json", vocab_size=20), "more tokens than its embedding, 20"),
    "AWQ": (edit("config.json", quantization_config={"quant_method": "awq", "bits": 4}), "quantised (awq)"),
    "FP8": (edit("config.json", quantization_config={"quant_method": "fp8"}), "quantised (fp8)"),
    "more layers": (
        edit("config.json", num_hidden_layers=1, layer_types=["full_attention"]),
        "12 weights in its files are none of its own, model.layers.1."),
    "a broken template": (template("{% for %}"), "its tokenizer cannot be loaded: TemplateSyntaxError"),
    "a template of parts": (
        template("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"),
        "leaves out what the user says"),
    "no JSON of EOS": (lambda folder: (folder / "generation_config.json").write_text("{"), "cannot be read"),
    "no BOS": (trained_with_bos, "is not in front of its prompts"),
    "remote code": (
        edit("config.json", model_type="own", auto_map={"AutoConfig": "own.OwnConfig"}), "its configuration cannot be read"),
    "an unknown kind": (edit("config.json", model_type="gpt5"), "its configuration cannot be read"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "its configuration cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_refused_in_one_line(name, make_model, tmp_path, monkeypatch, capsys):
    damage, says = FOLDERS[name]
    folder = make_model("qwen2", dict(tie_word_embeddings=False))
    damage(folder)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_main(monkeypatch, lite_ppo, *SMALL, "--model", folder, "--out", tmp_path / "run")
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lite_ppo.py: ")]
    assert stopped.value.code == 2 and len(said) == 1 and str(folder) in said[0] and says in said[0]
    assert not (tmp_path / "run").exists()


def test_an_adapter_without_one_of_its_weights(make_model, tmp_path, capsys):
    folder = make_model("qwen2", {})
    load_policy(str(folder), 4).lm.save_pretrained(tmp_path)
    assert policy_module.load_lm(engine_args(model=str(tmp_path)))
    state = load_file(tmp_path / "adapter_model.safetensors")
    del state[min(state)]
    save_file(state, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(SystemExit), refused(f"--model {tmp_path}"):
        policy_module.load_lm(engine_args(model=str(tmp_path)))
    assert "Found missing adapter keys" in capsys.readouterr().err


TURNS = {  # a chat template's end of a response
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|end|>\n": [1],
    "{{ m.role }}: {{ m.content }}\n": [],
    "{% if m.role == 'user' %}<|end|>{% endif %}{{ m.content }}": [],
}


@pytest.mark.parametrize("turn", TURNS)
def test_what_ends_a_turn_ends_a_response(turn, make_model):
    folder = make_model("qwen2", dict(eos_token_id=7))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template, tokenizer.eos_token = "{% for m in messages %}" + turn + "{% endfor %}", None
    assert engines.stop_ids(folder, tokenizer) == [*TURNS[turn], 7]


def test_a_prompt_with_bos_in_front(make_model, capsys):
    folder = make_model("qwen2", {})
    trained_with_bos(folder)
    args, policy = start_of_a_run(folder)
    tokenizer, found = AutoTokenizer.from_pretrained(folder), hard_prompts(folder)
    selftest.check_bos(args, policy, tokenizer, [[0, *p] for p in found])
    with pytest.raises(SystemExit):
        selftest.check_bos(args, policy, tokenizer, found)


def test_the_end_may_stand_in_the_configuration_alone(make_model):
    folder = make_model("qwen2", dict(eos_token_id=7))
    (folder / "generation_config.json").unlink()
    assert 7 in engines.stop_ids(folder, AutoTokenizer.from_pretrained(folder))


def test_forty_kinds():
    assert len({kind for kind, *_ in [*TRAINED.values(), *REFUSED.values()]}) >= 40


VLLM = "Llama 3", "Qwen2, Qwen2.5", "Gemma 2", "Gemma 3", "Granite 3", "Mistral", "OLMo 3", "SmolLM3", "StarCoder2"


@pytest.mark.vllm
@pytest.mark.parametrize("name", VLLM)
def test_vllm_samples_from_it(name, make_model):
    kind, changes = TRAINED[name]
    folder = make_model(
        kind, changes | dict(head_dim=32, hidden_size=128)
    )  # vLLM's attention on a CPU takes no smaller
    args, policy = start_of_a_run(folder)
    engine = engines.VllmEngine(args, AutoTokenizer.from_pretrained(folder))
    try:
        engine.wake()
        engine.load(policy)
        batch = engine.generate([{"id": str(i), "prompt_ids": ids} for i, ids in enumerate(prompts())], 2, 0)
        pack = packs.Pack(batch, range(len(batch)))
        with torch.no_grad():
            logp, _ = policy(pack, 1.0)
        assert pack.longest > 30
        torch.testing.assert_close(logp, pack.engine_logp, atol=2e-4, rtol=1e-4)
    finally:
        engine.close()


@pytest.mark.vllm
def test_a_full_cache_is_told(make_model, monkeypatch, capsys):
    """32 responses of up to 300 tokens in a cache of 512: vLLM puts some off, and what it gives is right all the same."""
    import vllm

    monkeypatch.setattr(vllm, "LLM", functools.partial(vllm.LLM, num_gpu_blocks_override=16, block_size=32))
    threads = os.environ.get("TORCHINDUCTOR_COMPILE_THREADS")
    folder = make_model("qwen2", dict(head_dim=32, hidden_size=128, eos_token_id=1))
    args = engine_args(model=str(folder), max_response_len=300, eval_max_response_len=300)
    engine, policy = engines.VllmEngine(args, AutoTokenizer.from_pretrained(folder)), load_policy(str(folder))
    try:
        engine.wake()
        engine.load(policy)
        engine.stop = []
        batch = engine.generate([{"id": str(i), "prompt_ids": ids} for i, ids in enumerate(prompts(32))], 1, 0)
        with torch.no_grad():
            logp, _ = policy(packs.Pack(batch, range(len(batch))), 1.0)
        torch.testing.assert_close(logp, torch.cat([r.engine_logp for r in batch]), atol=2e-4, rtol=1e-4)
    finally:
        engine.close()
    assert "times a response was put off and computed again" in capsys.readouterr().err
    assert os.environ.get("TORCHINDUCTOR_COMPILE_THREADS") == threads  # vLLM would keep the trainer to one
