"""The findings of a pre-flight in words."""

GIB = 2**30
LEGEND = """
Estimates. The compiler's: memory, FLOPs, bytes, and the time of forward, backward and update, each
operation at the chip's peak. A model's: the sum over the replicas, 2·bytes·(n-1)/n over a chip's
links at their peak, and 1 us a hop. Left out: waiting for the host and for the slowest replica,
random bits, evaluation, saving, start-up, and what a real kernel loses against the peak."""

# Examples/s that a core made: docs/results/text.md (`pairs`) and images.md, on two cores.
CORE_RATES = (
    ("bert", 128, 124_777 / 2, "benchmarks.inputs"),
    ("bert", 512, 51_511 / 2, "benchmarks.inputs"),
    ("resnet", 224, 653, "benchmarks.image_inputs"),
)


def in_words(recipe, findings) -> str:
    """All findings: a block for each phase and topology, the whole recipe, efficiency."""
    blocks = [f"Pre-flight {recipe.name}: {recipe.task} {recipe.model}, {recipe.compute_dtype}"]
    blocks += [_block(recipe, finding) for finding in findings]
    blocks += _whole(findings)
    return "\n".join([*blocks, LEGEND])


def _block(recipe, finding) -> str:
    topology = finding.topology
    head = (
        f"\nPhase {finding.phase}: {finding.steps:,} steps of {finding.global_batch_size:,} on "
        f"{topology.name}, {topology.chips:,} chips, {topology.replicas:,} replicas"
    )
    lines = [head, _line("batch", _batch(finding))]
    if finding.error:
        by_kernels = finding.time is not None  # the compiler took it
        label = "kernels" if by_kernels else "compiles"
        return "\n".join([*lines, _line(label, f"NO: {finding.error}")])
    return "\n".join([*lines, *_figures(recipe, finding)])


def _figures(recipe, finding):
    topology, program, time = finding.topology, finding.program, finding.time
    limit = topology.generation.hbm_bytes
    split = ", ".join(f"{name} {size / GIB:.2f}" for name, size in finding.memory.items())
    intensity = program["flops"] / program["bytes_accessed"]
    floats = finding.update["bytes_accessed"] / 4 / finding.parameters
    yield _line("compiles", f"yes; {program['all_reduces']} sums over the replicas")
    if finding.operations:
        yield _line(
            "kernels",
            f"TensorFlow's own for TPUs have all {finding.operations} kinds of operation; forward "
            "and backward lower with them",
        )
    yield _line(
        "memory", f"{program['hbm_bytes'] / GIB:.2f} of {limit / GIB:.2f} GiB a replica: {split}"
    )
    yield _line(
        "work",
        f"{program['flops'] / 1e12:.3g} TFLOP, {program['bytes_accessed'] / 1e9:.3g} GB a replica, "
        f"{intensity:.0f} FLOP/byte: bound by {time.bound}; {program['float32_products']} of "
        f"{program['products']} products in float32",
    )
    yield _line(
        "step",
        f"{_time(time.step)}: {_time(time.compiler)} by the compiler, of it the update "
        f"{_time(time.update)} ({time.update / time.compiler:.0%}, {floats:.2f} floats moved a "
        f"parameter); FLOP/s {finding.utilisation:.0%} of the peak",
    )
    yield _line(
        "all-reduce",
        f"{_time(time.all_reduce)} for {program['all_reduce_bytes'] / 1e6:,.1f} MB over "
        f"{topology.link_ends} links of {topology.generation.link_bandwidth / 1e9:.0f} GB/s, "
        f"{topology.hops} hops; {_time(time.hideable)} could hide behind the backward pass, "
        f"{_time(time.hidden)} does",
    )
    yield _line("input", _input(recipe, finding))
    yield _line("phase", f"{finding.minutes:,.1f} minutes")


def _input(recipe, finding) -> str:
    topology = finding.topology
    rate = finding.replica_batch_size * topology.replicas_per_host / finding.time.step
    text = f"{rate:,.0f} examples/s from each host of {topology.replicas_per_host}"
    phase = recipe.phases[finding.phase - 1]
    length = getattr(phase, "sequence_length", getattr(recipe, "image_size", None))
    for task, size, of_core, command in CORE_RATES:
        if (recipe.task, length) == (task, size):
            text += f": {rate / of_core:.2g} cores as fast as those where {command} was run"
    return text


def _batch(finding) -> str:
    text = f"{finding.replica_batch_size:,} a replica"
    if finding.accumulation and finding.accumulation > 1:
        text += f", in {finding.accumulation} micro-batches"
    if finding.largest is not None:
        text += f"; the largest tried that fits is {finding.largest:,}"
    return text


def _line(name: str, text: str) -> str:
    return f"  {name:10} {text}"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def whole_minutes(findings) -> dict[str, float]:
    """Topology's name: minutes of all phases, where all of them compile."""
    minutes = {}
    for finding in findings:
        minutes.setdefault(finding.topology.name, []).append(finding.minutes)
    return {name: sum(parts) for name, parts in minutes.items() if None not in parts}


def efficiencies(findings) -> dict[str, float]:
    """Topology's name: speed a chip over that of the smallest of its kind; whole recipe."""
    minutes, chips, result = whole_minutes(findings), {}, {}
    for finding in findings:
        chips.setdefault(finding.topology.name, finding.topology.chips)
    for name in minutes:
        kind = name.split(":")[0]
        least = min((n for n in minutes if n.split(":")[0] == kind), key=chips.get)
        result[name] = minutes[least] * chips[least] / (minutes[name] * chips[name])
    return result


def _whole(findings):
    minutes, efficiency = whole_minutes(findings), efficiencies(findings)
    lines = ["\nWhole recipe"] if minutes else []
    for name, value in minutes.items():
        line = f"{value:,.1f} minutes"
        if efficiency[name] != 1:
            line += f", efficiency {efficiency[name]:.1%} against the smallest"
        lines.append(_line(name, line))
    return lines
