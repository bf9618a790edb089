"""ResNet's recipes hold the published figures; their own fields are checked."""

import dataclasses

import pytest

import recipes

# arXiv:1904.00962v3, Table 6: batch, rate, warm-up in epochs.
TABLE_6 = {
    "512": (512, 0.005, 0.3125),
    "1k": (1024, 0.00707, 0.625),
    "2k": (2048, 0.01, 1.25),
    "4k": (4096, 0.01414, 2.5),
    "8k": (8192, 0.02, 5),
    "16k": (16384, 0.02828, 10),
    "32k": (32768, 0.04, 20),
}


def find(name):
    recipe = recipes.find_recipe(f"resnet50-{name}")
    recipe.check()
    (phase,) = recipe.phases
    return recipe, phase


@pytest.mark.parametrize("column", TABLE_6)
def test_the_papers_table(column):
    batch, rate, epochs = TABLE_6[column]
    recipe, phase = find(f"lamb-{column}")
    assert phase.global_batch_size == batch
    assert phase.peak_learning_rate == pytest.approx(rate, rel=1e-3)
    steps_per_epoch = 1_281_167 / batch
    assert phase.warmup_steps / steps_per_epoch == pytest.approx(epochs, rel=1e-3)
    assert phase.steps / steps_per_epoch == pytest.approx(90, rel=1e-3)
    assert (recipe.weight_decay, recipe.optimizer, phase.decay_from) == (0.01, "lamb", 0)
    assert recipe.label_smoothing == 0.1


@pytest.mark.parametrize("column", TABLE_6)
def test_the_square_root_rule_gives_the_table(column):
    """From the 32K column, every other one."""
    scaled = recipes.scale_recipe(find("lamb-32k")[0], TABLE_6[column][0]).phases[0]
    expected = find(f"lamb-{column}")[1]
    assert scaled.peak_learning_rate == pytest.approx(expected.peak_learning_rate)
    assert scaled.warmup_steps == expected.warmup_steps == 782
    assert scaled.steps == pytest.approx(expected.steps, rel=3e-4)


def test_the_authors_program_is_not_the_papers_text():
    recipe, phase = find("lamb-author-32k")
    assert (phase.peak_learning_rate, phase.warmup_steps, phase.steps) == (0.04, 782, 3519)
    assert (recipe.weight_decay, recipe.global_clipnorm, recipe.variant) == (1.5, 1.0, "paper-v3")
    assert phase.decay_from is None and len(recipe.exclude_from_weight_decay) == 1


def test_mlperfs_lars():
    for name, batch, rate, epochs, steps, momentum in (
        ("lars-32k", 32_768, 31.2, 25, 2_983, 0.9),
        ("lars-65536", 65_536, 24.699, 31, 1_738, 0.951807),
    ):
        recipe, phase = find(name)
        assert (phase.global_batch_size, phase.peak_learning_rate) == (batch, rate)
        assert (phase.steps, recipe.momentum) == (steps, momentum)
        assert phase.warmup_steps == pytest.approx(epochs * 1_281_167 / batch, abs=0.5)
        assert (phase.power, phase.end_learning_rate) == (2, 1e-4)
        assert (recipe.optimizer, recipe.weight_decay) == ("lars", 1e-4)


@pytest.mark.parametrize(
    ("name", "batch", "rate"),
    [
        ("momentum-8k", 8192, 0.1 * 8192 / 256),
        ("adamw-16k", 16384, 0.002),
        ("adagrad-16k", 16384, 14),
    ],
)
def test_goyals_schedule(name, batch, rate):
    _, phase = find(name)
    assert (phase.global_batch_size, phase.peak_learning_rate) == (batch, pytest.approx(rate))
    epochs = [s * batch / 1_281_167 for s in (phase.warmup_steps, *phase.decay_steps, phase.steps)]
    assert epochs == pytest.approx([5, 30, 60, 80, 90], abs=0.01)
    schedule = phase.schedule()
    assert schedule["decay_steps"] == list(phase.decay_steps) and schedule["decay_factor"] == 0.1


def test_the_paper_s_adamw_has_the_decay_and_the_l2_term_of_its_best_line():
    """Table 4's .7307 is the line 0.002 of Table 22, not one of the tables without an L2 term."""
    recipe, _ = find("adamw-16k")
    assert (recipe.weight_decay, recipe.l2_regularization) == (1e-4, 0.01)


def test_step_decay_is_stretched_and_set():
    recipe, phase = find("momentum-8k")
    half = recipes.resized(recipe, steps=phase.steps // 2).phases[0]
    assert half.decay_steps == pytest.approx([s / 2 for s in phase.decay_steps], abs=1)
    linear = recipes.scale_recipe(recipe, 256, "linear").phases[0]
    assert linear.peak_learning_rate == pytest.approx(0.1)
    assert linear.decay_steps == pytest.approx([s * 32 for s in phase.decay_steps], rel=1e-3)
    assert recipes.override(recipe, ["decay_steps=20,40"]).phases[0].decay_steps == (20, 40)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"space_to_depth": True, "image_size": 240}, "multiple of 32 for the space-to-depth stem"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"augmentation": "auto"}, "augmentation must be one of none, crop, randaugment"),
        ({"normalization": "l2"}, "normalization must be one of imagenet, mlperf, cifar10"),
        ({"mixup_alpha": -1.0}, "mixup_alpha must be at least 0"),
        ({"sync_batch_norm": True, "accumulation": 2}, "sync_batch_norm needs accumulation=1"),
        ({"sync_batch_norm": True, "jit_compile": True}, "sync_batch_norm needs jit_compile=false"),
    ],
)
def test_a_bad_field_is_refused(changes, said):
    recipe, _ = find("lamb-512")
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(recipe, **changes).check()


def test_step_decay_and_polynomial_decay_exclude_one_another():
    recipe, phase = find("momentum-8k")
    bad = dataclasses.replace(phase, power=2.0)
    with pytest.raises(ValueError, match="power has no effect with decay_steps"):
        dataclasses.replace(recipe, phases=(bad,)).check()


def test_every_recipe_is_sound():
    for recipe in recipes.RECIPES.values():
        recipe.check()


def test_a_run_too_short_for_its_drops_says_so():
    recipe = recipes.find_recipe("resnet50-momentum-8k")
    recipes.resized(recipe, steps=9).check()
    for steps in (1, 2, 3, 4):
        with pytest.raises(ValueError, match="3 drops of the learning rate must come in different"):
            recipes.resized(recipe, steps=steps).check()
