"""Settings that training and validation share; fields have the names and defaults of the flags."""
import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of all settings. Frozen: what a run finds out, such as its device, lives in the objects that own it."""

    def as_dict(self) -> dict[str, Any]:
        """The settings by their names."""
        return {each.name: getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True, kw_only=True)
class DeviceSettings(Settings):
    """Device, arithmetic and code generation."""

    device: str = 'cuda'
    amp: bool = False
    amp_dtype: str = 'float16'
    model_dtype: str | None = None
    fuser: str = ''
    fast_norm: bool = False
    device_modules: tuple[str, ...] | None = None
    deterministic: bool = False


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model, and what it is fed with; None stands for the model's own value."""

    model: str = 'resnet50'
    pretrained: bool = False
    num_classes: int | None = None
    gp: str | None = None
    in_chans: int | None = None
    img_size: int | None = None
    input_size: tuple[int, ...] | None = None
    crop_pct: float | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    interpolation: str = ''
    channels_last: bool = False
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    torchscript: bool = False
    torchcompile: str | None = None
    torchcompile_mode: str | None = None


@dataclass(frozen=True, kw_only=True)
class NaflexSettings(Settings):
    """Sequences of patches at native aspect ratio."""

    naflex_loader: bool = False
    naflex_train_seq_lens: tuple[int, ...] = (128, 256, 576, 784, 1024)
    naflex_max_seq_len: int = 576
    naflex_patch_sizes: tuple[int, ...] | None = None
    naflex_patch_size_probs: tuple[float, ...] | None = None
    naflex_loss_scale: str = 'linear'
    naflex_patchify_channels_first: bool = False


@dataclass(frozen=True, kw_only=True)
class DataSettings(NaflexSettings):
    """Where the images and their labels come from, and how batches of them are loaded."""

    data: str | None = None
    data_dir: str | None = None
    dataset: str = ''
    dataset_download: bool = False
    class_map: str | Mapping[str, int] = ''
    input_img_mode: str | None = None
    input_key: str | None = None
    target_key: str | None = None
    dataset_trust_remote_code: bool = False
    task: str = 'classification'
    label_file: str = ''
    target_format: str | None = None
    threshold: float = 0.5
    max_bad_samples: float = 0.001
    epoch_repeats: float = 0.0
    batch_size: int = 128
    workers: int = 4
    pin_mem: bool = False
    no_prefetcher: bool = False
    seed: int = 42

    @property
    def multi_label(self) -> bool:
        """Whether an image may have any number of labels."""
        return self.task == 'multi_label'


def settings_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings that a checkpoint was trained with, by their names; empty where it holds none."""
    args = content.get('args')
    if isinstance(args, argparse.Namespace):  # timm's own checkpoints
        return vars(args)
    return args if isinstance(args, Mapping) else {}
