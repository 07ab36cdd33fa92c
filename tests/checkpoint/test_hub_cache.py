"""Hub ids, against a hub on the loopback interface: the files fetched, and each refusal."""

import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest

from magistral_mlx.checkpoint import hub_cache
from magistral_mlx.checkpoint.folder import open_checkpoint, resolve
from magistral_mlx.checkpoint.hub_cache import fetch
from magistral_mlx.errors import HubError, in_units
from tests.support import hub_server
from tests.support.hub_server import COMMIT, OLDER, REPO, Hub, git_sha1, go_offline, serving, use
from tests.support.tiny import make_config, make_weights, write_checkpoint

pytest.importorskip("huggingface_hub")

BOTH = {
    "config.json": b"{}",  # each with its own content: the cache keeps equal files once
    "params.json": b"{ }",
    "tekken.json": b"{  }",
    "SYSTEM_PROMPT.txt": b"think",
    "chat_template.jinja": b"{{ }}",
    "model-00001-of-00002.safetensors": b"first" * 99,
    "model-00002-of-00002.safetensors": b"second" * 99,
    "model.safetensors.index.json": b"{   }",
    "consolidated.safetensors": b"all" * 999,
    "README.md": b"read me",
    "training_args.bin": b"pickle",
    "original/model.safetensors": b"elsewhere",
    "model.gguf": b"gguf",
}
NEEDED = {
    name
    for name in BOTH
    if name.startswith(("config", "params", "tekken", "SYSTEM", "chat", "model"))
} - {"model.gguf"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    state = Hub(dict(BOTH))
    with serving(state) as endpoint:
        use(monkeypatch, endpoint, tmp_path)
        yield state


def refusal(**options: str) -> str:
    with pytest.raises(HubError) as caught:
        fetch(REPO, **options)  # type: ignore[arg-type]
    return str(caught.value)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# what is fetched


def test_shards_are_fetched_and_the_consolidated_file_is_not(
    hub: Hub, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = fetch(REPO)
    assert names(folder) == hub.fetched() == NEEDED
    assert all((folder / name).read_bytes() == BOTH[name] for name in NEEDED)
    assert folder.name == COMMIT  # the converter notes the commit from here
    out, err = capfd.readouterr()
    assert out == ""
    assert "files" in err  # huggingface_hub's own bar


def test_the_consolidated_file_is_fetched_when_asked_for(hub: Hub) -> None:
    fetched = names(fetch(REPO, layout="consolidated"))
    assert "consolidated.safetensors" in fetched
    assert {"params.json", "tekken.json"} < fetched
    assert not any(name.startswith("model") for name in fetched)


def test_the_consolidated_file_is_fetched_when_there_is_no_other(hub: Hub) -> None:
    hub.files = {name: data for name, data in BOTH.items() if not name.startswith("model")}
    assert "consolidated.safetensors" in names(fetch(REPO))


def test_a_second_fetch_downloads_nothing(hub: Hub) -> None:
    folder = fetch(REPO)
    hub.forget()
    assert fetch(REPO) == folder
    assert [request.method for request in hub.requests] == ["GET"]  # the listing


def test_a_new_commit_fetches_only_what_changed(hub: Hub) -> None:
    fetch(REPO)
    hub.forget()
    hub.commit, hub.files = OLDER, BOTH | {"config.json": b"{\n}"}
    folder = fetch(REPO)
    assert folder.name == OLDER
    assert names(folder) == NEEDED
    assert hub.fetched() == {"config.json"}


@pytest.mark.parametrize("revision", ["main", "v1", COMMIT])
def test_a_revision_is_one_commit(hub: Hub, revision: str) -> None:
    assert fetch(REPO, revision=revision).name == COMMIT
    assert all(f"/resolve/{COMMIT}/" in r.path for r in hub.requests if "/resolve/" in r.path)


def test_a_fetched_checkpoint_opens(hub: Hub, tmp_path: Path) -> None:
    """The hub's cache consists of links, which are no reason to refuse a shard."""
    config = make_config()
    written = write_checkpoint(tmp_path / "written", config, make_weights(config))
    hub.files = {path.name: path.read_bytes() for path in written.iterdir()}
    checkpoint = open_checkpoint(resolve(REPO))
    assert checkpoint.shards[0].path.is_symlink()
    assert checkpoint.fingerprint() == open_checkpoint(written).fingerprint()


# without a network


@pytest.mark.parametrize("how", ["flag", "no network"])
@pytest.mark.parametrize("layout", [None, "hf", "consolidated"])
def test_a_complete_copy_is_used_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str, layout: str
) -> None:
    folder = fetch(REPO, layout=layout)  # type: ignore[arg-type]
    go_offline(monkeypatch, how)
    assert fetch(REPO, layout=layout) == folder  # type: ignore[arg-type]
    assert fetch(REPO, layout=layout, revision=COMMIT) == folder  # type: ignore[arg-type]


def test_a_listing_without_hashes_is_refused(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mirror may list files without hashes, and nothing could be checked."""
    complete = hub_server.listing
    monkeypatch.setattr(hub_server, "listing", lambda *args: {**complete(*args), "blobId": None})
    assert "the hub states no size or no hash of config.json" in refusal()
    assert hub.fetched() == set()


@pytest.mark.parametrize(
    "name", ["model\x00.safetensors", "model-\n.safetensors", "model" + "x" * 300 + ".safetensors"]
)
def test_a_name_that_is_none_is_left_alone(hub: Hub, name: str) -> None:
    hub.files[name] = b"odd"
    assert names(fetch(REPO)) == NEEDED


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_hub_that_is_down_is_as_no_network(hub: Hub, status: int) -> None:
    folder = fetch(REPO)
    hub.refusal = status, ""
    assert fetch(REPO) == folder


@pytest.mark.parametrize("how", ["flag", "no network"])
def test_without_a_copy_the_message_says_how_to_give_a_folder(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    go_offline(monkeypatch, how)
    message = refusal()
    assert message.startswith(f"{REPO} cannot be fetched: the hub cannot be reached")
    assert "or name a folder that holds the checkpoint" in message
    assert hub.requests == []


def test_a_copy_lacking_a_file_is_not_used_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fetch(REPO) / "model-00002-of-00002.safetensors").unlink()
    go_offline(monkeypatch, "flag")
    assert "no complete copy is cached" in refusal()


def test_a_copy_of_another_layout_is_not_used_offline(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch(REPO)
    go_offline(monkeypatch, "flag")
    assert "no complete copy is cached" in refusal(layout="consolidated")


# refusals


@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (
            404,
            "RepoNotFound",
            "missing or private on the hub: check the spelling, or log in with `hf auth login`",
        ),
        (401, "RepoNotFound", "missing or private on the hub"),
        (401, "", "was refused: it is private, or the token used is not valid; log in"),
        (403, "GatedRepo", "is gated: accept its terms at http://127.0.0.1"),
        (401, "GatedRepo", "is gated"),
        (403, "", "was refused"),
        (429, "", "could not be fetched (429"),
    ],
)
def test_a_refusal_of_the_hub_names_the_way_out(
    hub: Hub, status: int, code: str, words: str
) -> None:
    hub.refusal = status, code
    message = refusal()
    assert message.startswith(f"{REPO} ")
    assert words in message
    assert "or name a folder that holds the checkpoint" in message


def test_a_gated_repository_is_refused_with_its_page(hub: Hub) -> None:
    hub.file_refusal = 403, "GatedRepo"
    message = refusal()
    assert f"/{REPO}, then log in here with `hf auth login`" in message


def test_a_revision_that_is_none_is_named(hub: Hub) -> None:
    assert f"{REPO} has no revision 'nope': take a branch, tag or commit from" in refusal(
        revision="nope"
    )


@pytest.mark.parametrize("repo_id", ["org/-name", "org/a--b", "org/a..b", "org/" + "a" * 100])
def test_an_impossible_id_is_refused_without_asking(hub: Hub, repo_id: str) -> None:
    with pytest.raises(HubError, match="cannot be a hub id"):
        fetch(repo_id)
    assert hub.requests == []


def test_a_repository_to_convert_first_is_not_fetched_to_run(hub: Hub) -> None:
    hub.files = {
        name: BOTH[name] for name in ("config.json", "params.json", "consolidated.safetensors")
    }
    assert (
        f"convert it first: python -m magistral_mlx.convert --hf-path {REPO} --mlx-path OUT"
        in refusal(layout="hf")
    )
    assert hub.fetched() == set()


@pytest.mark.parametrize(
    ("layout", "wanted"), [(None, "model*.safetensors or consolidated*"), ("hf", "model*.safe")]
)
def test_a_repository_without_weights_is_refused(hub: Hub, layout: str | None, wanted: str) -> None:
    kept = {"config.json", "README.md", "model.gguf", "original/model.safetensors"}
    hub.files = {name: BOTH[name] for name in kept}
    message = refusal(**({"layout": layout} if layout else {}))
    assert f"{REPO} holds no {wanted}" in message
    assert hub.fetched() == set()


def test_a_disk_that_is_too_small_is_refused_before_any_download(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    needed = sum(len(BOTH[name]) for name in NEEDED)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda _: usage(10**9, 10**9 - needed + 1, needed - 1)
    )
    message = refusal()
    assert f"{REPO} needs {in_units(needed)} more under" in message
    assert "set HF_HUB_CACHE to a folder on a larger disk" in message
    assert hub.fetched() == set()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - needed, needed))
    folder = fetch(REPO)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 0))
    assert fetch(REPO) == folder  # nothing is needed any more


def test_a_file_that_arrived_damaged_is_deleted_and_fetched_again(hub: Hub) -> None:
    shard = "model-00002-of-00002.safetensors"
    hub.damaged = frozenset({shard})
    message = refusal()
    assert f"{shard} arrived damaged" in message
    assert "run the same command again" in message
    hub.damaged, first = frozenset(), hub.fetched()
    hub.forget()
    assert (fetch(REPO) / shard).read_bytes() == BOTH[shard]
    assert hub.fetched() == {shard}
    assert first == NEEDED


def test_a_full_disk_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "is full; free some space and run the command again" in refusal()


def test_an_interruption_passes_through(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def interrupted(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "snapshot_download", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(REPO)


# what happens on the way


def test_a_branch_that_moves_meanwhile_changes_nothing(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit that the branch meant first is fetched, and found by its name offline."""
    move(hub, monkeypatch, keep=True)
    folder = fetch(REPO, revision="main")
    assert folder.name == COMMIT
    assert all((folder / name).read_bytes() == BOTH[name] for name in NEEDED)
    go_offline(monkeypatch, "flag")
    assert fetch(REPO) == folder


def test_a_commit_that_is_gone_meanwhile_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    move(hub, monkeypatch, keep=False)
    assert f"no longer has every file at commit {COMMIT}: see " in refusal()


def move(hub: Hub, monkeypatch: pytest.MonkeyPatch, *, keep: bool) -> None:
    """Move the branch to another commit after it was listed."""
    listed = hub_cache.list_files

    def list_and_move(*args: object) -> object:
        listing = listed(*args)  # type: ignore[arg-type]
        if keep:
            hub.other_commits[COMMIT] = dict(hub.files)
        hub.commit, hub.files = (
            OLDER,
            {name: b"new" + content for name, content in hub.files.items()},
        )
        return listing

    monkeypatch.setattr(hub_cache, "list_files", list_and_move)


def test_a_file_that_is_listed_but_missing_is_named(hub: Hub) -> None:
    hub.dropped = frozenset({"model-00002-of-00002.safetensors"})
    assert "no longer has every file" in refusal()
    hub.dropped = frozenset()
    hub.forget()
    assert names(fetch(REPO)) == NEEDED
    assert hub.fetched() == {"model-00002-of-00002.safetensors"}


@pytest.mark.parametrize("layout", [None, "hf", "consolidated"])
def test_a_commit_in_the_cache_costs_no_request(hub: Hub, layout: str) -> None:
    folder = fetch(REPO, revision=COMMIT, layout=layout)  # type: ignore[arg-type]
    hub.forget()
    assert fetch(REPO, revision=COMMIT, layout=layout) == folder  # type: ignore[arg-type]
    assert hub.requests == []


def test_a_commit_of_which_a_file_is_missing_in_the_cache_is_completed(hub: Hub) -> None:
    folder = fetch(REPO, revision=COMMIT)
    (folder / "tekken.json").unlink()
    (folder.parent.parent / "blobs" / git_sha1(BOTH["tekken.json"])).unlink()
    hub.forget()
    assert names(fetch(REPO, revision=COMMIT)) == NEEDED
    assert hub.fetched() == {"tekken.json"}


def test_a_commit_of_another_layout_in_the_cache_is_not_preferred(hub: Hub) -> None:
    fetch(REPO, revision=COMMIT, layout="consolidated")
    assert "model-00001-of-00002.safetensors" in names(fetch(REPO, revision=COMMIT))


@pytest.mark.slow
def test_interrupted_anywhere_only_the_unfinished_files_are_fetched_again(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # huggingface_hub's, between its attempts
    from huggingface_hub import constants

    total = sum(len(BOTH[name]) for name in NEEDED)
    for point in range(20):
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / f"cache-{point}"))
        hub.forget()
        hub.bytes_until_down = 1 + total * point // 20
        refusal()
        finished = {name for name in NEEDED if hub.sent[name] == len(BOTH[name])}
        hub.forget()
        hub.come_back()
        folder = fetch(REPO)
        assert hub.fetched() == NEEDED - finished
        assert {name: (folder / name).read_bytes() for name in NEEDED} == {
            name: BOTH[name] for name in NEEDED
        }


@pytest.mark.parametrize("how", ["online", "flag"])
@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "tekken.json"])
def test_what_arrived_damaged_before_an_interruption_is_found_after_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, how: str, name: str
) -> None:
    hub.damaged = frozenset({name})
    with monkeypatch.context() as patch:
        patch.setattr(hub_cache, "_check", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch(REPO)
    hub.damaged = frozenset()
    with monkeypatch.context() as patch:
        if how == "flag":
            go_offline(patch, how)
        assert f"{name} arrived damaged" in refusal(revision=COMMIT)
    hub.forget()
    assert (fetch(REPO) / name).read_bytes() == BOTH[name]
    assert hub.fetched() == {name}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt
