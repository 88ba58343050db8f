"""Generate `proto/v1` from the schema: `python -m engram.proto.generate [--check]`.

The descriptors keep the schema's own names, engram/v1/*.proto, which reflection shows. The
modules live elsewhere (engram.proto.v1), so their import of each other is made relative.

The generator's version is pinned, because its output differs from release to release and
generated code refuses to run with libraries older than its generator: an old one keeps engram
installable beside others.
"""

from __future__ import annotations

import re
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GENERATOR = "1.72.2"
FILES = {
    "engram/v1/engram.proto": ("engram_pb2.py", "engram_pb2.pyi", "engram_pb2_grpc.py"),
    "engram/v1/attach.proto": ("attach_pb2.py", "attach_pb2.pyi"),
}
"""Modules by the schema they come from."""

_HERE = Path(__file__).resolve().parent
_TARGET = _HERE / "v1"


def render() -> dict[str, str]:
    """Run the generator; the content of each module of `FILES`.

    Raises:
        SystemExit: the pinned generator is not installed, or the schema does not compile.
    """
    try:
        found = version("grpcio-tools")
    except PackageNotFoundError:
        found = "not installed"
    if found != GENERATOR:
        sys.exit(f"grpcio-tools {GENERATOR} is needed, found: {found}; install the dev extra")
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as folder:
        outputs = [f"--{kind}_out={folder}" for kind in ("python", "pyi", "grpc_python")]
        if protoc.main(["protoc", f"-I{_HERE}", *outputs, *FILES]):
            sys.exit("the schema does not compile")
        return {
            name: _import_relatively(Path(folder, schema).parent.joinpath(name).read_text())
            for schema, names in FILES.items()
            for name in names
        }


def _import_relatively(text: str) -> str:
    """Modules that import each other lie in one folder, not where the schema's name says."""
    found = text.replace("from engram.v1 import ", "from . import ")
    if re.search(r"\bengram\.v1 import|^import engram", found, re.MULTILINE):
        sys.exit("the generator's import lines have changed; adapt proto/generate.py")
    return found


def stale(texts: dict[str, str]) -> list[str]:
    """Names of files in `proto/v1` that differ from `texts`."""
    return [
        name
        for name, text in texts.items()
        if not (_TARGET / name).is_file() or (_TARGET / name).read_text() != text
    ]


def main(arguments: list[str]) -> int:
    if arguments not in ([], ["--check"]):
        sys.exit("usage: python -m engram.proto.generate [--check]")
    texts = render()
    outdated = stale(texts)
    if arguments == ["--check"]:
        if outdated:
            print(f"outdated: {', '.join(outdated)}; run python -m engram.proto.generate")
        return 1 if outdated else 0
    for name in outdated:
        (_TARGET / name).write_text(texts[name])
    print(f"wrote {', '.join(outdated)}" if outdated else "up to date")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
