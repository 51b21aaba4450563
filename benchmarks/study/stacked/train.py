"""Training of a stack: several seeds of one arm, each as if it were alone."""
import math
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..spec import Arm
from .nets import build_net, run_stack, stack_parameters
from .tasks import Recipe, Split, augment, normalize


def _generator(seed: int, epoch: int, what: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f'{what} {seed} {epoch}'.encode()))


def epoch_order(seeds: Sequence[int], epoch: int, samples: int, batch: int) -> tuple[Tensor, Tensor]:
    """Indices `(S, steps, B)` of an epoch's batches and the draws `(S, steps, B, 3)` of its augmentation.

    Functions of the seed and the epoch: the same for every arm, stack and device, and after an interruption.
    """
    steps = samples // batch
    order = [torch.randperm(samples, generator=_generator(s, epoch, 'order'))[:steps * batch] for s in seeds]
    draws = [torch.randint(9, (steps, batch, 3), generator=_generator(s, epoch, 'augment')) for s in seeds]
    return torch.stack(order).view(len(seeds), steps, batch), torch.stack(draws)


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Of a step: a linear rise, then half a cosine down to a hundredth."""
    rise = max(1, round(recipe.warmup * steps))
    if step < rise:
        return recipe.lr * (step + 1) / rise
    along = (step - rise) / max(1, steps - rise)
    return recipe.lr * (0.01 + 0.99 * (1 + math.cos(math.pi * along)) / 2)


def stack_loss(outputs: Tensor, targets: Tensor, recipe: Recipe) -> Tensor:
    """Mean cross entropy of every net, `(S,)`, from outputs `(S, B, K, ...)` and targets `(S, B, ...)`."""
    targets = targets.flatten(0, 1).long()
    losses = F.cross_entropy(
        outputs.flatten(0, 1).float(), targets, reduction='none', label_smoothing=recipe.smoothing)
    if not recipe.dense:
        return losses.view(len(outputs), -1).mean(1)
    weights = torch.where(targets == 0, recipe.ground_weight, 1.)
    losses, weights = (t.view(len(outputs), -1) for t in (losses * weights, weights))
    return losses.sum(1) / weights.sum(1)


def clip_each(gradients: Sequence[Tensor], limit: float) -> None:
    """Scales the gradients `(S, ...)` of every net down to the norm `limit`, each by its own."""
    square = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0)
    scale = (limit / (square.sqrt() + 1e-6)).clamp(max=1)
    torch._foreach_mul_(list(gradients), [scale.view(-1, *[1] * (g.ndim - 1)) for g in gradients])


EAGER_STEPS = 3  # before a step is captured: kernels compile, libraries choose theirs


class Stack:
    """Nets of an arm, one per seed, that train side by side; `parameters` holds `(S, ...)` leaves by name.

    On a CUDA device a step is captured as a graph after `EAGER_STEPS` steps, and replayed: these nets are so small that
    a step takes the host longer than the device. `graphed` says so; it is false where the capture failed.
    """

    def __init__(self, arm: Arm, recipe: Recipe, seeds: Sequence[int], device: torch.device) -> None:
        nets = [build_net(arm, recipe, seed) for seed in seeds]
        self.recipe, self.seeds, self.device = recipe, tuple(seeds), device
        self.net: nn.Module = nets[0].to(device)
        self.parameters = stack_parameters(nets, device)
        decayed = [p for p in self.parameters.values() if p.ndim > 2]
        others = [p for p in self.parameters.values() if p.ndim <= 2]
        cuda = device.type == 'cuda'
        self.optimizer = torch.optim.AdamW(
            [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=others, weight_decay=0.)],
            lr=torch.tensor(recipe.lr, device=device) if cuda else recipe.lr, betas=(0.9, 0.99), fused=cuda,
            capturable=cuda)
        self.epoch = 0
        self.graphed = False
        self.advance: Callable[[Split, Tensor, Tensor, float], Tensor] = self.graph_step if cuda else self.step
        self._eager_steps = 0
        self._graph: torch.cuda.CUDAGraph
        self._inputs: tuple[Tensor, Tensor, Tensor]
        self._losses: Tensor

    def outputs(self, images: Tensor) -> Tensor:
        """For uint8 images `(S, B, 3, H, W)`, or `(B, 3, H, W)` shown to all."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.amp):
            return run_stack(self.net, self.parameters, normalize(images))

    def step(self, split: Split, index: Tensor, draws: Tensor, rate: float | Tensor) -> Tensor:
        """One step on the batches `index` `(S, B)`; returns the losses `(S,)`."""
        shape = index.shape
        images, targets = split.images[index.flatten()], split.targets[index.flatten()]
        if self.recipe.augment:
            images, targets = augment(images, targets, draws.flatten(0, 1), self.recipe.dense)
        losses = stack_loss(self.outputs(images.unflatten(0, shape)), targets.unflatten(0, shape), self.recipe)
        losses.sum().backward()
        clip_each([p.grad for p in self.parameters.values() if p.grad is not None], self.recipe.clip)
        for group in self.optimizer.param_groups:
            if isinstance(rate, Tensor):
                group['lr'].copy_(rate)
            else:
                group['lr'] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return losses.detach()

    def graph_step(self, split: Split, index: Tensor, draws: Tensor, rate: float) -> Tensor:
        """`step` by replay of a CUDA graph, once it was captured. The losses are overwritten by the next step."""
        if self.graphed:
            for kept, given in zip(self._inputs, (index, draws), strict=True):
                kept.copy_(given)
            self._inputs[2].fill_(rate)
            self._graph.replay()
            return self._losses
        inputs = index.clone(), draws.clone(), torch.full((), rate, device=self.device)
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        if self._eager_steps < EAGER_STEPS:
            with torch.cuda.stream(side):
                losses = self.step(split, *inputs)
            torch.cuda.current_stream(self.device).wait_stream(side)
            self._eager_steps += 1
            return losses
        try:
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._losses = self.step(split, *inputs)
        except RuntimeError:
            traceback.print_exc()
            print('the step was not captured as a CUDA graph: training goes on without', flush=True)
            self.optimizer.zero_grad()
            self.advance = self.step
            return self.step(split, index, draws, inputs[2])
        self._inputs, self.graphed = inputs, True
        return self.graph_step(split, index, draws, rate)

    def run_epoch(self, split: Split) -> list[float]:
        """The next epoch; returns the mean loss of every net."""
        self.net.train()
        order, draws = epoch_order(self.seeds, self.epoch, len(split.images), self.recipe.batch_size)
        order, draws = order.to(self.device), draws.to(self.device)
        steps = order.shape[1]
        total = torch.zeros(len(self.seeds), device=self.device)
        for i in range(steps):
            rate = learning_rate(self.recipe, self.epoch * steps + i, self.recipe.epochs * steps)
            total += self.advance(split, order[:, i], draws[:, i], rate)
        self.epoch += 1
        return (total / steps).tolist()

    def state(self) -> dict[str, Any]:
        return {
            'epoch': self.epoch, 'parameters': {k: v.detach() for k, v in self.parameters.items()},
            'buffers': dict(self.net.named_buffers()), 'optimizer': self.optimizer.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, value in state['parameters'].items():
                self.parameters[name].copy_(value)
            for name, value in self.net.named_buffers():
                value.copy_(state['buffers'][name])
        self.optimizer.load_state_dict(state['optimizer'])
        self.epoch = state['epoch']


def train(
        stack: Stack, split: Split, place: Path, report: Callable[[str], None] = print, every_s: float = 0.,
) -> list[float]:
    """Trains to the end of the recipe; an epoch that was finished before an interruption is not repeated.

    Args:
        stack: What to train.
        split: Training images on the device of the stack.
        place: File that keeps the state after every epoch.
        report: Takes a line per epoch.
        every_s: Seconds between states that are kept; 0 keeps one after every epoch.

    Returns:
        Seconds of every epoch that ran.
    """
    seconds: list[float] = []
    kept = time.monotonic()
    if place.exists():
        stack.load_state(torch.load(place, map_location=stack.device, weights_only=True))
    place.parent.mkdir(parents=True, exist_ok=True)
    while stack.epoch < stack.recipe.epochs:
        start = time.monotonic()
        losses = stack.run_epoch(split)
        seconds.append(time.monotonic() - start)
        if time.monotonic() - kept >= every_s:
            part = place.with_suffix('.part')
            torch.save(stack.state(), part)
            part.replace(place)
            kept = time.monotonic()
        report(f'{place.stem} epoch {stack.epoch}: loss ' + ' '.join(f'{loss:.3f}' for loss in losses))
    return seconds
