"""Generate `proto/v1` from the schema: `python -m engram.proto.generate [--check]`.

The descriptor keeps the schema's own name, engram/v1/engram.proto, which reflection shows. The
modules live elsewhere (engram.proto.v1), so their import of each other is made relative.

The generator's version is pinned, because its output differs from release to release and
generated code refuses to run with libraries older than its generator: an old one keeps engram
installable beside others.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

GENERATOR = "1.72.2"
SCHEMA = "engram/v1/engram.proto"
FILES = ("engram_pb2.py", "engram_pb2.pyi", "engram_pb2_grpc.py")

_HERE = Path(__file__).resolve().parent
_TARGET = _HERE / "v1"


def render() -> dict[str, str]:
    """Run the generator; the content of each of `FILES`.

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
        if protoc.main(["protoc", f"-I{_HERE}", *outputs, SCHEMA]):
            sys.exit(f"{SCHEMA} does not compile")
        texts = {name: (Path(folder, SCHEMA).parent / name).read_text() for name in FILES}
    absolute = "from engram.v1 import engram_pb2 as"
    stubs = texts["engram_pb2_grpc.py"]
    if stubs.count(absolute) != 1:
        sys.exit("the generator's import line has changed; adapt proto/generate.py")
    texts["engram_pb2_grpc.py"] = stubs.replace(absolute, "from . import engram_pb2 as")
    return texts


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
