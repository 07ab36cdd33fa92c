"""Write the files beside the weights; the manifest comes last."""

from typing import Any

from magistral_mlx.checkpoint.manifest import MANIFEST, REASONING_FORMAT
from magistral_mlx.checkpoint.safetensors_header import INDEX
from magistral_mlx.convert.calibration.forward import EMBEDDING
from magistral_mlx.convert.output.export import exports, json_text, make_config
from magistral_mlx.convert.output.manifest import entry_of, make_manifest
from magistral_mlx.convert.output.report import make_report
from magistral_mlx.convert.output.staging import Staging
from magistral_mlx.convert.pipeline.prepare import Checked
from magistral_mlx.convert.recipe.layout import Plan
from magistral_mlx.files import write_file

HASHES = ("size", "sha256")


def build_documents(checked: Checked, plan: Plan) -> dict[str, bytes]:
    """Build every file except the weights and the manifest."""
    source = checked.origin.source
    config = make_config(source.config, plan.quantization, plan.float_type)
    return {INDEX: json_text(plan.index()).encode()} | exports(
        source.folder,
        config,
        checked.tokenizer,
        tokenizer_json=checked.options.tokenizer_json,
        base_model=checked.origin.hub_id,
    )


def plan_record(checked: Checked, identity: dict[str, Any]) -> dict[str, Any]:
    """Return the part of the manifest that determines every byte of the result."""
    return make_manifest(source=identity, options=checked.recorded_options)


def write_documents(
    checked: Checked,
    plan: Plan,
    staging: Staging,
    documents: dict[str, bytes],
    identity: dict[str, Any],
) -> None:
    """Write the files beside the weights, then the manifest, which holds all files' hashes."""
    for name, content in documents.items():
        write_file(staging.folder / name, content)
    files = {name: entry_of(content) for name, content in documents.items()}
    for shard in plan.shards:
        written = staging.finished[shard.file]
        hashes = {key: written[key] for key in HASHES}
        files[shard.file] = hashes | {"header_sha256": shard.header_sha256}
    manifest = (
        plan_record(checked, identity)
        | {REASONING_FORMAT: checked.tokenizer.reasoning_format}
        | _report(checked, plan, staging)
        | {"files": dict(sorted(files.items()))}
    )
    write_file(staging.folder / MANIFEST, json_text(manifest).encode())


def _report(checked: Checked, plan: Plan, staging: Staging) -> dict[str, Any]:
    if checked.calibration is None:
        return {}
    errors: dict[str, list[float]] = {}
    for shard in plan.shards:
        errors |= staging.finished[shard.file].get("errors", {})
    without_inputs = () if checked.origin.source.config.tie_word_embeddings else (EMBEDDING,)
    ordered = {module: errors[module] for module in plan.formats if module in errors}
    return {"report": make_report(checked.options.method, ordered, without_inputs)}
