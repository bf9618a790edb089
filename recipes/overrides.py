"""Changes of a recipe: single fields (`--set field=value`), number of steps, batch size."""

import dataclasses
import difflib
import types
import typing

from recipes.types import Recipe

NOT_SETTABLE = ("name", "task", "phases", "examples")
# Names of other programs and papers -> the field here, where spelling does not lead to it.
OTHER_NAMES = {
    **dict.fromkeys(("learning_rate", "lr", "base_lr", "max_lr"), "peak_learning_rate"),
    **dict.fromkeys(("min_lr", "final_learning_rate"), "end_learning_rate"),
    **dict.fromkeys(("batch_size", "bs", "train_batch_size"), "global_batch_size"),
    **dict.fromkeys(("num_steps", "train_steps", "max_steps", "num_train_steps"), "steps"),
    **dict.fromkeys(("warmup", "warmup_proportion", "warmup_ratio"), "warmup_steps"),
    **dict.fromkeys(("wd", "decay", "weight_decay_rate"), "weight_decay"),
    **dict.fromkeys(("l2", "l2_coefficient", "kernel_regularizer"), "l2_regularization"),
    **dict.fromkeys(("clip_norm", "clipnorm", "max_grad_norm", "grad_clip"), "global_clipnorm"),
    **dict.fromkeys(("eps", "adam_epsilon"), "epsilon"),
    **dict.fromkeys(("beta1", "adam_beta1"), "beta_1"),
    **dict.fromkeys(("beta2", "adam_beta2"), "beta_2"),
    **dict.fromkeys(("gradient_accumulation_steps", "accum_steps"), "accumulation"),
    **dict.fromkeys(("dtype", "precision", "mixed_precision", "bf16", "fp16"), "compute_dtype"),
    **dict.fromkeys(("xla", "use_xla"), "jit_compile"),
    **dict.fromkeys(("max_seq_length", "max_seq_len", "seq_length", "seq_len"), "sequence_length"),
    **dict.fromkeys(("max_predictions_per_seq", "predictions_per_seq"), "predictions"),
    **dict.fromkeys(("vocab_size",), "vocabulary_size"),
    **dict.fromkeys(("buckets", "bucket_boundaries", "bucket_lengths"), "length_buckets"),
    **dict.fromkeys(("dropout_rate", "hidden_dropout_prob"), "dropout"),
    **dict.fromkeys(("initializer_range",), "initializer_stddev"),
    **dict.fromkeys(("eval_steps", "eval_every"), "evaluate_every_steps"),
    **dict.fromkeys(
        ("save_steps", "checkpoint_every", "save_checkpoints_steps"), "save_every_steps"
    ),
    **dict.fromkeys(("max_to_keep", "save_total_limit"), "keep_checkpoints"),
    **dict.fromkeys(
        ("recompute", "rematerialization", "gradient_checkpointing", "checkpoint_activations"),
        "remat",
    ),
    **dict.fromkeys(("init_checkpoint", "checkpoint"), "init_from"),
    **dict.fromkeys(("eeta", "eta", "trust_coef"), "trust_coefficient"),
}
# Names that are not fields of a recipe -> what to do instead.
INSTEAD = {
    **dict.fromkeys(
        ("epochs", "epoch", "num_epochs", "num_train_epochs", "train_epochs"),
        "Runs are measured in steps: examples x epochs / global_batch_size. Give --steps.",
    ),
    **dict.fromkeys(("name", "task"), "It belongs to the recipe. Choose one with --recipe."),
    "recipe": "Choose the recipe with --recipe.",
    "phases": "Set the fields of a phase, such as phase1.steps.",
    **dict.fromkeys(("model_dir", "data_dir", "export_dir", "vocab"), "Use the flag of that name."),
    **dict.fromkeys(("seed", "steps_per_loop", "tpu", "scaling"), "Use the flag of that name."),
}


def override(recipe: Recipe, assignments: list[str]) -> Recipe:
    """Returns the recipe with some fields changed.

    Args:
        recipe: A `Recipe`.
        assignments: List of strings "field=value". A field of a phase is changed in all phases;
            "phase2.steps=10" changes only the second one. The elements of a list are separated by
            commas. `None` is written "none".

    Raises:
        ValueError: If a field is unknown (the message names the nearest one), or a value does not
            have the type of its field.
    """
    for assignment in assignments:
        field, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"write field=value. Received: {assignment!r}.")
        field = field.strip()
        if field in _field_types(recipe) and field not in NOT_SETTABLE:
            value = _parse_value(recipe, field, text)
            recipe = dataclasses.replace(recipe, **{field: value})
            continue
        phase_name, _, phase_field = field.rpartition(".")
        phase_indices = {f"phase{i + 1}": i for i in range(len(recipe.phases))}
        in_phase = _field_types(recipe.phases[0]).keys() - NOT_SETTABLE
        if phase_field not in in_phase or (phase_name and phase_name not in phase_indices):
            known = [
                name
                for name in (*_field_types(recipe), *sorted(in_phase))
                if name not in NOT_SETTABLE
            ]
            if phase_name and phase_field in in_phase:
                known = [f"{phase}.{phase_field}" for phase in phase_indices]
            raise ValueError(f"no field is called {field!r}. {_advice(field, known)}")
        changed = {phase_field: _parse_value(recipe.phases[0], phase_field, text)}
        if phase_field in ("steps", "global_batch_size"):
            changed["examples"] = None
        phases = list(recipe.phases)
        indices = [phase_indices[phase_name]] if phase_name else range(len(phases))
        for i in indices:
            phases[i] = dataclasses.replace(phases[i], **changed)
        recipe = dataclasses.replace(recipe, phases=tuple(phases))
    return recipe


def resized(recipe: Recipe, *, steps: int | None = None, global_batch_size: int | None = None):
    """Returns the recipe with another total number of steps or another batch size.

    Learning rates do not change. Each phase and its warm-up keep their share of the steps.

    Args:
        recipe: A `Recipe`.
        steps: Integer or `None`. The new number of steps of all phases.
        global_batch_size: Integer or `None`. The new batch size of all phases.

    Raises:
        ValueError: If there are fewer `steps` than phases.
    """
    if steps is not None and 1 <= steps < len(recipe.phases):
        raise ValueError(
            f"{recipe.name} has {len(recipe.phases)} phases, which need at least a step each. "
            f"Received: steps={steps}."
        )
    phases = []
    old_end = 0  # Last step of the phase in the old recipe, and in the new one.
    new_end = 0
    for phase in recipe.phases:
        if steps is not None:
            factor = steps / recipe.steps
            old_end += phase.steps
            later = len(recipe.phases) - len(phases) - 1  # phases that need a step each
            end = min(max(new_end + 1, round(old_end * factor)), steps - later)
            phase = phase.stretched(end - new_end, factor)
            new_end += phase.steps
        if global_batch_size is not None:
            phase = dataclasses.replace(phase, global_batch_size=global_batch_size, examples=None)
        phases.append(phase)
    return dataclasses.replace(recipe, phases=tuple(phases))


def _field_types(recipe) -> dict[str, typing.Any]:
    """Returns the type of each field of a recipe or phase."""
    return typing.get_type_hints(type(recipe))


def nearest_name(name: str, known) -> str:
    """Returns a sentence with the name in `known` nearest to `name`, or with all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"There are: {', '.join(sorted(known))}."


def _advice(field: str, known: list[str]) -> str:
    """What to write instead of an unknown field, of a recipe whose fields are `known`."""
    prefix, dot, name = field.rpartition(".")
    key = name.lower().replace("-", "_")
    if key in INSTEAD:
        return INSTEAD[key]
    other = OTHER_NAMES.get(key, key)
    if other in known:
        return f"Did you mean {prefix + dot + other!r}?"
    return nearest_name(field, known)


def _parse_value(recipe, field: str, text: str):
    """Converts `text` to the type of a field of a recipe or phase."""
    hint = _field_types(recipe)[field]
    choices = typing.get_args(hint) if typing.get_origin(hint) is types.UnionType else (hint,)
    if type(None) in choices:
        if text.lower() == "none":
            return None
        choices = tuple(choice for choice in choices if choice is not type(None))
    (kind,) = choices
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if typing.get_origin(kind) is tuple:
            (element, _) = typing.get_args(kind)
            return tuple(element(part) for part in text.split(",") if part)
        return kind(text)
    except (KeyError, ValueError):
        expected = "true or false" if kind is bool else f"a value of type {kind.__name__}"
        if typing.get_origin(kind) is tuple:
            expected = f"values of type {typing.get_args(kind)[0].__name__}, separated by commas"
        raise ValueError(f"{field} takes {expected}. Received: {field}={text}.") from None
