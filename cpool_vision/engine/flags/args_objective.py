"""Flags of loss and schedule that timm's library serves and its train.py does not have."""
from timm.loss import LOSS_TYPES

from .args_common import SupportsAddArgument


def add_loss_args(group: SupportsAddArgument) -> None:
    """Kind of loss, and weights of classes."""
    add = group.add_argument
    add('--loss-type', type=str, default=None, choices=LOSS_TYPES,
        help='cross-entropy, binary cross-entropy, asymmetric loss, Poly-1, Jensen-Shannon divergence; of multi_label '
             'also two-way loss, ZLPR and distribution-balanced loss (default: what --bce-loss and --jsd-loss say, '
             'else ce, or bce for multi_label)')
    add('--class-weights', type=str, default=None, metavar='FILE',
        help="weights of the classes in ce and bce: a file of numbers (text, or a JSON list), 'balanced' for the "
             "inverse frequency in the training split, or 'effective_num' for the effective number of samples; of "
             "multi_label also in asl, and 'neg_pos' for negatives over positives as the weight of positive targets")


def add_schedule_args(group: SupportsAddArgument) -> None:
    """Decay of the wsd and rsqrt schedules."""
    add = group.add_argument
    add('--lr-decay-fn', type=str, default=None, metavar='NAME',
        help='decay of wsd and rsqrt: linear, cosine, 1-sqrt and others of timm (1-sqrt for wsd, linear for rsqrt)')
    add('--lr-stable-timescale', type=float, default=None, metavar='N',
        help='time scale of rsqrt in epochs (the warm-up if left out)')
