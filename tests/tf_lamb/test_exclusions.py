"""The default exclusions, compared with the kinds of the variables of many models.

`benchmarks.exclusions` wrote data/exclusions.json.gz and describes the kinds.
"""

import gzip
import json
import pathlib
import re

import keras
import pytest

from benchmarks import exclusions, model_zoo
from tf_lamb import BERT_EXCLUSIONS, LAMB, RESNET_EXCLUSIONS

FILE = pathlib.Path(__file__).parents[1] / "data" / "exclusions.json.gz"
MODELS = json.loads(gzip.decompress(FILE.read_bytes()))
LISTS = pytest.mark.parametrize("patterns", [BERT_EXCLUSIONS, RESNET_EXCLUSIONS])
# google-research/bert, optimization.py, and tf-models; MLPerf training v0.7, Google, resnet.
PUBLISHED = {
    "tf-models/BertEncoder": "LayerNorm|layer_norm|bias",
    "tf-models/BertPretrainerV2": "LayerNorm|layer_norm|bias",
    "transformers/TFBertForPreTraining": "LayerNorm|layer_norm|bias",
    "tf-models/AlbertEncoder": "LayerNorm|layer_norm|bias",
    "tf-models/ResNet50": "batch_normalization|bn|bias",
    "keras.applications/ResNet50": "batch_normalization|bn|bias",
}


def is_excluded(patterns, path):
    return exclusions.is_excluded(patterns, path)


@LISTS
@pytest.mark.parametrize("library", sorted({name.split("/")[0] for name in MODELS}))
def test_only_norms_and_biases_are_excluded(library, patterns):
    of = [(name, kinds) for name, kinds in MODELS.items() if name.split("/")[0] == library]
    wrong = [
        (name, kind, path)
        for name, kinds in of
        for kind, paths in kinds.items()
        for path in paths
        if exclusions.is_wrong(patterns, path, kind)
    ]
    assert not wrong


@LISTS
def test_gains_are_excluded(patterns):
    gains = [path for kinds in MODELS.values() for path in kinds["gain"]]
    assert len(gains) > 10 and all(is_excluded(patterns, path) for path in gains)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_exclusions(name):
    paths = [path for of_kind in MODELS[name].values() for path in of_kind]
    for patterns in (BERT_EXCLUSIONS, RESNET_EXCLUSIONS):
        for path in paths:
            assert is_excluded(patterns, path) == bool(re.search(PUBLISHED[name], path)), path


@LISTS
@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("bn_Conv1/gamma", True),
        ("normalization/gamma", True),
        ("layer_normalization_3/beta", True),
        ("rms_normalization/scale", True),
        ("encoder/ln_1/gamma", True),
        ("block_0/norm/scale", True),
        ("block_0/norm1/weight", True),
        ("stages.0/layers.0/grn/weight", True),
        ("encoder/layer_._0/lambda_1", True),
        ("gamma", True),
        ("bias", True),
        ("cls/predictions/output_bias", True),
        ("bert/encoder/layer_0/attention/output/LayerNorm/gamma", True),
        ("stage_0_layer_scale/gamma", True),
        ("norm_conv/kernel", False),
        ("normal_conv_1/kernel", False),
        ("abnormal/kernel", False),
        ("rebias/kernel", False),
        ("bias/kernel", False),
        ("layer_norm/dense/kernel", False),
        ("lambda/kernel", False),
        ("learned_beta", False),
        ("logit_scale", False),
        ("scaled/kernel", False),
        ("Scale/scale", False),
        ("pos_conv_embed/conv/weight_g", False),
        ("btn/weight", False),
        ("word_embeddings/weight", False),
        ("embeddings_layer_norm/embeddings", False),
        ("norm_embedding/weight", False),
        ("relative_position_bias_table", False),
        ("relative_attention_bias/embeddings", False),
    ],
)
def test_paths_of_other_models(path, expected, patterns):
    assert is_excluded(patterns, path) == expected


def test_each_list_is_one_pattern_that_matches_in_every_model():
    """A pattern without a match warns, so biases and norms are one pattern."""
    assert len(BERT_EXCLUSIONS) == len(RESNET_EXCLUSIONS) == 1
    without_norms = keras.Sequential([keras.layers.Input([2]), keras.layers.Dense(2)])
    without_biases = keras.Sequential(
        [
            keras.layers.Input([2]),
            keras.layers.Dense(2, use_bias=False),
            keras.layers.LayerNormalization(),
        ]
    )
    for model in (without_norms, without_biases):
        optimizer = LAMB(exclude_from_weight_decay=BERT_EXCLUSIONS)
        optimizer.build(model.trainable_variables)
        assert [layer.decayed for layer in optimizer.layers].count(True) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MobileNetV2", "ResNet50", "EfficientNetB0"])
def test_models_of_the_installed_keras(name):
    of = exclusions.variables(model_zoo.applications(keras)[name]())
    kinds = {kind for _, kind in of}
    assert {"norm", "bias", "other"} <= kinds
    for patterns in (BERT_EXCLUSIONS, RESNET_EXCLUSIONS):
        assert not [one for one in of if exclusions.is_wrong(patterns, *one)]
    recorded = MODELS[f"keras.applications/{name}"]
    for path, kind in exclusions.distinct(of):
        assert exclusions.without_numbers(path) in map(exclusions.without_numbers, recorded[kind])
