"""ResNet v1.5 for classification on tf-models-official, its loss and metrics.

He et al., arXiv:1512.03385, with the stride in the 3x3 convolution ("v1.5", as in tf-models). The
scale of the last batch norm of each block is initialized with zeros (Goyal et al.,
arXiv:1706.02677, section 5.1).
"""

import dataclasses

import tensorflow as tf
import tf_keras
from official.vision.modeling import classification_model
from official.vision.modeling.backbones import resnet

EPSILON = 1e-5  # of batch norm; MLPerf training v0.7, Google, resnet
HEAD_STDDEV = 0.01  # arXiv:1706.02677, section 5.1


@dataclasses.dataclass(frozen=True)
class Size:
    """Number of layers, channels after the stem, and whether the images are small, as CIFAR's.

    With `small_images` the stem is one 3x3 convolution at full resolution, without pooling.
    """

    layers: int
    width: int = 64
    small_images: bool = False


SIZES = {
    "resnet-18": Size(18),
    "resnet-50": Size(50),
    "resnet-50-narrow": Size(50, width=16),
    "cifar-resnet-10": Size(10, width=16, small_images=True),
    "cifar-resnet-18": Size(18, width=16, small_images=True),
}

# (mean, standard deviation) of the channels R, G, B in [0, 255].
NORMALIZATIONS = {
    # tf-models-official 2.20, official/vision/ops/preprocess_ops.py
    "imagenet": ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    # MLPerf training v0.7, Google, resnet: only the mean is subtracted
    "mlperf": ((123.68, 116.78, 103.94), (1.0, 1.0, 1.0)),
    # over the 50,000 training images
    "cifar10": ((125.307, 122.950, 113.865), (62.993, 62.089, 66.705)),
}


class SpaceToDepthConvolution(tf_keras.layers.Conv2D):
    """A 7x7 convolution of stride 2, computed as a 4x4 one of stride 1 on blocks of 2x2 pixels.

    Weights and result are the same. With 12 input channels instead of 3 it uses a TPU's matrix unit
    better (MLPerf training v0.6, Google, resnet). Height and width must be even.
    """

    def call(self, inputs):
        """[B, H, W, 3] -> [B, H/2, W/2, filters]."""
        channels = self.kernel.shape[2]
        kernel = tf.pad(self.kernel, [[0, 1], [0, 1], [0, 0], [0, 0]])
        kernel = tf.reshape(kernel, [4, 2, 4, 2, channels, self.filters])
        kernel = tf.reshape(
            tf.transpose(kernel, [0, 2, 1, 3, 4, 5]), [4, 4, 4 * channels, self.filters]
        )
        # "SAME" pads 1 block before and 2 after. The 7x7 convolution pads 2 and 3 pixels.
        return tf.nn.conv2d(tf.nn.space_to_depth(inputs, 2), kernel, 1, "SAME")


class _ResNet(resnet.ResNet):
    """tf-models' ResNet with another stem."""

    def __init__(self, *, stem, **arguments):
        self._own_stem = stem
        super().__init__(**arguments)

    def _stem(self, inputs):
        if self._own_stem == "7x7":
            return super()._stem(inputs)
        small = self._own_stem == "3x3"
        convolution = tf_keras.layers.Conv2D if small else SpaceToDepthConvolution
        x = convolution(
            int(64 * self._depth_multiplier),
            3 if small else 7,
            strides=1 if small else 2,
            padding="same",
            use_bias=False,
            kernel_initializer=self._kernel_initializer,
        )(inputs)
        x = self._norm(
            momentum=self._norm_momentum,
            epsilon=self._norm_epsilon,
            synchronized=self._use_sync_bn,
        )(x)
        x = tf_keras.layers.ReLU()(x)
        return x if small else tf_keras.layers.MaxPool2D(3, 2, padding="same")(x)


def build_classifier(
    size: Size,
    image_size: int,
    classes: int,
    *,
    normalization: str,
    batch_norm_momentum: float,
    space_to_depth: bool = False,
    sync_batch_norm: bool = False,
) -> tf_keras.Model:
    """An image classifier. Call it in the strategy's scope.

    Args:
        size: from `SIZES`.
        image_size: S, height and width in pixels.
        classes: number of logits, C.
        normalization: a key of `NORMALIZATIONS`, applied in the network, in its compute dtype.
        batch_norm_momentum: weight of the old value in the moving averages.
        space_to_depth: whether the 7x7 stem is computed as `SpaceToDepthConvolution`.
        sync_batch_norm: whether batch norm uses the examples of all replicas.

    Returns:
        A model from [B, S, S, 3] float pixels in [0, 255] to [B, C] logits.
    """
    spec = tf_keras.layers.InputSpec(shape=[None, image_size, image_size, 3])
    stem = "space-to-depth" if space_to_depth else "7x7"
    backbone = _ResNet(
        stem="3x3" if size.small_images else stem,
        model_id=size.layers,
        input_specs=spec,
        depth_multiplier=size.width / 64,
        norm_momentum=batch_norm_momentum,
        norm_epsilon=EPSILON,
        use_sync_bn=sync_batch_norm,
    )
    network = classification_model.ClassificationModel(
        backbone,
        classes,
        spec,
        kernel_initializer=tf_keras.initializers.RandomNormal(stddev=HEAD_STDDEV),
    )
    for block in backbone.layers:
        norms = [getattr(block, f"_norm{i}", None) for i in (3, 2)]
        if any(norms):
            last = next(norm for norm in norms if norm)
            last.gamma.assign(tf.zeros_like(last.gamma))
    pixels = tf_keras.Input([image_size, image_size, 3], name="image")
    mean, deviation = NORMALIZATIONS[normalization]
    normalized = tf_keras.layers.Rescaling(
        [1 / d for d in deviation], [-m / d for m, d in zip(mean, deviation, strict=True)]
    )(pixels)
    return tf_keras.Model(pixels, network(normalized), name="classifier")


def classification_sums(model, batch, training: bool, *, label_smoothing: float):
    """Sums of the loss and of the correct predictions over a batch.

    Args:
        model: from `build_classifier`.
        batch: see `inputs.images.examples.element_spec`. In training each image and label is mixed
            with the one as far from the end of the batch as it is from the beginning, by
            `mixup` (Zhang et al., arXiv:1710.09412).
        training: whether batch norm uses the statistics of the batch.
        label_smoothing: share of the target that is spread over all classes, in training only.

    Returns:
        float32 scalars. `image_loss`: summed cross-entropy in nats. `image_top1`, `image_top5`:
        numbers of images whose class has the largest logit, or one of the five largest.
    """
    images = tf.cast(batch["image"], model.input.dtype)
    weights = batch["example_weights"]
    targets = tf.one_hot(batch["label"], model.output.shape[-1])
    if training:
        own = batch["mixup"]
        images = _mix(images, tf.cast(own, images.dtype)[:, None, None, None])
        targets = _mix(targets, own[:, None])
        targets = targets * (1 - label_smoothing) + label_smoothing / targets.shape[-1]
    logits = tf.cast(model(images, training=training), tf.float32)
    losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
    label = batch["label"][:, None]
    numbers = tf.range(logits.shape[-1], dtype=batch["label"].dtype)
    own_logit = tf.gather(logits, label, axis=1, batch_dims=1)
    # Of equal logits, which are common in bfloat16, the lower class comes first, as in the export's
    # top k. Comparisons with NaN are False, so a NaN logit never counts as a hit.
    behind = (logits < own_logit) | ((logits == own_logit) & (numbers >= label))
    rank = logits.shape[-1] - tf.reduce_sum(tf.cast(behind, tf.int32), axis=1)
    return {
        "image_loss": tf.reduce_sum(losses * weights),
        "image_top1": tf.reduce_sum(tf.cast(rank < 1, tf.float32) * weights),
        "image_top5": tf.reduce_sum(tf.cast(rank < 5, tf.float32) * weights),
    }


def classification_counts(batch):
    """The divisor of `classification_sums`: the number of images."""
    return {"image": tf.reduce_sum(batch["example_weights"])}


def _mix(values, own):
    return values * own + values[::-1] * (1 - own)
