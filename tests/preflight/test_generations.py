"""The table of recipes and generations, with a made-up compiler."""

import json

import pytest

import recipes
from preflight import generations
from training.chips import TPU_CHIPS

STATE = 4 * 2**30
EXAMPLE = 2**29


class Compiler:
    """Replaces `Children`: an example takes half a GiB, weights and slots take four."""

    def __init__(self, progress, folder):
        self.facts = None
        self.compiled, self.counted = [], []

    def lower(self, recipe, phase_index, programs):
        self.facts = {"weight_bytes": STATE, "slot_bytes": 0}

    def compile(self, phase_index, batch, accumulation, topology, quick):
        assert quick
        self.compiled.append((topology, batch, accumulation))
        chip = TPU_CHIPS[topology.partition(":")[0]]
        if chip.name == "v4":
            return {"error": "no kernel for Foo"}
        needed = STATE + batch // accumulation * EXAMPLE
        if needed > chip.hbm_bytes:
            return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": needed}
        return {"hbm_bytes": needed, "main_bytes": 2e10, "bytes_accessed": 3e10}

    def count_traffic(self, phase_index, batch, accumulation, topology):
        self.counted.append((topology, batch, accumulation))
        return {"main_bytes": 2.5e9, "all_bytes": 1.5e10}


def chips(compiled):
    return {topology.partition(":")[0] for topology, *_ in compiled}


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The results of the command go into a temporary folder. Returns the lists of slices."""
    compilers = []

    def compiler(progress, folder):
        compilers.append(Compiler(progress, folder))
        return compilers[-1]

    monkeypatch.setattr(generations, "PAGE", tmp_path / "generations.md")
    monkeypatch.setattr(generations, "RESULTS", tmp_path / "generations.json")
    monkeypatch.setattr(generations, "Children", compiler)
    monkeypatch.setattr(generations, "check_installed", lambda: None)
    return compilers


def test_each_phase_is_compiled_for_the_smallest_slice_that_fits(files):
    assert generations.main(["bert-large-32k"]) == 1  # v4 has no kernel
    cells = {(c["phase"], c["chip"]): c for c in json.loads(generations.RESULTS.read_text())}
    # A batch of 64K on v3: 22 examples fit, so 16 on each of 4,096 cores, and there are 2,048.
    # Their 32 examples are done in 2 micro-batches.
    expected = {
        "v2": ("v2:16x16", 128, 32),  # 6 examples fit
        "v3": ("v3:32x32", 32, 2),
        "v5e": ("v5e:16x16", 256, 16),  # 23 fit
        "v5p": ("v5p:8x8x8", 128, 1),  # 183 fit
        "v6e": ("v6e:16x16", 256, 8),  # 54 fit
    }
    for chip, found in expected.items():
        cell = cells[1, chip]
        names = ("topology", "replica_batch_size", "accumulation", "error")
        assert tuple(cell[name] for name in names) == (*found, None), chip
    assert cells[1, "v4"]["error"] == "no kernel for Foo"
    page = generations.PAGE.read_text()
    row, _ = [line for line in page.splitlines() if line.startswith("| bert-large-64k-32k and 7 ")]
    assert "- bert-large-64k-32k: bert-large-512, " in page
    assert "| 32x32, 32 in 2, 12.00 GiB, 2.5 / 15 GB |" in row and ": no kernel for Foo |" in row


def test_more_micro_batches_are_tried_where_the_estimate_is_too_low(files, monkeypatch):
    class Accumulating(Compiler):
        """Micro-batches take 2 GiB more, for the accumulated gradients."""

        def compile(self, phase_index, batch, accumulation, topology, quick):
            result = super().compile(phase_index, batch, accumulation, topology, quick)
            if accumulation > 1 and "hbm_bytes" in result:
                result["hbm_bytes"] += 2 * 2**30
                if result["hbm_bytes"] > TPU_CHIPS[topology.partition(":")[0]].hbm_bytes:
                    result["error"] = "RESOURCE_EXHAUSTED"
            return result

    monkeypatch.setattr(generations, "Children", Accumulating)
    generations.main(["bert-large-32k"])
    cells = {(c["phase"], c["chip"]): c for c in json.loads(generations.RESULTS.read_text())}
    cell = cells[1, "v2"]
    # 6 examples fit beside weights and slots, and 2 beside the accumulated gradients, too.
    assert (cell["replica_batch_size"], cell["accumulation"], cell["error"]) == (128, 64, None)
    assert cells[1, "v6e"]["error"] is None

    class Small(Compiler):
        """Nothing fits."""

        def compile(self, phase_index, batch, accumulation, topology, quick):
            return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": 2**40}

    generations.RESULTS.unlink()
    monkeypatch.setattr(generations, "Children", Small)
    assert generations.main(["bert-large-32k"]) == 1
    cells = json.loads(generations.RESULTS.read_text())
    assert {cell["error"] for cell in cells} == {"RESOURCE_EXHAUSTED"}


def test_what_was_compiled_is_not_compiled_again(files):
    generations.main(["bert-mini"])
    assert files[0].compiled
    entries = json.loads(generations.RESULTS.read_text())
    generations.main(["bert-mini"])
    # v4's error, which has no size, may be temporary.
    assert chips(files[1].compiled) == {"v4"} and not files[1].counted
    # Of another version of the compiler, or missing.
    entries[0]["compiler"] = "0.0.1"
    missing = {entry["chip"] for entry in (entries[0], entries[-1])}
    generations.RESULTS.write_text(json.dumps(entries[:-1]))
    generations.main(["bert-mini"])
    assert chips(files[2].compiled) == missing | {"v4"}


@pytest.mark.parametrize("step", ["compile", "count_traffic"])
def test_what_crashed_is_compiled_again(files, monkeypatch, step):
    with monkeypatch.context() as patch:
        patch.setattr(Compiler, step, lambda *arguments, **_: {"error": "killed by SIGABRT"})
        assert generations.main(["squad-mini"]) == 1
    assert generations.PAGE.read_text().count("killed by SIGABRT") >= len(TPU_CHIPS) - 1
    generations.main(["squad-mini"])
    cells = json.loads(generations.RESULTS.read_text())
    assert [cell["chip"] for cell in cells if cell["error"]] == ["v4"]  # as each time


def test_recipes_are_compiled_as_a_tpu_runs_them(files, monkeypatch):
    dtypes = []

    def lower(self, recipe, phase_index, programs):
        self.facts = {"weight_bytes": STATE, "slot_bytes": 0}
        dtypes.append(recipe.compute_dtype)

    monkeypatch.setattr(Compiler, "lower", lower)
    assert recipes.find_recipe("squad-mini").compute_dtype == "float32"
    generations.main(["squad-mini"])
    assert set(dtypes) == {"bfloat16"}


@pytest.mark.parametrize("name", ["no/page.md", "folder"])
def test_a_page_that_cannot_be_written_is_said_before_compilation(
    files, monkeypatch, tmp_path, capsys, name
):
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(generations, "PAGE", tmp_path / name)
    assert generations.main(["squad-mini"]) == 1 and not files
    said = capsys.readouterr().err
    assert said.startswith(f"preflight.generations: {tmp_path / name}: ") and said.count("\n") == 1


def test_a_disk_that_fills_while_it_compiles_is_one_sentence(files, monkeypatch, capsys):
    def write(path):
        raise OSError(28, "No space left on device", path)

    monkeypatch.setattr(generations, "atomic_write", write)
    assert generations.main(["squad-mini"]) == 1
    assert "\npreflight.generations: [Errno 28] No space left" in capsys.readouterr().err


def test_damaged_results_are_named(files, capsys):
    generations.RESULTS.write_text("[{")
    assert generations.main(["squad-mini"]) == 1 and not files
    assert f"{generations.RESULTS} cannot be read as JSON" in capsys.readouterr().err


def test_what_was_compiled_and_not_counted_is_counted(files):
    generations.main(["bert-mini"])
    entries = json.loads(generations.RESULTS.read_text())
    first = entries[0]
    first.update(main_bytes=0, all_bytes=0)
    generations.RESULTS.write_text(json.dumps(entries))
    page = generations.format_page(generations.read_results())
    (row,) = [line for line in page.splitlines() if line.startswith("| bert-mini | 1 ")]
    assert row.count(" GiB | ") == 1
    generations.main(["bert-mini"])
    batch, accumulation = first["replica_batch_size"], first["accumulation"]
    assert chips(files[1].compiled) == {"v4"}
    assert files[1].counted == [(first["topology"], batch, accumulation)]
    assert json.loads(generations.RESULTS.read_text())[0]["main_bytes"] == 2.5e9


def test_more_micro_batches_are_tried_where_only_quick_mode_fits(files, monkeypatch):
    class Larger(Compiler):
        """As a run would compile it, the program takes 1 GiB more."""

        def count_traffic(self, phase_index, batch, accumulation, topology):
            needed = STATE + batch // accumulation * EXAMPLE + 2**30
            if needed > TPU_CHIPS[topology.partition(":")[0]].hbm_bytes:
                return {"error": "RESOURCE_EXHAUSTED", "hbm_bytes": needed}
            return super().count_traffic(phase_index, batch, accumulation, topology)

    monkeypatch.setattr(generations, "Children", Larger)
    generations.main(["bert-large-32k"])
    cells = {(c["phase"], c["chip"]): c for c in json.loads(generations.RESULTS.read_text())}
    cell = cells[1, "v2"]  # 7.48 GiB: 6 examples fit, and 4 with the GiB
    assert (cell["replica_batch_size"], cell["accumulation"]) == (128, 32)
    assert cell["error"] is None and cell["main_bytes"]


def test_a_batch_that_divides_by_no_slice_is_said(files):
    generations.main(["resnet50-one-batch"])
    cells = {c["chip"]: c for c in json.loads(generations.RESULTS.read_text())}
    # 220 images: 55 on each of 4 replicas in 5 micro-batches, but not on 8.
    assert cells["v3"]["error"] == "the batch of 220 does not divide by the replicas"
    assert (cells["v6e"]["topology"], cells["v6e"]["replica_batch_size"]) == ("v6e:2x2", 55)


def test_every_recipe_is_in_the_table_once():
    programs = generations.programs()
    listed = [name for group in programs.items() for name in (group[0], *group[1])]
    assert sorted(listed) == sorted(recipes.RECIPES)
    assert "bert-large-32k" in programs["bert-large-64k-32k"]
    assert "nvlamb-64k-32k" in programs
    assert "mlperf-v0.7" in programs["mlperf-bert-v4-8192-2.0"]
    # They differ in the values of rates, β and λ alone.
    assert "mlperf-bert-batch-13056" in programs["mlperf-bert-a100-4096-2.1"]
    # L2 in the loss, or none.
    assert {"resnet50-lamb-32k", "resnet50-adamw-16k"} <= set(programs)


def test_the_table_has_the_chips():
    page = generations.format_page({})
    v3 = "| v3 | 123 (docs) | 15.48 (compiler) | 900 (docs) | 4 of 70 (ISCA) or 100 (book) | "
    assert v3 + "2 (compiler) | 2 (docs) | 4 (compiler) | 1,024 chips (docs) |" in page
    assert (
        "| v6e | 918 (docs) | 31.25 (compiler) | 1,638 (docs) | 4 of 90 (book) or 100 (docs)"
        in page
    )
    assert "4 (compiler); 8 (docs) of one host |" in page
    for name in ("docs", "CACM", "ISCA", "book", "compiler"):
        assert f"\n- {name}: " in page
