"""The distance between two training runs, in losses and in weights."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Run:
    """The loss at each step ``(steps,)``, and all trained weights, flat, before and after."""

    losses: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def loss_ratio(self):
        """The mean loss of the last tenth of the steps, divided by that of the first tenth."""
        tenth = -(-len(self.losses) // 10)
        return (self.losses[-tenth:].mean() / self.losses[:tenth].mean()).item()


@dataclass(frozen=True)
class Distance:
    """The distance of two runs that took the same batches in the same order.

    loss: the largest difference of the two losses at a step.
    weights: the norm of the difference divided by the norm of the change in training, so that it
        does not depend on the scale of weights: 1 is the distance to an untrained model.
    """

    loss: float
    weights: float

    def ratio_to(self, yardstick):
        """The larger of the two ratios to another distance."""
        return max(self.loss / yardstick.loss, self.weights / yardstick.weights)


def distance(run, other):
    way = (other.end - other.start).norm()
    return Distance(
        loss=(run.losses - other.losses).abs().max().item(),
        weights=((run.end - other.end).norm() / way).item(),
    )


def adamw(parameters, losses, *, lr):
    """Step by AdamW down each loss that the iterable ``losses`` computes.

    With the usual eps of 1e-8, gradients that are zero up to rounding would make full steps in
    random directions. Key biases have such gradients, since softmax does not depend on them.
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
