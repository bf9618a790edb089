"""The pre-flight: results without a compiler, and with the TPU compiler on small recipes."""

import ast
import importlib.util
import json
import pathlib
import re
import types

import pytest

import recipes
from inputs.errors import InputError
from preflight import children as preflight_children
from preflight import document
from preflight import run as preflight
from preflight.topology import parse_topologies

ROOT = pathlib.Path(__file__).parents[2]
installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("jax", "libtpu")),
    reason="JAX and libtpu, the extra `preflight`, are not installed",
)
FIELDS = (
    "phase topology cores compiles error replica_batch_size accumulation hbm_bytes "
    "hbm_limit_bytes flops bytes_accessed compiler_seconds update_bytes_per_parameter "
    "all_reduce_bytes all_reduce_seconds step_seconds phase_minutes"
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

    def compile(self, phase_index, batch, accumulation, topology):
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
            "seconds": 0.1,
            "all_reduce_bytes": 4000,
            "all_reduces": 1,
            "asynchronous": 0,
            "products": 9,
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


def test_each_slice_is_compiled_as_itself(monkeypatch):
    compiled = []

    class Recorder(Compiler):
        def compile(self, phase_index, batch, accumulation, topology):
            compiled.append((batch, topology))
            return super().compile(phase_index, batch, accumulation, topology)

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


@pytest.mark.parametrize("name", ["nowhere/rows.json", "rows.png"])
def test_an_unwritable_json_path_is_an_error_before_compilation(tmp_path, monkeypatch, name):
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    with pytest.raises(InputError, match=f"preflight_json=.*{name}"):
        recipe = recipes.find_recipe("bert-mini-demo")
        preflight.run(recipe, "v3:2x2", json_path=str(tmp_path / name), log=pytest.fail)


def test_a_page_without_published_recipes_has_no_published_tables(monkeypatch):
    recipe, topologies = recipes.find_recipe("bert-mini-demo"), parse_topologies("v3:2x2")
    monkeypatch.setattr(preflight, "Children", Compiler)
    results = preflight.examine(
        recipe, topologies, progress=preflight_children.ProgressLines(print), search=False
    )
    page = document.format_page({"bert-mini-demo": results})
    assert "| bert-mini-demo | 1 | v3:2x2 | 8 |" in page and "published" not in page


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
            patch.setattr("builtins.print", printed.append)
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
    assert (row["cores"], row["replica_batch_size"], row["accumulation"]) == (8, 8, 1)
    # Every gradient is reduced once, in float32, with a few bytes of counts and losses.
    assert 0 <= row["all_reduce_bytes"] - 4 * parameters < 1000
    assert 40 < row["update_bytes_per_parameter"] < 4 * 12
    assert 12 * parameters < row["hbm_bytes"] < 2**28 < row["hbm_limit_bytes"]
    assert 0 < row["compiler_seconds"] < row["step_seconds"] < 0.01
    assert row["phase_minutes"] == pytest.approx(2000 * row["step_seconds"] / 60)
    assert (result.folder / "rows.png").stat().st_size > 10_000
    assert "bert-mini-demo" in result.printed and "figures are estimates" in result.printed
    assert re.search(r"bound by \w+; 0 of \d\d products in float32", result.printed)
    assert len(list((result.folder / "cache").glob("*.json"))) == 2 * len(result.rows)


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
