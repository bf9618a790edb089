"""The code that LAMB and LARS share in Keras 3 and tf_keras: arguments, plan, update, saving."""

import dataclasses
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from keras import ops

from tf_lamb import learning_rate as rates
from tf_lamb import norms
from tf_lamb.arguments import (
    FOREIGN_NAMES,
    Hyperparameters,
    Variant,
    check_axes,
    check_bounds,
    check_choice,
    check_flag,
    check_interval,
    check_patterns,
    to_json,
)
from tf_lamb.layers import Patterns, VariablePlan, plan_variables, table_lines

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
# Arguments that optimizers of tf_keras do not have.
KERAS_3_ONLY = ("loss_scale_factor", "gradient_accumulation_steps")
# Arguments that can be assigned after construction, because Keras assigns them.
SETTABLE = ("learning_rate", "loss_scale_factor", "name")
MOMENT_DTYPES = ("float32", "bfloat16")
# Types of the attributes of a user's subclass that its compiled update can read.
PLAIN_TYPES = (bool, int, float, str, tuple, np.generic)
# Arguments that change the formula. If one is overridden, the result is not the published variant.
FORMULA = (
    "adapt_undecayed",
    "bias_correction",
    "exclude_from_layer_adaptation",
    "form",
    "nesterov",
    "norm",
    "trust_ratio_bounds",
    "unit_gradient",
    "weight_norm_bounds",
    *CLIPS,
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that `build` creates. A dataclass, so that Keras does not track it twice.

    Attributes:
        variables: Tuple with a `VariablePlan` for each variable.
        slots: Tuple with a list of variables for each slot of the rule.
        skipped: Integer variable, the number of skipped updates.
        telemetry: Float32 variable of shape [variables, 3], or `None`.
        update: The `xla.Update` on TensorFlow, or `None`.
    """

    variables: tuple[VariablePlan, ...]
    slots: tuple[Sequence[Any], ...]
    skipped: Any
    telemetry: Any
    update: Any = None

    def layers(self, index: Sequence[int]) -> list[tuple[int, ...]]:
        """Groups the variables at `index` into layers.

        Args:
            index: Positions of variables.

        Returns:
            A list with a tuple for each layer: the positions of the variables that share its trust
            ratio. A group contains all its members, including those that are not in `index`.
        """
        layers: dict[Any, tuple[int, ...]] = {}
        for i in index:
            group = self.variables[i].group
            if group is None:
                layers[i] = (i,)
            elif group not in layers:
                layers[group] = tuple(
                    j for j, plan in enumerate(self.variables) if plan.group == group
                )
        return list(layers.values())


@dataclasses.dataclass(frozen=True)
class GradientSummary:
    """The result of one pass over all gradients, before any variable is updated.

    Attributes:
        finite: Boolean scalar, `False` if the update must be skipped. `None` without
            `skip_nonfinite`.
        scales: List with a float32 scalar for each gradient, by which it is multiplied. `None` if
            gradients are not scaled.
        nonfinite_marks: List with a float32 scalar for each gradient: NaN if the gradient is not
            finite, and 0 otherwise. `None` without `skip_nonfinite`.
    """

    finite: Any
    scales: Sequence[Any] | None
    nonfinite_marks: Sequence[Any] | None


class Layerwise:
    """The part of an optimizer that does not depend on the rule or on the version of Keras.

    The base classes of an optimizer, in their method resolution order, are:

    - a rule (`lamb.LAMBRule` or `lars.LARSRule`), a subclass of this class that defines
      `slot_names`, `variants`, `scalars`, `moments`, `direction`, `ratio` and `step`;
    - this class, `Layerwise`;
    - an adapter (`keras3.Adapter` or `tf_keras.Adapter`), which is a Keras optimizer.
    """

    slot_names: tuple[str, ...]
    variants: Mapping[str, Variant]
    schedule_class: type  # The `LearningRateSchedule` of the adapter's Keras.

    hyperparameters: Hyperparameters
    _plan: Plan | None

    # Attributes of a Keras optimizer, declared for type checkers.
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None

    def __init__(self, arguments: dict[str, Any], base_arguments: dict[str, Any]) -> None:
        """Checks the arguments that both rules have, and constructs the Keras optimizer.

        Args:
            arguments: Dictionary of the rule's constructor arguments.
            base_arguments: Dictionary of other arguments, which a newer version of Keras may have.

        Raises:
            ValueError: If an argument is unknown or out of range.
        """
        own = self._own_parameters()
        base = self._base_parameters()
        self._check_names(base_arguments, [*own, *base])
        given = arguments | {
            "learning_rate": rates.check_learning_rate(
                arguments["learning_rate"], self.schedule_class
            ),
            "weight_decay": check_interval(
                "weight_decay",
                0.0 if arguments["weight_decay"] is None else arguments["weight_decay"],
                0,
            ),
            "trust_ratio_bounds": check_bounds(
                "trust_ratio_bounds", arguments["trust_ratio_bounds"]
            ),
        }
        for name, choices in (
            ("norm", norms.NORMS),
            ("moment_dtype", MOMENT_DTYPES),
            ("based_on", (None, *self.variants)),
        ):
            given[name] = check_choice(name, given[name], choices)
        for flag in ("skip_nonfinite", "telemetry", "adapt_undecayed", "jit_compile", "use_ema"):
            given[flag] = check_flag(flag, given[flag])
        clips = [clip for clip in CLIPS if given[clip] is not None]
        for clip in clips:
            given[clip] = check_interval(clip, given[clip], 0, open_low=True)
        clips += ["unit_gradient"] if given.get("unit_gradient") else []
        if len(clips) > 1:
            raise ValueError(
                "Set only one of `clipnorm`, `clipvalue`, `global_clipnorm` and `unit_gradient`. "
                "Received: " + ", ".join(f"{clip}={given[clip]!r}" for clip in clips) + "."
            )
        adaptation = given["exclude_from_layer_adaptation"]
        if adaptation is not None:
            adaptation = check_patterns("exclude_from_layer_adaptation", adaptation)
        patterns = Patterns(
            check_patterns("exclude_from_weight_decay", given["exclude_from_weight_decay"]),
            adaptation,
            check_axes(given["layer_axes"]),
            check_patterns("layer_groups", given["layer_groups"]),
        )
        given |= {
            "exclude_from_weight_decay": patterns.no_decay,
            "exclude_from_layer_adaptation": patterns.no_adaptation,
            "layer_axes": patterns.axes or None,
            "layer_groups": patterns.groups,
        }
        for name in KERAS_3_ONLY:
            if name not in base and given[name] is not None:
                raise ValueError(
                    f"`{name}` exists in Keras 3 only. Received: {name}={given[name]!r}."
                )
        # Keras accepts NaN for some of these, and others fail in the first step.
        if given["ema_overwrite_frequency"] is not None:
            given["ema_overwrite_frequency"] = check_interval(
                "ema_overwrite_frequency", given["ema_overwrite_frequency"], 1, whole=True
            )
        if given["use_ema"]:
            given["ema_momentum"] = check_interval(
                "ema_momentum", given["ema_momentum"], 0, 1, open_high=False
            )
        if given["loss_scale_factor"] is not None:
            given["loss_scale_factor"] = check_interval(
                "loss_scale_factor", given["loss_scale_factor"], 0, open_low=True
            )
        if given["gradient_accumulation_steps"] is not None:
            given["gradient_accumulation_steps"] = check_interval(
                "gradient_accumulation_steps", given["gradient_accumulation_steps"], 2, whole=True
            )
        super().__init__(**{name: given[name] for name in base if name in given} | base_arguments)
        self.hyperparameters = Hyperparameters(given)
        self._patterns = patterns
        self._plan = None

    @classmethod
    def _base_parameters(cls) -> dict[str, inspect.Parameter]:
        """Returns the constructor parameters of Keras's `Optimizer` and of the adapter."""
        return _constructor_parameters(cls.__mro__[cls.__mro__.index(Layerwise) + 1 :])

    @classmethod
    def _own_parameters(cls) -> dict[str, inspect.Parameter]:
        """Returns the constructor parameters of the rule, and of a user's subclass."""
        return _constructor_parameters(cls.__mro__[: cls.__mro__.index(Layerwise)])

    def _check_names(self, arguments: dict[str, Any], known: Sequence[str]) -> None:
        """Raises `ValueError` for an argument that is not in `known`, and suggests one that is."""
        for unknown in arguments.keys() - set(known):
            nearest = difflib.get_close_matches(unknown, known, n=1)
            hint = f"Did you mean `{nearest[0]}`? " if nearest else ""
            if unknown in FOREIGN_NAMES:
                hint = f"Here it is {FOREIGN_NAMES[unknown]}. "
            raise ValueError(
                f"`{type(self).__name__}` takes no argument `{unknown}`. {hint}"
                f"Received: {unknown}={arguments[unknown]!r}."
            )

    def __getattr__(self, name: str) -> Any:
        """Returns a constructor argument. Other Keras optimizers also have them as attributes."""
        hyperparameters = self.__dict__.get("hyperparameters")
        if hyperparameters is not None and name in hyperparameters:
            return hyperparameters[name]
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        if hyperparameters is not None and "_patterns" not in self.__dict__:
            message += (
                " in its compiled update. The methods of a rule can read the constructor's "
                "arguments, and attributes that are numbers, strings or tuples."
            )
        raise AttributeError(message)

    def __setattr__(self, name: str, value: Any) -> None:
        hyperparameters = self.__dict__.get("hyperparameters")
        if hyperparameters is not None and name in hyperparameters and name not in SETTABLE:
            setattr(hyperparameters, name, value)  # Raises `AttributeError`.
        super().__setattr__(name, value)

    @classmethod
    def variant(cls, variant: str, /, learning_rate: Any = 1e-3, **arguments: Any):
        """Creates the optimizer with the arguments of a published variant.

        The attribute `based_on` of the result is the variant, or `None` if `arguments` override
        the variant's own settings or another part of its formula.

        Args:
            variant: String. A key of `variants`. Positional only.
            learning_rate: As in the constructor.
            **arguments: Other arguments of the constructor. They override those of the variant.

        Returns:
            An optimizer of this class.

        Raises:
            ValueError: If there is no such variant. The message lists the variants.

        Example:

        >>> optimizer = tf_lamb.LAMB.variant("nvlamb", 1e-3, name="nvlamb")
        """
        check_choice("variant", variant, tuple(cls.variants))
        settings = cls.variants[variant].arguments
        defaults = cls._own_parameters()

        def published(key):
            return settings[key] if key in settings else defaults[key].default

        changed = [
            key
            for key, value in arguments.items()
            if (key in settings or key in FORMULA) and to_json(value) != to_json(published(key))
        ]
        base = {"learning_rate": learning_rate, "based_on": None if changed else variant}
        return cls(**base | settings | arguments)

    def _make_plan(self, names, shapes, dtypes, overwritten=None) -> tuple[VariablePlan, ...]:
        """Returns a `VariablePlan` for each variable.

        Args:
            names: The variables' full paths.
            shapes: Their static shapes.
            dtypes: Names of their dtypes.
            overwritten: For each variable, whether Keras overwrites it with its gradient.

        Raises:
            ValueError: If a variable is not a real floating-point variable, or as in
                `plan_variables`.
        """
        for name, dtype in zip(names, dtypes, strict=True):
            if "float" not in dtype:
                raise ValueError(
                    f"{type(self).__name__} updates real floating-point variables. Received: "
                    f"{name!r} of dtype {dtype}. Leave it out of the list of variables."
                )
        plans = plan_variables(names, shapes, self._patterns, overwritten)
        if self.adapt_undecayed:
            return plans
        return tuple(
            plan
            if plan.decayed and self.weight_decay > 0
            else dataclasses.replace(plan, adapted=False, group=None)
            for plan in plans
        )

    def _rule_without_variables(self):
        """Returns an object with the rule's methods and arguments, but no variables.

        Compiled programs are shared among optimizers and must not keep their variables alive.
        """
        kept = {k: v for k, v in self.hyperparameters.items() if k != "learning_rate"}
        if type(self).__module__.startswith("tf_lamb."):
            # `LAMBRule` or `LARSRule`, so that programs are also shared between Keras 3 and
            # tf_keras.
            rule_class = type(self).__mro__[1]
        else:
            rule_class = type(self)
            # The methods of a user's subclass may read plain attributes of their own.
            own = {k: v for k, v in vars(self).items() if isinstance(v, PLAIN_TYPES)}
            kept |= {k: v for k, v in own.items() if k not in ("name", "built")}
        rule = object.__new__(rule_class)
        rule.__dict__["hyperparameters"] = Hyperparameters(kept)
        return rule

    # The rule for one variable or slice. LAMB and LARS define these methods, in which g is the
    # gradient, x the variable and u the direction, all float32 tensors; `slots` is a tuple of
    # float32 tensors, and `plan` a `VariablePlan`.

    def scalars(self, t) -> dict[str, Any]:
        """Returns float32 scalars that all layers share in update t, counted from 1."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def moments(self, g, x, slots, plan, rate):
        """Returns the new slots. `rate` is η times the trust ratio, or 1 without `rate_inside`."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def direction(self, g, x, slots, scalars, plan):
        """Returns u, whose norm is in the denominator of the trust ratio."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def ratio(self, x_norm, u_norm, decay_norm):
        """Returns the trust ratio and its denominator, given ‖x‖, ‖u‖ and ‖λx‖."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def step(self, g, x, u, slots, rate, plan):
        """Returns the tensor that is subtracted from x. `rate` is η times the trust ratio."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    @property
    def rate_inside(self) -> bool:
        """Whether the moments contain the learning rate, so that the ratio is computed first."""
        return False

    # Clipping, skipping and dtypes, which are the same for both rules.

    @property
    def checks_finite_per_replica(self) -> bool:
        """Whether each replica may check its own gradients before they are summed.

        `False` with clipping, which reads the summed gradients anyway, so that the check after the
        sum takes no additional time.
        """
        clips = self.clipnorm or self.global_clipnorm or self.unit_gradient
        return self.skip_nonfinite and not clips

    def summarize_gradients(self, grads, squares=None) -> GradientSummary:
        """Checks in one pass whether the gradients are finite, and computes the scales of clipping.

        Args:
            grads: List of float32 tensors, summed over the replicas.
            squares: List of float32 scalars: for each gradient the sum of squares of its elements,
                or an upper bound of it. If `None`, the sums are computed here.

        Returns:
            A `GradientSummary`.
        """
        clipnorm = self.clipnorm
        global_clipnorm = self.global_clipnorm
        if not (self.skip_nonfinite or clipnorm or global_clipnorm or self.unit_gradient):
            return GradientSummary(None, None, None)
        if self.skip_nonfinite:
            if squares is None:
                squares = [norms.sum_squares(g) for g in grads]
            finite = norms.is_finite(norms.sum_scalars(squares))
            marks = [0.0 * (norms.HEADROOM * square) for square in squares]  # 0·∞ is NaN.

            def norm(positions):
                return ops.sqrt(norms.sum_scalars([squares[i] for i in positions]))

        else:
            finite = marks = None
            grads = [norms.clip_to_squarable(g) for g in grads]

            def norm(positions):
                return norms.norm_without_overflow([grads[i] for i in positions])

        everything = range(len(grads))
        scales = None
        if clipnorm:
            scales = [clipnorm / ops.maximum(norm([i]), clipnorm) for i in everything]
        elif global_clipnorm:
            scale = global_clipnorm / ops.maximum(norm(everything), global_clipnorm)
            scales = [scale] * len(grads)
        elif self.unit_gradient:
            scales = [ops.divide_no_nan(1.0, norm(everything))] * len(grads)
        return GradientSummary(finite, scales, marks)

    def update_layer(
        self, plans, grads, params, slots, learning_rate, finite, scales, scalars, *, measure
    ):
        """Returns new values of the variables of one layer, which share a trust ratio.

        Args:
            plans: List with a `VariablePlan` for each variable. Only a group has more than one.
            grads: List with a float tensor for each variable, summed over the replicas. `None` for
                a member of a group that has no gradient: it is not updated, but ‖x‖ includes it.
            params: List of float tensors of any dtype, the variables' values.
            slots: List with a tuple of float tensors for each variable, the values of its slots.
            learning_rate: Float32 scalar η.
            finite: Boolean scalar. If it is `False`, the old values are returned. `None` means
                `True`.
            scales: List with a float32 scalar for each gradient, or `None`.
            scalars: The result of `self.scalars`.
            measure: Boolean. Whether to compute the norms of a layer that is not adapted.

        Returns:
            A tuple `(params, slots, measured)`. `params` and `slots` have the structure and the
            dtypes of the arguments. `measured` is a tuple (‖x‖, denominator, ratio) of float32
            tensors, scalars or [..., 1, ...], or `None` if the norms were not computed. The
            denominator of the ratio is ‖u‖ for LAMB.
        """

        def select(new, old):
            new = ops.cast(new, old.dtype)
            return new if finite is None else ops.where(finite, new, old)

        xs = [ops.cast(x, "float32") for x in params]
        gs = [None if g is None else ops.cast(g, "float32") for g in grads]
        updated = [i for i, g in enumerate(grads) if g is not None]
        for i in updated:
            if not self.skip_nonfinite:
                gs[i] = norms.clip_to_squarable(gs[i])
            if scales is not None:
                gs[i] = gs[i] * scales[i]
            if self.clipvalue is not None:
                gs[i] = ops.clip(gs[i], -self.clipvalue, self.clipvalue)
        new_slots = list(slots)
        moments = [tuple(ops.cast(slot, "float32") for slot in own) for own in slots]

        def update_slots(rate):
            # The direction is computed from the results of `select`, so that the compiler can
            # overwrite the old slots in place.
            for i in updated:
                new_moments = self.moments(gs[i], xs[i], moments[i], plans[i], rate)
                pairs = zip(new_moments, moments[i], strict=True)
                moments[i] = tuple(select(new, old) for new, old in pairs)
                pairs = zip(moments[i], slots[i], strict=True)
                new_slots[i] = tuple(ops.cast(new, old.dtype) for new, old in pairs)

        if not self.rate_inside:
            update_slots(1.0)
        u = {i: self.direction(gs[i], xs[i], moments[i], scalars, plans[i]) for i in updated}
        rate = learning_rate * scalars.get("rate", 1.0)
        measured = None
        if plans[0].adapted or measure:
            x_norm = norms.layer_norm(xs, self.norm, plans[0].axes)
            u_norm = norms.layer_norm(list(u.values()), self.norm, plans[0].axes)
            decay_norm = self._decay_norm(x_norm, xs, plans)
            ratio, denominator = self.ratio(x_norm, u_norm, decay_norm)
            if plans[0].adapted:
                rate = rate * ratio
            else:
                ratio = ops.ones((), "float32")
            measured = (x_norm, denominator, ratio)
        if self.rate_inside:
            update_slots(rate)
        new_params = list(params)
        for i in updated:
            delta = self.step(gs[i], xs[i], u[i], moments[i], rate, plans[i])
            if "float64" in str(params[i].dtype):
                new = params[i] - ops.cast(delta, params[i].dtype)
            else:
                new = xs[i] - delta
            new_params[i] = select(new, params[i])
        return new_params, new_slots, measured

    def _decay_norm(self, x_norm, xs, plans):
        """Returns ‖λx‖ of the layer. In a group, some members may not be decayed."""
        decays = [self.weight_decay if plan.decayed else 0.0 for plan in plans]
        if len(set(decays)) == 1:
            return decays[0] * x_norm
        return norms.layer_norm([d * x for d, x in zip(decays, xs, strict=True)], self.norm)

    def _update_model(self, index, grads, params, slots, learning_rate, step):
        """Returns new values of all variables and slots of a model.

        Args:
            index: Tuple of integers, the positions of the variables that have a gradient.
            grads: List of float tensors, summed over the replicas, one for each position.
            params: List of float tensors, the values of all variables.
            slots: List of float tensors of all variables, for each of `slot_names`.
            learning_rate: Float32 scalar η.
            step: Float32 scalar t, 1 in the first update.

        Returns:
            A tuple `(values, finite, rows)`. `values` is a list `[params, *slots]`. `finite` is a
            boolean scalar or `None`. `rows` is a dictionary {position: [3] float32 tensor} with
            the telemetry of the variables at `index`, or `None`.
        """
        plan = self._built_plan()
        grads = [ops.cast(g, "float32") for g in grads]
        summary = self.summarize_gradients(grads)
        scalars = self.scalars(step)
        place_of = {i: place for place, i in enumerate(index)}
        values = [list(params), *(list(slot) for slot in slots)]
        rows: dict[int, Any] | None = {} if self.telemetry else None
        for layer in plan.layers(index):
            places = [place_of.get(i) for i in layer]
            scales = summary.scales and [None if p is None else summary.scales[p] for p in places]
            new_params, new_slots, measured = self.update_layer(
                [plan.variables[i] for i in layer],
                [None if p is None else grads[p] for p in places],
                [params[i] for i in layer],
                [tuple(slot[i] for slot in slots) for i in layer],
                learning_rate,
                summary.finite,
                scales,
                scalars,
                measure=self.telemetry,
            )
            for place, i, x, own in zip(places, layer, new_params, new_slots, strict=True):
                for param_or_slot, value in zip(values, (x, *own), strict=True):
                    param_or_slot[i] = value
                if rows is not None and place is not None:
                    rows[i] = telemetry_row(measured, summary.nonfinite_marks, place)
        return values, summary.finite, rows

    @property
    def skipped_steps(self) -> int:
        """Integer. The number of updates skipped because a gradient was not finite.

        Raises:
            ValueError: If the optimizer is not built.
        """
        return int(ops.convert_to_numpy(self._built_plan().skipped))

    @property
    def telemetry_rows(self):
        """Float32 NumPy array [variables, 3]: ‖x‖, ‖u‖ and trust ratio of the last update.

        For LARS, the second column is the denominator of the ratio.

        Raises:
            ValueError: If the optimizer was created without `telemetry=True`, or is not built.
        """
        rows = self._built_plan().telemetry
        if rows is None:
            raise ValueError(
                "The optimizer keeps no telemetry. "
                f"Create it with {type(self).__name__}(telemetry=True)."
            )
        return ops.convert_to_numpy(rows)

    def _built_plan(self) -> Plan:
        """Returns the plan. Raises `ValueError` before the optimizer is built."""
        if self._plan is None:
            raise ValueError(
                "The optimizer is not built yet. Call "
                "`optimizer.build(model.trainable_variables)` first."
            )
        return self._plan

    @property
    def layers(self) -> tuple[VariablePlan, ...]:
        """Tuple of `VariablePlan`: how each variable is updated, in the order of `build`.

        Raises:
            ValueError: If the optimizer is not built.
        """
        return self._built_plan().variables

    def layer_table(self, print_fn: Callable[[str], object] = print) -> None:
        """Prints a table of the variables: shape, whether decayed and adapted, and group.

        Args:
            print_fn: Function that is called with each line.

        Raises:
            ValueError: If the optimizer is not built.
        """
        for line in table_lines(self.layers):
            print_fn(line)

    def __repr__(self) -> str:
        """Returns the class and the arguments that differ from their defaults."""
        own = self._own_parameters()
        base = self._base_parameters()
        shown = []
        for name, parameter in (base | own).items():
            if name == "name" and re.fullmatch(rf"{type(self).__name__}(_\d+)?", self.name, re.I):
                continue  # The name was chosen by Keras.
            if name not in base and name not in self.hyperparameters:
                continue  # An argument of a user's subclass.
            if name == "learning_rate":
                value = rates.to_repr(self._learning_rate)
            else:
                value = to_json(getattr(self, name) if name in base else self.hyperparameters[name])
            if value != to_json(parameter.default):
                shown.append(f"{name}={value!r}")
        module = type(self).__module__.removesuffix(".keras3")
        return f"{module}.{type(self).__name__}({', '.join(shown)})"

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Not supported, because Keras does not save what this method sets.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            "Exclusions are arguments of the constructor, so that they are saved with the "
            "optimizer. "
            f"Write {type(self).__name__}(..., exclude_from_weight_decay=[patterns]). "
            f"Received: var_list={var_list}, var_names={var_names}."
        )

    def update_step(self, *unused_args, **unused_kwargs):
        """Not supported, because all variables are updated in one call.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"{type(self).__name__} updates all variables in one call. "
            "Call `optimizer.apply_gradients(grads_and_vars)`."
        )

    def _apply_weight_decay(self, variables):
        """Does nothing: weight decay is part of u. Keras would apply it outside the trust ratio."""

    def _clip_gradients(self, grads):
        """Returns the gradients unchanged.

        Keras 3 clips before the sum over replicas. `update_layer` clips after it.
        """
        return grads

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments as JSON values."""
        config = {
            name: self.hyperparameters[name]
            for name in self._own_parameters()
            if name in self.hyperparameters
            and (name in self._base_parameters() or name not in KERAS_3_ONLY)
        }
        config |= super().get_config()  # type: ignore[misc]
        return {name: to_json(value) for name, value in config.items()}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates an optimizer from the result of `get_config`, without its state."""
        return super().from_config(dict(config), custom_objects)

    def _state_variables(self) -> list[Any]:
        """Returns the variables that are saved: all except skipped-update count and telemetry."""
        unsaved = () if self._plan is None else (self._plan.skipped, self._plan.telemetry)
        variables = self.variables
        return [v for v in variables if not any(v is other for other in unsaved)]

    def save_own_variables(self, store):
        """Saves the state, except the number of skipped updates and the telemetry."""
        for i, variable in enumerate(self._state_variables()):
            store[str(i)] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store):
        """Loads what `save_own_variables` saved.

        A file of version 0.1.0 also contains, after the state, the number of skipped updates and
        the telemetry, if any. They are ignored. If the number of variables in the file is wrong, a
        `UserWarning` says so and nothing is loaded, as in Keras.
        """
        variables = self._state_variables()
        count = len(variables)
        saved = [np.asarray(store[str(i)]) for i in range(len(store.keys()))]
        saved_count = len(saved)
        plans = () if self._plan is None else self._plan.variables
        rest = [(value.dtype.kind, value.shape) for value in saved[count:]]
        ignored = [("i", ()), ("f", (len(plans), 3))]
        if saved_count < count or rest != ignored[: len(rest)]:
            hint = " This is likely because the optimizer has not been called/built yet."
            warnings.warn(
                f"Skipping variable loading for optimizer {self.name!r}, because it has {count} "
                f"variables whereas the saved optimizer has {saved_count} variables."
                + (hint if count <= 2 else ""),
                stacklevel=2,
            )
            return
        for variable, value in zip(variables, saved, strict=False):
            # tf_keras stores a bfloat16 array in HDF5 as raw bytes, without its dtype.
            variable.assign(value.view("bfloat16") if value.dtype.kind == "V" else value)


def _constructor_parameters(classes: Sequence[type]) -> dict[str, inspect.Parameter]:
    """Returns the named parameters of the classes' own constructors.

    If two classes have a parameter of the same name, the one of the earlier class is returned.
    """
    found: dict[str, inspect.Parameter] = {}
    for cls in classes:
        if cls is not object and "__init__" in vars(cls):
            for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    found.setdefault(name, parameter)
    found.pop("self", None)
    return found


def sum_duplicates(index, grads):
    """Adds up the gradients of a variable that occurs more than once, as Keras's SGD does.

    Args:
        index: Positions of variables.
        grads: List with a float32 tensor for each position.

    Returns:
        A tuple `(index, grads)` without duplicates.
    """
    sums: dict[int, Any] = {}
    for i, g in zip(index, grads, strict=True):
        sums[i] = sums[i] + g if i in sums else g
    return tuple(sums), list(sums.values())


def telemetry_row(measured, nonfinite_marks, place):
    """Returns [‖x‖, ‖u‖, ratio] of a variable, a float32 tensor.

    Args:
        measured: Tuple (‖x‖, ‖u‖, ratio) of tensors. If they are [..., 1, ...], their means are
            returned.
        nonfinite_marks: As in `GradientSummary`. ‖u‖ becomes NaN if the gradient is not finite.
        place: Integer. The position of the variable's gradient in `nonfinite_marks`.
    """
    x_norm, u_norm, ratio = (ops.mean(ops.cast(value, "float32")) for value in measured)
    if nonfinite_marks is not None:
        u_norm = u_norm + nonfinite_marks[place]
    return ops.stack([x_norm, u_norm, ratio])


def replace_rows(telemetry, rows):
    """Replaces rows of the telemetry.

    Args:
        telemetry: Float32 tensor [variables, 3].
        rows: Dictionary {position: [3] float32 tensor}.

    Returns:
        A float32 tensor [variables, 3].
    """
    return ops.stack([rows[i] if i in rows else telemetry[i] for i in range(telemetry.shape[0])])


def check_hooks(caller: Callable, *called: str) -> None:
    """Raises `RuntimeError` if a method of Keras does not call the methods overridden here.

    Args:
        caller: A method of Keras's `Optimizer`.
        *called: Names of methods that it must call.
    """
    missing = [name for name in called if name not in inspect.unwrap(caller).__code__.co_names]
    if missing:
        raise RuntimeError(
            f"This version of Keras does not call `{missing[0]}` in `{caller.__qualname__}`, "
            "which tf_lamb overrides; training would silently give wrong results. Install a "
            "supported version of Keras, or a newer version of tf_lamb."
        )
