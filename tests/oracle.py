"""LAMB and LARS in float64 NumPy, written from the formulas: what the optimizers must agree with.

It imports nothing of tf_lamb and shares no structure with it: here a layer is an object that
updates itself, one layer after the other. `MUTANTS` are mistakes that were made elsewhere, each
one line away from the right answer; a comparison that does not reject them proves nothing.
"""

import numpy as np

MUTANTS = (
    "no_ratio",  # plain Adam
    "decay_outside_ratio",  # as in keras.optimizers.Lamb
    "wrong_beta_2",  # 0.99
    "no_bias_correction",
    "clip_per_replica",  # as Keras 3 does it: every replica's gradient before the sum
)


def length(values):
    """The Euclidean norm of one array, or of a list of arrays together."""
    arrays = values if isinstance(values, list) else [values]
    return np.sqrt(sum(np.sum(np.square(np.asarray(a, np.float64))) for a in arrays))


class Layer:
    """One variable: its weights `x` and what is done to it."""

    def __init__(self, x, decayed=True, adapted=True, mutant=None):
        self.x = np.array(x, np.float64)
        self.decayed, self.adapted, self.mutant = decayed, adapted, mutant


class Lamb(Layer):
    """x -= rate * |x| / |u| * u, with u = Adam's direction + decay * x."""

    def __init__(self, x, beta_1=0.9, beta_2=0.999, epsilon=1e-6, weight_decay=0.01, **layer):
        super().__init__(x, **layer)
        self.b1, self.b2, self.epsilon = beta_1, beta_2, epsilon
        self.b2 = 0.99 if self.mutant == "wrong_beta_2" else self.b2
        self.weight_decay = weight_decay if self.decayed else 0.0
        self.m, self.v, self.t = np.zeros_like(self.x), np.zeros_like(self.x), 0

    def descend(self, g, rate):
        self.t += 1
        self.m += (1 - self.b1) * (g - self.m)
        self.v += (1 - self.b2) * (g * g - self.v)
        m, v = self.m / (1 - self.b1**self.t), self.v / (1 - self.b2**self.t)
        if self.mutant == "no_bias_correction":
            m, v = self.m, self.v
        direction = m / (np.sqrt(v) + self.epsilon)
        if self.mutant == "decay_outside_ratio":
            self.x = self.x - rate * self.weight_decay * self.x
        else:
            direction = direction + self.weight_decay * self.x
        ratio = 1.0
        if self.adapted and self.mutant != "no_ratio" and length(self.x) * length(direction) > 0:
            ratio = length(self.x) / length(direction)
        self.x = self.x - rate * ratio * direction


class Lars(Layer):
    """m = mu * m + rate * ratio * (g + decay * x); x -= m, or one momentum step ahead of it."""

    def __init__(
        self,
        x,
        momentum=0.9,
        weight_decay=1e-4,
        trust_coefficient=0.001,
        epsilon=0.0,
        nesterov=False,
        **layer,
    ):
        super().__init__(x, **layer)
        self.mu, self.nesterov = momentum, nesterov
        self.weight_decay = weight_decay if self.decayed else 0.0
        self.kappa, self.epsilon = trust_coefficient, epsilon
        self.m = np.zeros_like(self.x)

    def descend(self, g, rate):
        x_length, g_length = length(self.x), length(g)
        if self.adapted and x_length > 0 and g_length > 0:
            rate = (
                rate * self.kappa * x_length
                / (g_length + self.weight_decay * x_length + self.epsilon)
            )  # fmt: skip
        step = rate * (g + self.weight_decay * self.x)
        self.m = self.mu * self.m + step
        self.x = self.x - (self.mu * self.m + step if self.nesterov else self.m)


def clipped(grads, clipvalue=None, clipnorm=None, global_clipnorm=None):
    """A list of gradients, each element, each array, or all arrays together held to a bound."""
    if clipvalue:
        return [np.minimum(np.maximum(g, -clipvalue), clipvalue) for g in grads]
    if clipnorm:
        return [g / max(1.0, length(g) / clipnorm) for g in grads]
    if global_clipnorm:
        return [g / max(1.0, length(grads) / global_clipnorm) for g in grads]
    return grads


def history(layers, gradients, rates, mutant=None, **clip):
    """Weights before the first step and after each: arrays `[step][layer]`.

    Args:
        layers: list of `Lamb` or `Lars`.
        gradients: arrays `[step][replica][layer]`; they are summed over the replicas.
        rates: the learning rate of each step.
        mutant: `"clip_per_replica"`, or what the layers have been given themselves.
        **clip: at most one of `clipvalue`, `clipnorm`, `global_clipnorm`.
    """
    weights = [[layer.x for layer in layers]]
    for replicas, rate in zip(gradients, rates, strict=True):
        replicas = [[np.asarray(g, np.float64) for g in grads] for grads in replicas]
        if mutant == "clip_per_replica":
            replicas = [clipped(grads, **clip) for grads in replicas]
        grads = [sum(shares) for shares in zip(*replicas, strict=True)]
        if mutant != "clip_per_replica":
            grads = clipped(grads, **clip)
        for layer, g in zip(layers, grads, strict=True):
            layer.descend(g, rate)
        weights.append([layer.x for layer in layers])
    return weights
