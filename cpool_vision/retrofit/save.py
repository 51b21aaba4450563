"""Writes a retrofitted model as a folder that `timm.create_model('local-dir:FOLDER')` reads."""
import json
import os
import shutil
import tempfile
from typing import Any

from timm.models import save_for_hf

from .add import ARCHITECTURE, context_pools

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
_MODEL_FILES = (CONFIG, WEIGHTS, 'pytorch_model.bin')


def save_model(model: Any, folder: str, force: bool = False, **kwargs: Any) -> None:
    """Writes `config.json` and `model.safetensors` of a model with context pools.

    `timm.create_model('local-dir:FOLDER', pretrained=True)` reads them after `import cpool_vision`. Both files are
    written elsewhere first: a failure leaves the folder as it was. The number of classes stands at the top of the
    configuration only, as transformers' `TimmWrapper` demands.

    Args:
        model: A timm model after `add_context_pool`.
        folder: Made if need be; other files in it stay.
        force: Replace a model that the folder holds.
        **kwargs: `data_config`, `model_config` of `timm.models.save_for_hf`.

    Raises:
        FileExistsError: The folder holds a model, or is a file.
        ValueError: The model was not made by timm, or holds no pools of `add_context_pool`.
    """
    folder = os.path.abspath(folder)
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    if cfg.get('architecture') != ARCHITECTURE or not context_pools(model):
        raise ValueError(f'{type(model).__name__} is no model of timm with pools of add_context_pool: save its '
                         'state_dict, or use timm.models.save_for_hf')
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f'{folder!r} is a file: name a folder')
    if not force:
        for name in _MODEL_FILES:
            if os.path.exists(os.path.join(folder, name)):
                raise FileExistsError(f'{folder!r} holds a model already ({name}): name another folder or force it')
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f'.{os.path.basename(folder)}.', dir=os.path.dirname(folder))
    try:
        save_for_hf(model, temporary, safe_serialization=True, **kwargs)
        path = os.path.join(temporary, CONFIG)
        with open(path, encoding='utf-8') as file:
            config = json.load(file)
        config['model_args'].pop('num_classes', None)
        with open(path, 'w', encoding='utf-8') as file:
            json.dump(config, file, indent=2)
            file.write('\n')
        os.makedirs(folder, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
