"""Distilling the MTP modules: they learn to draft what the trained main model itself would write.

Special about it: nothing but the modules learns. The main model, its embedding and its head stand still in `eval()`, so
that its states are computed once, and its distributions of the next token are the targets. It is best done on text
that the main model has written itself, since drafts are verified on nothing else, and for more depths than there are
modules: beyond them `generate` runs the last module again on its own output, and so does this.

Letters: B batch, N rows of text, T tokens, D hidden, V vocabulary, M MTP modules, k depth from 1.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax
from transformers import Trainer, TrainingArguments


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
    parts = prompts.split(batch)
    return torch.cat([model.generate(part, attention_mask=torch.ones_like(part), **settings) for part in parts])


@torch.no_grad()
def main_states(model: Any, input_ids: torch.Tensor, batch: int = 8) -> torch.Tensor:
    """[N, T, D] on the CPU: what the first MTP module takes of the main model over [N, T] tokens."""
    options = {"use_cache": False, "logits_to_keep": 1, "output_mtp_state": True}
    return torch.cat([model(part, **options).mtp_state.cpu() for part in input_ids.split(batch)])


def draft_losses(model: Any, input_ids: torch.Tensor, states: torch.Tensor, depth: int) -> torch.Tensor:
    """Kullback-Leibler divergence of the drafts' distributions from the main model's, in nats a row.

    Row i of depth k stands for the draft that follows token i + k, all tokens up to there being right; the main model's
    own prediction there is the target, without a gradient. Depths beyond M run the last module on its own output,
    one slot further each time and seeing the last module's rows up to i and the chain's own, as `generate` does.

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
    previous, given, losses = states[:, :rows], [], []
    for k in range(1, depth + 1):
        joined = (previous, embeds[:, k : k + rows])
        given = [joined] if k <= modules else [*given, joined]
        normed, previous = _chained(model, min(k, modules) - 1, given)
        drafted = log_softmax(model.lm_head(normed).float(), dim=-1)
        losses.append(kl_div(drafted, targets[:, k : k + rows], log_target=True, reduction="none").sum(-1).mean())
    return torch.stack(losses)


def _chained(
    model: Any, module: int, given: list[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """A module on the last of `given`, pairs of states and embeddings [B, R, D]: the first are its rows over the text,
    each later one stands a slot further and was made from the one before. What `draft` gives, [B, R, D] each."""
    previous, embeds = (torch.cat(parts, dim=1) for parts in zip(*given, strict=True))
    rows, device = given[0][0].shape[1], previous.device
    index = torch.arange(len(given) * rows, device=device)
    block, row = index // rows, index % rows
    mask = None
    if len(given) > 1:
        own = (row == row[:, None]) & (block <= block[:, None])
        mask = torch.where(block == 0, row <= row[:, None], own).expand(len(previous), 1, -1, -1)
    normed, after = model.draft(module, previous, embeds, mask, (row + block)[None])
    return normed[:, -rows:], after[:, -rows:]


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
    depth: int = 2,
    steps: int = 300,
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
    _check(model, input_ids, depth)
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


def _check(model: Any, input_ids: torch.Tensor, depth: int) -> None:
    modules = getattr(model.config, "num_nextn_predict_layers", 0) or 0
    if not modules:
        raise ValueError("the model has no MTP module (config.num_nextn_predict_layers = 0): there is nothing to distill")
    if not modules <= depth < input_ids.shape[1]:
        raise ValueError(
            f"depth = {depth}: give at least one draft for each of the {modules} MTP modules, and fewer than the "
            f"{input_ids.shape[1]} tokens of a row"
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
