"""A patch for other tools: what `regraft apply` would write, as an adapter or as weight patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor

from regraft import distributed
from regraft.disk.artifact import ABOUT_FILE
from regraft.disk.files import atomic_folder, file_digest, to_json
from regraft.errors import RegraftError
from regraft.models.architecture import FLOATS
from regraft.models.checkpoint import Checkpoint, open_checkpoint
from regraft.models.load import linear_layers, open_source
from regraft.models.resolve import resolve
from regraft.patch import peft, vllm
from regraft.patch.apply import Plan, make_plan
from regraft.patch.format import Patch, load_patch
from regraft.patch.hub import patch_file
from regraft.progress import Progress, Silent
from regraft.stages.provenance import describe, is_done

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


@dataclass(frozen=True)
class _Content:
    """What a folder is to hold: text files, and a safetensors file `weights`."""

    texts: Mapping[str, str]
    weights: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]


def export(
    pruned: str | Path,
    patch_files: Sequence[Path],
    out: Path,
    to: Tool,
    progress: Progress | None = None,
    *,
    trust_remote_code: bool = False,
) -> Path:
    """Write what `apply` would change in the checkpoint `pruned` to the folder `out`.

    For `peft` that is a SHiRA adapter (see `regraft.patch.peft`), for `vllm` a file of weight
    patches (see `regraft.patch.vllm`). Either has a README with the lines that load it.

    Raises:
        RegraftError: a patch is for another base, patches disagree, nothing is left to change, the
            tool cannot have these weights, or `out` is not empty.
    """
    checkpoint = open_checkpoint(resolve(pruned))
    if not patch_files:
        raise RegraftError("No patch is named. Name one or more files of `regraft realign`.")
    files = [patch_file(path) for path in patch_files]
    patches = [load_patch(path) for path in files]
    touched = {name for patch in patches for name in patch.tensors}
    inputs = {
        "pruned": checkpoint.outline(without={ABOUT_FILE, *touched}),
        "patch": " ".join(sorted({file_digest(path) for path in files})),
    }
    about = describe("export", inputs) | {"to": to}
    done = is_done(out, out / ABOUT_FILE, about)
    plan = _plan(checkpoint, patches, progress or Silent())
    if done:
        return out
    content = _for_vllm(plan) if to == "vllm" else _for_peft(plan, trust_remote_code)
    if distributed.first():
        _write(out, content, {ABOUT_FILE: to_json(about)})
    return out


def _plan(checkpoint: Checkpoint, patches: Sequence[Patch], progress: Progress) -> Plan:
    tensors = {name for patch in patches for name in patch.tensors}
    for name in sorted(tensors & checkpoint.tensors.keys()):
        if (dtype := checkpoint.tensors[name].dtype) not in FLOATS:
            raise RegraftError(
                f"{checkpoint.folder}: {name} is stored as {dtype}; tensors of {', '.join(FLOATS)} "
                "can be exported."
            )
    with progress.task("Checking the patched weights", len(tensors), "tensors") as done:
        plan = make_plan(checkpoint, patches, "apply", advance=done)
    if not plan.changes:
        raise RegraftError(
            f"{checkpoint.folder} has the patch on already, so that nothing is left to export. "
            "Name the pruned checkpoint without it."
        )
    return plan


def _for_peft(plan: Plan, trust_remote_code: bool) -> _Content:
    peft.require_matrices(plan.changes)
    source = open_source(plan.checkpoint.folder, trust_remote_code=trust_remote_code)
    layers = linear_layers(source)
    modules = {
        linear.tensor: linear.module
        for linear in source.architecture.linears
        # a part of a linear, or of a tensor, has other rows than an adapter's
        if linear.module in layers and linear.held is None and linear.stored is None
    }
    held = [
        plan.checkpoint.read(change.record.name).reshape(-1)[change.positions]
        for change in plan.changes
    ]
    adapter = peft.shira(plan.changes, held, modules)
    vision = source.architecture.has_vision
    readme = _ABOUT_PEFT.format(
        weights=plan.weights,
        tensors=len(plan.changes),
        auto="AutoModelForImageTextToText" if vision else "AutoModelForCausalLM",
    )
    texts = {README: readme, peft.CONFIG_FILE: to_json(adapter.config)}
    return _Content(texts, peft.WEIGHTS_FILE, adapter.tensors, {"format": "pt"})


def _for_vllm(plan: Plan) -> _Content:
    metadata, tensors = vllm.weight_patches(plan.changes)
    readme = _ABOUT_VLLM.format(
        weights=plan.weights,
        tensors=len(plan.changes),
        file=vllm.FILE,
        metadata=vllm.METADATA,
    )
    return _Content({README: readme}, vllm.FILE, tensors, metadata)


def _write(out: Path, content: _Content, more: Mapping[str, str]) -> None:
    with atomic_folder(out) as temporary:
        for name, text in {**content.texts, **more}.items():
            (temporary / name).write_text(text, encoding="utf-8")
        weights = temporary / content.weights
        weights.touch()  # with the usual permissions, which save_file would restrict
        mode = weights.stat().st_mode
        save_file(dict(content.tensors), weights, metadata=dict(content.metadata))
        weights.chmod(mode)
