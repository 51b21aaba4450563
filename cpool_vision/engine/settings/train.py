"""Settings of train.py as the functions of the engine take them."""
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .shared import DataSettings, DeviceSettings, ModelSettings, Settings


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(Settings):
    """Augmentation of training images."""

    no_aug: bool = False
    train_crop_mode: str | None = None
    scale: tuple[float, ...] = (0.08, 1.0)
    ratio: tuple[float, ...] = (0.75, 1.3333333333333333)
    hflip: float = 0.5
    vflip: float = 0.0
    color_jitter: float = 0.4
    color_jitter_prob: float | None = None
    grayscale_prob: float | None = None
    gaussian_blur_prob: float | None = None
    aa: str | None = None
    aug_repeats: float = 0
    aug_splits: int = 0
    reprob: float = 0.0
    remode: str = 'pixel'
    recount: int = 1
    resplit: bool = False
    mixup: float = 0.0
    cutmix: float = 0.0
    cutmix_minmax: tuple[float, ...] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = 'batch'
    mixup_off_epoch: int = 0
    train_interpolation: str = 'random'
    aug_config: str = ''


@dataclass(frozen=True, kw_only=True)
class SizedBatchSettings(Settings):
    """Batches that differ in image size."""

    train_img_sizes: tuple[int, ...] | None = None
    train_batch_sizes: tuple[int, ...] | None = None
    train_size_probs: tuple[float, ...] | None = None
    train_size_schedule: str = 'constant'
    train_size_schedule_spread: float = 0.65
    train_size_random_mix: float = 0.1
    train_batches_per_epoch: int | None = None
    variable_batch_loss_scale: str = 'none'


@dataclass(frozen=True, kw_only=True)
class LoaderSettings(DataSettings, AugmentSettings, SizedBatchSettings):
    """What the loaders of a training run are made from."""

    train_split: str = 'train'
    val_split: str = 'validation'
    train_num_samples: int | None = None
    val_num_samples: int | None = None
    validation_batch_size: int | None = None
    use_multi_epochs_loader: bool = False
    worker_seeding: str = 'all'
    epochs: int = 300


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(ModelSettings):
    """How the model begins, and what regularises it."""

    pretrained_path: str | None = None
    initial_checkpoint: str = ''
    grad_checkpointing: bool = False
    head_init_scale: float | None = None
    head_init_bias: float | None = None
    drop: float = 0.0
    drop_connect: float | None = None
    drop_path: float | None = None
    drop_block: float | None = None
    bn_momentum: float | None = None
    bn_eps: float | None = None
    sync_bn: bool = False
    dist_bn: str = 'reduce'
    split_bn: bool = False


@dataclass(frozen=True, kw_only=True)
class LossSettings(LoaderSettings):
    """What is minimised; class weights are counted in the data."""

    smoothing: float = 0.1
    jsd_loss: bool = False
    bce_loss: bool = False
    bce_sum: bool = False
    bce_target_thresh: float | None = None
    bce_pos_weight: float | None = None
    loss_type: str | None = None
    class_weights: str | None = None


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """A pretrained teacher."""

    kd_model_name: str | None = None
    kd_distill_type: str = 'logit'
    kd_loss_type: str = 'kl'
    distill_loss_weight: float | None = None
    task_loss_weight: float | None = None
    kd_temperature: float = 4.0
    kd_student_feature_dim: int | None = None
    kd_teacher_feature_dim: int | None = None
    kd_token_distill_type: str = 'soft'  # noqa: S105


@dataclass(frozen=True, kw_only=True)
class OptimSettings(Settings):
    """Optimizer and learning rate schedule."""

    opt: str = 'sgd'
    opt_eps: float | None = None
    opt_betas: tuple[float, ...] | None = None
    momentum: float = 0.9
    weight_decay: float = 2e-05
    clip_grad: float | None = None
    clip_mode: str = 'norm'
    layer_decay: float | None = None
    layer_decay_min_scale: float = 0
    layer_decay_no_opt_scale: float | None = None
    opt_kwargs: Mapping[str, Any] = field(default_factory=dict)
    grad_accum_steps: int = 1
    batch_size: int = 128
    sched: str = 'cosine'
    sched_on_updates: bool = False
    lr: float | None = None
    lr_base: float = 0.1
    lr_base_size: int = 256
    lr_base_scale: str = ''
    lr_noise: tuple[float, ...] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    lr_cycle_mul: float = 1.0
    lr_cycle_decay: float = 0.5
    lr_cycle_limit: int = 1
    lr_k_decay: float = 1.0
    warmup_lr: float = 1e-05
    min_lr: float = 0
    epochs: int = 300
    decay_milestones: tuple[int, ...] = (90, 180, 270)
    decay_epochs: float | None = None
    warmup_epochs: int = 5
    warmup_prefix: bool = False
    cooldown_epochs: int = 0
    patience_epochs: int = 10
    decay_rate: float = 0.1
    lr_decay_fn: str | None = None
    lr_stable_timescale: float | None = None
    seed: int = 42


@dataclass(frozen=True, kw_only=True)
class EmaSettings(Settings):
    """Moving average of the weights."""

    model_ema: bool = False
    model_ema_force_cpu: bool = False
    model_ema_decay: float = 0.9998
    model_ema_warmup: bool = False


@dataclass(frozen=True, kw_only=True)
class TrackSettings(Settings):
    """Where a run records its figures."""

    log_wandb: bool = False
    wandb_project: str | None = None
    wandb_tags: tuple[str, ...] = ()
    wandb_resume_id: str = ''
    no_tensorboard: bool = False
    log_mlflow: bool = False
    resume: str = ''


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrackSettings):
    """Folder, checkpoints, intervals and faults of a run."""

    output: str = ''
    experiment: str = ''
    no_resume_opt: bool = False
    start_epoch: int | None = None
    stop_epoch: int | None = None
    save_epochs: tuple[int, ...] = ()
    log_interval: int = 50
    val_interval: int = 1
    recovery_interval: int = 0
    checkpoint_hist: int = 10
    eval_metric: str = 'top1'
    tta: int = 0
    save_images: bool = False
    nonfinite: str = 'raise'
    max_skipped: int = 10
    no_ddp_bb: bool = False
    synchronize_step: bool = False
    local_rank: int = 0
    fsdp: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainSettings(DeviceSettings, NetworkSettings, LossSettings, DistillSettings, OptimSettings, EmaSettings,
                    RunSettings):
    """Every setting of train.py."""
