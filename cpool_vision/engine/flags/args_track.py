"""Flags of the record of a run that timm's train.py does not have."""
from .args_common import SupportsAddArgument, switch


def add_tracking_args(group: SupportsAddArgument) -> None:
    """Where curves go, besides the CSV files of the run folder."""
    switch(group, '--no-tensorboard', help='write no event files; they are written if TensorBoard is installed')
    switch(group, '--log-mlflow', help='log to MLflow, at MLFLOW_TRACKING_URI in MLFLOW_EXPERIMENT_NAME')
