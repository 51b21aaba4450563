"""Folders of a model as the Hugging Face hub keeps them."""
import json
from pathlib import Path
from typing import Any

from timm.models import save_for_hf
from torch import nn


def save_for_hub(model: nn.Module, folder: str | Path, **kwargs: Any) -> None:
    """Writes `model.safetensors` and `config.json` that `local-dir:`, `hf-hub:` and transformers' wrapper all read.

    timm records every argument of the model, also the number of classes, under `model_args`. transformers passes that
    number itself and refuses to be given it twice: it is kept at the top of the file only, where timm reads it as well.

    Args:
        model: A model made by `timm.create_model`.
        folder: Is made if missing; files of these names in it are replaced.
        **kwargs: `model_config` of `timm.models.save_for_hf`.
    """
    save_for_hf(model, str(folder), safe_serialization=True, **kwargs)
    path = Path(folder) / 'config.json'
    config = json.loads(path.read_text(encoding='utf-8'))
    config.get('model_args', {}).pop('num_classes', None)
    path.write_text(json.dumps(config, indent=2) + '\n', encoding='utf-8')
