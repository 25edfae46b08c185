"""Boards, rules and alerts: the files first, then against a live server. See docs/monitoring.md.

    .ci/monitoring [--files-only] [--vision]
"""

import argparse
import time

import files
import live


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--locket", required=True, help="the binary")
    parser.add_argument("--prometheus", default="prometheus")
    parser.add_argument("--promtool", default="promtool")
    parser.add_argument("--files-only", action="store_true")
    parser.add_argument("--vision", action="store_true", help="the model has images: their series must be there")
    options = parser.parse_args()
    began = time.monotonic()
    boards, rules, read = files.check(options.promtool)
    print(f"{boards} boards, {rules} rules and alerts, {read} expressions are well-formed")
    if not options.files_only:
        asked, rounds, complaints = live.check(vars(options), options.vision)
        print(f"{asked} expressions return something after {rounds} rounds of load; a killed server is told of")
        print(f"promtool's lint: nothing but vLLM's names ({complaints} lines)")
    print(f"monitoring: {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
