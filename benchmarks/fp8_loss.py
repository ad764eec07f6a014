"""FP8 training against BF16, and the routers' bias update against none: the same model, seed and data, several seeds,
on real text byte by byte (Python's standard library, or `--text FILE`).

Two runs part by chaos alone, so every seed has the noise beside it: BF16 again with the rows of each batch in another
order, which is another rounding and nothing else. The learning rate decays to zero and the update of the biases ends
with it; compared are the smoothed training loss of the last tenth, and the loss on the same held-out text, by BF16 for
all. What is reported is the mean over the seeds of the paired relative differences, with its standard error. On a GPU
all runs share it at once: each alone is bound by its launches. `--tiny` runs anywhere in minutes.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import math
import statistics
import sysconfig
import time

import torch

from benchmarks.common import finish, parser
from deepseek_v3 import DeepseekV3ForCausalLM, enable_fp8_training
from deepseek_v3.configuration import preset
from deepseek_v3.training.balance import routers_of, update_router_bias

LARGE = {"hidden_size": 512, "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 4}
LARGE |= {"n_routed_experts": 16, "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "n_shared_experts": 1}
LARGE |= {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 512, "kv_lora_rank": 512}
LARGE |= {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "first_k_dense_replace": 1}
TINY = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "kv_lora_rank": 128}
VOCABULARY = 256
BALANCED, NOISE, FP8, FREE = "bf16", "bf16, rows in another order", "fp8", "bf16, no bias update"
WARM_UP, TIMED = 10, 15


def read_text(options):
    """Bytes to learn from and, of the last twentieth, bytes held out."""
    if options.text:
        raw = Path(options.text).read_bytes()
    else:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        raw = b"".join(file.read_bytes() for file in files)
    tokens = torch.frombuffer(bytearray(raw[: 1 << 20] if options.tiny else raw), dtype=torch.uint8).long()
    held_out = len(tokens) // 20
    return tokens[:-held_out], tokens[-held_out:]


def make_model(options, seed):
    torch.manual_seed(seed)
    sizes = TINY if options.tiny else LARGE
    fields = {"initializer_range": 0.02, "seq_balance_loss_alpha": 0.0, "pad_token_id": None}
    return DeepseekV3ForCausalLM(preset("tiny", vocab_size=VOCABULARY, **sizes, **fields)).train()


class Run:
    """One model's training: `kind` is one of the four above."""

    def __init__(self, options, seed, kind, device):
        self.options, self.seed, self.kind, self.device = options, seed, kind, device
        self.text, self.held_out = read_text(options)
        self.model = make_model(options, seed).to(device)
        if kind == FP8:
            enable_fp8_training(self.model)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        other = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")
        self.generator = torch.Generator().manual_seed(seed)
        self.losses, self.loads = [], []

    def advance(self, rate, gamma):
        """One optimizer step."""
        options = self.options
        starts = torch.randint(0, len(self.text) - options.block, (options.batch,), generator=self.generator)
        tokens = self.text[starts[:, None] + torch.arange(options.block)]
        tokens = (tokens.flip(0) if self.kind == NOISE else tokens).to(self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast(self.device, dtype=torch.bfloat16):
            output = self.model(tokens, labels=tokens)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        loads = update_router_bias(self.model, 0.0 if self.kind == FREE else gamma)
        self.losses.append(output.main_loss.detach())
        self.loads.append(torch.stack(loads))

    def train(self, steps):
        """The remaining steps of `steps`: warm-up, then a cosine to zero."""
        for step in range(len(self.losses), steps):
            self.advance(*schedule(step, steps, self.options))

    @torch.no_grad()
    def evaluate(self):
        """Main loss and MaxVio on the held-out text, by BF16."""
        self.model.eval()
        loads = {}

        def count(router, inputs, output):
            loads[router] = loads.get(router, 0) + torch.bincount(output[2].flatten(), minlength=router.num_experts)

        handles = [router.register_forward_hook(count) for router in routers_of(self.model)]
        block = self.options.block
        rows = self.held_out[: len(self.held_out) // block * block].view(-1, block)[: self.options.held_out]
        total = 0.0
        for piece in rows.split(2 * self.options.batch):
            tokens = piece.to(self.device)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                total += self.model(tokens, labels=tokens, use_cache=False).main_loss.double() * len(piece)
        for handle in handles:
            handle.remove()
        return (total / len(rows)).item(), max_vio(torch.stack(list(loads.values())).double())


def schedule(step, steps, options):
    """Learning rate and gamma of a step; the first steps do not depend on how many there are."""
    if step < options.warm_up:
        return options.learning_rate * (step + 1) / options.warm_up, options.gamma
    done = (step - options.warm_up) / max(1, steps - options.warm_up)
    return options.learning_rate * (1 + math.cos(math.pi * done)) / 2, options.gamma if done < 0.9 else 0.0


def max_vio(loads):
    """Largest over mean load, minus 1, averaged over the routers: [routers, E]."""
    return (loads.amax(-1) / loads.mean(-1) - 1).mean().item()


def work(number, options, plan, device, barrier, seconds, results):
    """Train run `number` of the plan and hand in its summary."""
    torch.set_num_threads(1)
    run = Run(options, *plan[number], device)
    steps = options.steps
    if options.seconds:
        steps = agree(run, number, options, barrier, seconds)
    begin = time.perf_counter()
    run.train(steps)
    losses, tenth = torch.stack(run.losses).float().cpu(), max(1, steps // 10)
    held_out, vio = run.evaluate()
    loads = torch.stack(run.loads[-steps // 4 :])
    summary = {"seed": run.seed, "kind": run.kind, "steps": steps, "loss": losses[-tenth:].mean().item()}
    summary |= {"held_out_loss": held_out, "held_out_max_vio": vio, "max_vio": max_vio(loads.sum(0))}
    summary |= {"max_vio_batch": statistics.mean(max_vio(batch) for batch in loads[::8])}
    summary["curve"] = losses.unfold(0, max(1, steps // 30), max(1, steps // 30)).mean(-1).tolist()
    summary["seconds"] = time.perf_counter() - begin
    print(f"# {json.dumps({k: v for k, v in summary.items() if k != 'curve'})}", flush=True)
    results.append(summary)


def agree(run, number, options, barrier, seconds):
    """How many steps all the runs make together in `options.seconds`, from what some of them take."""
    run.train(WARM_UP)
    barrier.wait()
    begin = time.perf_counter()
    run.train(WARM_UP + TIMED)
    run.losses[-1].item()
    seconds[number] = time.perf_counter() - begin
    barrier.wait()
    return max(options.warm_up * 2, int(options.seconds / (statistics.mean(seconds[:]) / TIMED)))


def run_all(options, plan, device):
    """Every run's summary: all at once on a GPU, one after another elsewhere."""
    if device == "cpu":
        results: list = []
        for number in range(len(plan)):
            work(number, options, plan, device, None, None, results)
        return results
    context = torch.multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.list()
        barrier, seconds = context.Barrier(len(plan), timeout=180), context.Array("d", len(plan))
        given = (options, plan, device, barrier, seconds, results)
        workers = [context.Process(target=work, args=(number, *given), daemon=True) for number in range(len(plan))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return list(results)


def paired(runs, kind, field):
    """Mean over the seeds of a run's difference from BF16, relative, and its standard error."""
    of = {(run["seed"], run["kind"]): run[field] for run in runs}
    seeds = [seed for seed, name in of if name == kind and (seed, BALANCED) in of]
    differences = [of[seed, kind] / of[seed, BALANCED] - 1 for seed in sorted(seeds)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else float("nan")
    return {"mean": statistics.mean(differences), "standard_error": error, "by_seed": differences}


def main():
    args = parser(__doc__)
    args.add_argument("--tiny", action="store_true")
    args.add_argument("--steps", type=int, default=400)
    args.add_argument("--seconds", type=float, help="on a GPU: as many steps as fit, instead of --steps")
    args.add_argument("--warm-up", type=int, default=50)
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--block", type=int, default=256)
    args.add_argument("--held-out", type=int, default=2048, help="blocks of held-out text")
    args.add_argument("--learning-rate", type=float, default=1e-3)
    args.add_argument("--gamma", type=float, default=0.002, help="of the bias update, which ends with the last tenth")
    args.add_argument("--text", help="a file to learn from instead of the standard library")
    options = args.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and options.seconds:
        sys.exit("--seconds is for runs that share a GPU; give --steps here")
    plan = [(seed, kind) for seed in range(options.seeds) for kind in (BALANCED, NOISE, FP8, FREE)]
    runs = run_all(options, plan, device)
    if len(runs) < len(plan):
        sys.exit(f"{len(plan) - len(runs)} of {len(plan)} runs broke off, nothing is reported")
    fields = ("loss", "held_out_loss")
    differences = {kind: {field: paired(runs, kind, field) for field in fields} for kind in (NOISE, FP8, FREE)}
    rows = []
    for kind in (BALANCED, NOISE, FP8, FREE):
        own = [run for run in runs if run["kind"] == kind]
        means = [statistics.mean(run[field] for run in own) for field in (*fields, "max_vio_batch", "max_vio")]
        cells = ["", ""]
        if kind != BALANCED:
            cells = [f"{d['mean']:+.3%} ± {d['standard_error']:.3%}" for d in differences[kind].values()]
        rows.append([kind, *(f"{value:.4f}" for value in means[:2]), *cells, *means[2:]])
    columns = ["run", "loss", "held-out loss", "loss over BF16", "held-out over BF16", "MaxVio a batch", "the quarter"]
    names = ("batch", "block", "held_out", "learning_rate", "gamma", "warm_up", "seeds")
    shape = {name: getattr(options, name) for name in names} | {"steps": runs[0]["steps"]}
    shape["parameters"] = sum(p.numel() for p in make_model(options, 0).parameters())
    finish("fp8_loss", columns, rows, {**shape, "differences": differences, "runs": runs}, options.output)


if __name__ == "__main__":
    main()
