"""Weights in the layout of tf-models, which the published BERT TF2 checkpoints have."""

import json
import os

import tensorflow as tf
from official.nlp.modeling import networks

from models import bert

PREFIX = "bert_model.ckpt"
CONFIG = "bert_config.json"


def save_encoder(encoder: networks.BertEncoderV2, folder: str) -> None:
    """Writes a checkpoint of `tfm.nlp.networks.BertEncoder` and bert_config.json.

    tf-models reads the checkpoint as `init_checkpoint`, or with
    `tf.train.Checkpoint(encoder=networks.BertEncoder(...)).read(...)`.

    Args:
        encoder: the encoder to save.
        folder: the folder to write the files in.
    """
    config = encoder.get_config()
    copy = networks.BertEncoder(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        num_layers=config["num_layers"],
        num_attention_heads=config["num_attention_heads"],
        max_sequence_length=config["max_sequence_length"],
        type_vocab_size=config["type_vocab_size"],
        inner_dim=config["inner_dim"],
    )
    variables = bert.encoder_variables(copy)
    for name, variable in bert.encoder_variables(encoder).items():
        variables[name].assign(variable.numpy())
    tf.train.Checkpoint(encoder=copy).save(os.path.join(folder, PREFIX))
    # The field names of google-research/bert, which the converter of tf-models reads.
    settings = {
        "attention_probs_dropout_prob": config["attention_dropout"],
        "hidden_act": "gelu",
        "hidden_dropout_prob": config["output_dropout"],
        "hidden_size": config["hidden_size"],
        "initializer_range": config["initializer"]["config"]["stddev"],
        "intermediate_size": config["inner_dim"],
        "max_position_embeddings": config["max_sequence_length"],
        "num_attention_heads": config["num_attention_heads"],
        "num_hidden_layers": config["num_layers"],
        "type_vocab_size": config["type_vocab_size"],
        "vocab_size": config["vocab_size"],
    }
    with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=2)
