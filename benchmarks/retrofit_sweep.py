"""Retrofits one small model of every module of timm and checks it: `python -m benchmarks.retrofit_sweep`.

    python -m benchmarks.retrofit_sweep                          # print
    python -m benchmarks.retrofit_sweep --write docs/retrofit.md # between the markers of the file, and the JSON
    python -m benchmarks.retrofit_sweep --modules swin_transformer eva

For each module the smallest registered model by parameters is taken (counted on the meta device), with random weights.
It works if, with `add_context_pool` at its defaults, the output on a batch of two images is equal to the bit before and
after, also that of `forward_features`; the base's state dict fits with nothing missing but the pools; an open gate
changes the output; every parameter of the pools gets a finite gradient in training, not all of them zero; and a deep
copy gives the same output. Each model has a process and a time limit of its own. Models of more than 32 M parameters
are built with fewer blocks where they have a keyword for it.
"""
import argparse
import copy
import json
import multiprocessing
import pathlib
import queue
import sys
import time
import warnings
from typing import Any

import timm
import torch

import cpool_vision
from cpool_vision.retrofit import context_pools

from .markers import replace_between

BEGIN, END = '<!-- retrofit-table -->', '<!-- /retrofit-table -->'
RESULTS = pathlib.Path(__file__).resolve().parent / 'results' / 'retrofit.json'
TARGET = 32_000_000
SMALLER: tuple[dict[str, Any], ...] = ({}, {'depth': 2}, {'depth': 2, 'embed_dim': 192, 'num_heads': 3})


def timms_modules() -> list[str]:
    """Modules of timm's registry, without ours."""
    return [module for module in timm.list_modules() if is_timms(module)]


def is_timms(module: str) -> bool:
    return any(timm.models.model_entrypoint(name).__module__.startswith('timm.')
               for name in timm.list_models(module=module))


def count(name: str, kwargs: dict[str, Any]) -> int:
    """Parameters of a model."""
    with torch.device('meta'):
        return sum(parameter.numel() for parameter in timm.create_model(name, **kwargs).parameters())


def smallest(module: str, limit: int) -> dict[str, Any]:
    """The smallest model of a module and its size, made shallower if it is large and can be."""
    sizes = []
    errors = []
    for name in timm.list_models(module=module):
        if not timm.models.model_entrypoint(name).__module__.startswith('timm.'):
            continue
        try:
            sizes.append((count(name, {}), name))
        except Exception as error:  # what timm cannot build on the meta device is named with the reason
            errors.append(f'{name}: {" ".join(str(error).split())[:100]}')
    if not sizes:
        return {'model': '', 'status': 'skipped', 'reason': errors[0] if errors else 'no model'}
    params, name = min(sizes)
    row: dict[str, Any] = {'model': name, 'kwargs': {}, 'params': params}
    for kwargs in SMALLER:
        try:
            row.update(params=count(name, kwargs), kwargs=kwargs)
        except Exception as error:  # not a keyword of this model
            errors.append(str(error))
        else:
            if row['params'] <= TARGET:
                return row
    if params <= limit:
        return {**row, 'params': params, 'kwargs': {}}
    reason = f'its smallest model has {params / 1e6:.0f} M parameters'
    row.update(status='skipped', kwargs={}, params=params, reason=reason)
    return row


class CheckError(Exception):
    """A check failed; the message is the reason in one line."""


def require(condition: bool, reason: str) -> None:
    if not condition:
        raise CheckError(reason)


def flat(output: Any) -> list[torch.Tensor]:
    """The tensors of a model's output."""
    if isinstance(output, torch.Tensor):
        return [output]
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for part in output for tensor in flat(part)] if isinstance(output, (tuple, list)) else []


def same(a: Any, b: Any) -> bool:
    return all(torch.equal(p, q) for p, q in zip(flat(a), flat(b), strict=True))


def check(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Retrofits a model and checks it.

    Raises:
        CheckError: What does not hold.
    """
    torch.manual_seed(0)
    model: Any = timm.create_model(name, **kwargs).eval()
    x = torch.randn(2, *timm.data.resolve_model_data_config(model)['input_size'])
    head = model.get_classifier()
    for part in torch.nn.ModuleList(head if isinstance(head, (tuple, list)) else [head]).modules():
        # a classifier that starts at zero hides everything
        if isinstance(part, torch.nn.Linear) and not part.weight.any():
            torch.nn.init.trunc_normal_(part.weight, std=.02)
    weights = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before, features = model(x), model.forward_features(x)
        require(same(before, model(x)), 'the base itself gives different outputs in two runs')
    cpool_vision.add_context_pool(model)
    pools = context_pools(model)
    with torch.no_grad():
        require(same(before, model(x)), 'the output is not equal to the bit')
        require(same(features, model.forward_features(x)), 'forward_features is not equal to the bit')
        if hasattr(model, 'forward_intermediates'):
            final = model.forward_intermediates(x)[0]
            require(same(final, features), 'forward_intermediates ends with other features')
    missing, unexpected = model.load_state_dict(weights, strict=False)
    require(not unexpected and all('.cpool.' in key for key in missing), 'the state dict of the base does not fit')
    for pool in pools.values():
        torch.nn.init.constant_(pool.gamma, 0.5)  # type: ignore[arg-type]
    with torch.no_grad():
        after = model(x)
        require(same(after, copy.deepcopy(model)(x)), 'a deep copy gives another output')
    model.train()
    sum(tensor.square().sum() for tensor in flat(model(x))).backward()  # type: ignore[union-attr]
    grads: dict[str, Any] = {
        f'{pool_name}.{key}': p.grad for pool_name, pool in pools.items() for key, p in pool.named_parameters()}
    for key, grad in grads.items():
        require(grad is not None, f'{key} gets no gradient')
        require(bool(grad.isfinite().all()), f'{key} gets a gradient that is not finite')
    require(any(bool(grad.any()) for grad in grads.values()), 'every gradient of the pools is zero')
    require(not same(before, after), 'an open gate does not change the output')
    layouts = {'ContextPool2d': 'NCHW', 'ChannelsLastContextPool': 'NHWC', 'GridContextPool': 'tokens'}
    return {
        'status': 'works',
        'pools': len(pools),
        'layout': ', '.join(sorted({layouts[type(pool).__name__] for pool in pools.values()})),
        'places': [pool_name.removesuffix('.cpool') for pool_name in pools],
        'pool_params': sum(p.numel() for pool in pools.values() for p in pool.parameters()),
        'reason': '',
    }


def _work(answers: Any, name: str, kwargs: dict[str, Any]) -> None:
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    try:
        answers.put(check(name, kwargs))
    except CheckError as error:
        answers.put({'status': 'fails', 'reason': str(error)})
    except Exception as error:
        answers.put({'status': 'fails', 'reason': f'{type(error).__name__}: {" ".join(str(error).split())[:250]}'})


def run(row: dict[str, Any], limit_s: float) -> dict[str, Any]:
    """`check` in a process of its own."""
    context = multiprocessing.get_context('fork')
    answers = context.Queue()
    process = context.Process(target=_work, args=(answers, row['model'], row['kwargs']))
    process.start()
    end = time.monotonic() + limit_s
    answer = None
    while answer is None and time.monotonic() < end:
        try:
            answer = answers.get(timeout=1)
        except queue.Empty:
            if not process.is_alive():
                break
    process.kill()
    process.join()
    if answer is None:
        answer = {'status': 'fails', 'reason': f'no answer within {limit_s:.0f} s' if time.monotonic() >= end
                  else f'the process ended with code {process.exitcode}'}
    return {**row, **answer}


def format_table(rows: list[dict[str, Any]]) -> str:
    """Markdown table of the rows."""
    works = sum(row['status'] == 'works' for row in rows)
    tried = sum(row['status'] != 'skipped' for row in rows)
    lines = [
        f'{works} of {tried} modules work (timm {timm.__version__}); {len(rows) - tried} are left out.', '',
        '| module | model | parameters (M) | | pools | layout | reason |',
        '|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        name = f"`{row['model']}`" if row['model'] else ''
        extra = ', '.join(f'{key}={value}' for key, value in row.get('kwargs', {}).items())
        reason = row.get('reason', '').replace('|', '\\|')
        lines.append(
            f"| `{row['module']}` | {name}{f' ({extra})' if extra else ''} | {row.get('params', 0) / 1e6:.2f} | "
            f"{row['status']} | {row.get('pools', '')} | {row.get('layout', '')} | {reason} |")
    return '\n'.join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints or writes the table; returns 1 if a model that worked before fails now, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--write', type=pathlib.Path, default=None, metavar='FILE',
                        help='write the table between the markers of FILE, and the JSON to --results')
    parser.add_argument('--modules', nargs='+', default=None, metavar='NAME', help='only these modules of timm')
    parser.add_argument('--results', type=pathlib.Path, default=RESULTS, metavar='FILE')
    parser.add_argument('--same-models', action='store_true',
                        help='take the models of --results instead of counting all of timm')
    parser.add_argument('--limit-params', type=int, default=140_000_000, metavar='N')
    parser.add_argument('--limit-s', type=float, default=240, metavar='S', help='time for one model')
    args = parser.parse_args(argv)
    former = {}
    if args.results.exists():
        former = {row['module']: row for row in json.loads(args.results.read_text(encoding='utf-8'))['rows']}
    rows = []
    for module in args.modules or timms_modules():
        if args.same_models and module in former:
            row = {key: former[module][key] for key in ('model', 'kwargs', 'params') if key in former[module]}
            if former[module]['status'] == 'skipped':
                row = former[module]
        else:
            row = smallest(module, args.limit_params)
        row['module'] = module
        if row.get('status') != 'skipped':
            row = run(row, args.limit_s)
        rows.append(row)
        print(module, row['model'], row['status'], row.get('places', ''), row.get('reason', ''), flush=True)
    table = format_table(rows)
    if args.write:
        if args.modules:
            rows = [{**former, **{row['module']: row for row in rows}}[module] for module in timms_modules()
                    if module in former or module in args.modules]
            table = format_table(rows)
        args.results.write_text(
            json.dumps({'timm': timm.__version__, 'torch': torch.__version__, 'rows': rows}, indent=1) + '\n',
            encoding='utf-8')
        text = args.write.read_text(encoding='utf-8')
        args.write.write_text(replace_between(text, BEGIN, END, table), encoding='utf-8')
    else:
        print(table)
    broken = [row['module'] for row in rows
              if row['status'] == 'fails' and former.get(row['module'], {}).get('status') == 'works']
    if broken:
        print(f"worked before: {', '.join(broken)}", file=sys.stderr)
    return int(bool(broken))


if __name__ == '__main__':
    sys.exit(main())
