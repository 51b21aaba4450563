"""What a stacked study runs, keeps and repeats: results, weights and times of its arms."""
import fnmatch
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from cpool_vision.profile.measure import machine

from ...turns import median_ratio, take_turns
from ..runner import fingerprint, result_file, run_name, write_text
from ..spec import Arm, Study
from .nets import build_net, unstack
from .score import score_stack
from .tasks import Recipe, Split, load_split, normalize
from .train import Stack, epoch_order, train


def stacks(study: Study, output: Path, size: int, only: str) -> list[tuple[Arm, list[int]]]:
    """Arms with the seeds that have no result yet, `size` at a time; all arms of some seeds before further seeds."""
    seeds = sorted({seed for arm in study.arms.values() for seed in arm.seeds})
    found = []
    for start in range(0, len(seeds), size):
        for arm in study.arms.values():
            missing = [
                s for s in seeds[start:start + size]
                if s in arm.seeds and not result_file(output, run_name(arm.name, s)).exists()]
            if missing and fnmatch.fnmatch(arm.name, only):
                found.append((arm, missing))
    return found


def recipe_of(study: Study, arm: Arm) -> Recipe:
    return Recipe.of({**study.settings, **arm.flags})


class Data:
    """Splits on the device, the last of each kind kept."""

    def __init__(self, output: Path, data_dir: Path | None, device: torch.device) -> None:
        self.cache, self.data_dir, self.device = output / 'data', data_dir, device
        self.kept: dict[str, tuple[Any, Split]] = {}

    def split(self, recipe: Recipe, name: str) -> Split:
        key = (recipe.task, recipe.image_size, recipe.mean_radius, recipe.size_range,
               getattr(recipe, f'{name}_samples'))
        if name not in self.kept or self.kept[name][0] != key:
            made = load_split(recipe, name, self.cache, self.data_dir).to(self.device)
            self.kept[name] = key, made
        return self.kept[name][1]


def _costs(arm: Arm, recipe: Recipe) -> dict[str, float]:
    net = build_net(arm, recipe, 0).eval()
    image = torch.zeros(1, 3, recipe.image_size, recipe.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(image)
    return {'params': sum(p.numel() for p in net.parameters()), 'macs': counter.get_total_flops() // 2}


def check_parameters(study: Study, within: float = 0.02) -> None:
    """Raises unless the arms that the study calls equal have as many parameters, the largest beside the smallest.

    Raises:
        ValueError: they differ by more than the share `within`.
    """
    counts = {}
    for name in study.equal_parameters:
        arm = study.arms[name]
        counts[name] = sum(p.numel() for p in build_net(arm, recipe_of(study, arm), 0).parameters())
    if counts and max(counts.values()) > (1 + within) * min(counts.values()):
        raise ValueError(f'equal_parameters must agree within {within:.0%}, got {counts}: change mlp_ratio or groups')


def weights_file(output: Path, name: str) -> Path:
    return output / 'weights' / f'{name}.safetensors'


def load_net(study: Study, output: Path, arm: Arm, seed: int, device: torch.device) -> torch.nn.Module:
    """The trained net of a run, for evaluation."""
    net = build_net(arm, recipe_of(study, arm), seed)
    net.load_state_dict(load_file(weights_file(output, run_name(arm.name, seed))))
    return net.to(device).eval()


def batch_of(device: torch.device) -> int:
    """Images that are scored at a time."""
    return 500 if device.type == 'cuda' else 100


def run_stack_of(
        study: Study, arm: Arm, seeds: Sequence[int], data: Data, output: Path, device: torch.device) -> None:
    """Trains and scores the seeds of an arm; writes a result and the weights of each."""
    recipe = recipe_of(study, arm)
    stack = Stack(arm, recipe, seeds, device)
    # a changed recipe must not go on with the state of another
    place = output / 'states' / f'{arm.name}-s{"-".join(map(str, seeds))}-{fingerprint(study, arm.name, seeds[0])}.pt'
    gpu = device.type == 'cuda'
    split = data.split(recipe, 'train')
    began, start = time.monotonic(), time.process_time()
    epochs = train(stack, split, place, lambda line: print(line, flush=True), every_s=60. if gpu else 0.)
    seconds, elapsed = time.process_time() - start, time.monotonic() - began
    steps = recipe.train_samples // recipe.batch_size
    stack.net.eval()
    scores = score_stack(
        stack.outputs, len(seeds), recipe, data.split(recipe, 'selection'), batch_of(device))
    costs, where = _costs(arm, recipe), machine()
    (output / 'weights').mkdir(parents=True, exist_ok=True)
    for i, seed in enumerate(seeds):
        name = run_name(arm.name, seed)
        save_file(unstack(stack.net, stack.parameters, i), weights_file(output, name))
        row = {
            'arm': arm.name, 'seed': seed, **scores[i], **costs, 'stack': len(seeds), 'device': str(device),
            'cpu_seconds': round(seconds / len(seeds), 1), 'seconds': round(elapsed, 1), 'graphed': stack.graphed,
            'step_ms': round(1000 * min(epochs) / steps, 3) if epochs else None, 'machine': where,
            'settings': fingerprint(study, arm.name, seed), 'supports': {}}
        write_text(result_file(output, name), json.dumps(row, indent=1) + '\n')
        print(f'{name}: {recipe.metric} {scores[i][recipe.metric]:.2f} %', flush=True)
    place.unlink(missing_ok=True)


def score_test(study: Study, output: Path, data: Data, device: torch.device) -> list[dict[str, Any]]:
    """Scores of all runs on the test images, made once.

    Raises:
        RuntimeError: a run has no result yet, or the test images were scored before.
    """
    kept = output / 'test.json'
    if kept.exists():
        raise RuntimeError(f'the test images were scored before: the figures are in {kept}')
    rows = []
    for arm, seed in study.runs():
        file = result_file(output, run_name(arm.name, seed))
        if not file.exists():
            raise RuntimeError(f'the test images are scored when all runs are done, and {file.stem} is not')
        recipe = recipe_of(study, arm)
        net = load_net(study, output, arm, seed, device)
        score, = score_stack(
            lambda x, net=net: net(normalize(x))[None], 1, recipe, data.split(recipe, 'test'),  # type: ignore[misc]
            batch=batch_of(device))
        rows.append({**json.loads(file.read_text(encoding='utf-8')), **score, 'machine': machine()})
    write_text(kept, json.dumps(rows, indent=1) + '\n')
    return rows


def step_ratios(study: Study, data: Data, size: int, device: torch.device, repeats: int = 21) -> dict[str, float]:
    """Median over rounds of the time of a training step of every arm over that of its base in the same round."""
    steps = {}
    for arm in study.arms.values():
        recipe = recipe_of(study, arm)
        stack = Stack(arm, recipe, list(arm.seeds)[:size], device)
        split = data.split(recipe, 'train')
        order, draws = epoch_order(stack.seeds, 0, len(split.images), recipe.batch_size)
        batch = order[:, 0].to(device), draws[:, 0].to(device)
        # reading a sum waits for the device
        steps[arm.name] = lambda stack=stack, split=split, batch=batch: stack.step(split, *batch, 1e-4).sum().item()
    rounds = take_turns(steps, repeats, warm_up=2)
    return {name: median_ratio(rounds, name, study.arms[name].base or name) for name in steps}


def replay_ratios(study: Study, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The time of every arm's replayed training step over that of its base, from the runs themselves."""
    times = {row['arm']: row['step_ms'] for row in rows if row.get('graphed') and row.get('step_ms')}
    return {name: times[name] / times[arm.base or name] for name, arm in study.arms.items()
            if name in times and (arm.base or name) in times}
