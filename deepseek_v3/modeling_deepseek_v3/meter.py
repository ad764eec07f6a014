"""Running sums of a training step's losses, for whoever logs them."""

import torch

NAMES = ("main_loss", "mtp_loss", "balance_loss")


class LossMeter:
    """Adds up the detached losses of training forwards on their device, until `drain` reads them.

    Reading is the only thing that waits for the device. Nothing here is part of the state dict.
    """

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.forwards = 0
        self.summed = False

    def add(self, losses: dict[str, torch.Tensor], summed: bool) -> None:
        """Take a forward's losses; `summed` tells that they are shares of one sum over the accumulated batch."""
        self.forwards += 1
        self.summed = summed
        for name in NAMES:
            if name in losses:
                value = losses[name].detach().float()
                self.sums[name] = self.sums[name] + value if name in self.sums else value

    def drain(self, steps: int) -> dict[str, torch.Tensor]:
        """Mean losses since the last call.

        Args:
            steps: optimizer steps since then.
        """
        count = max(steps if self.summed else self.forwards, 1)
        means = {name: value / count for name, value in self.sums.items()}
        self.sums, self.forwards = {}, 0
        return means
