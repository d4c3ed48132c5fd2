"""One supervised update over all ranks, and its whole state: what linear probing and fine-tuning share."""

import operator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn

from mae_dist.data import Batch
from mae_dist.engine import StepResult, World
from mae_dist.engine.base import Precision
from mae_dist.engine.state import COUNTER, WEIGHTS, check_finite, finite, first_broken, load_tensors, save_tensors
from mae_dist.engine.update import Update, Updating, autocast
from mae_dist.errors import UserError

OPTIMIZER, AVERAGE = "optimizer.safetensors", "ema.safetensors"


class Learner(Updating):
    """`model`: what is trained and saved. Subclasses say how its gradients and its predictions are made.

    Gradients are whole (averaged over ranks) when `forward_backward` returns from the last micro-batch.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        world: World,
        precision: Precision,
        accumulate: int,
        clip_grad: float | None = None,
        ema: float | None = None,
    ):
        self.model, self.optimizer, self.world, self.accumulate = model, optimizer, world, accumulate
        self.autocast, self.update = autocast(world.device, precision), Update(optimizer, world, clip_grad, precision)
        self.ema = ModelEmaV3(model, decay=ema) if ema else None
        self.named = {p: name for name, p in model.named_parameters() if p.requires_grad}

    def forward_backward(self, images: Tensor, batch: Batch, last: bool) -> None:
        """One micro-batch: normalised images (B, C, H, W), and who they are."""
        raise NotImplementedError

    def predict(self, images: Tensor) -> Tensor:
        """Logits (B, classes) of normalised images; of the moving average where there is one."""
        raise NotImplementedError

    @property
    def evaluated(self) -> nn.Module:
        return self.ema.module if self.ema else self.model

    @torch.no_grad()
    def step(self, lr: float) -> StepResult:
        """Update with this learning rate, or skip on every rank when any rank's numbers are not finite."""
        norm = self.update.arm(torch.nn.utils.get_total_norm([p.grad for p in self.named if p.grad is not None]))
        self.update.set_lr(lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema:
            self._average(self.ema)
        return self.update.result(norm)

    def _average(self, ema: ModelEmaV3) -> None:
        """Move the average towards the weights, but after an update that was skipped."""
        weight = (1 - ema.decay) * (1 - self.update.bad)
        for average, now in zip(ema.module.parameters(), self.model.parameters(), strict=True):
            average.lerp_(now, weight)

    @property
    def broken(self) -> str:
        """See `Share`. Collective."""
        state = {name: t for file in self.state().values() for name, t in file.items()}
        return first_broken(state, [finite(tensor) for tensor in state.values()], self.world)

    @torch.no_grad()
    def harm(self, images: Tensor) -> str:
        """What is wrong with what is trained, the same on all ranks; empty: nothing. Normalised images. Collective."""
        if name := self.broken:
            return f"{name} is not finite"
        usual, self.autocast = self.autocast, nullcontext()
        bad = self.world.max((~finite(self.predict(images))).float())
        self.autocast = usual
        return "they give no finite numbers, in float32 either" if bad else ""

    @property
    def num_bytes(self) -> int:
        """Of a checkpoint, at most: weights, two moments and a moving average, float32."""
        return 16 * sum(p.numel() for p in self.model.parameters())

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Everything an update depends on, by file: weights, `KEY.PARAMETER` of the optimizer and the counters of
        updates, the moving average.
        """
        moments = {
            f"{key}.{name}": value
            for p, name in self.named.items()
            for key, value in self.optimizer.state.get(p, {}).items()
        }
        counters = {COUNTER + name: value for name, value in self.counters().items()}
        files = {WEIGHTS: dict(self.model.state_dict()), OPTIMIZER: moments | counters}
        return files | ({AVERAGE: dict(self.ema.module.state_dict())} if self.ema else {})

    def write(self, directory: Path) -> list[Path]:
        """Write the state into an existing directory, on rank 0 (all ranks have the same); returns the files."""
        if not self.world.is_main:
            return []
        for name, tensors in self.state().items():
            save_tensors({key: value.detach().contiguous() for key, value in tensors.items()}, directory / name)
        return [directory / name for name in self.state()]

    def read(self, directory: Path) -> None:
        """The opposite of `write`. Raises UserError, naming the key, where it is of another network."""
        weights, ours = load_tensors(directory / WEIGHTS), self.model.state_dict()
        wrong = ["network.pool"] * (("fc_norm.weight" in weights) != ("fc_norm.weight" in ours))
        wrong += ["optim.ema"] * ((directory / AVERAGE).is_file() != bool(self.ema))
        shapes = ({key: tensor.shape for key, tensor in state.items()} for state in (weights, ours))
        wrong += ["network.img_size, or the classes of the labels"] * (not wrong and operator.ne(*shapes))
        if wrong:
            raise UserError(
                f"{directory}: trained with another {' and '.join(wrong)}, which cannot change in a run; write what it "
                "was started with (config.yaml beside checkpoints/), or another --train.name"
            )
        check_finite(weights, directory)
        self.model.load_state_dict(weights)
        if self.ema:
            self.ema.module.load_state_dict(load_tensors(directory / AVERAGE))
        places: dict[str, Any] = {name: p for p, name in self.named.items()}
        moments = load_tensors(directory / OPTIMIZER)
        counters = [key for key in moments if key.startswith(COUNTER)]
        self.set_counters({key.removeprefix(COUNTER): moments.pop(key) for key in counters})
        for key, value in moments.items():
            kind, _, name = key.partition(".")
            self.optimizer.state[places[name]][kind] = value.to(self.world.device)
