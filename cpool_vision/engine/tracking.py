"""Weights & Biases, if asked for."""
import argparse
import os
from collections.abc import Callable
from typing import Any

from .checkpoint import to_plain
from .errors import ConfigError


def import_wandb(args: argparse.Namespace) -> Any:
    """The module of Weights & Biases for `--log-wandb`, None if not asked for.

    Raises:
        ConfigError: it is not installed, or a run to continue is named without `--resume`.
    """
    if not args.log_wandb:
        return None
    if args.wandb_resume_id and not args.resume:
        raise ConfigError('--wandb-resume-id needs --resume: add it, or leave the id out')
    try:
        import wandb
    except ImportError as error:
        raise ConfigError('--log-wandb needs the package wandb: pip install wandb, or drop the flag') from error
    return wandb


def start_wandb(wandb: Any, args: argparse.Namespace, folder: str) -> Callable[[dict[str, Any]], None]:
    """Starts a run named after the run folder, and returns the function that logs a row of the summary."""
    wandb.init(
        project=args.wandb_project,
        name=os.path.basename(folder),
        config=to_plain(vars(args)),
        tags=args.wandb_tags,
        resume='must' if args.wandb_resume_id else None,
        id=args.wandb_resume_id or None,
    )
    return wandb.log
