"""sweep.toml: which cells follow from it, and what is wrong with one."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import tomli_w

from intramural.core.errors import ConfigError
from intramural.simulations.sweep_cells import cells_of
from intramural.simulations.sweep_config import load_sweep, metric_of
from tests.simulations.sweeps import RATES, files, sweep_of
from tests.tiny import table

RANDOM = """
[sweep]
kind = "random"
cells = {cells}
seed = {seed}
[parameters]
"training.learning_rate" = {{ low = 1e-4, high = 1e-1, log = true }}
exchange.rank = {{ low = 2, high = 4 }}
strategy.rule = ["fedavg"]
"""


def test_a_grid_has_every_combination_the_last_key_first(tmp_path: Path) -> None:
    text = RATES + "exchange.rank = [2, 4]\n[simulation]\nsites = [2, 3]\n"
    _, cells = sweep_of(tmp_path, text)
    found = [
        (c.federation.training.learning_rate, c.federation.exchange.rank, c.sites) for c in cells
    ]
    assert found == [(lr, rank, n) for lr in (0.1, 0.2, 0.4) for rank in (2, 4) for n in (2, 3)]
    assert [c.number for c in cells] == list(range(1, 13))
    assert len({c.digest for c in cells}) == 12
    assert all(c.partition == "iid" for c in cells)
    assert all(c.federation.federation.rounds == 2 for c in cells)  # not swept: as in the file


@pytest.mark.parametrize(
    "spelled",
    [
        "[parameters]\ntraining.learning_rate = [0.1, 0.2, 0.4]\n",
        '[parameters]\n"training.learning_rate" = [0.1, 0.2, 0.4]\n',
        "[parameters.training]\nlearning_rate = [0.1, 0.2, 0.4]\n",
    ],
)
def test_a_key_may_be_dotted_quoted_or_nested(tmp_path: Path, spelled: str) -> None:
    _, cells = sweep_of(tmp_path, f'[sweep]\nkind = "grid"\n{spelled}')
    assert [c.parameters for c in cells] == [
        {"training.learning_rate": rate} for rate in (0.1, 0.2, 0.4)
    ]


def test_random_draws_keep_to_their_ranges_and_are_spread_evenly_over_decades(
    tmp_path: Path,
) -> None:
    _, cells = sweep_of(tmp_path, RANDOM.format(cells=300, seed=7))
    rates = [c.federation.training.learning_rate for c in cells]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    decades = [sum(math.floor(math.log10(rate)) == d for rate in rates) for d in (-4, -3, -2)]
    # 300 draws over three decades: 100 each, standard deviation sqrt(300 * 1/3 * 2/3) = 8.2
    assert all(60 < count < 140 for count in decades)
    assert {c.federation.exchange.rank for c in cells} == {2, 3, 4}
    assert len({c.digest for c in cells}) == 300


def test_more_random_cells_keep_the_first_and_another_seed_gives_others(tmp_path: Path) -> None:
    def digests(cells: int, seed: int) -> list[str]:
        return [c.digest for c in sweep_of(tmp_path, RANDOM.format(cells=cells, seed=seed))[1]]

    assert digests(9, 7)[:4] == digests(4, 7)
    assert not set(digests(4, 7)) & set(digests(4, 8))


def test_a_cells_digest_tells_records_and_deal_apart(tmp_path: Path) -> None:
    source = files(tmp_path)
    config = load_sweep(source.sweep)
    changed = [source, replace(source, salt="other"), replace(source, sites=3)]
    changed.append(replace(source, partition="size:1"))
    assert len({cells_of(config, one)[0].digest for one in changed}) == 4


def test_a_base_model_beside_the_federation_is_found_from_a_cells_folder(tmp_path: Path) -> None:
    source = files(tmp_path)
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    content = table(Path("models/tiny"))
    source.federation.write_text(tomli_w.dumps(content))
    (cell, *_) = cells_of(load_sweep(source.sweep), source)
    assert cell.table["model"]["base"] == str(tmp_path / "models" / "tiny")


def test_every_problem_of_a_sweep_is_told_at_once_with_file_key_and_remedy(tmp_path: Path) -> None:
    text = """
[sweep]
kind = "grid"
cells = 3
[parameters]
training.learning_rate = { low = 0.1, high = 0.2 }
federation.name = ["a", "b"]
[simulation]
partition = ["idd"]
"""
    source = files(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        cells_of(load_sweep(source.sweep), source)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "sweep.cells",
        "parameters.training.learning_rate",
        "parameters.federation.name",
        "simulation.partition",
    ]
    assert all(line.startswith(str(source.sweep)) for line in lines)


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ("training.learning_rate = [0.1, -1.0]", "parameters.training.learning_rate: input should"),
        ("training.learning_rat = [0.1]", "did you mean 'learning_rate'"),
        ("training.learning_rate = 0.1", "is one value"),
        ("training.learning_rate = []", "empty list"),
        ("training.learning_rate = [0.1, 0.1]", "names a value twice"),
        ("training.learning_rate = { low = 1.0 }", "with two numbers"),
        ("training.learning_rate = { low = 2.0, high = 1.0 }", "low below high"),
        ("training.local_epochs = [1]", "parameters.training: set exactly one"),
    ],
)
def test_a_wrong_parameter_is_told_under_its_key(
    tmp_path: Path, parameters: str, told: str
) -> None:
    source = files(tmp_path, f'[sweep]\nkind = "grid"\n[parameters]\n{parameters}\n')
    with pytest.raises(ConfigError) as caught:
        cells_of(load_sweep(source.sweep), source)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{source.sweep}: parameters.")
    assert told in line


def test_a_fault_of_the_federation_is_told_once_under_its_own_file(tmp_path: Path) -> None:
    source = files(tmp_path, federation={"rounds": 0})
    with pytest.raises(ConfigError) as caught:
        cells_of(load_sweep(source.sweep), source)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{source.federation}: federation.rounds: ")


def test_what_cannot_be_judged_or_run_is_refused(tmp_path: Path) -> None:
    text = RATES.replace('"grid"\n', '"grid"\nmetric = "perplexity"\n')
    with pytest.raises(ConfigError, match=r"sweep\.metric: no metric of the task"):
        sweep_of(tmp_path, text)
    with pytest.raises(ConfigError, match=r"evaluation\.every: 0, so nothing is measured"):
        sweep_of(tmp_path, evaluation={"every": 0})
    with pytest.raises(ConfigError, match=r"2 is below sites\.min = 5"):
        sweep_of(tmp_path, sites={"min": 5})
    few = '[sweep]\nkind = "random"\ncells = 4\n[parameters]\nexchange.rank = [2, 4, 8]\n'
    with pytest.raises(ConfigError, match="only 3 different ones"):
        sweep_of(tmp_path, few)


def test_the_metric_is_macro_f1_unless_named(tmp_path: Path) -> None:
    config, (cell, *_) = sweep_of(tmp_path)
    assert metric_of(config, cell.federation) == ("macro_f1", True)
    config, (cell, *_) = sweep_of(tmp_path, RATES.replace('"grid"\n', '"grid"\nmetric = "loss"\n'))
    assert metric_of(config, cell.federation) == ("loss", False)
