"""Ready lists of layers that are neither decayed nor adapted."""

# What is neither decayed nor adapted in the published runs, as Keras, KerasHub, tf-models and
# Hugging Face name it: normalisation and biases (google-research/bert, optimization.py; MLPerf
# training v0.7, Google, resnet).
BERT_EXCLUSIONS = ("(?i)layer_?norm", "bias$")
RESNET_EXCLUSIONS = ("(?i)batch_?norm|bn/", "bias$")
