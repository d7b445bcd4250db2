"""Digests of what regraft computes, so that a change of structure is seen to change no number.

Recipes are run through the command line, and the tensors of their artifacts are read back: masks
and weights of every pruner, head scores, statistics, rankings and patches of every method, and
answers. Metadata is left out, since a renamed setting changes it and no number. Where the format
of an artifact changes, adapt its reader here, never the digest.

    python tests/goldens.py              compare with the committed files
    python tests/goldens.py --write      write them anew, on purpose
    python tests/goldens.py --demo RUN   the same for the finished folder of `regraft demo`

Other CPUs and other versions of PyTorch round sums differently. A file names those that it was made
with, and only there are digests compared. All is computed by one thread: the demo is that of
`OMP_NUM_THREADS=1 regraft demo`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import transformers
import yaml
from safetensors import safe_open

import pico
from disk import write_jsonl
from regraft.cli import main as regraft
from regraft.restoration.ranking import load_ranking

FOLDER = Path(__file__).parent / "goldens"
Digests = dict[str, str]
Tensors = dict[str, torch.Tensor]


# The machine


def machine() -> dict[str, str]:
    """What decides how sums are rounded: versions, and the instructions that kernels use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # no Linux
        lines = []
    fields = {name.strip(): text.strip() for name, _, text in (one.partition(":") for one in lines)}
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "vendor": fields.get("vendor_id", "unknown"),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": "yes" if "amx_tile" in fields.get("flags", "").split() else "no",
        "threads": "1",
    }


def machine_of_demo(run: Path) -> dict[str, str]:
    """This machine, with the versions and threads of a finished run on it."""
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    versions = {name: report["runs"][0]["versions"][name] for name in ("torch", "transformers")}
    device = json.loads((run / "costs.json").read_text(encoding="utf-8"))[0]["device"]
    return machine() | versions | {"threads": re.findall(r"(\d+) thread", device)[0]}


def other_machine(golden: Mapping[str, Any], now: Mapping[str, str] | None = None) -> str:
    """How the machine of a golden file differs from `now`, this one; "" where it does not."""
    then, now = golden["machine"], machine() if now is None else now
    return ", ".join(
        f"{name} {then.get(name)} there and {now.get(name)} here"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    )


# Artifacts


def _read(file: Path) -> Tensors:
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


def _checkpoint(folder: Path) -> Tensors:
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in _read(file).items()
    }


def digest(tensors: Tensors) -> str:
    """SHA-256 of names, dtypes, shapes and bits, in the order of the names; -0.0 is not 0.0."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _answers(file: Path) -> str:
    """Of what the model answered and whether that refuses, in the order of the prompts."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return _digest_of([[row["id"], row["answer"], row["refused"]] for row in rows])


def _curve(file: Path) -> str:
    """Of the rates at every number of weights that a search tried, and of the one that it took."""
    curve = json.loads(file.read_text(encoding="utf-8"))
    rates = ("asr", "over_refusal", "utility")
    points = [[one["restored"], *(one[name]["value"] for name in rates)] for one in curve["points"]]
    return _digest_of([curve["chosen"], points])


def _digest_of(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def digests_of(run: Path) -> Digests:
    """All that is in the folder of a finished run: name -> digest."""
    heads = _read(run / "heads.safetensors")
    found = {f"heads/{name}": digest({name: scores}) for name, scores in heads.items()}
    for file in run.glob("statistics*.safetensors"):
        found[f"statistics/{file.stem.removeprefix('statistics').strip('-') or 'wanda'}"] = digest(
            _read(file)
        )
    for folder in (run / "pruned").iterdir():
        weights = _checkpoint(folder)
        found[f"pruned/{folder.name}/mask"] = digest({n: t == 0 for n, t in weights.items()})
        found[f"pruned/{folder.name}/weights"] = digest(weights)
    found |= dict(_rankings(run / "rankings"))
    for file in (run / "patches").rglob("*.safetensors"):
        found[f"patch/{file.parent.name}/{file.stem}"] = digest(_read(file))
    for folder in (run / "realigned").glob("*/*"):
        found[f"realigned/{folder.parent.name}/{folder.name}"] = digest(_checkpoint(folder))
    for file in (run / "curves").glob("*/*.json"):
        found[f"search/{file.parent.name}/{file.stem}"] = _curve(file)
    for file in (run / "evaluation").rglob("answers.jsonl"):
        name = file.parent.relative_to(run / "evaluation").as_posix()
        found[f"answers/{name}"] = _answers(file)
    return dict(sorted(found.items()))


def _rankings(folder: Path) -> Iterator[tuple[str, str]]:
    """Rankings by pruning and method, and in order of their digests where these have several.

    The names of their files end in a digest of settings, which is provenance. A ranking of which
    all is restored says no more than its patch does.
    """
    several: dict[str, set[str]] = {}
    for file in folder.rglob("*.safetensors"):
        if _is_whole(load_ranking(file).about["settings"]):
            continue
        name = f"ranking/{file.parent.name}/{file.stem.rpartition('-')[0]}"
        several.setdefault(name, set()).add(digest(_read(file)))
    for name, found in several.items():
        for i, one in enumerate(sorted(found)):
            yield (f"{name}/{i + 1}" if len(found) > 1 else name), one


def _is_whole(settings: Mapping[str, Any]) -> bool:
    free = settings.get("budget") is None and settings.get("count") is None
    return settings["method"] == "fine-tune" or (free and settings["method"] != "gain")


def demo_table(run: Path) -> dict[str, dict[str, Any]]:
    """The figures of the table of a finished `regraft demo`, unrounded, a row a model."""
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    tested = {one["name"]: one for one in report["tables"][0]["rows"]}
    rows = {}
    for one in report["runs"][0]["variants"]:
        row: dict[str, Any] = {name: one[name] for name in ("sparsity", "restored")}
        for metric in ("asr", "over_refusal", "utility"):
            row[metric] = _estimate(one["result"][metric])
            for suite, result in one["result"]["by_suite"].items():
                row[f"{metric} on {suite}"] = _estimate(result[metric])
        compared = tested[one["name"]]
        if compared["attacks"] is not None:
            row["p"] = compared["attacks"]["p"]
            recovery = compared["rsr"] and compared["rsr"]["value"]
            row["rsr"] = recovery and round(recovery, 12)  # beyond, it depends on the order of sums
        rows[one["name"]] = row
    return rows


def _estimate(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return found and {name: found[name] for name in ("value", "n", "low", "high")}


# Runs


def _run(recipe: str, root: Path, *left_dense: str) -> Digests:
    """Run a recipe of the folder goldens, copied beside what it names, by one thread.

    Safety potential does not prune the weights that are `left_dense`.
    """
    content = yaml.safe_load((FOLDER / recipe).read_text(encoding="utf-8"))
    for one in content["prune"]:
        if one.get("method") == "safety-potential" and left_dense:
            one["ignore"] = list(left_dense)
    (root / recipe).write_text(yaml.safe_dump(content), encoding="utf-8")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            regraft(["run", str(root / recipe), "--out", str(root / "run")])
    except SystemExit as end:  # the command line may end so where all went well too
        if end.code:
            raise RuntimeError(f"{recipe} did not run:\n{said.getvalue()}") from end
    finally:
        torch.set_num_threads(threads)
    return digests_of(root / "run")


def run_pico(family: str, root: Path) -> Digests:
    """Every pruner and every method on one pico model; `root` is an empty folder."""
    pico.save(family, root / "dense", torch.bfloat16, "100KB")
    for seed, (name, n) in enumerate({"calibration": 4, "validation": 2, "test": 2}.items()):
        examples = [
            example
            for harmful in (True, False)
            for example in pico.write_examples(
                root / "images", n, harmful, family in pico.VLM_FAMILIES, seed
            )
        ]
        write_jsonl(root / f"{name}.jsonl", examples)
    # What cross-attention reads of the image does not depend on the text of a safety prompt.
    left_dense = ["*.cross_attn.k_proj", "*.cross_attn.v_proj"] if family == "mllama" else []
    return _run("pico.yaml", root, *left_dense)


def run_reader(root: Path) -> Digests:
    """A selection on the bundled reader-llava-12m; `root` is an empty folder."""
    return _run("reader.yaml", root)


RUNS: dict[str, Callable[[Path], Digests]] = {
    **{
        f"pico/{family}": lambda root, family=family: run_pico(family, root)  # type: ignore[misc]
        for family in pico.FAMILIES
    },
    "reader": run_reader,
}


# Golden files


def golden(name: str) -> dict[str, Any]:
    """The content of a golden file: `machine`, and `digests` or `table`."""
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names whose values differ, or that are in one of both alone."""
    missing = [f"{name}: gone" for name in then.keys() - now.keys()]
    missing += [f"{name}: new" for name in now.keys() - then.keys()]
    both = then.keys() & now.keys()
    return sorted([*missing, *(f"{name}: changed" for name in both if then[name] != now[name])])


def _settle(name: str, now: Mapping[str, Any], write: bool) -> bool:
    """Write what was found, or print how it differs from the golden file; whether it does."""
    kind = "table" if "table" in now else "digests"
    if write:
        file = FOLDER / f"{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(now, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return False
    then = golden(name)
    if other := other_machine(then, now["machine"]):
        print(f"{name}: made on another machine ({other}); differences may be of rounding alone")
    changed = differences(then[kind], now[kind])
    print(f"{name}: {len(now[kind])} compared, {len(changed)} differ", *changed, sep="\n  ")
    return bool(changed)


def main() -> int:
    """Compare or write; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", help=f"of {', '.join(RUNS)}; all if not given")
    parser.add_argument("--write", action="store_true", help="write the golden files")
    parser.add_argument("--demo", type=Path, help="a finished folder of `regraft demo`, alone")
    given = parser.parse_args()
    if given.demo:
        demo = {"machine": machine_of_demo(given.demo), "table": demo_table(given.demo)}
        return int(_settle("demo", demo, given.write))
    changed = False
    for name in given.names or RUNS:
        with tempfile.TemporaryDirectory() as root:
            now = {"machine": machine(), "digests": RUNS[name](Path(root))}
            changed |= _settle(name, now, given.write)
    return int(changed)


if __name__ == "__main__":
    sys.exit(main())
