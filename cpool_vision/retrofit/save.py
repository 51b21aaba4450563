"""Saves a retrofitted model as a folder for `timm.create_model('local-dir:FOLDER')`."""
from typing import Any

from torch import nn

from ..hub import save_for_hub
from ..layers import context_pools
from .add import ARCHITECTURE


def save_model(model: nn.Module, folder: str, force: bool = False, **kwargs: Any) -> None:
    """Writes `config.json` and `model.safetensors` of a retrofitted model, like `cpool_vision.hub.save_for_hub`.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` reads them after `import cpool_vision`.

    Args:
        model: A timm model after `add_context_pool`.
        folder: Folder to write to; created if missing. Other files in it are kept.
        force: Overwrite an existing model in the folder.
        **kwargs: More arguments of `timm.models.save_for_hf`, such as `model_config`.

    Raises:
        FileExistsError: The folder already has a model, or is a file.
        ValueError: The model is not a timm model, or has no pools from `add_context_pool`.
    """
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('architecture') != ARCHITECTURE or not context_pools(model):
        raise ValueError(f'{type(model).__name__} is not a timm model with pools from add_context_pool: save its '
                         'state_dict, or use cpool_vision.hub.save_for_hub')
    save_for_hub(model, folder, force, **kwargs)
