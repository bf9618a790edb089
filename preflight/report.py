"""Shows the results of a pre-flight as text and as a picture."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GIB = 2**30
LEGEND = """
All figures are estimates. The compiler estimates memory, FLOPs, bytes, and the time of forward,
backward and update, with each operation at the chip's peak rate. The time of the all-reduce is
modelled as 2·bytes·(n-1)/n over a chip's links at their peak rate, plus 1 us per hop. Not included:
waiting for the host and for the slowest replica, random bits, evaluation, checkpoints and start-up.
Real kernels do not reach the peak rate."""

# Measured examples/s of one CPU core, from docs/results/text.md (`pairs` on two cores) and
# docs/results/images.md: task, sequence length or image size, examples/s, command.
EXAMPLES_PER_CORE = (
    ("bert", 128, 124_777 / 2, "benchmarks.inputs"),
    ("bert", 512, 51_511 / 2, "benchmarks.inputs"),
    ("resnet", 224, 653, "benchmarks.image_inputs"),
)


def describe(recipe, results) -> str:
    """Returns the report: a block per phase and topology, then times of the whole recipe.

    Args:
        recipe: a checked recipe.
        results: list of `preflight.run.PhaseResult`.
    """
    blocks = [f"Pre-flight {recipe.name}: {recipe.task} {recipe.model}, {recipe.compute_dtype}"]
    blocks += [_describe_phase(recipe, result) for result in results]
    blocks += _describe_recipe(results)
    return "\n".join([*blocks, LEGEND])


def _describe_phase(recipe, result) -> str:
    topology = result.topology
    head = (
        f"\nPhase {result.phase}: {result.steps:,} steps of {result.global_batch_size:,} on "
        f"{topology.name}, {topology.chips:,} chips, {topology.replicas:,} replicas"
    )
    lines = [head, _line("batch", _describe_batch(result))]
    if result.error:
        compiled = result.time is not None
        label = "kernels" if compiled else "compiles"
        return "\n".join([*lines, _line(label, f"NO: {result.error}")])
    return "\n".join([*lines, *_describe_figures(recipe, result)])


def _describe_figures(recipe, result):
    """Yields the lines of a phase that compiles."""
    topology = result.topology
    program = result.program
    time = result.time
    limit = topology.chip.hbm_bytes
    split = ", ".join(f"{name} {size / GIB:.2f}" for name, size in result.memory.items())
    intensity = program["flops"] / program["bytes_accessed"]
    floats = result.update["bytes_accessed"] / 4 / result.parameters
    yield _line("compiles", f"yes; {program['all_reduces']} all-reduces")
    if result.num_operations:
        yield _line(
            "kernels",
            f"TensorFlow has TPU kernels for all {result.num_operations} kinds of operation; "
            "forward and backward lower with them",
        )
    yield _line(
        "memory",
        f"{program['hbm_bytes'] / GIB:.2f} of {limit / GIB:.2f} GiB per replica: {split}",
    )
    yield _line(
        "work",
        f"{program['flops'] / 1e12:.3g} TFLOP, {program['bytes_accessed'] / 1e9:.3g} GB per "
        f"replica, {intensity:.0f} FLOP/byte: bound by {time.bound}; "
        f"{program['float32_products']} of {program['products']} products in float32",
    )
    yield _line(
        "step",
        f"{format_seconds(time.step)}: {format_seconds(time.compiler)} by the compiler, of which "
        f"the update takes {format_seconds(time.update)} ({time.update / time.compiler:.0%}, "
        f"{floats:.2f} floats moved per parameter); {result.utilization:.0%} of the peak FLOP/s",
    )
    yield _line(
        "all-reduce",
        f"{format_seconds(time.all_reduce)} for {program['all_reduce_bytes'] / 1e6:,.1f} MB over "
        f"{topology.links_per_chip} links of {topology.chip.link_bandwidth / 1e9:.0f} GB/s, "
        f"{topology.diameter} hops; {format_seconds(time.hideable)} could overlap with the "
        f"backward pass, {format_seconds(time.hidden)} does",
    )
    yield _line("input", _describe_input(recipe, result))
    yield _line("phase", f"{result.minutes:,.1f} minutes")


def _describe_input(recipe, result) -> str:
    topology = result.topology
    per_host = result.replica_batch_size * topology.replicas_per_host / result.time.step
    text = f"{per_host:,.0f} examples/s from each host of {topology.replicas_per_host} replicas"
    phase = recipe.phases[result.phase - 1]
    length = getattr(phase, "sequence_length", getattr(recipe, "image_size", None))
    for task, size, per_core, command in EXAMPLES_PER_CORE:
        if (recipe.task, length) == (task, size):
            text += f": {per_host / per_core:.2g} CPU cores, at the rate that {command} measured"
    return text


def _describe_batch(result) -> str:
    text = f"{result.replica_batch_size:,} per replica"
    if result.accumulation and result.accumulation > 1:
        text += f", in {result.accumulation} micro-batches"
    if result.largest is not None:
        text += f"; the largest tried that fits is {result.largest:,}"
    return text


def _line(name: str, text: str) -> str:
    return f"  {name:10} {text}"


def format_seconds(seconds: float) -> str:
    """Returns a time as text, such as "1.23 s" or "45.6 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def whole_minutes(results) -> dict[str, float]:
    """Returns the minutes of all phases, by topology name.

    A topology for which a phase does not compile is left out.
    """
    minutes = {}
    for result in results:
        minutes.setdefault(result.topology.name, []).append(result.minutes)
    return {name: sum(parts) for name, parts in minutes.items() if None not in parts}


def efficiencies(results) -> dict[str, float]:
    """Returns the speed per chip, relative to the smallest slice of that chip, by topology name."""
    minutes = whole_minutes(results)
    chips = {result.topology.name: result.topology.chips for result in results}
    efficiency = {}
    for name in minutes:
        kind = name.split(":")[0]
        smallest = min((n for n in minutes if n.split(":")[0] == kind), key=chips.get)
        efficiency[name] = minutes[smallest] * chips[smallest] / (minutes[name] * chips[name])
    return efficiency


def _describe_recipe(results):
    minutes = whole_minutes(results)
    efficiency = efficiencies(results)
    lines = ["\nWhole recipe"] if minutes else []
    for name, value in minutes.items():
        line = f"{value:,.1f} minutes"
        if efficiency[name] != 1:
            line += f", efficiency {efficiency[name]:.1%} relative to the smallest slice"
        lines.append(_line(name, line))
    return lines


def draw(recipe, results, path: str) -> None:
    """Writes a PNG with three panels: memory, time of a step, efficiency.

    Args:
        recipe: a checked recipe.
        results: list of `preflight.run.PhaseResult`.
        path: the file to write.
    """
    compiled = [result for result in results if result.time]
    labels = [f"{r.topology.name}\nphase {r.phase}" for r in compiled]
    size = (max(9, 1.2 * len(compiled) + 5), 9)
    figure, (memory, time, scaling) = plt.subplots(3, figsize=size, layout="constrained")
    memory.set_title(f"Pre-flight {recipe.name}")
    _draw_stacks(memory, labels, [_gib(r.memory) for r in compiled])
    for place, result in enumerate(compiled):
        limit = result.topology.chip.hbm_bytes / GIB
        memory.hlines(limit, place - 0.4, place + 0.4, "black", label="" if place else "HBM")
    memory.set_ylabel("GiB per replica")
    _draw_stacks(time, labels, [_milliseconds(r.time) for r in compiled])
    time.set_ylabel("ms per step, estimated")
    _draw_efficiency(scaling, results)
    for panel in (memory, time, scaling):
        if panel.get_legend_handles_labels()[0]:
            panel.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_efficiency(panel, results):
    efficiency = efficiencies(results)
    chips = {r.topology.name: r.topology.chips for r in results}
    for kind in sorted({name.split(":")[0] for name in efficiency}):
        line = sorted(
            (chips[name], 100 * value)
            for name, value in efficiency.items()
            if name.startswith(f"{kind}:")
        )
        panel.plot(*zip(*line, strict=True), marker="o", label=kind)
    panel.set(xlabel="chips", ylabel="speed per chip, %", xscale="log", ylim=(0, 110))


def _gib(memory):
    return {name: size / GIB for name, size in memory.items()}


def _milliseconds(time):
    """Returns the parts of a step, in milliseconds. They add up to its time."""
    compute = min(time.compute, time.compiler - time.update)
    parts = {
        "compute": compute,
        "waiting for memory": time.compiler - time.update - compute,
        "optimizer": time.update,
        "all-reduce": time.all_reduce - time.hidden,
    }
    return {name: 1e3 * seconds for name, seconds in parts.items()}


def _draw_stacks(panel, labels, rows):
    """Draws one stacked bar per row, a dict from the name of a part to its height."""
    bottom = [0.0] * len(rows)
    for name in rows[0] if rows else ():
        heights = [row[name] for row in rows]
        panel.bar(range(len(rows)), heights, 0.6, bottom, label=name)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    panel.set_xticks(range(len(labels)), labels)
