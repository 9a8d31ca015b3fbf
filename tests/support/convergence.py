"""How far apart two trainings end, by their losses and by their weights."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """The loss at each step ``(steps,)``, and all that was trained in one row, before and after."""

    losses: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def loss_ratio(self):
        """The mean loss of the last tenth of the steps, as a share of that of the first."""
        tenth = -(-len(self.losses) // 10)
        return (self.losses[-tenth:].mean() / self.losses[:tenth].mean()).item()


@dataclass(frozen=True)
class Distance:
    """How far apart two runs are that took the same batches in the same order.

    loss: the largest difference over the curves; the same step is the same question to both.
    weights: the norm of the difference over that of the way from the start, so that it does not
        hang on how large weights are: 1 is as far as from no training at all.
    """

    loss: float
    weights: float

    def ratio_to(self, yardstick):
        """How many times as far as another distance, in the worse of the two."""
        return max(self.loss / yardstick.loss, self.weights / yardstick.weights)


def distance(run, other):
    way = (other.end - other.start).norm()
    return Distance(
        loss=(run.losses - other.losses).abs().max().item(),
        weights=((run.end - other.end).norm() / way).item(),
    )


def adamw(parameters, losses, *, lr):
    """Step by AdamW down each loss that the iterable ``losses`` computes.

    With the usual eps of 1e-8, gradients that are 0 but for rounding would make steps as long as
    any, in directions of chance: those of the biases of keys, which softmax does not see.
    """
    parameters = list(parameters)
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=1e-6)
    start, curve = _row(parameters), []
    for loss in losses:
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return Run(torch.stack(curve).double().cpu(), start, _row(parameters))


def _row(parameters):
    return torch.cat([p.detach().double().flatten() for p in parameters]).cpu()
