"""Saves a model as a folder for the Hugging Face Hub."""
import json
import os
import shutil
import tempfile
from typing import Any

import torch
from timm.models import save_for_hf
from torch import nn

CONFIG, WEIGHTS = 'config.json', 'model.safetensors'
_MODEL_FILES = (CONFIG, WEIGHTS, 'pytorch_model.bin')


def _pack(_: nn.Module, state_dict: dict[str, object], *__: object) -> None:
    """Makes tensors contiguous: safetensors rejects other memory formats, such as `channels_last`."""
    state_dict.update({key: value.contiguous() for key, value in state_dict.items() if torch.is_tensor(value)})


def save_for_hub(model: nn.Module, folder: str | os.PathLike[str], force: bool = False, **kwargs: Any) -> None:
    """Writes `model.safetensors` and `config.json` for timm (`local-dir:`, `hf-hub:`) and transformers' timm wrapper.

    timm stores all arguments of the model under `model_args`, including the number of classes. transformers passes that
    number itself and fails if it is given twice, so it is stored at the top level only, where timm reads it too. If
    writing fails, the folder does not change.

    Args:
        model: A model made by `timm.create_model`.
        folder: Folder to write to; created if missing. Other files in it are kept.
        force: Overwrite an existing model in the folder.
        **kwargs: More arguments of `timm.models.save_for_hf`, such as `model_config`.

    Raises:
        FileExistsError: The folder already has a model, or is a file.
    """
    folder = os.path.abspath(folder)
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise FileExistsError(f'{folder!r} is a file: name a folder')
    if not force:
        for name in _MODEL_FILES:
            if os.path.exists(os.path.join(folder, name)):
                raise FileExistsError(
                    f'{folder!r} already has a model ({name}): choose another folder or pass force=True')
    os.makedirs(os.path.dirname(folder), exist_ok=True)
    temporary = tempfile.mkdtemp(prefix=f'.{os.path.basename(folder)}.', dir=os.path.dirname(folder))
    hook = model.register_state_dict_post_hook(_pack)
    try:
        save_for_hf(model, temporary, safe_serialization=True, **kwargs)
        path = os.path.join(temporary, CONFIG)
        with open(path, encoding='utf-8') as file:
            config = json.load(file)
        config.get('model_args', {}).pop('num_classes', None)
        with open(path, 'w', encoding='utf-8') as file:
            json.dump(config, file, indent=2)
            file.write('\n')
        shutil.copymode(path, os.path.join(temporary, WEIGHTS))  # safetensors makes it readable by the owner only
        os.makedirs(folder, exist_ok=True)
        for name in (WEIGHTS, CONFIG):
            os.replace(os.path.join(temporary, name), os.path.join(folder, name))
    finally:
        hook.remove()
        shutil.rmtree(temporary, ignore_errors=True)
