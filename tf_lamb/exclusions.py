"""Ready lists of variables that are neither decayed nor adapted."""

# Normalisation and biases, as in the published runs. BERT: "LayerNorm", "layer_norm", "bias"
# (google-research/bert, optimization.py; tf-models). ResNet-50: "batch_normalization", "bn", "bias"
# (MLPerf training v0.7, Google, resnet). For those models the decisions are the same.
#
# The end of a path decides, so that "norm_conv/kernel" stays a kernel: a bias; "gamma" or "beta";
# "scale" or "weight" where the layer's name ends in a norm's and perhaps a number. LayerScale
# factors are excluded, too: they start near zero, where a trust ratio would hold them. Tables of
# relative positions are embeddings, unless their name ends in "bias".
# `python -m benchmarks.exclusions` shows the decisions for many networks.
BERT_EXCLUSIONS = (
    r"(?i)bias$|(^|/)(gamma|beta)$"
    r"|(norm|normalization|(^|[/_])([blg]n|grn|rms))[._]?\d*/(scale|weight)$"
    r"|layer_?scale|(^|/)lambda_?\d$",
)
RESNET_EXCLUSIONS = BERT_EXCLUSIONS
# These patterns may match nothing: a model without biases is ordinary.
READY_LISTS = frozenset((*BERT_EXCLUSIONS, *RESNET_EXCLUSIONS))
