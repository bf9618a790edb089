"""Ready lists of layers that are neither decayed nor adapted."""

# What is neither decayed nor adapted in the published runs, as Keras, KerasHub, tf-models and
# Hugging Face name it: normalisation and biases (google-research/bert, optimization.py; MLPerf
# training v0.7, Google, resnet).
BERT_EXCLUSIONS = ("(?i)layer_?norm", "bias$")
RESNET_EXCLUSIONS = ("(?i)batch_?norm|bn/", "bias$")
# Patterns of these lists may match nothing: a model without biases is ordinary.
READY_LISTS = frozenset((*BERT_EXCLUSIONS, *RESNET_EXCLUSIONS))
