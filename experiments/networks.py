"""The small networks of the paper's appendix, in Keras 3: LeNet-5, its author's CNN, DavidNet."""

import keras

layers = keras.layers


def lenet5() -> keras.Model:
    """LeNet-5 for 28x28 gray images, with ReLU and max pooling: 61,706 parameters.

    Returns:
        A model from images (batch, 28, 28, 1) to logits (batch, 10), float32.

    References:
        - LeCun et al., "Gradient-based learning applied to document recognition", 1998, figure 2
    """
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(6, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(16, 5, activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(120, activation="relu"),
            layers.Dense(84, activation="relu"),
            layers.Dense(10),
        ],
        name="lenet5",
    )


def mnist_cnn(seed: int) -> keras.Model:
    """The MNIST network of the paper's author: 3,274,634 parameters, with dropout.

    Args:
        seed: Seed of the dropout.

    Returns:
        A model from images (batch, 28, 28, 1) to logits (batch, 10), float32.

    References:
        - github.com/fastalgo/mnist_tpu, `create_model` of lamb/mnist_tpu.py
    """
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 5, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(1024, activation="relu"),
            layers.Dropout(0.4, seed=seed),
            layers.Dense(10),
        ],
        name="mnist_cnn",
    )


def davidnet(width: int = 64) -> keras.Model:
    """DavidNet, the nine-layer ResNet of DAWNBench: 6,573,120 parameters at width 64.

    The weights are initialized as in PyTorch, uniform within ±1/√(fan-in), and the logits are
    multiplied by 1/8.

    Args:
        width: Number of channels of the first convolution.

    Returns:
        A model from images (batch, 32, 32, 3) to logits (batch, 10), float32.

    References:
        - David Page, "How to train your ResNet", 2018
        - github.com/fastalgo/davidnet-cifar, class `DavidNet`
    """
    initializer = keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")

    def convolution(x, channels):
        x = layers.Conv2D(
            channels, 3, padding="same", use_bias=False, kernel_initializer=initializer
        )(x)
        x = layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)
        return layers.ReLU()(x)

    def residual(x, channels):
        return layers.Add()([x, convolution(convolution(x, channels), channels)])

    inputs = x = layers.Input((32, 32, 3))
    x = convolution(x, width)
    x = residual(layers.MaxPooling2D()(convolution(x, 2 * width)), 2 * width)
    x = layers.MaxPooling2D()(convolution(x, 4 * width))
    x = residual(layers.MaxPooling2D()(convolution(x, 8 * width)), 8 * width)
    x = layers.GlobalMaxPooling2D()(x)
    x = layers.Dense(10, use_bias=False, kernel_initializer=initializer)(x)
    logits = layers.Rescaling(0.125, dtype="float32")(x)  # for a loss in float32 under any policy
    return keras.Model(inputs, logits, name="davidnet")
