"""The pre-flight: results without a compiler, and with the TPU compiler on small recipes."""

import ast
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest

import recipes
from inputs.errors import InputError
from inputs.storage import files
from preflight import document, picture, plan, report
from preflight import run as preflight
from preflight.compiler import children as preflight_children
from preflight.compiler.topology import parse_topologies
from preflight.data import DataResult
from recipes import mlperf

ROOT = pathlib.Path(__file__).parents[2]
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "libtpu")),
    reason="JAX and libtpu, the extra `preflight`, are not installed",
)
FIELDS = (
    "phase topology replicas compiles error replica_batch_size accumulation search_error "
    "hbm_bytes hbm_limit_bytes flops main_memory_bytes bytes_accessed update_bytes_per_parameter "
    "compiler_update_bytes_per_parameter seconds_by work_seconds compiler_seconds all_reduce_bytes "
    "all_reduce_seconds step_seconds phase_minutes examples_per_host examples_per_core "
    "data_is_example data_problems"
).split()


def test_a_batch_that_does_not_divide_is_an_error_that_suggests_one_that_does():
    recipe = recipes.find_recipe("bert-mini-demo")
    with pytest.raises(
        InputError, match="batch of 64 does not divide by 2048.*Try --global_batch_size=2048"
    ):
        (pod,) = parse_topologies("v3-2048")
        preflight.replica_batch_size(recipe, recipe.phases[0], pod)


class Compiler:
    """Replaces `Children`: memory grows with the batch, and nothing compiles for v2."""

    def __init__(self, progress, folder):
        self.facts = {"parameters": 1000, "weight_bytes": 4000, "slot_bytes": 8000}

    def lower(self, recipe, phase_index, programs):
        pass

    def compile(self, phase_index, batch, accumulation, topology, *, quick):
        if topology.startswith("v2"):
            return {"error": "no kernel for Foo"}
        examples = 0 if batch is None else batch // accumulation
        accumulated_gradients = 9 if accumulation > 1 else 0
        needed = 12_000 + (examples + accumulated_gradients) * 2**30
        if needed > 15 * 2**30:
            return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": needed}
        return {
            "hbm_bytes": needed,
            "argument_bytes": 12_000,
            "temporary_bytes": 9_000,
            "code_bytes": 9,
            "flops": 1e9,
            "bytes_accessed": 1e9,
            "main_bytes": 1e9,
            "copied_bytes": 0,
            "products": [],
            "seconds": 0.1,
            "all_reduce_bytes": 4000,
            "all_reduces": 1,
            "asynchronous": 0,
            "num_products": 9,
            "float32_products": 0,
        }


def test_errors_are_rows_and_accumulated_gradients_need_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    recipe = recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=240)
    path = tmp_path / "rows.json"
    assert preflight.run(recipe, "v2:2x2,v3:2x2", json_path=str(path), log=print) == 1
    v2, v3 = json.loads(path.read_text())
    assert not v2["compiles"] and v2["error"] == "no kernel for Foo"
    # The search finds that 8 of 30 examples fit, so it tries micro-batches of 6. Together with the
    # accumulated gradients, only 5 examples fit.
    assert v3["compiles"] and (v3["replica_batch_size"], v3["accumulation"]) == (30, 6)
    assert "NO: no kernel for Foo" in capsys.readouterr().out


def test_lanes_that_hosts_cannot_share_need_no_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    demo = recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=96)
    path = tmp_path / "rows.json"
    rows = {}
    for lanes in (None, 3):
        recipe = dataclasses.replace(demo, lanes=lanes)
        topologies = "v3:2x2,v3:4x4"
        status = preflight.run(recipe, topologies, json_path=str(path), log=print, search=False)
        assert status == (lanes == 3)
        rows[lanes] = [row["data_problems"] for row in json.loads(path.read_text())]
    assert rows[None] == [[], []]
    (problem,) = rows[3][1]
    assert rows[3][0] == [] and "--set lanes=3: 4 hosts cannot share 3 lanes" in problem
    assert f"NO: {problem}" in capsys.readouterr().out


def test_the_search_leaves_out_slow_optimizations_and_the_step_does_not(monkeypatch):
    compiled = []

    class Recorder(Compiler):
        def compile(self, phase_index, batch, accumulation, topology, *, quick):
            compiled.append((batch, accumulation, quick))
            return super().compile(phase_index, batch, accumulation, topology, quick=quick)

    monkeypatch.setattr(preflight, "Children", Recorder)
    (result,) = preflight.examine(
        recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=120),
        parse_topologies("v3:2x2"),
        progress=preflight_children.ProgressLines(lambda line: None),
        search=True,
    )
    assert (result.largest, result.accumulation, result.error) == (8, 3, None)
    update, recipe, search, micro_batch, step = compiled
    assert update == (None, 1, False)
    assert recipe == (15, 1, False)
    assert search == (8, 1, True)
    assert (micro_batch, step) == ((5, 1, False), (15, 3, False))


def test_a_batch_that_only_the_search_found_to_fit_is_split(monkeypatch):
    class Generous(Compiler):
        def compile(self, phase_index, batch, accumulation, topology, *, quick):
            if not quick and accumulation == 1 and batch == 40:
                return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": 2**40}
            found = super().compile(phase_index, 1, 1, topology, quick=quick)
            return found | {"hbm_bytes": 2**20 * (batch or 1)}

    monkeypatch.setattr(preflight, "Children", Generous)
    (result,) = preflight.examine(
        recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=320),
        parse_topologies("v3:2x2"),
        progress=preflight_children.ProgressLines(lambda line: None),
        search=True,
    )
    assert (result.replica_batch_size, result.accumulation, result.error) == (40, 2, None)


@pytest.mark.parametrize("micro_batch", [8, 40])
@pytest.mark.parametrize("how", ["lower", "compile"])
def test_a_crash_of_the_search_costs_no_result(monkeypatch, how, micro_batch):
    """Batches above 40 crash the compiler, or the process that traces them."""

    class Crashing(Compiler):
        def lower(self, recipe, phase_index, programs):
            if how == "lower" and any(batch and batch > 40 for batch, _ in programs):
                raise preflight_children.ChildFailed("tracing: killed by SIGABRT")

        def compile(self, phase_index, batch, accumulation, topology, *, quick):
            if batch and batch > 40:
                return {"error": "compiling: killed by SIGABRT"}
            return super().compile(phase_index, 1, 1, topology, quick=quick)

    monkeypatch.setattr(preflight, "Children", Crashing)
    recipe = recipes.find_recipe("bert-mini-demo")
    recipe = recipes.resized(recipe, global_batch_size=8 * micro_batch)
    (result,) = preflight.examine(
        recipe,
        parse_topologies("v3:2x2"),
        progress=preflight_children.ProgressLines(lambda line: None),
        search=True,
    )
    assert (result.accumulation, result.error) == (1, None) and result.time
    assert result.largest == min(micro_batch, 32)
    assert result.search_error.endswith("killed by SIGABRT")
    ended = f"the largest tried that fits is {result.largest}; the search for a larger one ended"
    assert f"{ended} early: {result.search_error}" in report.describe(recipe, [result])
    assert f"| at least {result.largest} |" in document.format_row("a", result)
    assert result.to_json()["search_error"] == result.search_error


def test_each_slice_is_compiled_as_itself(monkeypatch):
    compiled = []

    class Recorder(Compiler):
        def compile(self, phase_index, batch, accumulation, topology, *, quick):
            compiled.append((batch, topology))
            return super().compile(phase_index, batch, accumulation, topology, quick=quick)

    monkeypatch.setattr(preflight, "Children", Recorder)
    results = preflight.examine(
        recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=64),
        parse_topologies("v3-8,v3-32,v5e-4"),
        progress=preflight_children.ProgressLines(lambda line: None),
        search=False,
    )
    assert [result.replica_batch_size for result in results] == [8, 2, 16]
    # The update, which does not communicate, is compiled once for each kind of chip.
    steps = [(8, "v3:2x2"), (2, "v3:4x4"), (16, "v5e:2x2")]
    assert sorted(compiled, key=str) == sorted(
        [(None, "v3:2x2"), (None, "v5e:2x2"), *steps], key=str
    )


def test_results_are_written_to_object_storage(ram, monkeypatch):
    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    recipe = recipes.find_recipe("bert-mini-demo")
    assert preflight.run(recipe, "v3:2x2", json_path=f"{ram}/new/rows.json", log=print) == 0
    assert [row["topology"] for row in files.read_json(f"{ram}/new/rows.json")]
    assert files.read_file(f"{ram}/new/rows.png").startswith(b"\x89PNG")
    with pytest.raises(InputError, match="preflight_json=foo://a/b.json: .* no file system for"):
        preflight.run(recipe, "v3:2x2", json_path="foo://a/b.json", log=pytest.fail)


@pytest.mark.parametrize("name", ["nowhere/rows.json", "rows.png", "rows.PNG"])
def test_an_unwritable_json_path_is_an_error_before_compilation(tmp_path, monkeypatch, name):
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    with pytest.raises(InputError, match=f"preflight_json=.*{name}"):
        recipe = recipes.find_recipe("bert-mini-demo")
        preflight.run(recipe, "v3:2x2", json_path=str(tmp_path / name), log=pytest.fail)


@pytest.mark.parametrize("name", ["folder", "rows"])
def test_a_folder_instead_of_a_json_file_is_an_error_before_compilation(
    tmp_path, monkeypatch, name
):
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.png").mkdir()  # the picture's name
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    with pytest.raises(InputError, match=f"preflight_json=.*{name}.* is a folder. Give the name"):
        recipe = recipes.find_recipe("bert-mini-demo")
        preflight.run(recipe, "v3:2x2", json_path=str(tmp_path / name), log=pytest.fail)


@pytest.mark.parametrize(
    ("main", "arguments"),
    [
        (document.main, ["bert-mini-demo", "--output={}"]),
        (plan.main, ["--recipe=mlperf-bert", "--topology=v3-2048", "--picture={}"]),
    ],
)
@pytest.mark.parametrize(("name", "said"), [("no/x.png", "no folder"), ("", "is a folder")])
def test_a_bad_output_of_other_commands_is_said_before_compilation(
    tmp_path, monkeypatch, capsys, main, arguments, name, said
):
    monkeypatch.setattr(preflight, "examine", pytest.fail)
    path = str(tmp_path / name)
    assert main([argument.format(path) for argument in arguments]) == 1
    assert f"={path}: " in (error := capsys.readouterr().err) and said in error


def test_ctrl_c_while_the_report_is_made_says_the_same(monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    monkeypatch.setattr(report, "describe", interrupt)
    lines = []
    recipe = recipes.find_recipe("bert-mini-demo")
    assert preflight.run(recipe, "v3:2x2", json_path="", log=lines.append) == 130
    assert "stopped" in lines[-1] and "checkpoint" not in lines[-1]


def test_both_published_rates_of_the_links_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    recipe = recipes.find_recipe("bert-mini-demo")
    assert preflight.run(recipe, "v3:2x2", json_path="", log=lambda line: None) == 0
    said = capsys.readouterr().out
    assert re.search(r"links of 100 GB/s \([\d.]+ .?s at 70 GB/s, which is published, too\)", said)


def test_ctrl_c_says_what_is_kept(tmp_path, monkeypatch, capsys):
    def interrupt(self, recipe, phase_index, programs):
        raise KeyboardInterrupt

    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(Compiler, "lower", interrupt)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    lines = []
    recipe = recipes.find_recipe("bert-mini-demo")
    path = tmp_path / "rows.json"
    assert preflight.run(recipe, "v3:2x2", json_path=str(path), log=lines.append) == 130
    assert "stopped" in lines[-1] and "same command goes on" in lines[-1]
    assert "checkpoint" not in lines[-1] and not path.exists() and not capsys.readouterr().out


def test_short_recipes_are_told_in_seconds_and_mib():
    assert report.format_minutes(0.0862) == "5.17 s"
    assert report.format_minutes(34.83) == "34.8 minutes"
    assert report.format_bytes(30 * 2**20) == "30 MiB"
    assert report.format_bytes(13.68 * 2**30) == "13.68 GiB"


def find_texts(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_the_picture_shows_what_does_not_compile_and_shares_of_hbm(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "Children", Compiler)
    drawn = []
    monkeypatch.setattr(picture.plt, "close", drawn.append)
    recipe = recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=64)

    def draw(topologies, data=None):
        results = preflight.examine(
            recipe,
            parse_topologies(topologies),
            progress=preflight_children.ProgressLines(print),
            search=False,
        )
        results[-1] = dataclasses.replace(results[-1], data=data)
        picture.draw(recipe, results, str(tmp_path / "picture.png"))
        return drawn[-1]

    figure = draw("v2:2x2,v3:2x2,v4:2x2x2")
    memory, time, minutes = figure.axes
    names = [label.get_text() for label in memory.get_xticklabels()]
    assert names == ["v2:2x2", "v3:2x2", "v4:2x2x2"]
    texts = find_texts(figure)
    assert "(1)" in texts and texts.count("cannot\nrun") == 2
    assert figure.get_supxlabel() == "(1) no kernel for Foo"
    hatched = [bar for bar in memory.patches if bar.get_hatch()]
    assert len(hatched) == 1 and hatched[0].get_height() == 100
    # 8 examples of 1 GiB and 12,000 bytes of the 15.48 GiB of a v3 core.
    assert "8.00 GiB\n51.7 %" in texts
    assert minutes.get_ylabel() == "minutes of the phase" and time.get_ylabel() == "ms per step"
    colors = [*picture.MEMORY_COLORS.values(), *picture.TIME_COLORS.values(), picture.TOTAL_COLOR]
    assert len(set(colors)) == len(colors)
    several = draw("v3:2x2,v3:4x4,v4:2x2x2")
    assert len(several.axes) == 4
    sizes = [label.get_text() for label in several.axes[-1].get_xticklabels()]
    assert sizes == ["4", "16"]
    refused = draw("v2:2x2,v3:4x4", DataResult(4, None, ("a path of one machine",), None))
    labels = refused.axes[0].get_xticklabels()
    assert [label.get_text() for label in labels] == ["v2:2x2", "v3:4x4\ndata: see report"]
    assert [label.get_color() for label in labels] == ["black", picture.FAILED_COLOR]
    monkeypatch.undo()
    for figure in drawn:
        picture.plt.close(figure)


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Returns `(topologies, compile, batch) -> figure` of a pre-flight with this compiler."""
    monkeypatch.setattr(preflight, "Children", Compiler)
    drawn = []

    def examine(topologies, compile, batch):
        monkeypatch.setattr(Compiler, "compile", compile)
        results = preflight.examine(
            recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=batch),
            parse_topologies(topologies),
            progress=preflight_children.ProgressLines(lambda line: None),
            search=False,
        )
        picture.draw(results=results, recipe=recipes.find_recipe("bert-mini-demo"), path=path)
        return drawn[-1]

    path = str(tmp_path / "picture.png")
    with monkeypatch.context() as patch:
        patch.setattr(picture.plt, "close", drawn.append)
        yield examine
    for figure in drawn:
        picture.plt.close(figure)


def test_reasons_are_below_the_panels_and_take_no_room_from_them(draw):
    reasons = {"v3:2x2": "no $\\foo$", "v3:4x4": "x" * 600, "v4:2x2x1": "no $\\foo$"}

    def fail(self, phase_index, batch, accumulation, topology, *, quick):
        return {"error": reasons[topology]}

    figure = draw(",".join(reasons), fail, 64)
    first, *others = figure.get_supxlabel().splitlines()
    assert first == "(1) no $\\foo$" and others[0].startswith("(2) xxx")
    assert others[-1].endswith("x ...") and len(others) > 2
    numbers = [text for text in find_texts(figure) if text.startswith("(")]
    assert numbers == ["(1)", "(2)", "(1)"]
    figure.draw_without_rendering()
    lowest = figure.axes[-1].get_tightbbox().y0
    assert lowest >= figure._supxlabel.get_window_extent().y1


def test_a_bar_that_is_cut_says_so_and_nothing_has_no_scale(draw):
    def too_large(self, phase_index, batch, accumulation, topology, *, quick):
        return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": 27 * 2**30}

    figure = draw("v3:2x2", too_large, 64)
    assert "27.00 GiB\n174 %, cut off" in find_texts(figure)
    _, time, minutes = figure.axes
    assert not [*time.get_yticks(), *minutes.get_yticks()]


def test_the_legend_of_the_efficiency_names_each_generation_beside_the_lines(draw):
    def fit(self, phase_index, batch, accumulation, topology, *, quick):
        return compile_(self, phase_index, 1, 1, "v3", quick=quick)

    compile_ = Compiler.compile
    sides = {"v2": "16x16", "v3": "16x16", "v5e": "16x16", "v6e": "16x16", "v4": "4x8x8"}
    names = [f"{chip}:{shape}" for chip, shape in sides.items()]
    small = [f"{chip}:{'2x2x1' if chip == 'v4' else '2x2'}" for chip in sides]
    figure = draw(",".join(names + small), fit, 512)
    panel = figure.axes[-1]
    figure.draw_without_rendering()
    legend = panel.get_legend()
    assert {text.get_text().split(":")[0] for text in legend.get_texts()} == set(sides)
    assert all(text.get_text().endswith(" % on 256 chips") for text in legend.get_texts())
    assert legend.get_window_extent().x0 >= panel.get_window_extent().x1
    styles = {(line.get_marker(), line.get_linestyle()) for line in panel.lines}
    assert len(styles) == len(panel.lines) == 5


def test_a_bar_says_how_much_a_single_example_would_need(draw):
    def too_large(self, phase_index, batch, accumulation, topology, *, quick):
        if batch is None:
            return compile_(self, phase_index, batch, accumulation, topology, quick=quick)
        return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": (20 + batch) * 2**30}

    compile_ = Compiler.compile

    figure = draw("v3:2x2", too_large, 1024)
    assert "21.00 GiB\n136 %, cut off" in find_texts(figure)


def test_one_example_that_fits_alone_may_not_fit_beside_the_accumulated_gradients(monkeypatch):
    class Small(Compiler):
        def compile(self, phase_index, batch, accumulation, topology, *, quick):
            needed = ((batch or 0) // accumulation + 3 * (accumulation > 1)) * 4 * 2**30
            if needed > 15 * 2**30:
                return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": needed}
            return super().compile(phase_index, 1, 1, topology, quick=quick) | {"hbm_bytes": needed}

    monkeypatch.setattr(preflight, "Children", Small)
    (result,) = preflight.examine(
        recipes.find_recipe("bert-mini-demo"),
        parse_topologies("v3:2x2"),
        progress=preflight_children.ProgressLines(lambda line: None),
        search=True,
    )
    assert result.largest == 3
    assert result.error.endswith("a single example fits in memory beside the accumulated gradients")
    assert result.program == {"hbm_bytes": 16 * 2**30}


def test_the_page_of_all_recipes_is_written_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    path = tmp_path / "preflight.md"
    path.write_text("all recipes")
    monkeypatch.setattr(document, "PATH", path)
    monkeypatch.setattr(document, "check_installed", lambda: None)
    monkeypatch.setattr(document, "PODS", {"bert-mini-demo": "v3:2x2", "squad-mini": "v3:2x2"})
    monkeypatch.setattr(preflight, "Children", Compiler)
    assert document.main(["bert-mini-demo"]) == 1
    said = f"give the page of bert-mini-demo with --output=FILE; {path} is that of all recipes.\n"
    assert capsys.readouterr().err.endswith(said)

    def lower(self, recipe, phase_index, programs):
        if recipe.name == "squad-mini":
            raise InputError("this host's memory is not sufficient")

    with monkeypatch.context() as patch:
        patch.setattr(Compiler, "lower", lower)
        assert document.main([]) == 1
    assert path.read_text() == "all recipes"
    assert document.main([]) == 0
    rows = [line for line in path.read_text().splitlines() if "| v3:2x2 |" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| bert-mini-demo", "| squad-mini"]


def test_a_page_without_published_recipes_has_no_published_tables(monkeypatch):
    recipe, topologies = recipes.find_recipe("bert-mini-demo"), parse_topologies("v3:2x2")
    monkeypatch.setattr(preflight, "Children", Compiler)
    results = preflight.examine(
        recipe, topologies, progress=preflight_children.ProgressLines(print), search=False
    )
    page = document.format_page({"bert-mini-demo": results})
    assert "| bert-mini-demo | 1 | v3:2x2 | 8 |" in page and "published" not in page


def test_a_page_of_mlperfs_runs_has_their_minutes(monkeypatch):
    published = next(r for r in mlperf.BERT_RESULTS if r.topology)
    monkeypatch.setattr(preflight, "Children", Compiler)
    results = preflight.examine(
        published.recipe,
        parse_topologies(published.topology),
        progress=preflight_children.ProgressLines(print),
        search=False,
    )
    name = published.recipe.name
    page = document.format_page({name: results}, [name])
    assert page.startswith(
        f"# Pre-flight of {name}\n\nWritten by `python -m preflight.document {name} --output=FILE` "
        "on 20"
    )
    (row,) = page.partition("## Next to MLPerf")[2].splitlines()[4:5]
    # 3,512,678 sequences in batches of 6,912.
    minutes = 509 * results[0].time.step / 60
    assert row.split(" | ")[3:] == [
        *("3,512,678", "509", f"{minutes:.3f}", "0.276", f"{minutes / 0.276:.0%} |")
    ]


def test_a_hidden_update_and_a_sum_beyond_the_memory_are_explained(monkeypatch):
    monkeypatch.setattr(preflight, "Children", Compiler)
    recipe = recipes.find_recipe("bert-mini-demo")
    (result,) = preflight.examine(
        recipe,
        parse_topologies("v3:2x2"),
        progress=preflight_children.ProgressLines(print),
        search=False,
    )
    update = dataclasses.replace(result, time=dataclasses.replace(result.time, update=0.05))
    assert (
        "of which the update takes 50 ms (50%): its time alone, but at most what the products of "
        "forward and backward leave; compiled alone, it moves 250000.00 floats per parameter; "
    ) in report.describe(recipe, [update])
    hidden = dataclasses.replace(result, time=dataclasses.replace(result.time, update=0.0))
    assert (
        "takes no time of its own, as its traffic runs beside the products; compiled alone, it "
        "moves 250000.00 floats per parameter; "
    ) in report.describe(recipe, [hidden])
    assert "larger than HBM" not in report.describe(recipe, [result])
    program = result.program | {"hbm_bytes": 17 * 2**30}
    larger = report.describe(recipe, [dataclasses.replace(result, program=program)])
    assert "17.00 GiB of 15.48 GiB per replica: " in larger and "larger than HBM, but" in larger


def test_a_result_of_a_system_that_is_no_slice_is_not_compared(monkeypatch):
    monkeypatch.setattr(preflight, "Children", Compiler)
    published = next(r for r in mlperf.RESULTS if r.recipe.name == "mlperf-v0.7")
    assert not published.topology and published.examples
    results = preflight.examine(
        published.recipe,
        parse_topologies("v3:32x32"),
        progress=preflight_children.ProgressLines(print),
        search=False,
    )
    assert document.mlperf_table({"mlperf-v0.7": results}) == []


def test_the_help_of_the_document_is_a_usage_text(capsys):
    with pytest.raises(SystemExit) as end:
        document.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python -m preflight.document [-h] [--output")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document, "check_installed", lambda: None)
        assert document.main(["bert-mini-dem"]) == 1
    assert "bert-mini-dem: no pod is listed" in capsys.readouterr().err


FULL_DISK = """
import errno, json, os, sys
from preflight.compiler import compile as tpu
tpu.compile_program = lambda *arguments, **options: None
tpu.open_topology = lambda name: []
tpu.figures = lambda executable: {"flops": 1}
def write(value, file, **options):
    file.write("{")
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
json.dump = write
tpu._read_program = lambda path: b"program"
tpu.count_products = lambda program: {}
assert tpu.compile_file("", "v3:2x2", sys.argv[1]) == {"flops": 1}
assert os.listdir(sys.argv[1]) == [".lock"], os.listdir(sys.argv[1])  # of the cache itself
"""


@installed
def test_a_full_cache_disk_leaves_no_files(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


CACHED_BY_FLAGS = """
import os, sys
from preflight.compiler import compile as tpu
made = []
tpu._cached(b"program", "v3:2x2", sys.argv[1], lambda: made.append(0) or {"flops": 0})
for name in ("LIBTPU_INIT_ARGS", "XLA_FLAGS"):
    os.environ[name] = "--xla_flag=1"
    for _ in range(2):
        tpu._cached(b"program", "v3:2x2", sys.argv[1], lambda: made.append(name) or {"flops": 1})
assert made == [0, "LIBTPU_INIT_ARGS", "XLA_FLAGS"], made
"""


@installed
def test_the_compiler_s_flags_are_part_of_the_cache_s_key(tmp_path):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("LIBTPU_INIT_ARGS", "XLA_FLAGS")
    }
    done = subprocess.run(
        [sys.executable, "-c", CACHED_BY_FLAGS, str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


DUMPED = """
import pathlib, sys, threading
from preflight.compiler import compile as tpu
folder = pathlib.Path(sys.argv[1])
def compile_program(program, devices):
    # The file is there before its last line is.
    (folder / "1-TLP-hlo.txt").write_text("HloModule half")
    halves.wait(10)
    (folder / "1-TLP-hlo.txt").write_text("HloModule whole")
    (folder / "1-TLP-00-deduplication-map.txt").write_text("")
    threading.Event().wait()  # generates code
halves = threading.Event()
threading.Timer(3 * tpu.LOOK_EVERY_SECONDS, halves.set).start()
tpu.compile_program = compile_program
tpu.open_topology = lambda name: []
assert tpu._optimize(b"program", "v3:2x2", folder) == "HloModule whole"
"""


@installed
def test_the_program_is_taken_as_soon_as_the_compiler_has_written_it(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", DUMPED, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """`Children` with the update of a small BERT, and steps of 4 and of 2**17 examples."""
    folder = tmp_path_factory.mktemp("lowered")
    programs = [(None, 1), (4, 1), (2**17, 1)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight_children, "CACHE", folder / "cache")
        children = preflight_children.Children(
            preflight_children.ProgressLines(lambda line: None), str(folder)
        )
        children.lower(recipes.find_recipe("bert-mini-demo"), 0, programs)
        yield children


@pytest.mark.slow
@installed
@pytest.mark.parametrize(("batch", "topology"), [(None, "v5e:2x2"), (4, "v3:2x2"), (4, "v4:2x2x1")])
def test_traffic_without_code_is_that_of_the_compiled_program(lowered, batch, topology):
    counted = lowered.count_traffic(0, batch, 1, topology)
    compiled = lowered.compile(0, batch, 1, topology)
    assert counted["main_bytes"] == compiled["main_bytes"]
    on_chip = counted["all_bytes"] - counted["main_bytes"]
    assert (on_chip > counted["main_bytes"]) == (topology != "v3:2x2")
    # It is cached under its own name.
    assert lowered.count_traffic(0, batch, 1, topology) == counted


@pytest.mark.slow
@installed
def test_a_program_that_does_not_fit_is_not_counted(lowered):
    too_large = lowered.count_traffic(0, 2**17, 1, "v2:2x2")
    assert "RESOURCE_EXHAUSTED" in too_large["error"] and too_large["hbm_bytes"] > 2**33


def test_training_does_not_import_the_preflight():
    for path in [ROOT / "train.py", *ROOT.glob("training/**/*.py"), *ROOT.glob("tasks/*.py")]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        loaded = [
            ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not [line for line in loaded if "preflight" in line or "jax" in line], path


@pytest.fixture(scope="module")
def examine(tmp_path_factory):
    """A function from a recipe and topologies to what the command returns, prints and writes."""

    def run(recipe, topologies="v3:2x2"):
        folder = tmp_path_factory.mktemp("preflight")
        with pytest.MonkeyPatch.context() as patch:
            printed, lines = [], []
            patch.setattr(preflight_children, "CACHE", folder / "cache")
            patch.setattr("builtins.print", lambda line, **_: printed.append(line))
            status = preflight.run(
                recipe,
                topologies,
                json_path=str(folder / "rows.json"),
                log=lines.append,
                search=False,
            )
        rows = json.loads((folder / "rows.json").read_text())
        return types.SimpleNamespace(
            status=status,
            rows=rows,
            row=rows[0],
            printed="\n".join(printed),
            lines=lines,
            folder=folder,
        )

    return run


@installed
def test_a_small_bert_compiles(examine):
    recipe = recipes.override(
        recipes.find_recipe("bert-mini-demo"), ["compute_dtype=bfloat16", "dropout=0.1"]
    )
    result = examine(recipe, "v3:2x2,v4:2x2x1,v5e:2x2,v6e:2x2")
    # A state of the random generator that one generation takes, another one may not.
    assert [(row["compiles"], row["error"]) for row in result.rows] == [(True, None)] * 4
    row = result.row
    assert result.status == 0 and result.lines
    assert list(row) == FIELDS
    parameters = 954_786
    assert row["compiles"] and row["error"] is None
    assert (row["replicas"], row["replica_batch_size"], row["accumulation"]) == (8, 8, 1)
    # Every gradient is reduced once, in float32, with a few bytes of counts and losses.
    assert 0 <= row["all_reduce_bytes"] - 4 * parameters < 1000
    assert [row["seconds_by"] for row in result.rows] == ["compiler", "model", "model", "model"]
    # LAMB moves at least 10 floats per parameter, less what stays in on-chip memory, plus padding.
    # The compiler adds the traffic of that memory.
    assert 40 < row["update_bytes_per_parameter"] < 4 * 12
    assert row["compiler_update_bytes_per_parameter"] == pytest.approx(
        row["update_bytes_per_parameter"], rel=0.05
    )
    for newer in result.rows[1:]:
        assert 4 * 5 < newer["update_bytes_per_parameter"] < 4 * 12
        assert newer["compiler_update_bytes_per_parameter"] > 4 * 20
        assert newer["main_memory_bytes"] < newer["bytes_accessed"] / 2
        assert newer["work_seconds"] < row["work_seconds"] and newer["compiler_seconds"] > 0
    assert 12 * parameters < row["hbm_bytes"] < 2**28 < row["hbm_limit_bytes"]
    assert 0 < row["compiler_seconds"] < row["step_seconds"] < 0.01
    assert row["phase_minutes"] == pytest.approx(2000 * row["step_seconds"] / 60)
    assert (result.folder / "rows.png").stat().st_size > 10_000
    assert "bert-mini-demo" in result.printed and "figures are estimates" in result.printed
    assert re.search(r"bound by \w+; 0 of \d\d products in float32", result.printed)
    assert len(list((result.folder / "cache").glob("*.json"))) == 2 * len(result.rows)


@pytest.mark.slow
@installed
def test_resnet_50_compiles(examine):
    recipe = recipes.resized(recipes.find_recipe("resnet50-lars-32k"), global_batch_size=64)
    result = examine(recipes.override(recipe, ["compute_dtype=bfloat16"]))
    row = result.row
    assert result.status == 0 and row["error"] is None
    parameters = 25_557_032
    # 8 images of 4.1 G multiplications and additions each; backward takes twice the forward pass.
    assert row["flops"] == pytest.approx(8 * 3 * 2 * 4.1e9, rel=0.05)
    # The offset of a stage's last batch norm has the same gradient as that of its shortcut, so
    # XLA reduces it once.
    shared = 256 + 512 + 1024 + 2048
    assert 0 <= row["all_reduce_bytes"] - 4 * (parameters - shared) < 1000
    assert 4 * 7 < row["update_bytes_per_parameter"] < 4 * 8.5  # LARS moves 7 floats, plus padding
    assert re.search(r"bound by \w+; 0 of \d+ products in float32", result.printed)
    assert re.search(
        r"input +[\d,]+ examples/s from each host of 8 replicas: [\d.]+ CPU cores", result.printed
    )
