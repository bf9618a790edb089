"""Pre-flight: topologies, the models behind the estimates, and the compiler on a small BERT."""

import ast
import importlib.util
import json
import pathlib
import re

import pytest

import recipes
from inputs.errors import InputError
from preflight import children as preflight_children
from preflight import document, estimate
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


def one(name):
    (topology,) = parse_topologies(name)
    return topology


@pytest.mark.parametrize(
    ("name", "full_name", "chips", "replicas"),
    [
        ("v3-2048", "v3:32x32", 1024, 2048),
        ("v3-32", "v3:4x4", 16, 32),
        ("v2-512", "v2:16x16", 256, 512),
        ("v4-32", "v4:2x2x4", 16, 16),
        ("v5litepod-16", "v5e:4x4", 16, 16),
        ("v5p-8", "v5p:2x2x1", 4, 4),
        ("v6e:8x16", "v6e:8x16", 128, 128),
        ("v5p-12288", "v5p:16x16x24", 6144, 6144),
        ("v4:4x4x12", "v4:4x4x12", 192, 192),
        ("v3:8x4", "v3:8x4", 32, 64),
    ],
)
def test_a_slice_is_named_by_its_sides_or_its_cores(name, full_name, chips, replicas):
    topology = one(name)
    assert (topology.name, topology.chips, topology.replicas) == (full_name, chips, replicas)


def test_several_topologies_are_read_once_each():
    names = [topology.name for topology in parse_topologies("v3-32, v3:4x4,v4-8")]
    assert names == ["v3:4x4", "v4:2x2x1"]


@pytest.mark.parametrize(
    "name",
    ["v9:2x2", "v3", "v3:3x3", "v3-7", "v3:64x64", "v4:2x2", "v3:2x512", "v4:2x2x3", "v3-0", ""],
)
def test_an_unknown_topology_lists_those_that_are_known(name):
    with pytest.raises(InputError, match="There are: v2:2x2 to v2-512, v3:2x2 to v3-2048, v4"):
        parse_topologies(name)


def test_a_sum_over_a_ring_takes_twice_its_bytes_over_all_links():
    pod, quarter = one("v3:32x32"), one("v3:16x16")
    size = 10**9
    on_links = 2 * size * 1023 / 1024 / (4 * 100e9)
    seconds = estimate.all_reduce_seconds(pod, size)
    assert seconds == pytest.approx(on_links + 2 * 32 * 1e-6)
    # A part of the pod is open at its sides: half the links, and farther from end to end.
    open_links = 2 * size * 255 / 256 / (2 * 100e9)
    seconds = estimate.all_reduce_seconds(quarter, size)
    assert seconds == pytest.approx(open_links + 2 * 30 * 1e-6)


@pytest.mark.parametrize("largest", [1, 3, 7])
def test_the_search_finds_less_than_a_tile(largest):
    search = estimate.largest_batch
    assert search(lambda batch: 10 + batch, 32, fixed=10, limit=10 + largest, most=64) == largest


@pytest.mark.parametrize("start", [8, 16, 4096])
def test_the_search_finds_the_largest_batch_of_a_line(start):
    tried = []

    def needed(batch):
        tried.append(batch)
        return 1000 + 70 + 3 * batch  # weights, what does not grow, what does

    found = estimate.largest_batch(needed, start, fixed=1000, limit=4000, most=10**6)
    assert found == (4000 - 1070) // 3 // 8 * 8
    assert len(tried) <= 1 + estimate.TRIES


def test_the_search_knows_its_ends():
    search = estimate.largest_batch
    assert search(lambda batch: 5000, 8, fixed=4900, limit=4000, most=64) == 0
    assert search(lambda batch: 1000 + batch, 8, fixed=1000, limit=4000, most=64) == 64


def test_accumulation_is_the_least_that_divides_and_fits():
    needed = estimate.needed_accumulation
    assert needed(96, largest=40, least=1) == 3
    assert needed(96, largest=96, least=2) == 2
    assert needed(7, largest=3, least=1) == 7
    assert needed(7, largest=0, least=1) is None


def test_the_parts_of_a_step_add_up():
    program = {
        "seconds": 0.1, "flops": 4e12, "bytes_accessed": 40e9, "all_reduce_bytes": 10**9,
        "all_reduces": 2, "asynchronous": 1,
    }  # fmt: skip
    update = {"seconds": 0.02, "flops": 1e9, "bytes_accessed": 13e9}
    time = estimate.step_time(one("v3:32x32"), program, update, accumulation=3)
    # Three times: the running sum read and written, the gradients read; the sum over the replicas
    # is read and written once, and each of the three programs counts it.
    moved = (3 * 3 - 2 * 2) * 10**9
    assert time.compiler == pytest.approx(3 * 0.08 + 0.02 + moved / (900e9 / 2))
    assert time.memory == pytest.approx((3 * 27e9 + 13e9 + moved) / (900e9 / 2))
    assert time.hideable == pytest.approx(time.all_reduce)
    assert time.hidden == pytest.approx(time.all_reduce / 2)
    assert time.step == pytest.approx(time.compiler + time.all_reduce / 2)
    assert time.compute == pytest.approx((3 * 3.999e12 + 1e9) * 2 / 123e12)


def test_a_batch_that_does_not_divide_is_named():
    recipe = recipes.find_recipe("bert-mini-demo")
    with pytest.raises(InputError, match="batch of 64 does not divide by 2048.*batch_size=2048"):
        preflight.replica_batch_size(recipe, recipe.phases[0], one("v3-2048"))


def test_a_missing_compiler_is_named_with_its_size(monkeypatch):
    monkeypatch.setattr(preflight_children, "WANTED", {"no-such-package": "1.0"})
    with pytest.raises(InputError, match="no-such-package 1.0, and finds none.*1.1 GB"):
        preflight_children.check_installed()


def test_too_little_memory_and_a_crash_are_each_one_sentence(monkeypatch, tmp_path):
    children = preflight_children.Children(lambda line: None, str(tmp_path))
    (tmp_path / "crashing_child.py").write_text("raise SystemExit('the compiler gave up')")
    (tmp_path / "waiting_child.py").write_text("import time; time.sleep(100)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(InputError, match="^it failed: the compiler gave up$"):
        children._run("crashing_child", "it", {})
    monkeypatch.setattr(preflight_children, "SPARE_BYTES", 2**60)
    with pytest.raises(InputError, match="host's memory does not suffice"):
        children._run("waiting_child", "it", {})


def test_the_reason_names_the_operation_and_not_the_last_line():
    said = """Traceback (most recent call last):
  File "step.py", line 3, in train
tensorflow.python.framework.errors_impl.InvalidArgumentError: Detected unsupported operations: Foo
Stack trace for op definition:
tf2xla conversion failed. Run with TF_DUMP_GRAPH_PREFIX=/path"""
    reason = preflight_children._reason
    assert reason(said, 1).endswith("Detected unsupported operations: Foo")
    assert reason("a line\ninputs.errors.InputError: --set x: no.", 1) == "--set x: no."
    assert "was killed" in reason("a warning", -9) and reason("", 3) == "status 3"


class Compiler:
    """Stands for `Children`: programs of a batch take its bytes, v2 has no kernel for them."""

    def __init__(self, log, folder):
        self.facts = {"parameters": 1000, "weight_bytes": 4000, "slot_bytes": 8000}

    def lower(self, recipe, number, programs):
        pass

    def compile(self, number, batch, parts, topology):
        if topology.startswith("v2"):
            return {"error": "no kernel for Foo"}
        examples, sums = 0 if batch is None else batch // parts, 9 if parts > 1 else 0
        needed = 12_000 + (examples + sums) * 2**30
        if needed > 15 * 2**30:
            return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": needed}
        return {
            "hbm_bytes": needed, "argument_bytes": 12_000, "temporary_bytes": 9_000,
            "code_bytes": 9, "flops": 1e9, "bytes_accessed": 1e9, "seconds": 0.1,
            "all_reduce_bytes": 4000, "all_reduces": 1, "asynchronous": 0,
            "products": 9, "float32_products": 0,
        }  # fmt: skip


def test_what_does_not_compile_is_a_row_and_sums_take_room_too(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(preflight, "Children", Compiler)
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    recipe = recipes.resized(recipes.find_recipe("bert-mini-demo"), global_batch_size=240)
    path = tmp_path / "rows.json"
    assert preflight.run(recipe, "v2:2x2,v3:2x2", json_path=str(path), log=print) == 1
    v2, v3 = json.loads(path.read_text())
    assert not v2["compiles"] and v2["error"] == "no kernel for Foo"
    # 30 examples a replica: 8 were found to fit, so 6 at a time; beside their sums 5.
    assert v3["compiles"] and (v3["replica_batch_size"], v3["accumulation"]) == (30, 6)
    assert "NO: no kernel for Foo" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nowhere/rows.json", "rows.png"])
def test_where_nothing_can_be_written_is_said_before_anything_is_compiled(
    tmp_path, monkeypatch, name
):
    monkeypatch.setattr(preflight, "check_installed", lambda: None)
    with pytest.raises(InputError, match=f"preflight_json=.*{name}"):
        recipe = recipes.find_recipe("bert-mini-demo")
        preflight.run(recipe, "v3:2x2", json_path=str(tmp_path / name), log=pytest.fail)


def test_the_page_of_other_recipes_has_none_of_the_papers_tables(monkeypatch):
    recipe, topologies = recipes.find_recipe("bert-mini-demo"), parse_topologies("v3:2x2")
    monkeypatch.setattr(preflight, "Children", Compiler)
    found = preflight.findings_of(recipe, topologies, log=print, search=False)
    page = document.page({"bert-mini-demo": found})
    assert "| bert-mini-demo | 1 | v3:2x2 | 8 |" in page and "published" not in page


def test_training_loads_nothing_of_it():
    own = {"plan.py", *(path.name for path in ROOT.glob("training/preflight*.py"))}
    ordinary = [path for path in ROOT.glob("training/*.py") if path.name not in own]
    for path in [ROOT / "train.py", *ordinary]:
        body = ast.parse(path.read_text(encoding="utf-8")).body
        loaded = [
            ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        assert not [line for line in loaded if "preflight" in line or "jax" in line], path


def test_without_the_tpu_wheel_the_strict_check_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(preflight_children, "TPU_INSTALLED", tmp_path / "installed")
    with pytest.raises(InputError, match="there is no .*installed. Make it: make preflight-tpu"):
        preflight_children.check_strict_installed()


@pytest.mark.skipif(
    not preflight_children.TPU_INSTALLED.exists(), reason="make preflight-tpu was not run"
)
def test_the_tpus_own_kernels_are_asked(tmp_path):
    children = preflight_children.Children(lambda line: None, str(tmp_path))
    for name in ("bert-mini", "resnet50-lars-32k"):
        answer = children.ask_kernels(recipes.find_recipe(name), 0)
        assert answer["operations"] > 40 and answer["error"] is None


@installed
def test_a_small_bert_takes_off(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight_children, "CACHE", tmp_path / "cache")
    path = tmp_path / "rows.json"
    recipe = recipes.override(
        recipes.find_recipe("bert-mini-demo"), ["compute_dtype=bfloat16", "dropout=0.1"]
    )
    said = []
    status = preflight.run(recipe, "v3:2x2", json_path=str(path), log=said.append, search=False)
    assert status == 0 and said
    (row,) = json.loads(path.read_text())
    assert list(row) == FIELDS
    parameters = 954_786
    assert row["compiles"] and row["error"] is None
    assert (row["cores"], row["replica_batch_size"], row["accumulation"]) == (8, 8, 1)
    # Every gradient is summed once, in float32, with the counts and losses of some bytes.
    assert 0 <= row["all_reduce_bytes"] - 4 * parameters < 1000
    assert 40 < row["update_bytes_per_parameter"] < 4 * 12
    assert 12 * parameters < row["hbm_bytes"] < 2**28 < row["hbm_limit_bytes"]
    assert 0 < row["compiler_seconds"] < row["step_seconds"] < 0.01
    assert row["phase_minutes"] == pytest.approx(2000 * row["step_seconds"] / 60)
    assert (tmp_path / "rows.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "bert-mini-demo" in printed and "Estimates. The compiler's:" in printed
    assert re.search(r"bound by \w+; 0 of \d\d products in float32", printed)
    assert len(list((tmp_path / "cache").iterdir())) == 2


@installed
def test_resnet_50_takes_off(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(preflight_children, "CACHE", tmp_path / "cache")
    path = tmp_path / "rows.json"
    recipe = recipes.resized(recipes.find_recipe("resnet50-lars-32k"), global_batch_size=64)
    recipe = recipes.override(recipe, ["compute_dtype=bfloat16"])
    status = preflight.run(
        recipe, "v3:2x2", json_path=str(path), log=lambda line: None, search=False
    )
    (row,) = json.loads(path.read_text())
    assert status == 0 and row["error"] is None
    parameters = 25_557_032
    # Forward, and twice that backward: 8 images of 4.1 GFLOP multiplied and added each.
    assert row["flops"] == pytest.approx(8 * 3 * 2 * 4.1e9, rel=0.05)
    # The shift of a stage's last batch norm has the gradient of its shortcut's: summed once.
    alike = 256 + 512 + 1024 + 2048
    assert 0 <= row["all_reduce_bytes"] - 4 * (parameters - alike) < 1000
    assert 4 * 7 < row["update_bytes_per_parameter"] < 4 * 8.5  # LARS, tiles filled up
    printed = capsys.readouterr().out
    assert re.search(r"bound by \w+; 0 of \d+ products in float32", printed)
    assert re.search(r"input +[\d,]+ examples/s from each host of 8: [\d.]+ cores as fast", printed)
