#!/usr/bin/env python3
"""The crates that are linked into the binary, as a CycloneDX 1.5 document on standard output.

Asks `cargo tree` for the normal dependencies of the package `locket` with the features given, and
takes checksums from Cargo.lock. The same source gives the same document: it holds no time, and its
serial number is made from its content. Needs cargo and Python 3.11, and no network once the crates
are there.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tomllib
import uuid

ROOT = pathlib.Path(__file__).resolve().parent.parent
# "0 locket v0.1.0 (/src/crates/locket)|Apache-2.0"
LINE = re.compile(r"(?P<depth>\d+) (?P<name>\S+) v(?P<version>\S+)(?: \((?P<note>.*?)\))?\|(?P<license>.*)")


def tree(features):
    """Lines of `cargo tree`: (depth, name, version, licence expression)."""
    command = ["cargo", "tree", "--locked", "--offline", "-p", "locket", "--edges", "normal", "--no-dedupe"]
    command += ["--prefix", "depth", "--format", " {p}|{l}"]
    if features:
        command += ["--features", features]
    output = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for line in output.splitlines():
        match = LINE.fullmatch(line)
        if match is None:
            sys.exit(f"sbom: cannot read this line of cargo tree: {line!r}")
        yield int(match["depth"]), match["name"], match["version"], match["license"]


def graph(lines):
    """Licences of the crates, and for each the crates it depends on. A crate is (name, version)."""
    licenses, edges, path = {}, {}, []
    for depth, name, version, license_ in lines:
        crate = (name, version)
        licenses[crate] = license_
        edges.setdefault(crate, set())
        del path[depth:]
        if path:
            edges[path[-1]].add(crate)
        path.append(crate)
    return licenses, edges


def checksums():
    """SHA-256 of each crate that came from a registry."""
    lock = tomllib.loads((ROOT / "Cargo.lock").read_text())
    return {(p["name"], p["version"]): p["checksum"] for p in lock["package"] if "checksum" in p}


def component(crate, license_, checksum):
    """A crate as CycloneDX has it."""
    name, version = crate
    entry = {"type": "library", "bom-ref": f"{name}@{version}", "name": name, "version": version}
    if license_:
        # Old manifests write MIT/Apache-2.0 where SPDX has OR.
        entry["licenses"] = [{"expression": license_.replace("/", " OR ")}]
    if checksum:
        entry["hashes"] = [{"alg": "SHA-256", "content": checksum}]
        entry["purl"] = f"pkg:cargo/{name}@{version}"
    return entry


def document(commit, features):
    """The whole bill of materials."""
    licenses, edges = graph(tree(features))
    sums = checksums()
    parts = {crate: component(crate, licenses[crate], sums.get(crate)) for crate in sorted(licenses)}
    root = next(crate for crate in parts if crate[0] == "locket")
    main = parts.pop(root) | {"type": "application"}
    properties = [{"name": "locket:commit", "value": commit}]
    if features:
        properties.append({"name": "locket:features", "value": features})
    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": main, "properties": properties},
        "components": list(parts.values()),
        "dependencies": [
            {"ref": f"{c[0]}@{c[1]}", "dependsOn": [f"{d[0]}@{d[1]}" for d in sorted(edges[c])]}
            for c in sorted(edges)
        ],
    }
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(bom, sort_keys=True))
    return {"bomFormat": bom.pop("bomFormat"), "specVersion": bom.pop("specVersion"),
            "serialNumber": f"urn:uuid:{serial}", **bom}


def main():
    """Reads the arguments, writes the document."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--commit", default="unknown", help="what was built")
    parser.add_argument("--features", default="", help="features beside the default ones, for example cuda")
    arguments = parser.parse_args()
    json.dump(document(arguments.commit, arguments.features), sys.stdout, indent=1)
    print()


if __name__ == "__main__":
    main()
