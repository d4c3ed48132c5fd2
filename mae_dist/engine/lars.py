"""LARS (You et al., 2017) as the paper's linear probe uses it: momentum, and a learning rate a tensor."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mae_dist.engine.optim import Optimizer


def lars(model: nn.Module, weight_decay: float, momentum: float) -> Optimizer:
    groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
    make: Any = partial(LARS, weight_decay=weight_decay, momentum=momentum)
    return Optimizer(groups, make, ("momentum",), elementwise=False)


def trust(weight: Tensor, update: Tensor, trust_coefficient: float, dims: int | tuple[int, ...]) -> Tensor:
    """trust_coefficient * |weight| / |update| over `dims` (kept); 1 where either is zero."""
    w, u = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (weight, update))
    return torch.where((w > 0) & (u > 0), trust_coefficient * w / u, torch.ones_like(w))


class LARS(torch.optim.Optimizer):
    """u = (g + weight_decay w) * trust for tensors of two dimensions and more, u = g for others; m = momentum m + u;
    w = w - lr m. As with torch's fused optimizers, g is divided by `grad_scale`, and nothing changes where
    `found_inf` is 1; the caller sets both.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ):
        super().__init__(
            params,
            {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust_coefficient": trust_coefficient},
        )
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.whole: Callable[[Tensor, Tensor], Tensor] = lambda parameter, piece: piece

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                update = p.grad
                if update is None:
                    continue
                if self.grad_scale is not None:
                    update = update / self.grad_scale
                if p.ndim > 1:
                    update = update + group["weight_decay"] * p
                    both = self.whole(p, p), self.whole(p, update)
                    update = update * trust(*both, group["trust_coefficient"], tuple(range(p.ndim)))
                held = self.state[p].setdefault("momentum", torch.zeros_like(p))
                moved = group["momentum"] * held + update
                if self.found_inf is not None:
                    moved = torch.where(self.found_inf > 0, held, moved)
                    p.sub_(torch.where(self.found_inf > 0, 0.0, group["lr"]) * moved)
                else:
                    p.sub_(group["lr"] * moved)
                held.copy_(moved)
