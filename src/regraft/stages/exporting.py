"""A patch for other tools: what `regraft apply` would write, as an adapter or as weight patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from regraft import distributed
from regraft.disk.artifact import ABOUT_FILE, save_tensors
from regraft.disk.files import atomic_folder, to_json
from regraft.errors import RegraftError
from regraft.models.checkpoint import FLOATS, open_checkpoint
from regraft.models.load import linear_layers, open_source
from regraft.models.resolve import resolve
from regraft.patch import peft, vllm
from regraft.patch.apply import Plan
from regraft.progress import SILENT, Progress
from regraft.stages.patching import PatchJob
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


def export_patches(
    pruned: str | Path,
    patch_files: Sequence[Path],
    out: Path,
    to: Tool,
    progress: Progress = SILENT,
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
    job = PatchJob.read("apply", open_checkpoint(resolve(pruned)), patch_files)
    about = describe("export", job.inputs()) | {"to": to}
    done = is_done(out, out / ABOUT_FILE, about)
    plan = _plan(job, progress)
    if done:
        return out
    content = _for_vllm(plan) if to == "vllm" else _for_peft(plan, trust_remote_code)
    if distributed.first():
        with atomic_folder(out) as folder:
            for name, text in {**content.texts, ABOUT_FILE: to_json(about)}.items():
                (folder / name).write_text(text, encoding="utf-8")
            save_tensors(folder / content.weights, content.tensors, content.metadata)
    return out


def _plan(job: PatchJob, progress: Progress) -> Plan:
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
