"""loss.png of a training run: losses, learning rate, balance."""

from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

_BLUE, _ORANGE, _GREEN, _GREY = "#2a6fbb", "#e07b39", "#3a8f5c", "#9aa0a6"
# Panel: title, unit, and (key in the log, label, colour) of its curves.
_PANELS: list[tuple[str, str, list[tuple[str, str, str]]]] = [
    (
        "Loss",
        "nats a token",
        [
            ("main_loss", "main: next token", _BLUE),
            ("mtp_loss", "MTP: the tokens after", _ORANGE),
            ("eval_main_loss", "main, held-out text", _GREEN),
        ],
    ),
    ("Learning rate", "", [("learning_rate", "", _GREY)]),
    (
        "Experts' balance: largest load over the mean, minus 1",
        "MaxVio",
        [("max_vio", "batches between two entries", _BLUE), ("eval_max_vio", "held-out text", _GREEN)],
    ),
]


def plot_training(path: str, history: list[dict[str, Any]]) -> None:
    """Write one PNG of three panels.

    Args:
        path: of the PNG.
        history: Trainer's `log_history`, with the balance callback's entries and `held_out_measures`'.
    """
    figure, axes = plt.subplots(
        3, 1, figsize=(8, 9), sharex=True, constrained_layout=True, height_ratios=[2.2, 1, 1.3]
    )
    for axis, (title, unit, curves) in zip(axes, _PANELS, strict=True):
        for key, label, colour in curves:
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            if points:
                measured = key.startswith("eval_") or len(points) == 1
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, color=colour, label=label, marker="o" if measured else None, markersize=4)
        axis.set(title=title, ylabel=unit)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    axes[-1].set(xlabel="optimizer step", ylim=(0, None))
    axes[1].set_ylim(bottom=0)
    figure.savefig(path, dpi=110)
    plt.close(figure)
