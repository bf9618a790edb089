"""Small models from the installed libraries, with new weights.

For each library, a function returns a dict: name -> function that builds the model.
"""

import functools
import importlib
import inspect
import pathlib
import unittest.mock

import keras
import tensorflow as tf
import tf_keras

APPLICATIONS = (
    "ConvNeXtTiny DenseNet121 EfficientNetB0 EfficientNetB1 EfficientNetV2B0 EfficientNetV2S "
    "InceptionResNetV2 InceptionV3 MobileNet MobileNetV2 MobileNetV3Large MobileNetV3Small "
    "NASNetMobile RegNetX002 RegNetY002 ResNet50 ResNet50V2 ResNetRS50 VGG16 Xception"
).split()
LEAST_SIZES = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}
# Fields that make Hugging Face's default configurations smaller, if a configuration has them.
FEWER_LAYERS = (
    "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers "
    "decoder_layers l_layers x_layers r_layers"
).split()
NARROW = {"hidden_size": 256, "d_model": 256, "intermediate_size": 512, "dff": 512}
NARROW |= {"num_attention_heads": 4, "n_head": 4, "num_key_value_heads": 4, "rotary_dim": 16}
WIDE = ("blenderbot", "ctrl", "gptj", "idefics", "mistral", "xlm")


def applications(library) -> dict:
    """One model per family of keras.applications or tf_keras.applications."""
    return {
        name: functools.partial(
            getattr(library.applications, name),
            weights=None,
            classes=10,
            input_shape=(*[LEAST_SIZES.get(name, 32)] * 2, 3),
        )
        for name in APPLICATIONS
        if hasattr(library.applications, name)
    }


def layers(library) -> dict:
    """Models of the layers that have variables, with Keras's own names."""
    kinds = library.layers

    def sequence(shape, *made):
        return lambda: library.Sequential([kinds.Input(shape), *(make() for make in made)])

    def of_text():
        x = inputs = kinds.Input([8, 4])
        x = kinds.MultiHeadAttention(2, 2)(x, x)
        return library.Model(inputs, kinds.EinsumDense("abc,cd->abd", [None, 3], bias_axes="d")(x))

    recurrent = [
        functools.partial(getattr(kinds, name), 3, return_sequences=True)
        for name in ("LSTM", "GRU", "SimpleRNN")
    ]
    norms = ("BatchNormalization", "LayerNormalization", "RMSNormalization", "UnitNormalization")
    return {
        "recurrent": sequence([8, 4], *recurrent, lambda: kinds.Bidirectional(recurrent[1]())),
        "normalisation": sequence(
            [8, 4],
            *(getattr(kinds, name) for name in norms if hasattr(kinds, name)),
            lambda: kinds.GroupNormalization(2),
            kinds.PReLU,
        ),
        "spectral": sequence([8, 8, 4], lambda: kinds.SpectralNormalization(kinds.Conv2D(4, 2))),
        "convolution": sequence(
            [8, 8, 4],
            lambda: kinds.SeparableConv2D(3, 2),
            lambda: kinds.DepthwiseConv2D(2),
            lambda: kinds.Conv2DTranspose(3, 2),
        ),
        "attention": of_text,
    }


def called(model, *inputs, **arguments):
    """The model, after a call that creates its variables."""
    model(*inputs, **arguments)
    return model


def tf_models() -> dict:
    """Models of tf-models: text encoders and models around them, blocks, backbones, detectors."""
    from official.nlp.modeling import layers, models, networks
    from official.nlp.modeling.models import t5
    from official.nlp.modeling.networks.bert_encoder import BertEncoderV2
    from official.projects.centernet.modeling.backbones.hourglass import Hourglass
    from official.projects.maxvit.modeling.maxvit import MaxViT
    from official.projects.movinet.modeling.movinet import Movinet
    from official.projects.volumetric_models.modeling.backbones.unet_3d import UNet3D
    from official.projects.yolo.modeling.backbones.darknet import Darknet
    from official.projects.yolo.modeling.backbones.yolov7 import YoloV7
    from official.vision.configs.retinanet import RetinaNet
    from official.vision.modeling import backbones, factory
    from official.vision.modeling.backbones.mobiledet import SUPPORTED_SPECS_MAP as MOBILE_DETS
    from official.vision.modeling.backbones.mobilenet import SUPPORTED_SPECS_MAP as MOBILE_NETS

    zeros, vectors = tf.zeros([1, 8], tf.int32), tf.zeros([1, 8, 32])
    tokens = {"input_word_ids": zeros, "input_mask": zeros + 1, "input_type_ids": zeros}
    sides = {"num_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": 100, "hidden_size": 32} | sides
    xl = dict.fromkeys(("dropout_rate", "attention_dropout_rate"), 0.0) | text
    xl |= {"head_size": 16, "inner_size": 64, "attention_type": "bi", "bi_data": True}
    xl["initializer"] = tf_keras.initializers.RandomNormal()

    def shaped(*shape):
        return tf_keras.layers.InputSpec(shape=[None, *shape, 3])

    def bert():
        return networks.BertEncoder(**text)

    def electra():
        two = [networks.BertEncoder(**text, dict_outputs=False) for _ in range(2)]
        return models.ElectraPretrainer(
            *two, vocab_size=100, num_classes=2, num_token_predictions=4
        )

    def t5_transformer():
        sizes = t5.T5TransformerParams(
            num_layers=2, d_model=32, d_kv=16, num_heads=2, d_ff=64, vocab_size=100
        )
        words = [f"{name}_tokens" for name in ("encoder_input", "decoder_input", "decoder_target")]
        return called(t5.T5Transformer(sizes), **dict.fromkeys(words, zeros + 1), training=True)

    def detector():
        config = RetinaNet(num_classes=3, input_size=[128, 128, 3])
        images = {"images": tf.zeros([1, 128, 128, 3]), "image_shape": tf.constant([[128, 128]])}
        return called(factory.build_retinanet(shaped(128, 128), config), **images, training=True)

    return {
        "BertEncoder": bert,
        "BertEncoderV2": lambda: called(
            BertEncoderV2(**text, norm_first=True, embedding_width=16), tokens
        ),
        "AlbertEncoder": lambda: networks.AlbertEncoder(**text, embedding_width=16),
        "FNet": lambda: called(
            networks.FNet(**text, attention_layers=(1,), max_sequence_length=8), tokens
        ),
        "FunnelTransformerEncoder": lambda: called(
            networks.FunnelTransformerEncoder(**text), tokens
        ),
        "SparseMixer": lambda: called(
            networks.SparseMixer(
                **text,
                moe_layers=(0,),
                attention_layers=(1,),
                num_experts=2,
                max_sequence_length=8,
            ),
            tokens,
        ),
        **{
            f"MobileBERTEncoder {kind}": functools.partial(
                networks.MobileBERTEncoder, 100, num_blocks=2, normalization_type=kind
            )
            for kind in ("no_norm", "layer_norm")
        },
        "XLNetPretrainer": lambda: called(
            models.XLNetPretrainer(networks.XLNetBase(**xl)),
            tokens
            | {"permutation_mask": tf.zeros([1, 8, 8]), "target_mapping": tf.zeros([1, 2, 8])}
            | {"masked_tokens": tf.zeros([1, 8])},
        ),
        "BertPretrainer": lambda: models.BertPretrainer(bert(), 2, num_token_predictions=4),
        "BertPretrainerV2": lambda: called(
            models.BertPretrainerV2(
                bert(), classification_heads=[layers.ClassificationHead(32, 2, name="next")]
            ),
            tokens | {"masked_lm_positions": zeros},
        ),
        "BertSpanLabeler": lambda: models.BertSpanLabeler(bert()),
        "BertClassifier": lambda: models.BertClassifier(bert(), 3),
        "ElectraPretrainer": electra,
        "Seq2SeqTransformer": lambda: called(
            models.Seq2SeqTransformer(
                vocab_size=100,
                embedding_width=32,
                encoder_layer=models.TransformerEncoder(**sides, intermediate_size=64),
                decoder_layer=models.TransformerDecoder(**sides, intermediate_size=64),
            ),
            {"inputs": zeros + 1, "targets": zeros + 1},
            training=True,
        ),
        "T5Transformer": t5_transformer,
        "TransformerEncoderBlock": lambda: called(
            layers.TransformerEncoderBlock(2, 64, "relu", use_rms_norm=True), vectors
        ),
        "ReZeroTransformer": lambda: called(
            layers.ReZeroTransformer(2, 64, "relu", use_layer_norm=True), vectors
        ),
        "RelativePositionBias": lambda: called(layers.RelativePositionBias(2), vectors, vectors),
        "TalkingHeadsAttention": lambda: called(
            layers.TalkingHeadsAttention(num_heads=2, key_dim=16), vectors, vectors
        ),
        **{
            f"ResNet{which}": functools.partial(backbones.ResNet, which, shaped(64, 64))
            for which in (18, 50)
        },
        "ResNet50 RS": lambda: backbones.ResNet(
            50, stem_type="v1", resnetd_shortcut=True, se_ratio=0.25, use_sync_bn=True
        ),
        "EfficientNet": lambda: backbones.EfficientNet("b0", se_ratio=0.25),
        **{
            name: functools.partial(backbones.MobileNet, name, input_specs=shaped(224, 224))
            for name in MOBILE_NETS
        },
        **{
            name: functools.partial(backbones.MobileDet, name, input_specs=shaped(128, 128))
            for name in MOBILE_DETS
        },
        "RevNet": lambda: backbones.RevNet(56),
        "DilatedResNet": lambda: backbones.DilatedResNet(50, output_stride=8),
        "ResNetUNet": lambda: backbones.ResNetUNet(
            50,
            shaped(64, 64),
            upsample_repeats=[1] * 4,
            upsample_filters=[64] * 4,
            upsample_kernel_sizes=[7] * 4,
        ),
        "ResNet3D": lambda: backbones.ResNet3D(
            50,
            temporal_strides=[1] * 4,
            temporal_kernel_sizes=[(3, 3, 3), (3, 1, 3, 1), (3, 1, 3, 1, 3, 1), (1, 3, 1)],
            use_self_gating=[1] * 4,
            input_specs=shaped(8, 64, 64),
            se_ratio=0.25,
        ),
        "SpineNet": lambda: backbones.SpineNet(shaped(128, 128), filter_size_scale=0.65),
        "SpineNetMobile": lambda: backbones.SpineNetMobile(shaped(128, 128)),
        "VisionTransformer": lambda: backbones.VisionTransformer(
            mlp_dim=64,
            num_heads=2,
            num_layers=2,
            hidden_size=32,
            representation_size=16,
            layer_scale_init_value=0.1,
            input_specs=shaped(32, 32),
        ),
        "RetinaNet": detector,
        "Movinet": lambda: Movinet("a0"),
        "MaxViT": lambda: called(
            MaxViT(
                block_type=("maxvit", "maxvit"),
                stem_hsize=(16, 16),
                num_blocks=(1, 1),
                hidden_size=(32, 32),
                head_size=16,
                window_size=4,
                grid_size=4,
                representation_size=8,
            ),
            tf.zeros([1, 32, 32, 3]),
        ),
        "Darknet": lambda: Darknet("cspdarknet53"),
        "YoloV7": lambda: YoloV7("yolov7-tiny"),
        "Hourglass": lambda: Hourglass(52, input_channel_dims=32),
        "UNet3D": lambda: UNet3D(2, input_specs=shaped(16, 16, 16)),
    }


def keras_hub() -> dict:
    """KerasHub's backbones, in the sizes of its tests, which a source checkout contains."""
    import keras_hub

    folder = pathlib.Path(keras_hub.__file__).parent / "src" / "models"
    files = sorted(folder.glob("**/*_backbone_test.py"))
    if not files:
        raise ValueError("KerasHub has no tests here; put a source checkout on PYTHONPATH")
    test_case = importlib.import_module("keras_hub.src.tests.test_case").TestCase

    class Made(Exception):  # noqa: N818
        pass

    def stop(self, cls, init_kwargs, *args, **kwargs):
        raise Made(cls(**init_kwargs))

    def make(path):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        checks = {name: stop for name in ("run_backbone_test", "run_vision_backbone_test")}
        with unittest.mock.patch.multiple(test_case, **checks):
            for _, case in inspect.getmembers(module, inspect.isclass):
                if not issubclass(case, test_case) or case is test_case:
                    continue
                for name in filter(lambda name: name.startswith("test_"), dir(case)):
                    test = case(name)
                    test.setUp()
                    try:
                        getattr(test, name)()
                    except Made as made:
                        return made.args[0]
                    except Exception:  # a test with other requirements
                        continue
        raise ValueError("no test builds this backbone")

    return {
        path.stem.removesuffix("_backbone_test"): functools.partial(make, path) for path in files
    }


def transformers() -> dict:
    """Hugging Face's TensorFlow models (transformers 4), with two layers where configurable."""
    import transformers
    from transformers.models.auto.modeling_tf_auto import TF_MODEL_MAPPING_NAMES

    def small(config):
        names = set(dir(config)) | set(config.attribute_map)
        fields = dict.fromkeys(FEWER_LAYERS, 2)
        if config.model_type in WIDE:
            fields |= NARROW
        for name, value in fields.items():
            if name in names and isinstance(getattr(config, name), int):
                setattr(config, name, value)
        for name in ("text_config", "vision_config"):
            if isinstance(getattr(config, name, None), transformers.PretrainedConfig):
                small(getattr(config, name))
        return config

    def make(kind, name):
        model = getattr(transformers, name)(small(transformers.AutoConfig.for_model(kind)))
        model.build_in_name_scope()
        return model

    kinds = [(kind, name) for kind, name in TF_MODEL_MAPPING_NAMES.items() if name[0] == "T"]
    kinds += [("bert", "TFBertForPreTraining"), ("gpt2", "TFGPT2LMHeadModel")]
    kinds += [("t5", "TFT5ForConditionalGeneration"), ("vit", "TFViTForImageClassification")]
    return {name: functools.partial(make, kind, name) for kind, name in kinds}


def libraries() -> dict:
    """Library -> function that returns its models."""
    return {
        "keras.applications": lambda: applications(keras),
        "keras.layers": lambda: layers(keras),
        "tf_keras.applications": lambda: applications(tf_keras),
        "tf_keras.layers": lambda: layers(tf_keras),
        "tf-models": tf_models,
        "keras_hub": keras_hub,
        "transformers": transformers,
    }
