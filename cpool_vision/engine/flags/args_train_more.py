"""Further groups of train.py's parser: norm layers, weight averaging, special loaders, distillation."""
from .args_common import SupportsAddArgument, switch


def add_norm_args(group: SupportsAddArgument) -> None:
    """Batch norm and its statistics over processes."""
    add = group.add_argument
    add('--bn-momentum', type=float, default=None, help='momentum of running statistics')
    add('--bn-eps', type=float, default=None, help='epsilon')
    switch(group, '--sync-bn', help='statistics over all processes in each forward pass')
    add('--dist-bn', type=str, default='reduce', help="running statistics after each epoch: reduce, broadcast or ''")
    switch(group, '--split-bn', help='separate statistics for each augmentation split')


def add_ema_args(group: SupportsAddArgument) -> None:
    """Exponential moving average of the weights."""
    switch(group, '--model-ema', help='keep a moving average of the weights, and validate it')
    switch(group, '--model-ema-force-cpu', help='keep the average on the CPU; it is then not validated')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, help='decay per update (default: 0.9998)')
    switch(group, '--model-ema-warmup', help='start with a smaller decay')


def add_sized_batch_args(group: SupportsAddArgument) -> None:
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


def add_naflex_args(group: SupportsAddArgument) -> None:
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


def add_distillation_args(group: SupportsAddArgument) -> None:
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
