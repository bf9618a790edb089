"""LARS and LAMB for Keras: layer-wise learning rates for large-batch training.

`tf_lamb.LAMB` and `tf_lamb.LARS` are Keras 3 optimizers; `tf_lamb.tf_keras` has the same two for
Keras 2 (`tf_keras`).
"""

from tf_lamb.keras3 import LAMB, LARS, Phases, WarmupPolynomialDecay

__version__ = "0.1.0"

__all__ = ["LAMB", "LARS", "Phases", "WarmupPolynomialDecay", "__version__"]
