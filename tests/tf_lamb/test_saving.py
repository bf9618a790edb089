"""Training that is saved and loaded gives the same bits as training that was not interrupted.

`fit` runs eagerly: saving does not depend on how a step is compiled, and
test_learning_rates.py resumes a compiled one. test_options.py has the options of Keras around the
update (EMA, accumulation, loss scales, mixed precision).
"""

import types

import numpy as np
import pytest
import tensorflow as tf
from drive import run_eagerly

RULES = ["LAMB", "LARS"]
EXCLUDED = ["bias", "gamma", "beta"]


def data():
    """Two classes that are linearly separable."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, 4)).astype("float32")
    return x, (x[:, :1] > 0).astype("float32")


def make_optimizer(flavour, rule, rate=None):
    """With exclusions, and a schedule that has not ended where the training is interrupted."""
    arguments = {"LAMB": {}, "LARS": {"trust_coefficient": 0.1, "nesterov": True}}[rule]
    schedule = flavour.lamb.WarmupPolynomialDecay(0.1, warmup_steps=4, total_steps=30)
    return getattr(flavour.lamb, rule)(
        schedule if rate is None else rate,
        exclude_from_weight_decay=EXCLUDED,
        exclude_from_layer_adaptation=["bias"],
        **arguments,
    )


def make_model(flavour, optimizer, seed=0):
    flavour.keras.utils.set_random_seed(seed)
    layers = flavour.keras.layers
    model = flavour.keras.Sequential(
        [
            layers.Input((4,)),
            layers.Dense(8, activation="relu", name="hidden"),
            layers.BatchNormalization(name="norm"),
            layers.Dense(1, activation="sigmoid", name="out"),
        ]
    )
    model.compile(optimizer=optimizer, loss="binary_crossentropy")
    return model


def fit(model, epochs):
    with run_eagerly():
        return model.fit(*data(), batch_size=16, epochs=epochs, shuffle=False, verbose=0).history


def state(model):
    """Every number of the model and the optimizer, in a fixed order, as bytes."""
    numbers = [w.numpy() for w in model.weights]
    numbers += [slot.numpy() for kind in model.optimizer._plan.slots for slot in kind]
    return [n.tobytes() for n in (*numbers, model.optimizer.iterations.numpy())]


def decisions(optimizer):
    """What is decayed and adapted, by the last two parts of each path.

    Keras 3 renames `sequential/out/bias` to `out/bias` when it loads a Sequential model, so a
    pattern should not be anchored to the start of a path.
    """
    return {
        "/".join(layer.name.split("/")[-2:]): (layer.decayed, layer.adapted)
        for layer in optimizer.layers
    }


@pytest.fixture(scope="module", params=RULES)
def rule(request):
    return request.param


def write_checkpoint(model, path):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer).write(str(path))


@pytest.fixture(scope="module")
def uninterrupted(flavour, rule, tmp_path_factory):
    """The state after two epochs (`middle`) and after two more (`end`), and the folder of the files
    that were written in between."""
    folder = tmp_path_factory.mktemp("saved")
    model = make_model(flavour, make_optimizer(flavour, rule))
    losses = fit(model, 2)["loss"]
    middle = state(model)
    model.save(folder / "model.keras")
    if flavour.name == "tf_keras":
        model.save(folder / "saved_model", save_format="tf")
    write_checkpoint(model, folder / "checkpoint")
    assert state(model) == middle
    config = model.optimizer.get_config()
    losses += fit(model, 2)["loss"]
    assert losses[-1] < losses[0]
    assert decisions(model.optimizer) == {
        "hidden/kernel": (True, True),
        "hidden/bias": (False, False),
        "norm/gamma": (False, True),
        "norm/beta": (False, True),
        "out/kernel": (True, True),
        "out/bias": (False, False),
    }
    assert set(middle).isdisjoint(set(state(model)))
    return types.SimpleNamespace(
        middle=middle, end=state(model), folder=folder, optimizer=model.optimizer, config=config
    )


def assert_resumes(model, uninterrupted):
    assert state(model) == uninterrupted.middle
    fit(model, 2)
    assert state(model) == uninterrupted.end


FORMATS = [("keras3", "model.keras"), ("tf_keras", "model.keras"), ("tf_keras", "saved_model")]


@pytest.mark.slow
@pytest.mark.parametrize(("flavour", "file"), FORMATS, indirect=["flavour"])
def test_a_saved_model_resumes(flavour, rule, uninterrupted, file):
    path = uninterrupted.folder / file
    loaded = flavour.keras.models.load_model(path)
    assert type(loaded.optimizer) is type(uninterrupted.optimizer)
    assert loaded.optimizer.get_config() == uninterrupted.config
    if file == "saved_model":
        # tf_keras saves the optimizer, but neither builds nor restores it here.
        loaded.optimizer.build(loaded.trainable_variables)
        loaded.load_weights(str(path / "variables" / "variables"))
    assert decisions(loaded.optimizer) == decisions(uninterrupted.optimizer)
    assert_resumes(loaded, uninterrupted)


def test_moments_in_bfloat16_are_saved(flavour, tmp_path):
    model = make_model(flavour, flavour.lamb.LAMB(0.1, moment_dtype="bfloat16"))
    fit(model, 1)
    model.save(tmp_path / "model.keras")
    loaded = flavour.keras.models.load_model(tmp_path / "model.keras")
    assert state(loaded) == state(model)


def test_a_checkpoint_resumes(flavour, rule, uninterrupted):
    other = make_model(flavour, make_optimizer(flavour, rule), seed=1)
    other.optimizer.build(other.trainable_variables)
    checkpoint = tf.train.Checkpoint(model=other, optimizer=other.optimizer)
    status = checkpoint.read(str(uninterrupted.folder / "checkpoint"))
    status.assert_existing_objects_matched()
    assert_resumes(other, uninterrupted)


def test_a_checkpoint_holds_each_tensor_once(flavour, rule, tmp_path):
    model = make_model(flavour, make_optimizer(flavour, rule, rate=0.1))
    fit(model, 1)
    path = write_checkpoint(model, tmp_path / "c")
    saved = [name for name, _ in tf.train.list_variables(path) if "VARIABLE_VALUE" in name]
    saved = [name for name in saved if "/metrics/" not in name]
    slots = [slot for kind in model.optimizer._plan.slots for slot in kind]
    assert len(slots) == {"LAMB": 2, "LARS": 1}[rule] * len(model.trainable_weights)
    assert len(saved) == len(model.weights) + len(slots) + 3  # steps, skipped steps, the rate
    values = [tf.train.load_variable(path, name).tobytes() for name in saved]
    for variable in [*model.weights, *slots]:
        assert values.count(variable.numpy().tobytes()) == 1, variable.name


@pytest.mark.slow
def test_a_checkpoint_of_two_replicas_fits_one(flavour, rule, mirrored, tmp_path):
    with mirrored.scope():
        model = make_model(flavour, make_optimizer(flavour, rule))
    fit(model, 2)
    path = write_checkpoint(model, tmp_path / "c")
    alone = make_model(flavour, make_optimizer(flavour, rule), seed=1)
    alone.optimizer.build(alone.trainable_variables)
    tf.train.Checkpoint(model=alone, optimizer=alone.optimizer).read(path)
    assert state(alone) == state(model)


def test_an_exported_model_serves_without_the_optimizer(flavour, tmp_path):
    model = make_model(flavour, make_optimizer(flavour, "LAMB"))
    fit(model, 1)
    model.export(str(tmp_path / "exported"))
    served = tf.saved_model.load(str(tmp_path / "exported"))
    x, _ = data()
    np.testing.assert_allclose(served.serve(x), model(x), rtol=1e-6)
    path = str(tmp_path / "exported" / "variables" / "variables")
    names = [name for name, _ in tf.train.list_variables(path) if "VARIABLE_VALUE" in name]
    exported = {tf.train.load_variable(path, name).tobytes() for name in names}
    assert exported == {weight.numpy().tobytes() for weight in model.weights}


@pytest.mark.parametrize("shapes", [[()], [(2,), ()]])
def test_the_state_of_a_rate_is_not_loaded_into_a_schedule(keras3, shapes):
    """The last moment, of a scalar, is not taken for the count of skipped steps of 0.1.0.

    In tf_keras an optimizer with a schedule has a variable for the rate, too.
    """

    def make(rate):
        optimizer = keras3.lamb.LAMB(rate)
        optimizer.build([keras3.Variable(np.ones(shape, np.float32)) for shape in shapes])
        return optimizer

    saved, store = make(0.1), {}
    saved.iterations.assign(7)
    saved.save_own_variables(store)
    scheduled = make(keras3.lamb.WarmupPolynomialDecay(0.1, 2, 10))
    with pytest.warns(UserWarning, match=f"has {len(store) - 1} variables whereas the saved"):
        scheduled.load_own_variables(store)
    assert int(scheduled.iterations) == 0
    other = make(0.2)
    other.load_own_variables(store | {str(len(store)): np.int32(3)})
    assert int(other.iterations) == 7
