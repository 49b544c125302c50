"""The same work through lite_ppo.py and through TRL 1.16's GRPOTrainer: rollouts per second, in turn, on this machine.

    pip install --no-deps --target .trl trl==1.16.0 && PYTHONPATH=.trl python tests/bench_trl.py

Each side samples 16 x 8 responses of up to 128 tokens from the same model and problems, grades them with the same function and takes
four optimizer steps on them: Lite PPO's advantages and loss, no KL. TRL runs without gradient checkpointing and logging, with
transformers' `generate`, which is its fastest where vLLM has no GPU. Start-up, evaluations, checkpoints and the first rollouts of a round are not counted.
The last line is `ratio N`: TRL's seconds a rollout over ours, the median over the rounds.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
ROLLOUTS, WARM = 24, 4  # of a round; not counted
P, G, STEPS, LIMIT, LR = 16, 8, 4, 128, 1e-4


def ours(folder, seed):
    """-> seconds and mean reward of each rollout"""
    flags = ["--steps", ROLLOUTS, "--prompts_per_step", P, "--group_size", G, "--minibatches", STEPS, "--lr", LR]
    flags += [
        "--scale",
        "laptop",
        "--eval_data",
        "eval_easy",
        "--eval_every",
        ROLLOUTS,
        "--save_every",
        ROLLOUTS,
        "--data",
        "hard",
    ]
    flags += ["--max_response_len", LIMIT, "--seed", seed, "--out", folder / "run"]
    subprocess.run([sys.executable, ROOT / "lite_ppo.py", *map(str, flags)], check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()][:ROLLOUTS]
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

    import common
    import training
    from rewards import GradePool

    training.use_cores()
    model = ROOT / "data" / "tiny" / "base"
    tokenizer, pool, begun, means = transformers.AutoTokenizer.from_pretrained(model), GradePool(), [], []
    rows = [json.loads(line) for line in (ROOT / "data" / "tiny" / "hard.jsonl").read_text().splitlines()]
    rows = [{"prompt": common.render(row["problem"], tokenizer), "answer": row["answer"]} for row in rows]

    def reward(completions, answer, **_):
        grades = pool.grade(list(zip(completions, answer)))
        means.append(sum(g.correct for g in grades) / len(grades))
        return [float(g.correct) for g in grades]

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step % STEPS == 0:
                begun.append(time.perf_counter())

        def on_train_end(self, args, state, control, **_):
            begun.append(time.perf_counter())

    config = trl.GRPOConfig(
        output_dir=str(Path(out).parent / "trl"), use_cpu=True, bf16=False, report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no", gradient_checkpointing=False, max_steps=ROLLOUTS * STEPS, seed=seed, num_generations=G,
        per_device_train_batch_size=P * G // STEPS, gradient_accumulation_steps=1, steps_per_generation=STEPS,
        max_completion_length=LIMIT, temperature=1.0, beta=0.0, epsilon=0.2, loss_type="dapo", scale_rewards="batch",
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
    args = parser.parse_args()
    if args.trl:
        return run_trl(args.trl, args.seed)
    ratios = []
    for seed in range(1, 1 + args.rounds):
        medians = []
        for name, side in (("lite_ppo.py", ours), ("TRL", theirs)):
            with tempfile.TemporaryDirectory() as folder:
                seconds, means = side(Path(folder), seed)
            medians.append(statistics.median(seconds[WARM:]))
            curve = " ".join(f"{statistics.mean(means[i : i + 6]):.2f}" for i in range(0, ROLLOUTS, 6))
            print(
                f"round {seed}  {name:12s} {medians[-1]:.3f} s a rollout, least {min(seconds):.3f}   reward {curve}",
                flush=True,
            )
        ratios.append(medians[1] / medians[0])
    print(f"ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
