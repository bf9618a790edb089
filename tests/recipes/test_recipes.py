"""Recipes hold the published figures, and `--set` changes a field or says why it cannot."""

import dataclasses

import pytest

import recipes
import tf_lamb
from recipes import overrides, types
from recipes.bert import BERT_LARGE_32K as PAPER
from recipes.bert import BERT_MINI_DEMO as DEMO
from recipes.squad import SQUAD_LARGE as SQUAD
from recipes.types import Phase
from tf_lamb import tf_keras as optimizers

# arXiv:1904.00962v3, Tables 1 and 5: batch, exponent k of the rate, steps in all.
COLUMNS = {
    "512": (512, 3.0, 1_000_000),
    "1k": (1_024, 2.5, 500_000),
    "2k": (2_048, 2.0, 250_000),
    "4k": (4_096, 1.5, 125_000),
    "8k": (8_192, 1.0, 62_500),
    "16k": (16_384, 0.5, 31_250),
    "32k": (32_768, 0.0, 15_625),
}


@pytest.mark.parametrize("label", COLUMNS)
def test_a_column_of_the_papers_table(label):
    """Rate 5/(2^k · 10³), warm-up of 3,125 steps, 9/10 of the steps at 128 and 1/10 at 512."""
    batch, k, steps = COLUMNS[label]
    recipe = recipes.find_recipe(f"bert-large-{label}")
    first, second = recipe.phases
    assert first.steps + second.steps == recipe.steps == steps
    assert 0 <= first.steps - 0.9 * steps <= 0.5
    assert (first.sequence_length, second.sequence_length) == (128, 512)
    assert first.global_batch_size == second.global_batch_size == batch
    assert first.peak_learning_rate == second.peak_learning_rate == 5 / (2**k * 10**3)
    assert (first.warmup_steps, second.warmup_steps) == (3_125, 312)
    assert (first.decay_from, second.decay_from) == (0, 0)
    assert (first.power, first.end_learning_rate) == (1.0, 0.0)
    betas = (recipe.beta_1, recipe.beta_2, recipe.epsilon, recipe.weight_decay)
    assert betas == (0.9, 0.999, 1e-6, 0.01)
    assert (recipe.optimizer, recipe.variant, recipe.model) == ("lamb", "", "large")


def test_the_mixed_batch_runs():
    """8,599 steps, 64K then 32K; NVIDIA's numbers for the same (paper.md's sections 2 and 3)."""
    paper, nvidia = (recipes.find_recipe(f"{name}-64k-32k") for name in ("bert-large", "nvlamb"))
    for recipe in (paper, nvidia):
        assert [phase.global_batch_size for phase in recipe.phases] == [65_536, 32_768]
        assert [phase.sequence_length for phase in recipe.phases] == [128, 512]
        assert [phase.decay_from for phase in recipe.phases] == [0, 0]
    assert [phase.steps for phase in paper.phases] == [7_037, 1_562] and paper.steps == 8_599
    assert paper.phases[0].peak_learning_rate ** 2 == pytest.approx(2 * (5e-3) ** 2)
    assert [phase.steps for phase in nvidia.phases] == [7_038, 1_563]
    assert [phase.peak_learning_rate for phase in nvidia.phases] == [6e-3, 4e-3]
    assert [phase.warmup_steps for phase in nvidia.phases] == [2_000, 200]
    assert [phase.power for phase in nvidia.phases] == [0.5, 0.5]
    assert [phase.predictions for phase in nvidia.phases] == [20, 80]
    assert [phase.reset_slots for phase in nvidia.phases] == [False, True]
    assert (nvidia.variant, nvidia.global_clipnorm) == ("nvlamb", 1.0)
    assert nvidia.exclude_from_layer_adaptation == ()


def test_mlperfs_entry():
    """training_results_v0.7, Google, v3-8192: its warm-up of 287 steps begins at step -76."""
    recipe = recipes.find_recipe("mlperf-v0.7")
    (phase,) = recipe.phases
    assert (phase.global_batch_size, phase.steps, phase.sequence_length) == (8_192, 560, 512)
    rate = optimizers.WarmupPolynomialDecay(**phase.schedule())
    assert float(rate(0)) == pytest.approx(0.00288293 * 76 / 287)
    assert float(rate(210)) == pytest.approx(0.00288293 * 286 / 287)
    assert float(rate(211)) == pytest.approx(0.00288293 * (1 - 211 / 560))
    assert (recipe.beta_1, recipe.beta_2, recipe.weight_decay) == (0.88, 0.88, 0.0166629)


@pytest.mark.parametrize("start", COLUMNS)
def test_scaling_a_column_gives_every_other(start):
    recipe = recipes.find_recipe(f"bert-large-{start}")
    for label, (batch, _, _) in COLUMNS.items():
        column = recipes.find_recipe(f"bert-large-{label}")
        scaled = recipes.scale_recipe(recipe, batch)
        for ours, papers in zip(scaled.phases, column.phases, strict=True):
            rate = papers.peak_learning_rate
            assert ours.peak_learning_rate == pytest.approx(rate, rel=1e-12)
            assert dataclasses.replace(ours, peak_learning_rate=rate) == papers


def test_scaling_keeps_proportions_and_goes_back():
    mixed = recipes.find_recipe("bert-large-64k-32k")
    small = recipes.scale_recipe(mixed, 1_024)
    assert [phase.global_batch_size for phase in small.phases] == [1_024, 512]
    assert [phase.steps for phase in small.phases] == [7_037 * 64, 1_562 * 64]
    assert small.phases[0].peak_learning_rate == mixed.phases[0].peak_learning_rate / 8
    back = recipes.scale_recipe(small, 65_536)
    again = [dataclasses.replace(phase, examples=None) for phase in back.phases]
    assert tuple(again) == mixed.phases
    # 3 is not the first phase's batch size in whole examples of the second.
    with pytest.raises(ValueError, match="no whole number .* phase 2, .* Use a multiple of 2"):
        recipes.scale_recipe(mixed, 3)


@pytest.mark.parametrize("start", ["512", "4k", "32k"])
def test_scaling_a_column_of_resnets_table(start):
    """Rate 4/(2^k · 100) and 782 steps of warm-up at every batch size, 90 epochs."""
    recipe = recipes.find_recipe(f"resnet50-lamb-{start}")
    for label, (batch, k, _) in COLUMNS.items():
        (ours,) = recipes.scale_recipe(recipe, batch).phases
        (papers,) = recipes.find_recipe(f"resnet50-lamb-{label}").phases
        assert (papers.warmup_steps, papers.peak_learning_rate) == (782, 4 / (2**k * 100))
        rate = papers.peak_learning_rate
        assert ours.peak_learning_rate == pytest.approx(rate, rel=1e-12)
        assert dataclasses.replace(ours, peak_learning_rate=rate) == papers


def test_the_linear_rule_keeps_the_epochs_of_warmup():
    """Goyal et al.: 0.1 at 256 and 5 epochs of warm-up, so 3.2 at 8,192 and 5 epochs."""
    epoch = 1_281_167
    phase = Phase(
        steps=90 * epoch // 256,
        global_batch_size=256,
        peak_learning_rate=0.1,
        warmup_steps=5 * epoch // 256,
    )
    recipe = dataclasses.replace(DEMO, phases=(phase,), evaluate_every_steps=5_000)
    scaled = recipes.scale_recipe(recipe, 8_192, rule="linear")
    assert scaled.phases[0].peak_learning_rate == pytest.approx(3.2)
    assert scaled.phases[0].warmup_steps == round(5 * epoch / 8_192)
    assert scaled.phases[0].steps == round(90 * epoch / 8_192)
    assert scaled.evaluate_every_steps == round(5_000 / 32)


@pytest.mark.parametrize(
    ("batch", "rule", "said"),
    [
        (1_024, "cubic", "rule must be one of sqrt, linear, evidence. Received: rule=cubic"),
        (0, "sqrt", "global_batch_size must be at least 1. Received: 0"),
        (2**18, "sqrt", "leaves 1758 steps for phase 1, and its warm-up takes 3125"),
    ],
)
def test_a_batch_that_the_rule_cannot_reach_is_refused(batch, rule, said):
    with pytest.raises(ValueError, match=said):
        recipes.scale_recipe(PAPER, batch, rule)


def test_squad_large_is_googles_with_their_rate_for_lamb():
    """run_squad.py: 384, 128, 64, 30, 20, 2 epochs, warm-up 0.1; LAMB: 3e-4 to 5e-4 at batch 64."""
    (phase,) = SQUAD.phases
    assert (SQUAD.sequence_length, SQUAD.doc_stride, SQUAD.max_query_length) == (384, 128, 64)
    assert (SQUAD.max_answer_length, SQUAD.n_best, phase.global_batch_size) == (30, 20, 64)
    assert 3e-4 <= phase.peak_learning_rate <= 5e-4
    assert phase.steps == round(2 * 88_641 / 64) and phase.warmup_steps == phase.steps // 10


@pytest.mark.parametrize("size", ["mini", "base", "large"])
def test_fine_tuning_takes_what_pre_training_made(size):
    pretrained = recipes.find_recipe({"large": "bert-large-32k"}.get(size, f"bert-{size}"))
    squad = recipes.find_recipe(f"squad-{size}")
    assert squad.model == pretrained.model
    assert squad.sequence_length <= pretrained.max_sequence_length


def test_recipes_are_frozen_and_sourced():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DEMO.weight_decay = 1.0
    for recipe in recipes.RECIPES.values():
        assert recipe.reference and recipe.expected
        recipe.check()
        for phase in recipe.phases:
            optimizers.Phases([phase.schedule()])
            if phase.examples:
                assert abs(phase.examples / phase.global_batch_size - phase.steps) <= 0.5
    assert all(name == recipe.name for name, recipe in recipes.RECIPES.items())


@pytest.mark.parametrize("name", ["BERT_EXCLUSIONS", "RESNET_EXCLUSIONS"])
def test_recipes_exclude_what_the_library_lists(name):
    """Neither package imports the other, so each has the lists."""
    assert getattr(types, name) == getattr(tf_lamb, name)


def test_fields_are_set_by_type():
    changes = ["dropout=0.2", "whole_word=true", "global_clipnorm=1", "compute_dtype=bfloat16"]
    recipe = recipes.override(PAPER, [*changes, "exclude_from_weight_decay=bias,gamma"])
    assert (recipe.dropout, recipe.whole_word, recipe.global_clipnorm) == (0.2, True, 1.0)
    assert recipe.exclude_from_weight_decay == ("bias", "gamma")
    assert recipes.override(recipe, ["global_clipnorm=none"]).global_clipnorm is None
    assert (
        recipes.override(PAPER, ["exclude_from_layer_adaptation="]).exclude_from_layer_adaptation
        == ()
    )


def test_a_phase_field_is_set_in_all_phases_or_in_one():
    everywhere = recipes.override(PAPER, ["warmup_steps=7"])
    assert [phase.warmup_steps for phase in everywhere.phases] == [7, 7]
    second = recipes.override(PAPER, ["phase2.warmup_steps=7"])
    assert [phase.warmup_steps for phase in second.phases] == [3125, 7]


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("weight_decai=0.1", "Did you mean 'weight_decay'"),
        ("peak_learning_rat=0.1", "Did you mean 'peak_learning_rate'"),
        ("learning_rate=0.1", "Did you mean 'peak_learning_rate'?"),
        ("LR=0.1", "Did you mean 'peak_learning_rate'?"),
        ("phase2.lr=0.1", "Did you mean 'phase2.peak_learning_rate'?"),
        ("batch_size=8", "Did you mean 'global_batch_size'?"),
        ("wd=0.1", "Did you mean 'weight_decay'?"),
        ("max-seq-length=128", "Did you mean 'sequence_length'?"),
        ("Beta_1=0.8", "Did you mean 'beta_1'?"),
        ("epochs=3", "Runs are measured in steps"),
        ("seed=3", "Use the flag of that name."),
        ("task=squad", "It belongs to the recipe."),
        ("phase3.steps=1", "no field is called 'phase3.steps'"),
        ("examples=1", "no field is called 'examples'"),
        ("phases=1", "no field is called 'phases'"),
        ("weight_decay=much", "a value of type float. Received: weight_decay=much"),
        ("steps=1.5", "a value of type int"),
        ("length_buckets=64,long", "values of type int, separated by commas. Received: length_bu"),
        ("bucket_boundaries=64,128", "Did you mean 'length_buckets'?"),
        ("whole_word=1", "true or false"),
        ("weight_decay", "write field=value"),
    ],
)
def test_a_bad_assignment_is_refused(assignment, said):
    with pytest.raises(ValueError) as error:
        recipes.override(PAPER, [assignment])
    assert said in str(error.value)


def test_names_of_other_programs_lead_to_fields_and_are_none():
    fields = {
        field.name
        for recipe in recipes.RECIPES.values()
        for holder in (recipe, *recipe.phases)
        for field in dataclasses.fields(holder)
    }
    settable = fields - set(overrides.NOT_SETTABLE)
    assert set(overrides.OTHER_NAMES.values()) <= settable
    assert not (overrides.OTHER_NAMES.keys() | overrides.INSTEAD.keys()) & settable
    # A field that this recipe does not have is not suggested.
    with pytest.raises(ValueError) as error:
        recipes.override(SQUAD, ["vocab_size=9"])
    assert "vocabulary_size" not in str(error.value)


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'bert-large-32k'"):
        recipes.find_recipe("bert-large-32")


def test_a_shorter_run_keeps_its_shape():
    short = recipes.resized(PAPER, steps=100, global_batch_size=8)
    assert [phase.steps for phase in short.phases] == [90, 10]
    assert [phase.warmup_steps for phase in short.phases] == [20, 2]
    assert [phase.global_batch_size for phase in short.phases] == [8, 8]
    assert short.phases[0].peak_learning_rate == PAPER.phases[0].peak_learning_rate
    assert {phase.examples for phase in short.phases} == {None}  # not the paper's any more
    assert recipes.resized(DEMO, steps=1).phases[0].warmup_steps == 0
    assert recipes.resized(PAPER, steps=1_003).steps == 1_003
    for steps in (2, 3, 4):
        assert recipes.resized(PAPER, steps=steps).steps == steps
    with pytest.raises(ValueError, match="has 2 phases, which need at least a step each"):
        recipes.resized(PAPER, steps=1)
    mlperf = recipes.resized(recipes.find_recipe("mlperf-v0.7"), steps=56).phases[0]
    assert (mlperf.warmup_steps, mlperf.warmup_from) == (29, -8)


def test_lengths_of_buckets_are_checked():
    mini = recipes.find_recipe("bert-mini")  # lengths 128 and 512
    recipe = recipes.override(mini, ["length_buckets=128,256,512,512"])
    recipe.check()
    assert recipe.length_buckets == (128, 256, 512, 512)
    assert (recipe.sequences_per_example, mini.sequences_per_example) == (4, 1)
    assert recipes.override(mini, ["sequences_per_row=3"]).sequences_per_example == 3
    for changes, said in (
        (["length_buckets=512,256"], "ascending order.* Received: length_buckets=512,256"),
        (["length_buckets=4,512"], "at least 5 tokens each. Received: length_buckets=4,512"),
        (["length_buckets=" + "512," * 65], "Received: 65 places of 1 lengths"),
        (["length_buckets=8,16,24,32,40,48,56,64,512"], "Received: 9 places of 9 lengths"),
        (["length_buckets=64,128"], "must be at least the sequence_length of 512,"),
        (
            ["length_buckets=256,512", "sequences_per_row=2"],
            "sequences_per_row=2 and length_buckets=256,512 exclude each other",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            recipes.override(mini, changes).check()


def test_a_setting_that_the_optimizer_does_not_take_is_refused():
    def checked(name, *changes):
        recipes.override(recipes.find_recipe(name), changes).check()

    checked("bert-large-32k", "optimizer=adamw", "beta_1=0.8")
    checked("bert-large-32k", "optimizer=lars", "trust_coefficient=0.01", "variant=mlperf")
    for name, changes, said in (
        ("bert-large-32k", ["optimizer=adam"], "optimizer must be one of lamb, lars, adamw,"),
        ("bert-large-32k", ["optimizer=adamw", "variant=nvlamb"], "does not take variant. Rec"),
        ("bert-large-32k", ["momentum=0.8"], "optimizer=lamb does not take momentum. Received"),
        ("mlperf-v0.7", ["optimizer=lars"], "Set beta_1=0.9, beta_2=0.999 too"),
        (
            "nvlamb-64k-32k",
            ["optimizer=adamw"],
            "Set exclude_from_layer_adaptation=none, variant= too, or choose another optimizer",
        ),
    ):
        with pytest.raises(ValueError, match=said):
            checked(name, *changes)
