"""Shows the results of a pre-flight as text."""

from preflight.estimate import all_reduce_seconds

GIB = 2**30
MIB = 2**20
LEGEND = """
All figures are estimates, and times are lower bounds. Memory and FLOPs are the compiler's. Bytes of
HBM are counted in the compiled program. The time of forward, backward and update is the compiler's
for v2 and v3. From v4 on, the compiler counts the traffic of on-chip memory as if it were that of
HBM, so the time is modeled: each operation takes its FLOPs at the chip's peak rate or its HBM bytes
at the peak bandwidth, whichever is longer, and copies run beside them. The time of the all-reduce
is modeled as 2·bytes·(n-1)/n over a chip's links at their peak rate, plus 1 us per hop. Not
included: waiting for the host and for the slowest replica, random bits, evaluation, checkpoints and
start-up. Real kernels do not reach the peak rate."""

EXAMPLE = """
The data is an example of a few random words or images. Give the real one with --data_dir, without
--synthetic, to check which of its files a host could not open, and at what rate it is read."""

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
    if any(result.data and result.data.is_example for result in results):
        blocks.append(EXAMPLE)
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
        return "\n".join([*lines, _line(label, f"NO: {result.error}"), *_describe_data(result)])
    return "\n".join([*lines, *_describe_figures(recipe, result)])


def _describe_figures(recipe, result):
    """Yields the lines of a phase that compiles."""
    topology = result.topology
    program = result.program
    time = result.time
    limit = topology.chip.hbm_bytes
    split = ", ".join(f"{name} {format_bytes(size)}" for name, size in result.memory.items())
    intensity = program["flops"] / program["main_bytes"]
    yield _line("compiles", f"yes; {program['all_reduces']} all-reduces")
    if result.num_operations:
        yield _line(
            "kernels",
            f"TensorFlow has TPU kernels for all {result.num_operations} kinds of operation; "
            "forward and backward lower with them",
        )
    memory = f"{format_bytes(program['hbm_bytes'])} of {format_bytes(limit)} per replica: {split}"
    if program["hbm_bytes"] > limit:
        memory += (
            "; the sum is larger than HBM, but the compiler, which reuses the memory of arguments "
            "for temporaries, accepts the program"
        )
    yield _line("memory", memory)
    yield _line(
        "work",
        f"{program['flops'] / 1e12:.3g} TFLOP, {program['main_bytes'] / 1e9:.3g} GB of HBM traffic "
        f"per replica{_describe_compiler_bytes(result)}, {intensity:.0f} FLOP/byte: bound by "
        f"{time.bound}; {program['float32_products']} of {program['num_products']} products in "
        "float32",
    )
    yield _line("step", _describe_step(result))
    yield _line(
        "all-reduce",
        f"{format_seconds(time.all_reduce)} for {program['all_reduce_bytes'] / 1e6:,.1f} MB over "
        f"{topology.links_per_chip} links of {topology.chip.link_bandwidth / 1e9:.0f} GB/s"
        f"{_describe_other_links(topology, program['all_reduce_bytes'])}, "
        f"{topology.diameter} hops; {format_seconds(time.hideable)} could overlap with the "
        f"backward pass, {format_seconds(time.hidden)} does",
    )
    yield _line("input", _describe_input(recipe, result))
    yield from _describe_data(result)
    yield _line("phase", format_minutes(result.minutes))


def _describe_other_links(topology, num_bytes) -> str:
    """Returns the time of the all-reduce by another published rate of the links, in brackets."""
    other = topology.chip.other_link_bandwidth
    if other == topology.chip.link_bandwidth or topology.chips == 1:
        return ""
    seconds = format_seconds(all_reduce_seconds(topology, num_bytes, other))
    return f" ({seconds} at {other / 1e9:.0f} GB/s, which is published, too)"


def _describe_compiler_bytes(result) -> str:
    """Returns the compiler's count of bytes in brackets, where it is not that of HBM."""
    if result.time.source == "compiler":
        return ""
    accessed = result.program["bytes_accessed"] / 1e9
    return f" (by the compiler {accessed:.3g} GB, with on-chip memory)"


def _describe_step(result) -> str:
    time = result.time
    floats = f"{result.floats_per_parameter:.2f} floats per parameter"
    whose = "by the compiler"
    if time.source != "compiler":
        whose = f"by the model of HBM and products (by the compiler {format_seconds(time.compiler)}"
        whose += ", with on-chip memory)"
        floats += f" (by the compiler {result.compiler_floats_per_parameter:.2f})"
    if time.update:
        share = (
            f"{format_seconds(time.update)} ({time.update / time.work:.0%}): its time alone, but "
            "at most what the products of forward and backward leave"
        )
    else:  # the products of forward and backward pass take as long as all traffic
        share = "no time of its own, as its traffic runs beside the products"
    return (
        f"{format_seconds(time.step)} at the least: {format_seconds(time.work)} {whose}, of which "
        f"the update takes {share}; compiled alone, it moves {floats}; {result.utilization:.0%} of "
        "the peak FLOP/s"
    )


def _describe_input(recipe, result) -> str:
    topology = result.topology
    per_host = result.examples_per_host
    text = f"{per_host:,.0f} examples/s from each host of {topology.replicas_per_host} replicas"
    phase = recipe.phases[result.phase - 1]
    if result.data and result.data.examples_per_core:
        per_core = result.data.examples_per_core
        return text + (
            f": {per_host / per_core:.2g} CPU cores, at {per_core:,.0f} examples/s per core, which "
            "this machine made of the data at the least"
        )
    # The measured rates are of single sequences.
    if getattr(recipe, "sequences_per_example", 1) > 1:
        return text
    length = getattr(phase, "sequence_length", getattr(recipe, "image_size", None))
    for task, size, per_core, command in EXAMPLES_PER_CORE:
        if (recipe.task, length) == (task, size):
            text += f": {per_host / per_core:.2g} CPU cores, at the rate that {command} measured"
    return text


def _describe_data(result):
    """Yields the lines about a host's data set."""
    if not result.data:
        return
    graph = result.data.graph
    if graph:
        read = f"read by {result.data.hosts:,} host(s)"
        if result.data.is_example:
            read = "example data"
        yield _line(
            "data",
            f"{read}; {len(graph.operations)} kinds of operation, "
            f"largest tensor {graph.largest_constant:,} bytes",
        )
    if graph and graph.mounted and result.data.hosts > 1:
        yield _line("mounts", f"every host must have {', '.join(graph.mounted)}")
    for problem in result.data.problems:
        yield _line("data", f"NO: {problem}")


def _describe_batch(result) -> str:
    text = f"{result.replica_batch_size:,} per replica"
    if result.accumulation and result.accumulation > 1:
        text += f", in {result.accumulation} micro-batches"
    if result.largest is not None:
        text += f"; the largest tried that fits is {result.largest:,}"
    if result.search_error:
        text += f"; the search for a larger one ended early: {result.search_error}"
    return text


def _line(name: str, text: str) -> str:
    return f"  {name:10} {text}"


def format_seconds(seconds: float) -> str:
    """Returns a time as text, such as "1.23 s" or "45.6 ms"."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def format_minutes(minutes: float) -> str:
    """Returns a time as text: in minutes, or in seconds if it is less than a minute."""
    return f"{minutes:,.1f} minutes" if minutes >= 1 else f"{minutes * 60:.3g} s"


def format_bytes(size: float) -> str:
    """Returns an amount of memory as text, such as "1.23 GiB" or "45.6 MiB"."""
    return f"{size / GIB:.2f} GiB" if size >= GIB / 10 else f"{size / MIB:.3g} MiB"


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
        line = format_minutes(value)
        if efficiency[name] != 1:
            line += f", efficiency {efficiency[name]:.1%} relative to the smallest slice"
        lines.append(_line(name, line))
    return lines
