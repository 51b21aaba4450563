"""Parser of train.py: timm's flags by the same name, default and meaning. `engine.settings.config` reads `--config`."""
import argparse

from timm.loss import LOSS_TYPES
from timm.utils import ParseKwargs

from .limits import show_limits
from .shared_flags import (
    SupportsAddArgument,
    add_config_arg,
    add_dataset_args,
    add_device_args,
    add_input_args,
    add_loader_args,
    add_model_form_args,
    add_task_args,
    add_version_arg,
    switch,
)


def build_parser() -> argparse.ArgumentParser:
    """A fresh parser with every flag of train.py."""
    parser = argparse.ArgumentParser(prog='train.py', description='Train an image classifier.')
    add_version_arg(parser)
    add_config_arg(parser)
    parser.add_argument('data', nargs='?', metavar='DIR', help='root folder of the data (--data-dir is preferred)')
    _add_data(parser.add_argument_group('data'))
    add_task_args(parser.add_argument_group('labels'))
    _add_bad_sample_args(parser.add_argument_group('damaged data'))
    _add_model(parser.add_argument_group('model'))
    processes = parser.add_argument_group('device and processes')
    _add_device(processes)
    switch(processes, '--fsdp', help='divide parameters, gradients and optimizer state among the processes (FSDP2)')
    _add_optimizer(parser.add_argument_group('optimizer'))
    schedule = parser.add_argument_group('learning rate schedule')
    _add_schedule(schedule)
    _add_schedule_args(schedule)
    augmentation = parser.add_argument_group('augmentation')
    _add_augmentation(augmentation)
    _add_pipeline_args(augmentation)
    loss = parser.add_argument_group('loss and regularisation')
    _add_loss(loss)
    _add_loss_args(loss)
    _add_numerics_args(parser.add_argument_group('numerics'))
    _add_norm_args(parser.add_argument_group('batch norm'))
    _add_ema_args(parser.add_argument_group('weight averaging'))
    logs = parser.add_argument_group('run, checkpoints and logs')
    _add_run(logs)
    _add_tracking_args(logs)
    _add_sized_batch_args(parser.add_argument_group('batches of several image sizes'))
    _add_naflex_args(parser.add_argument_group('NaFlex loader'))
    _add_distillation_args(parser.add_argument_group('knowledge distillation'))
    show_limits(parser)
    return parser


def _add_data(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add_dataset_args(group)
    add('--train-split', metavar='NAME', default='train', help='split to train on (default: train)')
    add('--val-split', metavar='NAME', default='validation',
        help='split to validate on (default: validation); empty for no validation')
    add('--train-num-samples', default=None, type=int, metavar='N', help='size of the training split, if streamed')
    add('--val-num-samples', default=None, type=int, metavar='N', help='size of the validation split, if streamed')
    add('--epoch-repeats', type=float, default=0., metavar='N', help='passes over a streamed set per epoch')
    add('-b', '--batch-size', type=int, default=128, metavar='N', help='images per batch and process (default: 128)')
    add('-vb', '--validation-batch-size', type=int, default=None, metavar='N',
        help='images per validation batch (default: --batch-size)')
    add_loader_args(group)
    switch(group, '--use-multi-epochs-loader', help='keep one iterator alive over all epochs')
    add('--worker-seeding', type=str, default='all', help="random generators seeded in workers: 'all' or 'part'")


def _add_model(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add('--model', default='resnet50', type=str, metavar='MODEL',
        help='registered name, local-dir:FOLDER or hf-hub:OWNER/NAME (default: resnet50)')
    switch(group, '--pretrained', help="start from the model's pretrained weights")
    add('--pretrained-path', default=None, type=str,
        help='weights to start from in place of the published ones, adapted to classes and channels')
    add('--initial-checkpoint', default='', type=str, metavar='PATH', help='weights to start from; must fit exactly')
    add_input_args(group)
    add_model_form_args(group)
    codegen = group.add_mutually_exclusive_group()
    switch(codegen, '--torchscript', dest='torchscript', help='script the model with torch.jit')
    codegen.add_argument(
        '--torchcompile', nargs='?', type=str, default=None, const='inductor', metavar='BACKEND',
        help='compile the model with torch.compile (backend inductor if none is named)')
    switch(group, '--grad-checkpointing', help='recompute activations in the backward pass to save memory')
    add('--head-init-scale', default=None, type=float, help='factor on the initial classifier weights')
    add('--head-init-bias', default=None, type=float, help='initial bias of the classifier')
    add('--drop', type=float, default=0.0, metavar='PCT', help='dropout rate before the classifier')
    add('--drop-connect', type=float, default=None, metavar='PCT', help='former name of --drop-path')
    add('--drop-path', type=float, default=None, metavar='PCT', help='stochastic depth rate')
    add('--drop-block', type=float, default=None, metavar='PCT', help='DropBlock rate')


def _add_device(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add_device_args(group)
    switch(group, '--no-ddp-bb', help='do not broadcast buffers in DDP')
    switch(group, '--synchronize-step', help='wait for the device after each update')
    add('--local_rank', default=0, type=int, help='accepted for old launchers; the environment decides')
    add('--device-modules', default=None, type=str, nargs='+', help='Python modules to import first (device backends)')


def _add_optimizer(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add('--opt', default='sgd', type=str, metavar='OPTIMIZER', help='optimizer, by its name in timm (default: sgd)')
    add('--opt-eps', default=None, type=float, metavar='EPSILON', help="epsilon (the optimizer's own if left out)")
    add('--opt-betas', default=None, type=float, nargs='+', metavar='BETA', help='betas of Adam-like optimizers')
    add('--momentum', type=float, default=0.9, metavar='M', help='momentum (default: 0.9)')
    add('--weight-decay', type=float, default=2e-5, help='weight decay (default: 2e-5); none on biases and norms')
    add('--clip-grad', type=float, default=None, metavar='NORM', help='limit of the gradient (no clipping if left out)')
    add('--clip-mode', type=str, default='norm', help='how to clip: norm, value or agc (default: norm)')
    add('--layer-decay', type=float, default=None, help='factor on the learning rate per layer below the head')
    add('--layer-decay-min-scale', type=float, default=0, help='floor of that factor')
    add('--layer-decay-no-opt-scale', type=float, default=None, help='freeze layers whose factor falls below this')
    add('--opt-kwargs', nargs='*', default={}, action=ParseKwargs, metavar='KEY=VALUE',
        help='further arguments of the optimizer')
    add('--grad-accum-steps', type=int, default=1, metavar='N', help='batches per optimizer step (default: 1)')


def _add_schedule(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add('--sched', type=str, default='cosine', metavar='SCHEDULER',
        help='cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, plateau or none (default: cosine)')
    switch(group, '--sched-on-updates', help='step the schedule per update instead of per epoch')
    add('--lr', type=float, default=None, metavar='LR', help='learning rate; left out, it follows from --lr-base')
    add('--lr-base', type=float, default=0.1, metavar='LR', help='learning rate at --lr-base-size (default: 0.1)')
    add('--lr-base-size', type=int, default=256, metavar='DIV', help='global batch that --lr-base is for')
    add('--lr-base-scale', type=str, default='', metavar='SCALE',
        help='linear or sqrt in the global batch; left out: sqrt for ada* and lamb, linear for the rest')
    add('--lr-noise', type=float, nargs='+', default=None, metavar='pct, pct',
        help='fractions of the schedule between which the rate is perturbed')
    add('--lr-noise-pct', type=float, default=0.67, metavar='PERCENT', help='bound of the perturbation')
    add('--lr-noise-std', type=float, default=1.0, metavar='STDDEV', help='standard deviation of the perturbation')
    add('--lr-cycle-mul', type=float, default=1.0, metavar='MULT', help='growth of the cycle length')
    add('--lr-cycle-decay', type=float, default=0.5, metavar='MULT', help='factor on the rate per cycle')
    add('--lr-cycle-limit', type=int, default=1, metavar='N', help='number of cycles')
    add('--lr-k-decay', type=float, default=1.0, help='k of k-decay (cosine and poly)')
    add('--warmup-lr', type=float, default=1e-5, metavar='LR', help='rate at the start of the warm-up')
    add('--min-lr', type=float, default=0, metavar='LR', help='floor of the schedule')
    add('--epochs', type=int, default=300, metavar='N', help='epochs to train (default: 300)')
    add('--start-epoch', default=None, type=int, metavar='N', help='first epoch, whatever the checkpoint says')
    add('--stop-epoch', default=None, type=int, metavar='N',
        help='stop once N epochs are done; the schedule stays that of --epochs, to which a resumed run goes on')
    add('--decay-milestones', default=[90, 180, 270], type=int, nargs='+', metavar='MILESTONES',
        help='epochs at which multistep lowers the rate, increasing')
    add('--decay-epochs', type=float, default=None, metavar='N',
        help='epochs between the steps of step (90 if left out), or of the decay of wsd and rsqrt, below 1 a share of '
             'the schedule (0.2 if left out)')
    add('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of linear warm-up (default: 5)')
    switch(group, '--warmup-prefix', help='run the warm-up before the schedule instead of inside it')
    add('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at the floor after the schedule')
    add('--patience-epochs', type=int, default=10, metavar='N', help='epochs without gain before plateau acts')
    add('--decay-rate', '--dr', type=float, default=0.1, metavar='RATE', help='factor of each decay')


def _add_augmentation(group: SupportsAddArgument) -> None:
    add = group.add_argument
    switch(group, '--no-aug', help='train on plain resized crops, whatever the other flags say')
    add('--train-crop-mode', type=str, default=None, help='rrc, rkrc or rkrr (default: rrc)')
    add('--scale', type=float, nargs='+', default=[0.08, 1.0], metavar='PCT', help='area of the random crop')
    add('--ratio', type=float, nargs='+', default=[3. / 4., 4. / 3.], metavar='RATIO', help='aspect of the random crop')
    add('--hflip', type=float, default=0.5, help='probability of a horizontal flip')
    add('--vflip', type=float, default=0., help='probability of a vertical flip')
    add('--color-jitter', type=float, default=0.4, metavar='PCT', help='strength of colour jitter')
    add('--color-jitter-prob', type=float, default=None, metavar='PCT', help='probability of colour jitter')
    add('--grayscale-prob', type=float, default=None, metavar='PCT', help='probability of dropping colour')
    add('--gaussian-blur-prob', type=float, default=None, metavar='PCT', help='probability of a blur')
    add('--aa', type=str, default=None, metavar='NAME', help='AutoAugment, RandAugment or AugMix policy of timm')
    add('--aug-repeats', type=float, default=0, help='repeated augmentation, copies per image (several processes only)')
    add('--aug-splits', type=int, default=0, help='differently augmented copies per batch: 0, or 2 and more')
    add('--reprob', type=float, default=0., metavar='PCT', help='probability of random erasing')
    add('--remode', type=str, default='pixel', help='fill of the erased part: const, rand or pixel')
    add('--recount', type=int, default=1, help='erased parts per image at most')
    switch(group, '--resplit', help='erase nothing in the first augmentation split')
    add('--mixup', type=float, default=0.0, help='alpha of mixup (0: off)')
    add('--cutmix', type=float, default=0.0, help='alpha of CutMix (0: off)')
    add('--cutmix-minmax', type=float, nargs='+', default=None, help='smallest and largest side of the CutMix box')
    add('--mixup-prob', type=float, default=1.0, help='probability that a batch is mixed')
    add('--mixup-switch-prob', type=float, default=0.5, help='probability of CutMix where both are on')
    add('--mixup-mode', type=str, default='batch', help='one draw per batch, pair or elem')
    add('--mixup-off-epoch', default=0, type=int, metavar='N', help='epoch from which nothing is mixed (0: never)')
    add('--train-interpolation', type=str, default='random', help='random, bilinear or bicubic')
    add('--tta', type=int, default=0, metavar='N',
        help="views of each validation image whose logits are averaged: 0 or 1 the image alone, 2 also its mirror "
             "image (N is not timm's number of adjacent samples)")


def _add_loss(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add('--smoothing', type=float, default=0.1, help='label smoothing (default: 0.1)')
    switch(group, '--jsd-loss', help='cross-entropy plus Jensen-Shannon divergence over --aug-splits')
    switch(group, '--bce-loss', help='binary cross-entropy on each class')
    switch(group, '--bce-sum', help='sum binary cross-entropy over classes instead of averaging')
    add('--bce-target-thresh', type=float, default=None, help='make soft targets above this 1 and the rest 0')
    add('--bce-pos-weight', type=float, default=None, help='weight of positive targets')


def _add_run(group: SupportsAddArgument) -> None:
    add = group.add_argument
    add('--seed', type=int, default=42, metavar='S', help='random seed (default: 42)')
    add('--output', default='', type=str, metavar='PATH', help='folder of runs (default: output/train)')
    add('--experiment', default='', type=str, metavar='NAME', help='name of this run (default: time, model and size)')
    add('--resume', default='', type=str, metavar='PATH',
        help="checkpoint to continue from; 'auto' takes the newest good one of --experiment, or starts a new run")
    switch(group, '--no-resume-opt', help='resume the weights only, not optimizer, scaler and schedule state')
    add('--log-interval', type=int, default=50, metavar='N', help='updates between log lines (default: 50)')
    add('--val-interval', type=int, default=1, metavar='N', help='epochs between validations and checkpoints')
    add('--recovery-interval', type=int, default=0, metavar='N',
        help='updates between checkpoints inside an epoch (0: none)')
    add('--checkpoint-hist', type=int, default=10, metavar='N', help='checkpoints to keep, best first (default: 10)')
    add('--save-epochs', default=[], type=int, nargs='+', metavar='N',
        help='numbers of epochs after which the checkpoint is kept as milestone-N, whatever its rank')
    add('--eval-metric', default='top1', type=str, metavar='EVAL_METRIC',
        help='top1, top5 or loss (default: top1); of multi_label map, micro_f1 or any other figure of summary.csv '
             '(default: map, for which top1 stands there)')
    switch(group, '--save-images', help='save a training batch as a picture at each log line')
    switch(group, '--log-wandb', help='log to Weights & Biases')
    add('--wandb-project', default=None, type=str, help='its project')
    add('--wandb-tags', default=[], type=str, nargs='+', help='its tags')
    add('--wandb-resume-id', default='', type=str, metavar='ID', help='its run to continue')


def _add_pipeline_args(group: SupportsAddArgument) -> None:
    """A pipeline of albumentations in place of timm's training transforms."""
    group.add_argument(
        '--aug-config', default='', type=str, metavar='NAME|FILE',
        help='augment with albumentations instead: a preset (cifar, imagenet, light, strong) or a .yaml or .json file, '
             'see docs/augmentation.md')


def _add_numerics_args(group: SupportsAddArgument) -> None:
    """What to do about losses and gradients that are NaN or infinite, and about last bits."""
    add = group.add_argument
    add('--nonfinite', default='raise', choices=['raise', 'skip'],
        help='stop at a loss or gradient that is not finite, or skip the update (default: raise)')
    add('--max-skipped', type=int, default=10, metavar='N',
        help='updates that --nonfinite skip may leave out before the run stops (default: 10)')
    switch(group, '--deterministic',
           help='kernels that give the same last bits each time; slower on CUDA, and an error where there is none')


def _add_bad_sample_args(group: SupportsAddArgument) -> None:
    """What to do about images that cannot be decoded."""
    group.add_argument(
        '--max-bad-samples', type=float, default=0.001, metavar='N',
        help='unreadable training images to replace and list, and validation images to leave out, before the run '
             'stops: a number, or below 1 a share of the split, rounded up (default: 0.001)')


def _add_loss_args(group: SupportsAddArgument) -> None:
    """Kind of loss, and weights of classes."""
    add = group.add_argument
    add('--loss-type', '--loss', type=str, default=None, choices=LOSS_TYPES,
        help='cross-entropy, binary cross-entropy, asymmetric loss, Poly-1, Jensen-Shannon divergence; of multi_label '
             'also two-way loss, ZLPR and distribution-balanced loss (default: what --bce-loss and --jsd-loss say, '
             'else ce, or bce for multi_label)')
    add('--class-weights', type=str, default=None, metavar='FILE',
        help="weights of the classes in ce and bce: a file of numbers (text, or a JSON list), 'balanced' for the "
             "inverse frequency in the training split, or 'effective_num' for the effective number of samples; of "
             "multi_label also in asl, and 'neg_pos' for negatives over positives as the weight of positive targets")


def _add_schedule_args(group: SupportsAddArgument) -> None:
    """Decay of the wsd and rsqrt schedules."""
    add = group.add_argument
    add('--lr-decay-fn', type=str, default=None, metavar='NAME',
        help='decay of wsd and rsqrt: linear, cosine, 1-sqrt and others of timm (1-sqrt for wsd, linear for rsqrt)')
    add('--lr-stable-timescale', type=float, default=None, metavar='N',
        help='time scale of rsqrt in epochs (the warm-up if left out)')


def _add_tracking_args(group: SupportsAddArgument) -> None:
    """Where curves go, besides the CSV files of the run folder."""
    switch(group, '--no-tensorboard', help='write no event files; they are written if TensorBoard is installed')
    switch(group, '--log-mlflow', help='log to MLflow, at MLFLOW_TRACKING_URI in MLFLOW_EXPERIMENT_NAME')


def _add_norm_args(group: SupportsAddArgument) -> None:
    """Batch norm and its statistics over processes."""
    add = group.add_argument
    add('--bn-momentum', type=float, default=None, help='momentum of running statistics')
    add('--bn-eps', type=float, default=None, help='epsilon')
    switch(group, '--sync-bn', help='statistics over all processes in each forward pass')
    add('--dist-bn', type=str, default='reduce', help="running statistics after each epoch: reduce, broadcast or ''")
    switch(group, '--split-bn', help='separate statistics for each augmentation split')


def _add_ema_args(group: SupportsAddArgument) -> None:
    """Exponential moving average of the weights."""
    switch(group, '--model-ema', help='keep a moving average of the weights, and validate it')
    switch(group, '--model-ema-force-cpu', help='keep the average on the CPU; it is then not validated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay per update (default: 0.9998)')
    switch(group, '--model-ema-warmup', help='start with a smaller decay')


def _add_sized_batch_args(group: SupportsAddArgument) -> None:
    """Batches that differ in image size."""
    add = group.add_argument
    add('--train-img-sizes', type=int, nargs='+', default=None, help='sides of square images, one drawn per batch')
    add('--train-batch-sizes', type=int, nargs='+', default=None, help='batch for each of them (--batch-size for all)')
    add('--train-size-probs', type=float, nargs='+', default=None, help='weights of the draw (equal if left out)')
    add('--train-size-schedule', type=str, default='constant', choices=('constant', 'progressive'),
        help='progressive: from the first size to the last over the epochs')
    add('--train-size-schedule-spread', type=float, default=0.65, help='width of the progressive draw, in sizes')
    add('--train-size-random-mix', type=float, default=0.1, help='share of uniform draws in the progressive schedule')
    add('--train-batches-per-epoch', '--train-steps-per-epoch', type=int, default=None,
        help='batches per epoch, before accumulation (from the data if left out)')
    add('--variable-batch-loss-scale', default='none', type=str, choices=('none', 'sqrt', 'linear'),
        help='scale the loss of a batch by its size over the average size')


def _add_naflex_args(group: SupportsAddArgument) -> None:
    """Sequences of patches at native aspect ratio."""
    add = group.add_argument
    switch(group, '--naflex-loader', help='use the NaFlex loader')
    add('--naflex-train-seq-lens', type=int, nargs='+', default=[128, 256, 576, 784, 1024],
        help='sequence lengths to train with')
    add('--naflex-max-seq-len', type=int, default=576, help='sequence length in validation')
    add('--naflex-patch-sizes', type=int, nargs='+', default=None, help='patch sizes to draw from')
    add('--naflex-patch-size-probs', type=float, nargs='+', default=None, help='their probabilities')
    add('--naflex-loss-scale', default='linear', type=str, choices=('none', 'sqrt', 'linear'),
        help='scale the loss by batch size')
    switch(group, '--naflex-patchify-channels-first', help='flatten patches with channels first')


def _add_distillation_args(group: SupportsAddArgument) -> None:
    """A pretrained teacher."""
    add = group.add_argument
    add('--kd-model-name', default=None, type=str, help='teacher model; none without it')
    add('--kd-distill-type', default='logit', type=str, choices=['logit', 'feature', 'token'],
        help='learn from logits, from pooled features, or by a distillation token')
    add('--kd-loss-type', default='kl', type=str, help='loss on logits: kl')
    add('--distill-loss-weight', default=None, type=float, help='weight of the distillation loss (1 if left out)')
    add('--task-loss-weight', default=None, type=float,
        help='weight w of the classification loss (1 if left out); alone, distillation weighs 1 - w')
    add('--kd-temperature', default=4.0, type=float, help='temperature of the softmax (default: 4)')
    add('--kd-student-feature-dim', default=None, type=int, help='width of student features (from the model)')
    add('--kd-teacher-feature-dim', default=None, type=int, help='width of teacher features (from the model)')
    add('--kd-token-distill-type', default='soft', type=str, choices=['soft', 'hard'],
        help='token distillation by KL divergence or by the class the teacher names')
