"""The picture of a training run: loss curves, expert load, compression, cache."""

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_BLUE, _ORANGE, _GREY = "#2a6fbb", "#e07b39", "#9aa0a6"


def plot_run(
    path: str,
    history: list[dict[str, Any]],
    loads: dict[str, list[list[float]]],
    bits: dict[str, float],
    cache: dict[str, int],
) -> None:
    """Write one PNG of four panels.

    Args:
        path: of the PNG.
        history: Trainer's `log_history`, with the balance callback's entries.
        loads: two sets of expert shares by name, each [layers][E].
        bits: bits a byte by name.
        cache: cache bytes a token by name.
    """
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), constrained_layout=True)
    _losses(axes[0, 0], history)
    _loads(axes[0, 1], loads)
    _bars(axes[1, 0], bits, "Held-out bits a byte (lower is better)", "{:.2f}")
    _bars(axes[1, 1], cache, "Cache bytes a token (lower is better)", "{:,.0f}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_losses(path: str, history: list[dict[str, Any]]) -> None:
    """Write a PNG of the loss curves in Trainer's `log_history`, with the balance callback's entries."""
    figure, axis = plt.subplots(figsize=(7, 4.5), constrained_layout=True)
    _losses(axis, history)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Any, history: list[dict[str, Any]]) -> None:
    rows = [entry for entry in history if "main_loss" in entry]
    steps = [entry["step"] for entry in rows]
    axis.plot(steps, [entry["main_loss"] for entry in rows], color=_BLUE, label="main: next token")
    if any("mtp_loss" in entry for entry in rows):
        axis.plot(steps, [entry.get("mtp_loss") for entry in rows], color=_ORANGE, label="MTP: the token after")
    held_out = [entry for entry in history if "eval_loss" in entry]
    if held_out:
        points = [entry["eval_loss"] for entry in held_out]
        label = "held-out data: main, MTP and balance together"
        axis.plot([e["step"] for e in held_out], points, color=_GREY, marker="o", markersize=3, label=label)
    axis.set(title="Training loss", xlabel="step", ylabel="nats a token")
    axis.grid(alpha=0.3)
    axis.legend()


def _loads(axis: Any, loads: dict[str, list[list[float]]]) -> None:
    """Each expert's load over the mean load, experts of a layer sorted, one faint line a layer and their mean."""
    for (name, layers), colour in zip(loads.items(), (_GREY, _BLUE), strict=False):
        curves = [sorted((share * len(layer) for share in layer), reverse=True) for layer in layers]
        for curve in curves:
            axis.plot(range(1, len(curve) + 1), curve, color=colour, alpha=0.25, linewidth=1)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axis.plot(range(1, len(mean) + 1), mean, color=colour, marker="o", markersize=3, label=name)
    axis.axhline(1.0, color="black", linewidth=0.8, linestyle="--", label="perfect balance")
    axis.set(
        title="Expert load on held-out text", xlabel="experts of a layer, busiest first", ylabel="load / mean load"
    )
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()


def _bars(axis: Any, values: dict[str, float] | dict[str, int], title: str, form: str) -> None:
    colours = [_BLUE, *[_GREY] * (len(values) - 1)]
    bars = axis.barh(list(values), list(values.values()), color=colours)
    axis.bar_label(bars, [form.format(value) for value in values.values()], padding=4)
    axis.invert_yaxis()
    axis.set_title(title)
    axis.margins(x=0.18)
    axis.spines[["top", "right"]].set_visible(False)
