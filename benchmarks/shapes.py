"""The variables of the networks in the papers, as (path, shape)."""


def bert_base(vocabulary: int = 30_522, blocks: int = 12) -> list[tuple[str, tuple[int, ...]]]:
    """BERT-base's encoder with pooler: 199 tensors, 109,482,240 parameters (arXiv:1810.04805).

    Args:
        vocabulary: number of word pieces.
        blocks: number of encoder layers.
    """
    width = 768
    inner = 3072
    heads = 12
    layers = [
        ("embeddings/word", (vocabulary, width)),
        ("embeddings/position", (512, width)),
        ("embeddings/type", (2, width)),
        *_normalised("embeddings/layer_norm", width),
    ]
    for i in range(blocks):
        block = f"layer_{i}"
        for name in ("query", "key", "value"):
            layers += [
                (f"{block}/attention/{name}/kernel", (width, heads, width // heads)),
                (f"{block}/attention/{name}/bias", (heads, width // heads)),
            ]
        layers += [
            (f"{block}/attention/output/kernel", (heads, width // heads, width)),
            (f"{block}/attention/output/bias", (width,)),
            *_normalised(f"{block}/attention/layer_norm", width),
            (f"{block}/intermediate/kernel", (width, inner)),
            (f"{block}/intermediate/bias", (inner,)),
            (f"{block}/output/kernel", (inner, width)),
            (f"{block}/output/bias", (width,)),
            *_normalised(f"{block}/layer_norm", width),
        ]
    return [*layers, ("pooler/kernel", (width, width)), ("pooler/bias", (width,))]


def resnet_50() -> list[tuple[str, tuple[int, ...]]]:
    """ResNet-50 v1.5: 161 trainable tensors, 25,557,032 parameters (arXiv:1512.03385)."""
    layers = [*_convolution("stem", 7, 3, 64)]
    inputs = 64
    for stage, (blocks, width) in enumerate([(3, 64), (4, 128), (6, 256), (3, 512)], start=1):
        for block in range(blocks):
            name = f"stage_{stage}/block_{block}"
            if block == 0:
                layers += _convolution(f"{name}/shortcut", 1, inputs, 4 * width)
            layers += _convolution(f"{name}/conv_1", 1, inputs, width)
            layers += _convolution(f"{name}/conv_2", 3, width, width)
            layers += _convolution(f"{name}/conv_3", 1, width, 4 * width)
            inputs = 4 * width
    return [*layers, ("classifier/kernel", (2048, 1000)), ("classifier/bias", (1000,))]


def _normalised(name, width):
    return [(f"{name}/gamma", (width,)), (f"{name}/beta", (width,))]


def _convolution(name, size, inputs, outputs):
    return [
        (f"{name}/kernel", (size, size, inputs, outputs)),
        *_normalised(f"{name}/batch_norm", outputs),
    ]


MODELS = {"bert-base": bert_base, "resnet-50": resnet_50}
EXCLUDED = {"bert-base": ("layer_norm", "bias"), "resnet-50": ("batch_norm", "bias")}
