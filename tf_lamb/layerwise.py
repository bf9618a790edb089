"""What LAMB and LARS share in every Keras flavour: arguments, plan, update of a layer, config."""

import dataclasses
import difflib
import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
    check_interval,
    check_patterns,
    plain,
)
from tf_lamb.layers import Patterns, VariablePlan, plan_variables, table_lines

CLIPS = ("clipnorm", "clipvalue", "global_clipnorm")
# Arguments that the optimizers of tf_keras lack.
KERAS_3_ONLY = ("loss_scale_factor", "gradient_accumulation_steps")
# Arguments that may be set on an optimizer; Keras itself does.
SETTABLE = ("learning_rate", "loss_scale_factor", "jit_compile", "name")
MOMENT_DTYPES = ("float32", "bfloat16")
# Arguments that say which rule it is. Where one differs from a variant's, it is another rule.
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
    """Everything `build` makes. A dataclass, so that Keras does not track its variables twice.

    Attributes:
        variables: a `VariablePlan` for each variable.
        slots: one list of variables for each of the rule's slots.
        skipped: int variable, how many updates were skipped.
        telemetry: [variables, 3] float32 variable, or None.
        update: on TensorFlow, the `xla.Update`.
    """

    variables: tuple[VariablePlan, ...]
    slots: tuple[Sequence[Any], ...]
    skipped: Any
    telemetry: Any
    update: Any = None

    def layers(self, index: Sequence[int]) -> list[tuple[int, ...]]:
        """The variables at `index` as layers: positions of those that share one ratio.

        A group is whole, with the members that are not at `index`.
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
class Gradients:
    """The result of one pass over all gradients, before any variable is updated.

    Attributes:
        finite: boolean scalar, False where the update must be skipped; None without
            `skip_nonfinite`.
        scales: a float32 scalar for each gradient, by which it is multiplied; None for no scaling.
        nonfinite: for each gradient a float32 scalar, 0 or NaN; None without `skip_nonfinite`.
    """

    finite: Any
    scales: Sequence[Any] | None
    nonfinite: Sequence[Any] | None


class Layerwise:
    """The part of an optimizer that is the same in every Keras flavour and for both rules.

    A rule (`lamb.LAMBRule`, `lars.LARSRule`) is its subclass, and defines `slot_names`,
    `variants`, `scalars`, `moments`, `direction`, `ratio` and `step`. An adapter (`keras3.Adapter`,
    `tf_keras.Adapter`) is the next base class, and a Keras optimizer.
    """

    slot_names: tuple[str, ...]
    variants: Mapping[str, Variant]
    schedule_class: type  # the flavour's LearningRateSchedule

    hyperparameters: Hyperparameters
    _plan: Plan | None

    # What a Keras optimizer has; declared for type checkers.
    clipnorm: float | None
    clipvalue: float | None
    global_clipnorm: float | None

    def __init__(self, arguments: dict[str, Any], base_arguments: dict[str, Any]) -> None:
        """Checks the arguments that both rules have, and constructs the Keras optimizer.

        Args:
            arguments: the rule's constructor arguments by name.
            base_arguments: others, which a newer Keras may have.
        """
        own = self._own_parameters()
        base = self._base_parameters()
        self._check_unknown(base_arguments, [*own, *base])
        given = arguments | {
            "learning_rate": rates.checked(arguments["learning_rate"], self.schedule_class),
            "weight_decay": check_interval("weight_decay", arguments["weight_decay"] or 0.0, 0),
            "trust_ratio_bounds": check_bounds(
                "trust_ratio_bounds", arguments["trust_ratio_bounds"]
            ),
        }
        check_choice("norm", given["norm"], norms.NORMS)
        check_choice("moment_dtype", given["moment_dtype"], MOMENT_DTYPES)
        check_choice("based_on", given["based_on"], (None, *self.variants))
        for flag in ("skip_nonfinite", "telemetry", "adapt_undecayed", "jit_compile", "use_ema"):
            given[flag] = bool(given[flag])
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
        super().__init__(**{name: given[name] for name in base if name in given} | base_arguments)
        self.hyperparameters = Hyperparameters(given)
        self._patterns = patterns
        self._plan = None

    @classmethod
    def _base_parameters(cls) -> dict[str, inspect.Parameter]:
        """The arguments of the flavour's optimizer, taken from its signature."""
        return _parameters(cls.__mro__[cls.__mro__.index(Layerwise) + 1 :])

    @classmethod
    def _own_parameters(cls) -> dict[str, inspect.Parameter]:
        """The arguments of the rule, and of a user's subclass."""
        return _parameters(cls.__mro__[: cls.__mro__.index(Layerwise)])

    def _check_unknown(self, arguments: dict[str, Any], known: Sequence[str]) -> None:
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
        """Constructor arguments are attributes, as in every Keras optimizer."""
        hyperparameters = self.__dict__.get("hyperparameters")
        if hyperparameters is not None and name in hyperparameters:
            return hyperparameters[name]
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        hyperparameters = self.__dict__.get("hyperparameters")
        if hyperparameters is not None and name in hyperparameters and name not in SETTABLE:
            setattr(hyperparameters, name, value)  # raises
        super().__setattr__(name, value)

    @classmethod
    def variant(cls, name: str, learning_rate: Any = 1e-3, **arguments: Any):
        """The optimizer with the arguments of a published variant, overridden by `arguments`.

        `based_on` names the variant, unless `arguments` make another rule of it.

        Args:
            name: one of `variants`.
            learning_rate: as in the constructor.
            **arguments: any other arguments of the constructor.

        Raises:
            ValueError: an unknown variant; the message lists them.
        """
        check_choice("variant", name, tuple(cls.variants))
        settings = cls.variants[name].arguments
        defaults = cls._own_parameters()

        def published(key):
            return settings[key] if key in settings else defaults[key].default

        changed = [
            key
            for key, value in arguments.items()
            if (key in settings or key in FORMULA) and plain(value) != plain(published(key))
        ]
        named = {"learning_rate": learning_rate, "based_on": None if changed else name}
        return cls(**named | settings | arguments)

    def _make_plan(self, names, shapes, dtypes, overwritten=None) -> tuple[VariablePlan, ...]:
        """A plan for each variable, from their paths, static shapes and names of dtypes."""
        for name, dtype in zip(names, dtypes, strict=True):
            if "float" not in dtype:
                raise ValueError(
                    f"{type(self).__name__} updates real floating-point variables. Received: "
                    f"{name!r} of dtype {dtype}. Leave it out of the list of variables."
                )
        plans = plan_variables(names, shapes, self._patterns, overwritten)
        if self.adapt_undecayed:
            return plans
        decays = self.weight_decay > 0
        return tuple(
            dataclasses.replace(plan, adapted=False, group=None)
            if not (plan.decayed and decays)
            else plan
            for plan in plans
        )

    def _rule(self):
        """The rule with its arguments, without the optimizer's variables: programs hold it."""
        kept = {k: v for k, v in self.hyperparameters.items() if k != "learning_rate"}
        if type(self).__module__.startswith("tf_lamb."):
            # LAMBRule or LARSRule: both flavours then share programs.
            owner = type(self).__mro__[1]
        else:
            owner = type(self)
            # A user's subclass may read plain attributes of its own.
            plain_types = (bool, int, float, str, tuple)
            own = {k: v for k, v in vars(self).items() if isinstance(v, plain_types)}
            kept |= {k: v for k, v in own.items() if k not in ("name", "built")}
        rule = object.__new__(owner)
        rule.__dict__["hyperparameters"] = Hyperparameters(kept)
        return rule

    # The rule, for one variable (or slice); LAMB and LARS define these.

    def scalars(self, t) -> dict[str, Any]:
        """Float32 scalars that the rule needs in update t, counted from 1: computed once."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def moments(self, g, x, slots, plan, rate):
        """The slots' new values; `rate` is η times the ratio where it stands inside them."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def direction(self, g, x, slots, scalars, plan):
        """The tensor whose norm divides the trust ratio."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def ratio(self, x_norm, u_norm, decay_norm):
        """The trust ratio, and what divided it (for telemetry)."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    def step(self, g, x, u, slots, rate, plan):
        """What is subtracted from x; `rate` is η times the ratio."""
        raise TypeError(f"{type(self).__name__} must define the methods of a rule.")

    @property
    def rate_inside(self) -> bool:
        """Whether the rate stands inside the moments, so that they follow the ratio."""
        return False

    # Clipping, skipping and dtypes, which are the same for every rule.

    @property
    def checks_finite_per_replica(self) -> bool:
        """Whether each replica may check its own gradients before they are summed.

        Clipping reads the gradients after the sum; then their finiteness costs nothing more.
        """
        clips = self.clipnorm or self.global_clipnorm or self.unit_gradient
        return self.skip_nonfinite and not clips

    def measure_gradients(self, grads, squares=None) -> Gradients:
        """One pass over all gradients: can they be used, and how are they clipped?

        Args:
            grads: list of float32 tensors, summed over the replicas.
            squares: for each gradient the sum of squares of its elements, or a number above it; a
                list of float32 scalars. None: it is computed here.
        """
        clip, total = self.clipnorm, self.global_clipnorm
        if not (self.skip_nonfinite or clip or total or self.unit_gradient):
            return Gradients(None, None, None)
        if self.skip_nonfinite:
            if squares is None:
                squares = [norms.sum_squares(g) for g in grads]
            finite = norms.is_finite(norms.added(squares))
            nonfinite = [0.0 * (norms.HEADROOM * s) for s in squares]  # 0·∞ is NaN
            norm = lambda some: ops.sqrt(norms.added([squares[i] for i in some]))  # noqa: E731
        else:
            finite = nonfinite = None
            grads = [norms.limited(g) for g in grads]
            norm = lambda some: norms.safe_norm([grads[i] for i in some])  # noqa: E731
        everything = range(len(grads))
        scales = None
        if clip:
            scales = [clip / ops.maximum(norm([i]), clip) for i in everything]
        elif total:
            scales = [total / ops.maximum(norm(everything), total)] * len(grads)
        elif self.unit_gradient:
            scales = [ops.divide_no_nan(1.0, norm(everything))] * len(grads)
        return Gradients(finite, scales, nonfinite)

    def update_layer(
        self, plans, grads, params, slots, learning_rate, finite, scales, scalars, *, measure
    ):
        """New values of the variables of one layer, which share a trust ratio.

        Args:
            plans: a `VariablePlan` for each variable. There is more than one only in a group.
            grads: a float tensor for each variable, summed over the replicas; None for a member
                of a group that has no gradient. It is not updated; the group's ‖x‖ contains it.
            params: list of float tensors, the variables' values, of any dtype.
            slots: for each variable the values of its slots, a tuple of float tensors.
            learning_rate: float32 scalar η.
            finite: boolean scalar; where it is False, all values are returned as they came in.
                None: they never are.
            scales: a float32 scalar for each gradient, or None.
            scalars: what `self.scalars` returned.
            measure: whether to measure a layer that is not adapted, too.

        Returns:
            `(params, slots, measured)`: lists like those that came in, and float32
            (‖x‖, ‖u‖, ratio), scalars or [.., 1, ..]; None where it was not measured.
        """

        def select(new, old):
            new = ops.cast(new, old.dtype)
            return new if finite is None else ops.where(finite, new, old)

        xs = [ops.cast(x, "float32") for x in params]
        gs = [None if g is None else ops.cast(g, "float32") for g in grads]
        moving = [i for i, g in enumerate(grads) if g is not None]
        for i in moving:
            if not self.skip_nonfinite:
                gs[i] = norms.limited(gs[i])
            if scales is not None:
                gs[i] = gs[i] * scales[i]
            if self.clipvalue is not None:
                gs[i] = ops.clip(gs[i], -self.clipvalue, self.clipvalue)
        new_slots, moments = list(slots), [_wide(own) for own in slots]

        def move_slots(rate):
            # What follows reads the values that are stored: a compiler can write over the old ones.
            for i in moving:
                moved = self.moments(gs[i], xs[i], moments[i], plans[i], rate)
                pairs = zip(moved, moments[i], strict=True)
                moments[i] = tuple(select(new, old) for new, old in pairs)
                pairs = zip(moments[i], slots[i], strict=True)
                new_slots[i] = tuple(ops.cast(new, old.dtype) for new, old in pairs)

        if not self.rate_inside:
            move_slots(1.0)
        u = {i: self.direction(gs[i], xs[i], moments[i], scalars, plans[i]) for i in moving}
        rate = learning_rate * scalars.get("rate", 1.0)
        measured = None
        if plans[0].adapted or measure:
            x_norm = norms.layer_norm(xs, self.norm, plans[0].axes)
            u_norm = norms.layer_norm(list(u.values()), self.norm, plans[0].axes)
            ratio, divisor = self.ratio(x_norm, u_norm, self._decay_norm(x_norm, xs, plans))
            if plans[0].adapted:
                rate = rate * ratio
            else:
                ratio = ops.ones((), "float32")
            measured = (x_norm, divisor, ratio)
        if self.rate_inside:
            move_slots(rate)
        new_params = list(params)
        for i in moving:
            delta = self.step(gs[i], xs[i], u[i], moments[i], rate, plans[i])
            new_params[i] = select(_descended(params[i], xs[i], delta), params[i])
        return new_params, new_slots, measured

    def _decay_norm(self, x_norm, xs, plans):
        """‖λx‖ of the layer; in a group, some members may not be decayed."""
        decays = [self.weight_decay if plan.decayed else 0.0 for plan in plans]
        if len(set(decays)) == 1:
            return decays[0] * x_norm
        return norms.layer_norm([d * x for d, x in zip(decays, xs, strict=True)], self.norm)

    def _updated(self, index, grads, params, slots, learning_rate, step):
        """New values of a whole model's variables and slots.

        Args:
            index: tuple of Python ints, positions of the variables that have a gradient.
            grads: list of float tensors, summed over the replicas, one for each position.
            params: list of float tensors, the values of all variables.
            slots: one list of float tensors for each of `slot_names`, of all variables.
            learning_rate, step: float32 scalars; `step` is 1 in the first update.

        Returns:
            `(values, finite, rows)`: the lists `(params, *slots)`; a boolean scalar, or None;
            {position: [3] float32 telemetry} of the variables at `index`, or None.
        """
        plan = self._built_plan()
        grads = [ops.cast(g, "float32") for g in grads]
        gradients = self.measure_gradients(grads)
        scalars = self.scalars(step)
        at = {i: place for place, i in enumerate(index)}
        values = [list(params), *(list(kind) for kind in slots)]
        rows: dict[int, Any] | None = {} if self.telemetry else None
        for layer in plan.layers(index):
            places = [at.get(i) for i in layer]
            scales = gradients.scales and [
                None if p is None else gradients.scales[p] for p in places
            ]
            new_params, new_slots, measured = self.update_layer(
                [plan.variables[i] for i in layer],
                [None if p is None else grads[p] for p in places],
                [params[i] for i in layer],
                [tuple(kind[i] for kind in slots) for i in layer],
                learning_rate,
                gradients.finite,
                scales,
                scalars,
                measure=self.telemetry,
            )
            for place, i, x, own in zip(places, layer, new_params, new_slots, strict=True):
                for kind, value in zip(values, (x, *own), strict=True):
                    kind[i] = value
                if rows is not None and place is not None:
                    rows[i] = telemetry_row(measured, gradients.nonfinite, place)
        return values, gradients.finite, rows

    @property
    def skipped_steps(self) -> int:
        """How many updates were skipped because a gradient was not finite."""
        return int(ops.convert_to_numpy(self._built_plan().skipped))

    @property
    def telemetry_rows(self):
        """[variables, 3] float32 NumPy array: ‖x‖, ‖u‖ and trust ratio of the last update.

        Raises:
            ValueError: the optimizer was made without `telemetry=True`.
        """
        rows = self._built_plan().telemetry
        if rows is None:
            raise ValueError(f"Make the optimizer with {type(self).__name__}(telemetry=True).")
        return ops.convert_to_numpy(rows)

    def _built_plan(self) -> Plan:
        if self._plan is None:
            raise ValueError(
                "This is known once the optimizer is built. Call "
                "`optimizer.build(model.trainable_variables)` first."
            )
        return self._plan

    @property
    def layers(self) -> tuple[VariablePlan, ...]:
        """What was decided for each variable, in the order the optimizer was built with."""
        return self._built_plan().variables

    def layer_table(self, print_fn: Callable[[str], object] = print) -> None:
        """Prints name, shape, whether decayed and adapted, and group, for each variable."""
        for line in table_lines(self.layers):
            print_fn(line)

    def __repr__(self) -> str:
        """The class with its flavour, and the arguments that are off their defaults."""
        own = self._own_parameters()
        base = self._base_parameters()
        shown = []
        for name, parameter in (base | own).items():
            if name == "name" and re.fullmatch(rf"{type(self).__name__}(_\d+)?", self.name, re.I):
                continue  # chosen by Keras
            if name not in base and name not in self.hyperparameters:
                continue  # an argument of a subclass
            value = getattr(self, name) if name in base else self.hyperparameters[name]
            value = rates.shown(self._learning_rate) if name == "learning_rate" else plain(value)
            if value != plain(parameter.default):
                shown.append(f"{name}={value!r}")
        return f"{base_name(type(self))}({', '.join(shown)})"

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        """Not supported: what this Keras method sets is lost when the optimizer is saved."""
        raise RuntimeError(
            "Exclusions are constructor data here, so that they are saved with the optimizer. "
            f"Write {type(self).__name__}(..., exclude_from_weight_decay=[patterns]). "
            f"Received: var_list={var_list}, var_names={var_names}."
        )

    def update_step(self, *unused_args, **unused_kwargs):
        """Not supported: `apply` updates all variables in one call."""
        raise RuntimeError(
            f"{type(self).__name__} updates all variables in one call. "
            "Call `optimizer.apply_gradients(grads_and_vars)`."
        )

    def _apply_weight_decay(self, variables):
        """Nothing: decay belongs inside the trust ratio, and the base would add it outside."""

    def _clip_gradients(self, grads):
        """Nothing: Keras 3 clips before the sum over replicas; `update_layer` clips after it."""
        return grads

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments as plain Python values."""
        config = {
            name: self.hyperparameters[name]
            for name in self._own_parameters()
            if name in self.hyperparameters
            and (name in self._base_parameters() or name not in KERAS_3_ONLY)
        }
        config |= super().get_config()  # type: ignore[misc]
        return {name: plain(value) for name, value in config.items()}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """The optimizer that `get_config` described, without its state."""
        return super().from_config(dict(config), custom_objects)


def _wide(tensors):
    return tuple(ops.cast(x, "float32") for x in tensors)


def _parameters(classes: Sequence[type]) -> dict[str, inspect.Parameter]:
    """Named parameters of the classes' own constructors; the first class's go before."""
    found: dict[str, inspect.Parameter] = {}
    for cls in classes:
        if cls is not object and "__init__" in vars(cls):
            for name, parameter in inspect.signature(vars(cls)["__init__"]).parameters.items():
                if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
                    found.setdefault(name, parameter)
    found.pop("self", None)
    return found


def _descended(x, x_32, delta):
    """x - δ in the wider of float32 and x's own dtype."""
    if "float64" in str(x.dtype):
        return x - ops.cast(delta, x.dtype)
    return x_32 - delta


def telemetry_row(measured, nonfinite, place):
    """[3] float32: ‖x‖, ‖u‖ and ratio; of slices, their means; ‖u‖ is NaN for a bad gradient."""
    x_norm, u_norm, ratio = (ops.mean(ops.cast(value, "float32")) for value in measured)
    if nonfinite is not None:
        u_norm = u_norm + nonfinite[place]
    return ops.stack([x_norm, u_norm, ratio])


def with_rows(telemetry, rows):
    """The telemetry ([variables, 3] tensor) with the rows of {position: [3]} replaced."""
    return ops.stack([rows[i] if i in rows else telemetry[i] for i in range(telemetry.shape[0])])


def base_name(cls) -> str:
    """`tf_lamb.LAMB` or `tf_lamb.tf_keras.LAMB`: the flavour is part of the name."""
    module = cls.__module__.removesuffix(".keras3")
    return f"{module}.{cls.__name__}"


def check_hooks(caller: Callable, *called: str) -> None:
    """Raises `RuntimeError` where a method of Keras does not call what is overridden.

    Args:
        caller: the method of the base class.
        *called: names of methods that it must call.
    """
    missing = [name for name in called if name not in inspect.unwrap(caller).__code__.co_names]
    if missing:
        raise RuntimeError(
            f"This version of Keras does not call `{missing[0]}` in `{caller.__qualname__}`; "
            "tf_lamb overrides it, and would silently give wrong results. Install a version of "
            "Keras that the documentation names, or a newer tf_lamb."
        )


def load_state(optimizer, store, variables) -> None:
    """Assigns what `save_own_variables` stored, as Keras does.

    Files of version 0.1.0 hold the number of skipped updates, and telemetry where it was on, after
    the state. They are not part of the state, and are not read.
    """
    count, rest = len(variables), len(store.keys()) - len(variables)
    shapes = [tuple(store[str(count + i)].shape) for i in range(max(rest, 0))]
    plans = () if optimizer._plan is None else optimizer._plan.variables
    observations = [(), (len(plans), 3)]
    fits = rest >= 0 and shapes == observations[:rest]
    if not fits:
        warnings.warn(
            f"Skipping variable loading for optimizer {optimizer.name!r}, because it has {count} "
            f"variables whereas the saved optimizer has {len(store.keys())} variables."
            + (
                " This is likely because the optimizer has not been called/built yet."
                if count <= 2
                else ""
            ),
            stacklevel=3,
        )
        return
    for i, variable in enumerate(variables):
        variable.assign(store[str(i)])
