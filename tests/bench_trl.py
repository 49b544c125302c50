"""The same work through lite_ppo.py and through TRL 1.16's GRPOTrainer: seconds a training step, in turn, on this machine.

    pip install --no-deps --target .trl trl==1.16.0 && PYTHONPATH=.trl python tests/bench_trl.py

Each side samples 16 x 8 responses of up to 192 tokens from the same model and problems, grades them with the same function and takes
four optimizer steps on them: Lite PPO's advantages and loss, no KL. TRL runs without gradient checkpointing and logging, with
transformers' `generate`, which is its fastest where vLLM has no GPU. Start-up, evaluations, checkpoints and the first steps of a round are not counted.

Where there is a GPU: a Qwen3 of 0.6 billion parameters with random weights in place of the laptop's model, vLLM beside the trainer with sleep mode
on both sides, bf16, gradient checkpointing, old log-probabilities computed again. Responses are as long as a long-tailed law says, up to 8,192
tokens, and every other one is right; not run yet.
The last line is `ratio N`: TRL's seconds a step over ours, the median over the rounds.
"""

import argparse
import copy
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
from bench_gpu import make_model  # noqa: E402

P, G, STEPS, LR = 16, 8, 4, 1e-4


def gpu():
    import torch

    return torch.cuda.is_available()


def lengths():  # -> steps of a round; those not counted; tokens of the longest response
    return (8, 2, 8192) if gpu() else (24, 4, 192)


def force_lengths(limit):
    """From here on vLLM's responses are as long as a law says, whatever the model: log-normal, median 1,500, sigma 0.8."""
    import vllm

    generate, rng = vllm.LLM.generate, random.Random(0)

    def forced(self, prompts, sampling_params, **how):
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        each = [copy.deepcopy(params) for params in each]
        for params in each:
            params.max_tokens = max(16, min(limit, int(rng.lognormvariate(math.log(1500), 0.8))))
            params.ignore_eos, params.stop_token_ids = True, []
        return generate(self, prompts, each, **how)

    vllm.LLM.generate = forced


def ours_on_a_gpu(flags):
    """lite_ppo.py with forced lengths, every other response right"""
    import lite_ppo
    import rewards

    rewards.GradePool.grade = lambda self, pairs: [rewards.Grade(i % 2 == 0) for i in range(len(pairs))]
    force_lengths(lengths()[2])
    sys.argv = ["lite_ppo.py", *flags]
    lite_ppo.main()


def ours(folder, seed):
    """-> seconds and mean reward of each step"""
    count, _, limit = lengths()
    flags = ["--steps", count, "--prompts_per_step", P, "--group_size", G, "--minibatches", STEPS, "--lr", LR]
    flags += [
        "--scale",
        "laptop",
        "--eval_data",
        "eval_easy",
        "--eval_every",
        count,
        "--save_every",
        count,
        "--data",
        "hard",
    ]
    flags += ["--max_response_len", limit, "--seed", seed, "--out", folder / "run"]
    command = [ROOT / "lite_ppo.py"]
    if gpu():
        tiny, limits = (
            ROOT / "data" / "tiny",
            ["--eval_max_response_len", 64, "--max_prompt_len", 64, "--top_p", 1, "--top_k", 0],
        )
        flags += [
            "--scale",
            "node",
            "--model",
            folder.parent / "model",
            "--engine",
            "vllm",
            *limits,
            "--eval_samples",
            1,
        ]
        flags += [
            "--data",
            tiny / "hard.jsonl",
            "--eval_data",
            tiny / "eval_easy.jsonl",
            "--temperature",
            1,
            "--warmup_steps",
            0,
        ]
        command = [__file__, "--ours"]
    subprocess.run([sys.executable, *command, *map(str, flags)], check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][:count]
    seconds = [row["time/step"] - row.get("time/eval", 0) - row.get("time/save", 0) for row in rows]
    return seconds, [row["reward/mean"] for row in rows]


def theirs(folder, seed):
    command = [sys.executable, __file__, "--trl", folder / "trl.json", "--seed", str(seed)]
    subprocess.run(command, check=True, capture_output=True)
    return json.loads((folder / "trl.json").read_text())


def run_trl(out, seed):
    import datasets
    import torch
    import transformers
    import trl

    from data import problems
    from infra import processes
    from rewards import GradePool

    processes.use_cores()
    count, _, limit = lengths()
    model = Path(out).parent.parent / "model" if gpu() else ROOT / "data" / "tiny" / "base"
    if gpu():
        force_lengths(limit)
    tokenizer, pool, begun, means = transformers.AutoTokenizer.from_pretrained(model), GradePool(), [], []
    rows = [json.loads(line) for line in (ROOT / "data" / "tiny" / "hard.jsonl").read_text().splitlines()]
    rows = [{"prompt": problems.render(row["problem"], tokenizer), "answer": row["answer"]} for row in rows]

    def reward(completions, answer, **_):
        right = [i % 2 == 0 for i in range(len(completions))]
        right = right if gpu() else [g.correct for g in pool.grade(list(zip(completions, answer)))]
        means.append(sum(right) / len(right))
        return [float(r) for r in right]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step % STEPS == 0:
                begun.append(time.perf_counter())

        def on_train_end(self, args, state, control, **_):
            begun.append(time.perf_counter())

    pieces = 16 if gpu() else 1  # of a mini-batch: TRL pads, and holds all logits of a piece
    machine = dict(use_cpu=True, bf16=False, gradient_checkpointing=False)
    if gpu():
        machine = dict(bf16=True, gradient_checkpointing=True, use_vllm=True, vllm_mode="colocate")
        machine |= dict(vllm_enable_sleep_mode=True, vllm_gpu_memory_utilization=0.45)
    config = trl.GRPOConfig(
        **machine, output_dir=str(Path(out).parent / "trl"), report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", max_steps=count * STEPS, seed=seed, num_generations=G,
        per_device_train_batch_size=P * G // STEPS // pieces, gradient_accumulation_steps=pieces, steps_per_generation=STEPS * pieces,
        max_completion_length=limit, temperature=1.0, beta=0.0, epsilon=0.2, loss_type="dapo", scale_rewards="batch",
        learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1.0, weight_decay=0.0,
    )  # fmt: skip
    trainer = trl.GRPOTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward, args=config, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    pool.close()
    Path(out).write_text(json.dumps([[b - a for a, b in zip(begun, begun[1:])], means]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turn [%(default)s]")
    parser.add_argument("--trl", help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)
    if sys.argv[1:2] == ["--ours"]:
        return ours_on_a_gpu(sys.argv[2:])
    args = parser.parse_args()
    if args.trl:
        return run_trl(args.trl, args.seed)
    (count, warm, _), ratios = lengths(), []
    with tempfile.TemporaryDirectory() as work:
        if gpu():
            make_model("0.6B", Path(work) / "model")
        for seed in range(1, 1 + args.rounds):
            medians = []
            for name, side in (("lite_ppo.py", ours), ("TRL", theirs)):
                folder = Path(work) / f"{name}_{seed}"
                folder.mkdir()
                seconds, means = side(folder, seed)
                medians.append(statistics.median(seconds[warm:]))
                quarter = max(1, count // 4)
                curve = " ".join(f"{statistics.mean(means[i : i + quarter]):.2f}" for i in range(0, count, quarter))
                said = f"{medians[-1]:.3f} s a step, least {min(seconds):.3f}   reward {curve}"
                print(f"round {seed}  {name:12s} {said}", flush=True)
            ratios.append(medians[1] / medians[0])
    print(f"ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
