"""FP8 training against BF16, and the routers' bias update against none: the same model, seed and data, several seeds,
on real text byte by byte, nothing of it seen twice (the Python sources of the standard library and of the packages
installed, or `--text FILE`).

Two runs part by chaos alone, so every seed has the noise beside it: BF16 again with the rows of each batch in another
order, which is another rounding and nothing else. Both are BF16 runs like any other, so what is compared to BF16 is
compared to the mean of the two. The learning rate decays to zero and the update of the biases ends with it. Compared
are the smoothed training loss of the last tenth, and the loss on the same held-out text, by BF16 for all; reported is
the mean over the seeds of the paired relative differences, with its standard error.

On GPUs (all that there are) a step is one CUDA graph, several runs share a device, and every finished run is written
at once. `--tiny` runs anywhere in minutes.
"""

import sys
from pathlib import Path

# Run as a script, Python looks for modules beside it, where kernels.py would pass for the `kernels` package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import hashlib
import json
import math
import statistics
import sysconfig
import time

import torch
import transformers

from benchmarks.common import finish, machine, parser
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
KINDS = (FP8, BALANCED, NOISE, FREE)  # the slowest first
WARM_UP, TIMED = 5, 40
# Of a budget in seconds, what starting and the last evaluations take, and the share of the rest that is planned.
AROUND, PLANNED = 12.0, 0.95
SKIPPED = {"test", "tests", "testing", "__pycache__", "_vendor", "site-packages", "dist-packages"}
SMALLEST, LARGEST = 1 << 10, 200_000  # bytes; what is larger is mostly tables


def sources():
    """{path below its root: file} of the Python sources at hand; of one path the first."""
    roots = [Path(sysconfig.get_path("stdlib")), *(Path(m.__file__).parents[1] for m in (torch, transformers))]
    found = {}
    for root in roots:
        for file in root.rglob("*.py"):
            name = file.relative_to(root)
            if not SKIPPED.intersection(name.parts[:-1]) and not name.name.startswith("test"):
                found.setdefault(name.as_posix(), file)
    return found


def read_text(options):
    """Bytes to learn from and bytes held out: every twentieth file. In the order of the hashes of their paths, each
    content once, without what says that it is generated."""
    if options.text:
        raw = Path(options.text).read_bytes()
        return _bytes([raw[: len(raw) // 20 * 19]]), _bytes([raw[len(raw) // 20 * 19 :]])
    seen, parts = set(), ([], [])
    size, most = 0, 1 << 20 if options.tiny else math.inf
    for place, file in sorted((hashlib.sha1(name.encode()).hexdigest(), file) for name, file in sources().items()):
        if not SMALLEST <= file.stat().st_size <= LARGEST:
            continue
        raw = file.read_bytes()
        content = hashlib.sha1(raw).digest()
        if content in seen or b"generated" in raw[:600]:
            continue
        seen.add(content)
        parts[int(place[:8], 16) % 20 == 0].append(raw)
        size += len(raw)
        if size > most:
            break
    return _bytes(parts[0]), _bytes(parts[1])


def _bytes(parts):
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8).share_memory_()


def make_model(options, seed):
    torch.manual_seed(seed)
    sizes = TINY if options.tiny else LARGE
    fields = {"initializer_range": 0.02, "seq_balance_loss_alpha": 0.0, "pad_token_id": None}
    return DeepseekV3ForCausalLM(preset("tiny", vocab_size=VOCABULARY, **sizes, **fields)).train()


def rows_of(text, block):
    """[bytes] to [rows, block], the rest left out."""
    return text[: len(text) // block * block].view(-1, block)


class Run:
    """One model's training: `kind` is one of the four above."""

    def __init__(self, options, text, seed, kind, device):
        self.options, self.seed, self.kind, self.device = options, seed, kind, device
        self.text, self.held_out = (rows_of(part, options.block).to(device) for part in text)
        self.model = make_model(options, seed).to(device)
        self.on_gpu = device.startswith("cuda")
        if self.on_gpu:
            self.model.set_experts_implementation("deepseek_v3")
        if kind == FP8:
            enable_fp8_training(self.model)
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        other = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
        self.rate = torch.zeros((), device=device)
        fused = {"fused": True, "capturable": True} if self.on_gpu else {}
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), **fused)
        order = torch.randperm(len(self.text), generator=torch.Generator().manual_seed(seed))
        self.order = order.to(device)
        self.tokens = torch.zeros(options.batch, options.block, dtype=torch.long, device=device)
        self.graph = None
        self.losses, self.loads = [], []

    def learn(self):
        """One optimizer step on `self.tokens`: the main loss; each router's load stays with it."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16):
            output = self.model(self.tokens, labels=self.tokens)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return output.main_loss.detach()

    def capture(self):
        """Make a step one graph; everything has been compiled by steps before."""
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
            self.loss = self.learn()
            self.counted = [router.expert_load for router in routers_of(self.model)]

    def advance(self, rate, gamma):
        """One optimizer step and the update of the biases."""
        batch, step = self.options.batch, len(self.losses)
        # Nothing twice, as long as there is text enough.
        at = step * batch % (len(self.order) - batch)
        rows = self.order[at : at + batch]
        self.tokens.copy_(self.text[rows.flip(0) if self.kind == NOISE else rows])
        self.rate.fill_(rate)
        if self.graph is None:
            loss = self.learn()
        else:
            self.graph.replay()
            loss = self.loss.clone()
            for router, load in zip(routers_of(self.model), self.counted, strict=True):
                router.expert_load = load
        loads = update_router_bias(self.model, 0.0 if self.kind == FREE else gamma)
        self.losses.append(loss)
        self.loads.append(torch.stack(loads))

    def train(self, steps):
        """The remaining steps of `steps`: warm-up, then a cosine to zero."""
        for step in range(len(self.losses), steps):
            if self.on_gpu and step == WARM_UP:
                self.capture()
            self.advance(*schedule(step, steps, self.options))

    @torch.no_grad()
    def evaluate(self):
        """Main loss and MaxVio on the held-out text, by BF16."""
        self.model.eval()
        loads = {}

        def count(router, inputs, output):
            loads[router] = loads.get(router, 0) + torch.bincount(output[2].flatten(), minlength=router.num_experts)

        handles = [router.register_forward_hook(count) for router in routers_of(self.model)]
        total, rows = 0.0, self.held_out[: self.options.held_out]
        for piece in rows.split(4 * self.options.batch):
            tokens = piece.long()
            with torch.autocast(self.model.device.type, dtype=torch.bfloat16):
                total += self.model(tokens, labels=tokens, use_cache=False).main_loss.double() * len(piece)
        for handle in handles:
            handle.remove()
        return (total / len(rows)).item(), max_vio(torch.stack(list(loads.values())).double())

    def summary(self, seconds):
        """What is reported of a finished run."""
        steps = len(self.losses)
        losses, tenth = torch.stack(self.losses).float().cpu(), max(1, steps // 10)
        loads = torch.stack(self.loads[-steps // 4 :])
        held_out, vio = self.evaluate()
        result = {"seed": self.seed, "kind": self.kind, "steps": steps, "seconds": seconds}
        result |= {"loss": losses[-tenth:].mean().item(), "held_out_loss": held_out, "held_out_max_vio": vio}
        result |= {"max_vio": max_vio(loads.sum(0))}
        result |= {"max_vio_batch": statistics.mean(max_vio(batch) for batch in loads[:: max(1, len(loads) // 50)])}
        result["text_read"] = steps * self.options.batch / len(self.text)
        result["curve"] = losses.unfold(0, max(1, steps // 30), max(1, steps // 30)).mean(-1).tolist()
        return result


def schedule(step, steps, options):
    """Learning rate and gamma of a step; the first steps do not depend on how many there are."""
    if step < options.warm_up:
        return options.learning_rate * (step + 1) / options.warm_up, options.gamma
    done = (step - options.warm_up) / max(1, steps - options.warm_up)
    return options.learning_rate * (1 + math.cos(math.pi * done)) / 2, options.gamma if done < 0.9 else 0.0


def max_vio(loads):
    """Largest over mean load, minus 1, averaged over the routers: [routers, E]."""
    return (loads.amax(-1) / loads.mean(-1) - 1).mean().item()


class Pace:
    """How many steps every run makes: as many as fit into `options.seconds`, from what the first runs take while they
    share the devices; or `options.steps`."""

    def __init__(self, context, options, slots, runs):
        self.options, self.slots, self.runs = options, slots, runs
        self.begin = time.time()
        self.barrier, self.taken = context.Barrier(slots, timeout=120), context.Array("d", slots)
        self.ready = context.Value("d", 0.0)

    def agree(self, run, slot):
        """The number of steps; makes the first of them where it has to be found out."""
        if not self.options.seconds:
            return self.options.steps
        run.train(WARM_UP + 1)
        torch.cuda.synchronize()
        self.barrier.wait()
        begin = time.perf_counter()
        run.train(WARM_UP + 1 + TIMED)
        torch.cuda.synchronize()
        self.taken[slot] = (time.perf_counter() - begin) / TIMED
        if slot == 0:
            self.ready.value = time.time()
        self.barrier.wait()
        left = self.options.seconds - AROUND - (self.ready.value - self.begin)
        one = statistics.mean(self.taken[:]) * self.runs / self.slots
        steps = max(2 * self.options.warm_up, int(PLANNED * left / one))
        if slot == 0:
            print(f"# {steps} steps of {[round(1e3 * taken, 1) for taken in self.taken]} ms", flush=True)
        return steps


def work(slot, device, options, text, pace, queue, results):
    """Make the runs of the queue until none is left."""
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        # A graph is captured on the stream that the steps before it ran on.
        torch.cuda.set_stream(torch.cuda.Stream())
    steps = None
    while (one := queue.get()) is not None:
        run = Run(options, text, *one, device)
        begin = time.perf_counter()
        steps = pace.agree(run, slot) if steps is None else steps
        run.train(steps)
        results.put(run.summary(time.perf_counter() - begin))


def run_all(options, plan, text, record):
    """Every run's summary, `record`ed as it comes; of a budget in seconds what was ready in time."""
    context = torch.multiprocessing.get_context("spawn")
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]
    slots = min(len(devices) * options.together, len(plan))
    pace = Pace(context, options, slots, len(plan))
    queue, results, runs = context.SimpleQueue(), context.Queue(), []
    for one in [*plan, *[None] * slots]:
        queue.put(one)
    given = (options, text, pace, queue, results)
    workers = [
        context.Process(target=work, args=(slot, devices[slot % len(devices)], *given), daemon=True)
        for slot in range(slots)
    ]
    for worker in workers:
        worker.start()
    late = pace.begin + options.seconds if options.seconds else math.inf
    while len(runs) < len(plan) and time.time() < late:
        if results.empty():
            if not any(worker.is_alive() for worker in workers) and results.empty():
                break
            time.sleep(0.2)
            continue
        runs.append(results.get())
        print(f"# {json.dumps({k: v for k, v in runs[-1].items() if k != 'curve'})}", flush=True)
        record(runs)
    for worker in workers:
        worker.terminate()
    return runs


def paired(runs, kind, field):
    """Mean over the seeds of a run's relative difference from BF16, both of its runs (of the noise: from the first),
    and its standard error."""
    of = {(run["seed"], run["kind"]): run[field] for run in runs}
    others = (BALANCED,) if kind == NOISE else (BALANCED, NOISE)
    seeds = [s for s in sorted({seed for seed, _ in of}) if all((s, name) in of for name in (kind, *others))]
    differences = [of[s, kind] / statistics.mean(of[s, name] for name in others) - 1 for s in seeds]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return {"mean": statistics.mean(differences), "standard_error": error, "by_seed": differences} if seeds else None


def summarise(runs, options, text):
    """Columns, rows and data of the runs that are there."""
    fields = ("loss", "held_out_loss")
    differences = {kind: {field: paired(runs, kind, field) for field in fields} for kind in (NOISE, FP8, FREE)}
    rows = []
    for kind in (BALANCED, NOISE, FP8, FREE):
        own = [run for run in runs if run["kind"] == kind]
        if not own:
            continue
        means = [statistics.mean(run[field] for run in own) for field in (*fields, "max_vio_batch", "max_vio")]
        cells = ["" if kind == BALANCED else shown(differences[kind][field]) for field in fields]
        rows.append([kind, len(own), *(f"{value:.4f}" for value in means[:2]), *cells, *means[2:]])
    columns = ["run", "seeds", "loss", "held-out loss", "loss over BF16", "held-out over BF16", "MaxVio a batch"]
    names = ("batch", "block", "held_out", "learning_rate", "gamma", "warm_up", "seeds", "together")
    shape = {name: getattr(options, name) for name in names} | {"steps": max(run["steps"] for run in runs)}
    shape |= {"text_bytes": len(text[0]), "held_out_bytes": len(text[1]), "gpus": torch.cuda.device_count()}
    shape["parameters"] = sum(p.numel() for p in make_model(options, 0).parameters())
    return [*columns, "the quarter"], rows, {**shape, "differences": differences, "runs": runs}


def shown(difference):
    if difference is None:
        return ""
    error = difference["standard_error"]
    return f"{difference['mean']:+.3%}" + ("" if error is None else f" ± {error:.3%}")


def main():
    args = parser(__doc__)
    args.add_argument("--tiny", action="store_true")
    args.add_argument("--steps", type=int, default=400)
    args.add_argument("--seconds", type=float, help="on GPUs: as many steps as fit, instead of --steps, all told")
    args.add_argument("--together", type=int, default=2, help="runs that share a GPU")
    args.add_argument("--warm-up", type=int, default=100)
    args.add_argument("--seeds", type=int, default=3)
    args.add_argument("--batch", type=int, default=32)
    args.add_argument("--block", type=int, default=256)
    args.add_argument("--held-out", type=int, default=8192, help="blocks of held-out text")
    args.add_argument("--learning-rate", type=float, default=6e-4)
    args.add_argument("--gamma", type=float, default=0.001, help="of the bias update, which ends with the last tenth")
    args.add_argument("--text", help="a file to learn from instead of the Python sources")
    options = args.parse_args()
    if options.seconds and not torch.cuda.is_available():
        sys.exit("--seconds is for runs that share a GPU; give --steps here")
    text = read_text(options)
    print(f"# {len(text[0]):,} bytes to learn from, {len(text[1]):,} held out", flush=True)
    plan = [(seed, kind) for seed in range(options.seeds) for kind in KINDS]

    def record(runs):
        if options.output:
            data = {"benchmark": "fp8_loss", "machine": machine(), **summarise(runs, options, text)[2]}
            Path(options.output).write_text(json.dumps(data, indent=1) + "\n")

    runs = run_all(options, plan, text, record)
    if not runs:
        sys.exit("no run was ready in time, nothing is reported")
    if len(runs) < len(plan):
        print(f"# {len(plan) - len(runs)} of {len(plan)} runs are missing", flush=True)
    finish("fp8_loss", *summarise(runs, options, text), options.output)


if __name__ == "__main__":
    main()
