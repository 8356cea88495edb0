"""Builds what the project has on the hub into a folder, checks it, and pushes it where asked.

    python .ci/hub/publish.py OUT                      # builds and lists; needs no network
    python .ci/hub/publish.py OUT --org ORG --push     # and uploads, as the user of `hf auth login`

Four repositories: write gates and a DuoAttention pattern of SmolLM2-135M-Instruct, a
`custom_generate` that attaches a pipeline, and the kernels for the package `kernels`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))

from kvpolicy import pretrained  # noqa: E402

# Folder here, name on the hub, kind of the repository there.
REPOSITORIES = {
    "gates": ("smollm2-135m-instruct-gates", "model"),
    "duo": ("duo-smollm2-135m-instruct", "model"),
    "generate": ("generate", "model"),
    "kernels": ("kvpolicy-kernels", "kernel"),
}
DOCS = "https://github.com/kvpolicy/kvpolicy/blob/main/docs/"
SOURCES = ("backend.py", "choices.py", "errors.py")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("out", type=Path, help="a folder that is not there or empty")
    parser.add_argument("--org", default=pretrained.ORGANISATION, help="owner on the hub")
    parser.add_argument("--push", action="store_true", help="upload what was built")
    args = parser.parse_args(arguments)
    if args.out.exists() and any(args.out.iterdir()):
        parser.error(f"out: wanted an empty folder, got {args.out}")
    for folder in build(args.out, args.org):
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        name, kind = REPOSITORIES[folder.name]
        size = sum(p.stat().st_size for p in files)
        print(f"{args.org}/{name} ({kind}): {len(files)} files, {size / 1e6:.1f} MB")
        if args.push:
            push(folder, f"{args.org}/{name}", kind)
    return 0


def build(out: Path, org: str) -> list[Path]:
    """Writes the four repositories under `out`; returns their folders."""
    shutil.copytree(HERE / "generate", out / "generate", ignore=_unwanted)
    _pretrained(out)
    _kernels(out / "kernels", org)
    for name, (repository, _) in REPOSITORIES.items():
        card = (HERE / name / "README.md").read_text(encoding="utf-8")
        values = {"repository": f"{org}/{repository}", "made": _made(), "version": str(_version())}
        for word, value in values.items():
            card = card.replace(f"{{{word}}}", value)
        (out / name / "README.md").write_text(card.rstrip() + "\n", encoding="utf-8")
        _copy(ROOT / "LICENSE", out / name / "LICENSE")
    return [out / name for name in REPOSITORIES]


def push(folder: Path, repository: str, kind: str) -> None:
    """Uploads a folder as one commit; of a kernel, to the branch of its version too."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, repo_type=kind, exist_ok=True)
    branches = [None, f"v{_version()}"] if kind == "kernel" else [None]
    for branch in branches:
        if branch is not None:
            api.create_branch(repository, branch=branch, repo_type=kind, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            repo_type=kind,
            revision=branch,
            commit_message="kvpolicy",
        )


def _pretrained(out: Path) -> None:
    """Each known policy's files under its repository, with the bytes that its name stands for."""
    folders = {repository: out / name for name, (repository, _) in REPOSITORIES.items()}
    for name, known in pretrained.KNOWN.items():
        here = pretrained.path(name, ROOT / "kvpolicy" / "pretrained")
        folder = folders[known.repository]
        folder.mkdir(parents=True, exist_ok=True)
        for file, digest in known.files.items():
            source = here / file if here.is_dir() else here
            if hashlib.sha256(source.read_bytes()).hexdigest() != digest:
                raise ValueError(
                    f"{source}: its SHA-256 is not {digest}, as kvpolicy.pretrained says"
                )
            shutil.copyfile(source, folder / file)


def _made() -> str:
    """The sections of the README of trained policies that say how they came and what they hold."""
    text = (ROOT / "kvpolicy" / "pretrained" / "README.md").read_text(encoding="utf-8")
    licence = text[text.index("## Licence") :]
    table = text[text.index("| file |") : text.index("They load by name")]
    return f"{table}\n{licence}".replace("../../docs/", DOCS)


def _version() -> int:
    settings = tomllib.loads((HERE / "kernels" / "build.toml").read_text(encoding="utf-8"))
    return int(settings["general"]["version"])


def _kernels(out: Path, org: str) -> None:
    """The kernels as `kernel-builder` wants their sources, and as `kernels` loads their builds."""
    text = (HERE / "kernels" / "build.toml").read_text(encoding="utf-8")
    name, _ = REPOSITORIES["kernels"]
    module = name.replace("-", "_")
    source = out / "torch-ext" / module
    for file in SOURCES:
        _copy(ROOT / "kvpolicy" / file, source / file)
    _copy(HERE / "kernels" / "__init__.py", source / "__init__.py")
    shutil.copytree(ROOT / "kernels", source / "kernels", ignore=_unwanted)
    for folder in ("ops", "reference"):
        shutil.copytree(ROOT / "kvpolicy" / folder, source / folder, ignore=_unwanted)
    (out / "build.toml").write_text(text.replace("{repository}", f"{org}/{name}"), encoding="utf-8")
    settings = tomllib.loads(text)["general"]
    for backend in settings["backends"]:
        variant = out / "build" / f"torch-{backend}"
        shutil.copytree(source, variant)
        files = {
            p.relative_to(variant).as_posix(): base64.b64encode(
                hashlib.sha256(p.read_bytes()).digest()
            ).decode()
            for p in sorted(variant.rglob("*.py"))
        }
        unique = hashlib.sha256(json.dumps(files).encode()).hexdigest()[:7]
        described = {
            "id": f"_{module}_{backend}_{unique}",
            "name": name,
            "version": settings["version"],
            "license": settings["license"],
            "python-depends": [],
            "backend": {"type": backend},
            "digest": {"algorithm": "sha256", "files": files},
        }
        text = json.dumps(described, indent=2) + "\n"
        (variant / "metadata.json").write_text(text, encoding="utf-8")


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _unwanted(folder: str, names: list[str]) -> set[str]:
    """What a copy leaves out: caches, and notes for readers of the repository."""
    kernels = Path(folder).name == "kernels"
    return {n for n in names if n == "__pycache__" or (kernels and n == "README.md")}


if __name__ == "__main__":
    sys.exit(main())
