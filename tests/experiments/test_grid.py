"""The rule of tuning, and the tables."""

import math

import pytest

from experiments.grid import Cell, Group, Table, find_cell, progress
from experiments.tables import TABLES


def _table(*groups):
    return Table("toy", "Toy", "keras", "accuracy", groups)


GROUP = Group("lamb", {"batch": 8}, (0.1, 0.2, 0.4), seeds=(1, 2, 3))


def _names(found):
    return [cell.name for cell in found.todo]


def _done(**rates):
    return {f"lamb-rate{rate.replace('_', '.')}-seed1": value for rate, value in rates.items()}


def test_all_rates_of_the_grid_come_first():
    found = progress(_table(GROUP), GROUP, {})
    assert _names(found) == ["lamb-rate0.1-seed1", "lamb-rate0.2-seed1", "lamb-rate0.4-seed1"]
    assert (found.best, found.later) == (None, 2)


def test_a_best_rate_inside_the_grid_is_repeated_with_the_other_seeds():
    metrics = {"lamb-rate0.1-seed1": 0.5, "lamb-rate0.2-seed1": 0.6, "lamb-rate0.4-seed1": 0.4}
    found = progress(_table(GROUP), GROUP, metrics)
    assert _names(found) == ["lamb-rate0.2-seed2", "lamb-rate0.2-seed3"]
    assert (found.best, found.at_edge) == (0.2, False)


@pytest.mark.parametrize(
    ("values", "beyond"),
    [((0.4, 0.5, 0.6), "lamb-rate0.8-seed1"), ((0.6, 0.5, 0.4), "lamb-rate0.05-seed1")],
)
def test_the_next_rate_follows_while_the_best_is_at_the_edge(values, beyond):
    metrics = {
        f"lamb-rate{rate}-seed1": value for rate, value in zip(GROUP.rates, values, strict=True)
    }
    assert _names(progress(_table(GROUP), GROUP, metrics)) == [beyond]
    metrics[beyond] = 0.55  # below the best, which is now inside
    best = GROUP.rates[values.index(0.6)]
    assert progress(_table(GROUP), GROUP, metrics).best == best


def test_a_run_that_diverged_is_worse_than_all_others():
    metrics = {
        "lamb-rate0.1-seed1": 0.1,
        "lamb-rate0.2-seed1": 0.2,
        "lamb-rate0.4-seed1": -math.inf,
    }
    assert progress(_table(GROUP), GROUP, metrics).best == 0.2


def test_if_no_rate_learns_the_next_lower_one_is_tried():
    table = Table("toy", "Toy", "keras", "accuracy", (GROUP,), chance=0.12)
    metrics = {"lamb-rate0.1-seed1": 0.09, "lamb-rate0.2-seed1": 0.11, "lamb-rate0.4-seed1": 0.1}
    assert _names(progress(table, GROUP, metrics)) == ["lamb-rate0.05-seed1"]
    metrics |= {"lamb-rate0.05-seed1": -math.inf}
    assert _names(progress(table, GROUP, metrics)) == ["lamb-rate0.025-seed1"]
    nothing = dict(metrics)
    while todo := progress(table, GROUP, nothing).todo:
        nothing |= {cell.name: 0.1 for cell in todo}
    assert progress(table, GROUP, nothing).best is None  # none learns
    metrics |= {"lamb-rate0.025-seed1": 0.9}  # the lowest of five
    assert _names(progress(table, GROUP, metrics)) == ["lamb-rate0.013-seed1"]
    metrics |= {"lamb-rate0.013-seed1": 0.8}
    assert progress(table, GROUP, metrics).best == 0.025


def test_the_search_ends_if_every_rate_is_at_the_edge():
    metrics = {}
    while todo := progress(_table(GROUP), GROUP, metrics).todo:
        metrics |= {cell.name: cell.rate for cell in todo}  # the higher the better, for ever
    found = progress(_table(GROUP), GROUP, metrics)
    assert found.at_edge and found.best == pytest.approx(0.4 * 2**6, rel=0.05)


def test_an_untuned_group_waits_for_the_best_rate_that_it_follows():
    untuned = Group("untuned", {"batch": 32}, rate_from=("lamb", 2.0), seeds=(1, 2))
    table = _table(GROUP, untuned)
    assert progress(table, untuned, {}).later == 2
    metrics = {"lamb-rate0.1-seed1": 0.5, "lamb-rate0.2-seed1": 0.6, "lamb-rate0.4-seed1": 0.4}
    assert _names(progress(table, untuned, metrics)) == [
        "untuned-rate0.4-seed1",
        "untuned-rate0.4-seed2",
    ]


def test_an_untuned_group_is_finished_if_the_group_that_it_follows_never_learns():
    untuned = Group("untuned", {"batch": 32}, rate_from=("lamb", 2.0), seeds=(1, 2))
    table = _table(GROUP, untuned)
    metrics = {}
    while todo := progress(table, GROUP, metrics).todo:
        assert progress(table, untuned, metrics).later == 2
        metrics |= {cell.name: -math.inf for cell in todo}
    found = progress(table, untuned, metrics)
    assert (found.todo, found.later, found.best) == ([], 0, None)


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_every_cell_of_a_table_is_found_by_its_name(table):
    names = [group.name for group in table.groups]
    assert len(set(names)) == len(names)
    assert {*table.published, *sum(table.pairs, ())} <= set(names)
    for group in table.groups:
        assert group.rate_from or group.rates == tuple(sorted(group.rates))
        rate = (group.rates or (0.5,))[0]
        cell = Cell(group, rate, group.seeds[0])
        assert find_cell(table, cell.name) == cell


def test_a_name_of_no_cell_is_refused():
    with pytest.raises(ValueError, match="'sgd-rate1-seed1' is no cell of the table mnist"):
        find_cell(TABLES["mnist"], "sgd-rate1-seed1")
    for name in (
        "lamb-ratenan-seed1",
        "lamb-rate-1-seed1",
        "lamb-rate1-seed-1",
        "lamb-rateinf-seed1",
    ):
        with pytest.raises(ValueError, match="a positive rate and a seed from 0 to"):
            find_cell(TABLES["mnist"], name)


def test_the_paper_s_table_8_is_as_published():
    table = TABLES["mnist"]
    assert {group.rates for group in table.groups} == {(1e-4, 1e-3, 1e-2, 1e-1)}
    assert {group.settings["batch"] for group in table.groups} == {1_024}
    assert {len(group.seeds) for group in table.groups} == {5}
    assert table.published["lamb"] == 0.9945


@pytest.mark.parametrize("table", [t for t in TABLES.values() if t.program == "keras"])
def test_every_run_trains_for_longer_than_its_warm_up(table):
    images = {"mnist": 60_000, "cifar10": 50_000}
    for group in table.groups:
        settings = group.settings
        steps = round(settings["epochs"] * images[settings["data"]] / settings["batch"])
        assert 0 <= settings["warmup_steps"] < steps, group.name


def test_the_untuned_rates_follow_the_paper_s_square_root_rule():
    group = TABLES["mnist-batches"].group("lamb-untuned-16384")
    assert group.rate_from == ("lamb-1024", 4.0)
    assert group.settings["warmup_steps"] == 10
