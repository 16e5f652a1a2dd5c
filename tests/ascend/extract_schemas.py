#!/usr/bin/env python3
"""Reads the schemas of the operators that the runtime calls out of torch_npu wheels, and says which versions fit.

    pip download --no-deps torch_npu==2.14.0 -d wheels
    python tests/ascend/extract_schemas.py wheels/*.whl            # print what does not fit
    python tests/ascend/extract_schemas.py --write wheels/*.whl    # and keep the schemas in schemas.json

Nothing is imported from the wheels.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from ascend_rig.install import TORCH_NPU
from ascend_rig.schemas import fit_table, schemas_of_wheel, wheel_version

LISTING = Path(__file__).parent / "schemas.json"


def main(arguments: list[str]) -> None:
    listing = json.loads(LISTING.read_text())
    calls = listing["calls"]
    read = {}
    for wheel in (Path(argument) for argument in arguments if argument != "--write"):
        read[wheel_version(wheel)] = schemas_of_wheel(wheel, calls)
    versions = {**listing["versions"], **read}
    fits = fit_table(calls, versions, TORCH_NPU)
    for version in sorted(read):
        print(f"torch_npu {version}: {'fits' if not fits[version] else 'does not fit'}")
        for problem in fits[version]:
            print(f"  {problem}")
    if "--write" in arguments:
        listing["versions"] = dict(sorted(versions.items()))
        listing["misfits"] = dict(sorted(fits.items()))
        LISTING.write_text(json.dumps(listing, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
