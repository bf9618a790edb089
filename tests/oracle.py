"""LAMB and LARS in float64 NumPy, written from the formulas. The optimizers must agree with it.

It imports nothing from tf_lamb and has another structure: a layer is an object that updates itself.
`MUTANTS` are known mistakes, each in a single line. Every comparison with the oracle must reject
them.
"""

import numpy as np

MUTANTS = (
    "no_ratio",  # plain Adam
    "decay_outside_ratio",  # as in keras.optimizers.Lamb
    "wrong_beta_2",  # 0.99
    "no_bias_correction",
    "clip_per_replica",  # before the sum, as in Keras 3
)


def length(values):
    """The Euclidean norm of one array, or of a list of arrays together."""
    arrays = values if isinstance(values, list) else [values]
    return np.sqrt(sum(np.sum(np.square(np.asarray(a, np.float64))) for a in arrays))


def size(values, norm):
    """The norm of one array: "l2", "l1" (sum of magnitudes) or "linf" (largest magnitude)."""
    if norm == "l2":
        return length(values)
    sizes = np.abs(values)
    return np.sum(sizes) if norm == "l1" else np.max(sizes, initial=0.0)


class Layer:
    """One layer: weights `x` that have one trust ratio, and the options of their update.

    A slice of a variable is a `Layer` of its own. Variables that share a ratio are concatenated to
    one layer, and `weight_decay` may then be an array like x. `seen` has |x|, divisor and ratio of
    the last update, as in the telemetry of the optimizers.
    """

    def __init__(
        self, x, decayed=True, adapted=True, norm="l2", trust_ratio_bounds=None, mutant=None
    ):
        self.x = np.array(x, np.float64)
        self.decayed, self.adapted, self.norm, self.mutant = decayed, adapted, norm, mutant
        self.ratio_bounds = trust_ratio_bounds
        self.seen = (0.0, 0.0, 0.0)

    def ratio(self, upper, lower):
        """upper / lower within the bounds; 1 without adaptation, or if one of them is 0."""
        if not self.adapted or upper <= 0 or lower <= 0:
            return 1.0
        low, high = self.ratio_bounds or (0.0, np.inf)
        return min(max(upper / lower, low), high)


class Lamb(Layer):
    """x -= rate * phi(|x|) / |u| * u, with u = Adam's direction + decay * x.

    With `bias_correction="rate"` Adam's correction multiplies the rate, outside of |u|.
    """

    def __init__(
        self,
        x,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-6,
        weight_decay=0.01,
        bias_correction=True,
        nesterov=None,
        weight_norm_bounds=(0.0, np.inf),
        **layer,
    ):
        super().__init__(x, **layer)
        self.b1, self.b2, self.epsilon = beta_1, beta_2, epsilon
        self.b2 = 0.99 if self.mutant == "wrong_beta_2" else self.b2
        self.weight_decay = weight_decay if self.decayed else 0.0
        self.corrected = bias_correction is True and self.mutant != "no_bias_correction"
        self.rate_corrected = bias_correction == "rate"
        self.nesterov, self.bounds = nesterov, weight_norm_bounds
        self.m, self.v, self.t = np.zeros_like(self.x), np.zeros_like(self.x), 0

    def estimate(self, moment, new, beta, ahead):
        """The moment after bias correction.

        With `ahead`, Nadam's estimate of the next step: the old term is corrected for the next
        step, the new one for this step.
        """

        def unbiased(value, steps):
            return value / (1 - beta**steps) if self.corrected else value

        if not ahead:
            return unbiased(moment, self.t)
        return unbiased(beta * moment, self.t + 1) + unbiased((1 - beta) * new, self.t)

    def descend(self, g, rate):
        self.t += 1
        self.m = self.m + (1 - self.b1) * (g - self.m)
        self.v = self.v + (1 - self.b2) * (g * g - self.v)
        m = self.estimate(self.m, g, self.b1, self.nesterov is not None)
        v = self.estimate(self.v, g * g, self.b2, self.nesterov == "both")
        if self.nesterov == "first":
            v = self.b2 * v  # Dozat (2016)
        direction = m / (np.sqrt(v) + self.epsilon)
        if self.mutant == "decay_outside_ratio":
            self.x = self.x - rate * self.weight_decay * self.x
        else:
            direction = direction + self.weight_decay * self.x
        x_size, u_size = size(self.x, self.norm), size(direction, self.norm)
        ratio = self.ratio(min(max(x_size, self.bounds[0]), self.bounds[1]), u_size)
        ratio = 1.0 if self.mutant == "no_ratio" else ratio
        self.seen = (x_size, u_size, ratio)
        if self.rate_corrected:
            rate = rate * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t)
        self.x = self.x - rate * ratio * direction


class Lars(Layer):
    """m = mu * m + rate * ratio * (g + decay * x); x -= m, or with Nesterov momentum.

    This is the form "mlperf". The other forms have other norms, and "paper", "tf-models-scaled" and
    "tf-contrib" multiply m by rate and ratio.
    """

    def __init__(
        self,
        x,
        momentum=0.9,
        weight_decay=1e-4,
        trust_coefficient=0.001,
        epsilon=0.0,
        nesterov=False,
        form="mlperf",
        **layer,
    ):
        super().__init__(x, **layer)
        self.mu, self.nesterov, self.form = momentum, nesterov, form
        self.weight_decay = weight_decay if self.decayed else 0.0
        self.kappa, self.epsilon = trust_coefficient, epsilon
        self.m = np.zeros_like(self.x)

    def move(self, term):
        """Adds the term to the momentum, and returns the step."""
        self.m = self.mu * self.m + term
        return self.mu * self.m + term if self.nesterov else self.m

    def local(self, measured, raw):
        """The trust ratio kappa |x| / |measured|; `raw` adds |decay * x| to the divisor."""
        x_size, below = size(self.x, self.norm), size(measured, self.norm)
        positive = below > 0
        below += self.epsilon
        if raw:
            below += size(self.weight_decay * self.x, self.norm)
        ratio = self.ratio(self.kappa * x_size, below) if positive else 1.0
        self.seen = (x_size, below, ratio)
        return ratio

    def descend(self, g, rate):
        decayed = g + self.weight_decay * self.x
        if self.form == "mlperf":
            step = self.move(rate * self.local(g, raw=True) * decayed)
        elif self.form == "tf-models":
            step = self.move(rate * self.local(decayed, raw=False) * decayed)
        elif self.form == "tf-contrib":
            step = self.move(g)
            step = rate * self.local(g, raw=True) * step
        else:
            step = self.move((1 - self.mu) * decayed if self.form == "paper" else decayed)
            step = rate * self.local(step, raw=False) * step
        self.x = self.x - step


def clipped(grads, clipvalue=None, clipnorm=None, global_clipnorm=None, unit_gradient=False):
    """A list of gradients after clipping: of each element, each array, or the global norm.

    `unit_gradient` scales the gradients to a global norm of 1.
    """
    if unit_gradient:
        return [g / (length(grads) or 1.0) for g in grads]
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
        gradients: arrays `[step][replica][layer]`, which are summed over the replicas.
        rates: the learning rate of each step.
        mutant: only `"clip_per_replica"` has an effect here; the layers have the others.
        **clip: at most one of `clipvalue`, `clipnorm`, `global_clipnorm`, `unit_gradient`.
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
