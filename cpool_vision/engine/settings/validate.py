"""Settings of validate.py."""
from dataclasses import dataclass

from .shared import DataSettings, DeviceSettings, ModelSettings


@dataclass(frozen=True, kw_only=True)
class ValidateSettings(DeviceSettings, ModelSettings, DataSettings):
    """Every setting of validate.py."""

    model: str = 'dpn92'
    batch_size: int = 256
    max_bad_samples: float = 0.0
    split: str = 'validation'
    num_samples: int | None = None
    corruptions: str = ''
    checkpoint: str = ''
    use_ema: bool = False
    test_pool: bool = False
    reparam: bool = False
    aot_autograd: bool = False
    use_train_size: bool = False
    tf_preprocessing: bool = False
    crop_mode: str | None = None
    crop_border_pixels: int | None = None
    num_gpu: int = 1
    retry: bool = False
    real_labels: str = ''
    valid_labels: str = ''
    class_subset: str = ''
    tta: int = 0
    metrics_avg: str | None = None
    results_file: str = ''
    results_format: str = 'csv'
    predictions: str = ''
    predictions_topk: int = 0
    plots: str = ''
    measure_cost: bool = False
    log_freq: int = 10
