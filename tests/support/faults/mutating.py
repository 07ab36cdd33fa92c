"""Open checkpoints that are damaged at random, one after the other.

Run ``python -m tests.support.faults.mutating KINDS COUNT SEED KIND...``.
"""

import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from magistral_mlx.checkpoint.folder import open_checkpoint
from magistral_mlx.convert.source.source import open_source
from magistral_mlx.tokenizer.tekken import Tokenizer
from tests.support.corpus import SOUND, Step, Watch, faults_of
from tests.support.faults.damage import PARAMS
from tests.support.faults.mutator import FILES, mutate

# Fields of ModelConfig -> their names in config.json and in params.json.
FIELDS = {
    "hidden_size": ("hidden_size", "dim"),
    "intermediate_size": ("intermediate_size", "hidden_dim"),
    "num_layers": ("num_hidden_layers", "n_layers"),
    "num_heads": ("num_attention_heads", "n_heads"),
    "num_kv_heads": ("num_key_value_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "head_dim"),
    "vocab_size": ("vocab_size", "vocab_size"),
    "rms_norm_eps": ("rms_norm_eps", "norm_eps"),
    "rope_theta": ("rope_theta", "rope_theta"),
    "max_positions": ("max_position_embeddings", "max_position_embeddings"),
}


def describe(step: Step, folder: Path) -> dict[str, Any]:
    """Return everything that opening a folder finds; for our own output its documents, too."""
    if step == "convert":
        opened: Any = open_source(folder)
        found = {"type": opened.float_type}
    else:
        opened = open_checkpoint(folder)
        found = {"formats": opened.formats, "prompt": Tokenizer.from_folder(folder).system_prompt}
    found["config"] = opened.config
    found["tensors"] = {
        name: (
            shard.path.name,
            entry.dtype,
            entry.shape,
            shard.data_start + entry.begin,
            shard.data_start + entry.end,
        )
        for shard in opened.shards
        for name, entry in shard.header.items()
    }
    if folder.name == "own":
        documents = (folder / name for name in FILES["own"][2:-1])
        found["documents"] = {
            path.name: path.read_bytes() if path.is_file() else None for path in documents
        }
    return found


def differences(found: dict[str, Any], folder: Path) -> list[str]:
    """List the differences between an opened folder and its files, read without our code."""
    is_native = folder.name == "native"
    tensors: dict[str, Any] = {}
    for path in folder.glob("consolidated.safetensors" if is_native else "model*.safetensors"):
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8 : 8 + size]).items():
            if name != "__metadata__":
                begin, end = (8 + size + offset for offset in entry["data_offsets"])
                tensors[name] = path.name, entry["dtype"], tuple(entry["shape"]), begin, end
    raw = json.loads((folder / (PARAMS if is_native else "config.json")).read_bytes())
    wrong = ["tensors"] if found["tensors"] != tensors else []
    for field, names in FIELDS.items():
        value, kept = raw.get(names[is_native]), getattr(found["config"], field)
        # 10**30 is not equal to its float.
        if value is not None and type(kept)(value) != kept:
            wrong.append(field)
    return wrong


def judge(
    error: BaseException | None, found: dict[str, Any], sound: dict[str, Any], folder: Path
) -> tuple[str, Any]:
    """Return how opening a damaged folder ended, and the faults of that ending."""
    if error is not None:
        return "refused", [
            f"{type(error).__name__} {fault}: {error}"[:400] for fault in faults_of(error, folder)
        ]
    if found == sound:
        return "harmless", []
    if folder.name == "own":
        return "changed", [
            f"differs silently in {', '.join(key for key in found if found[key] != sound[key])}"
        ]
    return "changed", [f"{what} is not as the file says" for what in differences(found, folder)]


def restore(folder: Path, name: str, content: dict[str, bytes]) -> None:
    path = folder / name
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if name in content:
        path.write_bytes(content[name])


def main(kinds: Path, count: int, seed: int, chosen: Sequence[str]) -> dict[str, Any]:
    """Damage and open checkpoints of the chosen kinds; return endings, faults and memory."""
    chance = random.Random(seed)
    sound = {(kind, step): describe(step, kinds / kind) for kind, step in SOUND if kind in chosen}
    contents = {
        kind: {path.name: path.read_bytes() for path in (kinds / kind).iterdir()} for kind in chosen
    }
    watch, tally, faults = Watch(), Counter[str](), []
    for i in range(count):
        kind, step = chance.choice(list(sound))
        folder = kinds / kind
        how = mutate(chance, folder, kind)
        error, found = None, {}
        with watch.case():
            try:
                found = describe(step, folder)
            except (KeyboardInterrupt, SystemExit):
                raise
            # A panic in Rust is not an Exception.
            except BaseException as caught:
                error = caught
        ending, wrong = judge(error, found, sound[kind, step], folder)
        tally[ending] += 1
        faults += [f"{i}, {kind} to {step}, {how}: {fault}" for fault in wrong]
        restore(folder, how.partition(":")[0], contents[kind])
    return {"endings": tally, "faults": faults} | watch.figures()


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])))
