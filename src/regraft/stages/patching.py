"""Apply patches to a checkpoint or revert them, into a new folder; export them to other tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import nn

from regraft import distributed
from regraft.data.storage import MODEL_ID, from_hub
from regraft.disk.artifact import ABOUT_FILE, about_in, save_tensors
from regraft.disk.files import atomic_folder, file_digest, to_json
from regraft.errors import RegraftError
from regraft.models.checkpoint import FLOATS, Checkpoint, open_checkpoint
from regraft.models.checkpoint_copy import check_target
from regraft.models.load import Source, open_source
from regraft.models.resolve import auto_class, resolve
from regraft.patch import peft, vllm
from regraft.patch.apply import Operation, Plan, make_plan, write_plan
from regraft.patch.format import Patch, load_patch
from regraft.progress import SILENT, Progress
from regraft.stages.provenance import describe, holds, is_done, working

PATCH_FILE = "patch.safetensors"  # name of the patch in a repository on the hub
Tool = Literal["peft", "vllm"]
README = "README.md"
_ABOUT_PEFT = """\
---
library_name: peft
tags: [regraft, shira]
---

# Restored weights as a SHiRA adapter

{weights:,} weights of {tensors} matrices, made with `regraft export`. On the checkpoint that the
patch was made for, in its own dtype, merging gives the weights that `regraft apply` writes, to the
bit. PEFT does not check that it is this checkpoint.

```python
from peft import PeftModel
from transformers import {auto}

pruned = {auto}.from_pretrained("PRUNED", dtype="auto")
model = PeftModel.from_pretrained(pruned, "FOLDER").merge_and_unload()
```
"""
_ABOUT_VLLM = """\
# Restored weights as weight patches of vLLM

{weights:,} weights of {tensors} tensors, made with `regraft export`: `{file}` holds the fields of
vLLM's `CheckpointWeightPatch` for each tensor. vLLM does not check that the model it serves is the
checkpoint that the patch was made for.

```python
import json
import torch
from safetensors import safe_open


def load(model):
    from vllm.model_executor.model_loader import checkpoint_weight_patch as to

    with safe_open("FOLDER/{file}", "pt") as file:
        patches = [
            to.CheckpointWeightPatch(
                name=one["name"],
                shape=tuple(one["shape"]),
                dtype=getattr(torch, one["dtype"]),
                values=file.get_tensor(one["name"] + ".values"),
                indices=file.get_tensor(one["name"] + ".indices"),
            )
            for one in json.loads(file.metadata()["{metadata}"])
        ]
    to.load_checkpoint_weight_patches(model, patches)


llm.apply_model(load)
```
"""


def patch_checkpoint(
    operation: Operation,
    folder: Path,
    patch_files: Path | Sequence[Path],
    out: Path,
    progress: Progress = SILENT,
) -> Path:
    """Apply one or several patches to a checkpoint, or revert them; writes the new folder `out`.

    An existing output is done if it was made by the same operation, patches and versions from a
    checkpoint with the same history and outline (see `Checkpoint.outline`). The tensors that the
    patches touch are compared with the patches' base every time, of the others only the layout and
    the first bytes.

    Raises:
        RegraftError: a patch is for another base, patches disagree, or `out` is not empty.
    """
    job = PatchJob.read(operation, open_checkpoint(folder), patch_files)
    about = _about(job)
    done = is_done(out, about, marker=ABOUT_FILE)
    if not done and distributed.first():
        check_target(job.checkpoint, out)
    plan = job.plan(progress)
    if done:
        open_checkpoint(out)
        return out
    as_it_was = "nothing: the patches are already " + ("on" if operation == "apply" else "off")
    progress.note(f"Changes {f'{plan.weights:,} weights' if plan.weights else as_it_was}.")
    with working(out, about):
        if distributed.first():
            with progress.task(f"Writing {out}", job.checkpoint.bytes, "bytes") as advance:
                files, unbounded = {ABOUT_FILE: to_json(about)}, Source(job.checkpoint).unbounded
                write_plan(plan, out, files=files, advance=advance, unbounded=unbounded)
    return out


def preview(
    operation: Operation,
    folder: Path,
    patch_files: Sequence[Path],
    out: Path,
    progress: Progress = SILENT,
) -> tuple[Plan, int]:
    """Check what `patch_checkpoint` checks and return what it would do; writes nothing.

    Only tensors that the patches touch are read; the others are checked when they are copied.

    Returns:
        The changes, and the number of bytes to write: 0 if the output exists already.
    """
    job = PatchJob.read(operation, open_checkpoint(folder), patch_files)
    done = holds(out, _about(job), marker=ABOUT_FILE)
    if not done:
        check_target(job.checkpoint, out)
    return job.plan(progress), 0 if done else job.checkpoint.bytes


def patch_file(named: Path) -> Path:
    """The file of a patch: a path as it is; OWNER/NAME[@REVISION] is downloaded from the hub.

    Only the patch is downloaded. A name that ends in .safetensors is always a path.
    """
    text = named.as_posix()
    if named.exists() or named.suffix == ".safetensors" or not MODEL_ID.fullmatch(text):
        return named
    name, _, revision = text.partition("@")
    file = from_hub(name, revision or None, [PATCH_FILE]) / PATCH_FILE
    if not file.is_file():
        raise RegraftError(
            f"{text} is neither a file here nor a patch on the hub: its repository holds no "
            f"{PATCH_FILE}, under which `regraft push` puts one."
        )
    return file


@dataclass(frozen=True)
class PatchJob:
    """An operation with its checkpoint and patches, before any weight is read."""

    operation: Operation
    checkpoint: Checkpoint
    digests: tuple[str, ...]
    patches: tuple[Patch, ...]

    @classmethod
    def read(
        cls, operation: Operation, checkpoint: Checkpoint, patch_files: Path | Sequence[Path]
    ) -> PatchJob:
        """Read the patches, if need be from the hub.

        Raises:
            RegraftError: none is named, or a file is no patch.
        """
        named = (patch_files,) if isinstance(patch_files, Path) else tuple(patch_files)
        if not named:
            raise RegraftError("No patch is named. Name one or more files of `regraft realign`.")
        files = tuple(map(patch_file, named))
        patches = tuple(load_patch(path) for path in files)
        digests = tuple(file_digest(path) for path in files)
        return cls(operation, checkpoint, digests, patches)

    @property
    def tensors(self) -> set[str]:
        """Names of the tensors that the patches touch."""
        return {name for patch in self.patches for name in patch.tensors}

    def plan(self, progress: Progress) -> Plan:
        """Check the weights and list what has to change."""
        with progress.task("Checking the patched weights", len(self.tensors), "tensors") as done:
            return make_plan(self.checkpoint, self.patches, self.operation, advance=done)

    def inputs(self) -> dict[str, str]:
        """Digests of the checkpoint without what the patches touch, and of the patches."""
        role = "pruned" if self.operation == "apply" else "realigned"
        return {
            role: self.checkpoint.outline(without={ABOUT_FILE, *self.tensors}),
            "patch": " ".join(sorted(set(self.digests))),
        }


def _about(job: PatchJob) -> dict[str, Any]:
    """The description of the output; its field `before` is the checkpoint's own."""
    return describe(job.operation, job.inputs()) | {"before": about_in(job.checkpoint.folder)}


def export_patches(
    pruned: str | Path,
    patch_files: Sequence[Path],
    out: Path,
    to: Tool,
    progress: Progress = SILENT,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Export what `apply` would change in the checkpoint `pruned`; writes the folder `out`.

    For `peft` that is a SHiRA adapter (see `regraft.patch.peft`), for `vllm` a file of weight
    patches (see `regraft.patch.vllm`). Both have a README with the code that loads them.

    Raises:
        RegraftError: a patch is for another base, patches disagree, nothing is left to change, the
            tool is unknown or cannot take these weights, or `out` is not empty.
    """
    if to not in get_args(Tool):
        raise RegraftError(f"There is no tool {to!r} to export for; expected peft or vllm.")
    job = PatchJob.read("apply", open_checkpoint(resolve(pruned)), patch_files)
    about = describe("export", job.inputs()) | {"to": to}
    done = is_done(out, about, marker=ABOUT_FILE)
    plan = _export_plan(job, progress)
    if done:
        return out
    with working(out, about):
        if distributed.first():
            with atomic_folder(out) as folder:
                if to == "vllm":
                    _write_vllm(folder, plan)
                else:
                    _write_peft(folder, plan, trust_remote_code)
                (folder / ABOUT_FILE).write_text(to_json(about), encoding="utf-8")
    return out


def _export_plan(job: PatchJob, progress: Progress) -> Plan:
    checkpoint = job.checkpoint
    for name in sorted(job.tensors & checkpoint.tensors.keys()):
        if (dtype := checkpoint.tensors[name].dtype) not in FLOATS:
            raise RegraftError(
                f"{checkpoint.folder}: {name} is stored as {dtype}; tensors of {', '.join(FLOATS)} "
                "can be exported."
            )
    plan = job.plan(progress)
    if not plan.changes:
        raise RegraftError(
            f"{checkpoint.folder} already has the patch, so nothing is left to export. Name the "
            "pruned checkpoint without it."
        )
    return plan


def _write_peft(folder: Path, plan: Plan, trust_remote_code: bool) -> None:
    peft.require_matrices(plan.changes)
    source = open_source(plan.checkpoint.folder, trust_remote_code=trust_remote_code)
    in_memory = source.without_weights.named_modules()
    layers = {name for name, module in in_memory if isinstance(module, nn.Linear)}
    modules = {
        linear.tensor: linear.module
        for linear in source.architecture.linears
        # not parts of a linear or of a tensor, whose rows are not an adapter's
        if linear.module in layers and linear.held is None and linear.stored is None
    }
    values = [
        plan.checkpoint.read(change.record.name).reshape(-1)[change.positions]
        for change in plan.changes
    ]
    adapter = peft.shira(plan.changes, values, modules)
    readme = _ABOUT_PEFT.format(
        weights=plan.weights,
        tensors=len(plan.changes),
        auto=auto_class(source.config, source.folder).__name__,
    )
    (folder / README).write_text(readme, encoding="utf-8")
    (folder / peft.CONFIG_FILE).write_text(to_json(adapter.config), encoding="utf-8")
    save_tensors(folder / peft.WEIGHTS_FILE, adapter.tensors, {"format": "pt"})


def _write_vllm(folder: Path, plan: Plan) -> None:
    metadata, tensors = vllm.weight_patches(plan.changes)
    readme = _ABOUT_VLLM.format(
        weights=plan.weights,
        tensors=len(plan.changes),
        file=vllm.FILE,
        metadata=vllm.METADATA,
    )
    (folder / README).write_text(readme, encoding="utf-8")
    save_tensors(folder / vllm.FILE, tensors, metadata)
