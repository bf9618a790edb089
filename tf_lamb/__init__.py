"""LARS and LAMB for Keras: layer-wise learning rates for large-batch training.

`tf_lamb.LAMB` and `tf_lamb.LARS` are optimizers for Keras 3. `tf_lamb.tf_keras` contains the same
optimizers for Keras 2 (`tf_keras`).
"""

from tf_lamb.batch_scaling import scale_batch
from tf_lamb.keras3 import LAMB, LARS, Phases, WarmupPolynomialDecay, WarmupStepDecay
from tf_lamb.layers import BERT_EXCLUSIONS, RESNET_EXCLUSIONS
from tf_lamb.migration import migrate
from tf_lamb.telemetry import TelemetryCallback, TelemetryWriter, TrustRatioAlarm, draw_heat_map

__version__ = "0.2.0"

__all__ = [
    "BERT_EXCLUSIONS",
    "LAMB",
    "LARS",
    "Phases",
    "RESNET_EXCLUSIONS",
    "TelemetryCallback",
    "TelemetryWriter",
    "TrustRatioAlarm",
    "WarmupPolynomialDecay",
    "WarmupStepDecay",
    "__version__",
    "draw_heat_map",
    "migrate",
    "scale_batch",
]
