"""Build the wheel and use it from an empty folder: every module, every data file, the command line.

python tests/wheel.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
USE = """
import pathlib, aif, aif.models.decoder, aif.corpus, aif.report
assert str(pathlib.Path(aif.__file__)).startswith({place!r}), aif.__file__
assert len(aif.corpus.read(aif.corpus.bundled("tiny")).rows) > 0
assert len(aif.corpus.load_scale("nexus").dimensions) == 15
lm = aif.load("tiny-random")
assert len(aif.generate(lm, "hello", new_tokens=3)) == 1
"""


def python(*arguments: str, **options) -> None:
    subprocess.run([sys.executable, *arguments], check=True, **options)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        place, empty = Path(folder, "installed"), Path(folder, "empty")
        empty.mkdir()
        python("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, str(ROOT))
        (wheel,) = Path(folder).glob("aif-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = set(archive.namelist())
            archive.extractall(place)
        source = [p for top in ("aif", "models") for p in (ROOT / top).rglob("*") if p.is_file() and not p.is_symlink()]
        source = [p for p in source if "__pycache__" not in p.parts and (ROOT / "aif" / "models") not in p.parents]
        expected = {str(p.relative_to(ROOT)) for p in source}
        expected = {f"aif/{name}" if name.startswith("models/") else name for name in expected}
        missing = sorted(expected - names)
        assert not missing, f"not in the wheel: {missing}"
        assert any(name.endswith("licenses/LICENSE") for name in names)
        environment = {**os.environ, "PYTHONPATH": str(place), "JAX_PLATFORMS": "cpu"}
        python("-c", USE.format(place=str(place)), cwd=empty, env=environment)
        python("-m", "aif.cli", "--help", cwd=empty, env=environment, stdout=subprocess.DEVNULL)
    print("wheel: everything is in it and works")


if __name__ == "__main__":
    main()
