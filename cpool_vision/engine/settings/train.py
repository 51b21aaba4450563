"""Settings of train.py: timm's flags with the same names, defaults and meanings, and our own."""
import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.loss import LOSS_TYPES

from . import flags
from .flags import Settings, flag
from .shared import BatchSettings, DataSettings, DeviceSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class AugmentSettings(Settings):
    """Augmentation of training images."""

    title = 'augmentation'
    no_aug: bool = flag(False, 'train on plain resized crops, ignoring other augmentation flags')
    train_crop_mode: str | None = flag(None, 'rrc, rkrc or rkrr (default: rrc)')
    scale: tuple[float, ...] = flag((0.08, 1.0), "range of the random crop's area", metavar='PCT')
    ratio: tuple[float, ...] = flag((0.75, 1.3333333333333333), 'range of aspect ratios of the random crop',
                                      metavar='RATIO')
    hflip: float = flag(0.5, 'probability of a horizontal flip')
    vflip: float = flag(0.0, 'probability of a vertical flip')
    color_jitter: float = flag(0.4, 'strength of color jitter', metavar='PCT')
    color_jitter_prob: float | None = flag(None, 'probability of color jitter', metavar='PCT')
    grayscale_prob: float | None = flag(None, 'probability of grayscale conversion', metavar='PCT')
    gaussian_blur_prob: float | None = flag(None, 'probability of a blur', metavar='PCT')
    aa: str | None = flag(None, "timm's AutoAugment, RandAugment or AugMix policy", metavar='NAME')
    aug_repeats: float = flag(0, 'repeated augmentation: copies of each image (several processes only)')
    aug_splits: int = flag(0, 'augmentation splits of a batch: 0, or at least 2')
    reprob: float = flag(0.0, 'probability of random erasing', metavar='PCT')
    remode: str = flag('pixel', 'fill of the erased region: const, rand or pixel')
    recount: int = flag(1, 'maximum number of erased regions per image')
    resplit: bool = flag(False, 'do not erase in the first augmentation split')
    mixup: float = flag(0.0, 'alpha of mixup (0: off)')
    cutmix: float = flag(0.0, 'alpha of CutMix (0: off)')
    cutmix_minmax: tuple[float, ...] | None = flag(None, 'smallest and largest side of the CutMix box')
    mixup_prob: float = flag(1.0, 'probability that a batch is mixed')
    mixup_switch_prob: float = flag(0.5, 'probability of CutMix instead of mixup if both are enabled')
    mixup_mode: str = flag('batch', 'draw the mixing ratio per batch, pair or elem')
    mixup_off_epoch: int = flag(0, 'epoch at which mixing is turned off (0: never)', metavar='N')
    train_interpolation: str = flag('random', 'random, bilinear or bicubic')
    aug_config: str = flag('',
        'augment with albumentations instead: a preset (cifar, imagenet, light, strong) or a .yaml or .json file, see '
        'docs/augmentation.md', metavar='NAME|FILE')


@dataclass(frozen=True, kw_only=True)
class SizedBatchSettings(Settings):
    """Batches of several image sizes."""

    title = 'batches of several image sizes'
    train_img_sizes: tuple[int, ...] | None = flag(None, 'sides of square images; each batch draws one')
    train_batch_sizes: tuple[int, ...] | None = flag(None, 'batch size of each image size (default: --batch-size)')
    train_size_probs: tuple[float, ...] | None = flag(None, 'probability weights of the sizes (default: equal)')
    train_size_schedule: str = flag(
        'constant', 'progressive: from the first size to the last over the epochs', choices=('constant', 'progressive'))
    train_size_schedule_spread: float = flag(0.65, 'width of the progressive draw, in sizes')
    train_size_random_mix: float = flag(0.1, 'fraction of uniform draws in the progressive schedule')
    train_batches_per_epoch: int | None = flag(
        None, 'batches per epoch, before accumulation (default: by the dataset)', '--train-steps-per-epoch')
    variable_batch_loss_scale: str = flag(
        'none', 'scale the loss of a batch by the ratio of its size to the average '
        'size', choices=('none', 'sqrt', 'linear'))


@dataclass(frozen=True, kw_only=True)
class EpochSettings(Settings):
    """Length of the run."""

    title = 'length of the run'
    epochs: int = flag(300, 'epochs to train (default: 300)', metavar='N')


@dataclass(frozen=True, kw_only=True)
class LoaderSettings(DataSettings, AugmentSettings, SizedBatchSettings, EpochSettings):
    """Settings of the training and validation loaders."""

    title = 'training and validation splits'
    train_split: str = flag('train', 'split to train on (default: train)', metavar='NAME')
    val_split: str = flag(
        'validation', 'split to validate on (default: validation); empty for no validation', metavar='NAME')
    train_num_samples: int | None = flag(None, 'size of the training split if it is streamed', metavar='N')
    val_num_samples: int | None = flag(None, 'size of the validation split if it is streamed', metavar='N')
    validation_batch_size: int | None = flag(
        None, 'images per validation batch (default: --batch-size)', '-vb', metavar='N')
    use_multi_epochs_loader: bool = flag(False, 'keep one iterator alive over all epochs')
    worker_seeding: str = flag('all', "random generators that workers seed: 'all' or 'part'")


@dataclass(frozen=True, kw_only=True)
class NetworkSettings(ModelSettings):
    """Initial weights and regularization of the model."""

    title = 'start and regularization of the model'
    pretrained_path: str | None = flag(
        None, 'file to use instead of the published pretrained weights, adapted to classes and channels')
    initial_checkpoint: str = flag('', 'weights to start from; must fit exactly', metavar='PATH')
    grad_checkpointing: bool = flag(False, 'recompute activations in the backward pass to save memory')
    head_init_scale: float | None = flag(None, 'factor on the initial classifier weights')
    head_init_bias: float | None = flag(None, 'initial bias of the classifier')
    drop: float = flag(0.0, 'dropout rate before the classifier', metavar='PCT')
    drop_connect: float | None = flag(None, 'deprecated name of --drop-path', metavar='PCT')
    drop_path: float | None = flag(None, 'stochastic depth rate', metavar='PCT')
    drop_block: float | None = flag(None, 'DropBlock rate', metavar='PCT')
    bn_momentum: float | None = flag(None, 'batch norm momentum')
    bn_eps: float | None = flag(None, 'batch norm epsilon')
    sync_bn: bool = flag(False, 'synchronize batch norm statistics over all processes in each forward pass')
    dist_bn: str = flag('reduce', "synchronize batch norm statistics after each epoch: reduce, broadcast or '' (off)")
    split_bn: bool = flag(False, 'separate batch norm statistics for each augmentation split')


@dataclass(frozen=True, kw_only=True)
class LossSettings(LoaderSettings):
    """The loss."""

    title = 'loss'
    smoothing: float = flag(0.1, 'label smoothing (default: 0.1)')
    jsd_loss: bool = flag(False, 'cross-entropy plus Jensen-Shannon divergence between --aug-splits')
    bce_loss: bool = flag(False, 'binary cross-entropy for each class')
    bce_sum: bool = flag(False, 'sum binary cross-entropy over classes instead of averaging')
    bce_target_thresh: float | None = flag(None, 'set soft targets above this to 1 and the others to 0')
    bce_pos_weight: float | None = flag(None, 'weight of positive targets')
    loss_type: str | None = flag(None,
        'cross-entropy, binary cross-entropy, asymmetric loss, Poly-1, Jensen-Shannon divergence; with --task '
        'multi_label also two-way loss, ZLPR and distribution-balanced loss (default: by --bce-loss and --jsd-loss, '
        'else ce, or bce for multi_label)', '--loss', choices=LOSS_TYPES)
    class_weights: str | None = flag(None,
        "weights of the classes in ce and bce: a file of numbers (text, or a JSON list), 'balanced' for the inverse "
        "frequency in the training split, or 'effective_num' for the effective number of samples; with --task "
        "multi_label also in asl, and 'neg_pos' weights positive targets by negatives over positives", metavar='FILE')


@dataclass(frozen=True, kw_only=True)
class DistillSettings(Settings):
    """Knowledge distillation from a pretrained teacher."""

    title = 'knowledge distillation'
    kd_model_name: str | None = flag(None, 'name of the teacher model (default: no distillation)')
    kd_distill_type: str = flag('logit', 'distill logits, pooled features, or a distillation token',
        choices=('logit', 'feature', 'token'))
    kd_loss_type: str = flag('kl', 'loss on logits: kl')
    distill_loss_weight: float | None = flag(None, 'weight of the distillation loss (default: 1)')
    task_loss_weight: float | None = flag(
        None, 'weight w of the classification loss (default: 1); if given alone, distillation has weight 1 - w')
    kd_temperature: float = flag(4.0, 'temperature of the softmax (default: 4)')
    kd_student_feature_dim: int | None = flag(None, "width of student features (default: the model's)")
    kd_teacher_feature_dim: int | None = flag(None, "width of teacher features (default: the model's)")
    kd_token_distill_type: str = flag(
        'soft', 'token distillation by KL divergence, or by the class that the teacher predicts',
        choices=('soft', 'hard'))


@dataclass(frozen=True, kw_only=True)
class OptimSettings(BatchSettings, EpochSettings):
    """Optimizer and learning rate schedule."""

    title = 'optimizer and learning rate schedule'
    opt: str = flag('sgd', 'optimizer, by its name in timm (default: sgd)', metavar='OPTIMIZER')
    opt_eps: float | None = flag(None, 'epsilon of the optimizer (default: its own)', metavar='EPSILON')
    opt_betas: tuple[float, ...] | None = flag(None, 'betas of Adam-like optimizers', metavar='BETA')
    momentum: float = flag(0.9, 'momentum (default: 0.9)', metavar='M')
    weight_decay: float = flag(2e-05, 'weight decay (default: 2e-5); none on biases and norms')
    clip_grad: float | None = flag(None, 'gradient clipping value (default: no clipping)', metavar='NORM')
    clip_mode: str = flag('norm', 'how to clip: norm, value or agc (default: norm)')
    layer_decay: float | None = flag(None, 'factor on the learning rate per layer below the head')
    layer_decay_min_scale: float = flag(0, 'minimum factor of --layer-decay')
    layer_decay_no_opt_scale: float | None = flag(None, 'freeze layers whose --layer-decay factor is below this')
    opt_kwargs: Mapping[str, Any] = flag({}, 'more arguments of the optimizer', metavar='KEY=VALUE')
    grad_accum_steps: int = flag(1, 'batches per optimizer step (default: 1)', metavar='N')
    sched: str = flag(
        'cosine', 'cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau or none (default: cosine)',
        metavar='SCHEDULER')
    sched_on_updates: bool = flag(False, 'step the schedule per update instead of per epoch')
    lr: float | None = flag(None, 'learning rate (default: from --lr-base)', metavar='LR')
    lr_base: float = flag(0.1, 'learning rate at --lr-base-size (default: 0.1)', metavar='LR')
    lr_base_size: int = flag(256, 'global batch size to which --lr-base refers', metavar='DIV')
    lr_base_scale: str = flag(
        '', 'scaling with the global batch size: linear or sqrt (default: sqrt for ada* and lamb, else linear)',
        metavar='SCALE')
    lr_noise: tuple[float, ...] | None = flag(
        None, 'range of the schedule, in fractions, in which noise is added to the learning rate', metavar='pct, pct')
    lr_noise_pct: float = flag(0.67, 'limit of the learning rate noise', metavar='PERCENT')
    lr_noise_std: float = flag(1.0, 'standard deviation of the learning rate noise', metavar='STDDEV')
    lr_cycle_mul: float = flag(1.0, 'factor on the length of each next cycle', metavar='MULT')
    lr_cycle_decay: float = flag(0.5, 'factor on the learning rate of each next cycle', metavar='MULT')
    lr_cycle_limit: int = flag(1, 'number of cycles', metavar='N')
    lr_k_decay: float = flag(1.0, 'k of k-decay (cosine and poly)')
    warmup_lr: float = flag(1e-05, 'learning rate at the start of the warm-up', metavar='LR')
    min_lr: float = flag(0, 'lowest learning rate of the schedule', metavar='LR')
    decay_milestones: tuple[int, ...] = flag(
        (90, 180, 270), 'increasing epochs at which multistep lowers the learning rate', metavar='MILESTONES')
    decay_epochs: float | None = flag(None,
        'step: epochs between decays (default: 90); wsd and rsqrt: length of the decay, a fraction of the schedule '
        'if below 1 (default: 0.2)', metavar='N')
    warmup_epochs: int = flag(5, 'epochs of linear warm-up (default: 5)', metavar='N')
    warmup_prefix: bool = flag(False, 'run the warm-up before the schedule instead of inside it')
    cooldown_epochs: int = flag(0, 'epochs at --min-lr after the schedule', metavar='N')
    patience_epochs: int = flag(10, 'epochs without improvement before plateau lowers the learning rate', metavar='N')
    decay_rate: float = flag(0.1, 'factor on the learning rate at each decay', '--dr', metavar='RATE')
    lr_decay_fn: str | None = flag(
        None, 'shape of the decay of wsd and rsqrt: linear, cosine, 1-sqrt, ... (default: 1-sqrt for wsd, linear for '
            'rsqrt)',
        metavar='NAME')
    lr_stable_timescale: float | None = flag(
        None, 'time scale of rsqrt in epochs (default: the warm-up)', metavar='N')


@dataclass(frozen=True, kw_only=True)
class EmaSettings(Settings):
    """Moving average of the weights."""

    title = 'weight averaging'
    model_ema: bool = flag(False, 'keep a moving average of the weights and validate it')
    model_ema_force_cpu: bool = flag(False, 'keep the average on the CPU; it is then not validated')
    model_ema_decay: float = flag(0.9998, 'decay per update (default: 0.9998)')
    model_ema_warmup: bool = flag(False, 'increase the decay gradually from the start of the run')


@dataclass(frozen=True, kw_only=True)
class TrackSettings(Settings):
    """Tracking services."""

    title = 'services that record the run'
    log_wandb: bool = flag(False, 'log to Weights & Biases')
    wandb_project: str | None = flag(None, 'Weights & Biases project')
    wandb_tags: tuple[str, ...] = flag((), 'Weights & Biases tags')
    wandb_resume_id: str = flag('', 'Weights & Biases run to continue', metavar='ID')
    no_tensorboard: bool = flag(False, 'do not write TensorBoard event files (default: written if TensorBoard is '
        'installed)')
    log_mlflow: bool = flag(False, 'log to MLflow at MLFLOW_TRACKING_URI, experiment MLFLOW_EXPERIMENT_NAME')
    resume: str = flag(
        '', "checkpoint to continue from; 'auto' takes the newest intact one of --experiment, or starts a new run",
        metavar='PATH')


@dataclass(frozen=True, kw_only=True)
class RunSettings(TrackSettings):
    """Run folder, checkpoints, intervals and error handling."""

    title = 'run, checkpoints and logs'
    output: str = flag('', 'folder of runs (default: output/train)', metavar='PATH')
    experiment: str = flag('', 'name of this run (default: time, model and size)', metavar='NAME')
    no_resume_opt: bool = flag(False, 'resume only the weights, without optimizer, scaler and schedule state')
    start_epoch: int | None = flag(None, 'first epoch, overriding the checkpoint', metavar='N')
    stop_epoch: int | None = flag(
        None, 'stop after N epochs; the schedule still spans --epochs, and a resumed run continues it',
        metavar='N')
    save_epochs: tuple[int, ...] = flag(
        (), 'numbers of epochs after which to keep the checkpoint as milestone-N', metavar='N')
    log_interval: int = flag(50, 'updates between log lines (default: 50)', metavar='N')
    val_interval: int = flag(1, 'epochs between validations and checkpoints', metavar='N')
    recovery_interval: int = flag(0, 'updates between checkpoints inside an epoch (0: none)', metavar='N')
    checkpoint_hist: int = flag(10, 'checkpoints to keep, best first (default: 10)', metavar='N')
    eval_metric: str = flag('top1',
        'metric that ranks the epochs: top1, top5 or loss (default: top1); with --task multi_label map, micro_f1 or '
        'any other metric of summary.csv (default: map)', metavar='EVAL_METRIC')
    tta: int = flag(0,
        'average the logits of N views of each validation image: 0 or 1 for the image alone, 2 for the image and its '
        'mirror image', metavar='N')
    save_images: bool = flag(False, 'save a training batch as an image at each log line')
    nonfinite: str = flag('raise', 'what to do if the loss or a gradient is not finite: stop, or skip the update '
        '(default: raise)',
        choices=('raise', 'skip'))
    max_skipped: int = flag(
        10, 'maximum number of updates that --nonfinite skip skips before the run stops (default: 10)', metavar='N')
    no_ddp_bb: bool = flag(False, 'do not broadcast buffers in DDP')
    synchronize_step: bool = flag(False, 'wait for the device after each update')
    local_rank: int = flag(0, 'ignored; accepted for old launchers', '--local_rank')
    fsdp: bool = flag(False, 'shard parameters, gradients and optimizer state across the processes (FSDP2)')


@dataclass(frozen=True, kw_only=True)
class TrainSettings(LossSettings, NetworkSettings, OptimSettings, EmaSettings, DistillSettings, DeviceSettings,
                    RunSettings):
    """Every setting of train.py."""


def build_parser() -> argparse.ArgumentParser:
    """Returns a parser with every flag of train.py."""
    return flags.build_parser(TrainSettings, 'train.py', 'Train an image classifier.', config=True)
