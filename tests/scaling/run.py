"""Two replicas of locket behind NVIDIA Dynamo's frontend and behind vllm-router.

    python3 tests/scaling/run.py                      # both gateways, every check
    python3 tests/scaling/run.py --gateways dynamo --checks kill,drain
    python3 tests/scaling/run.py --measure            # docs/scaling.md's figures

Needs the release binary and its default model. Installs what it needs into target/python/scaling.
"""

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
TARGET = Path(os.environ.get("CARGO_TARGET_DIR", REPOSITORY / "target"))


def in_environment() -> None:
    """Runs this script again in an environment that has requirements.txt, made once."""
    folder = REPOSITORY / "target/python/scaling"
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    lists = [HERE, REPOSITORY / "deploy/dynamo", REPOSITORY / "deploy/vllm-router"]
    wanted = "".join((path / "requirements.txt").read_text() for path in lists)
    stamp, python = folder / "requirements.txt", folder / "bin/python"
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # Every package is in the file: Dynamo's own list brings gigabytes that are not used here.
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*pip, "-r", str(HERE / "requirements.txt")], check=True)
        stamp.write_text(wanted)
    os.execv(python, [str(python), *sys.argv])


def arguments() -> argparse.Namespace:
    from checks import CHECKS
    from gateways import GATEWAYS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gateways", default=",".join(GATEWAYS), help="names, separated by commas")
    parser.add_argument("--checks", default=",".join(CHECKS), help="names, separated by commas")
    parser.add_argument("--streams", type=int, default=50, help="at once, in the checks kill and drain")
    parser.add_argument("--locket", type=Path, default=TARGET / "release/locket", help="the binary")
    parser.add_argument("--logs", type=Path, help="folder for the processes' logs")
    parser.add_argument("--measure", action="store_true", help="measure instead of checking")
    return parser.parse_args()


def main() -> None:
    in_environment()
    options = arguments()
    from checks import CHECKS
    from gateways import GATEWAYS

    if options.measure:
        from measure import measure

        measure(options.locket, options.gateways.split(","))
        return
    from manifests import validate

    print(validate(), flush=True)
    logs = options.logs or Path(tempfile.mkdtemp(prefix="locket-scaling-"))
    for name in options.gateways.split(","):
        for check in options.checks.split(","):
            start = time.monotonic()
            folder = logs / f"{name}-{check}"
            try:
                said = asyncio.run(CHECKS[check](GATEWAYS[name], options, folder))
            except BaseException:
                print(f"{name}: {check} failed; logs in {folder}", file=sys.stderr, flush=True)
                raise
            print(f"{name}: {check}: {said} ({time.monotonic() - start:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
