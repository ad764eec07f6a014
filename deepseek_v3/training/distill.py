"""Distilling the MTP modules: they learn to draft what the trained main model itself would write.

Special about it: nothing but the modules learns. The main model, its embedding and its head stand still in `eval()`:
its states are computed once, and its distributions of the next token are the targets. It is best done on text that the
main model has written itself, since drafts are verified on nothing else, and for more depths than there are modules:
beyond them `generate` runs the last module again on its own output, and so does this.

Letters: B batch, N rows of text, R rows of a module, T tokens, D hidden, M MTP modules, k depth from 1.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, set_seed

from ..modeling_deepseek_v3.cache import LatentCache
from .data import head, pack, read_texts, split_texts, text_files
from .evaluation import mtp_acceptance

LOG = "distill_log.json"
_EVALUATED_BYTES, _EVALUATED_BLOCK = 100_000, 256


@dataclass
class DistillSettings:
    """Everything `distill` needs; see the command's help. The defaults are a minute of two CPU cores for the preset
    `small`."""

    model: str = ""
    data: list[str] = field(default_factory=list)
    output: str = ""
    held_out: float = 0.03
    rows: int = 256
    prompt: int = 64
    new_tokens: int = 128
    temperature: float = 0.0
    depth: int = 3
    steps: int = 200
    batch: int = 8
    learning_rate: float = 2e-3
    warmup: int = 20
    seed: int = 0


@torch.no_grad()
def own_text(model: Any, prompts: torch.Tensor, new_tokens: int, batch: int = 64, **options: Any) -> torch.Tensor:
    """What the main model writes after `prompts`, for its MTP modules to learn from; a text's end does not stop a row.

    Args:
        model: a causal language model.
        prompts: [N, P] token ids without padding.
        new_tokens: for each.
        batch: prompts at a time.
        options: of `generate`; greedy unless they say otherwise.

    Returns:
        [N, P + new_tokens] token ids, prompts included.
    """
    settings = {"do_sample": False, "eos_token_id": None, **options, "max_new_tokens": new_tokens}
    parts = prompts.to(model.device).split(batch)
    return torch.cat([model.generate(part, attention_mask=torch.ones_like(part), **settings) for part in parts])


@torch.no_grad()
def main_states(model: Any, input_ids: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """[N, T, D] on the CPU: what the first MTP module takes of the main model over [N, T] tokens."""
    options = {"use_cache": False, "logits_to_keep": 1, "output_mtp_state": True}
    parts = input_ids.to(model.device).split(batch)
    return torch.cat([model(part, **options).mtp_state.cpu() for part in parts])


def draft_losses(model: Any, input_ids: torch.Tensor, states: torch.Tensor, depth: int) -> torch.Tensor:
    """Kullback-Leibler divergence of the drafts' distributions from the main model's, in nats a row.

    Row i of depth k stands for the draft that follows token i + k, all tokens up to there being right; the main
    model's own prediction there is the target, without a gradient. Depths beyond M run the last module on its own
    output, one slot further each time and seeing the module's rows up to i and the chain's own, as `generate` does.

    Args:
        model: a causal language model with MTP modules.
        input_ids: [B, T] without padding, T above `depth`.
        states: [B, T, D], as of `main_states`.
        depth: drafts of a row, at least M.

    Returns:
        [depth] float32.
    """
    modules, rows = model.config.num_nextn_predict_layers, input_ids.shape[1] - depth
    embeds = model.get_input_embeddings()(input_ids)
    with torch.no_grad():
        read = model.base_model.norm(states) if model.config.mtp_hidden_state == "pre_norm" else states
        targets = log_softmax(model.lm_head(read).float(), dim=-1)
    positions = torch.arange(rows, device=states.device)[None]
    previous, losses, cache = states[:, :rows], [], LatentCache(model.config)
    for k in range(1, depth + 1):
        chained = max(k - modules, 0)  # slots beyond the last module's own rows, which the cache holds
        mask = _chain_mask(rows, chained, states.device) if chained else None
        where = (mask, positions + chained, cache, "expanded")
        normed, previous = model.draft(min(k, modules) - 1, previous, embeds[:, k : k + rows], *where)
        drafted = log_softmax(model.lm_head(normed).float(), dim=-1)
        losses.append(kl_div(drafted, targets[:, k : k + rows], log_target=True, reduction="none").sum(-1).mean())
    return torch.stack(losses)


def _chain_mask(rows: int, chained: int, device: torch.device) -> torch.Tensor:
    """[1, 1, R, (1 + chained) * R] of the R drafts that are `chained` slots beyond a module's own rows: each sees
    those up to the row that it comes from, and of the chains before nothing but its own."""
    own = torch.eye(rows, dtype=torch.bool, device=device)
    return torch.cat((torch.ones_like(own).tril(), *[own] * chained), dim=1)[None, None]


class _Learner(nn.Module):
    """The drafts' losses as a module that Trainer trains; the model in it stays in `eval()`."""

    def __init__(self, model: Any, depth: int) -> None:
        super().__init__()
        self.model, self.depth = model, depth

    def forward(self, input_ids: torch.Tensor, states: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": draft_losses(self.model, input_ids, states, self.depth).mean()}

    def train(self, mode: bool = True) -> "_Learner":
        super().train(mode)
        self.model.eval()
        return self


def distill_mtp(
    model: Any,
    input_ids: torch.Tensor,
    output: str,
    *,
    depth: int = 3,
    steps: int = 200,
    batch: int = 8,
    learning_rate: float = 2e-3,
    warmup: int = 20,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Train the MTP modules of `model`, in place and alone, to draft as its main model predicts.

    AdamW under Trainer, its betas, clipping and decay those of `deepseek-v3 train`. The routers' biases of the modules
    stay where they are.

    Args:
        model: a causal language model with MTP modules; left in `eval()`, with the parameters that learnt before.
        input_ids: [N, T] token ids without padding; best of `own_text`.
        output: folder that Trainer may write to.
        depth: drafts to learn from each token, at least one a module.
        steps, batch, learning_rate, warmup, seed: as of `deepseek-v3 train`.

    Returns:
        Trainer's log, whose `loss` is the mean divergence over the depths.

    Raises:
        ValueError: no MTP module, weights that cannot learn, a depth below the number of modules or beyond the text.
    """
    _check(model, input_ids.shape[1], depth)
    model.eval()
    states = main_states(model, input_ids)
    rows = [{"input_ids": ids, "states": own} for ids, own in zip(input_ids.cpu(), states, strict=True)]
    arguments = TrainingArguments(
        output_dir=output,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.1},
        warmup_steps=warmup,
        adam_beta1=0.9,
        adam_beta2=0.95,
        weight_decay=0.1,
        max_grad_norm=1.0,
        logging_steps=max(1, steps // 20),
        save_strategy="no",
        seed=seed,
        use_cpu=model.device.type == "cpu",
        report_to=[],
    )
    with _only_mtp_learns(model):
        trainer = Trainer(model=_Learner(model, depth), args=arguments, train_dataset=rows)
        trainer.train()
    return trainer.state.log_history


def _check(model: Any, length: int, depth: int) -> None:
    modules = getattr(model.config, "num_nextn_predict_layers", 0) or 0
    if not modules:
        raise ValueError("the model has no MTP module (config.num_nextn_predict_layers = 0): nothing can learn")
    if not modules <= depth < length:
        raise ValueError(
            f"depth = {depth}: give at least one draft for each of the {modules} MTP modules, and fewer than the "
            f"{length} tokens of a row"
        )
    fixed = [name for layer in model.base_model.mtp_layers for name, p in layer.named_parameters() if not _learns(p)]
    if fixed:
        raise ValueError(f"the MTP weight {fixed[0]} is quantised and cannot learn: load the model with dtype=float32")


def _learns(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() and parameter.element_size() > 1


@contextmanager
def _only_mtp_learns(model: Any) -> Iterator[None]:
    learnt = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for layer in model.base_model.mtp_layers:
            layer.requires_grad_(True)
        yield
    finally:
        for parameter, wanted in learnt.items():
            parameter.requires_grad_(wanted)
        model.zero_grad()


def distill_on_texts(
    model: Any, tokenizer: Any, texts: list[str], settings: DistillSettings, say: Callable[[str], None] = print
) -> list[dict[str, Any]]:
    """Let the main model go on from pieces of `texts`, and its MTP modules learn from what it writes.

    Args:
        model: as of `distill_mtp`.
        tokenizer: packs the texts.
        texts: what prompts are cut from.
        settings: all but where the model and the texts come from.
        say: takes the lines of progress.

    Returns:
        As of `distill_mtp`.

    Raises:
        ValueError: as of `distill_mtp`; texts too short for a prompt.
    """
    _check(model, settings.prompt + settings.new_tokens, settings.depth)
    blocks = torch.tensor(pack(texts, tokenizer, settings.prompt)["input_ids"])
    order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(settings.seed))
    prompts = blocks[order[: settings.rows]]
    sampling: dict[str, Any] = {}
    if settings.temperature > 0:
        sampling = {"do_sample": True, "temperature": settings.temperature}
    say(f"{len(prompts)} prompts of {settings.prompt} tokens; the main model writes {settings.new_tokens} after each")
    written = own_text(model, prompts, settings.new_tokens, **sampling)
    say(f"the MTP modules learn {settings.depth} drafts a token: {settings.steps} steps of {settings.batch} rows")
    names = ("depth", "steps", "batch", "learning_rate", "warmup", "seed")
    return distill_mtp(model, written, settings.output, **{name: getattr(settings, name) for name in names})


def distill(settings: DistillSettings, say: Callable[[str], None] = print) -> list[float]:
    """Distil the MTP modules of a model folder; save the whole model, its tokenizer and `distill_log.json`.

    Args:
        settings: see `DistillSettings`.
        say: takes the lines of progress.

    Returns:
        Acceptance of each depth by teacher forcing on held-out text afterwards; empty where none is held out.

    Raises:
        ValueError, FileNotFoundError: settings that cannot work, with what to change.
    """
    if not Path(settings.model, "config.json").is_file():
        raise FileNotFoundError(f"{settings.model} is no model folder (it has no config.json); train or convert one")
    if Path(settings.output).resolve() == Path(settings.model).resolve():
        raise ValueError(f"--output {settings.output} is the model's own folder: give another one")
    set_seed(settings.seed)
    train, held_out = split_texts(read_texts(text_files(settings.data)), settings.held_out)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    model: Any = AutoModelForCausalLM.from_pretrained(settings.model, dtype=torch.float32).eval()
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    kept = head((text for _, text in held_out), _EVALUATED_BYTES)
    blocks = pack(kept, tokenizer, _EVALUATED_BLOCK)["input_ids"] if kept else []
    before = mtp_acceptance(model, blocks) if kept else []
    history = distill_on_texts(model, tokenizer, train, settings, say)
    after = mtp_acceptance(model, blocks) if kept else []
    if kept:
        shown = ", ".join(f"{old:.1%} -> {new:.1%}" for old, new in zip(before, after, strict=True))
        say(f"drafts accepted on held-out text, by teacher forcing and depth: {shown}")
    model.save_pretrained(settings.output)
    tokenizer.save_pretrained(settings.output)
    log = {"acceptance_before": before, "acceptance": after, "log": history}
    Path(settings.output, LOG).write_text(json.dumps(log, indent=1) + "\n", encoding="utf-8")
    return after
