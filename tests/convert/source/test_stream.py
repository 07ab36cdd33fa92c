"""Streamed conversions: the same bytes as from a folder, and never the whole source on disk."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from magistral_mlx.checkpoint import hub_transfer
from magistral_mlx.checkpoint.hub_transfer import HEAD_BYTES
from magistral_mlx.convert import ConvertOptions, check_conversion, stream_conversion
from magistral_mlx.convert.output.journal import JOURNAL
from magistral_mlx.convert.recipe.layout import in_order
from magistral_mlx.errors import ConversionError, HubError, MagistralError, OptionError, in_units
from tests.support.faults.killing import in_small_pieces
from tests.support.hub_server import COMMIT, OLDER, REPO, Hub, serving, use
from tests.support.sources import CONFIG, content, convert_quickly, write_consolidated, write_hf
from tests.support.tiny import make_weights, raw_config

pytest.importorskip("huggingface_hub")

FIRST, SECOND = (f"model-{i:05}-of-00002.safetensors" for i in (1, 2))
QUICK: dict[str, Any] = {"q_method": "round", "tokenizer_json": False}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the uploaded folder; each of its two shards has tensors of every layer."""
    folder = write_hf(tmp_path_factory.mktemp("published") / "hf")
    (folder / "SYSTEM_PROMPT.txt").write_text(
        "Think.\n<think>\n...\n</think>\nAnswer.\n\nProblem:\n\n"
    )
    return folder


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_pieces(monkeypatch.setattr)


@pytest.fixture
def hub(published: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub({path.name: path.read_bytes() for path in published.iterdir()})
    monkeypatch.setattr(hub_transfer, "FIRST_PAUSE_SECONDS", 0.0)
    with serving(state) as endpoint:
        use(monkeypatch, endpoint, tmp_path)
        yield state
    # The user's own cache is never touched.
    assert not (tmp_path / "cache").exists()


def weights_sent(hub: Hub) -> int:
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))


def same_but_for_the_source(one: Path, two: Path) -> bool:
    # These files name the hub id.
    named = {"magistral_mlx.json", "README.md", "tokenizer_config.json"}
    files = [
        {name: data for name, data in content(folder).items() if name not in named}
        for folder in (one, two)
    ]
    return files[0] == files[1]


@pytest.mark.parametrize("layout", ["hf", "consolidated"])
def test_a_stream_converts_to_the_same_bytes_as_a_folder(
    tmp_path: Path, published: Path, hub: Hub, layout: str
) -> None:
    if layout == "consolidated":
        folder = write_consolidated(tmp_path / "native")
        (folder / "SYSTEM_PROMPT.txt").write_bytes((published / "SYSTEM_PROMPT.txt").read_bytes())
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    steps = list(stream_conversion(REPO, tmp_path / "streamed", **QUICK, stream=True))
    convert_quickly(published if layout == "hf" else folder, tmp_path / "local")
    assert same_but_for_the_source(tmp_path / "streamed", tmp_path / "local")
    assert not (tmp_path / "streamed.partial").exists()
    sizes = {name: len(data) for name, data in hub.files.items() if name.endswith(".safetensors")}
    assert f"{in_units(sum(sizes.values()))} fetched" in steps[-1].name
    source = json.loads((tmp_path / "streamed" / "magistral_mlx.json").read_text())["source"]
    assert source["hub"] == {"id": REPO, "commit": COMMIT}
    assert all({"size", "header_sha256", "sha256"} == set(source["files"][name]) for name in sizes)


def test_a_file_is_deleted_when_its_last_tensor_is_done(tmp_path: Path, hub: Hub) -> None:
    fetched = tmp_path / "out.partial" / "source"
    there = [
        {path.name for path in fetched.glob("*.safetensors")}
        for _ in stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True)
    ]
    # Each layer needs both.
    assert {FIRST, SECOND} in there
    assert there[-1] == set()


def test_complete_or_streamed_or_fetched_a_commit_is_one_source(tmp_path: Path, hub: Hub) -> None:
    stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result()
    assert stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result().already_complete
    with pytest.raises(ConversionError, match=r"another q_bits: 4, now 8"):
        check_conversion(
            REPO, tmp_path / "out", ConvertOptions(q_bits=8, tokenizer_json=False, stream=True)
        )


@pytest.mark.parametrize("tenths", [1, 4, 7, 9])
def test_interrupted_anywhere_it_resumes_with_the_bytes_that_arrived(
    tmp_path: Path, published: Path, hub: Hub, tenths: int
) -> None:
    total = sum(path.stat().st_size for path in published.glob("*.safetensors"))
    documents = sum(
        path.stat().st_size for path in published.iterdir() if path.suffix != ".safetensors"
    )
    hub.bytes_until_down = documents + total * tenths // 10
    with pytest.raises(HubError, match=r"could not be fetched|cannot be reached"):
        stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result()
    assert not (tmp_path / "out").exists()
    sent = weights_sent(hub)
    hub.come_back()
    stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result()
    # Headers are read again each time.
    assert weights_sent(hub) <= total + 4 * HEAD_BYTES
    assert sent < total
    convert_quickly(published, tmp_path / "local")
    assert same_but_for_the_source(tmp_path / "out", tmp_path / "local")


def test_closed_early_it_keeps_the_bytes_that_arrived(tmp_path: Path, hub: Hub) -> None:
    steps = stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True)
    while next(steps).done == 0:
        pass
    steps.close()
    assert any((tmp_path / "out.partial" / "source").iterdir())
    stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result()
    assert (tmp_path / "out").is_dir()


def test_a_branch_that_moved_meanwhile_does_not_matter(tmp_path: Path, hub: Hub) -> None:
    for _ in (steps := stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True)):
        if len((tmp_path / "out.partial" / JOURNAL).read_text().splitlines()) > 1:
            break
    steps.close()
    hub.other_commits, hub.commit = {COMMIT: hub.files}, OLDER
    hub.files = hub.files | {"SYSTEM_PROMPT.txt": b"<think>x</think> Other.\n\nProblem:\n\n"}
    stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result()
    source = json.loads((tmp_path / "out" / "magistral_mlx.json").read_text())["source"]
    assert source["hub"]["commit"] == COMMIT


def test_a_damaged_file_is_refused_and_nothing_is_made_of_it(tmp_path: Path, hub: Hub) -> None:
    hub.damaged = frozenset({SECOND})
    with pytest.raises(MagistralError, match=SECOND):
        stream_conversion(REPO, tmp_path / "out", **QUICK, stream=True).result()
    assert not (tmp_path / "out").exists()


def test_a_dry_run_fetches_no_weights_and_writes_nothing(tmp_path: Path, hub: Hub) -> None:
    checked = check_conversion(REPO, tmp_path / "out", ConvertOptions(**QUICK, stream=True))
    source = checked.origin.source
    assert source.nbytes == sum(map(source.nbytes_of, source.config.shapes))
    assert {path.name for path in tmp_path.iterdir()} <= {"home"}
    assert weights_sent(hub) <= 4 * 2**17


def test_a_folder_is_not_streamed(tmp_path: Path, published: Path) -> None:
    with pytest.raises(OptionError, match=r"is a folder.*stream is for a hub id"):
        check_conversion(published, tmp_path / "out", ConvertOptions(**QUICK, stream=True))


@pytest.mark.parametrize("layout", [pytest.param("hf", marks=pytest.mark.slow), "consolidated"])
@pytest.mark.parametrize("method", ["importance", pytest.param("gptq", marks=pytest.mark.slow)])
def test_a_pass_through_the_model_goes_along_with_the_stream(
    tmp_path: Path, published: Path, hub: Hub, layout: str, method: str
) -> None:
    """Check that each file is fetched once and deleted after its last layer, also when resumed."""
    folder = published
    if layout == "consolidated":
        folder = write_consolidated(tmp_path / "native")
        (folder / "SYSTEM_PROMPT.txt").write_bytes((published / "SYSTEM_PROMPT.txt").read_bytes())
        hub.files = {path.name: path.read_bytes() for path in folder.iterdir()}
    options: dict[str, Any] = {"q_method": method, "tokenizer_json": False}
    fetched = tmp_path / "streamed.partial" / "source"
    for _ in (steps := stream_conversion(REPO, tmp_path / "streamed", **options, stream=True)):
        if len((tmp_path / "streamed.partial" / JOURNAL).read_text().splitlines()) > 1:
            break
    steps.close()
    stream_conversion(REPO, tmp_path / "streamed", **options, stream=True).result()
    assert not fetched.exists()
    total = sum(len(data) for name, data in hub.files.items() if name.endswith(".safetensors"))
    assert weights_sent(hub) <= total + 4 * HEAD_BYTES
    convert_quickly(folder, tmp_path / "local", q_method=method)
    assert same_but_for_the_source(tmp_path / "streamed", tmp_path / "local")


def test_a_streamed_source_cannot_write_its_own_calibration(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(OptionError, match="leave stream out, or name the folder"):
        check_conversion(
            REPO,
            tmp_path / "out",
            ConvertOptions(calibration="self", tokenizer_json=False, stream=True),
        )
    assert weights_sent(hub) < 2 * HEAD_BYTES + 1


@pytest.mark.parametrize("method", ["round", "importance"])
def test_an_order_of_tensors_that_keeps_many_files_is_warned_of(
    tmp_path: Path, hub: Hub, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    options: dict[str, Any] = {"q_method": method, "tokenizer_json": False}
    check_conversion(REPO, tmp_path / "out", ConvertOptions(**options, stream=True))
    # Each layer is in both files.
    assert "lie in such an order that" in caplog.text
    caplog.clear()
    config = replace(CONFIG, num_layers=14)
    weights = make_weights(config, mx.bfloat16)
    files = [f"model-{i:05}-of-00016.safetensors" for i in range(1, 17)]
    weight_map = {}
    hub.files = {
        name: data for name, data in hub.files.items() if not name.endswith(".safetensors")
    }
    for file, names in zip(files, in_order(config), strict=True):
        mx.save_safetensors(
            str(tmp_path / file), {name: weights[name] for name in names}, {"format": "pt"}
        )
        hub.files[file] = (tmp_path / file).read_bytes()
        weight_map |= dict.fromkeys(names, file)
    hub.files["config.json"] = json.dumps(raw_config(config)).encode()
    hub.files["model.safetensors.index.json"] = json.dumps(
        {"metadata": {}, "weight_map": weight_map}
    ).encode()
    conversion = check_conversion(REPO, tmp_path / "out", ConvertOptions(**options, stream=True))
    assert "lie in such an order" not in caplog.text
    assert conversion.fetched_bytes() <= sum(sorted(map(len, hub.files.values()))[-5:])
